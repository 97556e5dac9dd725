"""Policy and value losses of reinforcement learning.

Letters: B rows, T tokens.  A mask is 1 on the tokens that the policy chose.  Losses are a sum and a weight, which
are divided once, by the step, whatever was accumulated: so a mean over tokens is one over all tokens of the batch.
"""

import jax
import jax.numpy as jnp

from llmjax.post.kl import ESTIMATORS


def policy_loss(spec, logprobs, old_logprobs, advantages, mask, *, ref_logprobs=None, entropies=None,
                max_length=None):
  """Returns (sum, weight, aux) of a PolicySpec's loss.

  logprobs, old_logprobs, ref_logprobs, entropies: float32 [B, T], nats; old ones as of the policy that drew the
  tokens.  advantages: [B], or [B, T].  mask: [B, T].  max_length: what loss_aggregation=constant divides by.
  The weight is the number of tokens for loss_aggregation=token, else that of rows with a token; a row of padding counts
  nowhere.  aux, sums without gradient, means over tokens as the average weighs them: `policy_loss`,
  `clip_fraction`, `ratio`, `approximate_kl` (from the old policy: half the squared log-ratio), and where there are
  any `kl` (from the reference) and `entropy`.
  """
  mask = (mask != 0).astype(jnp.float32)
  zero = lambda x: jnp.where(mask != 0, x, 0.0)  # What is outside may be anything, also no number.
  logprobs, old_logprobs = zero(logprobs), zero(old_logprobs)
  advantages = jnp.asarray(advantages, jnp.float32)
  advantages = jnp.broadcast_to(advantages if advantages.ndim == 2 else advantages[:, None], mask.shape)
  lengths = jnp.sum(mask, axis=1, keepdims=True)
  log_ratio = logprobs - old_logprobs
  if spec.importance_sampling == 'sequence':
    level = jnp.sum(log_ratio, axis=1, keepdims=True) / jnp.maximum(lengths, 1.0)
  elif spec.importance_sampling == 'trajectory':
    level = jnp.sum(log_ratio, axis=1, keepdims=True)
  else:
    level = log_ratio
  level = jnp.broadcast_to(level, mask.shape)
  losses, clipped = SURROGATES[spec.surrogate](spec, jnp.exp(level), advantages, logprobs, log_ratio)
  policy = losses
  aux = {'clip_fraction': clipped, 'ratio': jnp.exp(level), 'approximate_kl': 0.5 * jnp.square(log_ratio)}
  if ref_logprobs is not None:
    aux['kl'] = ESTIMATORS[spec.kl_estimator](logprobs, zero(ref_logprobs))
    if spec.kl_coef:
      losses = losses + spec.kl_coef * aux['kl']
  if entropies is not None:
    aux['entropy'] = zero(entropies)
    if spec.entropy_coef:
      losses = losses - spec.entropy_coef * aux['entropy']
  weights, weight = token_weights(spec.loss_aggregation, mask, max_length)
  # Of what is reported, a mean is wanted whatever the loss divides by.
  means = mask if spec.loss_aggregation == 'token' else mask / jnp.maximum(lengths, 1.0)
  aux = {name: jax.lax.stop_gradient(jnp.sum(zero(means * x))) for name, x in aux.items()}
  aux['policy_loss'] = jax.lax.stop_gradient(jnp.sum(zero(weights * policy)))
  return jnp.sum(zero(weights * losses)), weight, aux


def token_weights(average, mask, max_length=None):
  """Returns (weights of tokens [B, T], the weight of them all), as average says: see PolicySpec."""
  lengths = jnp.sum(mask, axis=1, keepdims=True)
  if average == 'token':
    return mask, jnp.sum(mask)
  rows = jnp.sum(lengths > 0).astype(jnp.float32)
  divisor = {'sequence': jnp.maximum(lengths, 1.0), 'constant': max_length, 'sum': 1.0}[average]
  if divisor is None:
    raise ValueError('loss_aggregation=constant needs max_length, the longest answer there can be')
  return mask / divisor, rows


# Surrogates: (spec, ratio, advantages, logprobs, log_ratio of tokens) -> (losses [B, T], clipped bool [B, T]).


def _clip(spec, ratio, advantages, logprobs, log_ratio):
  """PPO's pessimistic bound (arXiv:1707.06347, eq. 7), clipped further above than below (DAPO) where asked."""
  bound = jnp.clip(ratio, 1.0 - spec.clip_low, 1.0 + spec.high)
  free = jnp.minimum(ratio, spec.dual_clip) if spec.dual_clip else ratio
  losses = -jnp.minimum(free * advantages, bound * advantages)
  return losses, bound * advantages < ratio * advantages


def _cispo(spec, ratio, advantages, logprobs, log_ratio):
  """REINFORCE weighed by a ratio that is cut off above; every token keeps a gradient (arXiv:2506.13585)."""
  weight = jax.lax.stop_gradient(jnp.minimum(ratio, 1.0 + spec.high))
  return -weight * advantages * logprobs, ratio > 1.0 + spec.high


def _sapo(spec, ratio, advantages, logprobs, log_ratio):
  """A sigmoid gate instead of a clip (arXiv:2511.20347)."""
  tau = jnp.where(advantages > 0, *spec.temperatures)
  gate = jax.nn.sigmoid(tau * (ratio - 1.0)) * 4.0 / tau
  return -gate * advantages, jnp.zeros(ratio.shape, bool)


def _vespo(spec, ratio, advantages, logprobs, log_ratio):
  """REINFORCE weighed by w^k exp(lambda (1 - w)), w the trajectory's ratio (arXiv:2602.10693)."""
  log_w = jnp.sum(jnp.clip(log_ratio, -20.0, 20.0), axis=1, keepdims=True)
  log_w = jnp.clip(log_w, jnp.log(1e-8), 20.0)
  k_up, rate_up, k_down, rate_down = spec.gammas
  k, rate = jnp.where(advantages >= 0, k_up, k_down), jnp.where(advantages >= 0, rate_up, rate_down)
  weight = jax.lax.stop_gradient(jnp.exp(k * log_w + rate * (1.0 - jnp.exp(log_w))))
  return -weight * advantages * logprobs, jnp.zeros(ratio.shape, bool)


def _reinforce(spec, ratio, advantages, logprobs, log_ratio):
  """Every token's log-probability by its advantage (Williams, 1992)."""
  return -advantages * logprobs, jnp.zeros(ratio.shape, bool)


SURROGATES = {'clip': _clip, 'cispo': _cispo, 'sapo': _sapo, 'vespo': _vespo, 'reinforce': _reinforce}


def value_loss(values, old_values, returns, mask, clip=0.2):
  """Returns (sum over tokens, weight, aux) of half the squared error, the larger one of clipped and free values.

  values, old_values, returns: float32 [B, T].  mask: the tokens' weights [B, T].
  clip: how far from old_values a value is believed to move; 0: not clipped.  aux: sums of `value_clip_fraction`,
  `value_error` (squared) and `value`.  Source: arXiv:1707.06347, eq. 9, with the clip of its released code
  (arXiv:2005.12729).
  """
  mask = mask.astype(jnp.float32)
  zero = lambda x: jnp.where(mask != 0, x, 0.0)
  values, old_values, returns = zero(values), zero(old_values), zero(returns)
  error = jnp.square(values - returns)
  bounded = error
  if clip:
    bounded = jnp.square(jnp.clip(values, old_values - clip, old_values + clip) - returns)
  aux = {'value_clip_fraction': bounded > error, 'value_error': error, 'value': values}
  return (0.5 * jnp.sum(mask * jnp.maximum(error, bounded)), jnp.sum(mask),
          {name: jax.lax.stop_gradient(jnp.sum(mask * x)) for name, x in aux.items()})
