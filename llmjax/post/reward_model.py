"""Losses and scores of reward models: outcome reward models from pairs, process reward models from step labels.

Letters: P pairs, B sequences, T tokens.  Losses are sums and weights, divided once by the train step.
"""

import jax
import jax.numpy as jnp

from llmjax.ops.masked import masked_sum, masked_sums
from llmjax.post.advantages import last_token


def score_at_end(values, mask):
  """Return the value at each sequence's last masked token, [B, T] to float32 [B]."""
  return jnp.sum(jnp.where(last_token(mask) != 0, values.astype(jnp.float32), 0.0), axis=1)


def bradley_terry(chosen, rejected, margin=None, center_rewards_coef=0.0, weights=None, probability=None):
  """Return (sum over pairs, weight, aux) of -log sigmoid(chosen - rejected - margin) (arXiv:2203.02155, eq. 1).

  chosen, rejected: scores, float32 [P].  margin: float [P] or None (arXiv:2307.09288, section 3.2.2).
  center_rewards_coef: weight of (chosen + rejected)^2, which keeps the mean score near 0 (arXiv:2312.09244).  weights:
  float [P], 0 for padding.  probability: float [P] or None, soft labels: the probability that the chosen completion is
  better; the loss is the expectation.  aux: sums of `accuracy`, `margin`, `chosen_reward`, `rejected_reward`.
  """
  weights = jnp.ones_like(chosen) if weights is None else weights.astype(jnp.float32)
  difference = chosen - rejected
  margin = 0.0 if margin is None else margin
  losses = -jax.nn.log_sigmoid(difference - margin)
  if probability is not None:
    losses = probability * losses - (1.0 - probability) * jax.nn.log_sigmoid(-difference - margin)
  losses = losses + center_rewards_coef * jnp.square(chosen + rejected)
  aux = {'accuracy': difference > 0, 'margin': difference, 'chosen_reward': chosen, 'rejected_reward': rejected}
  return masked_sum(losses, weights), jnp.sum(weights), masked_sums(aux, weights)


def process_loss(values, labels, separators):
  """Return (sum over steps, weight, aux) of the binary cross-entropy of step labels (arXiv:2305.20050, 2211.14275).

  values: logits of a correct step, float [B, T].  labels: [B, T].  separators: [B, T], 1 at the end of each step.
  """
  separators = separators.astype(jnp.float32)
  values, labels = values.astype(jnp.float32), labels.astype(jnp.float32)
  losses = -(labels * jax.nn.log_sigmoid(values) + (1 - labels) * jax.nn.log_sigmoid(-values))
  correct = (values > 0) == (labels > 0.5)
  return masked_sum(losses, separators), jnp.sum(separators), masked_sums({'accuracy': correct}, separators)


def process_score(values, separators, reduction='min'):
  """Return the score of each solution, float32 [B]: the minimum or the product of its steps' probabilities.

  A sequence without steps scores 1.  Source: arXiv:2305.20050.
  """
  probabilities = jnp.where(separators != 0, jax.nn.sigmoid(values.astype(jnp.float32)), 1.0)
  return probabilities.min(axis=1) if reduction == 'min' else probabilities.prod(axis=1)
