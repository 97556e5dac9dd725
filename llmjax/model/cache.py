"""KV caches for generation: the cache of a layer, and the slots that layers share.

Letters: B batch, T new tokens, S slots, K key/value heads, H head_dim.
"""

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class Slots:
  """The tokens in the S cache slots of all layers of one attention kind.

  positions, segment_ids: int32 [B, S]; segment 0 marks an empty slot.  index: int32 [], number of tokens written; the
  next one goes to slot index modulo S.  ring: whether slots are overwritten (a sliding window).
  """

  positions: jax.Array
  segment_ids: jax.Array
  index: jax.Array
  ring: bool = struct.field(pytree_node=False, default=False)

  @classmethod
  def empty(cls, batch, slots, ring=False):
    """Create empty slots."""
    blank = jnp.zeros((batch, slots), jnp.int32)
    return cls(blank, blank, jnp.zeros((), jnp.int32), ring)

  def write(self, target, new, axis):
    """Write `new` to the slots of the next tokens in `target`; return it.  axis: of the slots in both arrays."""
    size, count = target.shape[axis], new.shape[axis]
    if not self.ring:
      return jax.lax.dynamic_update_slice_in_dim(target, new, self.index, axis)
    first = max(count - size, 0)  # If there are more tokens than slots, the last ones stay.
    indices = (self.index + jnp.arange(first, count)) % size
    new = jax.lax.slice_in_dim(new, first, count, axis=axis)
    return jnp.moveaxis(jnp.moveaxis(target, axis, 0).at[indices].set(jnp.moveaxis(new, axis, 0)), 0, axis)

  def advance(self, positions, segment_ids):
    """Return the slots after T more tokens, int [B, T] each."""
    return self.replace(positions=self.write(self.positions, positions.astype(jnp.int32), 1),
                        segment_ids=self.write(self.segment_ids, segment_ids.astype(jnp.int32), 1),
                        index=self.index + positions.shape[1])


@struct.dataclass
class KvCache:
  """Keys and values of one layer, each [B, K, S, H]; the keys of a head are contiguous for decoding."""

  keys: jax.Array
  values: jax.Array

  @classmethod
  def empty(cls, shape, dtype):
    """Create a cache of zeros.  shape: (B, K, S, H)."""
    zeros = jnp.zeros(shape, dtype)
    return cls(zeros, zeros)

  def update(self, slots, keys, values):
    """Write the keys and values [B, T, K, H] of the next T tokens; return the cache.  slots: before these tokens."""
    swap = lambda a: a.transpose(0, 2, 1, 3)
    return KvCache(slots.write(self.keys, swap(keys), 2), slots.write(self.values, swap(values), 2))

  def read(self):
    """Return (keys, values), [B, S, K, H] each."""
    return self.keys.transpose(0, 2, 1, 3), self.values.transpose(0, 2, 1, 3)

  def grow(self, extra):
    """Add `extra` empty slots."""
    return jax.tree.map(lambda a: jnp.pad(a, ((0, 0), (0, 0), (0, extra), (0, 0))), self)


@struct.dataclass
class Cache:
  """The cache of a model.

  layers: the cache of each layer (`init_cache` of its mixer).  slots: {attention kind: Slots}.  lengths: int32 [B],
  number of tokens, which is the position of the next one.  fresh: whether it is empty.
  """

  layers: list
  slots: dict
  lengths: jax.Array
  fresh: bool = struct.field(pytree_node=False, default=False)
