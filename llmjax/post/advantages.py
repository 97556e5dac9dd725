"""Reward shaping and advantage estimation.

Letters: B sequences, T tokens.  Masks are 1 on completion tokens; values outside them are ignored and results are 0
there.
"""

import jax
import jax.numpy as jnp

from llmjax.ops.masked import masked_mean, masked_sum
from llmjax.post import kl

WHITEN_EPSILON = 1e-8
GROUP_EPSILON = 1e-4


def last_token(mask):
  """Return a one-hot mask [B, T] of each sequence's last masked token; all 0 for an empty mask."""
  after = jnp.cumsum(mask[:, ::-1] != 0, axis=1)[:, ::-1]
  return ((mask != 0) & (after == 1)).astype(jnp.float32)


def shape_rewards(scores, logprobs, ref_logprobs, mask, coefficient, estimator='k1'):
  """Return per-token (rewards, kl), [B, T]: the score on the last token less the KL penalty on every token.

  scores: float [B].  estimator: a name in kl.ESTIMATORS, or the KL itself, [B, T].
  Source: arXiv:1909.08593, section 2.
  """
  penalty = kl.ESTIMATORS[estimator](logprobs, ref_logprobs) if isinstance(estimator, str) else estimator
  penalty = jnp.where(mask != 0, penalty, 0.0)
  return scores[:, None] * last_token(mask) - coefficient * penalty, penalty


def gae(rewards, values, mask, gamma=1.0, gae_lambda=0.95):
  """Return (advantages, returns), float32 [B, T]: generalized advantage estimation (arXiv:1506.02438, eq. 16).

  The episode ends at the last masked token.  returns = advantages + values, the targets of the value head.
  """
  mask = mask != 0
  rewards, values = jnp.where(mask, rewards, 0.0), jnp.where(mask, values, 0.0)

  def step(carry, column):
    advantage, next_value = carry
    reward, value, here = column
    estimate = reward + gamma * next_value - value + gamma * gae_lambda * advantage
    # Tokens outside the mask are skipped: the carry passes over a gap.
    carry = jnp.where(here, estimate, advantage), jnp.where(here, value, next_value)
    return carry, jnp.where(here, estimate, 0.0)

  zeros = jnp.zeros(rewards.shape[0])
  columns = jax.tree.map(jnp.transpose, (rewards, values, mask))
  advantages = jax.lax.scan(step, (zeros, zeros), columns, reverse=True)[1].T
  return advantages, advantages + values


def whiten(x, mask, shift_mean=True):
  """Normalize x to mean 0 and unbiased variance 1 over masked entries; shift_mean=False keeps the mean (for rewards).

  Source: arXiv:2403.17031.
  """
  mean = masked_mean(x, mask)
  degrees = jnp.maximum(jnp.maximum(jnp.sum(mask.astype(jnp.float32)), 1.0) - 1.0, 1.0)
  variance = masked_sum(jnp.square(x - mean), mask) / degrees
  white = (x - mean) * jax.lax.rsqrt(variance + WHITEN_EPSILON)
  return jnp.where(mask != 0, white if shift_mean else white + mean, 0.0)


def group_advantages(rewards, num_generations, estimator='group_mean', normalization='group'):
  """Return advantages [B] relative to the completions of the same prompt; equal rewards give exactly 0.

  rewards: [B], the num_generations completions of each prompt adjacent.  estimator: the baseline is the mean of the
  group (group_mean; GRPO, arXiv:2402.03300), or of the other completions (leave_one_out; RLOO, arXiv:2402.14740).
  normalization: divide by the standard deviation (unbiased) plus 1e-4 of the group or of the batch; none: do not divide
  (Dr. GRPO, arXiv:2503.20783).
  """
  groups = rewards.astype(jnp.float32).reshape(-1, num_generations)
  # Relative to the first reward: the mean of equal numbers need not round to that number.
  groups = groups - groups[:, :1]
  centered = groups - groups.mean(1, keepdims=True)
  others = max(num_generations - 1, 1)
  advantages = centered * (num_generations / others) if estimator == 'leave_one_out' else centered
  if normalization == 'group':
    deviation = jnp.sqrt(jnp.sum(jnp.square(centered), 1, keepdims=True) / others)
    advantages = advantages / (deviation + GROUP_EPSILON)
  elif normalization == 'batch':
    flat = rewards.astype(jnp.float32)
    deviation = jnp.sqrt(jnp.sum(jnp.square(flat - flat.mean())) / max(flat.size - 1, 1))
    advantages = advantages / (deviation + GROUP_EPSILON)
  return advantages.reshape(-1)


def overlong_penalty(lengths, max_length, buffer):
  """Return DAPO's soft overlong punishment, float32 [B]: 0 to -1 over the last `buffer` tokens before max_length.

  Source: arXiv:2503.14476, eq. 13.
  """
  start = max_length - buffer
  return -jnp.clip((jnp.asarray(lengths, jnp.float32) - start) / max(buffer, 1), 0.0, 1.0)
