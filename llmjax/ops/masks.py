"""Attention masks as data: which keys each query attends to."""

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class Mask:
  """Which (query, key) pairs are visible; no [T, S] array exists until an implementation makes one.

  q_positions, q_segment_ids: int [B, T].  k_positions, k_segment_ids: int [B, S].  Query t attends to key s if they are
  of one segment (0 is padding, which attends to padding) and
    causal: q_position >= k_position, or k_prefix holds for the key (prefix LM, arXiv:1910.10683, section 3.2.1);
    window: |q_position - k_position| < window, so that a causal window of 1 is the token alone.
  Cross-attention is causal=False with the encoder's positions and segments as keys.
  k_prefix: bool [B, S], or None.
  aligned: whether the keys are the tokens of the queries (T == S), segments are contiguous and positions rise strictly
  within each; blocks without a visible pair are then skipped.
  """

  q_positions: jax.Array
  q_segment_ids: jax.Array
  k_positions: jax.Array
  k_segment_ids: jax.Array
  k_prefix: jax.Array | None = None
  causal: bool = struct.field(pytree_node=False, default=True)
  window: int | None = struct.field(pytree_node=False, default=None)
  aligned: bool = struct.field(pytree_node=False, default=True)

  def visible(self):
    """Return bool [B, T, S]."""
    distance = self.q_positions[:, :, None] - self.k_positions[:, None, :]
    mask = self.q_segment_ids[:, :, None] == self.k_segment_ids[:, None, :]
    if self.causal:
      before = distance >= 0
      mask &= before if self.k_prefix is None else before | self.k_prefix[:, None, :]
    if self.window is not None:
      mask &= (distance if self.causal and self.k_prefix is None else jnp.abs(distance)) < self.window
    return mask

  def block(self, queries, keys):
    """Return the mask of slices of the queries and the keys."""
    prefix = None if self.k_prefix is None else self.k_prefix[:, keys]
    return self.replace(q_positions=self.q_positions[:, queries], q_segment_ids=self.q_segment_ids[:, queries],
                        k_positions=self.k_positions[:, keys], k_segment_ids=self.k_segment_ids[:, keys],
                        k_prefix=prefix)

  def key_range(self, start, stop, keys):
    """Return the slice of the `keys` keys that queries start to stop may attend to."""
    if not self.aligned:
      return slice(0, keys)
    reach = None if self.window is None else self.window - 1
    # Positions rise by at least 1 per token, so a key `window` tokens away is outside the window.
    first = 0 if reach is None else max(0, start - reach)
    if self.causal and self.k_prefix is None:
      return slice(first, stop)
    return slice(first, keys if reach is None else min(stop + reach, keys))


def self_attention(positions, segment_ids, **options):
  """Return the Mask of tokens [B, T] that attend to one another.  options: fields of Mask."""
  return Mask(positions, segment_ids, positions, segment_ids, **options)
