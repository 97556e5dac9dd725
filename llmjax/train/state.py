"""TrainState, made sharded."""

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import NamedSharding

from llmjax.model import decoder
from llmjax.parallel import sharding


@struct.dataclass
class TrainState:
  """All that a step reads and writes.

  step: int32, optimizer steps done.  key: PRNG key that every step's randomness is folded from.
  """

  step: jax.Array
  params: dict
  opt_state: tuple
  key: jax.Array


def init_state(model, tx, seed, param_dtype, mesh, zero=0):
  """Returns (state, shardings); made sharded, so that no device ever holds the whole model.

  zero: 1 shares the optimizer's state over `data` as well, 3 the parameters too.
  """

  def init():
    key, params_key = jax.random.split(jax.random.key(seed))
    params = decoder.init_params(model, params_key, jnp.dtype(param_dtype))
    return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=tx.init(params),
                      key=jax.random.key_data(key))

  shardings = state_shardings(jax.eval_shape(init), decoder.param_names(model), mesh, zero)
  return jax.jit(init, out_shardings=shardings)(), shardings


def abstract_state(model, tx, param_dtype, mesh, zero=0):
  """Returns the TrainState of ShapeDtypeStructs with their shardings: what a checkpoint restores into."""

  def init():
    params = decoder.init_params(model, jax.random.key(0), jnp.dtype(param_dtype))
    return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=tx.init(params),
                      key=jax.random.key_data(jax.random.key(0)))

  shapes = jax.eval_shape(init)
  shardings = state_shardings(shapes, decoder.param_names(model), mesh, zero)
  return jax.tree.map(lambda s, n: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=n), shapes,
                      shardings)


def state_shardings(state, names, mesh, zero=0):
  """Returns the sharding of every leaf; optimizer moments follow their parameter."""
  rules = [sharding.ZERO_RULES if zero >= stage else sharding.TRAIN_RULES for stage in (1, 3)]
  replicated = NamedSharding(mesh, jax.sharding.PartitionSpec())
  return TrainState(
      step=replicated,
      params=sharding.tree_shardings(mesh, names, rules[1]),
      opt_state=sharding.tree_shardings(
          mesh, sharding.state_names(state.opt_state, state.params, names), rules[0]),
      key=replicated)
