"""From rewards to advantages.

Letters: B rows, T tokens, G rows of one prompt.  Masks are 1 on the tokens of the answer; what lies outside
them has no influence and comes out as 0.
"""

import jax
import jax.numpy as jnp

from llmjax.post import kl as divergence

WHITEN_EPSILON = 1e-8
GROUP_EPSILON = 1e-4


def last_token(mask):
  """Returns a one-hot mask [B, T] of each row's last masked token; a row without any has none."""
  after = jnp.cumsum(mask[:, ::-1] != 0, axis=1)[:, ::-1]
  return ((mask != 0) & (after == 1)).astype(jnp.float32)


def shape_rewards(scores, logprobs, ref_logprobs, mask, coefficient, estimator='k1'):
  """Returns (rewards [B, T], kl [B, T]): minus the KL penalty on every token, plus the score on the last.

  scores: float [B].  estimator: a name in kl.ESTIMATORS, or an array [B, T] that holds the KL already.
  Source: arXiv:1909.08593, section 2.
  """
  estimate = divergence.ESTIMATORS[estimator](logprobs, ref_logprobs) if isinstance(estimator, str) else estimator
  estimate = jnp.where(mask != 0, estimate, 0.0)
  return scores[:, None] * last_token(mask) - coefficient * estimate, estimate


def gae(rewards, values, mask, gamma=1.0, gae_lambda=0.95):
  """Returns (advantages, returns), float32 [B, T]: generalised advantage estimation (arXiv:1506.02438, eq. 16).

  The episode ends with the row's last masked token: nothing is expected after it.  returns = advantages +
  values, what the value head learns.
  """
  mask = mask != 0
  rewards, values = jnp.where(mask, rewards, 0.0), jnp.where(mask, values, 0.0)

  def step(carry, column):
    advantage, next_value = carry
    reward, value, here = column
    found = reward + gamma * next_value - value + gamma * gae_lambda * advantage
    # Nothing happens outside the mask: what follows a gap is carried over it.
    carry = jnp.where(here, found, advantage), jnp.where(here, value, next_value)
    return carry, jnp.where(here, found, 0.0)

  zeros = jnp.zeros(rewards.shape[0])
  columns = jax.tree.map(jnp.transpose, (rewards, values, mask))
  advantages = jax.lax.scan(step, (zeros, zeros), columns, reverse=True)[1].T
  return advantages, advantages + values


def whiten(x, mask, shift_mean=True):
  """Returns x with mean 0 and variance 1 over masked entries; shift_mean=False keeps the mean (for rewards).

  The variance is the unbiased one.  Source: arXiv:2403.17031.
  """
  mask = mask.astype(jnp.float32)
  count = jnp.maximum(jnp.sum(mask), 1.0)
  mean = jnp.sum(mask * x) / count
  variance = jnp.sum(mask * jnp.square(x - mean)) / jnp.maximum(count - 1.0, 1.0)
  white = (x - mean) * jax.lax.rsqrt(variance + WHITEN_EPSILON)
  return jnp.where(mask != 0, white if shift_mean else white + mean, 0.0)


def group_advantages(rewards, group, baseline='mean', scale='group', epsilon=GROUP_EPSILON):
  """Returns the advantages [B] of rewards [B], rows of one prompt beside one another, `group` of each.

  baseline: mean of the group (GRPO, arXiv:2402.03300), or others: the mean of the other rows
  (RLOO, arXiv:2402.14740).  scale: divides by the standard deviation (of a sample: n - 1) plus
  epsilon, of the group, or of the batch; none: not (Dr. GRPO, arXiv:2503.20783).
  Equal rewards give exactly 0.
  """
  rows = rewards.astype(jnp.float32).reshape(-1, group)
  # About the first row's reward: the mean of equal numbers need not round to that number.
  rows = rows - rows[:, :1]
  centred = rows - rows.mean(1, keepdims=True)
  advantages = centred * (group / max(group - 1, 1)) if baseline == 'others' else centred
  if scale == 'group':
    deviation = jnp.sqrt(jnp.sum(jnp.square(centred), 1, keepdims=True) / max(group - 1, 1))
    advantages = advantages / (deviation + epsilon)
  elif scale == 'batch':
    flat = rewards.astype(jnp.float32)
    deviation = jnp.sqrt(jnp.sum(jnp.square(flat - flat.mean())) / max(flat.size - 1, 1))
    advantages = advantages / (deviation + epsilon)
  elif scale != 'none':
    raise ValueError(f'scale={scale!r} is none of group, batch, none')
  return advantages.reshape(-1)


def overlong_penalty(lengths, max_length, buffer):
  """Returns float32 [B], 0 to -1: linear over the last `buffer` tokens before max_length, in tokens.

  Source: DAPO, arXiv:2503.14476.
  """
  soft = max_length - buffer
  return -jnp.clip((jnp.asarray(lengths, jnp.float32) - soft) / max(buffer, 1), 0.0, 1.0)
