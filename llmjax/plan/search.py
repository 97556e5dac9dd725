"""`llmjax plan --search`: the best program for given chips, of all meshes, remats, accumulations and batches.

Closed forms leave out what cannot fit and rank the rest; the first of them are compiled, each in a process of its
own, and ranked by the time that their programs take.
"""

import dataclasses
import itertools
import json
import math
import pathlib
import tempfile

from llmjax.config import ConfigError, to_dict
from llmjax.parallel.spec import AXES
from llmjax.plan import closed
from llmjax.plan import jobs as plan_jobs
from llmjax.plan.words import gib, table

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
    sizes = self.sizes + [('zero', self.spec.mesh.zero)] * (self.spec.mesh.zero > 0)
    return ' '.join(f'{axis}={n}' for axis, n in sizes) or 'one'

  @property
  def sizes(self):
    return [(axis, getattr(self.spec.mesh, axis)) for axis in AXES if getattr(self.spec.mesh, axis) > 1]

  @property
  def name(self):
    train = self.spec.train
    return (f'{self.mesh}, remat {train.remat}, accumulation {train.gradient_accumulation_steps}, '
            f'batch {train.batch_size}')

  @property
  def speed(self):
    return (self.plan or self.fast)['tokens_per_second_per_chip']

  def row(self):
    train, memory = self.spec.train, (self.plan or self.fast)['hbm_bytes']
    compiled = self.plan is not None
    return (self.mesh, train.remat, train.gradient_accumulation_steps, train.batch_size, gib(memory['total']),
            f'{self.fast["tokens_per_second_per_chip"]:,.0f}',
            f'{self.plan["tokens_per_second_per_chip"]:,.0f}' if compiled and self.plan['fits'] else
            'does not fit' if compiled else '', f'{self.plan["mfu"]:.1%}' if compiled and self.plan['fits'] else '')


def run(spec, topology, options):
  """Searches, prints the table, writes the best config; returns 0 where something fits."""
  found = candidates(spec, topology, options.sequences_per_chip)
  if not found:
    raise ConfigError([f'nothing fits {topology.name}' + (f' x {topology.slices}' if topology.slices > 1 else '')
                       + ' by closed forms: take more chips, or a smaller train.batch_size'])
  chosen = choose(found, options.max_compiles)
  print(f'{len(found)} programs may fit by closed forms; compiling the {len(chosen)} most promising, '
        f'{options.jobs} at a time')
  interrupted = False
  try:
    compile_all(chosen, options)
  except KeyboardInterrupt:
    interrupted = True
    print('\nstopped by Ctrl-C; what was compiled is kept')
  done = sorted((c for c in chosen if c.plan is not None), key=lambda c: (-c.plan['fits'], -c.speed))
  header = ('mesh', 'remat', 'gradient_accumulation_steps', 'batch', 'GiB', 'closed form', 'tokens/s/chip', 'MFU')
  print(table([header, *(c.row() for c in done)], right=(2, 3, 4, 5, 6, 7)))
  if not done or not done[0].plan['fits']:
    print('none of the compiled programs fits' if done else 'nothing was compiled')
    return 130 if interrupted else 1
  file = pathlib.Path(options.output or '.') / 'best.json'
  file.parent.mkdir(parents=True, exist_ok=True)
  file.write_text(json.dumps(to_dict(done[0].spec), indent=2) + '\n')
  print(f'the best is {done[0].mesh}, remat {done[0].spec.train.remat}, accumulation '
        f'{done[0].spec.train.gradient_accumulation_steps}: --config={file}')
  return 130 if interrupted else 0


def candidates(spec, topology, sequences_per_chip=()):
  """Returns the Candidates that may fit, the fastest by closed forms first; of nearly equal ones the simplest mesh.

  sequences_per_chip: global batches to try, in rows for each chip; empty keeps the spec's.  Every axis of the mesh is
  searched, expert only with experts; where `data` is in use with its parameters shared (zero 3) and not.
  """
  devices = topology.devices // topology.slices
  axes = [axis for axis in AXES if axis != 'expert' or spec.model.num_experts]
  batches = [rows * topology.chips for rows in sequences_per_chip] or [spec.train.batch_size]
  found = []
  for sizes in closed.mesh_shapes(devices, tuple(axes)):
    for zero in (0, 3) if sizes['data'] > 1 else (0,):
      mesh = dataclasses.replace(spec.mesh, **{**dict.fromkeys(AXES, 1), **sizes}, zero=zero)
      fits_mesh = dataclasses.replace(spec, mesh=mesh, train=dataclasses.replace(
          spec.train, gradient_accumulation_steps=1, batch_size=math.lcm(devices, *batches)))
      if any(True for _ in fits_mesh.settled_problems()):
        continue  # The model's sizes do not divide, whatever the batch.
      for remat, accumulation, batch in itertools.product(REMATS, ACCUMULATIONS, batches):
        other = dataclasses.replace(spec, mesh=mesh, train=dataclasses.replace(
            spec.train, remat=remat, gradient_accumulation_steps=accumulation, batch_size=batch))
        if batch % accumulation or any(True for _ in other.settled_problems()):
          continue
        if closed.estimate_memory(other, topology)['total'] <= ROOM * topology.device_hbm:
          found.append(Candidate(other, closed.plan(other, topology)))
  # Closed forms cannot tell a percent apart.
  return sorted(found, key=lambda c: (-round(math.log(c.speed) * 100), len(c.sizes), -c.speed))


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
  with tempfile.TemporaryDirectory() as folder:
    jobs = {}
    for number, candidate in enumerate(chosen):
      config = pathlib.Path(folder) / f'{number}.json'
      config.write_text(json.dumps(to_dict(candidate.spec)))
      job = plan_jobs.Job(candidate.name, [f'--config={config}', f'--topology={options.topology}',
                                           f'--slices={options.slices}'])
      jobs[number] = job
    try:
      plan_jobs.run_jobs(list(jobs.values()), options.jobs, lambda line: print(line, flush=True))
    finally:
      for number, job in jobs.items():
        chosen[number].plan = job.plan
