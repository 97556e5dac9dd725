"""What a model thinks of given answers: the log-probability of every token of a continuation.

The rows are laid out as in generation (padded on the left, in buckets), and the same tokens are possible, so
what a Generator sampled at temperature 1 gets the log-probabilities that it was sampled with.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from llmjax.generate.decode import bucket
from llmjax.ops import sampling as sampling_ops
from llmjax.parallel.mesh import batch_shards

MIN_TAIL = 4  # Continuations come in lengths of this times powers of two.


def score(generator, prompts, continuations):
  """Returns the log-probabilities, nats, of each continuation's tokens: a list of float32 [length].

  generator: a `decode.Generator`.  prompts, continuations: token ids, one int array of each for every row;
  neither may be empty.  Each row gets what it would get alone.
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
  # One more column than the tail, so that its first token has a predecessor in the row.
  padded = np.zeros((len(rows), bucket(max(max(map(len, rows)), tail + 1))), np.int32)
  for padded_row, row in zip(padded, rows, strict=True):
    padded_row[len(padded_row) - len(row):] = row
  lengths = np.asarray([len(row) for row in rows], np.int32)
  with generator.on_mesh():
    found = _score(generator.model, generator.params, generator.place_rows(padded), generator.place_rows(lengths),
                   np.int32(generator.vocab_size), tail=tail)
  found = generator.to_host(found)
  return [row[tail - count:] for row, count in zip(found, counts, strict=False)]


@functools.partial(jax.jit, static_argnames=('model', 'tail'))
def _score(model, params, tokens, lengths, vocab_size, *, tail):
  """Returns float32 [B, tail]: log-probabilities of the last `tail` tokens.  tokens: int32 [B, S], right-aligned."""
  slots = tokens.shape[1]
  positions = (jnp.arange(slots) - (slots - lengths[:, None])).astype(jnp.int32)
  batch = {'tokens': tokens, 'positions': positions, 'segment_ids': (positions >= 0).astype(jnp.int32)}
  x, _, _ = model.apply(params, batch)
  logits = model.logits(params, x[:, -tail - 1:-1])
  logits = jnp.where(jnp.arange(logits.shape[-1]) < vocab_size, logits, sampling_ops.REMOVED)
  logprobs = jax.nn.log_softmax(logits.astype(jnp.float32))
  return jnp.take_along_axis(logprobs, tokens[:, -tail:, None], axis=-1)[..., 0]
