"""The device mesh, and placing host batches on it."""

import dataclasses
import math

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding

from llmjax.config import ConfigError
from llmjax.parallel.sharding import mesh_spec
from llmjax.parallel.spec import AXES


def make_mesh(spec, devices=None):
  """Returns a Mesh over the devices with the axes of AXES, in that order.

  Auto axes: under Explicit ones a gather from a sharded embedding raises.  Raises ConfigError when
  the sizes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = tuple(getattr(fill(spec, len(devices)), axis) for axis in AXES)
  return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def fill(spec, devices):
  """Returns the MeshSpec with its -1 replaced by what fills a number of devices; errors as `make_mesh`."""
  sizes = {axis: getattr(spec, axis) for axis in AXES}
  fixed = math.prod(s for s in sizes.values() if s != -1)
  if devices % fixed == 0:
    sizes = {axis: devices // fixed if s == -1 else s for axis, s in sizes.items()}
  if math.prod(sizes.values()) != devices:
    asked = ' x '.join(f'{axis} {s}' for axis, s in sizes.items() if s != 1)
    raise ConfigError([f'mesh: {asked} does not fill {devices} devices; the product must be {devices}, '
                       'and -1 lets one axis fill'])
  return dataclasses.replace(spec, **sizes)


def batch_shards(mesh):
  """Returns into how many parts the rows of a batch are divided."""
  return mesh.shape['data'] * mesh.shape['fsdp']


def place_batch(mesh, batch):
  """Returns device arrays [B, T] made of every process's contiguous block of rows [B/processes, T]."""
  sharding = NamedSharding(mesh, mesh_spec(('batch', 'length')))
  return {name: jax.make_array_from_process_local_data(sharding, np.asarray(rows))
          for name, rows in batch.items()}
