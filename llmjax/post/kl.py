"""How far a policy is from its reference: estimators from sampled tokens, and what weighs the penalty."""

import jax.numpy as jnp


def k1(logprobs, ref_logprobs):
  """Returns log p - log q of sampled tokens: no bias, high variance, may be negative."""
  return logprobs - ref_logprobs


def k2(logprobs, ref_logprobs):
  """Returns (log p - log q)^2 / 2: biased, low variance; its gradient is the exact one on samples of p."""
  return 0.5 * jnp.square(logprobs - ref_logprobs)


def k3(logprobs, ref_logprobs):
  """Returns q/p - 1 - log(q/p): no bias, never negative; that of GRPO (arXiv:2402.03300, eq. 4)."""
  log_ratio = ref_logprobs - logprobs
  return jnp.expm1(log_ratio) - log_ratio


def absolute(logprobs, ref_logprobs):
  """Returns |log p - log q|."""
  return jnp.abs(logprobs - ref_logprobs)


def full(log_p, log_q):
  """Returns sum_v p (log p - log q), [...], of log-probabilities of all words [..., V]."""
  return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


# From (log p, log q) of sampled tokens, float32 of any shape, nats.  Source: J. Schulman, "Approximating KL
# divergence", 2020, and `absolute`, which is no estimate.
ESTIMATORS = {'k1': k1, 'k2': k2, 'k3': k3, 'abs': absolute}


def adapt(coefficient, measured, target, horizon, samples):
  """Returns the coefficient of the next iteration: a proportional controller in log space.

  measured, target: KL of a sequence, nats.  samples: sequences since the last call.  horizon: sequences in
  which the coefficient can fall to 1/e of itself at an error of -1.  Source: arXiv:1909.08593, section 2.2.
  """
  error = min(max(measured / target - 1.0, -0.2), 0.2)
  return coefficient * (1.0 + error * samples / horizon)
