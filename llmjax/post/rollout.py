"""Rollouts: sampling completions, scoring their tokens, and the batches that the policy is trained on.

Letters: N sequences of an iteration, the completions of a prompt adjacent; T tokens of a sequence.

The sampler pads prompts on the left, the trainer pads sequences on the right; no token attends to padding.  Both divide
the logits by the same temperature, and every iteration checks that their log-probabilities agree.  The sampler uses the
trained parameters on the same devices with the same sharding.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from llmjax.data import stepwise
from llmjax.generate.spec import SamplingSpec
from llmjax.parallel import in_flight
from llmjax.parallel.mesh import batch_blocks, batch_shards, place_batch
from llmjax.post import advantages, objective, reward_model
from llmjax.post.rewards import Completion
from llmjax.train.objectives import forward


def make_batch(prompts, completions, seq_len):
  """Return the batch [N, T] of prompts with their completions; loss_mask is 1 where the target is a completion token.

  prompts, completions: int arrays, one of each per sequence, together at most seq_len + 1 tokens.
  """
  shape = len(prompts), seq_len
  batch = {name: np.zeros(shape, np.int32) for name in ('tokens', 'targets', 'segment_ids', 'positions')}
  batch['loss_mask'] = np.zeros(shape, np.float32)
  for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
    ids = np.concatenate([prompt, completion])
    size = len(ids) - 1
    batch['tokens'][i, :size], batch['targets'][i, :size] = ids[:-1], ids[1:]
    batch['segment_ids'][i, :size], batch['positions'][i, :size] = 1, np.arange(size)
    batch['loss_mask'][i, len(prompt) - 1:size] = 1
  return batch


def align_to_targets(values, prompts, seq_len):
  """Place per-token values of completions where `make_batch` has the tokens as targets; returns float32 [N, T]."""
  aligned = np.zeros((len(prompts), seq_len), np.float32)
  for row, prompt, row_values in zip(aligned, prompts, values, strict=True):
    row[len(prompt) - 1:len(prompt) - 1 + len(row_values)] = row_values
  return aligned


def local_rows(mesh, rows):
  """Return the rows of a global batch (an int array) that this process's devices hold."""
  shards = batch_shards(mesh)
  return np.concatenate([rows[b * len(rows) // shards:(b + 1) * len(rows) // shards] for b in batch_blocks(mesh)])


def decode_completion(tokenizer, prompt, tokens, stop_ids):
  """Return the rewards.Completion of sampled tokens.  prompt: an example of prompts data."""
  ended = bool(len(tokens)) and int(tokens[-1]) in stop_ids
  return Completion(
      tokenizer.decode(prompt['ids']), tokenizer.decode(tokens[:-1] if ended else tokens), prompt['answer'],
      len(tokens), ended, (*map(int, prompt['ids']), *map(int, tokens)), prompt.get('columns', {}))


class _Microbatched:
  """A jitted function of parameters and a batch, applied to a fixed number of sequences at a time."""

  def __init__(self, function, mesh, rows, num_static):
    """function(params, batch, *static) -> {name: array with leading axis rows}.  rows: at a time, over all devices."""
    self._mesh, self._rows = mesh, rows
    replicated = jax.NamedSharding(mesh, jax.P())
    self._function = jax.jit(function, static_argnums=tuple(range(2, 2 + num_static)), out_shardings=replicated)

  def __call__(self, params, batch, *static):
    count = len(batch['tokens'])
    size = self._rows // batch_shards(self._mesh)
    local = np.concatenate([np.arange(b * size, (b + 1) * size) for b in batch_blocks(self._mesh)])

    def run(start):
      rows = np.minimum(start + local, count - 1)  # The last microbatch repeats the last row; the copies are cut off.
      placed = place_batch(self._mesh, {name: a[rows] for name, a in batch.items()})
      with jax.set_mesh(self._mesh):
        return self._function(params, placed, *static)

    outputs = list(in_flight.results(run(start) for start in range(0, count, self._rows)))
    return {name: np.concatenate([output[name] for output in outputs])[:count] for name in outputs[0]}


class RewardModelScorer:
  """Scores of a reward model, read at the last token (outcome) or at the end of every step (process)."""

  def __init__(self, model, mesh, *, rows, length, reduction=''):
    """rows: sequences at a time.  length: maximum number of tokens.  reduction: of `reward_model.process_score`."""
    unit = 2 * mesh.shape['context'] * mesh.shape['tensor']
    self._length = -(-length // unit) * unit

    def score(params, batch):
      batch = model.order(batch)
      values, mask = model.values(params, forward(model, params, batch)[0]), batch['loss_mask']
      if reduction:
        return {'scores': reward_model.process_score(values, mask, reduction)}
      return {'scores': reward_model.score_at_end(values, mask)}

    self._score = _Microbatched(score, mesh, rows, 0)

  def __call__(self, params, sequences, read_at=None):
    """Return float32 [N].  sequences: token ids of each.  read_at: indices per sequence; None: the last token."""
    shape = len(sequences), self._length
    batch = {name: np.zeros(shape, np.int32) for name in ('tokens', 'segment_ids', 'positions')}
    batch['loss_mask'] = np.zeros(shape, np.float32)
    for i, ids in enumerate(sequences):
      batch['tokens'][i, :len(ids)], batch['segment_ids'][i, :len(ids)] = ids, 1
      batch['positions'][i, :len(ids)] = np.arange(len(ids))
      batch['loss_mask'][i, [len(ids) - 1] if read_at is None else read_at[i]] = 1
    return self._score(params, batch)['scores']


def find_step_ends(tokenizer, completion):
  """Return the indices in a Completion's ids of the last token of each step."""
  first = len(completion.ids) - completion.num_tokens
  ids = completion.ids[first:len(completion.ids) - completion.ended]
  return [first + end - 1 for end in stepwise.find_ends(tokenizer, ids)]


class TokenScorer:
  """Log-probabilities, entropies and values of an iteration's tokens, computed as in training."""

  def __init__(self, model, mesh, *, rows, temperature=1.0, vocab_size=None):
    """rows: sequences at a time, over all devices."""

    def score(params, batch, with_values):
      batch = model.order(batch)
      scores = objective.score_tokens(model, params, batch, temperature=temperature, entropy=True,
                                      vocab_size=vocab_size)
      arrays = {'logprobs': scores.logprobs, 'entropies': scores.entropies}
      if with_values:
        arrays['values'] = model.values(params, scores.hidden)
      return {name: model.restore(a) for name, a in arrays.items()}

    self._score = _Microbatched(score, mesh, rows, 1)

  def __call__(self, params, batch, with_values=False):
    """Return {name: float32 [N, T]}: `logprobs`, `entropies`, `values`.  batch: the global batch, on every process."""
    inputs = {name: batch[name] for name in ('tokens', 'targets', 'segment_ids', 'positions')}
    return self._score(params, inputs, with_values)


def sample(generator, prompts, num_generations, spec, key, stop_ids):
  """Sample completions; returns (completions, logprobs), lists of arrays, num_generations adjacent ones per prompt.

  prompts: int arrays.  spec: RlSpec.  A completion that ended has its stop token at the end.
  """
  repeated = [prompt for prompt in prompts for _ in range(num_generations)]
  sampling = SamplingSpec(temperature=spec.temperature, top_p=spec.top_p, top_k=spec.top_k)
  samples = generator.generate(repeated, spec.max_new_tokens, sampling, key, stop_ids, drawn_logprobs=True)
  cut = lambda rows: [row[:n] for row, n in zip(rows, samples.lengths, strict=True)]
  return cut(samples.tokens), cut(samples.logprobs)


def logprob_gap(sampled, trained, mask):
  """Return the (mean, maximum) difference of log-probabilities [N, T] under the mask, relative to those above 1."""
  gaps = (np.abs(sampled - trained) / np.maximum(np.abs(trained), 1.0))[mask != 0]
  return (float(gaps.mean()), float(gaps.max())) if gaps.size else (0.0, 0.0)


@dataclasses.dataclass
class Iteration:
  """The training data of one iteration.

  batch: dict of arrays with leading axis N.  records: JSON objects, one per sequence, from which the batch can be
  rebuilt.  metrics: of the rollout.  kl_coef: the KL coefficient of the rewards.
  """

  batch: dict
  records: list
  metrics: dict
  kl_coef: float


def add_advantages(spec, policy, batch, rewards, kl_coef):
  """Add `advantages`, and with a value head `returns`, to the batch; returns the KL per sequence in nats, or None.

  spec: RlSpec.  policy: PolicySpec.  rewards: float [N].  batch: with old_logprobs, and ref_logprobs and old_values
  where they exist.  Without a value head the KL penalty is subtracted from the reward of the sequence.
  """
  mask, old = batch['loss_mask'], batch['old_logprobs']
  reference = batch.get('ref_logprobs')
  rewards = jnp.asarray(rewards, jnp.float32)
  kl = None if reference is None else np.sum((old - reference) * mask, axis=1)
  if policy.advantage_estimator == 'gae':
    shaped, _ = advantages.shape_rewards(rewards, old, old if reference is None else reference, mask, kl_coef,
                                         spec.kl_estimator)
    if policy.whiten_rewards:
      shaped = advantages.whiten(shaped, mask, shift_mean=False)
    estimates, returns = advantages.gae(shaped, batch['old_values'], mask, policy.gamma, policy.gae_lambda)
    if policy.whiten_advantages:
      estimates = advantages.whiten(estimates, mask)
    batch['returns'] = np.asarray(returns)
  else:
    if kl_coef:
      _, penalty = advantages.shape_rewards(rewards, old, reference, mask, kl_coef, spec.kl_estimator)
      rewards = rewards - kl_coef * jnp.sum(penalty, axis=1)
    estimates = mask * advantages.group_advantages(rewards, spec.num_generations, policy.advantage_estimator,
                                                   policy.advantage_normalization)[:, None]
  batch['advantages'] = np.asarray(estimates)
  return kl
