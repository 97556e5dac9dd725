"""Detect silent data corruption: replicated parameters must be bitwise equal on all devices.

A faulty device or memory raises no error; its copy of the parameters diverges from the others.  Replicated optimizer
moments are covered as well, because a wrong moment gives wrong parameters in the next step.  Parameters that are
sharded over every mesh axis have no second copy to compare with.
"""

import collections

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec


class Replicas:
  """Compare the copies of the replicated arrays of a tree.

  tree: arrays, or ShapeDtypeStructs, with NamedShardings on the mesh.
  """

  def __init__(self, tree, mesh):
    flat = [(jax.tree_util.keystr(path, simple=True, separator='/'), x)
            for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]]
    self._devices = list(mesh.devices.flat)
    self._groups = {}  # {array name: lists of indices into self._devices that hold the same shard}.
    self._chosen = []
    for i, (name, x) in enumerate(flat):
      parts = collections.defaultdict(list)
      held = x.sharding.devices_indices_map(x.shape)
      for place, device in enumerate(self._devices):
        parts[str(held[device])].append(place)
      if len(parts) < len(self._devices):
        self._groups[name] = list(parts.values())
        self._chosen.append(i)
    self._sums = None
    if self._chosen:
      arrays = [flat[i][1] for i in self._chosen]
      axes = mesh.axis_names
      checked = jax.shard_map(
          lambda *parts: jax.lax.all_gather(jnp.stack([checksum(p) for p in parts]), axes), mesh=mesh,
          in_specs=tuple(x.sharding.spec for x in arrays), out_specs=PartitionSpec(), check_vma=False)
      self._sums = jax.jit(checked).lower(*arrays).compile()

  def __bool__(self):
    return self._sums is not None

  def sums(self, tree):
    """Return the checksums of each device's shard of each array, uint32 [devices, arrays], without waiting."""
    leaves = jax.tree.leaves(tree)
    return self._sums(*(leaves[i] for i in self._chosen))

  def compare(self, sums):
    """Return (differing devices, names of the arrays that differ, whether a majority of copies agrees).

    Without a majority, as with two copies, all devices that hold the shard are returned.
    """
    sums, odd, names, sure = np.asarray(sums), set(), [], True
    for column, (name, groups) in enumerate(self._groups.items()):
      for group in groups:
        votes = collections.Counter(int(sums[place, column]) for place in group)
        if len(votes) == 1:
          continue
        winner, count = votes.most_common(1)[0]
        majority = 2 * count > len(group)
        odd |= {p for p in group if not majority or sums[p, column] != winner}
        sure &= majority
        if name not in names:
          names.append(name)
    return [self._devices[p] for p in sorted(odd)], names, sure


def checksum(x):
  """Return the weighted sum of the bits of x modulo 2^32, uint32.

  The weights are odd and differ between elements.  An odd weight is invertible, so one changed element always changes
  the sum.
  """
  bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f'uint{8 * x.dtype.itemsize}')).astype(jnp.uint32)
  place, stride = jnp.zeros(bits.shape, jnp.uint32), 1
  for axis in reversed(range(bits.ndim)):  # Not by a reshape, which copies the array on some devices.
    place += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * np.uint32(stride % 2**32)
    stride *= bits.shape[axis]
  return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)
