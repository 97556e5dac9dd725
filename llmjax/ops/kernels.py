"""Attention kernels of one platform each: TPU splash attention, cuDNN flash attention.

Both take the arguments of `ops.blockwise`, in the same letters, but only aligned masks.  `kernel_problem` returns what
a kernel does not support.  With emulate=True a kernel runs on any platform, slowly, for tests.
"""

import jax
import jax.numpy as jnp

from llmjax.ops.limits import LANES, LIMITS, NO_BIAS


def kernel_problem(name, q, k, mask, options, bias=None):
  """Return why a kernel does not support these arguments, or None."""
  if bias is not None:
    return NO_BIAS
  if not mask.aligned:
    return 'works on whole sequences, not against a cache or a part of a sequence'
  if name == 'splash' and mask.k_prefix is not None:
    return 'has no prefix mask'
  return LIMITS[name](q.shape[3], q.shape[-1], options.soft_cap, str(q.dtype))


def splash_attention(options, q, k, v, mask, bias=None, emulate=False):
  """Compute attention by the TPU kernel of jax.experimental.pallas, which skips blocks without visible keys.

  The kernel uses indices as positions: a window needs positions that rise by 1 within a segment.
  """
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

  batch, kv_heads, group, length, head_dim = q.shape
  shape, reach = (length, length), None if mask.window is None else mask.window - 1
  if mask.causal:
    pattern = (splash_attention_mask.CausalMask(shape) if reach is None
               else splash_attention_mask.LocalMask(shape, (reach, 0), 0))
  else:
    pattern = (splash_attention_mask.FullMask(shape) if reach is None
               else splash_attention_mask.LocalMask(shape, (reach, reach), 0))
  # Large blocks keep the matrix unit busy; these fit into VMEM, forward and backward, for head_dim up to 256.
  block_q, block_kv = _block(length, 512), _block(length, 1024 if head_dim <= 128 else 512)
  sizes = splash_attention_kernel.BlockSizes(
      block_q=block_q, block_kv=block_kv, block_kv_compute=_block(block_kv, 512), block_q_dkv=block_q,
      block_kv_dkv=block_kv, block_kv_dkv_compute=_block(block_kv, 512), block_q_dq=block_q, block_kv_dq=block_kv)
  heads = kv_heads * group
  kernel = splash_attention_kernel.make_splash_mha(
      splash_attention_mask.MultiHeadMask([pattern] * heads), block_sizes=sizes, head_shards=1, q_seq_shards=1,
      attn_logits_soft_cap=options.soft_cap, residual_checkpoint_name='attention', interpret=emulate)
  q = (q * jnp.float32(options.scale)).astype(q.dtype)  # The kernel does not scale.
  segments = splash_attention_kernel.SegmentIds(mask.q_segment_ids, mask.k_segment_ids)
  out = jax.vmap(kernel)(q.reshape(batch, heads, length, head_dim), k, v, segments)
  return out.reshape(q.shape)


def _block(length, most):
  """Return the largest block of at most `most` that divides the length."""
  return next(b for b in range(min(most, length) // LANES * LANES, 0, -LANES) if length % b == 0)


def cudnn_attention(options, q, k, v, mask, bias=None, emulate=False):
  """Compute attention by the GPU kernel, with a mask [B, 1, T, S] for all heads.

  cuDNN's sliding window does not combine with a mask in every version, and JAX's public function does not offer its
  packed sequences; `is_causal` still lets it skip the half of the square above the diagonal.
  """
  batch, kv_heads, group, length, head_dim = q.shape
  rows = lambda a: a.swapaxes(1, 2)
  out = jax.nn.dot_product_attention(
      rows(q.reshape(batch, -1, length, head_dim)), rows(k), rows(v), scale=options.scale,
      is_causal=mask.causal and mask.k_prefix is None,
      mask=mask.visible()[:, None], implementation='xla' if emulate else 'cudnn')
  return rows(out).reshape(q.shape)
