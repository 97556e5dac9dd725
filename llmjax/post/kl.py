"""Estimators of the KL divergence from the reference model, and the controller of the KL penalty coefficient.

Estimators take log p and log q of sampled tokens, float32 of any shape, in nats (J. Schulman, "Approximating KL
divergence", 2020).
"""

import jax.numpy as jnp


def k1(logprobs, ref_logprobs):
  """Return log p - log q: unbiased, high variance, may be negative."""
  return logprobs - ref_logprobs


def k2(logprobs, ref_logprobs):
  """Return (log p - log q)^2 / 2: biased, low variance; its gradient on samples of p is exact."""
  return 0.5 * jnp.square(logprobs - ref_logprobs)


def k3(logprobs, ref_logprobs):
  """Return q/p - 1 - log(q/p): unbiased, never negative; the estimator of GRPO (arXiv:2402.03300, eq. 4)."""
  log_ratio = ref_logprobs - logprobs
  return jnp.expm1(log_ratio) - log_ratio


def absolute(logprobs, ref_logprobs):
  """Return |log p - log q|, a penalty that estimates no divergence."""
  return jnp.abs(logprobs - ref_logprobs)


def full(log_p, log_q):
  """Return the exact KL(p || q) of log-probabilities over the vocabulary, [..., V] to [...]."""
  return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


ESTIMATORS = {'k1': k1, 'k2': k2, 'k3': k3, 'abs': absolute}


def adapt(coefficient, measured, target, horizon, samples):
  """Return the next KL coefficient: a proportional controller in log space (arXiv:1909.08593, section 2.2).

  measured, target: KL of a sequence, nats.  samples: sequences since the last update.  horizon: sequences over which
  the coefficient changes by about a factor e at a relative error of 1.
  """
  error = min(max(measured / target - 1.0, -0.2), 0.2)
  return coefficient * (1.0 + error * samples / horizon)
