"""Perplexity and bits per byte over a finite set of batches."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from llmjax.parallel import in_flight


def make_eval_step(loss_fn, token_bytes, names=()):
  """Make a jitted step(params, frozen, batch) -> float32 [4 + n]: sums of nats, targets, their bytes, and sequences.

  loss_fn: as for training, called without a key and so without dropout.  token_bytes: int [V], UTF-8 bytes of each
  token.  names: n sums in the loss's aux, which are appended.
  """
  token_bytes = jnp.asarray(token_bytes, jnp.float32)

  def eval_step(params, frozen, batch):
    loss, (weight, aux) = loss_fn(params, frozen, batch, None)
    # Ids beyond the tokenizer's pad the vocabulary and are never targets.
    size = jnp.take(token_bytes, batch['targets'], mode='clip')
    sequences = jnp.sum(jnp.any(batch['segment_ids'] > 0, axis=1))  # The rest is padding.
    return jnp.stack([loss, weight, jnp.sum(size * (batch['loss_mask'] > 0)), sequences.astype(jnp.float32),
                      *(aux[name] for name in names)])

  return jax.jit(eval_step)


def evaluate(eval_step, params, frozen, batches, names=()):
  """Return {'loss', 'perplexity', 'bits_per_byte', 'tokens', 'bytes', 'sequences'} and the means of `names`.

  loss is in nats per target.  bits_per_byte includes the end-of-document tokens.  Sums are accumulated in float64 and
  divided once, so the result does not depend on padding or batch size.
  """
  sums = np.zeros(4 + len(names))
  for part in in_flight.results(eval_step(params, frozen, batch) for batch in batches):
    sums += np.asarray(part, np.float64)
  nats, tokens, size, sequences, *more = (float(s) for s in sums)
  loss = nats / max(tokens, 1.0)
  return {'loss': loss, 'perplexity': math.exp(min(loss, 700.0)),
          'bits_per_byte': nats / math.log(2) / max(size, 1.0), 'tokens': int(tokens),
          'bytes': int(size), 'sequences': int(sequences),
          **{name: s / max(tokens, 1.0) for name, s in zip(names, more, strict=True)}}
