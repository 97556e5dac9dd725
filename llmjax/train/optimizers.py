"""Optimizers and learning-rate schedules from Optax, one table row each."""

import math
import re

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from llmjax.config import ConfigError
from llmjax.train.paths import match_paths, path_name, path_names
from llmjax.train.rounding import keep_moments

# Whether weight decay applies, by a pattern of the parameter's path; the first match counts.
DECAY = (
    (r'(^|/)(scale|magnitude|bias|\w+_bias|table|positions)$', False),
    (r'(^|/)(kernel|query|key|value|out|gate|up|down|router|a|b)$', True),
)

# Input and output axes of the matrices that Muon orthogonalizes.  Axes before them (layers, experts) are batch axes.
# All other parameters use AdamW.
MATRICES = (
    (r'(^|/)(query|key|value)$', ((-3,), (-2, -1))),
    (r'(^|/)out$', ((-3, -2), (-1,))),
    (r'(^|/)(gate|up|down)$', ((-2,), (-1,))),
)


def make_schedule(spec, steps):
  """Return the schedule, a function from the number of completed steps to the learning rate, float32.

  With w warm-up steps of N, step k of the warm-up (from 1) uses lr k / w, step w + 1 uses lr, and the last step N uses
  lr * final_lr_fraction (cosine, linear, wsd).  A run of one step uses lr.

  cosine: arXiv:1608.03983, eq. 5.  wsd (warm-up, stable, decay): arXiv:2404.06395, section 4.2.
  rsqrt: arXiv:1706.03762, eq. 3, after the warm-up.
  """
  warmup = spec.warmup_steps
  start = min(warmup, max(steps - 2, 0))  # A decay needs two steps, its start and its end.
  rest = max(steps - 1 - start, 1)
  end = spec.lr * spec.final_lr_fraction
  if spec.schedule == 'cosine':
    body = optax.cosine_decay_schedule(spec.lr, rest, alpha=spec.final_lr_fraction)
  elif spec.schedule == 'linear':
    body = optax.linear_schedule(spec.lr, end, rest)
  elif spec.schedule == 'constant':
    body = optax.constant_schedule(spec.lr)
  elif spec.schedule == 'wsd':
    decay = max(round(rest * spec.decay_fraction), 1)
    body = optax.join_schedules([optax.constant_schedule(spec.lr),
                                 optax.linear_schedule(spec.lr, end, decay)], [rest - decay])
  elif spec.schedule == 'rsqrt':
    offset = max(warmup, 1)
    # Also evaluated during the warm-up, where the count is negative.
    body = lambda step: spec.lr * jnp.sqrt(offset / (offset + jnp.maximum(step, 0)))
  else:
    raise ConfigError([f'optimizer.schedule={spec.schedule!r} is not known'])
  if not warmup:
    return body
  # The first step has a learning rate above 0: lr/w, 2 lr/w, ..., lr.
  rise = lambda step: spec.lr * (step + 1) / warmup
  return lambda step: jnp.where(step < warmup, rise(step), body(step - start))


def decay_mask(params):
  """Return True for every parameter with weight decay; raises ValueError if no pattern matches a parameter."""

  def missing(name):
    raise ValueError(f'no weight-decay pattern matches the parameter {name}; add one to DECAY')

  return match_paths(DECAY, params, missing)


def matrix_axes(params):
  """Return the matrix axes of every parameter that Muon updates, None for the others."""
  rows = [(pattern, MuonDimensionNumbers(*axes)) for pattern, axes in MATRICES]
  return match_paths(rows, params, lambda name: None)


def _muon(spec):
  """Return Muon for the matrices of the blocks and Adam for the other parameters."""
  label = lambda params: match_paths([(pattern, 'muon') for pattern, _ in MATRICES], params, lambda name: 'adam')

  def match_adam(update, axes):
    # arXiv:2502.16982, eq. 4: the update RMS matches AdamW's, so that both share lr and weight decay.
    return 0.2 * math.sqrt(max(math.prod(update.shape[axis] for axis in side) for side in axes)) * update

  matrices = optax.chain(
      scale_by_muon(beta=spec.momentum, eps=spec.epsilon, weight_dimension_numbers=matrix_axes),
      optax.stateless(lambda updates, _: jax.tree.map(match_adam, updates, matrix_axes(updates))))
  return optax.partition({'muon': matrices, 'adam': optax.scale_by_adam(spec.b1, spec.b2, spec.epsilon)}, label)


# The update direction of each optimizer.  `make_rule` adds weight decay and learning rate.
OPTIMIZERS = {
    # arXiv:1711.05101, algorithm 2.
    'adamw': lambda s: optax.scale_by_adam(s.b1, s.b2, s.epsilon),
    # arXiv:2302.06675, program 1.
    'lion': lambda s: optax.scale_by_lion(s.b1, s.b2),
    # arXiv:1804.04235, algorithm 4, with an explicit learning rate.
    'adafactor': lambda s: optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)),
    'muon': _muon,
    # arXiv:1711.05101, algorithm 1.
    'sgd': lambda s: optax.trace(s.b1) if s.b1 else optax.identity(),
}


def make_rule(spec, schedule):
  """Return the update -lr (direction + weight_decay * parameter), decoupled weight decay (arXiv:1711.05101)."""
  return optax.chain(OPTIMIZERS[spec.name](spec), optax.add_decayed_weights(spec.weight_decay, decay_mask),
                     optax.scale_by_learning_rate(schedule))


def scale_rates(rates, layer_decay):
  """Return a transformation that scales the final updates per parameter and, in the blocks, per layer.

  rates: {pattern of a path: factor}.  layer_decay d: layer l of L gets d^(L - l), the embedding table d^L, parameters
  after the layers 1 (discriminative fine-tuning, arXiv:1801.06146, section 3.2, with d = 1 / 2.6).
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
    # Adapter weights have the paths of the weights that they adapt, below the adapter's name.
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
  """Return (tx, schedule): clipping by global norm, the optimizer with its schedule, and learning-rate multipliers.

  spec: OptimizerSpec.  steps: of the run.  seed: of the stochastic rounding of bfloat16 moments.
  """
  if spec.name not in OPTIMIZERS:
    raise ConfigError([f'optimizer.name={spec.name!r} is not known; write one of '
                       f'{", ".join(OPTIMIZERS)}'])
  schedule = make_schedule(spec, steps)
  clip = [optax.clip_by_global_norm(spec.clip_norm)] if spec.clip_norm else []
  rates = [scale_rates(spec.lr_multipliers, spec.layer_decay)] if spec.lr_multipliers or spec.layer_decay != 1 else []
  tx = keep_moments(optax.chain(*clip, make_rule(spec, schedule), *rates), spec.moment_dtype, seed)
  return tx, schedule
