"""`llmjax plan --search`: search over meshes, rematerialization, gradient accumulation and batch sizes.

The analytical model discards the programs that cannot fit and ranks the rest.  The best of them are compiled, each in
its own process, and ranked again by their predicted step time.
"""

import dataclasses
import itertools
import json
import math
import pathlib
import tempfile

from llmjax.config import ConfigError, to_dict
from llmjax.parallel.spec import AXES
from llmjax.plan import analytical, jobs
from llmjax.plan.text import gib, table

MEMORY_MARGIN = 1.1  # The analytical model may overestimate memory by this factor; larger programs are not compiled.
REMATS = ('none', 'dots', 'minimal', 'out', 'mlp', 'full')
ACCUMULATION_STEPS = (1, 2, 4, 8, 16)
MAX_PER_MESH = 3  # Programs of one mesh that are compiled before other meshes are tried.


@dataclasses.dataclass
class Candidate:
  """A program.  estimate: its plan by the analytical model.  plan: its compiled plan, once there is one."""

  spec: object
  estimate: dict
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
  def tokens_per_second(self):
    return (self.plan or self.estimate)['tokens_per_second_per_chip']

  def row(self):
    """Return the cells of the table of results."""
    train, memory = self.spec.train, (self.plan or self.estimate)['hbm_bytes']
    speed = mfu = ''
    if self.plan is not None and self.plan['fits']:
      speed, mfu = f'{self.plan["tokens_per_second_per_chip"]:,.0f}', f'{self.plan["mfu"]:.1%}'
    elif self.plan is not None:
      speed = 'does not fit'
    return (self.mesh, train.remat, train.gradient_accumulation_steps, train.batch_size, gib(memory['total']),
            f'{self.estimate["tokens_per_second_per_chip"]:,.0f}', speed, mfu)


def run(spec, topology, options):
  """Search, print the table and write the best config; return 0 if a compiled program fits."""
  ranked = find_candidates(spec, topology, options.sequences_per_chip)
  if not ranked:
    raise ConfigError([f'nothing fits {topology.full_name} according to the analytical model: use more chips, or a '
                       'smaller train.batch_size'])
  chosen = choose(ranked, options.max_compiles)
  print(f'{len(ranked)} programs may fit according to the analytical model; compiling the best {len(chosen)}, '
        f'{options.jobs} at a time')
  interrupted = False
  try:
    compile_all(chosen, options)
  except KeyboardInterrupt:
    interrupted = True
    print('\ninterrupted; compiled programs stay in the cache')
  compiled = sorted((c for c in chosen if c.plan is not None), key=lambda c: (-c.plan['fits'], -c.tokens_per_second))
  header = ('mesh', 'remat', 'accumulation', 'batch', 'GiB', 'estimate', 'tokens/s/chip', 'MFU')
  print(table([header, *(c.row() for c in compiled)], right=(2, 3, 4, 5, 6, 7)))
  if not compiled or not compiled[0].plan['fits']:
    print('none of the compiled programs fits' if compiled else 'no program was compiled')
    return 130 if interrupted else 1
  best, file = compiled[0], pathlib.Path(options.output or '.') / 'best.json'
  file.parent.mkdir(parents=True, exist_ok=True)
  file.write_text(json.dumps(to_dict(best.spec), indent=2) + '\n')
  print(f'best: {best.name}: --config={file}')
  return 130 if interrupted else 0


def find_candidates(spec, topology, sequences_per_chip=()):
  """Return the Candidates that may fit, fastest estimate first; among nearly equal ones the simplest mesh first.

  sequences_per_chip: global batch sizes to try, in sequences per chip; empty keeps the spec's.  All mesh axes are
  searched (`expert` only for MoE models), and `data` both with and without sharded parameters (zero 3).
  """
  devices = topology.devices // topology.slices
  axes = [axis for axis in AXES if axis != 'expert' or spec.model.num_experts]
  batches = [n * topology.chips for n in sequences_per_chip] or [spec.train.batch_size]
  candidates = []
  for sizes in analytical.mesh_shapes(devices, tuple(axes)):
    for zero in (0, 3) if sizes['data'] > 1 else (0,):
      mesh = dataclasses.replace(spec.mesh, **{**dict.fromkeys(AXES, 1), **sizes}, zero=zero)
      largest_batch = dataclasses.replace(spec, mesh=mesh, train=dataclasses.replace(
          spec.train, gradient_accumulation_steps=1, batch_size=math.lcm(devices, *batches)))
      if any(True for _ in largest_batch.resolved_problems()):
        continue  # The mesh does not divide the model, whatever the batch size.
      for remat, accumulation, batch in itertools.product(REMATS, ACCUMULATION_STEPS, batches):
        candidate = dataclasses.replace(spec, mesh=mesh, train=dataclasses.replace(
            spec.train, remat=remat, gradient_accumulation_steps=accumulation, batch_size=batch))
        if batch % accumulation or any(True for _ in candidate.resolved_problems()):
          continue
        if analytical.estimate_memory(candidate, topology)['total'] <= MEMORY_MARGIN * topology.device_hbm:
          candidates.append(Candidate(candidate, analytical.plan(candidate, topology)))
  # The analytical model does not resolve differences of a percent.
  return sorted(candidates, key=lambda c: (-round(math.log(c.tokens_per_second) * 100), len(c.sizes),
                                           -c.tokens_per_second))


def choose(ranked, count):
  """Return at most `count` candidates in order, at most MAX_PER_MESH of a mesh while other meshes are left."""
  chosen, per_mesh = [], {}
  for candidate in ranked:
    if per_mesh.get(candidate.mesh, 0) < MAX_PER_MESH and len(chosen) < count:
      per_mesh[candidate.mesh] = per_mesh.get(candidate.mesh, 0) + 1
      chosen.append(candidate)
  for candidate in ranked:
    if len(chosen) < count and candidate not in chosen:
      chosen.append(candidate)
  return chosen


def compile_all(chosen, options):
  """Fill in the plans of the candidates, compiling `options.jobs` at a time; Ctrl-C ends the compilations."""
  with tempfile.TemporaryDirectory() as folder:
    pending = []
    for number, candidate in enumerate(chosen):
      config = pathlib.Path(folder) / f'{number}.json'
      config.write_text(json.dumps(to_dict(candidate.spec)))
      pending.append(jobs.Job(candidate.name, [f'--config={config}', f'--topology={options.topology}',
                                               f'--slices={options.slices}']))
    try:
      jobs.run_jobs(pending, options.jobs, lambda line: print(line, flush=True))
    finally:
      for candidate, job in zip(chosen, pending, strict=True):
        candidate.plan = job.plan
