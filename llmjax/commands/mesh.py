"""`llmjax mesh`: shows how a recipe is sharded over a device mesh, and the collectives of its step.

Both are read from the shardings and the compiled program of the step that `pretrain` runs, on emulated CPU devices, so
that neither an accelerator nor memory for the model is needed.
"""

import dataclasses
import itertools
import math
import re
import sys

import jax
import numpy as np

from llmjax.config import ConfigError, find_problems
from llmjax.data.packing import FIELDS
from llmjax.parallel import sharding
from llmjax.parallel.mesh import fill, make_mesh
from llmjax.parallel.spec import AXES
from llmjax.plan.collectives import find_collectives, largest_replicated, summarize
from llmjax.plan.compiler import captured_stderr
from llmjax.plan.text import WIDTH, table
from llmjax.train import objectives
from llmjax.train.guard import watched
from llmjax.train.optimizers import make_optimizer
from llmjax.train.state import abstract_state
from llmjax.train.step import lower_step, make_train_step
from llmjax.train.trainable import make_trainable

MAX_ROWS, MAX_BLOCKS = 8, 4  # Of the drawing; larger meshes are abbreviated.
LARGE = 1 << 20  # Bytes from which a replicated array is reported.


def run(spec, options):
  """Print the mesh, the sharding of state and batch, and the collectives of the step; return the exit status."""
  count = options.devices or spec.mesh.size(*AXES)
  if not spec.model.vocab_size:
    from llmjax.run import start
    spec = start.resolve(spec)
  spec = dataclasses.replace(spec, mesh=fill(spec.mesh, count))
  if problems := list(find_problems(spec)):
    raise ConfigError(problems)
  mesh = make_mesh(spec.mesh, emulate_devices(count))
  print(draw(mesh))
  _, state, batch = abstract_pretraining(spec, mesh)
  print()
  print(describe_state(state, mesh))
  print()
  print(describe_batch(batch, mesh, spec.train.gradient_accumulation_steps))
  if options.no_compile:
    return 0
  print(flush=True)
  try:
    with captured_stderr() as lines:
      compiled = compile_step(spec, mesh)
  finally:
    rematerialized = print_warnings(lines)
  print(describe_collectives(find_collectives(compiled.as_text(), mesh)))
  if mesh.size > 1:
    for r in largest_replicated(compiled, LARGE):
      print(f'replicated on every device: {r.where} {r.name} {r.dtype}{list(r.shape)}, {mebibytes(r.bytes)} MiB')
  for array in rematerialized:
    print(f'XLA replicates {array} on every device to reshard it (involuntary full rematerialization)')
  return 0


def print_warnings(lines):
  """Print XLA's warnings, except for those of full rematerialization; return the arrays that the latter name."""
  arrays = []
  for line in lines:  # Each of them has a kilobyte of text per array.
    if 'Involuntary full rematerialization' not in line:
      print(line, file=sys.stderr)
    elif match := re.search(r'HLO operation %\S+ = (\w+\[[\d,]*\])', line):
      arrays.append(match[1])
  return list(dict.fromkeys(arrays))


def emulate_devices(count):
  """Return `count` emulated CPU devices; this process must not have used JAX before."""
  try:
    jax.config.update('jax_platforms', 'cpu')
    jax.config.update('jax_num_cpu_devices', count)
  except RuntimeError:  # JAX has been initialized, with a fixed number of devices.
    pass
  devices = jax.devices('cpu')
  if len(devices) < count:
    raise ConfigError([f'--devices={count}: this process has started JAX with {len(devices)} CPU devices; '
                       'run the command in a process of its own'])
  return devices[:count]


def abstract_pretraining(spec, mesh):
  """Return (step, state, batch): the step that `pretrain` compiles, including the guard, and abstract arguments."""
  rule, schedule = make_optimizer(spec.optimizer, spec.train.steps, spec.train.seed)
  tx, trainable = watched(rule, spec.guard.window), make_trainable(spec)
  state = abstract_state(trainable, tx, mesh, spec.mesh.zero)
  model = objectives.make_model(spec.model, spec.train, mesh.devices.flat[0].platform, spec.pipeline)
  loss_fn = objectives.make_objective(model, spec.train)
  step = make_train_step(trainable.wrap(loss_fn), tx, schedule, spec.train.gradient_accumulation_steps, spec.guard)
  return step, state, abstract_batch(spec, mesh)


def compile_step(spec, mesh):
  """Return the compiled step of pretraining for a mesh of CPUs, to inspect its shardings and collectives."""
  # One layer per iteration, as on accelerators, keeps the program small for deep models.
  train = dataclasses.replace(spec.train, scan_unroll=spec.train.scan_unroll or 1)
  step, state, batch = abstract_pretraining(dataclasses.replace(spec, train=train), mesh)
  with jax.set_mesh(mesh):
    # The program is never executed, so optimizations after partitioning are skipped.
    return lower_step(step, state, batch).compile(
        compiler_options={'xla_backend_optimization_level': 0, 'xla_llvm_disable_expensive_passes': True})


def abstract_batch(spec, mesh):
  """Return the global batch as sharded ShapeDtypeStructs [B, T]."""
  layout = jax.NamedSharding(mesh, sharding.mesh_spec(('batch', 'length')))
  shape = spec.train.batch_size, spec.data.seq_len
  return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=layout) for name, dtype in FIELDS.items()}


def draw(mesh):
  """Draw the mesh as a grid of device numbers; axes of size 1 are left out.

  The last axis runs to the right and the one before it down; there is one grid per index of the other axes.
  """
  axes = [a for a in mesh.axis_names if mesh.shape[a] > 1]
  ids = np.vectorize(lambda d: d.id, otypes=[int])(mesh.devices).reshape([mesh.shape[a] for a in axes])
  sizes = ' x '.join(f'{a} {mesh.shape[a]}' for a in axes)
  kind = mesh.devices.flat[0].platform
  if not axes:
    return f'mesh: one {kind} device'
  title = f'mesh: {mesh.size} {kind} devices = {sizes}'
  *outer, right = axes
  down = outer.pop() if outer else None
  lines = [title]
  indices = list(itertools.product(*(range(mesh.shape[a]) for a in outer)))
  for index in shorten(indices, MAX_BLOCKS):
    if index is None:
      lines.append('...')
      continue
    if index:
      lines.append(', '.join(f'{a} {i}' for a, i in zip(outer, index, strict=True)))
    block = ids[index] if down else ids[None]
    label = (lambda row: f'{down} {row}') if down else (lambda row: '')
    lines += _grid(block, right, label, '  ' if index else '')
  return '\n'.join(lines)


def _grid(block, right, label, indent):
  """Return the lines of a [rows, columns] block of device numbers."""
  rows, columns = block.shape
  left = max(len(label(row)) for row in range(rows))
  width = max(len(str(block.max())), len(str(columns - 1)), 3) + 2
  fits = (WIDTH - len(indent) - left - len(right) - 1) // width
  shown = shorten(range(columns), fits)
  cell = lambda text: f'{text:>{width}}'
  header = ''.join(cell('...' if c is None else c) for c in shown)
  lines = [f'{indent}{"":<{left}} {right}{header}']
  for row in shorten(range(rows), MAX_ROWS):
    if row is None:
      lines.append(f'{indent}...')
    else:
      values = ''.join(cell('...' if c is None else block[row, c]) for c in shown)
      lines.append(f'{indent}{label(row):<{left}} {"":<{len(right)}}{values}')
  return lines


def shorten(items, maximum):
  """Return the items; if there are more than `maximum`, the first ones, None for a gap, and the last."""
  items = list(items)
  return items if len(items) <= maximum else [*items[:max(maximum - 2, 1)], None, items[-1]]


def describe_state(state, mesh):
  """Return the table of parameters: shape, sharding, and memory per device of each and of its moments."""
  mirrored = sharding.mirrored(state.opt_state, state.params)
  moments, other = {}, 0
  for leaf, key in zip(jax.tree.leaves(state.opt_state), jax.tree.leaves(mirrored), strict=True):
    if key:
      moments[key] = moments.get(key, 0) + local_bytes(leaf)
    else:
      other += local_bytes(leaf)
  rows = [('parameter', 'shape', 'spec', 'dtype', 'MiB/device', 'moments')]
  leaves = jax.tree_util.tree_flatten_with_path(state.params)[0]
  for path, leaf in leaves:
    rows.append((path_name(path), 'x'.join(map(str, leaf.shape)), layout_text(leaf, mesh), str(leaf.dtype),
                 mebibytes(local_bytes(leaf)), mebibytes(moments.get(jax.tree_util.keystr(path), 0))))
  params, total = sum(local_bytes(leaf) for _, leaf in leaves), sum(moments.values())
  count = sum(leaf.size for _, leaf in leaves)
  rows.append(('total', f'{count:,}', '', '', mebibytes(params), mebibytes(total)))
  lines = [table(rows, right=(4, 5))]
  lines.append(f'other optimizer state: {mebibytes(other)} MiB/device')
  lines.append(f'parameters and optimizer: {mebibytes(params + total + other)} MiB per device; gradients take '
               f'another {mebibytes(params)} MiB during a step')
  return '\n'.join(lines)


def describe_batch(batch, mesh, accumulation):
  """Return the description of the sharding of a batch."""
  leaf = batch['tokens']
  sequences, tokens = leaf.sharding.shard_shape(leaf.shape)
  sharded = [*itertools.chain(*axes_of(leaf, mesh))]
  replicated = [a for a in mesh.axis_names if mesh.shape[a] > 1 and a not in sharded]
  lines = [f'batch: {leaf.shape[0]} x {leaf.shape[1]} tokens, {layout_text(leaf, mesh)}: {sequences} x {tokens} '
           'per device' + (f', replicated over {" and ".join(replicated)}' if replicated else '')]
  lines.append(f'  {", ".join(batch)}: {mebibytes(sum(map(local_bytes, batch.values())))} MiB/device'
               + (f'; {accumulation} microbatches of {sequences // accumulation} x {tokens}'
                  if accumulation > 1 else ''))
  return '\n'.join(lines)


def describe_collectives(collectives):
  """Return the table of the collectives of a step, by kind and mesh axes."""
  if not collectives:
    return 'collectives per step: none'
  rows = [('collective', 'over', 'ops', 'runs/step', 'MiB/step', 'MiB sent')]
  groups = summarize(collectives)
  for r in groups:
    over = ', '.join(r.axes) or 'one device'
    rows.append((r.kind, over, r.count, f'{"" if not r.unknown else ">="}{r.runs}', mebibytes(r.bytes),
                 mebibytes(r.sent_bytes)))
  total = lambda name: sum(getattr(r, name) for r in groups)
  rows.append(('total', '', total('count'), total('runs'), mebibytes(total('bytes')),
               mebibytes(total('sent_bytes'))))
  lines = ['collectives per step, as XLA partitions it for CPUs; sizes are per device:',
           table(rows, right=(2, 3, 4, 5))]
  if unknown := total('unknown'):
    lines.append(f'{unknown} of them are in loops of unknown trip count and are counted once')
  lines.append('CPUs reduce bfloat16 as float32 (twice the bytes), and all-reduce where others reduce-scatter')
  return '\n'.join(lines)


def axes_of(leaf, mesh):
  """Return for each axis of an array the mesh axes larger than 1 that it is sharded over."""
  spec = (*leaf.sharding.spec, *(None,) * (len(leaf.shape) - len(leaf.sharding.spec)))
  names = [() if part is None else part if isinstance(part, tuple) else (part,) for part in spec]
  return [tuple(n for n in part if mesh.shape[n] > 1) for part in names]


def layout_text(leaf, mesh):
  """Format a PartitionSpec, with '-' for an unsharded axis: 'P(-, fsdp, data+tensor)'."""
  return f'P({", ".join("+".join(part) or "-" for part in axes_of(leaf, mesh))})'


def path_name(path):
  return jax.tree_util.keystr(path, simple=True, separator='/')


def local_bytes(leaf):
  """Return the bytes per device of a sharded array."""
  return math.prod(leaf.sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize


def mebibytes(count):
  """Format bytes in MiB: '0.003', '12.5', '1,024'."""
  value = count / (1 << 20)
  return '0' if not count else f'{value:,.0f}' if value >= 100 else f'{value:.1f}' if value >= 1 else (
      f'{value:.3f}' if value >= 0.0005 else '<0.001')
