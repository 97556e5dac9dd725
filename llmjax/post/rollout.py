"""Rollouts: answers that the policy gives, as the rows that it is trained on.

Letters: N rows of an iteration, `group` of them to each prompt and beside one another, T tokens of a row.

The sampler pads prompts on the left, the trainer rows on the right; neither sees padding.  Both divide the logits by
the same temperature, and that their log-probabilities agree is checked in every iteration.  The sampler's
parameters are made on the devices from those that are trained, and lie as they do.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from llmjax.data import stepwise
from llmjax.generate.spec import SamplingSpec
from llmjax.parallel import in_flight
from llmjax.parallel.mesh import batch_blocks, batch_shards, place_batch
from llmjax.post import advantages, objective, reward_model, rewards
from llmjax.train.objectives import forward


def make_rows(prompts, answers, seq_len):
  """Returns the batch [N, T] of rows: prompt, answer, padding; loss_mask is 1 where a token of the answer is predicted.

  prompts, answers: int arrays, one for each row, together at most seq_len + 1 tokens.
  """
  shape = len(prompts), seq_len
  batch = {name: np.zeros(shape, np.int32) for name in ('tokens', 'targets', 'segment_ids', 'positions')}
  batch['loss_mask'] = np.zeros(shape, np.float32)
  for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
    ids = np.concatenate([prompt, answer])
    size = len(ids) - 1
    batch['tokens'][i, :size], batch['targets'][i, :size] = ids[:-1], ids[1:]
    batch['segment_ids'][i, :size], batch['positions'][i, :size] = 1, np.arange(size)
    batch['loss_mask'][i, len(prompt) - 1:size] = 1
  return batch


def spread(values, prompts, seq_len):
  """Returns float32 [N, T]: each row's values of its answer's tokens, where `make_rows` has them as targets."""
  out = np.zeros((len(prompts), seq_len), np.float32)
  for row, prompt, found in zip(out, prompts, values, strict=True):
    row[len(prompt) - 1:len(prompt) - 1 + len(found)] = found
  return out


def own_rows(mesh, rows):
  """Returns those of the rows of a batch (int array, of the whole job) that this process's devices hold."""
  shards = batch_shards(mesh)
  return np.concatenate([rows[b * len(rows) // shards:(b + 1) * len(rows) // shards] for b in batch_blocks(mesh)])


def answer_of(tokenizer, prompt, tokens, stop_ids):
  """Returns the rewards.Answer of sampled tokens.  prompt: {'ids', 'answer'}, an example of prompts data."""
  ended = bool(len(tokens)) and int(tokens[-1]) in stop_ids
  return rewards.Answer(tokenizer.decode(prompt['ids']), tokenizer.decode(tokens[:-1] if ended else tokens),
                        prompt['answer'], len(tokens), ended, (*map(int, prompt['ids']), *map(int, tokens)))


class _InParts:
  """A function of parameters and a batch of rows, for any number of rows on every host."""

  def __init__(self, function, mesh, rows, static):
    """function(params, batch, *static) -> {name: array with leading axis rows}.  rows: at a time, over all devices.

    static: how many arguments come after the batch.
    """
    self._mesh, self._rows = mesh, rows
    whole = jax.NamedSharding(mesh, jax.P())
    self._function = jax.jit(function, static_argnums=tuple(range(2, 2 + static)), out_shardings=whole)

  def __call__(self, params, batch, *static):
    count = len(batch['tokens'])
    size = self._rows // batch_shards(self._mesh)
    own = np.concatenate([np.arange(b * size, (b + 1) * size) for b in batch_blocks(self._mesh)])

    def score(start):
      rows = np.minimum(start + own, count - 1)  # What is over repeats the last row and is cut off.
      placed = place_batch(self._mesh, {name: a[rows] for name, a in batch.items()})
      with jax.set_mesh(self._mesh):
        return self._function(params, placed, *static)

    parts = list(in_flight.results(score(start) for start in range(0, count, self._rows)))
    return {name: np.concatenate([p[name] for p in parts])[:count] for name in parts[0]}


class RewardScorer:
  """What a reward model says of whole rows of tokens, read at some of them: at the last one, or behind every step."""

  def __init__(self, model, mesh, *, rows, length, reduce=''):
    """rows: how many at a time.  length: tokens of the longest.  reduce: of steps, for `reward_model.process_score`."""
    unit = 2 * mesh.shape['context'] * mesh.shape['tensor']
    self._length = -(-length // unit) * unit

    def score(params, batch):
      batch = model.order(batch)
      values, places = model.values(params, forward(model, params, batch)[0]), batch['loss_mask']
      if reduce:
        return {'scores': reward_model.process_score(values, places, reduce)}
      return {'scores': reward_model.score_at_end(values, places)}

    self._score = _InParts(score, mesh, rows, 0)

  def __call__(self, params, rows, places=None):
    """Returns float32 [N].  rows: token ids of each.  places: where each is read; None: at its last token."""
    batch = {name: np.zeros((len(rows), self._length), np.int32) for name in ('tokens', 'segment_ids', 'positions')}
    batch['loss_mask'] = np.zeros((len(rows), self._length), np.float32)
    for i, ids in enumerate(rows):
      batch['tokens'][i, :len(ids)], batch['segment_ids'][i, :len(ids)] = ids, 1
      batch['positions'][i, :len(ids)] = np.arange(len(ids))
      batch['loss_mask'][i, [len(ids) - 1] if places is None else places[i]] = 1
    return self._score(params, batch)['scores']


def places_of_steps(tokenizer, answer):
  """Returns the places in an Answer's ids of the last token of each of its steps."""
  first = len(answer.ids) - answer.tokens
  return [first + end - 1 for end in stepwise.find_ends(tokenizer, answer.ids[first:len(answer.ids) - answer.ended])]


class Scorer:
  """Log-probabilities, entropies and values of whole iterations, a few rows at a time, as the trainer has them."""

  def __init__(self, model, mesh, *, rows, temperature=1.0, vocab_size=None):
    """model: a Model.  rows: how many at a time, over all devices."""

    def score(params, batch, with_values):
      batch = model.order(batch)
      found = objective.score_tokens(model, params, batch, temperature=temperature, entropy=True,
                                     vocab_size=vocab_size)
      out = {'logprobs': found.logprobs, 'entropies': found.entropies}
      if with_values:
        out['values'] = model.values(params, found.hidden)
      return {name: model.restore(a) for name, a in out.items()}

    self._score = _InParts(score, mesh, rows, 1)

  def __call__(self, params, batch, with_values=False):
    """Returns {name: float32 [N, T]}: `logprobs`, `entropies`, `values`.  batch: all rows, on every host."""
    inputs = {name: batch[name] for name in ('tokens', 'targets', 'segment_ids', 'positions')}
    return self._score(params, inputs, with_values)


def sample(generator, prompts, group, spec, key, stop_ids):
  """Returns (answers, logprobs): lists of arrays, `group` for each prompt, with the sampler's log-probabilities.

  prompts: int arrays.  spec: RlSpec.  An answer that ends has its stop token as its last one.
  """
  repeated = [prompt for prompt in prompts for _ in range(group)]
  sampling = SamplingSpec(temperature=spec.temperature, top_p=spec.top_p, top_k=spec.top_k)
  made = generator.generate(repeated, spec.max_new_tokens, sampling, key, stop_ids, drawn_logprobs=True)
  cut = lambda rows: [row[:n] for row, n in zip(rows, made.lengths, strict=True)]
  return cut(made.tokens), cut(made.logprobs)


def disagreement(sampled, trained, mask):
  """Returns (mean, largest) difference of log-probabilities [N, T] under the mask, relative to those above 1."""
  gaps = (np.abs(sampled - trained) / np.maximum(np.abs(trained), 1.0))[mask != 0]
  return (float(gaps.mean()), float(gaps.max())) if gaps.size else (0.0, 0.0)


@dataclasses.dataclass
class Iteration:
  """What is learnt from until the next rollout.

  batch: dict of arrays with leading axis N, for the step.  records: for each row what a person reads, and what the
  batch can be made from again.  metrics: of the rollout.  kl_coef: of this iteration.
  """

  batch: dict
  records: list
  metrics: dict
  kl_coef: float


def weigh(spec, policy, batch, scores, kl_coef):
  """Adds `advantages`, and with a value head `returns`, to the batch; returns the KL of each row, nats, or None.

  spec: RlSpec.  policy: PolicySpec.  scores: float [N].  batch: old_logprobs, and ref_logprobs and old_values where
  there are any.  The KL in the rewards of a group is taken from the sequence's reward.
  """
  mask, old = batch['loss_mask'], batch['old_logprobs']
  reference = batch.get('ref_logprobs')
  scores = jnp.asarray(scores, jnp.float32)
  kl = None if reference is None else np.sum((old - reference) * mask, axis=1)
  if policy.advantages == 'gae':
    shaped, _ = advantages.shape_rewards(scores, old, old if reference is None else reference, mask, kl_coef,
                                         spec.kl_estimator)
    if policy.whiten_rewards:
      shaped = advantages.whiten(shaped, mask, shift_mean=False)
    found, returns = advantages.gae(shaped, batch['old_values'], mask, policy.gamma, policy.gae_lambda)
    if policy.whiten_advantages:
      found = advantages.whiten(found, mask)
    batch['returns'] = np.asarray(returns)
  else:
    if kl_coef:
      _, per_token = advantages.shape_rewards(scores, old, reference, mask, kl_coef, spec.kl_estimator)
      scores = scores - kl_coef * jnp.sum(per_token, axis=1)
    rows = advantages.group_advantages(scores, spec.num_generations,
                                       'others' if policy.advantages == 'others' else 'mean',
                                       policy.advantage_normalization)
    found = rows[:, None] * mask
  batch['advantages'] = np.asarray(found)
  return kl


def judge(spec, answers, score=None):
  """Returns (parts {name: list}, raw rewards [N], rewards [N] with the overlong penalty), float64."""
  parts = rewards.judge(spec, answers, score)
  raw = np.asarray(rewards.total(spec, answers, parts))
  overlong = np.zeros(len(answers))
  if spec.overlong_tokens:
    overlong = np.asarray(advantages.overlong_penalty([a.tokens for a in answers], spec.max_new_tokens,
                                                      spec.overlong_tokens), np.float64)
  return parts, raw, raw + overlong
