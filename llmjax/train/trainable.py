"""Which parameters a run trains: all of the model's, adapters on a frozen base, or those that no pattern freezes.

A loss sees `(params, frozen)`; the model needs one tree of parameters.  A Trainable turns one into the other, so that
neither losses nor the training step know what is frozen.
"""

import dataclasses
import functools
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp

from llmjax.adapt.lora import adapter_names, combine, init_adapter
from llmjax.adapt.quantize import quantize_tree
from llmjax.config import ConfigError
from llmjax.model.model import Model
from llmjax.parallel.sharding import tree_shardings, zero_rules
from llmjax.train.paths import match_paths, path_names

# Keys in TrainState.frozen: the base of adapters, and the parameters that a pattern freezes.
BASE, FROZEN = 'base', 'params'


@dataclasses.dataclass(frozen=True)
class Trainable:
  """The parameters of a run and how they make up the model's.

  init: function (key, frozen) -> the run's parameters, as checkpoints store them.  names: tree of their logical axis
  names.  assemble: function (run's parameters, frozen, key) -> the model's parameters; key: of adapter dropout, None
  for none.  freeze: regular expressions; parameters whose path matches one do not train.
  abstract_base: function (mesh, zero) -> {name: tree of ShapeDtypeStructs with shardings} of what init reads in frozen.
  """

  init: Callable
  names: dict
  assemble: Callable = lambda params, frozen, key: params
  freeze: tuple[str, ...] = ()
  abstract_base: Callable = lambda mesh, zero=0: {}

  def merge(self, params, frozen, key=None):
    """Return the model's parameters from those that train and the frozen ones."""
    return self.assemble(_union(params, frozen.get(FROZEN, {})), frozen, key)

  def wrap(self, loss_fn):
    """Return the loss_fn of (params, frozen, batch, key) for one that takes the model's parameters."""

    @functools.wraps(loss_fn)
    def of_trained(params, frozen, batch, key):
      dropout_key = None if key is None else jax.random.fold_in(key, 1)
      return loss_fn(self.merge(params, frozen, dropout_key), frozen, batch, key)

    return of_trained

  def split(self, params):
    """Split the run's parameters, or a tree like theirs, into (those that train, {'params': the frozen ones} or {}).

    Raises ConfigError for a pattern that matches no parameter, or when nothing is left to train.
    """
    if not self.freeze:
      return params, {}
    frozen = find_frozen(self.freeze, params)
    return _select(params, frozen, False), {FROZEN: _select(params, frozen, True)}

  def trained_names(self, params):
    """Return the logical axis names of the parameters that train.  params: those."""
    return _pick(self.names, params) if self.freeze else self.names

  def pack(self, state):
    """Return a TrainState as checkpoints store it: all of the run's parameters, nothing in `frozen`."""
    return state.replace(params=_union(state.params, state.frozen.get(FROZEN, {})), frozen={})

  def unpack(self, state, frozen):
    """Return the TrainState that trains from one that `pack` returned and the frozen parameters of the loss."""
    params, rest = self.split(state.params)
    return state.replace(params=params, frozen={**frozen, **rest})


def whole_model(model, dtype='float32', freeze=()):
  """Return the Trainable of a ModelSpec's own parameters."""
  model = Model(model)
  return Trainable(lambda key, frozen: model.init(key, jnp.dtype(dtype)), model.param_names(), freeze=tuple(freeze))


def adapters(model, adapter, dtype='float32', freeze=()):
  """Return the Trainable of adapters on a frozen, possibly quantized base of a ModelSpec.  adapter: AdapterSpec."""
  names, specs = Model(model).param_names(), {adapter.name: adapter}

  def init(key, frozen):
    return {adapter.name: init_adapter(adapter, frozen[BASE], key, jnp.dtype(dtype))}

  def abstract_base(mesh, zero=0):
    return {BASE: quantize_base(model, adapter, abstract_params(model, dtype, mesh, zero), mesh, zero)}

  return Trainable(init, {adapter.name: adapter_names(adapter, names)},
                   lambda params, frozen, key: combine(frozen[BASE], params, specs, key=key), tuple(freeze),
                   abstract_base)


def make_trainable(spec):
  """Return the Trainable of a command's spec: its groups `model`, `adapter`, and `optimizer.freeze`."""
  dtype, freeze = spec.train.param_dtype, spec.optimizer.freeze
  return adapters(spec.model, spec.adapter, dtype, freeze) if spec.adapter.kind else whole_model(spec.model, dtype,
                                                                                                  freeze)


def quantize_base(model, adapter, base, mesh, zero=0):
  """Return the base of adapters, quantized as AdapterSpec.quantize says; of ShapeDtypeStructs, ShapeDtypeStructs."""
  if not adapter.quantize:
    return base
  place = lambda names: tree_shardings(mesh, names, zero_rules(zero, 3))
  return quantize_tree(base, adapter.quantize, Model(model).param_names(), place)


def abstract_params(model, param_dtype, mesh, zero=0):
  """Return the ShapeDtypeStructs of a ModelSpec's parameters, with their shardings."""
  model = Model(model)
  layout = tree_shardings(mesh, model.param_names(), zero_rules(zero, 3))
  return jax.tree.map(lambda s, n: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=n),
                      model.abstract_params(param_dtype), layout)


def find_frozen(patterns, params):
  """Return True for every parameter whose path matches one of the patterns.

  Raises ConfigError for a pattern that matches none, or when nothing is left to train.
  """
  names = path_names(params)
  for pattern in patterns:
    if not any(re.search(pattern, name) for name in names):
      raise ConfigError([f'optimizer.freeze: no parameter matches {pattern!r}; there are {", ".join(names)}'])
  frozen = match_paths([(pattern, True) for pattern in patterns], params, lambda name: False)
  if all(jax.tree.leaves(frozen)):
    raise ConfigError([f'optimizer.freeze={",".join(patterns)} leaves nothing to train; there are {", ".join(names)}'])
  return frozen


def _select(tree, mask, value):
  """Return the nested dict with the leaves whose mask is `value`, without empty branches."""
  if not isinstance(mask, dict):
    return tree if mask == value else None
  parts = {name: _select(tree[name], mask[name], value) for name in mask}
  return {name: part for name, part in parts.items() if not (part is None or isinstance(part, dict) and not part)}


def _pick(tree, like):
  """Return the branches of a nested dict that another one has."""
  return {name: _pick(tree[name], like[name]) for name in like} if isinstance(like, dict) else tree


def _union(one, other):
  """Return the nested dict with the leaves of both."""
  if not other:
    return one
  if not (isinstance(one, dict) and isinstance(other, dict)):
    raise ValueError('a parameter both trains and is frozen')
  return {name: _union(one[name], other[name]) if name in one and name in other else one.get(name, other.get(name))
          for name in sorted({*one, *other})}
