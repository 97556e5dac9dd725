"""TrainState, created sharded."""

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import NamedSharding

from llmjax.parallel import sharding
from llmjax.parallel.sharding import zero_rules


@struct.dataclass
class TrainState:
  """Everything that a training step reads and writes.

  step: int32, optimizer steps done.  params: the parameters that train.  key: PRNG key data from which the randomness
  of each step is folded.  frozen: {name: tree of arrays} that the loss reads and the step returns unchanged: the base
  of adapters, parameters that a pattern freezes, a reference model, a teacher.  They have no gradient and no optimizer
  state.
  """

  step: jax.Array
  params: dict
  opt_state: tuple
  key: jax.Array
  frozen: dict = struct.field(default_factory=dict)


def init_state(trainable, tx, seed, mesh, zero=0, frozen=None, initialize=None):
  """Return a new TrainState, created sharded, so that no device ever holds the whole model.

  trainable: Trainable.  zero: ZeRO stage; 1 shards the optimizer state over `data` as well, 3 the parameters too.
  frozen: {name: tree of arrays}, placed already.  initialize: function of the random parameters to the initial ones
  with the same shardings, such as those of a checkpoint.
  """
  frozen = frozen or {}
  key, params_key = jax.random.split(jax.random.key(seed))
  params = jax.jit(trainable.init, out_shardings=_params_layout(trainable, mesh, zero))(params_key, frozen)
  if initialize is not None:
    params = initialize(params)
  params, rest = trainable.split(params)
  layout = _opt_state_layout(trainable, tx, params, mesh, zero)
  replicated = NamedSharding(mesh, jax.sharding.PartitionSpec())
  rest = {**frozen, **rest}
  return TrainState(step=jax.device_put(jnp.zeros((), jnp.int32), replicated), params=params,
                    opt_state=jax.jit(tx.init, out_shardings=layout)(params),
                    key=jax.device_put(jax.random.key_data(key), replicated), frozen=rest)


def abstract_state(trainable, tx, mesh, zero=0):
  """Return the TrainState of `init_state` as ShapeDtypeStructs with shardings."""
  frozen = trainable.abstract_base(mesh, zero)
  shapes = jax.eval_shape(trainable.init, jax.random.key(0), frozen)
  params, rest = trainable.split(_place(shapes, _params_layout(trainable, mesh, zero)))
  replicated = NamedSharding(mesh, jax.sharding.PartitionSpec())
  opt_state = _place(jax.eval_shape(tx.init, params), _opt_state_layout(trainable, tx, params, mesh, zero))
  scalars = {'step': jax.eval_shape(lambda: jnp.zeros((), jnp.int32)),
             'key': jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))}
  return TrainState(params=params, opt_state=opt_state, frozen={**frozen, **rest},
                    **{name: _place(s, replicated) for name, s in scalars.items()})


def _place(shapes, layout):
  return jax.tree.map(lambda s, n: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=n), shapes, layout)


def _params_layout(trainable, mesh, zero):
  return sharding.tree_shardings(mesh, trainable.names, zero_rules(zero, 3))


def _opt_state_layout(trainable, tx, params, mesh, zero):
  """Return the shardings of the optimizer state: moments follow their parameter."""
  names = trainable.trained_names(params)
  return sharding.tree_shardings(mesh, sharding.state_names(jax.eval_shape(tx.init, params), params, names),
                                 zero_rules(zero, 1))
