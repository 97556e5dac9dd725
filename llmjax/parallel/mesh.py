"""The device mesh, and the placement of host batches on it."""

import dataclasses
import math

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding

from llmjax.config import ConfigError
from llmjax.parallel.sharding import axes_of, mesh_spec
from llmjax.parallel.spec import AXES, ROW_AXES, MeshSpec, indivisible


def make_mesh(spec, devices=None):
  """Create a Mesh of the devices with the axes of AXES, in that order.

  Neighbours along the last axes (tensor, context) are neighbouring chips.  With several slices, only data, fsdp and
  stage cross the slower network between them.  Axes are Auto: under Explicit ones, a gather from a sharded embedding
  raises.  Raises ConfigError if the product of the sizes is not the number of devices.
  """
  devices = list(jax.devices() if devices is None else devices)
  filled = fill(spec, len(devices), devices[0].platform)
  sizes = [getattr(filled, axis) for axis in AXES]
  outer = [getattr(spec, f'dcn_{axis}', 1) for axis in AXES]
  parts = [_arrange(sizes, part) for part in _slices(devices, spec.slices)]
  # From [outer..., sizes...] to [outer_1 * size_1, outer_2 * size_2, ...].
  grid = np.array(parts).reshape(*outer, *sizes)
  order = [i for axis in range(len(AXES)) for i in (axis, axis + len(AXES))]
  grid = grid.transpose(order).reshape([o * s for o, s in zip(outer, sizes, strict=True)])
  return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def fill(spec, devices, platform=''):
  """Replace the -1 of a MeshSpec by the size that uses all devices; raise ConfigError as `make_mesh` does."""
  sizes = {axis: getattr(spec, axis) for axis in AXES}
  per_slice = devices // spec.slices
  fixed = math.prod(s for s in sizes.values() if s != -1)
  if per_slice % fixed == 0:
    sizes = {axis: per_slice // fixed if s == -1 else s for axis, s in sizes.items()}
  if math.prod(sizes.values()) * spec.slices != devices:
    asked = ' x '.join(f'{axis} {s}' for axis, s in sizes.items() if s != 1) or 'all axes 1'
    slices = f' in each of {spec.slices} slices' if spec.slices > 1 else ''
    hint = '' if platform != 'cpu' or fixed * spec.slices <= devices else (
        f'. To emulate {fixed * spec.slices} on this machine: llmjax launch local --processes=1 '
        f'--devices-per-process={fixed * spec.slices} -- ...')
    raise ConfigError([f'mesh: {asked}{slices} does not fill {devices} device{"s" * (devices != 1)}; the product must '
                       f'be {devices}, and one axis may be -1{hint}'])
  return dataclasses.replace(spec, **sizes)


def fitting_mesh(spec, devices=None):
  """Return the mesh of a training run if it fits the available devices, else plain data parallelism."""
  try:
    return make_mesh(dataclasses.replace(spec, data=-1), devices)
  except ConfigError:
    return make_mesh(MeshSpec(), devices)


def _arrange(sizes, devices):
  """Return the devices of a slice as an array of these sizes, with neighbouring chips next to each other."""
  try:
    return mesh_utils.create_device_mesh(sizes, devices)
  except NotImplementedError:  # Sizes that are no products of those of the torus, such as 2 x 32 of 4 x 4 x 4.
    return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)


def _slices(devices, count):
  """Return the devices of each slice: by their slice_index, else in equal parts."""
  if count == 1:
    return [devices]
  slices = {}
  for device in devices:
    slices.setdefault(getattr(device, 'slice_index', 0), []).append(device)
  if len(slices) == 1:  # Emulated devices, or GPUs, which are ordered by node.
    size = len(devices) // count
    return [devices[i * size:(i + 1) * size] for i in range(count)]
  if len(slices) != count:
    raise ConfigError([f'mesh: the dcn sizes multiply to {count}, but there are {len(slices)} slices; '
                       f'make dcn_data x dcn_fsdp x dcn_stage {len(slices)}'])
  return [slices[i] for i in sorted(slices)]


def batch_shards(mesh):
  """Return the number of shards of the batch axis."""
  return math.prod(mesh.shape[axis] for axis in axes_of('batch'))


def batch_blocks(mesh):
  """Return the indices of the `batch_shards` shards of a batch that are on this process's devices, in order.

  Processes whose devices differ along stage, context or tensor alone have the same shards; the shards of one process
  need not be contiguous.
  """
  count = batch_shards(mesh)
  sharding = NamedSharding(mesh, mesh_spec(('batch',)))
  indices = sharding.addressable_devices_indices_map((count,)).values()
  return tuple(sorted({rows.start or 0 for rows, in indices}))


def place_batch(mesh, batch):
  """Put host arrays [B', T] or [B'] on the mesh; return global device arrays [B, T] or [B].

  batch: the sequences of this process's `batch_blocks`, in their order.  Raises ConfigError if the mesh does not divide
  the batch or the length.
  """
  blocks, count = batch_blocks(mesh), batch_shards(mesh)

  def place(rows):
    wholes = zip(('train.batch_size', 'data.seq_len'), (len(rows) * count // len(blocks), *rows.shape[1:]),
                 (ROW_AXES, axes_of('length')), strict=False)
    if problems := [line for whole in wholes for line in indivisible(*whole, mesh.shape.__getitem__)]:
      raise ConfigError(problems)
    size = len(rows) // len(blocks)
    sharding = NamedSharding(mesh, mesh_spec(('batch', 'length')[:rows.ndim]))

    def part(index):
      start = blocks.index((index[0].start or 0) // size) * size
      return rows[(slice(start, start + size), *index[1:])]

    return jax.make_array_from_callback((size * count, *rows.shape[1:]), sharding, part)

  return {name: place(np.asarray(rows)) for name, rows in batch.items()}
