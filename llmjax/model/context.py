"""Inputs of a block besides the residual stream."""

import jax
from flax import struct

from llmjax.model.cache import Slots
from llmjax.ops.masks import Mask
from llmjax.ops.relative import RelativeBias


@struct.dataclass
class AttentionInputs:
  """Shared inputs of the layers of one attention kind.  angles: rotary (cos, sin).  bias: on the attention logits."""

  mask: Mask
  angles: tuple | None = None
  slots: Slots | None = None
  bias: RelativeBias | None = None


@struct.dataclass
class Context:
  """Inputs of a block besides x [B, T, D].

  segment_ids: int [B, T] of the tokens.  attention: {kind: AttentionInputs}.  key: dropout key of the layer, or None.
  implementation: of attention, see `ops.attention.attention`.  zigzag: see `parallel.attention.attention`.
  cached: whether there is a cache.  decoding: whether it has earlier tokens.
  """

  segment_ids: jax.Array
  attention: dict
  key: jax.Array | None = None
  implementation: str | tuple[str, ...] = struct.field(pytree_node=False, default='blockwise')
  zigzag: bool = struct.field(pytree_node=False, default=False)
  cached: bool = struct.field(pytree_node=False, default=False)
  decoding: bool = struct.field(pytree_node=False, default=False)
