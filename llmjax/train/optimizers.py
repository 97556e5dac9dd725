"""Optimizers and schedules: one row of a table each, all from Optax."""

import math
import re

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from llmjax.config import ConfigError
from llmjax.train.paths import match_paths, path_name, path_names
from llmjax.train.rounding import keep_moments

# Whether weight decay applies, by the last part of a parameter's path; the first pattern that matches.
DECAY = (
    (r'(^|/)(scale|magnitude|bias|\w+_bias|table|positions)$', False),
    (r'(^|/)(kernel|query|key|value|out|gate|up|down|router|a|b)$', True),
)

# The axes of a matrix inside a block that its input runs over, and its output's: what Muon makes
# orthogonal.  Axes before them (layers, experts) are a batch of matrices.  All else is AdamW's.
MATRICES = (
    (r'(^|/)(query|key|value)$', ((-3,), (-2, -1))),
    (r'(^|/)out$', ((-3, -2), (-1,))),
    (r'(^|/)(gate|up|down)$', ((-2,), (-1,))),
)


def make_schedule(spec, steps):
  """Returns the schedule, a function of the number of steps done before (0 for the first) to a float32 rate.

  With w warm-up steps of N, step k (from 1) of the warm-up uses lr k / w, step w + 1 the peak again, and step N, the
  last, lr * final_lr_fraction (cosine, linear, wsd).  A run of one step uses the peak.

  cosine: arXiv:1608.03983, eq. 5.  wsd (warm-up, stable, decay): arXiv:2404.06395, section 4.2.
  rsqrt: arXiv:1706.03762, eq. 3, after the warm-up.
  """
  warmup = spec.warmup_steps
  start = min(warmup, max(steps - 2, 0))  # A fall needs two steps; both ends of it are steps of the run.
  rest = max(steps - 1 - start, 1)
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
    offset = max(warmup, 1)
    # Evaluated before the boundary too, where the count is below zero.
    body = lambda step: spec.lr * jnp.sqrt(offset / (offset + jnp.maximum(step, 0)))
  else:
    raise ConfigError([f'optimizer.schedule={spec.schedule!r} is not known'])
  if not warmup:
    return body
  # The first step already moves: rates are lr/w, 2 lr/w, ..., lr.
  rise = lambda step: spec.lr * (step + 1) / warmup
  return lambda step: jnp.where(step < warmup, rise(step), body(step - start))


def decay_mask(params):
  """Returns True for every parameter that decays; raises ValueError for one that no pattern names."""

  def missing(name):
    raise ValueError(f'no weight-decay pattern matches the parameter {name}; add one to DECAY')

  return match_paths(DECAY, params, missing)


def matrix_axes(params):
  """Returns which axes of every parameter make its matrix, None for those that Muon leaves to AdamW."""
  rows = [(pattern, MuonDimensionNumbers(*axes)) for pattern, axes in MATRICES]
  return match_paths(rows, params, lambda name: None)


def _muon(spec):
  """Returns Muon for the matrices of the blocks and Adam for the other parameters."""
  label = lambda params: match_paths([(pattern, 'muon') for pattern, _ in MATRICES], params, lambda name: 'adam')

  def match_adam(update, axes):
    # arXiv:2502.16982, eq. 4: updates as large as AdamW's, so that lr and decay serve both.
    return 0.2 * math.sqrt(max(math.prod(update.shape[axis] for axis in side) for side in axes)) * update

  matrices = optax.chain(
      scale_by_muon(beta=spec.momentum, eps=spec.epsilon, weight_dimension_numbers=matrix_axes),
      optax.stateless(lambda updates, _: jax.tree.map(match_adam, updates, matrix_axes(updates))))
  return optax.partition({'muon': matrices, 'adam': optax.scale_by_adam(spec.b1, spec.b2, spec.epsilon)}, label)


# The direction of each rule's update.  `make_rule` adds the weight decay and the learning rate, for all of them alike.
OPTIMIZERS = {
    # arXiv:1711.05101, algorithm 2.
    'adamw': lambda s: optax.scale_by_adam(s.b1, s.b2, s.epsilon),
    # arXiv:2302.06675, program 1.
    'lion': lambda s: optax.scale_by_lion(s.b1, s.b2),
    # arXiv:1804.04235, algorithm 4, with the learning rate given.
    'adafactor': lambda s: optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)),
    'muon': _muon,
    # arXiv:1711.05101, algorithm 1.
    'sgd': lambda s: optax.trace(s.b1) if s.b1 else optax.identity(),
}


def make_rule(spec, schedule):
  """Returns the update -lr (direction + weight_decay * parameter): decoupled weight decay (arXiv:1711.05101)."""
  return optax.chain(OPTIMIZERS[spec.name](spec), optax.add_decayed_weights(spec.weight_decay, decay_mask),
                     optax.scale_by_learning_rate(schedule))


def scale_rates(rates, layer_decay):
  """Returns a transformation of finished updates: a factor for each parameter and, in the blocks, each layer.

  rates: {pattern of a path: factor}.  layer_decay d: with layers 1 to L, layer l gets d^(L - l), the embedding
  table d^L, what comes after the layers 1 (discriminative rates: arXiv:1801.06146, section 3.2, d = 1 / 2.6).
  Raises ConfigError for a pattern that matches no parameter.
  """
  rows = list(rates.items())

  def update(updates, params):
    del params
    names = path_names(updates)
    for pattern in rates:
      if not any(re.search(pattern, name) for name in names):
        raise ConfigError([f'optimizer.lr_multipliers: no trained parameter matches {pattern!r}; there are '
                           f'{", ".join(names)}'])
    factors = match_paths(rows, updates, lambda name: 1.0)
    # An adapter's factors are beneath its name and have the paths of what they adapt.
    part = lambda name, part: re.search(f'(^|/){part}/', name)
    layers = max([u.shape[0] for name, u in zip(names, jax.tree.leaves(updates), strict=True)
                  if part(name, 'blocks')], default=0)

    def scale(path, u, factor):
      name = path_name(path)
      if part(name, 'blocks'):
        depth = jnp.arange(layers - 1, -1, -1, dtype=u.dtype).reshape(-1, *[1] * (u.ndim - 1))
      else:
        depth = layers if part(name, 'embed') else 0
      return u * (factor * layer_decay ** depth)

    return jax.tree_util.tree_map_with_path(scale, updates, factors)

  return optax.stateless(update)


def make_optimizer(spec, steps, seed=0):
  """Returns (tx, schedule): clip by global norm, the named rule with its schedule, factors by layer and path.

  Frozen parameters are none of its business: no state, no share in the norm, an update of 0.

  seed: of the rounding of moments that are kept in bfloat16.
  """
  if spec.name not in OPTIMIZERS:
    raise ConfigError([f'optimizer.name={spec.name!r} is not known; write one of '
                       f'{", ".join(OPTIMIZERS)}'])
  schedule = make_schedule(spec, steps)
  clip = [optax.clip_by_global_norm(spec.clip_norm)] if spec.clip_norm else []
  rates = [scale_rates(spec.lr_multipliers, spec.layer_decay)] if spec.lr_multipliers or spec.layer_decay != 1 else []
  tx = keep_moments(optax.chain(*clip, make_rule(spec, schedule), *rates), spec.moment_dtype, seed)
  return tx, schedule
