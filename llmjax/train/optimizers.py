"""Optimizers and schedules: one row of a table each, all from Optax."""

import re

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, muon

from llmjax.config import ConfigError
from llmjax.train.rounding import keep_moments

# Whether weight decay applies, by the last part of a parameter's path; the first pattern that matches.
DECAY = (
    (r'(^|/)scale$', False),
    (r'(^|/)(table|kernel|query|key|value|out|gate|up|down|router)$', True),
)

# The axes of a matrix inside a block that its input runs over, and its output's: what Muon makes
# orthogonal.  Axes before them (layers, experts) are a batch of matrices.  All else is AdamW's.
MATRICES = (
    (r'(^|/)(query|key|value)$', ((-3,), (-2, -1))),
    (r'(^|/)out$', ((-3, -2), (-1,))),
    (r'(^|/)(gate|up|down)$', ((-2,), (-1,))),
)


def make_schedule(spec, steps):
  """Returns step -> learning rate (float32).  The rate reaches its end on the last of `steps` steps.

  cosine: arXiv:1608.03983, eq. 5.  wsd (warm-up, stable, decay): arXiv:2404.06395, section 4.2.
  rsqrt: arXiv:1706.03762, eq. 3, after the warm-up.
  """
  rest = max(steps - spec.warmup_steps, 1)
  end = spec.lr * spec.final_lr_fraction
  if spec.schedule == 'cosine':
    body = optax.cosine_decay_schedule(spec.lr, rest, alpha=spec.final_lr_fraction)
  elif spec.schedule == 'linear':
    body = optax.linear_schedule(spec.lr, end, rest)
  elif spec.schedule == 'constant':
    body = optax.constant_schedule(spec.lr)
  elif spec.schedule == 'wsd':
    fall = max(round(rest * spec.decay_fraction), 1)
    body = optax.join_schedules([optax.constant_schedule(spec.lr),
                                 optax.linear_schedule(spec.lr, end, fall)], [rest - fall])
  elif spec.schedule == 'rsqrt':
    offset = max(spec.warmup_steps, 1)
    # join_schedules asks for steps before the boundary too, counted from it: they are below zero.
    body = lambda step: spec.lr * jnp.sqrt(offset / (offset + jnp.maximum(step, 0)))
  else:
    raise ConfigError([f'optimizer.schedule={spec.schedule!r} is not known'])
  if not spec.warmup_steps:
    return body
  # The first step already moves: rates are lr/w, 2 lr/w, ..., lr.
  rise = lambda step: spec.lr * (step + 1) / spec.warmup_steps
  return optax.join_schedules([rise, body], [spec.warmup_steps])


def _by_name(rows, params, missing):
  """Returns what the first row (pattern, value) that matches says of every parameter, else missing(name)."""

  def find(path, _):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    for pattern, value in rows:
      if re.search(pattern, name):
        return value
    return missing(name)

  return jax.tree_util.tree_map_with_path(find, params)


def decay_mask(params):
  """Returns True for every parameter that decays; raises ValueError for one that no pattern names."""

  def missing(name):
    raise ValueError(f'no weight-decay pattern matches the parameter {name}; add one to DECAY')

  return _by_name(DECAY, params, missing)


def matrix_axes(params):
  """Returns which axes of every parameter make its matrix, None for those that Muon leaves to AdamW."""
  rows = [(pattern, MuonDimensionNumbers(*axes)) for pattern, axes in MATRICES]
  return _by_name(rows, params, lambda name: None)


OPTIMIZERS = {
    # arXiv:1711.05101, algorithm 2.
    'adamw': lambda s, lr: optax.adamw(lr, s.b1, s.b2, s.epsilon, weight_decay=s.weight_decay,
                                       mask=decay_mask),
    # arXiv:2302.06675, program 1.
    'lion': lambda s, lr: optax.lion(lr, s.b1, s.b2, weight_decay=s.weight_decay, mask=decay_mask),
    # arXiv:1804.04235, algorithm 4, with the learning rate given.
    'adafactor': lambda s, lr: optax.adafactor(
        lr, weight_decay_rate=s.weight_decay or None, weight_decay_mask=decay_mask,
        multiply_by_parameter_scale=False),
    # arXiv:2502.16982, eq. 4: updates as large as AdamW's, so that lr and decay serve both.
    'muon': lambda s, lr: muon(
        lr, beta=s.momentum, weight_decay=s.weight_decay, weight_decay_mask=decay_mask,
        adam_b1=s.b1, adam_b2=s.b2, eps=s.epsilon, adam_weight_decay=s.weight_decay,
        muon_weight_dimension_numbers=matrix_axes, consistent_rms=0.2),
    'sgd': lambda s, lr: optax.chain(optax.add_decayed_weights(s.weight_decay, decay_mask),
                                     optax.sgd(lr, momentum=s.b1 or None)),
}


def make_optimizer(spec, steps, seed=0):
  """Returns (tx, schedule): clip by global norm, then the named rule with its schedule.

  seed: of the rounding of moments that are kept in bfloat16.
  """
  if spec.name not in OPTIMIZERS:
    raise ConfigError([f'optimizer.name={spec.name!r} is not known; write one of '
                       f'{", ".join(OPTIMIZERS)}'])
  schedule = make_schedule(spec, steps)
  clip = [optax.clip_by_global_norm(spec.clip_norm)] if spec.clip_norm else []
  tx = optax.chain(*clip, OPTIMIZERS[spec.name](spec, schedule))
  return keep_moments(tx, spec.moment_dtype, seed), schedule
