"""`llmjax mesh`: how a recipe lies on a device mesh, and what its step sends between the devices.

Everything is read from the shardings and the compiled program of the step that `pretrain` runs, on
emulated CPU devices, so it needs neither an accelerator nor memory for the model.
"""

import contextlib
import dataclasses
import itertools
import math
import os
import re
import sys
import tempfile

import jax
import numpy as np

from llmjax.config import ConfigError, find_problems
from llmjax.data.packing import FIELDS
from llmjax.parallel import sharding
from llmjax.parallel.mesh import fill, make_mesh
from llmjax.parallel.spec import AXES
from llmjax.plan.collectives import find_collectives, largest_replicated, summarize
from llmjax.plan.text import WIDTH, table
from llmjax.train import objectives
from llmjax.train.guard import watched
from llmjax.train.optimizers import make_optimizer
from llmjax.train.state import abstract_state
from llmjax.train.step import lower_step, make_train_step

ROWS, BLOCKS = 8, 4  # Of the picture; larger meshes are drawn in part.
LARGE = 1 << 20  # Bytes from which an array that every device holds whole is named.


def run(spec, options):
  """Prints the mesh, the layout of state and batch, and the step's collectives; returns the exit status."""
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
  with warnings_of_xla() as warned:
    compiled = compile_step(spec, mesh)
  print(describe_collectives(find_collectives(compiled.as_text(), mesh)))
  if mesh.size > 1:
    for r in largest_replicated(compiled, LARGE):
      print(f'whole on every device: {r.where} {r.name} {r.dtype}{list(r.shape)}, {mebibytes(r.bytes)} MiB')
  for array in warned:
    print(f'XLA copies {array} whole to every device to lay it out anew: involuntary rematerialization')
  return 0


@contextlib.contextmanager
def warnings_of_xla():
  """Yields a list that holds, after the block, each array XLA warned it must replicate; passes on the rest.

  The warnings go to file descriptor 2 from C++, a kilobyte of text for each array.
  """
  found, kept = [], os.dup(2)
  sys.stderr.flush()
  with tempfile.TemporaryFile() as file:
    os.dup2(file.fileno(), 2)
    try:
      yield found
    finally:
      os.dup2(kept, 2)
      os.close(kept)
      file.seek(0)
      for line in file.read().decode(errors='replace').splitlines():
        if 'Involuntary full rematerialization' not in line:
          print(line, file=sys.stderr)
        elif (match := re.search(r'HLO operation %\S+ = (\w+\[[\d,]*\])', line)) and match[1] not in found:
          found.append(match[1])


def emulate_devices(count):
  """Returns this many CPU devices, emulated in this process, which must not have used JAX before."""
  try:
    jax.config.update('jax_platforms', 'cpu')
    jax.config.update('jax_num_cpu_devices', count)
  except RuntimeError:  # JAX runs already, with as many as it has.
    pass
  devices = jax.devices('cpu')
  if len(devices) < count:
    raise ConfigError([f'--devices={count}: this process has started JAX with {len(devices)} CPU devices; '
                       'run the command by itself'])
  return devices[:count]


def abstract_pretraining(spec, mesh):
  """Returns (step, state, batch): the very step that `pretrain` compiles, guard included, and shapes with shardings."""
  rule, schedule = make_optimizer(spec.optimizer, spec.train.steps, spec.train.seed)
  tx = watched(rule, spec.guard.window)
  state = abstract_state(spec.model, tx, spec.train.param_dtype, mesh, spec.mesh.zero)
  loss_fn = objectives.next_token(
      objectives.make_model(spec.model, spec.train, mesh.devices.flat[0].platform, spec.pipeline),
      z_loss=spec.train.z_loss, neftune_alpha=spec.train.neftune_alpha)
  step = make_train_step(loss_fn, tx, schedule, spec.train.gradient_accumulation_steps, spec.guard)
  return step, state, abstract_batch(spec, mesh)


def compile_step(spec, mesh):
  """Returns pretraining's step, compiled for a mesh of CPUs whose shardings and collectives alone matter."""
  # One layer a turn, as on an accelerator: the program stays small however deep the model is.
  train = dataclasses.replace(spec.train, scan_unroll=spec.train.scan_unroll or 1)
  step, state, batch = abstract_pretraining(dataclasses.replace(spec, train=train), mesh)
  with jax.set_mesh(mesh):
    # Machine code that is never run need not be fast; partitioning comes before it.
    return lower_step(step, state, batch).compile(
        compiler_options={'xla_backend_optimization_level': 0, 'xla_llvm_disable_expensive_passes': True})


def abstract_batch(spec, mesh):
  """Returns the global batch as ShapeDtypeStructs [B, T] with their shardings."""
  layout = jax.NamedSharding(mesh, sharding.mesh_spec(('batch', 'length')))
  shape = spec.train.batch_size, spec.data.seq_len
  return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=layout) for name, dtype in FIELDS.items()}


def draw(mesh):
  """Returns a picture of the mesh: the device at each place, axes named; axes of size 1 are left out.

  The last axis runs to the right and the one before it downwards; each place on the others has a block.
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
  places = list(itertools.product(*(range(mesh.shape[a]) for a in outer)))
  for place in shorten(places, BLOCKS):
    if place is None:
      lines.append('...')
      continue
    if place:
      lines.append(', '.join(f'{a} {i}' for a, i in zip(outer, place, strict=True)))
    block = ids[place] if down else ids[None]
    label = (lambda row: f'{down} {row}') if down else (lambda row: '')
    lines += _grid(block, right, label, '  ' if place else '')
  return '\n'.join(lines)


def _grid(block, right, label, indent):
  """Returns the lines of one [rows, columns] block of device numbers."""
  rows, columns = block.shape
  left = max(len(label(row)) for row in range(rows))
  width = max(len(str(block.max())), len(str(columns - 1)), 3) + 2
  fits = (WIDTH - len(indent) - left - len(right) - 1) // width
  shown = shorten(range(columns), fits)
  cell = lambda text: f'{text:>{width}}'
  header = ''.join(cell('...' if c is None else c) for c in shown)
  lines = [f'{indent}{"":<{left}} {right}{header}']
  for row in shorten(range(rows), ROWS):
    if row is None:
      lines.append(f'{indent}...')
    else:
      values = ''.join(cell('...' if c is None else block[row, c]) for c in shown)
      lines.append(f'{indent}{label(row):<{left}} {"":<{len(right)}}{values}')
  return lines


def shorten(items, most):
  """Returns the items, or where there are more than `most` the first ones, None for a gap, and the last."""
  items = list(items)
  return items if len(items) <= most else [*items[:max(most - 2, 1)], None, items[-1]]


def describe_state(state, mesh):
  """Returns the table of every parameter: shape, layout, and what it and its moments take on one device."""
  followed = sharding.mirrored(state.opt_state, state.params)
  moments, rest = {}, 0
  for leaf, key in zip(jax.tree.leaves(state.opt_state), jax.tree.leaves(followed), strict=True):
    if key:
      moments[key] = moments.get(key, 0) + local_bytes(leaf)
    else:
      rest += local_bytes(leaf)
  rows = [('parameter', 'shape', 'spec', 'dtype', 'MiB/device', 'moments')]
  leaves = jax.tree_util.tree_flatten_with_path(state.params)[0]
  for path, leaf in leaves:
    rows.append((path_name(path), 'x'.join(map(str, leaf.shape)), layout_text(leaf, mesh), str(leaf.dtype),
                 mebibytes(local_bytes(leaf)), mebibytes(moments.get(jax.tree_util.keystr(path), 0))))
  params, total = sum(local_bytes(leaf) for _, leaf in leaves), sum(moments.values())
  count = sum(leaf.size for _, leaf in leaves)
  rows.append(('total', f'{count:,}', '', '', mebibytes(params), mebibytes(total)))
  lines = [table(rows, right=(4, 5))]
  lines.append(f'optimizer state that follows no parameter: {mebibytes(rest)} MiB/device')
  lines.append(f'parameters and optimizer: {mebibytes(params + total + rest)} MiB on each device; gradients '
               f'take {mebibytes(params)} more in a step')
  return '\n'.join(lines)


def describe_batch(batch, mesh, accumulation):
  """Returns how a batch is shared out."""
  leaf = batch['tokens']
  rows, tokens = leaf.sharding.shard_shape(leaf.shape)
  shared = [*itertools.chain(*axes_of(leaf, mesh))]
  copies = [a for a in mesh.axis_names if mesh.shape[a] > 1 and a not in shared]
  lines = [f'batch: {leaf.shape[0]} x {leaf.shape[1]} tokens, {layout_text(leaf, mesh)}: {rows} x {tokens} '
           'on each device' + (f', the same along {" and ".join(copies)}' if copies else '')]
  lines.append(f'  {", ".join(batch)}: {mebibytes(sum(map(local_bytes, batch.values())))} MiB/device'
               + (f'; {accumulation} microbatches of {rows // accumulation} x {tokens}'
                  if accumulation > 1 else ''))
  return '\n'.join(lines)


def describe_collectives(collectives):
  """Returns the table of what one step sends, by kind and mesh axes."""
  if not collectives:
    return 'collectives of a step: none'
  rows = [('collective', 'over', 'places', 'runs/step', 'MiB/step', 'MiB sent')]
  found = summarize(collectives)
  for r in found:
    over = ', '.join(r.axes) or 'one device'
    rows.append((r.kind, over, r.count, f'{"" if not r.unknown else ">="}{r.runs}', mebibytes(r.bytes),
                 mebibytes(r.sent_bytes)))
  total = lambda name: sum(getattr(r, name) for r in found)
  rows.append(('total', '', total('count'), total('runs'), mebibytes(total('bytes')),
               mebibytes(total('sent_bytes'))))
  lines = ['collectives of a step, as XLA partitions it for CPUs; sizes are of one device:',
           table(rows, right=(2, 3, 4, 5))]
  if unknown := total('unknown'):
    lines.append(f'{unknown} of them are in loops of unknown length and are counted once')
  lines.append('CPUs reduce bfloat16 as float32 (twice the bytes), and all where others may reduce-scatter')
  return '\n'.join(lines)


def axes_of(leaf, mesh):
  """Returns for each axis of an array the mesh axes larger than 1 that share it."""
  spec = (*leaf.sharding.spec, *(None,) * (len(leaf.shape) - len(leaf.sharding.spec)))
  names = [() if part is None else part if isinstance(part, tuple) else (part,) for part in spec]
  return [tuple(n for n in part if mesh.shape[n] > 1) for part in names]


def layout_text(leaf, mesh):
  """Returns a PartitionSpec in short, '-' for an axis that is whole: 'P(-, fsdp, data+tensor)'."""
  return f'P({", ".join("+".join(part) or "-" for part in axes_of(leaf, mesh))})'


def path_name(path):
  return jax.tree_util.keystr(path, simple=True, separator='/')


def local_bytes(leaf):
  """Returns the bytes of a sharded array on one device."""
  return math.prod(leaf.sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize


def mebibytes(count):
  """Returns bytes in MiB: '0.003', '12.5', '1,024'; '0' for none."""
  value = count / (1 << 20)
  return '0' if not count else f'{value:,.0f}' if value >= 100 else f'{value:.1f}' if value >= 1 else (
      f'{value:.3f}' if value >= 0.0005 else '<0.001')
