"""Silent corruption: parameters that several devices hold must be the same bits on each of them.

A device that computes wrongly now and then, or whose memory loses a bit, says nothing; its copy of the
parameters drifts from the others', and gradients with it.  Moments that are replicated are covered too: a
wrong one makes wrong parameters in the next step.  Parameters that are sharded over every axis have no
copy to compare with.
"""

import collections

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec


class Replicas:
  """Compares the replicated arrays of a tree; `sums` is cheap and does not wait, `compare` reads its result."""

  def __init__(self, tree, mesh):
    """tree: arrays with NamedShardings on the mesh, or ShapeDtypeStructs with them."""
    flat = [(jax.tree_util.keystr(path, simple=True, separator='/'), x)
            for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]]
    self._devices = list(mesh.devices.flat)
    self._groups = {}  # Name of an array -> lists of places in self._devices that hold the same part of it.
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
    """Returns uint32 [devices, arrays], on the devices: each one's checksum of its part of each array."""
    leaves = jax.tree.leaves(tree)
    return self._sums(*(leaves[i] for i in self._chosen))

  def compare(self, sums):
    """Returns (devices that differ, names of the arrays they differ in, whether a majority says so).

    Where no majority is, as between two copies, all that hold the array are named.
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
  """Returns uint32: the bits of x, summed with odd weights that tell places apart, modulo 2^32.

  An odd weight has an inverse, so that one changed element always changes the sum.
  """
  bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f'uint{8 * x.dtype.itemsize}')).astype(jnp.uint32)
  place, stride = jnp.zeros(bits.shape, jnp.uint32), 1
  for axis in reversed(range(bits.ndim)):  # By axes: a reshape would copy the array on some devices.
    place += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * np.uint32(stride % 2**32)
    stride *= bits.shape[axis]
  return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)
