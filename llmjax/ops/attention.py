"""Multi-head attention over packed batches; one table of implementations.

Letters: B batch, T query length, S key length, N query heads, K key/value heads, G = N / K query heads
that share a key/value head, H head_dim.  Inside this file queries are [B, K, G, T, H] and keys and
values [B, K, S, H]: repeated keys never exist, and every product is a plain batched matrix product.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

# Large but finite: a row that sees no key then averages values uniformly instead of dividing 0 by 0.
MASKED = -1e30

# n query blocks of a causal row compute (n + 1) / 2n of the whole square; smaller blocks skip more of it
# but multiply less efficiently.  64, 128 and 256 take the same CPU time at T = 512 within 15%, 128 least.
# The bound on their number keeps compile time of a long row in check, because blocks are unrolled.
BLOCK = 128
MAX_BLOCKS = 16


def attention(q, k, v, *, q_positions, k_positions, q_segment_ids, k_segment_ids, window=None,
              soft_cap=None, scale=None, implementation='blockwise', aligned=True):
  """Returns the softmax-weighted mean of values, [B, T, N, H] in v's dtype.

  q: [B, T, N, H].  k, v: [B, S, K, H] with N a multiple of K (grouped queries, arXiv:2305.13245).
  q_positions, q_segment_ids: int [B, T].  k_positions, k_segment_ids: int [B, S].

  Query t sees key s if and only if q_segment == k_segment and q_position >= k_position and
  (window is None or q_position - k_position < window).  Segment 0 is padding, which sees padding.
  A query that sees no key gets a finite result without meaning.  Softmax is float32 whatever q is.

  soft_cap: logits become soft_cap * tanh(logits / soft_cap) before the mask (Gemma 2,
  arXiv:2408.00118, section 2).  scale: of the logits, H**-0.5 by default.
  aligned: promises that the keys are those of the queries themselves (T == S), that segments are
  contiguous and that positions rise strictly within each; blocks that no query sees are then left
  out.  False, as against a cache, promises nothing.
  Raises ValueError on an unknown implementation, heads that do not divide, or aligned with T != S.
  """
  batch, length, heads, head_dim = q.shape
  kv_heads = k.shape[2]
  if heads % kv_heads:
    raise ValueError(f'{heads} query heads are no multiple of {kv_heads} key/value heads')
  if aligned and length != k.shape[1]:
    raise ValueError(f'aligned attention needs as many keys as queries: {k.shape[1]} != {length}')
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(f'attention implementation {implementation!r} is not known; write one of '
                     f'{", ".join(IMPLEMENTATIONS)}')
  options = (window, soft_cap, head_dim**-0.5 if scale is None else scale, aligned)
  q = q.reshape(batch, length, kv_heads, heads // kv_heads, head_dim).transpose(0, 2, 3, 1, 4)
  # Marked as the kernel takes them: rematerialization that keeps them repeats no transpose either.
  q, k, v = (checkpoint_name(x, name) for x, name in (
      (q, 'query'), (k.swapaxes(1, 2), 'key'), (v.swapaxes(1, 2), 'value')))
  out = IMPLEMENTATIONS[implementation](
      options, q, k, v, (q_segment_ids, q_positions), (k_segment_ids, k_positions))
  return out.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, head_dim)


def visible(q_ids, k_ids, window):
  """Returns bool [B, T, S], who sees whom.  q_ids, k_ids: (segment_ids, positions) of each side."""
  (q_segment, q_position), (k_segment, k_position) = q_ids, k_ids
  distance = q_position[:, :, None] - k_position[:, None, :]
  mask = (q_segment[:, :, None] == k_segment[:, None, :]) & (distance >= 0)
  return mask if window is None else mask & (distance < window)


def _masked_logits(options, q, k, q_ids, k_ids):
  """Returns float32 logits [B, K, G, T, S], MASKED where invisible."""
  window, soft_cap, scale, _ = options
  logits = scale * jnp.einsum('BKGTH,BKSH->BKGTS', q, k, preferred_element_type=jnp.float32)
  if soft_cap is not None:
    logits = soft_cap * jnp.tanh(logits / soft_cap)
  return jnp.where(visible(q_ids, k_ids, window)[:, None, None], logits, MASKED)


def reference_attention(options, q, k, v, q_ids, k_ids):
  """The definition, over the whole square at once."""
  p = jax.nn.softmax(_masked_logits(options, q, k, q_ids, k_ids), axis=-1)
  return jnp.einsum('BKGTS,BKSH->BKGTH', p.astype(v.dtype), v,
                    preferred_element_type=jnp.float32).astype(v.dtype)


def _blocks(options, length, keys):
  """Yields slices (queries, keys) that together hold all that is visible."""
  window, _, _, aligned = options
  size = max(BLOCK, -(-length // MAX_BLOCKS))
  for start in range(0, length, size):
    stop = min(start + size, length)
    # Positions rise by at least 1 a token, so what is `window` tokens away is out of its reach.
    first = max(0, start - window + 1) if aligned and window is not None else 0
    yield slice(start, stop), slice(first, stop if aligned else keys)


def _forward(options, q, k, v, q_ids, k_ids):
  """Returns (outputs, float32 log of the softmax denominators [B, K, G, T, 1])."""
  outs, log_sums = [], []
  for t, s in _blocks(options, q.shape[3], k.shape[2]):
    logits = _masked_logits(options, q[..., t, :], k[..., s, :], _cut(q_ids, t), _cut(k_ids, s))
    top = logits.max(axis=-1, keepdims=True)
    p = jnp.exp(logits - top)
    total = p.sum(axis=-1, keepdims=True)
    out = jnp.einsum('BKGTS,BKSH->BKGTH', p.astype(v.dtype), v[..., s, :],
                     preferred_element_type=jnp.float32)
    outs.append((out / total).astype(v.dtype))
    log_sums.append(top + jnp.log(total))
  return jnp.concatenate(outs, axis=3), jnp.concatenate(log_sums, axis=3)


def _cut(ids, part):
  return tuple(x[:, part] for x in ids)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def blockwise_attention(options, q, k, v, q_ids, k_ids):
  """The same by blocks of queries; the backward pass makes the probabilities again.

  Saves the output and one number a query instead of the square (FlashAttention-2, arXiv:2307.08691,
  algorithm 2).  The blocks are unrolled, because XLA's CPU backend runs loop bodies slower.
  """
  return _forward(options, q, k, v, q_ids, k_ids)[0]


def _blockwise_fwd(options, q, k, v, q_ids, k_ids):
  # Both marked: were one of them not kept, the backward pass would run this whole forward pass again.
  out, log_sum = (checkpoint_name(x, 'attention') for x in _forward(options, q, k, v, q_ids, k_ids))
  return out, (q, k, v, q_ids, k_ids, out, log_sum)


def _blockwise_bwd(options, residuals, d_out):
  q, k, v, q_ids, k_ids, out, log_sum = residuals
  _, soft_cap, scale, _ = options
  # sum_s P * dP = dO . O, row by row (arXiv:2307.08691, algorithm 2, line 4).
  delta = jnp.einsum('BKGTH,BKGTH->BKGT', d_out, out, preferred_element_type=jnp.float32)[..., None]
  d_q = []
  d_k, d_v = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
  for t, s in _blocks(options, q.shape[3], k.shape[2]):
    q_t, d_out_t, k_s, v_s = q[..., t, :], d_out[..., t, :], k[..., s, :], v[..., s, :]
    logits = _masked_logits(options, q_t, k_s, _cut(q_ids, t), _cut(k_ids, s))
    p = jnp.exp(logits - log_sum[..., t, :])
    d_p = jnp.einsum('BKGTH,BKSH->BKGTS', d_out_t, v_s, preferred_element_type=jnp.float32)
    d_logits = p * (d_p - delta[..., t, :])
    if soft_cap is not None:
      # p is 0 where logits are MASKED; the clip keeps the square of MASKED from overflowing there.
      d_logits = d_logits * (1 - jnp.square(jnp.maximum(logits / soft_cap, -1)))
    d_logits = (scale * d_logits).astype(q.dtype)
    d_q.append(jnp.einsum('BKGTS,BKSH->BKGTH', d_logits, k_s))
    d_v = d_v.at[..., s, :].add(_sum_over_queries(p.astype(v.dtype), d_out_t))
    d_k = d_k.at[..., s, :].add(_sum_over_queries(d_logits, q_t))
  return jnp.concatenate(d_q, axis=3), d_k.astype(k.dtype), d_v.astype(v.dtype), None, None


def _sum_over_queries(square, x):
  """Returns float32 [B, K, S, H] from square [B, K, G, T, S] and x [B, K, G, T, H].

  The small factor is transposed by hand, and the barrier keeps XLA from undoing it: its CPU backend
  would transpose the square instead, which costs as much as the product.
  """
  x = jax.lax.optimization_barrier(x.transpose(0, 1, 4, 2, 3))
  # In x's dtype: behind the barrier, XLA's CPU backend has no product of bf16 factors with a float32 sum.
  return jnp.einsum('BKHGT,BKGTS->BKHS', x, square).swapaxes(2, 3).astype(jnp.float32)


blockwise_attention.defvjp(_blockwise_fwd, _blockwise_bwd)

IMPLEMENTATIONS = {'reference': reference_attention, 'blockwise': blockwise_attention}
