"""`llmjax plan`: what a recipe will need and do on TPUs, from the program that the TPU compiler makes of it.

The step is the one that `pretrain` runs, lowered for the same shardings and compiled by libtpu, which needs no TPU.
"""

import dataclasses
import gzip
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import math
import os
import pathlib
import sys
import time

from llmjax.config import ConfigError, to_dict
from llmjax.parallel.spec import AXES
from llmjax.plan import closed
from llmjax.plan.closed import causal_part, outline, rate
from llmjax.plan.memory import Tensor, largest, read_limit, stacks
from llmjax.plan.meter import make_meter
from llmjax.plan.topology import parse_topology, place_of
from llmjax.plan.words import describe
from llmjax.report import plan_page

# libtpu must not look for the metadata of a TPU machine, nor for another process that holds a TPU.
ENVIRONMENT = {'TPU_SKIP_MDS_QUERY': '1', 'JAX_PLATFORMS': 'cpu', 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
               'TPU_ACCELERATOR_TYPE': 'v5litepod-1', 'TPU_WORKER_HOSTNAMES': 'localhost', 'TPU_WORKER_ID': '0'}
PIP = "libtpu is missing: pip install 'jax[tpu]=={}'  (or --fast, which needs no compiler)"


class OutOfMemory(Exception):
  """The compiler could not place the program.  found: {'used', 'limit', 'allocations'}."""

  def __init__(self, found):
    self.found = found
    super().__init__(f'{found["used"]} bytes of {found["limit"]}')


def run(spec, options):
  """Prints the plan and writes it; returns 0 where the run fits, 1 where it does not."""
  topology = parse_topology(options.topology, options.slices)
  spec = settle(spec, topology)
  if options.search:
    from llmjax.plan import search
    return search.run(spec, topology, options)
  if options.fast:
    plan = closed.plan(spec, topology)
  elif not topology.chip.tpu or spec.train.platform == 'gpu':
    what = f'--topology={options.topology}' if not topology.chip.tpu else 'train.platform=gpu'
    raise ConfigError([f'{what}: the compiler for GPUs needs the GPU; without it only closed forms are available: '
                       'add --fast' + ('' if not topology.chip.tpu else ' --topology=h100:8')])
  else:
    try:
      plan = make_plan(spec, topology, options.hlo)
    except OutOfMemory as e:
      plan = too_large(spec, topology, e.found)
  if not plan['fits']:
    plan.setdefault('changes', closed.changes_that_fit(spec, topology))
  plan.update(cost=cost_of(plan, spec, topology), config=to_dict(spec))
  print(describe(plan))
  if options.output:
    write(plan, options.output)
  return 0 if plan['fits'] else 1


def settle(spec, topology):
  """Returns the spec with the mesh that fills the chips; raises ConfigError with meshes that do."""
  if not spec.model.vocab_size:
    from llmjax.run import start
    spec = start.resolve(spec)
  mesh = spec.mesh
  if topology.slices > 1 and mesh.slices == 1:
    mesh = dataclasses.replace(mesh, dcn_data=topology.slices)
    print(f'mesh.dcn_data={topology.slices}: one copy of the model on each slice; '
          '--config.mesh.dcn_fsdp or dcn_stage to divide it')
  if mesh.slices != topology.slices:
    raise ConfigError([f'the dcn sizes of the mesh multiply to {mesh.slices}, but there are {topology.slices} slices; '
                       f'write --slices={mesh.slices}, or make dcn_data x dcn_fsdp x dcn_stage {topology.slices}'])
  inside = topology.devices // topology.slices
  sizes = {axis: getattr(mesh, axis) for axis in AXES}
  fixed = math.prod(n for n in sizes.values() if n != -1)
  if -1 in sizes.values() and inside % fixed == 0:
    sizes = {axis: inside // fixed if n == -1 else n for axis, n in sizes.items()}
  if math.prod(sizes.values()) != inside:
    near = nearest_meshes({axis: max(n, 1) for axis, n in sizes.items()}, inside)
    raise ConfigError([
        f'the mesh {mesh_text(sizes)} does not fill {topology.name}, which has {inside} devices'
        + (' in each slice' if topology.slices > 1 else '') + '; the nearest that do: '
        + ', or '.join(' '.join(f'--config.mesh.{a}={n}' for a, n in found.items()) for found in near)])
  spec = dataclasses.replace(spec, mesh=dataclasses.replace(mesh, **sizes))
  if problems := list(spec.settled_problems()):
    raise ConfigError(problems)
  return spec


def mesh_text(sizes):
  return ' x '.join(f'{axis} {n}' for axis, n in sizes.items() if n != 1) or 'all axes 1'


def nearest_meshes(sizes, devices, most=3):
  """Returns at most `most` changes {axis: size} after which the sizes multiply to `devices`, the smallest first.

  Of one axis where that is enough, else of two; near is measured in doublings.
  """
  changes = []
  for axis in AXES:
    rest = math.prod(n for a, n in sizes.items() if a != axis)
    if devices % rest == 0:
      changes.append({axis: devices // rest})
  for i, first in enumerate(AXES):
    for second in AXES[i + 1:] if not changes else ():
      rest = math.prod(n for a, n in sizes.items() if a not in (first, second))
      if devices % rest == 0:
        both = devices // rest
        changes += [{first: n, second: both // n} for n in range(1, both + 1) if both % n == 0]
  far = lambda change: sum(abs(math.log2(n / sizes[a])) for a, n in change.items())
  # An axis that is in use already goes before a new one.
  changes = changes or [{'data': 1, 'fsdp': devices, **{a: 1 for a in AXES[2:] if sizes[a] != 1}}]
  return sorted(changes, key=lambda c: (sum(sizes[a] == 1 for a in c), far(c)))[:most]


def get_devices(topology):
  """Returns the compile-only devices of a topology; the first call in a process loads libtpu."""
  os.environ.update({k: v for k, v in ENVIRONMENT.items() if k == 'JAX_PLATFORMS' or k not in os.environ})
  import jax
  if importlib.util.find_spec('libtpu') is None:
    raise ConfigError([PIP.format(jax.__version__)])
  logging.getLogger('jax._src').setLevel(logging.ERROR)
  from jax.experimental import topologies
  jax.config.update('jax_platforms', 'cpu')
  more = {'num_slices': topology.slices} if topology.slices > 1 else {}
  if topology.chip.name == 'v4':  # Its two cores work as one device, as on Cloud TPUs.
    more['chip_config_name'] = 'megacore'
  shape = 'x'.join(map(str, topology.shape))
  name = f'{topology.chip.name}:{shape}'
  try:
    with quiet():
      return topologies.get_topology_desc(platform='tpu', topology_name=name, **more).devices
  except Exception as e:  # Whatever libtpu says of a name it does not know.
    raise ConfigError([f'--topology={name}: libtpu has no such slice ({str(e).splitlines()[0][:200]})']) from e


class quiet:
  """Keeps what C++ writes to standard error for the time of a block, and shows it only where the block fails."""

  def __enter__(self):
    import tempfile
    sys.stderr.flush()
    self._kept, self._file = os.dup(2), tempfile.TemporaryFile()
    os.dup2(self._file.fileno(), 2)

  def __exit__(self, kind, *_):
    os.dup2(self._kept, 2)
    os.close(self._kept)
    self._file.close()


def lower(spec, topology):
  """Returns (lowered step, mesh, abstract state): what `pretrain` would compile on these chips."""
  devices = get_devices(topology)
  import jax

  from llmjax.commands.mesh import abstract_pretraining
  from llmjax.parallel.mesh import make_mesh
  from llmjax.train.step import lower_step
  try:
    mesh = make_mesh(spec.mesh, devices)
  except NotImplementedError as e:
    sizes = {axis: getattr(spec.mesh, axis) for axis in AXES}
    raise ConfigError([f'the mesh {mesh_text(sizes)} cannot be laid on {topology.name}; give axes sizes that are '
                       f'products of {", ".join(map(str, topology.shape))}']) from e
  step, state, batch = abstract_pretraining(spec, mesh)
  with jax.set_mesh(mesh):
    return lower_step(step, state, batch), mesh, state


def compile_text(lowered):
  """Returns (text of the compiled program, its memory in bytes, seconds); raises OutOfMemory."""
  start = time.perf_counter()
  try:
    with quiet():
      compiled = lowered.compile()
  except Exception as e:
    if found := read_limit(str(e)):
      raise OutOfMemory(found) from e
    raise
  stats = compiled.memory_analysis()
  memory = {'arguments': stats.argument_size_in_bytes, 'output': stats.output_size_in_bytes,
            'alias': stats.alias_size_in_bytes, 'temp': stats.temp_size_in_bytes,
            'code': stats.generated_code_size_in_bytes}
  return compiled.as_text(), memory, time.perf_counter() - start


def compile_cached(lowered, spec, topology):
  """Returns `compile_text` of a program, from the user's cache folder where the same one was compiled before.

  The same: its StableHLO, the chips, the mesh, the versions of JAX and libtpu.
  """
  from llmjax.run.hardware import cache_folder
  sizes = sorted(spec.mesh.__dict__.items())
  versions = [importlib.metadata.version(name) for name in ('jax', 'jaxlib', 'libtpu')]
  parts = [lowered.as_text(), topology.name, str(topology.slices), str(sizes), *versions]
  key = hashlib.sha256('\0'.join(parts).encode()).hexdigest()
  file = cache_folder().parent / 'plans' / f'{key}.json.gz'
  if file.exists():
    kept = json.loads(gzip.decompress(file.read_bytes()))
    if 'used' in kept:
      kept['allocations'] = [Tensor(**a) for a in kept['allocations']]
      raise OutOfMemory(kept)
    return kept['text'], kept['memory'], kept['seconds']
  try:
    text, memory, seconds = compile_text(lowered)
    _keep(file, {'text': text, 'memory': memory, 'seconds': seconds})
  except OutOfMemory as e:
    _keep(file, {**e.found, 'allocations': [dataclasses.asdict(a) for a in e.found['allocations']]})
    raise
  return text, memory, seconds


def _keep(file, content):
  try:
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f'.{os.getpid()}')  # Another process must never read half a file.
    part.write_bytes(gzip.compress(json.dumps(content).encode()))
    part.replace(file)
  except OSError as e:
    print(f'the program is not kept: {e}', file=sys.stderr)


def make_plan(spec, topology, hlo=''):
  """Returns the plan as a dict, of the compiled program; see `read_program` for its entries."""
  lowered, mesh, state = lower(spec, topology)
  print(f'compiling the step for {topology.name}'
        + (f' x {topology.slices}' if topology.slices > 1 else '') + ' ...', file=sys.stderr, flush=True)
  text, memory, seconds = compile_cached(lowered, spec, topology)
  if hlo:
    pathlib.Path(hlo).write_text(text)
  return read_program(spec, topology, mesh, text, memory, seconds, state)


def read_program(spec, topology, mesh, text, memory, compile_seconds, state):
  """Returns the plan of a compiled program, a dict that JSON can hold; bytes are of one device."""
  import jax

  from llmjax.commands.mesh import local_bytes, path_name
  from llmjax.plan.schedule import Program
  devices = list(mesh.devices.flat)
  program = Program(text, mesh, topology, [place_of(d) for d in devices], causal_part(spec))
  kept, gradients = stacks(program.module, spec.train.gradient_accumulation_steps)
  arrays = lambda tensors: [dataclasses.asdict(t) for t in tensors]
  total = lambda tensors: sum(t.bytes * t.count for t in tensors)
  params = sum(map(local_bytes, jax.tree.leaves(state.params)))
  optimizer = sum(map(local_bytes, jax.tree.leaves(state.opt_state)))
  stored = sorted(((path_name(p), leaf) for p, leaf in jax.tree_util.tree_flatten_with_path(state)[0]),
                  key=lambda item: -local_bytes(item[1]))[:8]
  rest = memory['temp'] - total(kept) - total(gradients)
  plan = outline(spec, topology)
  plan.update(
      source='compiled', compile_seconds=compile_seconds,
      versions={name: importlib.metadata.version(name) for name in ('jax', 'jaxlib', 'libtpu')},
      hbm_bytes={
          'arguments': memory['arguments'], 'temp': memory['temp'], 'code': memory['code'],
          'total': memory['arguments'] + memory['output'] - memory['alias'] + memory['temp'] + memory['code'],
          'limit': topology.device_hbm, 'parameters': params, 'optimizer': optimizer,
          'gradients': total(gradients), 'activations': total(kept), 'temporaries': max(rest, 0),
          'batch': max(memory['arguments'] - params - optimizer, 0)},
      largest=[{'what': name, 'type': f'{leaf.dtype}{list(leaf.sharding.shard_shape(leaf.shape))}',
                'bytes': local_bytes(leaf), 'count': 1} for name, leaf in stored],
      kept=arrays(kept), arrays=arrays(largest(program.module)))
  plan['fits'] = plan['hbm_bytes']['total'] <= topology.device_hbm
  totals, clock = program.totals, topology.chip.clock
  plan['cycles'] = {'total': sum(totals.cycles.values()), **totals.cycles}
  plan['clock_hz'] = clock
  plan['parts'] = {'matmul': totals.cycles['matmul'] / clock, 'other': totals.cycles['other'] / clock,
                   'kernel': totals.kernel, 'exposed': totals.waiting}
  plan['network_seconds'] = totals.network
  plan['step_seconds'] = totals.seconds
  plan['kernels'] = [dataclasses.asdict(k) for k in program.kernels]
  plan['collectives'] = summarize(program.transfers)
  plan['top'] = [dict(zip(('seconds', 'category', 'name', 'runs', 'op_name'), row, strict=True))
                 for row in program.top[:12]]
  plan['unknown_loops'] = program.unknown_loops
  plan['loops'] = [
      {'name': b.name, 'trips': b.trips, 'runs': b.runs, 'seconds': b.totals.seconds,
       'backward': any('transpose(' in e.op_name for e in b.events),
       'events': [dataclasses.asdict(e) for e in b.events if e.seconds > b.totals.seconds / 2000]}
      for b in program.bodies[:2]]
  return rate(plan, spec, topology)


def summarize(transfers):
  """Returns the collectives as rows, by kind, mesh axes and whether they are asynchronous; bytes are of one step."""
  rows = {}
  for t in transfers:
    key = t.collective.kind, t.collective.axes, t.asynchronous, t.network
    row = rows.setdefault(key, dict(kind=key[0], axes=list(key[1]), asynchronous=key[2], network=key[3], places=0,
                                    runs=0, bytes=0, sent_bytes=0, seconds=0.0))
    row['places'] += 1
    for name, value in (('runs', 1), ('bytes', t.collective.bytes), ('sent_bytes', t.sent), ('seconds', t.seconds)):
      row[name] += value * t.runs
  return sorted(rows.values(), key=lambda r: -r['seconds'])


def cost_of(plan, spec, topology):
  """Returns what the run costs: see `energy.Meter.report`."""
  return make_meter(spec.cost, topology.chip, topology.chips).charge(plan['budget']['seconds']).report()


def too_large(spec, topology, found):
  """Returns the plan of a program that the compiler could not place: closed forms, what is too large, what fits."""
  plan = closed.plan(spec, topology)
  memory = plan['hbm_bytes']
  used = found['used'] + memory['arguments'] * found['temporaries_alone']
  plan.update(source='closed forms; the compiler ran out of memory', fits=False,
              arrays=[dataclasses.asdict(t) for t in found['allocations'][:10]] or closed.largest(spec, topology),
              changes=closed.changes_that_fit(spec, topology, used / memory['total']))
  memory.update(total=used, limit=found['limit'], temp=used - memory['arguments'])
  return plan


def write(plan, folder):
  """Writes plan.json and plan.html."""
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  (folder / 'plan.json').write_text(json.dumps(plan, indent=1) + '\n')
  (folder / 'plan.html').write_text(plan_page.render(plan))
  print(f'wrote {folder / "plan.json"} and {folder / "plan.html"}')

