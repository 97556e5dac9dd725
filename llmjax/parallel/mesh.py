"""The device mesh, and placing host batches on it."""

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
  """Return a Mesh over the devices with the axes of AXES, in that order.

  Neighbours along the last axes (tensor, context) are neighbouring chips.  With several slices the
  slower network between them is crossed along data, fsdp and stage alone.  Auto axes: under Explicit
  ones a gather from a sharded embedding raises.  Raises ConfigError when the sizes do not multiply to
  the number of devices.
  """
  devices = list(jax.devices() if devices is None else devices)
  filled = fill(spec, len(devices), devices[0].platform)
  sizes = [getattr(filled, axis) for axis in AXES]
  outer = [getattr(spec, f'dcn_{axis}', 1) for axis in AXES]
  parts = [_arrange(sizes, part) for part in _slices(devices, spec.slices)]
  # [outer..., sizes...] to [outer and size of each axis, side by side].
  grid = np.array(parts).reshape(*outer, *sizes)
  order = [i for axis in range(len(AXES)) for i in (axis, axis + len(AXES))]
  grid = grid.transpose(order).reshape([o * s for o, s in zip(outer, sizes, strict=True)])
  return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def fill(spec, devices, platform=''):
  """Return the MeshSpec with its -1 replaced by what fills a number of devices; errors as `make_mesh`."""
  sizes = {axis: getattr(spec, axis) for axis in AXES}
  inside = devices // spec.slices
  fixed = math.prod(s for s in sizes.values() if s != -1)
  if inside % fixed == 0:
    sizes = {axis: inside // fixed if s == -1 else s for axis, s in sizes.items()}
  if math.prod(sizes.values()) * spec.slices != devices:
    asked = ' x '.join(f'{axis} {s}' for axis, s in sizes.items() if s != 1) or 'all axes 1'
    slices = f' in each of {spec.slices} slices' if spec.slices > 1 else ''
    hint = '' if platform != 'cpu' or fixed * spec.slices <= devices else (
        f'. To emulate {fixed * spec.slices} on this machine: llmjax launch local --processes=1 '
        f'--devices-per-process={fixed * spec.slices} -- ...')
    raise ConfigError([f'mesh: {asked}{slices} does not fill {devices} device{"s" * (devices != 1)}; the product must '
                       f'be {devices}, and -1 lets one axis fill{hint}'])
  return dataclasses.replace(spec, **sizes)


def fitting_mesh(spec, devices=None):
  """Return the mesh of a training run where it fits the devices at hand, else plain data parallelism."""
  try:
    return make_mesh(dataclasses.replace(spec, data=-1), devices)
  except ConfigError:
    return make_mesh(MeshSpec(), devices)


def _arrange(sizes, devices):
  """Return the devices of a slice as an array of these sizes, neighbours beside one another."""
  try:
    return mesh_utils.create_device_mesh(sizes, devices)
  except NotImplementedError:  # Sizes that are no products of the torus's own, as 2 x 32 of 4 x 4 x 4.
    return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)


def _slices(devices, count):
  """Return the devices of each slice: as the platform says, else equal parts in order."""
  if count == 1:
    return [devices]
  found = {}
  for device in devices:
    found.setdefault(getattr(device, 'slice_index', 0), []).append(device)
  if len(found) == 1:  # Emulated devices, or GPU nodes, whose order goes node by node.
    size = len(devices) // count
    return [devices[i * size:(i + 1) * size] for i in range(count)]
  if len(found) != count:
    raise ConfigError([f'mesh: the dcn sizes multiply to {count}, but there are {len(found)} slices; '
                       f'make dcn_data x dcn_fsdp x dcn_stage {len(found)}'])
  return [found[i] for i in sorted(found)]


def batch_shards(mesh):
  """Return into how many parts the rows of a batch are divided."""
  return math.prod(mesh.shape[axis] for axis in axes_of('batch'))


def batch_blocks(mesh):
  """Return which of the `batch_shards` equal blocks of a batch's rows lie on this process's devices, in order.

  Processes that share rows (along stage, context or tensor) name the same blocks; one process's blocks
  need not be neighbours.
  """
  count = batch_shards(mesh)
  sharding = NamedSharding(mesh, mesh_spec(('batch',)))
  found = sharding.addressable_devices_indices_map((count,)).values()
  return tuple(sorted({rows.start or 0 for rows, in found}))


def place_batch(mesh, batch):
  """Return device arrays [B, T], and [B] of what a row has one of.

  batch: the whole rows of this process's `batch_blocks`, block after block.  Raises ConfigError where the mesh
  does not divide them or their length.
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
