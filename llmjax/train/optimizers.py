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
    (r'(^|/)(scale|magnitude)$', False),
    (r'(^|/)(table|kernel|query|key|value|out|gate|up|down|router|a|b)$', True),
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
    name = _name(path)
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


def find_frozen(patterns, params):
  """Returns True for every parameter whose path one of the patterns matches.

  Raises ConfigError for a pattern that matches none, or when nothing is left to train.
  """
  names = _paths(params)
  for pattern in patterns:
    if not any(re.search(pattern, name) for name in names):
      raise ConfigError([f'optimizer.freeze: no parameter matches {pattern!r}; there are {", ".join(names)}'])
  frozen = _by_name([(pattern, True) for pattern in patterns], params, lambda name: False)
  if all(jax.tree.leaves(frozen)):
    raise ConfigError([f'optimizer.freeze={",".join(patterns)} leaves nothing to train; there are {", ".join(names)}'])
  return frozen


def stop_frozen(loss_fn, patterns):
  """Returns the loss_fn with no gradient for frozen parameters, whose products are then not computed at all."""
  if not patterns:
    return loss_fn

  def stopped(params, *arguments):
    stop = lambda p, frozen: jax.lax.stop_gradient(p) if frozen else p
    return loss_fn(jax.tree.map(stop, params, find_frozen(patterns, params)), *arguments)

  return stopped


def scale_rates(rates, layer_decay):
  """Returns a transformation of finished updates: a factor for each parameter and, in the blocks, each layer.

  rates: {pattern of a path: factor}.  layer_decay d: with layers 1 to L, layer l gets d^(L - l), the embedding
  table d^L, what comes after the layers 1 (discriminative rates: arXiv:1801.06146, section 3.2, d = 1 / 2.6).
  Raises ConfigError for a pattern that matches no parameter.
  """
  rows = list(rates.items())

  def update(updates, params):
    del params
    names = _paths(updates)
    for pattern in rates:
      if not any(re.search(pattern, name) for name in names):
        raise ConfigError([f'optimizer.rates: no trained parameter matches {pattern!r}; there are {", ".join(names)}'])
    factors = _by_name(rows, updates, lambda name: 1.0)
    layers = max([u.shape[0] for name, u in zip(names, jax.tree.leaves(updates), strict=True)
                  if name.startswith('blocks/')], default=0)

    def scale(path, u, factor):
      name = _name(path)
      if name.startswith('blocks/'):
        depth = jnp.arange(layers - 1, -1, -1, dtype=u.dtype).reshape(-1, *[1] * (u.ndim - 1))
      else:
        depth = layers if name.startswith('embed/') else 0
      return u * (factor * layer_decay ** depth)

    return jax.tree_util.tree_map_with_path(scale, updates, factors)

  return optax.stateless(update)


def _name(path):
  return jax.tree_util.keystr(path, simple=True, separator='/')


def _paths(params):
  return [_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]


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
  rates = [scale_rates(spec.rates, spec.layer_decay)] if spec.rates or spec.layer_decay != 1 else []
  tx = keep_moments(optax.chain(*clip, OPTIMIZERS[spec.name](spec, schedule), *rates), spec.moment_dtype, seed)
  if spec.freeze:
    labels = lambda params: jax.tree.map(lambda f: 'frozen' if f else 'trained', find_frozen(spec.freeze, params))
    tx = optax.partition({'trained': tx, 'frozen': optax.set_to_zero()}, labels)
  return tx, schedule
