"""Relative position bias of T5 (arXiv:1910.10683, section 2.1): a number per head and bucket of distances.

Letters: B batch, T query length, S key length, K key/value heads, G query heads that share one, N = K G heads, M the
distance from which on all share a bucket.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct


def relative_buckets(positions, buckets, max_distance, causal):
  """Return the bucket of every relative position (key - query), int32 NumPy arrays.

  Half of the buckets hold one distance each; the other half grow logarithmically up to max_distance, and the last one
  holds all that is farther.  causal: later keys share bucket 0; otherwise half of the buckets are for later keys.
  """
  offset, distance = 0, np.maximum(-positions, 0)
  if not causal:
    buckets //= 2
    offset, distance = np.where(positions > 0, buckets, 0), np.abs(positions)
  exact = buckets // 2
  logarithmic = np.log(np.maximum(distance, 1) / exact) / np.log(max_distance / exact) * (buckets - exact)
  far = np.minimum(exact + (logarithmic + 1e-9).astype(np.int64), buckets - 1)  # An exact power is the next bucket's.
  return (offset + np.where(distance < exact, distance, far)).astype(np.int32)


@struct.dataclass
class RelativeBias:
  """A bias on the attention logits.  values: float32 [N, 2 M + 1], of relative positions (key - query) from -M to M."""

  values: jax.Array

  @classmethod
  def from_table(cls, table, max_distance, causal):
    """Build it from the parameter [buckets, N]."""
    positions = np.arange(-max_distance, max_distance + 1)
    return cls(table.astype(jnp.float32).T[:, relative_buckets(positions, table.shape[0], max_distance, causal)])

  def logits(self, mask, kv_heads):
    """Return the bias of a Mask's queries and keys, float32 [B, K, G, T, S]."""
    heads, size = self.values.shape
    distance = (size - 1) // 2
    relative = mask.k_positions[:, None, :] - mask.q_positions[:, :, None]
    index = jnp.clip(relative, -distance, distance) + distance
    values = self.values.reshape(kv_heads, heads // kv_heads, size)
    return jnp.moveaxis(jnp.take(values, index, axis=-1, mode='clip'), 2, 0)
