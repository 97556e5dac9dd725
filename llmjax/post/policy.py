"""Policy-gradient and value losses.

Letters: B sequences, T tokens.  Masks are 1 on completion tokens.  Losses are a sum and a weight, divided once by the
train step after gradient accumulation, so that a mean over tokens is over all tokens of the batch.
"""

import jax
import jax.numpy as jnp

from llmjax.ops.masked import masked_sum, masked_sums
from llmjax.post.kl import ESTIMATORS


def policy_loss(spec, logprobs, old_logprobs, advantages, mask, *, ref_logprobs=None, entropies=None,
                max_length=None):
  """Return (sum, weight, aux) of a PolicySpec's loss.

  logprobs, old_logprobs, ref_logprobs, entropies: float32 [B, T], nats; old_logprobs of the policy that sampled the
  tokens.  advantages: [B] or [B, T].  mask: [B, T].  max_length: the divisor of
  loss_aggregation=constant.  The weight is the number of tokens for loss_aggregation=token, else of sequences with a
  token.  aux, sums without gradient that the weight turns into means over tokens or sequences: `policy_loss`,
  `clip_fraction`, `ratio`, `approximate_kl` (from the old policy: half the squared log-ratio), and where they are given
  `kl` (from the reference model) and `entropy`.
  """
  mask = (mask != 0).astype(jnp.float32)
  zero = lambda x: jnp.where(mask != 0, x, 0.0)  # Values outside the mask may be NaN.
  logprobs, old_logprobs = zero(logprobs), zero(old_logprobs)
  advantages = jnp.asarray(advantages, jnp.float32)
  advantages = jnp.broadcast_to(advantages if advantages.ndim == 2 else advantages[:, None], mask.shape)
  lengths = jnp.sum(mask, axis=1, keepdims=True)
  log_ratio = logprobs - old_logprobs
  ratio = jnp.exp(_importance_log_ratio(spec.importance_sampling, log_ratio, lengths))
  losses, clipped = SURROGATES[spec.surrogate](spec, ratio, advantages, logprobs, log_ratio)
  surrogate = losses
  aux = {'clip_fraction': clipped, 'ratio': ratio, 'approximate_kl': 0.5 * jnp.square(log_ratio)}
  if ref_logprobs is not None:
    aux['kl'] = ESTIMATORS[spec.kl_estimator](logprobs, zero(ref_logprobs))
    if spec.kl_coef:
      losses = losses + spec.kl_coef * aux['kl']
  if entropies is not None:
    aux['entropy'] = zero(entropies)
    if spec.entropy_coef:
      losses = losses - spec.entropy_coef * aux['entropy']
  weights, weight = token_weights(spec.loss_aggregation, mask, max_length)
  # Metrics are means over tokens or sequences, also where the loss is a sum or is divided by a constant.
  aux = masked_sums(aux, mask if spec.loss_aggregation == 'token' else mask / jnp.maximum(lengths, 1.0))
  aux |= masked_sums({'policy_loss': surrogate}, weights)
  return masked_sum(losses, weights), weight, aux


def _importance_log_ratio(level, log_ratio, lengths):
  """Return the log importance ratio [B, T] of each token, or of its sequence or trajectory."""
  if level == 'token':
    return log_ratio
  total = jnp.sum(log_ratio, axis=1, keepdims=True)
  if level == 'sequence':
    total = total / jnp.maximum(lengths, 1.0)
  return jnp.broadcast_to(total, log_ratio.shape)


def token_weights(aggregation, mask, max_length=None):
  """Return (weights of tokens [B, T], total weight) of a PolicySpec's `loss_aggregation`."""
  if aggregation == 'token':
    return mask, jnp.sum(mask)
  if aggregation == 'constant' and max_length is None:
    raise ValueError('loss_aggregation=constant needs max_length, the maximum length of a completion')
  lengths = jnp.sum(mask, axis=1, keepdims=True)
  divisor = {'sequence': jnp.maximum(lengths, 1.0), 'constant': max_length, 'sum': 1.0}[aggregation]
  return mask / divisor, jnp.sum(lengths > 0).astype(jnp.float32)


# Surrogate objectives: (spec, ratio, advantages, logprobs, log_ratio) -> (losses [B, T], clipped bool [B, T]).
# ratio: of the chosen importance-sampling level; log_ratio: of tokens.


def _clip(spec, ratio, advantages, logprobs, log_ratio):
  """PPO's clipped objective (arXiv:1707.06347, eq. 7), with a separate upper bound (DAPO) and dual clip."""
  bound = jnp.clip(ratio, 1.0 - spec.clip_low, 1.0 + spec.high)
  free = jnp.minimum(ratio, spec.dual_clip) if spec.dual_clip else ratio
  losses = -jnp.minimum(free * advantages, bound * advantages)
  return losses, bound * advantages < ratio * advantages


def _cispo(spec, ratio, advantages, logprobs, log_ratio):
  """CISPO: REINFORCE weighted by a clipped ratio, so that every token keeps a gradient (arXiv:2506.13585)."""
  weight = jax.lax.stop_gradient(jnp.minimum(ratio, 1.0 + spec.high))
  return -weight * advantages * logprobs, ratio > 1.0 + spec.high


def _sapo(spec, ratio, advantages, logprobs, log_ratio):
  """SAPO: a sigmoid gate instead of clipping (arXiv:2511.20347)."""
  tau = jnp.where(advantages > 0, *spec.sapo_temperatures)
  gate = jax.nn.sigmoid(tau * (ratio - 1.0)) * 4.0 / tau
  return -gate * advantages, jnp.zeros(ratio.shape, bool)


def _vespo(spec, ratio, advantages, logprobs, log_ratio):
  """VESPO: REINFORCE weighted by w^k exp(lambda (1 - w)), w the trajectory's ratio (arXiv:2602.10693)."""
  log_w = jnp.sum(jnp.clip(log_ratio, -20.0, 20.0), axis=1, keepdims=True)
  log_w = jnp.clip(log_w, jnp.log(1e-8), 20.0)
  k_positive, rate_positive, k_negative, rate_negative = spec.vespo_k_lambda
  k = jnp.where(advantages >= 0, k_positive, k_negative)
  rate = jnp.where(advantages >= 0, rate_positive, rate_negative)
  weight = jax.lax.stop_gradient(jnp.exp(k * log_w + rate * (1.0 - jnp.exp(log_w))))
  return -weight * advantages * logprobs, jnp.zeros(ratio.shape, bool)


def _reinforce(spec, ratio, advantages, logprobs, log_ratio):
  """REINFORCE: log-probability times advantage (Williams, 1992)."""
  return -advantages * logprobs, jnp.zeros(ratio.shape, bool)


SURROGATES = {'clip': _clip, 'cispo': _cispo, 'sapo': _sapo, 'vespo': _vespo, 'reinforce': _reinforce}


def value_loss(values, old_values, returns, mask, clip=0.2):
  """Return (sum over tokens, weight, aux): half the larger squared error of clipped and unclipped values.

  values, old_values, returns: float32 [B, T].  mask: weights of the tokens, [B, T].  clip: maximum distance of a value
  from old_values; 0: no clipping.  aux: sums of `value_clip_fraction`, `value_error` (squared) and `value`.
  Source: arXiv:1707.06347, eq. 9, with the clipping of its released code (arXiv:2005.12729).
  """
  mask = mask.astype(jnp.float32)
  zero = lambda x: jnp.where(mask != 0, x, 0.0)
  values, old_values, returns = zero(values), zero(old_values), zero(returns)
  error = jnp.square(values - returns)
  clipped_error = error
  if clip:
    clipped_error = jnp.square(jnp.clip(values, old_values - clip, old_values + clip) - returns)
  aux = {'value_clip_fraction': clipped_error > error, 'value_error': error, 'value': values}
  return 0.5 * masked_sum(jnp.maximum(error, clipped_error), mask), jnp.sum(mask), masked_sums(aux, mask)
