"""Token log-probabilities and values of a model, and the loss functions of post-training.

Letters: B sequences, P pairs, T tokens, D width.  Each loss_fn(params, frozen, batch, key) -> (sum, (weight, aux)) is
for the train step; batches are dicts of [B, T] arrays, and [B] for one value per sequence.  In batches of pairs
sequences 2 i and 2 i + 1 are the chosen and the rejected completion of one prompt, and loss_mask marks completions.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from llmjax.ops.losses import token_logprobs
from llmjax.parallel.sharding import by_rows
from llmjax.post import policy, preference, reward_model
from llmjax.train.objectives import forward, weighed, with_router_losses


class TokenScores(NamedTuple):
  """logprobs, entropies: float32 [B, T], nats; entropies None unless asked for.  hidden: [B, T, D]."""

  logprobs: jax.Array
  entropies: jax.Array | None
  hidden: jax.Array
  aux: dict


def score_tokens(model, params, batch, key=None, *, temperature=1.0, entropy=False, vocab_size=None,
                 neftune_alpha=0.0):
  """Return the TokenScores of batch['targets'] in an ordered batch.

  temperature: divides the logits before the softmax, as in the sampler that drew the targets.  vocab_size: of the
  tokenizer, where the model's is padded.  No device holds the logits of the whole batch.
  """
  x, aux = forward(model, params, batch, key, neftune_alpha)
  matrix, vocab_axis = model.output_matrix(params)

  def score(matrix, x, targets):
    return token_logprobs(x, matrix, targets, temperature=temperature, entropy=entropy, vocab_size=vocab_size,
                          vocab_axis=vocab_axis, **model.chunking)

  scores = by_rows(score, x, batch['targets'], weights=matrix.astype(model.dtype))
  return TokenScores(*(scores if entropy else (scores, None)), x, aux)


# Preference losses.


def _has_targets(batch):
  """Return which sequences have a target, bool [B]."""
  return jnp.max(batch['loss_mask'], axis=1) > 0


def pair_weights(batch):
  """Return float32 [P]: 1 where both completions of a pair have a target, else 0."""
  has_targets = _has_targets(batch)
  return (has_targets[0::2] & has_targets[1::2]).astype(jnp.float32)


def count_pairs(batch):
  """Return the weight of pairwise losses."""
  return jnp.sum(pair_weights(batch))


def count_completions(batch):
  """Return the weight of unpaired losses."""
  return jnp.sum(_has_targets(batch).astype(jnp.float32))


def make_pair_loss(spec, model, vocab_size=None, neftune_alpha=0.0):
  """Make the loss_fn of a PreferenceSpec on pairs; its weight is the number of pairs with two completions.

  batch: `ref_logprobs`, float32 [B], has the reference model's sums over completions (`make_sequence_logprobs`), unless
  the loss needs no reference; `probability` [B] may have soft labels.
  """
  @weighed(count_pairs)
  def loss_fn(params, frozen, batch, key):
    batch = model.order(batch)
    scores = score_tokens(model, params, batch, key, vocab_size=vocab_size, neftune_alpha=neftune_alpha)
    sums, lengths = preference.sum_logprobs(scores.logprobs, completion_weights(spec, batch))
    reference = batch.get('ref_logprobs', jnp.zeros_like(sums))
    halves = lambda a: (a[0::2], a[1::2])
    pairs = preference.Pairs(*halves(sums), *halves(reference), *halves(lengths))
    weights = (jnp.minimum(*halves(lengths)) > 0).astype(jnp.float32)
    loss, weight, aux = preference.pair_loss(spec, pairs, weights, _pair_field(batch, 'probability'))
    aux |= _completion_logprobs(scores.logprobs, batch, jnp.repeat(weights, 2), weight)
    loss, model_aux = with_router_losses(loss, weight, scores.aux, batch)
    return loss, (weight, {**aux, **model_aux})

  return loss_fn


def _pair_field(batch, name):
  """Return a field of the pairs of a batch, float32 [P], or None."""
  return batch[name][0::2] if name in batch else None


def _completion_logprobs(logprobs, batch, is_real, weight):
  """Return `chosen_logprob` and `rejected_logprob`: means of the completions' log-probabilities, times `weight`.

  They do not depend on the loss: every token counts once.  is_real: float [B], 0 for padding.  weight: the divisor of
  the train step.
  """
  sums, _ = preference.sum_logprobs(jax.lax.stop_gradient(logprobs), batch['loss_mask'] != 0)
  mean = lambda half: jnp.sum(is_real[half::2] * sums[half::2]) / jnp.maximum(jnp.sum(is_real[half::2]), 1.0)
  return {'chosen_logprob': weight * mean(0), 'rejected_logprob': weight * mean(1)}


# Batch field of KTO: the reference model's sums over the completions of `mismatch_completions`.
MISMATCHED = 'ref_logprobs_mismatched'


def make_unpaired_loss(spec, model, vocab_size=None, neftune_alpha=0.0):
  """Make the loss_fn of a PreferenceSpec on single completions; its weight is their number.

  batch: `label`, float32 [B], is 1 for desirable completions, which the chosen ones of pairs are, and 0 for others;
  `ref_logprobs` as for `make_pair_loss`; for loss kto MISMATCHED.
  """
  def score(params, batch, key):
    batch = model.order(batch)
    scores = score_tokens(model, params, batch, key, vocab_size=vocab_size, neftune_alpha=neftune_alpha)
    return batch, scores, *preference.sum_logprobs(scores.logprobs, completion_weights(spec, batch))

  @weighed(count_completions)
  def loss_fn(params, frozen, batch, key):
    ordered, scores, logprobs, lengths = score(params, batch, key)
    weights, kl = (lengths > 0).astype(jnp.float32), 0.0
    if spec.loss == 'kto':
      *_, mismatched, counts = score(jax.lax.stop_gradient(params), mismatch_completions(batch), None)
      kl = preference.mismatched_kl(mismatched, batch[MISMATCHED], (counts > 0).astype(jnp.float32))
    desirable = batch['label'] > 0.5
    loss, weight, aux = preference.unpaired_loss(spec, logprobs, batch['ref_logprobs'], desirable, kl, weights)
    aux |= _completion_logprobs(scores.logprobs, ordered, weights, weight)
    loss, model_aux = with_router_losses(loss, weight, scores.aux, batch)
    return loss, (weight, {**aux, **model_aux})

  return loss_fn


def mismatch_completions(batch):
  """Return the batch with the completion of each sequence replaced by that of the sequence two further on.

  So every prompt is followed by the completion of another prompt (KTO, arXiv:2402.01306, section 4.1).  Completions are
  truncated to the length of the sequence; padding stays padding.  Raises ValueError for a batch of a single pair.
  """
  num_sequences, length = jnp.shape(batch['tokens'])
  if num_sequences <= 2:
    raise ValueError('loss kto needs completions of other prompts: two pairs or more in a batch')
  index = jnp.arange(length)
  # Targets from here on are the completion's; the input at this index is the prompt's last token.
  first = jnp.argmax(batch['loss_mask'] != 0, axis=1)[:, None]
  ends = jnp.max(jnp.where(batch['segment_ids'] != 0, index + 1, 0), axis=1)[:, None]
  other = lambda a: jnp.roll(a, -2, axis=0)
  source = index - first + other(first)  # Index of the token in the other sequence.
  is_completion = (index >= first) & jnp.any(batch['loss_mask'] != 0, axis=1)[:, None]
  is_inside = (source >= 0) & (source < jnp.minimum(other(ends), length))
  take = lambda a: jnp.take_along_axis(other(a), jnp.clip(source, 0, length - 1), axis=1)
  is_real = jnp.where(is_completion, is_inside, True)
  tokens = jnp.where(index > first, take(batch['tokens']), batch['tokens'])
  targets = jnp.where(is_completion, take(batch['targets']), batch['targets'])
  return {**batch, 'tokens': jnp.where(is_real, tokens, 0), 'targets': jnp.where(is_real, targets, 0),
          'loss_mask': jnp.where(is_completion & is_inside, take(batch['loss_mask']), 0.0),
          'segment_ids': jnp.where(is_real, 1, 0).astype(batch['segment_ids'].dtype),
          'positions': jnp.where(is_real, index, 0).astype(batch['positions'].dtype)}


def completion_weights(spec, batch):
  """Return the weights [B, T] of the completions' log-probabilities in a PreferenceSpec's loss."""
  mask = (batch['loss_mask'] != 0).astype(jnp.float32)
  if spec.ld_alpha == 1.0:
    return mask
  # On a mesh tokens need not be in order: the index in the completion follows from the positions.
  first = jnp.min(jnp.where(mask != 0, batch['positions'], jnp.iinfo(jnp.int32).max), axis=1, keepdims=True)
  other = mask.reshape(-1, 2, mask.shape[1])[:, ::-1].reshape(mask.shape)
  return preference.length_weights(mask, other, spec.ld_alpha, batch['positions'] - first + 1)


def make_sequence_logprobs(spec, model, vocab_size=None):
  """Make the function (params, batch) -> float32 [B] that computes the `ref_logprobs` of a batch."""
  def sequence_logprobs(params, batch):
    batch = model.order(batch)
    scores = score_tokens(model, params, batch, vocab_size=vocab_size)
    return preference.sum_logprobs(scores.logprobs, completion_weights(spec, batch))[0]

  return sequence_logprobs


# Reward models.


def loss_of(scorer):
  """Return the loss_fn of a function made by `make_pair_scorer` or `make_step_scorer`."""
  @functools.wraps(scorer)
  def loss_fn(params, frozen, batch, key):
    return scorer(params, batch, key)[0]

  return loss_fn


def make_pair_scorer(model, *, center_rewards_coef=0.0, neftune_alpha=0.0):
  """Make the function (params, batch, key) -> (loss_fn output, {name: float32 [P]}) of an outcome reward model.

  model: with a value head.  batch: pairs; `margin` [B] may have target margins, `probability` [B] soft labels.  The
  dict has for each pair `weight` (0 for padding), `margin` between its scores, and `score`, their mean.
  """
  @weighed(count_pairs, with_last_target)
  def score_pairs(params, batch, key):
    whole = with_last_target(batch)
    scores, model_aux = score_sequences(model, params, whole, key, neftune_alpha)
    chosen, rejected, weights = scores[0::2], scores[1::2], pair_weights(batch)
    loss, weight, aux = reward_model.bradley_terry(
        chosen, rejected, _pair_field(batch, 'margin'), center_rewards_coef, weights,
        _pair_field(batch, 'probability'))
    pairs = {'weight': weights, 'margin': chosen - rejected, 'score': (chosen + rejected) / 2}
    loss, model_aux = with_router_losses(loss, weight, model_aux, whole)
    return (loss, (weight, {**aux, **model_aux})), pairs

  return score_pairs


def count_steps(batch):
  """Return the weight of the loss of process reward models."""
  return jnp.sum((batch['loss_mask'] != 0).astype(jnp.float32))


def make_step_scorer(model, neftune_alpha=0.0):
  """Make the same function for a process reward model, with values [B, T] of the steps.

  batch: at the target after the last token of a step loss_mask is 1 and step_labels the label (see `data.stepwise`);
  the value head is read there.  The dict has `weight` (1 at those targets), `score`, `margin` (the score, negated for
  an incorrect step), `good` (label above 1/2), and `place`, the index of the step in its document, from 1.
  """
  @weighed(count_steps)
  def score_steps(params, batch, key):
    x, model_aux = forward(model, params, model.order(batch), key, neftune_alpha)
    values = model.restore(model.values(params, x))
    weights = (batch['loss_mask'] != 0).astype(jnp.float32)
    labels = batch['step_labels']
    loss, weight, aux = reward_model.process_loss(values, labels, weights)
    is_good = labels > 0.5
    count = jnp.cumsum(weights, axis=1)
    count_before = jax.lax.cummax(jnp.where(batch['positions'] == 0, count - weights, 0.0), axis=1)
    steps = {'weight': weights, 'margin': jnp.where(is_good, values, -values), 'score': values, 'good': is_good,
             'place': count - count_before}
    loss, model_aux = with_router_losses(loss, weight, model_aux, batch)
    return (loss, (weight, {**aux, **model_aux})), steps

  return score_steps


def with_last_target(batch):
  """Append the last target to the inputs of each sequence, so that a reward model reads the whole completion.

  One document per sequence; a sequence without room for one more token is unchanged.
  """
  shift = lambda a: jnp.pad(a, ((0, 0), (1, 0)))[:, :-1]
  is_end = (batch['segment_ids'] == 0) & (shift(batch['segment_ids']) != 0)
  put = lambda name, new: jnp.where(is_end, new.astype(batch[name].dtype), batch[name])
  return {**batch, 'tokens': put('tokens', shift(batch['targets'])),
          'segment_ids': put('segment_ids', shift(batch['segment_ids'])),
          'positions': put('positions', shift(batch['positions']) + 1)}


def score_sequences(model, params, batch, key=None, neftune_alpha=0.0):
  """Return (scores float32 [B], aux of the model): the value head's output at each sequence's last token.

  The last token is the input with the highest position; it need not be the last of the array.
  """
  batch = model.order(batch)
  x, aux = forward(model, params, batch, key, neftune_alpha)
  values = model.values(params, x)
  is_real = batch['segment_ids'] != 0
  last = jnp.max(jnp.where(is_real, batch['positions'], -1), axis=1, keepdims=True)
  return jnp.sum(jnp.where(is_real & (batch['positions'] == last), values, 0.0), axis=1), aux


# Policy-gradient losses.


def make_policy_loss(spec, model, *, temperature=1.0, vocab_size=None, value_coef=0.0,
                     value_clip=0.2, max_length=None, entropy=False):
  """Make the loss_fn of a PolicySpec, with the value loss where value_coef is positive.

  batch: loss_mask marks the sampled tokens; `old_logprobs` (of the policy that sampled them) and `advantages`, [B, T];
  `ref_logprobs` [B, T] for the KL; `old_values` and `returns` [B, T] for the value loss.  entropy: report the entropy
  also where it is not part of the loss.
  """
  entropy = entropy or spec.entropy_coef > 0
  token_weights = lambda batch: policy.token_weights(
      spec.loss_aggregation, (batch['loss_mask'] != 0).astype(jnp.float32), max_length)

  @weighed(lambda batch: token_weights(batch)[1])
  def loss_fn(params, frozen, batch, key):
    batch = model.order(batch)
    scores = score_tokens(model, params, batch, key, temperature=temperature, entropy=entropy,
                          vocab_size=vocab_size)
    loss, weight, aux = policy.policy_loss(
        spec, scores.logprobs, batch['old_logprobs'], batch['advantages'], batch['loss_mask'],
        ref_logprobs=batch.get('ref_logprobs'), entropies=scores.entropies, max_length=max_length)
    if value_coef:
      values = model.values(params, scores.hidden)
      # The weights of the policy loss, so that both losses are divided by the same weight.
      value, _, value_aux = policy.value_loss(values, batch['old_values'], batch['returns'], token_weights(batch)[0],
                                              value_clip)
      loss = loss + value_coef * value
      aux = {**aux, **value_aux, 'value_loss': jax.lax.stop_gradient(value)}
    loss, model_aux = with_router_losses(loss, weight, scores.aux, batch)
    return loss, (weight, {**aux, **model_aux})

  return loss_fn
