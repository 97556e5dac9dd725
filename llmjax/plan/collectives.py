"""Finds the collectives of a compiled program: mesh axes, number of executions, and bytes.

They are read from the optimized HLO, that is, after XLA's partitioner and collective optimizations.
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

  axes: mesh axes that vary within a group, in mesh order.  group_size: devices of a group; 2 for a permute.  result:
  Arrays of one device after it.  bytes: size of the buffer of one device, the larger of input and output.  loops: trip
  counts of the enclosing while loops, outermost first; None if unknown.  conditional: inside a branch that may not
  run.  groups: device numbers of each group; (source, target) pairs of a permute.
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
    """Executions in one run of the program, or None if a trip count is unknown."""
    return None if None in self.loops else math.prod(self.loops)

  @property
  def sent_bytes(self):
    """Bytes that a device sends per execution in the ring algorithm (Patarasuk and Yuan 2009, section 4).

    (n - 1)/n of the buffer for gather, scatter and all-to-all, twice that for all-reduce, all of it for permute and
    broadcast.
    """
    if self.kind in ('collective-permute', 'collective-broadcast'):
      return self.bytes
    factor = 2 if self.kind == 'all-reduce' else 1
    return factor * self.bytes * (self.group_size - 1) // max(self.group_size, 1)


@dataclasses.dataclass(frozen=True)
class Row:
  """Collectives of one kind and the same axes.

  count: instructions.  runs: their executions in one run of the program.  bytes, sent_bytes: summed over the runs.
  unknown: instructions inside loops of unknown trip count, which count once.
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
  """An array that is replicated on every device.  where: 'input' or 'output'."""

  where: str
  name: str
  shape: tuple[int, ...]
  dtype: str
  bytes: int


def find_collectives(text, mesh):
  """Return every Collective of an optimized HLO module, in program order.

  text: `jax.jit(...).lower(...).compile().as_text()`.  mesh: the Mesh it was compiled for; device i of the text is
  `mesh.devices.flat[i]`.  An asynchronous pair counts once.  Raises ValueError if the text is for another number of
  devices.
  """
  module = Module(text)
  devices = module.num_partitions * module.num_replicas
  if devices != mesh.devices.size:
    raise ValueError(f'the program is for {devices} devices, but the mesh has {mesh.devices.size}; pass the mesh that '
                     'it was compiled for')
  return [collective for collective, _ in walk_collectives(module, mesh, Frame(module, module.entry))]


def walk_collectives(module, mesh, frame, loops=(), conditional=False):
  """Yield (Collective, channel) of a computation and of those that it calls."""
  for instruction in frame.computation.instructions.values():
    op = instruction.op
    if op == 'while':
      loop = Loop(frame, instruction)
      trips = loop.trips()
      yield from walk_collectives(module, mesh, loop.body, (*loops, trips), conditional)
      # The condition is evaluated once more than the body.
      again = None if trips is None else trips + 1
      yield from walk_collectives(module, mesh, loop.condition, (*loops, again), conditional)
    elif op == 'conditional':
      for branch in frame.branches(instruction):
        yield from walk_collectives(module, mesh, branch, loops, True)
    elif op == 'fusion':
      phase, collectives = fused_collectives(module, mesh, frame, instruction, loops, conditional)
      if phase in ('start', 'synchronous'):
        yield from collectives
    elif op in ('call', 'async-start', 'call-start'):
      yield from walk_collectives(module, mesh, frame.called(instruction), loops, conditional)
    elif (kind := op.removesuffix('-start')) in KINDS:
      collective = read_collective(module, mesh, frame, instruction, kind, loops, conditional)
      yield collective, instruction.attribute('channel_id') or instruction.name


def fused_collectives(module, mesh, frame, fusion, loops=(), conditional=False):
  """Return (phase, [(Collective, channel)]) of a fusion in a TPU program.

  phase: 'start', 'continue' or 'done' of an asynchronous collective, all of which contain the collective; else
  'synchronous'.  A fusion named `all-reduce-scatter` is a reduce-scatter, written as an all-reduce and a slice.
  """
  name = fusion.computation('calls')
  instructions = module.computations[name].instructions.values()
  by_channel = {}
  for collective, channel in walk_collectives(module, mesh, frame.called(fusion), loops, conditional):
    if collective.kind == 'all-reduce' and 'all-reduce-scatter' in f'{name} {fusion.name}'.replace('_', '-'):
      collective = dataclasses.replace(collective, kind='reduce-scatter', result=tuple(flatten(fusion.type)))
    by_channel.setdefault((collective.kind, channel), (collective, channel))
  targets = {i.attribute('custom_call_target') for i in instructions if i.op == 'custom-call'}
  if '"AsyncCollectiveStart"' in targets:
    phase = 'start'
  elif '"AsyncCollectiveDone"' in targets:
    phase = 'done'
  else:
    continues = any('async_collective_fusion_config' in i.attributes for i in instructions if i.op in KINDS)
    phase = 'continue' if continues else 'synchronous'
  return phase, list(by_channel.values())


def read_collective(module, mesh, frame, instruction, kind, loops=(), conditional=False):
  """Return the Collective of a collective instruction."""
  result = instruction.type
  # The type of a start is (operands, results, ...), but that of an all-reduce-start is its results alone.
  if instruction.op.endswith('-start') and kind != 'all-reduce':
    result = result[1]
  result = flatten(result)
  operands = [a for o in instruction.operands if o in frame.computation.instructions
              for a in flatten(frame.computation.instructions[o].type)]
  if kind == 'ragged-all-to-all':
    operands = operands[:1]  # The others are the output buffer, offsets and sizes.
  pairs = instruction.attribute('source_target_pairs')
  if pairs is not None:
    groups = [g for g in _parse_lists(pairs) if len(set(g)) > 1]
  else:
    groups = _device_groups(module, instruction, kind)
  total_bytes = lambda arrays: sum(a.bytes for a in arrays)
  return Collective(
      kind=kind, axes=group_axes(groups, mesh), group_size=max(map(len, groups), default=1),
      result=tuple(result), bytes=max(total_bytes(result), total_bytes(operands)), loops=loops,
      op_name=instruction.op_name, conditional=conditional, groups=tuple(map(tuple, groups)))


def _device_groups(module, instruction, kind):
  """Return the groups of device numbers (replica x partitions + partition) of a collective."""
  partitions, replicas = module.num_partitions, module.num_replicas
  groups = parse_groups(_groups_text(instruction))
  if instruction.attribute('use_global_device_ids') == 'true':
    return groups or [list(range(partitions * replicas))]
  if instruction.attribute('channel_id') is None:  # Across replicas, within each partition.
    groups = groups or [list(range(replicas))]
    return [[r * partitions + p for r in group] for group in groups for p in range(partitions)]
  if kind in ('all-to-all', 'ragged-all-to-all', 'collective-broadcast'):  # Across partitions.
    groups = groups or [list(range(partitions))]
    return [[r * partitions + p for p in group] for group in groups for r in range(replicas)]
  groups = groups or [list(range(replicas))]  # Across all partitions of these replicas.
  return [[r * partitions + p for r in group for p in range(partitions)] for group in groups]


def _groups_text(instruction):
  text = instruction.attribute('replica_groups') or '{}'
  if text.startswith('mesh[') and not text.endswith('}'):  # Its second part follows a comma.
    rest = instruction.attributes.split(text, 1)[1]
    text = f'{text}, {split_top(rest.lstrip(" ,"))[0]}'
  return text


def parse_groups(text):
  """Parse `replica_groups` into lists of ids; [] for `{}`, which means all devices.

  Forms: explicit lists, `{{0,1},{2,3}}`; iota tiles, `[2,2]<=[4]` and `[2,2]<=[2,2]T(1,0)`: ids in the order of the
  dimensions on the right, transposed, and reshaped to the left; mesh axes, `mesh['a'=2,'b'=4] {'a'}` and
  `mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b':(2)2}`, where `b`, split into sub-axes of 2, 2 and the rest, is
  grouped over the second one.  Raises ValueError for any other form.
  """
  text = text.strip()
  if text.startswith('mesh['):
    return _parse_mesh_groups(text)
  if text.startswith('[') and '<=' in text:
    return _parse_tiles(text).tolist()
  if text.startswith('{'):
    return _parse_lists(text)
  raise ValueError(f'unsupported form of replica groups: {text!r}')


def _parse_lists(text):
  """'{{0,1},{2,3}}' -> [[0, 1], [2, 3]]."""
  return [[int(n) for n in group.split(',')] for group in re.findall(r'\{([\d,\s]+)\}', text)]


def _parse_tiles(text):
  """'[2,4]<=[4,2]T(1,0)' -> ids of shape [2, 4]; '[4,2]T(1,0)' -> ids of shape [2, 4] by the transposition alone."""
  match = re.fullmatch(r'(?:\[([\d,]+)\]<=)?\[([\d,]+)\](?:T\(([\d,]+)\))?', text.strip())
  if match is None:
    raise ValueError(f'unsupported form of replica groups: {text!r}')
  shape, counted, order = ([int(n) for n in part.split(',')] if part else None for part in match.groups())
  ids = np.arange(math.prod(counted)).reshape(counted).transpose(order)
  return ids if shape is None else ids.reshape(shape)


def _parse_mesh_groups(text):
  match = re.fullmatch(r'mesh\[([^\]]*)\](?:,?\s*device_ids=\((.*)\))?\s*\{(.*)\}', text)
  if match is None:
    raise ValueError(f'unsupported form of replica groups: {text!r}')
  unquote = lambda name: name.strip().strip('"\'')
  sizes = {unquote(n): int(size) for n, size in (axis.rsplit('=', 1) for axis in split_top(match[1]))}
  if match[2] is None:
    ids = np.arange(math.prod(sizes.values()))
  elif '[' in match[2]:
    ids = _parse_tiles(match[2])
  else:
    ids = np.array([int(n) for n in match[2].split(',')])
  # Split each axis at the boundaries of its grouped sub-axes, and move the grouped ones last.
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
  """Return the mesh axes that vary within a group, in mesh order."""
  shape = mesh.devices.shape
  varies = np.zeros(len(shape), bool)
  for group in groups:
    places = np.stack(np.unravel_index(group, shape))
    varies |= (places != places[:, :1]).any(axis=1)
  return tuple(itertools.compress(mesh.axis_names, varies))


def summarize(collectives):
  """Return one Row per kind and axes, by decreasing bytes sent."""
  order = lambda c: (c.kind, c.axes)
  rows = []
  for (kind, axes), group in itertools.groupby(sorted(collectives, key=order), order):
    group = list(group)
    runs = [1 if c.trips is None else c.trips for c in group]
    rows.append(Row(kind, axes, len(group), sum(runs), sum(c.bytes * n for c, n in zip(group, runs, strict=True)),
                    sum(c.sent_bytes * n for c, n in zip(group, runs, strict=True)),
                    sum(c.trips is None for c in group)))
  return sorted(rows, key=lambda row: -row.sent_bytes)


def largest_replicated(compiled, minimum_bytes=0):
  """Return the replicated inputs and outputs of at least `minimum_bytes`, the largest first.

  compiled: the result of `jax.jit(...).lower(...).compile()`.  Unused arguments are left out; on one device the list is
  empty.
  """
  # An unused argument has the sharding None; a leaf that is None is None in both trees.
  absent = {'is_leaf': lambda s: s is None}
  inputs = zip(jax.tree_util.tree_flatten_with_path(compiled.args_info, **absent)[0],
               jax.tree.leaves(compiled.input_shardings, **absent), strict=True)
  outputs = zip(jax.tree_util.tree_flatten_with_path(compiled.out_info, **absent)[0],
                jax.tree.leaves(compiled.output_shardings, **absent), strict=True)
  replicated = []
  for where, arrays in (('input', inputs), ('output', outputs)):
    for (path, array), sharding in arrays:
      if sharding is None or sharding.num_devices == 1 or not sharding.is_fully_replicated:
        continue
      dtype = jax.numpy.dtype(array.dtype) if not jax.dtypes.issubdtype(
          array.dtype, jax.dtypes.extended) else np.dtype('uint32')
      size = math.prod(array.shape) * dtype.itemsize
      if size >= minimum_bytes:
        name = jax.tree_util.keystr(path, simple=True, separator='/')
        replicated.append(Replicated(where, name, tuple(array.shape), str(array.dtype), size))
  return sorted(replicated, key=lambda r: -r.bytes)
