"""`llmjax plan`: predicts memory, speed and cost of a recipe on TPUs from the compiled program.

The step is the one that `pretrain` runs, lowered with the same shardings and compiled by libtpu, which needs no TPU.
"""

import dataclasses
import json
import math
import pathlib
import sys

from llmjax.config import ConfigError, to_dict
from llmjax.parallel.spec import AXES
from llmjax.plan import analytical, memory
from llmjax.plan.compiler import OutOfMemory, compile_cached, tpu_devices, versions
from llmjax.plan.meter import make_meter
from llmjax.plan.text import describe
from llmjax.plan.topology import parse_topology, place_of
from llmjax.report import plan_page


def run(spec, options):
  """Print the plan and write it to options.output; return 0 if the run fits, else 1."""
  topology = parse_topology(options.topology, options.slices)
  spec = settle(spec, topology)
  if options.search:
    from llmjax.plan import search
    return search.run(spec, topology, options)
  if options.fast:
    plan = analytical.plan(spec, topology)
  elif not topology.chip.tpu or spec.train.platform == 'gpu':
    flag = 'train.platform=gpu' if topology.chip.tpu else f'--topology={options.topology}'
    raise ConfigError([f'{flag}: compiling for a GPU needs that GPU; for the analytical model add --fast'
                       + (' --topology=h100:8' if topology.chip.tpu else '')])
  else:
    try:
      plan = make_plan(spec, topology, options.hlo)
    except OutOfMemory as e:
      plan = plan_out_of_memory(spec, topology, e.details)
  if not plan['fits']:
    plan.setdefault('changes', analytical.suggest_changes(spec, topology))
  cost = make_meter(spec.cost, topology.chip, topology.chips).charge(plan['budget']['seconds']).report()
  plan.update(cost=cost, config=to_dict(spec))
  print(describe(plan))
  if options.output:
    write(plan, options.output)
  return 0 if plan['fits'] else 1


def settle(spec, topology):
  """Return the spec with a mesh that fills the chips; raise ConfigError, naming meshes that do, if it cannot."""
  if not spec.model.vocab_size:
    from llmjax.run import start
    spec = start.resolve(spec)
  mesh = spec.mesh
  if topology.slices > 1 and mesh.slices == 1:
    mesh = dataclasses.replace(mesh, dcn_data=topology.slices)
    print(f'mesh.dcn_data={topology.slices}: one replica of the model per slice; set --config.mesh.dcn_fsdp or '
          'dcn_stage to shard it over slices')
  if mesh.slices != topology.slices:
    raise ConfigError([f'the dcn sizes of the mesh multiply to {mesh.slices}, but there are {topology.slices} slices; '
                       f'write --slices={mesh.slices}, or make dcn_data x dcn_fsdp x dcn_stage {topology.slices}'])
  devices = topology.devices // topology.slices
  sizes = {axis: getattr(mesh, axis) for axis in AXES}
  fixed = math.prod(n for n in sizes.values() if n != -1)
  if -1 in sizes.values() and devices % fixed == 0:
    sizes = {axis: devices // fixed if n == -1 else n for axis, n in sizes.items()}
  if math.prod(sizes.values()) != devices:
    near = nearest_meshes({axis: max(n, 1) for axis, n in sizes.items()}, devices)
    raise ConfigError([
        f'the mesh {mesh_text(sizes)} does not fill {topology.name}, which has {devices} devices'
        + (' per slice' if topology.slices > 1 else '') + '; the nearest that do: '
        + ', or '.join(' '.join(f'--config.mesh.{a}={n}' for a, n in change.items()) for change in near)])
  spec = dataclasses.replace(spec, mesh=dataclasses.replace(mesh, **sizes))
  if problems := list(spec.resolved_problems()):
    raise ConfigError(problems)
  return spec


def mesh_text(sizes):
  return ' x '.join(f'{axis} {n}' for axis, n in sizes.items() if n != 1) or 'all axes 1'


def nearest_meshes(sizes, devices, count=3):
  """Return up to `count` changes {axis: size} after which the sizes multiply to `devices`, the smallest first.

  Changes one axis if possible, else two.  The size of a change is measured in doublings.
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
  doublings = lambda change: sum(abs(math.log2(n / sizes[a])) for a, n in change.items())
  changes = changes or [{'data': 1, 'fsdp': devices, **{a: 1 for a in AXES[2:] if sizes[a] != 1}}]
  # Prefer axes that are already in use.
  return sorted(changes, key=lambda c: (sum(sizes[a] == 1 for a in c), doublings(c)))[:count]


def lower(spec, topology):
  """Return (lowered step, mesh, abstract state) of pretraining on these chips."""
  devices = tpu_devices(topology)
  import jax

  from llmjax.commands.mesh import abstract_pretraining
  from llmjax.parallel.mesh import make_mesh
  from llmjax.train.step import lower_step
  try:
    mesh = make_mesh(spec.mesh, devices)
  except NotImplementedError as e:
    sizes = {axis: getattr(spec.mesh, axis) for axis in AXES}
    raise ConfigError([f'the mesh {mesh_text(sizes)} cannot be mapped to {topology.name}; use axis sizes that are '
                       f'products of {", ".join(map(str, topology.shape))}']) from e
  step, state, batch = abstract_pretraining(spec, mesh)
  with jax.set_mesh(mesh):
    return lower_step(step, state, batch), mesh, state


def make_plan(spec, topology, hlo=''):
  """Compile the step and return its plan (see `read_program`).  hlo: file for the program's text, or ''."""
  from llmjax.run.hardware import cache_folder
  lowered, mesh, state = lower(spec, topology)
  print(f'compiling the step for {topology.full_name} ...', file=sys.stderr, flush=True)
  text, compiled_memory, seconds = compile_cached(lowered, spec.mesh, topology, cache_folder().parent / 'plans')
  if hlo:
    pathlib.Path(hlo).write_text(text)
  return read_program(spec, topology, mesh, text, compiled_memory, seconds, state)


def read_program(spec, topology, mesh, text, compiled_memory, compile_seconds, state):
  """Return the plan of a compiled program as a JSON-serializable dict; bytes are per device."""
  from llmjax.plan.schedule import Program
  program = Program(text, mesh, topology, [place_of(d) for d in mesh.devices.flat], analytical.attention_fraction(spec))
  plan = analytical.outline(spec, topology)
  plan.update(source='compiled', compile_seconds=compile_seconds, versions=versions(),
              **describe_memory(spec, topology, program.module, compiled_memory, state))
  totals, clock = program.totals, topology.chip.clock
  plan.update(
      fits=plan['hbm_bytes']['total'] <= topology.device_hbm, clock_hz=clock,
      cycles={'total': sum(totals.cycles.values()), **totals.cycles},
      parts={'matmul': totals.cycles['matmul'] / clock, 'other': totals.cycles['other'] / clock,
             'kernel': totals.kernel, 'exposed': totals.waiting},
      network_seconds=totals.network, step_seconds=totals.seconds,
      kernels=[dataclasses.asdict(k) for k in program.kernels],
      collectives=summarize_transfers(program.transfers),
      top=[dict(zip(('seconds', 'category', 'name', 'runs', 'op_name'), row, strict=True))
           for row in program.top[:12]],
      unknown_loops=program.unknown_loops,
      loops=[{'name': b.name, 'trips': b.trips, 'runs': b.runs, 'seconds': b.totals.seconds,
              'backward': any('transpose(' in e.op_name for e in b.events),
              'events': [dataclasses.asdict(e) for e in b.events if e.seconds > b.totals.seconds / 2000]}
             for b in program.bodies[:2]])
  return analytical.add_throughput(plan, spec, topology)


def describe_memory(spec, topology, module, compiled_memory, state):
  """Return the memory entries of a plan: bytes per device by purpose, and the largest arrays."""
  import jax

  from llmjax.commands.mesh import local_bytes, path_name
  activations, gradients = memory.stacked_arrays(module, spec.train.gradient_accumulation_steps)
  total = lambda tensors: sum(t.bytes * t.count for t in tensors)
  params = sum(map(local_bytes, jax.tree.leaves(state.params)))
  optimizer = sum(map(local_bytes, jax.tree.leaves(state.opt_state)))
  leaves = sorted(((path_name(p), leaf) for p, leaf in jax.tree_util.tree_flatten_with_path(state)[0]),
                  key=lambda item: -local_bytes(item[1]))[:8]
  m = compiled_memory
  hbm_bytes = {
      'arguments': m['arguments'], 'temp': m['temp'], 'code': m['code'],
      'total': m['arguments'] + m['output'] - m['alias'] + m['temp'] + m['code'], 'limit': topology.device_hbm,
      'parameters': params, 'optimizer': optimizer, 'gradients': total(gradients), 'activations': total(activations),
      'temporaries': max(m['temp'] - total(activations) - total(gradients), 0),
      'batch': max(m['arguments'] - params - optimizer, 0)}
  return {'hbm_bytes': hbm_bytes,
          'largest_state': [{'name': name, 'type': f'{leaf.dtype}{list(leaf.sharding.shard_shape(leaf.shape))}',
                             'bytes': local_bytes(leaf), 'count': 1} for name, leaf in leaves],
          'saved_activations': list(map(dataclasses.asdict, activations)),
          'largest_buffers': list(map(dataclasses.asdict, memory.largest_buffers(module)))}


def summarize_transfers(transfers):
  """Return one row per kind, mesh axes and synchronism of collectives, by decreasing seconds; bytes are per step."""
  rows = {}
  for t in transfers:
    key = t.collective.kind, t.collective.axes, t.asynchronous, t.network
    row = rows.setdefault(key, dict(kind=key[0], axes=list(key[1]), asynchronous=key[2], network=key[3], places=0,
                                    runs=0, bytes=0, sent_bytes=0, seconds=0.0))
    row['places'] += 1
    for name, value in (('runs', 1), ('bytes', t.collective.bytes), ('sent_bytes', t.sent), ('seconds', t.seconds)):
      row[name] += value * t.runs
  return sorted(rows.values(), key=lambda r: -r['seconds'])


def plan_out_of_memory(spec, topology, details):
  """Return the plan of a program that the compiler rejected: the analytical model, and changes that would fit."""
  plan = analytical.plan(spec, topology)
  hbm_bytes = plan['hbm_bytes']
  used = details['used'] + hbm_bytes['arguments'] * details['temporaries_only']
  buffers = [dataclasses.asdict(t) for t in details['allocations'][:10]]
  plan.update(source='the analytical model; the compiler ran out of memory', fits=False,
              largest_buffers=buffers or analytical.largest_buffers(spec, topology),
              changes=analytical.suggest_changes(spec, topology, used / hbm_bytes['total']))
  hbm_bytes.update(total=used, limit=details['limit'], temp=used - hbm_bytes['arguments'])
  return plan


def write(plan, folder):
  """Write plan.json and plan.html."""
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  (folder / 'plan.json').write_text(json.dumps(plan, indent=1) + '\n')
  (folder / 'plan.html').write_text(plan_page.render(plan))
  print(f'wrote {folder / "plan.json"} and {folder / "plan.html"}')
