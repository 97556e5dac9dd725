"""Losses and log-probabilities of next tokens, without the logits of a whole batch.

Letters: B batch, T query length, D model, V vocab, C tokens of one row in one chunk. A loss is a sum and a weight;
whoever averages divides them once, after all microbatches and devices.
"""

import functools

import jax
import jax.numpy as jnp

CHUNK_TOKENS = 1024


def cross_entropy(logits, targets, loss_mask, *, z_loss=0.0):
  """Sum of next-token losses in nats, and the weight to divide it by: the plain form, for small V.

  logits: [B, T, V] any float, reduced in float32.  targets: int [B, T].  loss_mask: float [B, T],
  0 ignores.  z_loss scales log(Z)^2, Z the softmax denominator (PaLM, arXiv:2204.02311, section 5).
  Returns (loss_sum, weight), float32 scalars.
  """
  logits = logits.astype(jnp.float32)
  log_z = jax.nn.logsumexp(logits, axis=-1)
  logprobs = _pick(logits, targets) - log_z
  loss_mask = loss_mask.astype(jnp.float32)
  return jnp.sum(loss_mask * (z_loss * log_z**2 - logprobs)), jnp.sum(loss_mask)


def chunked_cross_entropy(x, w, targets, loss_mask, *, z_loss=0.0, soft_cap=None, chunk=None,
                          vocab_axis=1):
  chunks = _num_chunks(x, chunk)
  loss_mask = loss_mask.astype(jnp.float32)
  loss, aux = _cross_entropy((chunks, z_loss, soft_cap, vocab_axis), x, w, targets, loss_mask)
  return loss, jnp.sum(loss_mask), aux


def _num_chunks(x, chunk):
  b, t, _ = x.shape
  chunk = chunk or max(1, CHUNK_TOKENS // b)
  return -(-t // chunk)


def _split(a, chunks):
  """[B, T, ...] to [chunks, B, C, ...], padded with zeros; chunk i holds tokens i, i + chunks, ..."""
  size = -(-a.shape[1] // chunks)
  a = jnp.pad(a, ((0, 0), (0, size * chunks - a.shape[1])) + ((0, 0),) * (a.ndim - 2))
  return jnp.moveaxis(a.reshape(a.shape[0], size, chunks, *a.shape[2:]), 2, 0)


def _join(a, length):
  """Undoes `_split`: [chunks, B, C, ...] to [B, T, ...]."""
  a = jnp.moveaxis(a, 0, 2)
  return a.reshape(a.shape[0], -1, *a.shape[3:])[:, :length]


def _pick(logits, targets):
  """logits[..., targets].  A comparison, not a gather, so that a vocabulary may be sharded."""
  hit = targets[..., None] == jnp.arange(logits.shape[-1])
  return jnp.sum(jnp.where(hit, logits, 0), axis=-1)


def _logits(x, w, soft_cap, vocab_axis):
  logits = jax.lax.dot_general(x, w.astype(x.dtype), (((2,), (1 - vocab_axis,)), ((), ())),
                               preferred_element_type=jnp.float32)
  return logits if soft_cap is None else soft_cap * jnp.tanh(logits / soft_cap)


def _statistics(logits, targets):
  """(log Z, target's logit, largest logit), each [B, C]."""
  top = logits.max(axis=-1)
  log_z = top + jnp.log(jnp.sum(jnp.exp(logits - top[..., None]), axis=-1))
  return log_z, _pick(logits, targets), top


def _gradients(x, w, targets, logits, log_z, spread, peak, soft_cap, vocab_axis):
  """(dx, dw) where d logits = spread * softmax - peak * one_hot(targets); spread, peak: [B, C]."""
  hit = targets[..., None] == jnp.arange(logits.shape[-1])
  d = jnp.exp(logits - log_z[..., None]) * spread[..., None] - jnp.where(hit, peak[..., None], 0)
  if soft_cap is not None:
    d = d * (1 - jnp.square(logits / soft_cap))
  d = d.astype(x.dtype)
  dx = jax.lax.dot_general(d, w.astype(x.dtype), (((2,), (vocab_axis,)), ((), ())))
  pair = (x, d) if vocab_axis == 1 else (d, x)
  dw = jax.lax.dot_general(*pair, (((0, 1), (0, 1)), ((), ())), preferred_element_type=jnp.float32)
  return dx, dw


def _cross_entropy_chunk(options, x, w, targets, loss_mask):
  _, z_loss, soft_cap, vocab_axis = options
  logits = _logits(x, w, soft_cap, vocab_axis)
  log_z, target, top = _statistics(logits, targets)
  z = z_loss * jnp.square(log_z)
  loss = log_z - target + z
  aux = {'z_loss': jnp.sum(loss_mask * z),
         'correct': jnp.sum((target >= top) * (loss_mask > 0).astype(jnp.float32))}
  return loss, aux, logits, log_z


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(options, x, w, targets, loss_mask):
  def body(total, c):
    loss, aux, _, _ = _cross_entropy_chunk(options, c[0], w, c[1], c[2])
    return jax.tree.map(jnp.add, total, (jnp.sum(loss * c[2]), aux)), None
  zero = jnp.zeros(())
  split = [_split(a, options[0]) for a in (x, targets, loss_mask)]
  return jax.lax.scan(body, (zero, {'z_loss': zero, 'correct': zero}), split)[0]


def _cross_entropy_fwd(options, x, w, targets, loss_mask):
  chunks, z_loss, soft_cap, vocab_axis = options
  def body(total, c):
    xc, tc, mc = c
    loss, aux, logits, log_z = _cross_entropy_chunk(options, xc, w, tc, mc)
    dx, dw = _gradients(xc, w, tc, logits, log_z, mc * (1 + 2 * z_loss * log_z), mc, soft_cap, vocab_axis)
    return jax.tree.map(jnp.add, total, ((jnp.sum(loss * mc), aux), dw)), (dx, loss)
  zero = jnp.zeros(())
  total = (zero, {'z_loss': zero, 'correct': zero}), jnp.zeros(w.shape, jnp.float32)
  split = [_split(a, chunks) for a in (x, targets, loss_mask)]
  (out, dw), (dx, loss) = jax.lax.scan(body, total, split, unroll=UNROLL)
  t = x.shape[1]
  return out, (_join(dx, t), dw.astype(w.dtype), _join(loss, t))

import os
UNROLL = int(os.environ.get('CEU', 1))

def _cross_entropy_bwd(options, residuals, cotangents):
  dx, dw, loss = residuals
  scale, _ = cotangents
  return (dx * scale.astype(dx.dtype), dw * scale.astype(dw.dtype), None, loss * scale)


_cross_entropy.defvjp(_cross_entropy_fwd, _cross_entropy_bwd)
