"""On-policy distillation: some batches are completions of the student, on which the teacher is imitated.

Source: GKD (arXiv:2306.13649), algorithm 1.  With probability lambda the student completes the prompts of a batch of
the data, and is trained on these completions.  Which batches they are depends on the seed and the batch number alone,
and the completions also on the current parameters, so a resumed run has the same batches to the bit and nothing is
stored.
"""

import jax
import jax.numpy as jnp
import numpy as np

from llmjax.data import stream
from llmjax.generate.decode import Generator
from llmjax.post import rollout
from llmjax.post.spec import RlSpec

_STREAM = 0x6B0  # Separates these random numbers from others of the same seed.


def is_on_policy(seed, number, fraction):
  """Return whether batch `number` is on-policy.  fraction: the probability lambda."""
  return bool(np.random.default_rng([seed, _STREAM, number]).random() < fraction)


def extract_prompts(batch, seq_len, max_new_tokens):
  """Return the prompts of the student, int32 ids, one per sequence of a batch.

  A prompt is the sequence's longest document: a conversation up to the first trained turn, a text without its last
  max_new_tokens; truncated from the left to leave room for the completion.
  """
  prompts = []
  for row in range(len(batch['tokens'])):
    ids, weights = max(stream.documents_of(batch, row), key=lambda document: len(document[0]))
    trained = np.flatnonzero(weights)
    first = int(trained[0]) if len(trained) else len(ids)
    # Every token of a text is trained except the first.
    size = first if first > 1 else max(len(ids) - max_new_tokens, 1)
    prompts.append(ids[:size][-(seq_len + 1 - max_new_tokens):].astype(np.int32))
  return prompts


class OnPolicyStream:
  """A stream of batches of which some are completions of the student (see `stream.BatchStream`).

  Where `is_due`, call `refill` with the student's parameters before the next batch.
  """

  def __init__(self, spec, mesh, batches, tokenizer, stop_ids):
    """spec: with groups distill, model, train, data.  batches: this process's stream of the data."""
    self.spec, self.mesh, self.batches = spec, mesh, batches
    self.tokenizer, self.stop_ids, self.fingerprint = tokenizer, tuple(stop_ids), batches.fingerprint
    # Every process samples the completions of the global batch.
    self._global = stream.open_stream(spec.data, batch_size=spec.train.batch_size, seed=spec.train.seed)
    self._sampled = None  # (batch number, global batch) of the last rollout.

  @property
  def state(self):
    return self.batches.state

  @property
  def is_due(self):
    """Whether the next batch needs new completions."""
    return self._is_on_policy(self.state) and (self._sampled is None or self._sampled[0] != self.state)

  def _is_on_policy(self, number):
    return is_on_policy(self.spec.train.seed, number, self.spec.distill.on_policy_fraction)

  def restore(self, state):
    self.batches.restore(state)
    self._sampled = None

  def close(self):
    self.batches.close()
    self._global.close()

  def __iter__(self):
    return self

  def __next__(self):
    if self.is_due:
      raise RuntimeError('this batch has no completions: call refill first')
    if not self._is_on_policy(self.state):
      return next(self.batches)
    _, batch = self._sampled
    self.batches.restore(self.state + 1)
    rows = rollout.local_rows(self.mesh, np.arange(len(batch['tokens'])))
    return {name: a[rows] for name, a in batch.items()}

  def refill(self, params):
    """Sample the next batch; returns metrics: mean `tokens`, and the share that `ended`."""
    spec, number = self.spec, self.state
    self._global.restore(number)
    prompts = extract_prompts(next(self._global), spec.data.seq_len, spec.distill.max_new_tokens)
    generator = Generator(spec.model, params, jnp.dtype(spec.train.compute_dtype), self.mesh,
                          vocab_size=self.tokenizer.vocab_size)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(spec.train.seed), _STREAM), number)
    completions, _ = rollout.sample(generator, prompts, 1, RlSpec(max_new_tokens=spec.distill.max_new_tokens), key,
                                    self.stop_ids)
    self._sampled = number, rollout.make_batch(prompts, completions, spec.data.seq_len)
    return {'tokens': float(np.mean([len(c) for c in completions])),
            'ended': float(np.mean([len(c) > 0 and int(c[-1]) in self.stop_ids for c in completions]))}

  def describe(self, number):
    """Return the sequences of batch `number` as `BatchStream.describe` does; [] where they are not in memory."""
    if not self._is_on_policy(number):
      return self.batches.describe(number)
    if self._sampled is None or self._sampled[0] != number:
      return []
    batch = self._sampled[1]
    return [{'source': 'student', 'row': row, 'tokens': [ids for ids, _ in stream.documents_of(batch, row)]}
            for row in range(len(batch['tokens']))]
