"""The collectives of a compiled program, over which mesh axes, how often, and how large.

Reads what XLA compiled, so it counts what the partitioner and the compiler really made of a program.
"""

import dataclasses
import itertools
import math
import re

import jax
import numpy as np

from llmjax.plan.hlo import Array, Frame, Loop, Module, flatten, split_top

KINDS = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'ragged-all-to-all',
         'collective-permute', 'collective-broadcast')


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective instruction.

  axes: mesh axes whose coordinate differs within a group, in the mesh's order.  group_size: devices in a
  group; for a permute 2, since each device talks to one other.  result: what a device holds afterwards,
  one Array for each array in the instruction.  bytes: of the whole buffer at one device, the larger of
  what goes in and what comes out.  loops: turns of every while loop around it, outermost first, None
  where the text does not tell.  conditional: it is in a branch that may not run.  groups: numbers of the
  devices that talk to one another; pairs (from, to) for a permute.
  """

  kind: str
  axes: tuple[str, ...]
  group_size: int
  result: tuple[Array, ...]
  bytes: int
  loops: tuple[int | None, ...] = ()
  op_name: str = ''
  conditional: bool = False
  groups: tuple[tuple[int, ...], ...] = dataclasses.field(default=(), compare=False, repr=False)

  @property
  def trips(self):
    """How often it runs in one run of the program, or None where a loop's turns are unknown."""
    return None if None in self.loops else math.prod(self.loops)

  @property
  def sent_bytes(self):
    """Bytes that a device sends each time in the ring algorithm.

    (n - 1)/n of the buffer to gather, scatter or exchange it, twice that to reduce it for everyone
    (Patarasuk and Yuan 2009, section 4), all of it to permute or broadcast it.
    """
    if self.kind in ('collective-permute', 'collective-broadcast'):
      return self.bytes
    factor = 2 if self.kind == 'all-reduce' else 1
    return factor * self.bytes * (self.group_size - 1) // max(self.group_size, 1)


@dataclasses.dataclass(frozen=True)
class Row:
  """A line of `summarize`.

  count: instructions.  runs: how often they run in all, bytes, sent_bytes: of all those runs; an
  instruction under loops of unknown length counts once, and `unknown` says how many there are.
  """

  kind: str
  axes: tuple[str, ...]
  count: int
  runs: int
  bytes: int
  sent_bytes: int
  unknown: int


@dataclasses.dataclass(frozen=True)
class Replicated:
  """An array that every device holds whole.  where: 'input' or 'output'."""

  where: str
  name: str
  shape: tuple[int, ...]
  dtype: str
  bytes: int


def find_collectives(text, mesh):
  """Returns every Collective of an optimized HLO text, in the order of the program.

  text: `jax.jit(...).lower(...).compile().as_text()`.  mesh: the Mesh it was compiled for; device i of
  the text is `mesh.devices.flat[i]`.  The two halves of an asynchronous collective count once.
  Raises ValueError when the text is for another number of devices.
  """
  module = Module(text)
  devices = module.num_partitions * module.num_replicas
  if devices != mesh.devices.size:
    raise ValueError(f'the program is for {devices} devices and the mesh has {mesh.devices.size}; give '
                     'the mesh that it was compiled for')
  return [found for found, _ in _walk(module, mesh, Frame(module, module.entry), (), False)]


def _walk(module, mesh, frame, loops, conditional):
  """Yields (Collective, its Instruction) of a computation and of those that it runs."""
  for instruction in frame.computation.instructions.values():
    op = instruction.op
    if op == 'while':
      loop = Loop(frame, instruction)
      trips = loop.trips()
      yield from _walk(module, mesh, loop.body, (*loops, trips), conditional)
      # A loop asks once more than it turns.
      again = None if trips is None else trips + 1
      yield from _walk(module, mesh, loop.condition, (*loops, again), conditional)
    elif op == 'conditional':
      for branch in frame.branches(instruction):
        yield from _walk(module, mesh, branch, loops, True)
    elif op in ('call', 'async-start', 'call-start', 'fusion'):
      inside = _walk(module, mesh, frame.called(instruction), loops, conditional)
      yield from inside if op != 'fusion' else _fused(module, instruction, inside)
    elif (kind := op.removesuffix('-start')) in KINDS:
      yield _read(module, mesh, frame, instruction, kind, loops, conditional), instruction


def _fused(module, fusion, inside):
  """Yields the collectives of a fusion, as the TPU compiler makes them.

  Both halves of an asynchronous pair, and the fusions that carry it on between them, hold the
  collective; the one that starts it counts.  A fusion `all-reduce-scatter` is a reduce-scatter written
  as an all-reduce and a slice of it.
  """
  name = fusion.computation('calls')
  starts = any('"AsyncCollectiveStart"' in i.attributes
               for i in module.computations[name].instructions.values() if i.op == 'custom-call')
  seen = set()
  for found, instruction in inside:
    if 'async_collective_fusion_config' in instruction.attributes and not starts:
      continue
    channel = found.kind, instruction.attribute('channel_id') or instruction.name
    if channel in seen:
      continue
    seen.add(channel)
    if found.kind == 'all-reduce' and 'all-reduce-scatter' in f'{name} {fusion.name}'.replace('_', '-'):
      found = dataclasses.replace(found, kind='reduce-scatter', result=tuple(flatten(fusion.type)))
    yield found, instruction


def _read(module, mesh, frame, instruction, kind, loops, conditional):
  """Returns the Collective that an instruction is."""
  result = instruction.type
  # A start holds (operands, results, ...); that of an all-reduce its results alone.
  if instruction.op.endswith('-start') and kind != 'all-reduce':
    result = result[1]
  result = flatten(result)
  operands = [a for o in instruction.operands if o in frame.computation.instructions
              for a in flatten(frame.computation.instructions[o].type)]
  if kind == 'ragged-all-to-all':
    operands = operands[:1]  # The rest are the output's buffer, offsets and sizes.
  pairs = instruction.attribute('source_target_pairs')
  if pairs is not None:
    groups = [g for g in _numbers(pairs) if len(set(g)) > 1]
  else:
    groups = _device_groups(module, instruction, kind)
  total = lambda arrays: sum(a.bytes for a in arrays)
  return Collective(
      kind=kind, axes=group_axes(groups, mesh), group_size=max(map(len, groups), default=1),
      result=tuple(result), bytes=max(total(result), total(operands)), loops=loops,
      op_name=instruction.op_name, conditional=conditional, groups=tuple(map(tuple, groups)))


def _device_groups(module, instruction, kind):
  """Returns the groups of device numbers (replica x partitions + partition) that an instruction joins."""
  partitions, replicas = module.num_partitions, module.num_replicas
  groups = parse_groups(_groups_text(instruction))
  if instruction.attribute('use_global_device_ids') == 'true':
    return groups or [list(range(partitions * replicas))]
  if instruction.attribute('channel_id') is None:  # Between replicas, for each partition.
    groups = groups or [list(range(replicas))]
    return [[r * partitions + p for r in group] for group in groups for p in range(partitions)]
  if kind in ('all-to-all', 'ragged-all-to-all', 'collective-broadcast'):  # Between partitions.
    groups = groups or [list(range(partitions))]
    return [[r * partitions + p for p in group] for group in groups for r in range(replicas)]
  groups = groups or [list(range(replicas))]  # Between all partitions of these replicas.
  return [[r * partitions + p for r in group for p in range(partitions)] for group in groups]


def _groups_text(instruction):
  text = instruction.attribute('replica_groups') or '{}'
  if text.startswith('mesh[') and not text.endswith('}'):  # Its second part follows a comma.
    rest = instruction.attributes.split(text, 1)[1]
    text = f'{text}, {split_top(rest.lstrip(" ,"))[0]}'
  return text


def parse_groups(text):
  """Returns the groups that a `replica_groups` text spells, as lists of ids; [] for `{}`, which means all.

  Forms: `{{0,1},{2,3}}`; `[2,2]<=[4]` and `[2,2]<=[2,2]T(1,0)`, which are numbers counted in the order of
  the dimensions on the right, transposed, and cut into the rows on the left; `mesh['a'=2,'b'=4] {'a'}` and
  `mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b':(2)2}`, whose devices are listed or counted in that
  way, and where `b`, cut into parts of 2, 2 and the rest, is grouped over the second part.  Raises
  ValueError on any other.
  """
  text = text.strip()
  if text.startswith('mesh['):
    return _mesh_groups(text)
  if text.startswith('[') and '<=' in text:
    return _tiles(text).tolist()
  if text.startswith('{'):
    return _numbers(text)
  raise ValueError(f'replica groups of an unknown form: {text!r}')


def _numbers(text):
  """'{{0,1},{2,3}}' -> [[0, 1], [2, 3]]."""
  return [[int(n) for n in group.split(',')] for group in re.findall(r'\{([\d,\s]+)\}', text)]


def _tiles(text):
  """'[2,4]<=[4,2]T(1,0)' -> the array of that shape; '[4,2]T(1,0)' -> it before it is cut into rows."""
  match = re.fullmatch(r'(?:\[([\d,]+)\]<=)?\[([\d,]+)\](?:T\(([\d,]+)\))?', text.strip())
  if match is None:
    raise ValueError(f'replica groups of an unknown form: {text!r}')
  shape, counted, order = ([int(n) for n in part.split(',')] if part else None for part in match.groups())
  ids = np.arange(math.prod(counted)).reshape(counted).transpose(order)
  return ids if shape is None else ids.reshape(shape)


def _mesh_groups(text):
  match = re.fullmatch(r'mesh\[([^\]]*)\](?:,?\s*device_ids=\((.*)\))?\s*\{(.*)\}', text)
  if match is None:
    raise ValueError(f'replica groups of an unknown form: {text!r}')
  unquote = lambda name: name.strip().strip('"\'')
  sizes = {unquote(n): int(size) for n, size in (axis.rsplit('=', 1) for axis in split_top(match[1]))}
  if match[2] is None:
    ids = np.arange(math.prod(sizes.values()))
  elif '[' in match[2]:
    ids = _tiles(match[2])
  else:
    ids = np.array([int(n) for n in match[2].split(',')])
  # Each axis is cut wherever a part of it begins or ends; grouped parts go last.
  cuts, grouped = {name: {1, size} for name, size in sizes.items()}, []
  for part in split_top(match[3]):
    name, _, split = part.partition(':')
    before, size = (1, sizes[unquote(name)]) if not split else map(int, re.findall(r'\d+', split))
    cuts[unquote(name)] |= {before, before * size}
    grouped.append((unquote(name), before, before * size))
  shape, last = [], []
  for name in sizes:
    for begin, end in itertools.pairwise(sorted(cuts[name])):
      if any(n == name and b <= begin and end <= e for n, b, e in grouped):
        last.append(len(shape))
      shape.append(end // begin)
  first = [i for i in range(len(shape)) if i not in last]
  size = math.prod(shape[i] for i in last)
  return ids.reshape(shape).transpose(first + last).reshape(-1, size).tolist()


def group_axes(groups, mesh):
  """Returns the mesh axes along which the devices of some group differ, in the mesh's order."""
  shape = mesh.devices.shape
  varies = np.zeros(len(shape), bool)
  for group in groups:
    places = np.stack(np.unravel_index(group, shape))
    varies |= (places != places[:, :1]).any(axis=1)
  return tuple(itertools.compress(mesh.axis_names, varies))


def summarize(collectives):
  """Returns one Row for each kind and axes, those that send most first."""
  order = lambda c: (c.kind, c.axes)
  rows = []
  for (kind, axes), found in itertools.groupby(sorted(collectives, key=order), order):
    found = list(found)
    runs = [1 if c.trips is None else c.trips for c in found]
    weighted = lambda name, found=found, runs=runs: sum(
        getattr(c, name) * n for c, n in zip(found, runs, strict=True))
    rows.append(Row(kind, axes, len(found), sum(runs), weighted('bytes'), weighted('sent_bytes'),
                    sum(c.trips is None for c in found)))
  return sorted(rows, key=lambda row: -row.sent_bytes)


def largest_replicated(compiled, minimum_bytes=0):
  """Returns the inputs and outputs above a size that every device holds whole, the largest first.

  compiled: of `jax.jit(...).lower(...).compile()` on more than one device.  Arrays that the program drops
  are not there, and on one device nothing is a copy, so the list is empty.
  """
  # A kept argument has its sharding, a dropped one None; what was None from the start is None in both.
  absent = {'is_leaf': lambda s: s is None}
  inputs = zip(jax.tree_util.tree_flatten_with_path(compiled.args_info, **absent)[0],
               jax.tree.leaves(compiled.input_shardings, **absent), strict=True)
  outputs = zip(jax.tree_util.tree_flatten_with_path(compiled.out_info, **absent)[0],
                jax.tree.leaves(compiled.output_shardings, **absent), strict=True)
  found = []
  for where, arrays in (('input', inputs), ('output', outputs)):
    for (path, array), sharding in arrays:
      if sharding is None or sharding.num_devices == 1 or not sharding.is_fully_replicated:
        continue
      dtype = jax.numpy.dtype(array.dtype) if not jax.dtypes.issubdtype(
          array.dtype, jax.dtypes.extended) else np.dtype('uint32')
      size = math.prod(array.shape) * dtype.itemsize
      if size >= minimum_bytes:
        name = jax.tree_util.keystr(path, simple=True, separator='/')
        found.append(Replicated(where, name, tuple(array.shape), str(array.dtype), size))
  return sorted(found, key=lambda r: -r.bytes)
