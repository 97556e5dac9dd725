"""On-policy distillation: some batches are what the student itself says, for the teacher to judge (arXiv:2306.13649).

With probability lambda a batch of the data is replaced: each of its rows gives a prompt, and the student goes on from
it.  Which batches these are depends on the seed and their number alone, and what is said on the parameters just
before, on the seed and the number; so a run that goes on has the same batches, to the bit, and nothing is kept.
"""

import jax
import jax.numpy as jnp
import numpy as np

from llmjax.data import stream
from llmjax.generate.decode import Generator
from llmjax.post import rollout
from llmjax.post.spec import RlSpec

_DRAW = 0x6B0  # Tells these draws of a seed from others.


def is_on_policy(seed, number, share):
  """Says whether batch `number` is the student's own.  share: lambda of alg. 1 there."""
  return bool(np.random.default_rng([seed, _DRAW, number]).random() < share)


def prompts_of(batch, seq_len, max_new_tokens):
  """Returns [int32 ids] of what the student is to go on from, one for each row of a batch.

  A row's longest document: a conversation until the assistant speaks first, a text without its last max_new_tokens.
  At most so much, its end, as leaves room for those in a row.
  """
  prompts = []
  for row in range(len(batch['tokens'])):
    ids, weights = max(stream.documents_of(batch, row), key=lambda document: len(document[0]))
    trained = np.flatnonzero(weights)
    first = int(trained[0]) if len(trained) else len(ids)
    # All of a text is trained, but for its first token, which nothing comes before.
    size = first if first > 1 else max(len(ids) - max_new_tokens, 1)
    prompts.append(ids[:size][-(seq_len + 1 - max_new_tokens):].astype(np.int32))
  return prompts


class OnPolicyStream:
  """A stream of batches of data (`stream.BatchStream`) of which some are the student's own.

  Before a batch is drawn where `is_due`, `refill` must be called with the student's parameters.
  """

  def __init__(self, spec, mesh, batches, tokenizer, stop_ids):
    """spec: the command's, with groups distill, model, train, data.  batches: this process's stream."""
    self.spec, self.mesh, self.batches = spec, mesh, batches
    self.tokenizer, self.stop_ids, self.fingerprint = tokenizer, tuple(stop_ids), batches.fingerprint
    # The student says all rows on every process.
    self._whole = stream.open_stream(spec.data, batch_size=spec.train.batch_size, seed=spec.train.seed)
    self._said = None  # (number of a batch, that batch).

  @property
  def state(self):
    return self.batches.state

  @property
  def is_due(self):
    """Whether the next batch is one that the student has yet to say."""
    return self._is_own(self.state) and (self._said is None or self._said[0] != self.state)

  def _is_own(self, number):
    return is_on_policy(self.spec.train.seed, number, self.spec.distill.on_policy)

  def restore(self, state):
    self.batches.restore(state)
    self._said = None

  def close(self):
    self.batches.close()
    self._whole.close()

  def __iter__(self):
    return self

  def __next__(self):
    if self.is_due:
      raise RuntimeError('there is no rollout for this batch: call refill first')
    if not self._is_own(self.state):
      return next(self.batches)
    _, batch = self._said
    self.batches.restore(self.state + 1)
    rows = rollout.own_rows(self.mesh, np.arange(len(batch['tokens'])))
    return {name: a[rows] for name, a in batch.items()}

  def refill(self, params):
    """Lets the student say the next batch; returns metrics: mean `tokens`, and how many `ended`."""
    spec, number = self.spec, self.state
    self._whole.restore(number)
    prompts = prompts_of(next(self._whole), spec.data.seq_len, spec.distill.max_new_tokens)
    generator = Generator(spec.model, params, jnp.dtype(spec.train.compute_dtype), self.mesh,
                          vocab_size=self.tokenizer.vocab_size)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(spec.train.seed), _DRAW), number)
    answers, _ = rollout.sample(generator, prompts, 1, RlSpec(max_new_tokens=spec.distill.max_new_tokens), key,
                                self.stop_ids)
    self._said = number, rollout.make_rows(prompts, answers, spec.data.seq_len)
    return {'tokens': float(np.mean([len(a) for a in answers])),
            'ended': float(np.mean([len(a) > 0 and int(a[-1]) in self.stop_ids for a in answers]))}

  def describe(self, number):
    """Returns the rows of batch `number` as `BatchStream.describe` does; [] where the student said others since."""
    if not self._is_own(number):
      return self.batches.describe(number)
    if self._said is None or self._said[0] != number:
      return []
    batch = self._said[1]
    return [{'source': 'the student', 'row': row, 'tokens': [ids for ids, _ in stream.documents_of(batch, row)]}
            for row in range(len(batch['tokens']))]
