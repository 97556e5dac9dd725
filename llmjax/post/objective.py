"""From a model and a batch to token log-probabilities and values, and the loss_fn of each kind of training.

Letters: B rows, T tokens, D width.  Each loss_fn(params, frozen, batch, key) -> (sum, (weight, aux)) is for the one
train step; batches are dicts of [B, T] arrays, and [B] where a row has one of something.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from llmjax.ops.losses import token_logprobs
from llmjax.parallel.sharding import by_rows, sum_over_rows
from llmjax.post import distillation, policy, preference, reward_model
from llmjax.train.objectives import count_targets, forward, weighed, with_router_losses


class TokenScores(NamedTuple):
  """logprobs, entropies: float32 [B, T], nats; entropies None where not asked for.  hidden: [B, T, D]."""

  logprobs: jax.Array
  entropies: jax.Array | None
  hidden: jax.Array
  aux: dict


def score_tokens(model, params, batch, key=None, *, temperature=1.0, entropy=False, vocab_size=None,
                 neftune_alpha=0.0):
  """Returns the TokenScores of batch['targets'] in an ordered batch.

  model: a Model.  temperature: divides the logits before the softmax, as in the sampler that
  drew the targets.  vocab_size: the tokenizer's, where the model's is rounded up.  No device holds the logits of all.
  """
  x, aux = forward(model, params, batch, key, neftune_alpha)
  matrix, vocab_axis = model.output_matrix(params)

  def score(matrix, x, targets):
    return token_logprobs(x, matrix, targets, temperature=temperature, entropy=entropy, vocab_size=vocab_size,
                          vocab_axis=vocab_axis, **model.chunking)

  found = by_rows(score, x, batch['targets'], weights=matrix.astype(model.dtype))
  return TokenScores(*(found if entropy else (found, None)), x, aux)


def _marked(batch):
  """Returns which rows have a marked token, bool [B]."""
  return jnp.max(batch['loss_mask'], axis=1) > 0


def pair_weights(batch):
  """Returns float32 [P]: 1 for every pair both of whose answers have a marked token, else 0."""
  marked = _marked(batch)
  return (marked[0::2] & marked[1::2]).astype(jnp.float32)


def count_pairs(batch):
  """Returns the weight of the losses of pairs."""
  return jnp.sum(pair_weights(batch))


def count_answers(batch):
  """Returns the weight of the losses of single answers."""
  return jnp.sum(_marked(batch).astype(jnp.float32))


def count_labels(batch):
  """Returns the weight of the loss of steps."""
  return jnp.sum((batch['loss_mask'] != 0).astype(jnp.float32))


def make_pair_loss(spec, model, vocab_size=None, neftune_alpha=0.0):
  """Returns the loss_fn of a PreferenceSpec's pairs.

  batch: rows 2 i and 2 i + 1 are the better and the worse answer to one prompt, loss_mask marks the answers, and
  `ref_logprobs`, float32 [B], has the reference's sums over them (as `sequence_logprobs` makes) unless the loss
  needs none.  The weight is the number of pairs; a pair without a marked token counts nowhere.
  """
  @weighed(count_pairs)
  def loss_fn(params, frozen, batch, key):
    batch = model.order(batch)
    scores = score_tokens(model, params, batch, key, vocab_size=vocab_size, neftune_alpha=neftune_alpha)
    sums, lengths = preference.sum_logprobs(scores.logprobs, answer_weights(spec, batch))
    reference = batch.get('ref_logprobs', jnp.zeros_like(sums))
    halves = lambda a: (a[0::2], a[1::2])
    pairs = preference.Pairs(*halves(sums), *halves(reference), *halves(lengths))
    weights = (jnp.minimum(*halves(lengths)) > 0).astype(jnp.float32)
    loss, weight, aux = preference.pair_loss(spec, pairs, weights, _of_pairs(batch, 'probability'))
    aux |= _logged_logprobs(scores.logprobs, batch, jnp.repeat(weights, 2), weight)
    loss, model_aux = with_router_losses(loss, weight, scores.aux, batch)
    return loss, (weight, {**aux, **model_aux})

  return loss_fn


def _logged_logprobs(logprobs, batch, real, weight):
  """Returns `chosen_logprob` and `rejected_logprob`: means of whole completions' sums, in nats, times `weight`.

  The same for every loss: each token counts once, whatever weight the loss gives it.  real: float [B], 0 for what
  counts nowhere.  weight: by which a step divides.
  """
  sums, _ = preference.sum_logprobs(jax.lax.stop_gradient(logprobs), batch['loss_mask'] != 0)
  mean = lambda half: jnp.sum(real[half::2] * sums[half::2]) / jnp.maximum(jnp.sum(real[half::2]), 1.0)
  return {'chosen_logprob': weight * mean(0), 'rejected_logprob': weight * mean(1)}


# The reference's sums over the answers of `mismatch`, a field of KTO's batches.
MISMATCHED = 'ref_logprobs_mismatched'


def make_unpaired_loss(spec, model, vocab_size=None, neftune_alpha=0.0):
  """Returns the loss_fn of a PreferenceSpec that takes single answers; batches as of `make_pair_loss`.

  batch['label'], float32 [B], is 1 for desirable completions, also the chosen ones of pairs, and 0 for others.
  For loss kto batches also have `MISMATCHED`, the reference's sums over `mismatch(batch)`.  The weight is the number of
  answers.
  """
  def sums(params, batch, key):
    batch = model.order(batch)
    scores = score_tokens(model, params, batch, key, vocab_size=vocab_size, neftune_alpha=neftune_alpha)
    found = preference.sum_logprobs(scores.logprobs, answer_weights(spec, batch))
    real = (found[1] > 0).astype(jnp.float32)  # Of unpaired completions one half may be nothing.
    return *found, scores.aux, _logged_logprobs(scores.logprobs, batch, real, jnp.sum(real))

  @weighed(count_answers)
  def loss_fn(params, frozen, batch, key):
    logprobs, lengths, model_aux, logged = sums(params, batch, key)
    good = batch['label'] > 0.5
    weights, kl = (lengths > 0).astype(jnp.float32), 0.0
    if spec.loss == 'kto':
      other, count, *_ = sums(jax.lax.stop_gradient(params), mismatch(batch), None)
      kl = preference.mismatched_kl(other, batch[MISMATCHED], (count > 0).astype(jnp.float32))
    loss, weight, aux = preference.unpaired_loss(spec, logprobs, batch['ref_logprobs'], good, kl, weights)
    loss, model_aux = with_router_losses(loss, weight, model_aux, batch)
    return loss, (weight, {**aux, **model_aux, **logged})

  return loss_fn


def mismatch(batch):
  """Returns the batch with each row's prompt before the answer of the row two further on: to another prompt.

  What a row cannot hold is cut off; padding stays padding.  Source: KTO, arXiv:2402.01306, section 4.1.  Raises
  ValueError where the batch holds a single pair, for then there is no other prompt.
  """
  rows, length = jnp.shape(batch['tokens'])
  if rows <= 2:
    raise ValueError('loss kto needs completions of other prompts: two pairs or more in a batch')
  place = jnp.arange(length)
  # A target belongs to the answer from here on; the input before it is the last one of the prompt.
  first = jnp.argmax(batch['loss_mask'] != 0, axis=1)[:, None]
  ends = jnp.max(jnp.where(batch['segment_ids'] != 0, place + 1, 0), axis=1)[:, None]
  other = lambda a: jnp.roll(a, -2, axis=0)
  source = place - first + other(first)  # Where an answer's place lies in the other row.
  answers = (place >= first) & jnp.any(batch['loss_mask'] != 0, axis=1)[:, None]
  inside = (source >= 0) & (source < jnp.minimum(other(ends), length))
  take = lambda a: jnp.take_along_axis(other(a), jnp.clip(source, 0, length - 1), axis=1)
  real = jnp.where(answers, inside, True)
  # The input at `first` is still the prompt's last token.
  tokens = jnp.where(place > first, take(batch['tokens']), batch['tokens'])
  return {**batch, 'tokens': jnp.where(real, tokens, 0),
          'targets': jnp.where(real, jnp.where(answers, take(batch['targets']), batch['targets']), 0),
          'loss_mask': jnp.where(answers & inside, take(batch['loss_mask']), 0.0),
          'segment_ids': jnp.where(real, 1, 0).astype(batch['segment_ids'].dtype),
          'positions': jnp.where(real, place, 0).astype(batch['positions'].dtype)}


def _of_pairs(batch, name):
  """Returns what a batch says of its pairs, float32 [P], or None."""
  return batch[name][0::2] if name in batch else None


def answer_weights(spec, batch):
  """Returns the weights [B, T] with which a PreferenceSpec adds up the log-probabilities of answers."""
  mask = (batch['loss_mask'] != 0).astype(jnp.float32)
  if spec.length_weight == 1.0:
    return mask
  # Tokens need not lie in order on a mesh: their positions say which is which.
  first = jnp.min(jnp.where(mask != 0, batch['positions'], jnp.iinfo(jnp.int32).max), axis=1, keepdims=True)
  other = mask.reshape(-1, 2, mask.shape[1])[:, ::-1].reshape(mask.shape)
  return preference.length_weights(mask, other, spec.length_weight, batch['positions'] - first + 1)


def make_sequence_logprobs(spec, model, vocab_size=None, neftune_alpha=0.0):
  """Returns the function (params, batch) -> float32 [B] that makes `ref_logprobs` of a batch, without gradient."""
  def sequence_logprobs(params, batch):
    batch = model.order(batch)
    scores = score_tokens(model, params, batch, vocab_size=vocab_size)
    return preference.sum_logprobs(scores.logprobs, answer_weights(spec, batch))[0]

  return sequence_logprobs


def make_reward_loss(model, *, center_rewards_coef=0.0, neftune_alpha=0.0):
  """Returns the loss_fn of a reward model (a model with value_head) on pairs of rows, as `make_pair_loss` has them.

  batch['margin'], float32 [B], may say how far a pair's scores are to be apart; its first row's counts.
  """
  judge = make_reward_judge(model, center_rewards_coef=center_rewards_coef, neftune_alpha=neftune_alpha)
  return as_loss(judge)


def as_loss(judge):
  """Returns the loss_fn of what `make_reward_judge` or `make_step_judge` returns."""
  @functools.wraps(judge)
  def loss_fn(params, frozen, batch, key):
    return judge(params, batch, key)[0]

  return loss_fn


def make_reward_judge(model, *, center_rewards_coef=0.0, neftune_alpha=0.0):
  """Returns the function (params, batch, key) -> (what the loss_fn returns, {name: float32 [P]} of every pair).

  weight: 0 for a pair of padding.  margin: of its scores.  score: their mean.  Else as `make_reward_loss`.
  """
  @weighed(count_pairs, with_last_target)
  def judge(params, batch, key):
    whole = with_last_target(batch)
    scores, model_aux = score_ends(model, params, whole, key, neftune_alpha)
    weights = pair_weights(batch)
    loss, weight, aux = reward_model.bradley_terry(scores[0::2], scores[1::2], _of_pairs(batch, 'margin'),
                                               center_rewards_coef,
                                                   weights, _of_pairs(batch, 'probability'))
    each = {'weight': weights, 'margin': scores[0::2] - scores[1::2], 'score': (scores[0::2] + scores[1::2]) / 2}
    loss, model_aux = with_router_losses(loss, weight, model_aux, whole)
    return (loss, (weight, {**aux, **model_aux})), each

  return judge


def make_step_judge(model, neftune_alpha=0.0):
  """Returns the same function of a model that judges steps; what it says of each target is [B, T].

  batch: at the target behind a step's last token loss_mask is 1 and step_labels the label (`data.stepwise`); the value
  head is read there.  weight: 1 at those targets.  margin: the score, with its sign changed where the step is bad.
  good: whether the label is above a half.  place: which step of its document that is, from 1.
  """
  @weighed(count_labels)
  def judge(params, batch, key):
    x, model_aux = forward(model, params, model.order(batch), key, neftune_alpha)
    values = model.restore(model.values(params, x))
    weights = (batch['loss_mask'] != 0).astype(jnp.float32)
    labels = batch['step_labels']
    loss, weight, aux = reward_model.process_loss(values, labels, weights)
    good = labels > 0.5
    count = jnp.cumsum(weights, axis=1)
    before = jax.lax.cummax(jnp.where(batch['positions'] == 0, count - weights, 0.0), axis=1)
    each = {'weight': weights, 'margin': jnp.where(good, values, -values), 'score': values, 'good': good,
            'place': count - before}
    loss, model_aux = with_router_losses(loss, weight, model_aux, batch)
    return (loss, (weight, {**aux, **model_aux})), each

  return judge


def with_last_target(batch):
  """Returns a batch of one document a row whose inputs end with the last target: a reward model reads the end, too.

  A row without room for one more token keeps what it has.
  """
  before = lambda a: jnp.pad(a, ((0, 0), (1, 0)))[:, :-1]
  end = (batch['segment_ids'] == 0) & (before(batch['segment_ids']) != 0)
  put = lambda name, new: jnp.where(end, new.astype(batch[name].dtype), batch[name])
  return {**batch, 'tokens': put('tokens', before(batch['targets'])),
          'segment_ids': put('segment_ids', before(batch['segment_ids'])),
          'positions': put('positions', before(batch['positions']) + 1)}


def make_end_scores(model):
  """Returns the function (params, batch) -> float32 [B] of what a reward model says of rows, their last target too."""
  return lambda params, batch: score_ends(model, params, with_last_target(batch))[0]


def score_ends(model, params, batch, key=None, neftune_alpha=0.0):
  """Returns (float32 [B], aux of the model): the value head's number at each row's last token, wherever padding lies.

  The last token is the input of the highest position; it need not be the last of the array.
  """
  batch = model.order(batch)
  x, aux = forward(model, params, batch, key, neftune_alpha)
  values = model.values(params, x)
  real = batch['segment_ids'] != 0
  last = jnp.max(jnp.where(real, batch['positions'], -1), axis=1, keepdims=True)
  return jnp.sum(jnp.where(real & (batch['positions'] == last), values, 0.0), axis=1), aux


def make_policy_loss(spec, model, *, temperature=1.0, vocab_size=None, value_coef=0.0,
                     value_clip=0.2, max_length=None, entropy=False):
  """Returns the loss_fn of a PolicySpec, and of the value head where value_coef is above 0.

  batch: loss_mask marks the sampled tokens; `old_logprobs` and `advantages`, [B, T], are of the policy that drew
  them; `ref_logprobs` [B, T] is there when the KL is wanted, `old_values` and `returns` [B, T] for the value head.
  entropy: report the policy's entropy also where it is no part of the loss.
  """
  entropy = entropy or spec.entropy_coef > 0

  def weigh(batch):
    return policy.token_weights(spec.loss_aggregation, (batch['loss_mask'] != 0).astype(jnp.float32), max_length)[1]

  @weighed(weigh)
  def loss_fn(params, frozen, batch, key):
    batch = model.order(batch)
    scores = score_tokens(model, params, batch, key, temperature=temperature, entropy=entropy,
                          vocab_size=vocab_size)
    mask = batch['loss_mask']
    loss, weight, aux = policy.policy_loss(
        spec, scores.logprobs, batch['old_logprobs'], batch['advantages'], mask,
        ref_logprobs=batch.get('ref_logprobs'), entropies=scores.entropies, max_length=max_length)
    if value_coef:
      values = model.values(params, scores.hidden)
      # Weighed as the policy's tokens are, so that both are divided by the same weight.
      weights, _ = policy.token_weights(spec.loss_aggregation, (mask != 0).astype(jnp.float32), max_length)
      value, _, value_aux = policy.value_loss(values, batch['old_values'], batch['returns'], weights, value_clip)
      loss = loss + value_coef * value
      aux = {**aux, **value_aux, 'value_loss': jax.lax.stop_gradient(value)}
    loss, model_aux = with_router_losses(loss, weight, scores.aux, batch)
    return loss, (weight, {**aux, **model_aux})

  return loss_fn


# What a batch has of a teacher that is not in memory: log-probabilities float32 and ids int32, [B, T, k].
TEACHER = ('teacher_logprobs', 'teacher_ids')


class Distillation:
  """The loss_fns of a student that imitates a teacher: `train` of a DistillSpec, and `evaluate`.

  The teacher's parameters are frozen['teacher'], or else batches have the fields TEACHER.  loss_mask weighs the
  targets; all sums are over them.
  """

  def __init__(self, spec, student, teacher, neftune_alpha=0.0):
    """student, teacher: Models of one vocabulary.  neftune_alpha: of the student."""
    self.spec, self.student, self.teacher, self._neftune_alpha = spec, student, teacher, neftune_alpha

  @weighed(count_targets)
  def train(self, params, frozen, batch, key):
    """aux: sums `divergence` (nats), `nll` with loss hinton, `hidden_mse` and `hidden_cosine` where they count."""
    batch = self.student.order(batch)
    x, aux = forward(self.student, params, batch, key, self._neftune_alpha)
    taught = self._hidden(frozen, batch)
    sums = self._sums(lambda *logits: distillation.imitation(self.spec, *logits), params, x, frozen, taught, batch)
    mask = batch['loss_mask'].astype(jnp.float32)
    loss, aux = with_router_losses(sums.pop('loss'), jnp.sum(mask), aux, batch)
    if self.spec.compares_hidden:
      mine = self.student.project_hidden(params, x)
      for name, weight in (('hidden_mse', self.spec.hidden_weight), ('hidden_cosine', self.spec.cosine_weight)):
        if weight:
          sums[name], _ = getattr(distillation, name)(mine, taught, mask)
          loss = loss + weight * sums[name]
    return loss, (jnp.sum(mask), {**jax.lax.stop_gradient(sums), **aux})

  def evaluate(self, params, frozen, batch, key=None):
    """The sum is the student's negative log-likelihood, in nats; aux has `teacher_kl`, KL(teacher || student)."""
    def both(student, teacher, targets, mask):
      kl = distillation.top_k_kl(student, *teacher, mask) if isinstance(teacher, tuple) else (
          distillation.forward_kl(student, teacher, mask))
      return {'nll': distillation.negative_log_likelihood(student, targets, mask)[0], 'teacher_kl': kl[0]}

    batch = self.student.order(batch)
    x, _ = forward(self.student, params, batch, key)
    sums = self._sums(both, params, x, frozen, self._hidden(frozen, batch), batch)
    return sums.pop('nll'), (jnp.sum(batch['loss_mask'].astype(jnp.float32)), sums)

  def top_k(self, params, batch):
    """Returns the teacher's TEACHER fields of a batch, by its parameters, in the order of the row."""
    batch = self.teacher.order(batch)
    x, _ = forward(self.teacher, params, batch)
    matrix, vocab_axis = self.teacher.output_matrix(params)
    score = lambda w, x: distillation.top_k(x, w, self.spec.top_k, vocab_axis=vocab_axis, **self.teacher.chunking)
    found = by_rows(score, x, weights=matrix.astype(self.teacher.dtype))
    return dict(zip(TEACHER, map(self.teacher.restore, found), strict=True))

  def _hidden(self, frozen, batch):
    """Returns the teacher's final hidden states of an ordered batch, or None where it is not in memory."""
    if 'teacher' not in (frozen or {}):
      return None
    return jax.lax.stop_gradient(forward(self.teacher, frozen['teacher'], batch)[0])

  def _sums(self, loss, params, x, frozen, taught, batch):
    """Returns loss(student logits, teacher logits or their likeliest, targets, mask), summed over all rows."""
    matrix, axis = self.student.output_matrix(params)
    chunking = {**self.student.chunking, 'soft_cap': (self.student.chunking['soft_cap'],
                                                      self.teacher.chunking['soft_cap'])}
    rows = batch['targets'], batch['loss_mask']
    if taught is None:
      likeliest = lambda logits, values, ids, *rest: loss(logits, (values, ids), *rest)

      def sums(matrix, x, *rows):
        return distillation.in_chunks(likeliest, (x, matrix), None, *rows, vocab_axis=(axis,), **chunking)

      return sum_over_rows(sums, matrix, x, *(batch[name] for name in TEACHER), *rows)
    other, other_axis = self.teacher.output_matrix(jax.lax.stop_gradient(frozen['teacher']))

    def sums(matrices, x, taught, *rows):
      return distillation.in_chunks(loss, (x, matrices[0]), (taught, matrices[1]), *rows, vocab_axis=(axis, other_axis),
                               **chunking)

    return sum_over_rows(sums, (matrix, other), x, taught, *rows)
