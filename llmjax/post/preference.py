"""Losses of preferences: each a row of a table, from the log-probabilities of whole answers.

Letters: P pairs, B rows, T tokens.  c and r: how much likelier the policy makes the better and the worse answer
than the reference does, log pi / pi_ref.  h = beta (c - r).  Losses are sums with the number of pairs as weight;
both are divided once, by the step.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from llmjax.ops.masked import masked_sum

log_sigmoid, sigmoid = jax.nn.log_sigmoid, jax.nn.sigmoid


class Pairs(NamedTuple):
  """Sums of log-probabilities over the answers' tokens, float32 [P], nats; and how many tokens those are.

  shift: a number that bco_pair takes off both rewards (arXiv:2404.04656: their running mean), else 0.
  """

  chosen: jax.Array
  rejected: jax.Array
  ref_chosen: jax.Array
  ref_rejected: jax.Array
  chosen_length: jax.Array
  rejected_length: jax.Array
  shift: jax.Array | float = 0.0


def exchange(pairs):
  """Returns the Pairs with better and worse answers in each other's places."""
  return Pairs(pairs.rejected, pairs.chosen, pairs.ref_rejected, pairs.ref_chosen, pairs.rejected_length,
               pairs.chosen_length, pairs.shift)


def sum_logprobs(logprobs, weights):
  """Returns (sum, number of tokens), float32 [B], of log-probabilities [B, T] where weights [B, T] are not 0."""
  weights = weights.astype(jnp.float32)
  return jnp.sum(jnp.where(weights != 0, weights * logprobs, 0.0), axis=1), jnp.sum(weights != 0, axis=1)


def length_weights(mask, other_mask, weight, place=None):
  """Returns the mask [B, T] with `weight` on the tokens by which a completion is longer than the other one of its pair.

  place: int [B, T], which token of its completion each marked one is, from 1; None: they lie in order.
  Source: LD-DPO, arXiv:2409.06411.
  """
  common = jnp.minimum(jnp.sum(mask != 0, 1), jnp.sum(other_mask != 0, 1))[:, None]
  place = jnp.cumsum(mask != 0, axis=1) if place is None else place
  return jnp.where(place <= common, 1.0, weight) * (mask != 0)


# The table.  Each row: (pairs, spec, c, r) -> losses [P].


def implicit_scores(pairs, spec):
  """Returns (c, r) as the divergence sees them: f'(pi / pi_ref) (f-DPO, arXiv:2309.16240)."""

  def score(logprob, ref):
    ratio = logprob - ref
    if spec.divergence == 'forward_kl':
      return 1.0 - jnp.exp(-ratio)
    if spec.divergence == 'js':
      return math.log(2.0) + log_sigmoid(ratio)
    if spec.divergence == 'alpha' and spec.alpha != 1.0:
      power = spec.alpha - 1.0
      return jnp.expm1(jnp.minimum(power * ratio, 80.0)) / power
    return ratio

  return score(pairs.chosen, pairs.ref_chosen), score(pairs.rejected, pairs.ref_rejected)


def _smoothed(h, epsilon):
  """Returns the binary cross-entropy of labels of which a part epsilon is wrong (cDPO, E. Mitchell, 2023)."""
  return -(1.0 - epsilon) * log_sigmoid(h) - epsilon * log_sigmoid(-h)


def _per_token(pairs, c, r):
  return c / jnp.maximum(pairs.chosen_length, 1), r / jnp.maximum(pairs.rejected_length, 1)


def _sigmoid(pairs, spec, c, r):
  """DPO (arXiv:2305.18290, eq. 7)."""
  return _smoothed(spec.beta * (c - r), spec.label_smoothing)


def _robust(pairs, spec, c, r):
  """Without bias under labels flipped at a known rate (arXiv:2403.00409)."""
  h, epsilon = spec.beta * (c - r), spec.label_smoothing
  return (-(1.0 - epsilon) * log_sigmoid(h) + epsilon * log_sigmoid(-h)) / (1.0 - 2.0 * epsilon)


def _hinge(pairs, spec, c, r):
  """SLiC's (arXiv:2305.10425; RSO, arXiv:2309.06657)."""
  return jax.nn.relu(1.0 - spec.beta * (c - r))


def _ipo(pairs, spec, c, r):
  """IPO (arXiv:2310.12036, eq. 17), of log-ratios per token: sums would make the target depend on the length."""
  c, r = _per_token(pairs, c, r)
  return jnp.square(c - r - 1.0 / (2.0 * spec.beta))


def _exo_pair(pairs, spec, c, r):
  """Reverse KL to the smoothed label (arXiv:2402.00856, eq. 16)."""
  h, epsilon = spec.beta * (c - r), spec.label_smoothing
  return (sigmoid(h) * (log_sigmoid(h) - math.log1p(-epsilon))
          + sigmoid(-h) * (log_sigmoid(-h) - math.log(epsilon)))


def _nca_pair(pairs, spec, c, r):
  """Noise-contrastive alignment of two answers (arXiv:2402.05369)."""
  c, r = spec.beta * c, spec.beta * r
  return -log_sigmoid(c) - 0.5 * log_sigmoid(-c) - 0.5 * log_sigmoid(-r)


def _bco_pair(pairs, spec, c, r):
  """A binary classifier of answers (arXiv:2404.04656)."""
  return -log_sigmoid(spec.beta * c - pairs.shift) - log_sigmoid(pairs.shift - spec.beta * r)


def _sppo_hard(pairs, spec, c, r):
  """Self-play with the winner's probability 1 (arXiv:2405.00675, eq. 4.7)."""
  return jnp.square(c - 0.5 / spec.beta) + jnp.square(r + 0.5 / spec.beta)


def _sorted(values, pairs):
  """Returns the values in order; pairs of padding, which fill up the end of a batch, stay there."""
  return jnp.sort(jnp.where(pairs.chosen_length > 0, values, 1e9))


def _aot(pairs, spec, c, r):
  """Ratios of the policy above those of the reference in distribution (arXiv:2406.05882, paired)."""
  policy, reference = pairs.chosen - pairs.rejected, pairs.ref_chosen - pairs.ref_rejected
  return _smoothed(spec.beta * (_sorted(policy, pairs) - _sorted(reference, pairs)), spec.label_smoothing)


def _aot_unpaired(pairs, spec, c, r):
  """Better answers above worse ones in distribution (arXiv:2406.05882, unpaired)."""
  return _smoothed(spec.beta * (_sorted(c, pairs) - _sorted(r, pairs)), spec.label_smoothing)


def _apo_zero(pairs, spec, c, r):
  """The better answer up, the worse one down (arXiv:2408.06266, eq. 7)."""
  return sigmoid(-spec.beta * c) + sigmoid(spec.beta * r)


def _apo_down(pairs, spec, c, r):
  """Both down, the worse one further: for answers worse than the model's own (arXiv:2408.06266, eq. 8)."""
  return sigmoid(spec.beta * c) + sigmoid(-spec.beta * (c - r))


def _discopop(pairs, spec, c, r):
  """A mixture of logistic and exponential loss that a search found (arXiv:2406.08414, eq. 5)."""
  h = spec.beta * (c - r)
  share = sigmoid(h / spec.discopop_tau)
  return -(1.0 - share) * log_sigmoid(h) + share * jnp.exp(-h)


def _sigmoid_norm(pairs, spec, c, r):
  """DPO of log-ratios per token (arXiv:2411.15124)."""
  c, r = _per_token(pairs, c, r)
  return -log_sigmoid(spec.beta * (c - r))


def _sft(pairs, spec, c, r):
  """The better answer's negative log-likelihood per token."""
  return -pairs.chosen / jnp.maximum(pairs.chosen_length, 1)


def _cpo(pairs, spec, c, r):
  """DPO with a uniform reference (arXiv:2401.08417); its likelihood term is spec.sft_weight."""
  return _smoothed(spec.beta * (pairs.chosen - pairs.rejected), spec.label_smoothing)


def _simpo(pairs, spec, c, r):
  """Log-likelihoods per token, a margin apart (SimPO, arXiv:2405.14734)."""
  c, r = _per_token(pairs, pairs.chosen, pairs.rejected)
  return _smoothed(spec.beta * (c - r) - spec.margin, spec.label_smoothing)


def _orpo(pairs, spec, c, r):
  """Likelihood and the odds ratio of likelihoods per token (arXiv:2403.07691, eq. 4 and 7)."""
  return _sft(pairs, spec, c, r) + spec.beta * odds_ratio(*_per_token(pairs, pairs.chosen, pairs.rejected))


def odds_ratio(chosen, rejected):
  """Returns -log sigmoid(log odds(chosen) - log odds(rejected)) of mean log-probabilities of a token."""
  log_odds = lambda x: x - jnp.log1p(-jnp.exp(x))
  return -log_sigmoid(log_odds(chosen) - log_odds(rejected))


LOSSES = {
    'sigmoid': _sigmoid, 'robust': _robust, 'hinge': _hinge, 'ipo': _ipo, 'exo_pair': _exo_pair,
    'nca_pair': _nca_pair, 'bco_pair': _bco_pair, 'sppo_hard': _sppo_hard, 'aot': _aot,
    'aot_unpaired': _aot_unpaired, 'apo_zero': _apo_zero, 'apo_down': _apo_down, 'discopop': _discopop,
    'sigmoid_norm': _sigmoid_norm, 'sft': _sft, 'cpo': _cpo, 'simpo': _simpo, 'orpo': _orpo,
}


def pair_loss(spec, pairs, weights=None, probability=None):
  """Returns (sum over pairs, weight, aux).  spec: PreferenceSpec.  weights: float [P], 0 for a pair of padding.

  probability: float32 [P] or None, soft labels: how sure it is that the chosen answer is the better one.  The loss is
  then the expected one, of the pair and of the pair exchanged (arXiv:2309.00267, section 2.2.1).

  aux, sums without gradient: `chosen_logprob` and `rejected_logprob` of whole answers, `chosen_reward` and
  `rejected_reward` (beta c, beta r), `margin` between them and `accuracy`, how often it is positive.

  aot and aot_unpaired sort the pairs they are given: they want train.gradient_accumulation_steps=1.
  """
  weights = jnp.ones_like(pairs.chosen) if weights is None else weights.astype(jnp.float32)
  # Padding may hold anything; where would let its infinities into the gradient.
  pairs = jax.tree.map(lambda a: jnp.where(weights != 0, a, 0) if jnp.ndim(a) else a, pairs)
  loss = lambda pairs: LOSSES[spec.loss](pairs, spec, *implicit_scores(pairs, spec))
  losses = loss(pairs)
  if probability is not None:
    losses = probability * losses + (1.0 - probability) * loss(exchange(pairs))
  if spec.sft_weight:
    losses = losses + spec.sft_weight * _sft(pairs, spec, None, None)
  c, r = spec.beta * (pairs.chosen - pairs.ref_chosen), spec.beta * (pairs.rejected - pairs.ref_rejected)
  aux = {'chosen_logprob': pairs.chosen, 'rejected_logprob': pairs.rejected, 'chosen_reward': c,
         'rejected_reward': r, 'margin': c - r, 'accuracy': c > r}
  return masked_sum(losses, weights), jnp.sum(weights), _sums(weights, aux)


def unpaired_loss(spec, logprobs, ref_logprobs, desirable, kl=0.0, weights=None):
  """Returns (sum over answers, weight, aux) of loss kto or apo_zero_unpaired.

  logprobs, ref_logprobs: float32 [B], sums over answers.  desirable: [B], whether an answer is a good one.  kl:
  what `mismatched_kl` returns; kto's point of reference.  weights: float [B], 0 for padding.
  Source: KTO, arXiv:2402.01306, eq. 7; arXiv:2408.06266, eq. 7, of single answers.
  """
  weights = jnp.ones_like(logprobs) if weights is None else weights.astype(jnp.float32)
  reference = kl if spec.loss == 'kto' else 0.0
  good = desirable != 0
  ratio = logprobs - ref_logprobs
  losses = jnp.where(good, spec.desirable_weight * sigmoid(-spec.beta * (ratio - reference)),
                     spec.undesirable_weight * sigmoid(-spec.beta * (reference - ratio)))
  aux = {'desirable': good, 'reward': spec.beta * ratio, 'accuracy': (ratio > reference) == good,
         'kl': jnp.broadcast_to(reference, logprobs.shape)}
  return masked_sum(losses, weights), jnp.sum(weights), _sums(weights, aux)


def mismatched_kl(logprobs, ref_logprobs, weights=None):
  """Returns a float32 scalar without gradient: max(0, the mean log-ratio of answers to other rows' prompts).

  Source: KTO, arXiv:2402.01306.  The mean is over the rows given: train.gradient_accumulation_steps=1.
  """
  weights = jnp.ones_like(logprobs) if weights is None else weights.astype(jnp.float32)
  mean = masked_sum(logprobs - ref_logprobs, weights) / jnp.maximum(jnp.sum(weights), 1.0)
  return jax.lax.stop_gradient(jnp.maximum(mean, 0.0))


def _sums(weights, aux):
  return {name: jax.lax.stop_gradient(masked_sum(x, weights)) for name, x in aux.items()}
