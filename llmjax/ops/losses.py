"""Cross-entropy and log-probabilities of next tokens, without the logits of a whole batch.

Letters: B batch, T query length, D model, V vocab, C tokens of a sequence in one chunk.  A loss is a sum and a weight,
divided once, after all microbatches and devices.  The output matrix w is [D, V] with vocab_axis=1, or a tied embedding
table [V, D] with vocab_axis=0.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from llmjax.ops.chunks import CHUNK_LOGITS, chunk_logits_of, count_chunks, join, split
from llmjax.ops.products import is_differentiated, values


def cross_entropy(logits, targets, loss_mask, *, z_loss=0.0):
  """Compute (sum of next-token losses in nats, weight) of given logits.

  logits: [B, T, V] any float, reduced in float32.  targets: int [B, T].  loss_mask: float [B, T], 0 ignores.  z_loss
  scales log(Z)^2, Z the softmax denominator (PaLM, arXiv:2204.02311, section 5).
  """
  log_z, target, _ = _statistics(logits.astype(jnp.float32), targets)
  loss_mask = loss_mask.astype(jnp.float32)
  return jnp.sum(loss_mask * (log_z - target + z_loss * jnp.square(log_z))), jnp.sum(loss_mask)


def chunked_cross_entropy(x, w, targets, loss_mask, *, z_loss=0.0, soft_cap=None, chunk=None,
                          chunk_logits=CHUNK_LOGITS, vocab_axis=1):
  """Compute (sum of next-token losses in nats, weight, aux), float32 scalars.

  x: final hidden states [B, T, D].  w: the output matrix.  targets: int [B, T].  loss_mask: float [B, T], 0 ignores.
  z_loss: as in `cross_entropy`; part of the sum.  soft_cap: logits become soft_cap * tanh(logits / soft_cap).  chunk:
  tokens of each sequence per chunk; None: as many as have chunk_logits logits.
  aux: sums without gradient: `z_loss`, and `correct`, the weight of targets with the largest logit.

  Products are in x's dtype with float32 sums, the softmax in float32.  The gradient is computed in the forward pass,
  chunk by chunk, so that logits are computed once and discarded with their chunk; without differentiation it is not
  computed.
  """
  loss_mask = loss_mask.astype(jnp.float32)
  options = _Options(count_chunks(targets.shape, w.shape[vocab_axis], chunk, chunk_logits), vocab_axis, soft_cap,
                     z_loss=z_loss)
  loss, aux = _loss_sum(options, x, w, targets, loss_mask)
  return loss, jnp.sum(loss_mask), jax.lax.stop_gradient(aux)


def token_logprobs(x, w, targets, *, temperature=1.0, entropy=False, soft_cap=None, chunk=None,
                   chunk_logits=CHUNK_LOGITS, vocab_size=None, vocab_axis=1):
  """Compute log p(targets), float32 [B, T] in nats; with `entropy`, the pair (log p(targets), entropy of p).

  temperature: divides the logits, after soft_cap.  vocab_size: ids from here on, which pad the matrix, have probability
  0; None: all ids count.  Other arguments as in `chunked_cross_entropy`.

  The backward pass recomputes each chunk's logits.
  """
  options = _Options(count_chunks(targets.shape, w.shape[vocab_axis], chunk, chunk_logits), vocab_axis, soft_cap,
                     temperature=temperature, entropy=entropy, vocab_size=vocab_size)
  logprobs, entropies = _logprobs(options, x, w, targets)
  return (logprobs, entropies) if entropy else logprobs


class _Options(NamedTuple):
  """Static arguments; hashable."""

  chunks: int
  vocab_axis: int
  soft_cap: float | None
  z_loss: float = 0.0
  temperature: float = 1.0
  entropy: bool = False
  vocab_size: int | None = None


def _chunk_logits(options, x, w):
  """Return float32 logits [B, C, V] and the input of the softmax: masked to vocab_size, divided by the temperature."""
  logits = chunk_logits_of(x, w, options.vocab_axis, options.soft_cap)
  scaled = logits if options.temperature == 1 else logits / options.temperature
  if options.vocab_size is not None and options.vocab_size < logits.shape[-1]:
    scaled = jnp.where(jnp.arange(logits.shape[-1]) < options.vocab_size, scaled, -jnp.inf)
  return logits, scaled


def _statistics(logits, targets):
  """Return (log softmax denominator, the target's logit, the largest logit), each [B, C]."""
  top = jax.lax.stop_gradient(logits.max(axis=-1))
  log_z = top + jnp.log(jnp.sum(jnp.exp(logits - top[..., None]), axis=-1))
  return log_z, jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0], top


def _chunk_gradients(options, x, w, targets, logits, log_z, p_weight, target_weight, trainable):
  """Return (d x, float32 d w) for d scaled = p_weight * softmax - target_weight * one_hot(targets).

  logits: the pair of `_chunk_logits`.  p_weight: float32 [B, C], or [B, C, V].  target_weight: float32 [B, C].
  trainable: False for a frozen w, whose gradient is 0.
  """
  logits, scaled = logits
  p_weight = p_weight if p_weight.ndim == 3 else p_weight[..., None]
  is_target = targets[..., None] == jnp.arange(logits.shape[-1])
  d = p_weight * jnp.exp(scaled - log_z[..., None]) - jnp.where(is_target, target_weight[..., None], 0)
  if options.temperature != 1:
    d = d / options.temperature
  if options.soft_cap is not None:
    d = d * (1 - jnp.square(logits / options.soft_cap))
  d = d.astype(x.dtype)
  d_x = jax.lax.dot_general(d, w.astype(x.dtype), (((2,), (options.vocab_axis,)), ((), ())))
  if not trainable:
    return d_x, jnp.zeros(())
  factors = (x, d) if options.vocab_axis == 1 else (d, x)
  d_w = jax.lax.dot_general(*factors, (((0, 1), (0, 1)), ((), ())), preferred_element_type=jnp.float32)
  return d_x, d_w


# The loss.


def _chunk_loss(options, x, w, targets, loss_mask):
  """Return ((loss sum, aux), losses [B, C], logits, log_z) of one chunk."""
  logits = _chunk_logits(options, x, w)
  log_z, target, top = _statistics(logits[1], targets)
  penalty = options.z_loss * jnp.square(log_z)
  losses = log_z - target + penalty
  aux = {'z_loss': jnp.sum(loss_mask * penalty), 'correct': jnp.sum(loss_mask * (target >= top))}
  return (jnp.sum(loss_mask * losses), aux), losses, logits, log_z


def _zero_loss():
  return jnp.zeros(()), {'z_loss': jnp.zeros(()), 'correct': jnp.zeros(())}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss_sum(options, x, w, targets, loss_mask):
  def add_chunk(total, chunk):
    rows, targets, loss_mask = chunk
    return jax.tree.map(jnp.add, total, _chunk_loss(options, rows, w, targets, loss_mask)[0]), None
  return jax.lax.scan(add_chunk, _zero_loss(), split(options.chunks, x, targets, loss_mask))[0]


def _loss_sum_fwd(options, *arguments):
  trainable = is_differentiated(arguments[1])
  x, w, targets, loss_mask = values(arguments)

  def add_chunk(total, chunk):
    rows, targets, loss_mask = chunk
    loss, losses, logits, log_z = _chunk_loss(options, rows, w, targets, loss_mask)
    # d (z_loss * log_z^2) / d logits = 2 z_loss * log_z * softmax.
    p_weight = loss_mask * (1 + 2 * options.z_loss * log_z)
    d_x, d_w = _chunk_gradients(options, rows, w, targets, logits, log_z, p_weight, loss_mask, trainable)
    return jax.tree.map(jnp.add, total, (loss, d_w)), (d_x, losses)

  zeros = _zero_loss(), jnp.zeros(w.shape if trainable else (), jnp.float32)
  (loss, d_w), parts = jax.lax.scan(add_chunk, zeros, split(options.chunks, x, targets, loss_mask))
  d_x, losses = join(x.shape[1], *parts)
  return loss, (d_x, d_w.astype(w.dtype) if trainable else None, losses)


def _loss_sum_bwd(options, residuals, cotangents):
  d_x, d_w, losses = residuals
  scale, _ = cotangents  # aux has no gradient.
  if isinstance(scale, SymbolicZero):
    return None, None, None, None
  d_w = d_w if d_w is None else d_w * scale.astype(d_w.dtype)
  return d_x * scale.astype(d_x.dtype), d_w, None, losses * scale


_loss_sum.defvjp(_loss_sum_fwd, _loss_sum_bwd, symbolic_zeros=True)


# Log-probabilities.  Their cotangents differ between tokens, so the gradient cannot be computed in the forward pass.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _logprobs(options, x, w, targets):
  return _logprobs_and_log_z(options, x, w, targets)[:2]


def _logprobs_and_log_z(options, x, w, targets):
  """Return log-probabilities, entropies, and log Z, each float32 [B, T]."""
  def one_chunk(_, chunk):
    rows, targets = chunk
    _, logits = _chunk_logits(options, rows, w)
    log_z, target, _ = _statistics(logits, targets)
    return None, (target - log_z, _entropy(logits, log_z) if options.entropy else jnp.zeros_like(log_z), log_z)
  parts = jax.lax.scan(one_chunk, None, split(options.chunks, x, targets))[1]
  return join(x.shape[1], *parts)


def _logprobs_fwd(options, *arguments):
  x, w, targets = values(arguments)
  logprobs, entropies, log_z = _logprobs_and_log_z(options, x, w, targets)
  # An empty tuple or None, which hold no array: whether w is differentiated.
  trainable = () if is_differentiated(arguments[1]) else None
  return (logprobs, entropies), (x, w, targets, log_z, entropies, trainable)


def _entropy(logits, log_z):
  """Compute -sum p log p, [B, C], where 0 log 0 = 0."""
  log_p = logits - log_z[..., None]
  return -jnp.sum(jnp.where(log_p > -jnp.inf, jnp.exp(log_p) * log_p, 0), axis=-1)


def _logprobs_bwd(options, residuals, cotangents):
  x, w, targets, log_z, entropies, trainable = residuals
  trainable = trainable is not None
  if all(isinstance(d, SymbolicZero) for d in cotangents):
    return None, None, None
  cotangents = [jnp.zeros_like(log_z) if isinstance(d, SymbolicZero) else d for d in cotangents]

  def add_chunk(d_w, chunk):
    rows, targets, log_z, entropies, d_logprob, d_entropy = chunk
    logits = _chunk_logits(options, rows, w)
    p_weight = -d_logprob
    if options.entropy:
      # d entropy / d logit = -p (log p + entropy).
      log_p = jnp.maximum(logits[1] - log_z[..., None], -200.0)  # p is 0 there, and 0 * -inf would be NaN.
      p_weight = p_weight[..., None] - d_entropy[..., None] * (log_p + entropies[..., None])
    d_x, more = _chunk_gradients(options, rows, w, targets, logits, log_z, p_weight, -d_logprob, trainable)
    return d_w + more, d_x

  chunks = split(options.chunks, x, targets, log_z, entropies, *cotangents)
  d_w, d_x = jax.lax.scan(add_chunk, jnp.zeros(w.shape if trainable else (), jnp.float32), chunks)
  return *join(x.shape[1], d_x), d_w.astype(w.dtype) if trainable else None, None


_logprobs.defvjp(_logprobs_fwd, _logprobs_bwd, symbolic_zeros=True)
