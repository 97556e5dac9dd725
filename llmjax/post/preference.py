"""Preference losses from the log-probabilities of whole completions.

Letters: P pairs, B sequences, T tokens.  c and r: log-ratios log pi / pi_ref of the chosen and the rejected completion.
h = beta (c - r).  Losses are sums with the number of pairs as weight, divided once by the train step.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from llmjax.ops.masked import masked_mean, masked_sum, masked_sums

log_sigmoid, sigmoid = jax.nn.log_sigmoid, jax.nn.sigmoid


class Pairs(NamedTuple):
  """Log-probabilities of completions, float32 [P], nats, and their numbers of tokens.

  shift: subtracted from both rewards by bco_pair (arXiv:2404.04656: their running mean).
  """

  chosen: jax.Array
  rejected: jax.Array
  ref_chosen: jax.Array
  ref_rejected: jax.Array
  chosen_length: jax.Array
  rejected_length: jax.Array
  shift: jax.Array | float = 0.0


def exchange(pairs):
  """Exchange the chosen and the rejected completions."""
  return Pairs(pairs.rejected, pairs.chosen, pairs.ref_rejected, pairs.ref_chosen, pairs.rejected_length,
               pairs.chosen_length, pairs.shift)


def sum_logprobs(logprobs, weights):
  """Return (weighted sum, number of tokens), [B], of log-probabilities [B, T] where weights [B, T] are nonzero."""
  weights = weights.astype(jnp.float32)
  return jnp.sum(jnp.where(weights != 0, weights * logprobs, 0.0), axis=1), jnp.sum(weights != 0, axis=1)


def length_weights(mask, other_mask, weight, index=None):
  """Return the mask [B, T] with `weight` on the tokens beyond the length of the pair's shorter completion.

  index: int [B, T], index of each token in its completion, from 1; None: the tokens are in order.
  Source: LD-DPO, arXiv:2409.06411.
  """
  common = jnp.minimum(jnp.sum(mask != 0, 1), jnp.sum(other_mask != 0, 1))[:, None]
  index = jnp.cumsum(mask != 0, axis=1) if index is None else index
  return jnp.where(index <= common, 1.0, weight) * (mask != 0)


# The losses: (pairs, spec, c, r) -> float32 [P].


def implicit_scores(pairs, spec):
  """Return (c, r), transformed to f'(pi / pi_ref) for an f-divergence (f-DPO, arXiv:2309.16240)."""

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
  """Return the binary cross-entropy with label smoothing epsilon (cDPO, E. Mitchell, 2023)."""
  return -(1.0 - epsilon) * log_sigmoid(h) - epsilon * log_sigmoid(-h)


def _per_token(pairs, c, r):
  return c / jnp.maximum(pairs.chosen_length, 1), r / jnp.maximum(pairs.rejected_length, 1)


def _sigmoid(pairs, spec, c, r):
  """DPO (arXiv:2305.18290, eq. 7)."""
  return _smoothed(spec.beta * (c - r), spec.label_smoothing)


def _robust(pairs, spec, c, r):
  """Robust DPO: unbiased under labels flipped at a known rate (arXiv:2403.00409)."""
  h, epsilon = spec.beta * (c - r), spec.label_smoothing
  return (-(1.0 - epsilon) * log_sigmoid(h) + epsilon * log_sigmoid(-h)) / (1.0 - 2.0 * epsilon)


def _hinge(pairs, spec, c, r):
  """Hinge loss of SLiC (arXiv:2305.10425) and RSO (arXiv:2309.06657)."""
  return jax.nn.relu(1.0 - spec.beta * (c - r))


def _ipo(pairs, spec, c, r):
  """IPO (arXiv:2310.12036, eq. 17) on log-ratios per token, so that the target does not depend on the length."""
  c, r = _per_token(pairs, c, r)
  return jnp.square(c - r - 1.0 / (2.0 * spec.beta))


def _exo_pair(pairs, spec, c, r):
  """EXO: reverse KL to the smoothed label (arXiv:2402.00856, eq. 16)."""
  h, epsilon = spec.beta * (c - r), spec.label_smoothing
  return (sigmoid(h) * (log_sigmoid(h) - math.log1p(-epsilon))
          + sigmoid(-h) * (log_sigmoid(-h) - math.log(epsilon)))


def _nca_pair(pairs, spec, c, r):
  """Noise-contrastive alignment of pairs (arXiv:2402.05369)."""
  c, r = spec.beta * c, spec.beta * r
  return -log_sigmoid(c) - 0.5 * log_sigmoid(-c) - 0.5 * log_sigmoid(-r)


def _bco_pair(pairs, spec, c, r):
  """BCO: binary classification of completions (arXiv:2404.04656)."""
  return -log_sigmoid(spec.beta * c - pairs.shift) - log_sigmoid(pairs.shift - spec.beta * r)


def _sppo_hard(pairs, spec, c, r):
  """SPPO with hard labels (arXiv:2405.00675, eq. 4.7)."""
  return jnp.square(c - 0.5 / spec.beta) + jnp.square(r + 0.5 / spec.beta)


def _sorted(values, pairs):
  """Sort values; padding pairs, at the end of a batch, stay there."""
  return jnp.sort(jnp.where(pairs.chosen_length > 0, values, 1e9))


def _aot(pairs, spec, c, r):
  """AOT, paired: the policy's log-ratios dominate the reference's (arXiv:2406.05882)."""
  policy, reference = pairs.chosen - pairs.rejected, pairs.ref_chosen - pairs.ref_rejected
  return _smoothed(spec.beta * (_sorted(policy, pairs) - _sorted(reference, pairs)), spec.label_smoothing)


def _aot_unpaired(pairs, spec, c, r):
  """AOT, unpaired: chosen completions dominate rejected ones (arXiv:2406.05882)."""
  return _smoothed(spec.beta * (_sorted(c, pairs) - _sorted(r, pairs)), spec.label_smoothing)


def _apo_zero(pairs, spec, c, r):
  """APO-zero: raise the chosen, lower the rejected completion (arXiv:2408.06266, eq. 7)."""
  return sigmoid(-spec.beta * c) + sigmoid(spec.beta * r)


def _apo_down(pairs, spec, c, r):
  """APO-down: lower both, the rejected one more, for data worse than the model (arXiv:2408.06266, eq. 8)."""
  return sigmoid(spec.beta * c) + sigmoid(-spec.beta * (c - r))


def _discopop(pairs, spec, c, r):
  """DiscoPOP: a log-ratio modulated mixture of logistic and exponential loss (arXiv:2406.08414, eq. 5)."""
  h = spec.beta * (c - r)
  modulation = sigmoid(h / spec.discopop_tau)
  return -(1.0 - modulation) * log_sigmoid(h) + modulation * jnp.exp(-h)


def _sigmoid_norm(pairs, spec, c, r):
  """Length-normalized DPO (arXiv:2411.15124)."""
  c, r = _per_token(pairs, c, r)
  return -log_sigmoid(spec.beta * (c - r))


def _sft(pairs, spec, c, r):
  """Negative log-likelihood of the chosen completion per token."""
  return -pairs.chosen / jnp.maximum(pairs.chosen_length, 1)


def _cpo(pairs, spec, c, r):
  """CPO: DPO with a uniform reference (arXiv:2401.08417); its likelihood term is spec.sft_weight."""
  return _smoothed(spec.beta * (pairs.chosen - pairs.rejected), spec.label_smoothing)


def _simpo(pairs, spec, c, r):
  """SimPO: log-likelihoods per token with a target margin (arXiv:2405.14734)."""
  c, r = _per_token(pairs, pairs.chosen, pairs.rejected)
  return _smoothed(spec.beta * (c - r) - spec.simpo_gamma, spec.label_smoothing)


def _orpo(pairs, spec, c, r):
  """ORPO: likelihood and odds ratio of the likelihoods per token (arXiv:2403.07691, eq. 4 and 7)."""
  return _sft(pairs, spec, c, r) + spec.beta * odds_ratio(*_per_token(pairs, pairs.chosen, pairs.rejected))


def odds_ratio(chosen, rejected):
  """Return -log sigmoid(log odds(chosen) - log odds(rejected)) of mean log-probabilities per token."""
  log_odds = lambda x: x - jnp.log1p(-jnp.exp(x))
  return -log_sigmoid(log_odds(chosen) - log_odds(rejected))


LOSSES = {
    'sigmoid': _sigmoid, 'robust': _robust, 'hinge': _hinge, 'ipo': _ipo, 'exo_pair': _exo_pair,
    'nca_pair': _nca_pair, 'bco_pair': _bco_pair, 'sppo_hard': _sppo_hard, 'aot': _aot,
    'aot_unpaired': _aot_unpaired, 'apo_zero': _apo_zero, 'apo_down': _apo_down, 'discopop': _discopop,
    'sigmoid_norm': _sigmoid_norm, 'sft': _sft, 'cpo': _cpo, 'simpo': _simpo, 'orpo': _orpo,
}


def pair_loss(spec, pairs, weights=None, probability=None):
  """Return (sum over pairs, weight, aux) of a PreferenceSpec's loss.  weights: float [P], 0 for padding.

  probability: float32 [P] or None, soft labels: the probability that the chosen completion is better.  The loss is the
  expectation over the pair and the exchanged pair (arXiv:2309.00267, section 2.2.1).

  aux, sums without gradient: `chosen_logprob` and `rejected_logprob` of whole completions, `chosen_reward` and
  `rejected_reward` (beta c, beta r), their `margin`, and `accuracy`, whether it is positive.

  aot and aot_unpaired sort all given pairs and need train.gradient_accumulation_steps=1.
  """
  weights = jnp.ones_like(pairs.chosen) if weights is None else weights.astype(jnp.float32)
  # Padding may hold any values, whose infinities would get into the gradient through where.
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
  return masked_sum(losses, weights), jnp.sum(weights), masked_sums(aux, weights)


def unpaired_loss(spec, logprobs, ref_logprobs, desirable, kl=0.0, weights=None):
  """Return (sum over completions, weight, aux) of loss kto or apo_zero_unpaired.

  logprobs, ref_logprobs: float32 [B], of whole completions.  desirable: bool [B].  kl: the reference point of KTO, from
  `mismatched_kl`.  weights: float [B], 0 for padding.
  Source: KTO, arXiv:2402.01306, eq. 7; arXiv:2408.06266, eq. 7, for single completions.
  """
  weights = jnp.ones_like(logprobs) if weights is None else weights.astype(jnp.float32)
  reference_point = kl if spec.loss == 'kto' else 0.0
  desirable = desirable != 0
  log_ratio = logprobs - ref_logprobs
  losses = jnp.where(desirable, spec.desirable_weight * sigmoid(-spec.beta * (log_ratio - reference_point)),
                     spec.undesirable_weight * sigmoid(-spec.beta * (reference_point - log_ratio)))
  aux = {'desirable': desirable, 'reward': spec.beta * log_ratio,
         'accuracy': (log_ratio > reference_point) == desirable,
         'kl': jnp.broadcast_to(reference_point, logprobs.shape)}
  return masked_sum(losses, weights), jnp.sum(weights), masked_sums(aux, weights)


def mismatched_kl(logprobs, ref_logprobs, weights=None):
  """Return max(0, mean log-ratio of completions after other prompts), a float32 scalar without gradient.

  Source: KTO, arXiv:2402.01306.  The mean is over the given batch: train.gradient_accumulation_steps=1.
  """
  weights = jnp.ones_like(logprobs) if weights is None else weights
  return jax.lax.stop_gradient(jnp.maximum(masked_mean(logprobs - ref_logprobs, weights), 0.0))
