"""Log-probabilities of given completions.

Sequences are laid out as in generation (padded on the left, in buckets) over the same vocabulary, so a completion that
was sampled at temperature 1 gets the log-probabilities that it was sampled with.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from llmjax.generate.decode import bucket
from llmjax.ops import sampling as sampling_ops
from llmjax.parallel.mesh import batch_shards

MIN_TAIL = 4  # The least bucket of completion lengths.


def score(generator, prompts, continuations):
  """Return the log-probabilities, in nats, of each continuation's tokens: a list of float32 [length].

  generator: a `decode.Generator`.  prompts, continuations: lists of int arrays of token ids, none of them empty.  The
  result does not depend on which sequences share the batch.
  """
  rows = [np.concatenate([p, c]).astype(np.int32) for p, c in zip(prompts, continuations, strict=True)]
  counts = [len(c) for c in continuations]
  if not rows:
    return []
  if min(counts) < 1 or min(map(len, prompts)) < 1:
    raise ValueError('an empty prompt or continuation has no log-probability')
  tail = bucket(max(counts), MIN_TAIL)
  shards = batch_shards(generator.mesh) if generator.mesh else 1
  rows += [rows[-1]] * (-len(rows) % shards)
  # One more column than the tail: its first token is predicted by the one before it.
  padded = np.zeros((len(rows), bucket(max(max(map(len, rows)), tail + 1))), np.int32)
  for padded_row, row in zip(padded, rows, strict=True):
    padded_row[len(padded_row) - len(row):] = row
  lengths = np.asarray([len(row) for row in rows], np.int32)
  with generator.on_mesh():
    logprobs = _score(generator.model, generator.params, generator.place_rows(padded), generator.place_rows(lengths),
                      np.int32(generator.vocab_size), tail=tail)
  logprobs = generator.to_host(logprobs)
  return [row[tail - count:] for row, count in zip(logprobs, counts, strict=False)]


@functools.partial(jax.jit, static_argnames=('model', 'tail'))
def _score(model, params, tokens, lengths, vocab_size, *, tail):
  """Return log-probabilities of the last `tail` tokens, float32 [B, tail].  tokens: int32 [B, S], right-aligned."""
  slots = tokens.shape[1]
  positions = (jnp.arange(slots) - (slots - lengths[:, None])).astype(jnp.int32)
  batch = {'tokens': tokens, 'positions': positions, 'segment_ids': (positions >= 0).astype(jnp.int32)}
  x, _, _ = model.apply(params, batch)
  logits = model.logits(params, x[:, -tail - 1:-1])
  logits = jnp.where(jnp.arange(logits.shape[-1]) < vocab_size, logits, sampling_ops.REMOVED)
  logprobs = jax.nn.log_softmax(logits.astype(jnp.float32))
  return jnp.take_along_axis(logprobs, tokens[:, -tail:, None], axis=-1)[..., 0]
