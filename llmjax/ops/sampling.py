"""Sampling of the next token: repetition penalty, temperature, top-k, top-p, min-p.

Letters: B batch, V vocab_size.  Logits are float32 [B, V].  Every parameter is a Python number, a traced scalar or an
array [B] with a value per sequence, so changing one does not recompile, and a filter that is off costs nothing at run
time.

No sort: the thresholds of top-k and top-p are found by bisection over the ordered bits of the floats.  Its 32 passes
are exact, run as plain vector code, and cost a tenth of sorting 32000 numbers on a CPU.
"""

import jax
import jax.numpy as jnp

REMOVED = -jnp.inf
BLOCK = 128  # Tokens per block of the cumulative distribution: near sqrt(V), whole vectors.


def sample(key, logits, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0,
           seen=None, drawn=False):
  """Sample a token; return (token int32 [B], its logprob float32 [B] in nats).

  Temperature 0 takes the most likely token.  The logprob is that of the given logits; with `drawn`, a bool that may be
  traced, that of the sampling distribution, 0 at temperature 0.  key: a PRNG key, or keys [B], with which a sequence's
  token does not depend on the other sequences.  seen: bool [B, V], tokens with a repetition penalty, or None.
  """
  batch = logits.shape[0]
  keys = jax.random.split(key, batch) if key.ndim == 0 else key
  temperature = jnp.broadcast_to(jnp.asarray(temperature, jnp.float32), (batch,))
  penalised = logits if seen is None else penalise_repeats(logits, seen, repetition_penalty)
  greedy = jnp.argmax(penalised, axis=-1)

  def draw_rows():
    # Sequences at temperature 0 get the greedy token; temperature 1 keeps their unused draw finite.
    warped = warp(penalised, temperature=jnp.where(temperature > 0, temperature, 1.0), top_k=top_k,
                  top_p=top_p, min_p=min_p)
    token = jnp.where(temperature > 0, jax.vmap(draw)(keys, warped), greedy)
    return token, jnp.where(temperature > 0, _logprob(warped, token), 0.0)

  certain = lambda: (greedy, jnp.zeros((batch,), jnp.float32))
  token, logprob = jax.lax.cond(jnp.any(temperature > 0), draw_rows, certain)
  return token.astype(jnp.int32), jnp.where(drawn, logprob, _logprob(logits, token))


def _logprob(logits, token):
  picked = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
  return picked - jax.nn.logsumexp(logits, axis=-1)


def draw(key, logits):
  """Draw an index, int32 [], with the probabilities softmax(logits); never one at -inf.

  logits: float32 [V].  One uniform number is looked up in the cumulative distribution, in blocks instead of one long
  running sum: a tenth of the time of `jax.random.categorical` on a CPU, which needs V random numbers and 2 V
  logarithms.
  """
  logits = jnp.pad(logits, (0, -logits.shape[0] % BLOCK), constant_values=REMOVED)
  weights = jnp.exp(logits - jnp.max(logits)).reshape(-1, BLOCK)
  blocks = jnp.cumsum(jnp.sum(weights, axis=1))
  target = jax.random.uniform(key) * blocks[-1]
  block = jnp.argmax(blocks > _below(target, blocks[-1]))
  inside = jnp.cumsum(weights[block])
  rest = target - jnp.where(block > 0, blocks[block - 1], 0.0)
  return (block * BLOCK + jnp.argmax(inside > _below(rest, inside[-1]))).astype(jnp.int32)


def _below(x, limit):
  """Return x, or the float before `limit` if rounding has brought x up to it."""
  return jnp.minimum(x, jnp.nextafter(limit, 0.0))


def warp(logits, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
  """Apply temperature, top-k, top-p and min-p, in the order of Hugging Face transformers."""
  logits = scale_temperature(logits, temperature)
  logits = keep_top_k(logits, top_k)
  logits = keep_top_p(logits, top_p)
  return keep_min_p(logits, min_p)


def penalise_repeats(logits, seen, penalty):
  """Divide the logits of seen tokens by the penalty, or multiply them if they are negative.

  seen: bool [B, V].  Source: arXiv:1909.05858, section 4.1, in the form of Hugging Face transformers.
  """
  penalty = _column(penalty, jnp.float32)
  return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def scale_temperature(logits, temperature):
  """Divide the logits by the temperature, which must be positive."""
  return logits / _column(temperature, jnp.float32)


def keep_top_k(logits, k):
  """Set all but the k largest logits to -inf; ties with the smallest of them stay.  0 keeps all."""
  k = _column(k, jnp.int32)
  count = jnp.where(k > 0, jnp.minimum(k, logits.shape[-1]), logits.shape[-1])

  def cut():
    threshold = _largest(logits, lambda t: jnp.sum(logits >= t, -1, keepdims=True) >= count)
    return jnp.where(logits >= threshold, logits, REMOVED)

  return jax.lax.cond(jnp.any(count < logits.shape[-1]), cut, lambda: logits)


def keep_top_p(logits, p):
  """Set the tail to -inf: the least likely tokens with a total probability of at most 1 - p.

  The most likely token always stays, and so do ties with the last one that stays.  1 keeps all.  Source: nucleus
  sampling, arXiv:1904.09751, section 3.1.
  """
  p = _column(p, jnp.float32)

  def cut():
    probs = jax.nn.softmax(logits, axis=-1)

    def tail_is_small(threshold):
      tail = jnp.sum(jnp.where(logits < threshold, probs, 0.0), -1, keepdims=True)
      return tail <= 1.0 - p

    threshold = jnp.where(p < 1.0, _largest(logits, tail_is_small), REMOVED)
    return jnp.where(logits >= threshold, logits, REMOVED)

  return jax.lax.cond(jnp.any(p < 1.0), cut, lambda: logits)


def keep_min_p(logits, p):
  """Set the logits of tokens less likely than p times the most likely one to -inf.

  0 keeps all.  Source: arXiv:2407.01082, section 3.
  """
  p = _column(p, jnp.float32)
  floor = jnp.max(logits, -1, keepdims=True) + jnp.log(p)
  return jnp.where(logits >= floor, logits, REMOVED)


def _column(value, dtype):
  """Return a parameter, scalar or [B], in a shape that broadcasts with [B, V]."""
  value = jnp.asarray(value, dtype)
  return value[:, None] if value.ndim else value


def _largest(logits, holds):
  """Return the largest threshold, [B, 1], up to the maximum logit, for which `holds` is true.

  holds: threshold [B, 1] -> bool [B, 1]; true up to some value, false above it.
  """
  low = _ordered(jnp.full_like(logits[:, :1], REMOVED))
  high = _ordered(jnp.max(logits, axis=-1, keepdims=True))

  def halve(_, bounds):
    low, high = bounds
    middle = high - (high - low) // 2  # Rounds up, so that the bisection of two neighbours ends.
    good = holds(_unordered(middle))
    return jnp.where(good, middle, low), jnp.where(good, high, middle - 1)

  return _unordered(jax.lax.fori_loop(0, 32, halve, (low, high))[0])


def _ordered(x):
  """Return uint32 in the order of the float32 x: negative ones have all bits inverted, others the sign bit."""
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
  return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _unordered(bits):
  """Undo `_ordered`."""
  bits = jnp.where(bits >> 31 == 1, bits & jnp.uint32((1 << 31) - 1), ~bits)
  return jax.lax.bitcast_convert_type(bits, jnp.float32)
