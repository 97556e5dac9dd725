"""Reward models: one number for an answer, learnt from pairs; one for every step, learnt from labels.

Letters: P pairs, B rows, T tokens.  Losses are sums with a weight; both are divided once, by the step.
"""

import jax
import jax.numpy as jnp

from llmjax.ops.masked import masked_sum
from llmjax.post.advantages import last_token


def score_at_end(values, mask):
  """Returns float32 [B], the value [B, T] at each row's last token of the mask, wherever padding lies."""
  return jnp.sum(jnp.where(last_token(mask) != 0, values.astype(jnp.float32), 0.0), axis=1)


def bradley_terry(chosen, rejected, margin=None, center_rewards_coef=0.0, weights=None, probability=None):
  """Returns (sum over pairs, weight, aux) of -log sigmoid(chosen - rejected - margin).

  chosen, rejected: float32 [P], scores.  margin: float [P] or None (arXiv:2307.09288, section 3.2.2).
  center_rewards_coef:
  weight of (chosen + rejected)^2, which holds the mean score at 0 (arXiv:2312.09244).  weights:
  float [P], 0 for a pair of padding.  probability: float [P] or None, soft labels: how sure it is that the chosen
  answer is the better one; the loss is the expected one.  aux: sums of `accuracy`, `margin`,
  `chosen_reward`, `rejected_reward`.
  Source: arXiv:2203.02155, eq. 1.
  """
  weights = jnp.ones_like(chosen) if weights is None else weights.astype(jnp.float32)
  gap = chosen - rejected
  margin = 0.0 if margin is None else margin
  losses = -jax.nn.log_sigmoid(gap - margin)
  if probability is not None:
    losses = probability * losses - (1.0 - probability) * jax.nn.log_sigmoid(-gap - margin)
  losses = losses + center_rewards_coef * jnp.square(chosen + rejected)
  aux = {'accuracy': gap > 0, 'margin': gap, 'chosen_reward': chosen, 'rejected_reward': rejected}
  return (masked_sum(losses, weights), jnp.sum(weights),
          {name: jax.lax.stop_gradient(masked_sum(x, weights)) for name, x in aux.items()})


def process_loss(values, labels, separators):
  """Returns (sum over step ends, weight, aux): cross-entropy of good (1) against bad (0) steps.

  values: float [B, T], logits of "this step is good".  labels, separators: [B, T]; separators is 1 where a
  step ends.  Source: arXiv:2305.20050; arXiv:2211.14275.
  """
  separators = separators.astype(jnp.float32)
  values, labels = values.astype(jnp.float32), labels.astype(jnp.float32)
  losses = -(labels * jax.nn.log_sigmoid(values) + (1 - labels) * jax.nn.log_sigmoid(-values))
  hits = (values > 0) == (labels > 0.5)
  return (masked_sum(losses, separators), jnp.sum(separators),
          {'accuracy': jax.lax.stop_gradient(masked_sum(hits, separators))})


def process_score(values, separators, reduce='min'):
  """Returns float32 [B], the score of a solution: of p(good) at its step ends the min, or the product.

  A row without steps scores 1.  Source: arXiv:2305.20050.
  """
  good = jnp.where(separators != 0, jax.nn.sigmoid(values.astype(jnp.float32)), 1.0)
  return good.min(axis=1) if reduce == 'min' else good.prod(axis=1)
