"""`llmjax plan --search`: the best program for given chips, of all meshes, remats, accumulations and batches.

Closed forms leave out what cannot fit and rank the rest; the first of them are compiled, each in a process of its
own, and ranked by the time that their programs take.
"""

import dataclasses
import itertools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

from llmjax.config import ConfigError, find_problems, to_dict
from llmjax.parallel.spec import AXES
from llmjax.plan import closed
from llmjax.plan.words import duration, gib, table

ROOM = 1.1  # Closed forms may be so much too high; what they find larger than this is not compiled.
REMATS = ('none', 'dots', 'minimal', 'out', 'mlp', 'full')
ACCUMULATIONS = (1, 2, 4, 8, 16)
ALIKE = 3  # Programs of the same mesh that are compiled, at most, before other meshes have had their turn.


@dataclasses.dataclass
class Candidate:
  """A program: what it changes in the spec, what closed forms say, and later its plan."""

  spec: object
  fast: dict
  plan: dict | None = None

  @property
  def mesh(self):
    return ' '.join(f'{a}={getattr(self.spec.mesh, a)}' for a in AXES if getattr(self.spec.mesh, a) > 1) or 'one'

  @property
  def speed(self):
    return (self.plan or self.fast)['tokens_per_second_per_chip']

  def row(self):
    train, memory = self.spec.train, (self.plan or self.fast)['hbm_bytes']
    compiled = self.plan is not None
    return (self.mesh, train.remat, train.accumulation, train.batch_size, gib(memory['total']),
            f'{self.fast["tokens_per_second_per_chip"]:,.0f}',
            f'{self.plan["tokens_per_second_per_chip"]:,.0f}' if compiled and self.plan['fits'] else
            'does not fit' if compiled else '', f'{self.plan["mfu"]:.1%}' if compiled and self.plan['fits'] else '')


def run(spec, topology, options):
  """Searches, prints the table, writes the best config; returns 0 where something fits."""
  found = candidates(spec, topology, options.rows_per_chip)
  if not found:
    raise ConfigError([f'nothing fits {topology.name}' + (f' x {topology.slices}' if topology.slices > 1 else '')
                       + ' by closed forms: take more chips, or a smaller train.batch_size'])
  chosen = choose(found, options.most)
  print(f'{len(found)} programs may fit by closed forms; compiling the {len(chosen)} most promising, '
        f'{options.jobs} at a time')
  interrupted = False
  try:
    compile_all(chosen, options)
  except KeyboardInterrupt:
    interrupted = True
    print('\nstopped by Ctrl-C; what was compiled is kept')
  done = sorted((c for c in chosen if c.plan is not None), key=lambda c: (-c.plan['fits'], -c.speed))
  header = ('mesh', 'remat', 'accumulation', 'batch', 'GiB', 'closed form', 'tokens/s/chip', 'MFU')
  print(table([header, *(c.row() for c in done)], right=(2, 3, 4, 5, 6, 7)))
  if not done or not done[0].plan['fits']:
    print('none of the compiled programs fits' if done else 'nothing was compiled')
    return 130 if interrupted else 1
  file = pathlib.Path(options.output or '.') / 'best.json'
  file.parent.mkdir(parents=True, exist_ok=True)
  best = to_dict(done[0].spec)
  best.pop('cost')  # Of `plan` alone; `pretrain` takes the rest.
  file.write_text(json.dumps(best, indent=2) + '\n')
  print(f'the best is {done[0].mesh}, remat {done[0].spec.train.remat}, accumulation '
        f'{done[0].spec.train.accumulation}: --config={file}')
  return 130 if interrupted else 0


def candidates(spec, topology, rows_per_chip=()):
  """Returns the Candidates that may fit, the fastest by closed forms first.

  rows_per_chip: global batches to try, in rows for each chip; empty keeps the spec's.  Axes are searched that can
  help: stage and context only where the spec already uses them, expert only with experts.
  """
  devices = topology.devices // topology.slices
  axes = ['data', 'fsdp', 'tensor'] + ['expert'] * bool(spec.model.num_experts)
  axes += [a for a in ('stage', 'context') if spec.mesh.size(a) > 1]
  batches = [rows * topology.chips for rows in rows_per_chip] or [spec.train.batch_size]
  found = []
  for sizes in closed.mesh_shapes(devices, tuple(axes)):
    mesh = dataclasses.replace(spec.mesh, **{**dict.fromkeys(AXES, 1), **sizes})
    for remat, accumulation, batch in itertools.product(REMATS, ACCUMULATIONS, batches):
      if batch % accumulation:
        continue
      other = dataclasses.replace(spec, mesh=mesh, train=dataclasses.replace(
          spec.train, remat=remat, accumulation=accumulation, batch_size=batch))
      if list(find_problems(other)):
        continue
      fast = closed.plan(other, topology)
      if fast['hbm_bytes']['total'] <= ROOM * topology.device_hbm:
        found.append(Candidate(other, fast))
  return sorted(found, key=lambda c: -c.speed)


def choose(found, most):
  """Returns at most `most` of the candidates, in their order, no mesh more than ALIKE times while others wait."""
  taken, counts = [], {}
  for candidate in found:
    if counts.get(candidate.mesh, 0) < ALIKE and len(taken) < most:
      counts[candidate.mesh] = counts.get(candidate.mesh, 0) + 1
      taken.append(candidate)
  for candidate in found:
    if len(taken) < most and candidate not in taken:
      taken.append(candidate)
  return taken


def compile_all(chosen, options):
  """Compiles all, `options.jobs` at a time, saying how long it still takes; ends its processes on Ctrl-C."""
  waiting, running, done, start = list(chosen), [], 0, time.perf_counter()
  with tempfile.TemporaryDirectory() as folder:
    try:
      while waiting or running:
        while waiting and len(running) < options.jobs:
          running.append((waiting[0], *_start(waiting.pop(0), options, pathlib.Path(folder) / str(len(waiting)))))
        for job in [j for j in running if j[1].poll() is not None]:
          running.remove(job)
          candidate, process, output = job
          if (output / 'plan.json').exists():
            candidate.plan = json.loads((output / 'plan.json').read_text())
          done += 1
          left = (time.perf_counter() - start) / done * (len(waiting) + len(running))
          _say(candidate, done, len(chosen), left, output)
        time.sleep(0.2)
    finally:
      for _, process, _ in running:
        process.terminate()
      for _, process, _ in running:
        process.wait()


def _start(candidate, options, output):
  """Returns (process, its output folder) of one plan."""
  output.mkdir()
  (output / 'config.json').write_text(json.dumps(to_dict(candidate.spec)))
  process = subprocess.Popen(
      [sys.executable, '-m', 'llmjax', 'plan', f'--config={output / "config.json"}', f'--topology={options.topology}',
       f'--slices={options.slices}', f'--output={output}'], env=os.environ,
      stdout=subprocess.DEVNULL, stderr=(output / 'errors').open('w'), start_new_session=True)
  return process, output


def _say(candidate, done, total, left, output):
  train = candidate.spec.train
  what = f'{candidate.mesh}, remat {train.remat}, accumulation {train.accumulation}, batch {train.batch_size}'
  if candidate.plan is None:
    lines = (output / 'errors').read_text().strip().splitlines()
    result = f'failed: {lines[-1][:160] if lines else "no message"}'
  elif candidate.plan['fits']:
    result = f'{candidate.speed:,.0f} tokens/s/chip'
  else:
    result = f'does not fit ({gib(candidate.plan["hbm_bytes"]["total"])} GiB)'
  print(f'[{done}/{total}] {what}: {result}' + (f'; about {duration(left)} left' if done < total else ''), flush=True)
