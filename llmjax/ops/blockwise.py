"""Attention in plain XLA: the definition over the whole [T, S] square, and FlashAttention-like blocks of queries.

Letters: B batch, T query length, S key length, K key/value heads, G query heads that share one, H head_dim.
Queries are [B, K, G, T, H] and keys and values [B, K, S, H]: keys are never repeated, and every product is a plain
batched matrix product.  `options` is an `Options`, `mask` an `ops.masks.Mask`, `bias` an `ops.relative.RelativeBias` or
None.  `forward` and `backward` accept any subset of the keys: ring attention combines them over devices
(parallel/attention.py).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llmjax.ops.hints import transpose_in_memory

# Large but finite: a query without a visible key averages all values instead of dividing 0 by 0.
MASKED = -1e30

# n query blocks of a causal sequence compute (n + 1) / 2n of the whole square; smaller blocks skip more of it but
# multiply less efficiently.  64, 128 and 256 take the same CPU time at T = 512 within 15%, 128 the least.  Blocks are
# unrolled, so their number is bounded to limit the compile time of long sequences.
BLOCK = 128
MAX_BLOCKS = 16


class Options(NamedTuple):
  """soft_cap: logits become soft_cap * tanh(logits / soft_cap); None: no cap.  scale: factor on the logits."""

  soft_cap: float | None
  scale: float


def _masked_logits(options, q, k, mask, bias=None):
  """Return float32 logits [B, K, G, T, S], MASKED where invisible."""
  soft_cap, scale = options
  logits = scale * jnp.einsum('BKGTH,BKSH->BKGTS', q, k, preferred_element_type=jnp.float32)
  if bias is not None:
    logits = logits + bias.logits(mask, k.shape[1])
  if soft_cap is not None:
    logits = soft_cap * jnp.tanh(logits / soft_cap)
  return jnp.where(mask.visible()[:, None, None], logits, MASKED)


def reference_attention(options, q, k, v, mask, bias=None):
  """Compute attention by its definition, over the whole square."""
  p = jax.nn.softmax(_masked_logits(options, q, k, mask, bias), axis=-1)
  return jnp.einsum('BKGTS,BKSH->BKGTH', p.astype(v.dtype), v,
                    preferred_element_type=jnp.float32).astype(v.dtype)


def _blocks(mask, length, keys):
  """Yield slices (queries, keys) that cover all visible pairs."""
  size = max(BLOCK, -(-length // MAX_BLOCKS))
  for start in range(0, length, size):
    stop = min(start + size, length)
    yield slice(start, stop), mask.key_range(start, stop, keys)


def forward(options, q, k, v, mask, bias=None, dtype=jnp.float32):
  """Return (outputs [B, K, G, T, H] of dtype, float32 log of the softmax denominators [..., 1]).

  `merge` combines the float32 outputs over several sets of keys.
  """
  outs, log_sums = [], []
  for t, s in _blocks(mask, q.shape[3], k.shape[2]):
    logits = _masked_logits(options, q[..., t, :], k[..., s, :], mask.block(t, s), bias)
    top = logits.max(axis=-1, keepdims=True)
    p = jnp.exp(logits - top)
    total = p.sum(axis=-1, keepdims=True)
    out = jnp.einsum('BKGTS,BKSH->BKGTH', p.astype(v.dtype), v[..., s, :],
                     preferred_element_type=jnp.float32)
    outs.append((out / total).astype(dtype))
    log_sums.append(top + jnp.log(total))
  return jnp.concatenate(outs, axis=3), jnp.concatenate(log_sums, axis=3)


def merge(one, other):
  """Combine the results of `forward` over two sets of keys (arXiv:2310.01889, algorithm 1)."""
  (out, log_sum), (other_out, other_log_sum) = one, other
  total = jnp.logaddexp(log_sum, other_log_sum)
  return out * jnp.exp(log_sum - total) + other_out * jnp.exp(other_log_sum - total), total


def row_sums(out, d_out):
  """Compute sum_s P dP = dO . O for every query, float32 (arXiv:2307.08691, algorithm 2, line 4)."""
  return jnp.einsum('BKGTH,BKGTH->BKGT', d_out, out, preferred_element_type=jnp.float32)[..., None]


def backward(options, q, k, v, mask, log_sum, delta, d_out, bias=None):
  """Return the contributions of these keys to the gradients, float32 (d_q, d_k, d_v, d_bias).

  log_sum: over all visible keys, these included; the probabilities are recomputed from it (FlashAttention-2,
  arXiv:2307.08691, algorithm 2).  delta: `row_sums`.  d_out: [B, K, G, T, H].  d_bias is None without a bias.
  """
  soft_cap, scale = options
  d_q, d_bias = [], jax.tree.map(jnp.zeros_like, bias)
  d_k, d_v = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
  for t, s in _blocks(mask, q.shape[3], k.shape[2]):
    q_t, d_out_t, k_s, v_s = q[..., t, :], d_out[..., t, :], k[..., s, :], v[..., s, :]
    block = mask.block(t, s)
    logits = _masked_logits(options, q_t, k_s, block, bias)
    p = jnp.exp(logits - log_sum[..., t, :])
    d_p = jnp.einsum('BKGTH,BKSH->BKGTS', d_out_t, v_s, preferred_element_type=jnp.float32)
    d_logits = p * (d_p - delta[..., t, :])
    if soft_cap is not None:
      # p is 0 where logits are MASKED; the clip keeps the square of MASKED from overflowing there.
      d_logits = d_logits * (1 - jnp.square(jnp.maximum(logits / soft_cap, -1)))
    if bias is not None:
      (more,) = jax.vjp(lambda b, block=block: b.logits(block, k.shape[1]), bias)[1](d_logits)
      d_bias = jax.tree.map(jnp.add, d_bias, more)
    d_logits = (scale * d_logits).astype(q.dtype)
    d_q.append(jnp.einsum('BKGTS,BKSH->BKGTH', d_logits, k_s, preferred_element_type=jnp.float32))
    d_v = d_v.at[..., s, :].add(_sum_over_queries(p.astype(v.dtype), d_out_t))
    d_k = d_k.at[..., s, :].add(_sum_over_queries(d_logits, q_t))
  return jnp.concatenate(d_q, axis=3), d_k, d_v, d_bias


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def blockwise_attention(options, q, k, v, mask, bias=None):
  """Compute attention in blocks of queries; the backward pass recomputes the probabilities.

  It saves the output and one number per query instead of the square.  Blocks are unrolled, because XLA's CPU backend
  runs loop bodies slower.
  """
  return _blockwise_fwd(options, q, k, v, mask, bias)[0]


def _blockwise_fwd(options, q, k, v, mask, bias):
  # Both are named: if a remat policy saved only one, the backward pass would run the whole forward pass again.
  out, log_sum = (checkpoint_name(x, 'attention') for x in forward(options, q, k, v, mask, bias, v.dtype))
  return out, (q, k, v, mask, bias, out, log_sum)


def _blockwise_bwd(options, residuals, d_out):
  q, k, v, mask, bias, out, log_sum = residuals
  *grads, d_bias = backward(options, q, k, v, mask, log_sum, row_sums(out, d_out), d_out, bias)
  return *(g.astype(x.dtype) for g, x in zip(grads, (q, k, v), strict=True)), None, d_bias


def _sum_over_queries(square, x):
  """Contract square [B, K, G, T, S] with x [B, K, G, T, H] over G and T; return float32 [B, K, S, H].

  The small factor is transposed in memory: XLA's CPU backend would transpose the square, which costs as much as the
  product.
  """
  x = transpose_in_memory(x, (0, 1, 4, 2, 3))
  # In x's dtype: here XLA's CPU backend has no product of bfloat16 factors with a float32 sum.
  return jnp.einsum('BKHGT,BKGTS->BKHS', x, square).swapaxes(2, 3).astype(jnp.float32)


blockwise_attention.defvjp(_blockwise_fwd, _blockwise_bwd)
