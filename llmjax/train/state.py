"""TrainState, made sharded."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import NamedSharding

from llmjax.model.model import Model
from llmjax.parallel import sharding


@struct.dataclass
class TrainState:
  """All that a step reads and writes.

  step: int32, optimizer steps done.  key: PRNG key that every step's randomness is folded from.  frozen:
  {name: tree of arrays} that the loss reads and the step passes on, such as the base of adapters or a reference model.
  They have no gradient and no optimizer state.
  """

  step: jax.Array
  params: dict
  opt_state: tuple
  key: jax.Array
  frozen: dict = struct.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Trained:
  """What a run trains where that is not the model's own parameters.

  init: function of a key, and of the inputs, that returns them.  names: the tree of their logical axis
  names.  inputs: trees of arrays, or of ShapeDtypeStructs where only shapes are asked for.
  """

  init: Callable
  names: Any
  inputs: tuple = ()


def init_state(model, tx, seed, param_dtype, mesh, zero=0, trained=None, frozen=None):
  """Returns (state, shardings); made sharded, so that no device ever holds the whole model.

  zero: 1 shares the optimizer's state over `data` as well, 3 the parameters too.  trained: Trained; None:
  the model's parameters.  frozen: a tree of arrays that lie as they are to lie.
  """
  trained = trained or _whole(model, param_dtype)

  def init(*inputs):
    key, params_key = jax.random.split(jax.random.key(seed))
    return _make(trained.init(params_key, *inputs), tx, jax.random.key_data(key))

  shardings = state_shardings(jax.eval_shape(init, *trained.inputs), trained.names, mesh, zero)
  state = jax.jit(init, out_shardings=shardings)(*trained.inputs)
  layout = jax.tree.map(lambda x: x.sharding, frozen)
  return state.replace(frozen=frozen or {}), shardings.replace(frozen=layout or {})


def abstract_state(model, tx, param_dtype, mesh, zero=0, trained=None):
  """Returns the TrainState of ShapeDtypeStructs with their shardings: what a checkpoint restores into.

  Its `frozen` is empty: checkpoints leave out what does not change.
  """
  trained = trained or _whole(model, param_dtype)

  def init(*inputs):
    return _make(trained.init(jax.random.key(0), *inputs), tx, jax.random.key_data(jax.random.key(0)))

  shapes = jax.eval_shape(init, *trained.inputs)
  shardings = state_shardings(shapes, trained.names, mesh, zero)
  return jax.tree.map(lambda s, n: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=n), shapes,
                      shardings)


def abstract_params(model, param_dtype, mesh, zero=0):
  """Returns the ShapeDtypeStructs of a model's parameters with their shardings."""
  model = Model(model)
  layout = sharding.tree_shardings(mesh, model.param_names(), zero_rules(zero, 3))
  return jax.tree.map(lambda s, n: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=n),
                      model.abstract_params(param_dtype), layout)


def _whole(model, param_dtype):
  model = Model(model)
  return Trained(lambda key: model.init(key, jnp.dtype(param_dtype)), model.param_names())


def _make(params, tx, key):
  return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=tx.init(params), key=key)


def state_shardings(state, names, mesh, zero=0):
  """Returns the sharding of every leaf; optimizer moments follow their parameter."""
  rules = [zero_rules(zero, stage) for stage in (1, 3)]
  replicated = NamedSharding(mesh, jax.sharding.PartitionSpec())
  return TrainState(
      step=replicated,
      params=sharding.tree_shardings(mesh, names, rules[1]),
      opt_state=sharding.tree_shardings(
          mesh, sharding.state_names(state.opt_state, state.params, names), rules[0]),
      key=replicated)


def zero_rules(zero, stage):
  """Returns the sharding rules of what ZeRO's `stage` shares over `data`; zero: the stage that is asked for."""
  return sharding.ZERO_RULES if zero >= stage else sharding.TRAIN_RULES
