"""Caches of generation: leaf types with `update` and `read`, and the slots that their layers share.

Letters: B batch, T new tokens, S slots, K key/value heads, H head_dim.
"""

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class Slots:
  """Which token each of S cache slots holds, the same for all layers of one attention kind.

  positions, segment_ids: int32 [B, S]; segment 0 marks an empty slot.  index: int32 [], tokens written so far: the next
  one goes to slot index modulo S.  ring: whether slots are ever used again (a sliding window).
  """

  positions: jax.Array
  segment_ids: jax.Array
  index: jax.Array
  ring: bool = struct.field(pytree_node=False, default=False)

  @classmethod
  def empty(cls, batch, slots, ring=False):
    """Return slots that hold no token."""
    blank = jnp.zeros((batch, slots), jnp.int32)
    return cls(blank, blank, jnp.zeros((), jnp.int32), ring)

  def write(self, target, new, axis):
    """Return `target` with `new` at the slots of the next tokens.  axis: the slots' in both arrays."""
    size, count = target.shape[axis], new.shape[axis]
    if not self.ring:
      return jax.lax.dynamic_update_slice_in_dim(target, new, self.index, axis)
    first = max(count - size, 0)  # Of more tokens than slots the last ones stay.
    places = (self.index + jnp.arange(first, count)) % size
    kept = jax.lax.slice_in_dim(new, first, count, axis=axis)
    return jnp.moveaxis(jnp.moveaxis(target, axis, 0).at[places].set(jnp.moveaxis(kept, axis, 0)), 0, axis)

  def advance(self, positions, segment_ids):
    """Return the slots with T more tokens, int [B, T] each."""
    return self.replace(positions=self.write(self.positions, positions.astype(jnp.int32), 1),
                        segment_ids=self.write(self.segment_ids, segment_ids.astype(jnp.int32), 1),
                        index=self.index + positions.shape[1])


@struct.dataclass
class KvCache:
  """Keys and values of one layer, each [B, K, S, H]: a head's keys are contiguous, so a decoding step streams them."""

  keys: jax.Array
  values: jax.Array

  @classmethod
  def empty(cls, shape, dtype):
    """Return a cache of zeros.  shape: (B, K, S, H)."""
    zeros = jnp.zeros(shape, dtype)
    return cls(zeros, zeros)

  def update(self, slots, keys, values):
    """Return the cache with the keys and values [B, T, K, H] of the next T tokens.  slots: before them."""
    swap = lambda a: a.transpose(0, 2, 1, 3)
    return KvCache(slots.write(self.keys, swap(keys), 2), slots.write(self.values, swap(values), 2))

  def read(self):
    """Return (keys, values), [B, S, K, H] each."""
    return self.keys.transpose(0, 2, 1, 3), self.values.transpose(0, 2, 1, 3)

  def grow(self, extra):
    """Return the cache with so many more slots."""
    return jax.tree.map(lambda a: jnp.pad(a, ((0, 0), (0, 0), (0, extra), (0, 0))), self)


@struct.dataclass
class Cache:
  """All that a model remembers of the tokens so far.

  layers: one leaf type for each layer.  slots: {attention kind: Slots}.  lengths: int32 [B], tokens held, which is the
  position of the next one.  fresh: nothing has been written yet.
  """

  layers: list
  slots: dict
  lengths: jax.Array
  fresh: bool = struct.field(pytree_node=False, default=False)
