"""Multi-head attention over packed batches, one dispatch table of implementations.

Letters: B batch, T query length, S key length, N query heads, K key-value heads, G = N / K query heads that share one
key-value head, H head_dim.
"""

import functools

import jax
import jax.numpy as jnp

# Large and negative, but finite: a row with no visible key then gets a uniform, finite average instead of NaN.
MASKED = -1e30

# Cost of a causal row of n blocks is (n + 1) / 2n of the whole square, so more blocks skip more of it, but each block
# is a smaller product. 128 was the fastest of 64, 128, 256 on x86 at T = 512; at most 16 blocks bounds compile time.
BLOCK = 128
MAX_BLOCKS = 16


def attention(q, k, v, *, q_positions, k_positions, q_segment_ids, k_segment_ids, window=None,
              soft_cap=None, scale=None, implementation='blockwise', aligned=True):
  if q.shape[2] % k.shape[2]:
    raise ValueError(f'{q.shape[2]} query heads are not a multiple of {k.shape[2]} kv heads.')
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(f'Unknown attention {implementation!r}; known: {sorted(IMPLEMENTATIONS)}')
  scale = q.shape[-1] ** -0.5 if scale is None else scale
  q_ids = (q_segment_ids, q_positions)
  k_ids = (k_segment_ids, k_positions)
  b, t, n, h = q.shape
  grouped = q.reshape(b, t, k.shape[2], -1, h).transpose(0, 2, 3, 1, 4)
  k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
  out = IMPLEMENTATIONS[implementation](window, soft_cap, scale, aligned, grouped, k, v, q_ids, k_ids)
  return out.transpose(0, 3, 1, 2, 4).reshape(b, t, n, h)


def visible(q_ids, k_ids, window):
  (q_segment, q_position), (k_segment, k_position) = q_ids, k_ids
  distance = q_position[:, :, None] - k_position[:, None, :]
  mask = (q_segment[:, :, None] == k_segment[:, None, :]) & (distance >= 0)
  return mask if window is None else mask & (distance < window)


def _logits(q, k, scale, soft_cap, sub):
  s = jnp.einsum(sub, q, k, preferred_element_type=jnp.float32) * scale
  return s if soft_cap is None else soft_cap * jnp.tanh(s / soft_cap)


def reference_attention(window, soft_cap, scale, aligned, q, k, v, q_ids, k_ids):
  s = _logits(q, k, scale, soft_cap, 'BKGTH,BKSH->BKGTS')
  s = jnp.where(visible(q_ids, k_ids, window)[:, None, None], s, MASKED)
  p = jax.nn.softmax(s, axis=-1)
  return jnp.einsum('BKGTS,BKSH->BKGTH', p.astype(v.dtype), v)


def _bounds(t, s, window, aligned):
  """(start, stop, key start, key stop) of every query block."""
  import os
  BLK = int(os.environ.get('ABLK', BLOCK))
  size = max(BLK, -(-t // MAX_BLOCKS))
  out = []
  for start in range(0, t, size):
    stop = min(start + size, t)
    lo, hi = 0, s
    if aligned:
      hi = stop
      lo = 0 if window is None else max(0, start - window + 1)
    out.append((start, stop, lo, hi))
  return out


def _cut(ids, start, stop):
  return tuple(x[:, start:stop] for x in ids)


def _forward(window, soft_cap, scale, aligned, q, k, v, q_ids, k_ids):
  outs, lses = [], []
  for start, stop, lo, hi in _bounds(q.shape[3], k.shape[2], window, aligned):
    s = _logits(q[:, :, :, start:stop], k[:, :, lo:hi], scale, soft_cap, 'BKGTH,BKSH->BKGTS')
    mask = visible(_cut(q_ids, start, stop), _cut(k_ids, lo, hi), window)[:, None, None]
    s = jnp.where(mask, s, MASKED)
    top = s.max(-1, keepdims=True)
    p = jnp.exp(s - top)
    total = p.sum(-1, keepdims=True)
    out = jnp.einsum('BKGTS,BKSH->BKGTH', p.astype(v.dtype), v[:, :, lo:hi],
                     preferred_element_type=jnp.float32)
    outs.append((out / total).astype(v.dtype))
    lses.append((top + jnp.log(total))[..., 0])
  return jnp.concatenate(outs, 3), jnp.concatenate(lses, 3)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def blockwise_attention(window, soft_cap, scale, aligned, q, k, v, q_ids, k_ids):
  return _forward(window, soft_cap, scale, aligned, q, k, v, q_ids, k_ids)[0]


def _fwd(window, soft_cap, scale, aligned, q, k, v, q_ids, k_ids):
  out, lse = _forward(window, soft_cap, scale, aligned, q, k, v, q_ids, k_ids)
  return out, (q, k, v, q_ids, k_ids, out, lse)


def _bwd(window, soft_cap, scale, aligned, residuals, d_out):
  q, k, v, q_ids, k_ids, out, lse = residuals
  delta = jnp.einsum('BKGTH,BKGTH->BKGT', d_out, out, preferred_element_type=jnp.float32)
  dqs, dk, dv = [], 0., 0.
  dks, dvs = [], []
  s_len = k.shape[2]
  for start, stop, lo, hi in _bounds(q.shape[3], s_len, window, aligned):
    qb, kb, vb, dob = q[:, :, :, start:stop], k[:, :, lo:hi], v[:, :, lo:hi], d_out[:, :, :, start:stop]
    s = _logits(qb, kb, scale, soft_cap, 'BKGTH,BKSH->BKSGT')
    mask = visible(_cut(q_ids, start, stop), _cut(k_ids, lo, hi), window)
    mask = mask.transpose(0, 2, 1)[:, None, :, None, :]
    p = jnp.where(mask, jnp.exp(s - lse[:, :, None, :, start:stop]), 0.)
    dv = jnp.einsum('BKSGT,BKGTH->BKSH', p.astype(v.dtype), dob, preferred_element_type=jnp.float32)
    dp = jnp.einsum('BKSH,BKGTH->BKSGT', vb, dob, preferred_element_type=jnp.float32)
    ds = p * (dp - delta[:, :, None, :, start:stop]) * scale
    if soft_cap is not None:
      ds = ds * (1 - (s / soft_cap) ** 2)
    ds = ds.astype(q.dtype)
    dqs.append(jnp.einsum('BKSGT,BKSH->BKGTH', ds, kb))
    dk = jnp.einsum('BKSGT,BKGTH->BKSH', ds, qb, preferred_element_type=jnp.float32)
    pad = ((0, 0), (0, 0), (lo, s_len - hi), (0, 0))
    dks.append(jnp.pad(dk, pad))
    dvs.append(jnp.pad(dv, pad))
  return (jnp.concatenate(dqs, 3), sum(dks).astype(k.dtype), sum(dvs).astype(v.dtype), None, None)


blockwise_attention.defvjp(_fwd, _bwd)
IMPLEMENTATIONS = {'reference': reference_attention, 'blockwise': blockwise_attention}
