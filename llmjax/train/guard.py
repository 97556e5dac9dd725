"""Bad steps: found on the device, inside the step, and never applied.

A step is bad when its loss or its gradient is not finite, or when the loss or the gradient's norm is a
spike: far above the median of the steps before it, in units of their median absolute deviation.  A bad
step changes neither parameters nor optimizer state, whatever the policy, so that no checkpoint holds it.
What the host then does is in run/recovery.py.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

# What is wrong with a step: the sum of these.
NOT_FINITE, LOSS_SPIKE, NORM_SPIKE = 1, 2, 4
# Of the median, added to the deviation: on a curve without noise, every rise would be a spike.
FLOOR = 0.01


class Watch(NamedTuple):
  """What the guard remembers; part of the optimizer's state, so a resumed run judges as it would have.

  losses, norms: float32 [window], of the last good steps, in a ring.  good, bad: int32, how many of each.
  """

  losses: jax.Array
  norms: jax.Array
  good: jax.Array
  bad: jax.Array


class Watched(NamedTuple):
  """State of an optimizer under guard: the rule's own, and the watch."""

  rule: tuple
  watch: Watch


def watched(tx, window):
  """Returns the optimizer with a Watch in its state, for `make_train_step(..., guard)`."""

  def init(params):
    zeros, zero = jnp.zeros(window, jnp.float32), jnp.zeros((), jnp.int32)
    return Watched(tx.init(params), Watch(zeros, zeros, zero, zero))

  def update(grads, state, params=None):
    updates, rule = tx.update(grads, state.rule, params)
    return updates, state._replace(rule=rule)

  return optax.GradientTransformation(init, update)


def judge(spec, watch, loss, norm):
  """Returns (verdict, the watch after the step).  spec: GuardSpec.  loss, norm: float32 scalars.

  verdict: `bad`, int32, 0 or a sum of the codes above; `loss_score` and `norm_score`, the robust z-scores
  (x - median) / (1.4826 MAD + FLOOR |median|), 0 until the window is full or where spikes are not looked for.
  """
  bad = jnp.where(jnp.isfinite(loss) & jnp.isfinite(norm), 0, NOT_FINITE)
  scores = jnp.zeros(2, jnp.float32)
  if spec.spike_threshold:
    rows = jnp.stack([watch.losses, watch.norms])
    median = jnp.median(rows, axis=1)
    # 1.4826 of them are a normal distribution's standard deviation.
    deviation = 1.4826 * jnp.median(jnp.abs(rows - median[:, None]), axis=1)
    found = (jnp.stack([loss, norm]) - median) / (deviation + FLOOR * jnp.abs(median) + 1e-12)
    scores = jnp.where(watch.good >= spec.window, found, 0.0)
    codes = jnp.array([LOSS_SPIKE, NORM_SPIKE])
    spikes = jnp.sum(jnp.where(scores > spec.spike_threshold, codes, 0))
    bad = jnp.where(bad == 0, spikes, bad)
  ok = bad == 0
  place = watch.good % len(watch.losses)
  keep = lambda ring, x: ring.at[place].set(jnp.where(ok, x, ring[place]))
  after = Watch(keep(watch.losses, loss), keep(watch.norms, norm), watch.good + ok, watch.bad + ~ok)
  verdict = {'bad': bad.astype(jnp.int32), 'loss_score': scores[0], 'norm_score': scores[1]}
  return verdict, after


def explain(row):
  """Returns in words what is wrong with a bad step.  row: its metrics, as numbers."""
  code = int(row['bad'])
  if code & NOT_FINITE:
    return f'the {"gradient" if math.isfinite(row["loss"]) else "loss"} is not finite'
  parts = [f'the {name} jumped to {float(row[key]):.4g} ({float(row[score]):.0f} deviations above the median)'
           for flag, name, key, score in ((LOSS_SPIKE, 'loss', 'loss', 'loss_score'),
                                          (NORM_SPIKE, "gradient's norm", 'grad_norm', 'norm_score'))
           if code & flag]
  return ' and '.join(parts)
