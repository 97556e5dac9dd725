"""What blocks get beside the residual stream."""

import jax
from flax import struct

from llmjax.model.cache import Slots
from llmjax.ops.masks import Mask


@struct.dataclass
class AttentionInputs:
  """What the layers of one attention kind share: mask, rotary (cos, sin) or None, and cache slots or None."""

  mask: Mask
  angles: tuple | None = None
  slots: Slots | None = None


@struct.dataclass
class Context:
  """What every block needs beside x [B, T, D].

  segment_ids: int [B, T] of the tokens.  attention: {kind: AttentionInputs}.  key: dropout key of the layer, or None.
  implementation: of attention, see `ops.attention.attention`.  zigzag: see `parallel.attention.attention`.
  cached: keys and values are kept in a cache.  decoding: there are earlier tokens in it.
  """

  segment_ids: jax.Array
  attention: dict
  key: jax.Array | None = None
  implementation: str | tuple[str, ...] = struct.field(pytree_node=False, default='blockwise')
  zigzag: bool = struct.field(pytree_node=False, default=False)
  cached: bool = struct.field(pytree_node=False, default=False)
  decoding: bool = struct.field(pytree_node=False, default=False)
