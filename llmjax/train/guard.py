"""Detect bad steps on the device, inside the training step, and do not apply them.

A step is bad if its loss or gradient is not finite, or if the loss or the gradient norm is a spike: far above the
median of the preceding steps, in units of their median absolute deviation.  A bad step changes neither parameters nor
optimizer state, whatever the policy, so no checkpoint contains it.  run/recovery.py applies the policy.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

# Codes of a bad step, which are added.
NOT_FINITE, LOSS_SPIKE, NORM_SPIKE = 1, 2, 4
# Fraction of the median that is added to the deviation; without noise, every increase would be a spike otherwise.
FLOOR = 0.01


class Watch(NamedTuple):
  """State of the guard.  It is part of the optimizer state, so that a resumed run decides the same.

  losses, norms: float32 [window], ring buffers of the last good steps.  good, bad: int32, numbers of steps.
  """

  losses: jax.Array
  norms: jax.Array
  good: jax.Array
  bad: jax.Array


class Watched(NamedTuple):
  """State of an optimizer and its guard."""

  rule: tuple
  watch: Watch


def watched(tx, window):
  """Return the optimizer with a Watch in its state, as `make_train_step(..., guard)` needs it."""

  def init(params):
    zeros, zero = jnp.zeros(window, jnp.float32), jnp.zeros((), jnp.int32)
    return Watched(tx.init(params), Watch(zeros, zeros, zero, zero))

  def update(grads, state, params=None):
    updates, rule = tx.update(grads, state.rule, params)
    return updates, state._replace(rule=rule)

  return optax.GradientTransformation(init, update)


def check_step(spec, watch, loss, norm):
  """Return (outputs, Watch after the step).  spec: GuardSpec.  loss, norm: float32 scalars.

  outputs: `bad`, int32, 0 or a sum of the codes above; `loss_score` and `norm_score`, robust z-scores
  (x - median) / (1.4826 MAD + FLOOR |median|), 0 until the window is full or if spikes are not checked.
  """
  bad = jnp.where(jnp.isfinite(loss) & jnp.isfinite(norm), 0, NOT_FINITE)
  scores = jnp.zeros(2, jnp.float32)
  if spec.spike_threshold:
    rows = jnp.stack([watch.losses, watch.norms])
    median = jnp.median(rows, axis=1)
    # 1.4826 MAD is the standard deviation of a normal distribution.
    deviation = 1.4826 * jnp.median(jnp.abs(rows - median[:, None]), axis=1)
    z_scores = (jnp.stack([loss, norm]) - median) / (deviation + FLOOR * jnp.abs(median) + 1e-12)
    scores = jnp.where(watch.good >= spec.window, z_scores, 0.0)
    codes = jnp.array([LOSS_SPIKE, NORM_SPIKE])
    spikes = jnp.sum(jnp.where(scores > spec.spike_threshold, codes, 0))
    bad = jnp.where(bad == 0, spikes, bad)
  ok = bad == 0
  index = watch.good % len(watch.losses)
  store = lambda ring, x: ring.at[index].set(jnp.where(ok, x, ring[index]))
  after = Watch(store(watch.losses, loss), store(watch.norms, norm), watch.good + ok, watch.bad + ~ok)
  outputs = {'bad': bad.astype(jnp.int32), 'loss_score': scores[0], 'norm_score': scores[1]}
  return outputs, after


def explain(row):
  """Describe why a step is bad.  row: its metrics, as numbers."""
  code = int(row['bad'])
  if code & NOT_FINITE:
    return f'the {"gradient" if math.isfinite(row["loss"]) else "loss"} is not finite'
  parts = [f'the {name} jumped to {float(row[key]):.4g} ({float(row[score]):.0f} deviations above the median)'
           for flag, name, key, score in ((LOSS_SPIKE, 'loss', 'loss', 'loss_score'),
                                          (NORM_SPIKE, "gradient's norm", 'grad_norm', 'norm_score'))
           if code & flag]
  return ' and '.join(parts)
