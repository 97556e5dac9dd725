"""The device mesh, and placing host batches on it."""

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
  sizes = [getattr(spec, axis) for axis in AXES]
  fixed = math.prod(s for s in sizes if s != -1)
  if -1 in sizes and len(devices) % fixed == 0:
    sizes[sizes.index(-1)] = len(devices) // fixed
  if math.prod(sizes) != len(devices):
    asked = ' x '.join(f'{a} {s}' for a, s in zip(AXES, sizes, strict=True) if s != 1)
    raise ConfigError([f'mesh: {asked} does not fill {len(devices)} devices; the product must be '
                       f'{len(devices)}, and -1 lets one axis fill'])
  return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def batch_shards(mesh):
  """Returns into how many parts the rows of a batch are divided."""
  return mesh.shape['data'] * mesh.shape['fsdp']


def place_batch(mesh, batch):
  """Returns device arrays [B, T] made of every process's contiguous block of rows [B/processes, T]."""
  sharding = NamedSharding(mesh, mesh_spec(('batch', 'length')))
  return {name: jax.make_array_from_process_local_data(sharding, np.asarray(rows))
          for name, rows in batch.items()}
