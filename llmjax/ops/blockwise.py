"""Attention in plain XLA: the definition over the whole [T, S] square, and the same in blocks of queries.

Letters: B batch, T query length, S key length, K key/value heads, G query heads that share one, H head_dim.
Queries are [B, K, G, T, H] and keys and values [B, K, S, H]: keys are never repeated, and every product is a plain
batched matrix product.  `options` is an `Options`, `mask` an `ops.masks.Mask`.

`forward` and `backward` take any subset of the keys: ring attention combines them over devices
(parallel/attention.py).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llmjax.ops.hints import transpose_in_memory

# Large but finite: a row that sees no key then averages values uniformly instead of dividing 0 by 0.
MASKED = -1e30

# n query blocks of a causal row compute (n + 1) / 2n of the whole square; smaller blocks skip more of it
# but multiply less efficiently.  64, 128 and 256 take the same CPU time at T = 512 within 15%, 128 least.
# The bound on their number keeps compile time of a long row in check, because blocks are unrolled.
BLOCK = 128
MAX_BLOCKS = 16


class Options(NamedTuple):
  """soft_cap: logits become soft_cap * tanh(logits / soft_cap); None: off.  scale: factor of the logits."""

  soft_cap: float | None
  scale: float


def _masked_logits(options, q, k, mask):
  """Returns float32 logits [B, K, G, T, S], MASKED where invisible."""
  soft_cap, scale = options
  logits = scale * jnp.einsum('BKGTH,BKSH->BKGTS', q, k, preferred_element_type=jnp.float32)
  if soft_cap is not None:
    logits = soft_cap * jnp.tanh(logits / soft_cap)
  return jnp.where(mask.visible()[:, None, None], logits, MASKED)


def reference_attention(options, q, k, v, mask):
  """The definition, over the whole square at once."""
  p = jax.nn.softmax(_masked_logits(options, q, k, mask), axis=-1)
  return jnp.einsum('BKGTS,BKSH->BKGTH', p.astype(v.dtype), v,
                    preferred_element_type=jnp.float32).astype(v.dtype)


def _blocks(mask, length, keys):
  """Yields slices (queries, keys) that together cover all visible pairs."""
  size = max(BLOCK, -(-length // MAX_BLOCKS))
  for start in range(0, length, size):
    stop = min(start + size, length)
    yield slice(start, stop), mask.key_range(start, stop, keys)


def forward(options, q, k, v, mask, dtype=jnp.float32):
  """Returns (means of values [B, K, G, T, H] of dtype, float32 log of the softmax's denominator [..., 1]).

  `merge` joins those over several sets of keys; the means are float32 for that.
  """
  outs, log_sums = [], []
  for t, s in _blocks(mask, q.shape[3], k.shape[2]):
    logits = _masked_logits(options, q[..., t, :], k[..., s, :], mask.block(t, s))
    top = logits.max(axis=-1, keepdims=True)
    p = jnp.exp(logits - top)
    total = p.sum(axis=-1, keepdims=True)
    out = jnp.einsum('BKGTS,BKSH->BKGTH', p.astype(v.dtype), v[..., s, :],
                     preferred_element_type=jnp.float32)
    outs.append((out / total).astype(dtype))
    log_sums.append(top + jnp.log(total))
  return jnp.concatenate(outs, axis=3), jnp.concatenate(log_sums, axis=3)


def merge(one, other):
  """Returns `forward` over two sets of keys, given that over each (arXiv:2310.01889, algorithm 1)."""
  (out, log_sum), (more, log_more) = one, other
  total = jnp.logaddexp(log_sum, log_more)
  return out * jnp.exp(log_sum - total) + more * jnp.exp(log_more - total), total


def row_sums(out, d_out):
  """Returns sum_s P dP = dO . O of every query, float32 (arXiv:2307.08691, algorithm 2, line 4)."""
  return jnp.einsum('BKGTH,BKGTH->BKGT', d_out, out, preferred_element_type=jnp.float32)[..., None]


def backward(options, q, k, v, mask, log_sum, delta, d_out):
  """Returns float32 (d_q, d_k, d_v): what these keys add to the gradients.

  log_sum: of all keys that the queries see, these among them; with it the probabilities are made again
  (FlashAttention-2, arXiv:2307.08691, algorithm 2).  delta: `row_sums`.  d_out: [B, K, G, T, H].
  """
  soft_cap, scale = options
  d_q = []
  d_k, d_v = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
  for t, s in _blocks(mask, q.shape[3], k.shape[2]):
    q_t, d_out_t, k_s, v_s = q[..., t, :], d_out[..., t, :], k[..., s, :], v[..., s, :]
    logits = _masked_logits(options, q_t, k_s, mask.block(t, s))
    p = jnp.exp(logits - log_sum[..., t, :])
    d_p = jnp.einsum('BKGTH,BKSH->BKGTS', d_out_t, v_s, preferred_element_type=jnp.float32)
    d_logits = p * (d_p - delta[..., t, :])
    if soft_cap is not None:
      # p is 0 where logits are MASKED; the clip keeps the square of MASKED from overflowing there.
      d_logits = d_logits * (1 - jnp.square(jnp.maximum(logits / soft_cap, -1)))
    d_logits = (scale * d_logits).astype(q.dtype)
    d_q.append(jnp.einsum('BKGTS,BKSH->BKGTH', d_logits, k_s, preferred_element_type=jnp.float32))
    d_v = d_v.at[..., s, :].add(_sum_over_queries(p.astype(v.dtype), d_out_t))
    d_k = d_k.at[..., s, :].add(_sum_over_queries(d_logits, q_t))
  return jnp.concatenate(d_q, axis=3), d_k, d_v


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def blockwise_attention(options, q, k, v, mask):
  """The same by blocks of queries; the backward pass makes the probabilities again.

  Saves the output and one number a query instead of the square.  The blocks are unrolled, because XLA's
  CPU backend runs loop bodies slower.
  """
  return _blockwise_fwd(options, q, k, v, mask)[0]


def _blockwise_fwd(options, q, k, v, mask):
  # Both marked: were one of them not kept, the backward pass would run this whole forward pass again.
  out, log_sum = (checkpoint_name(x, 'attention') for x in forward(options, q, k, v, mask, v.dtype))
  return out, (q, k, v, mask, out, log_sum)


def _blockwise_bwd(options, residuals, d_out):
  q, k, v, mask, out, log_sum = residuals
  grads = backward(options, q, k, v, mask, log_sum, row_sums(out, d_out), d_out)
  return *(g.astype(x.dtype) for g, x in zip(grads, (q, k, v), strict=True)), None


def _sum_over_queries(square, x):
  """Returns float32 [B, K, S, H] from square [B, K, G, T, S] and x [B, K, G, T, H].

  The small factor is transposed by hand, and the barrier keeps XLA from undoing it: its CPU backend
  would transpose the square instead, which costs as much as the product.
  """
  x = transpose_in_memory(x, (0, 1, 4, 2, 3))
  # In x's dtype: behind the barrier, XLA's CPU backend has no product of bf16 factors with a float32 sum.
  return jnp.einsum('BKHGT,BKGTS->BKHS', x, square).swapaxes(2, 3).astype(jnp.float32)


blockwise_attention.defvjp(_blockwise_fwd, _blockwise_bwd)
