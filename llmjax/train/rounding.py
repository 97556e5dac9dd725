"""Optimizer moments in a narrow dtype, rounded at random so that small changes are not lost."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from llmjax.parallel.sharding import mirrored


class MomentsState(NamedTuple):
  """count: int32, updates done, which the next rounding's randomness is folded from.  inner: tx's state."""

  count: jax.Array
  inner: Any


def keep_moments(tx, dtype, seed=0):
  """Returns tx with its moments kept in `dtype` (float32 or bfloat16), and its arithmetic in float32.

  A moment is a floating leaf of the state with the path and the shape of a parameter; all others (counts,
  factored statistics) stay as tx makes them.  bfloat16 moments are widened for the update and rounded
  stochastically on the way back: with b2 = 0.999 a second moment changes by less than 0.1% a step where it
  falls, and bfloat16's values are 0.4 to 0.8% apart, so rounded to the nearest it would never fall.  The
  random bits depend on the seed, the count and the moment's place in the tree, not on the mesh.
  """
  tx = optax.with_extra_args_support(tx)
  dtype = jnp.dtype(dtype)
  if dtype == jnp.float32:
    return optax.GradientTransformationExtraArgs(
        lambda params: tx.init(_widen(params)),
        lambda grads, state, params=None, **extra: tx.update(_widen(grads), state, params, **extra))

  def init(params):
    inner = tx.init(_widen(params))
    inner = _map_moments(lambda x: x.astype(dtype), inner, params)
    return MomentsState(jnp.zeros((), jnp.int32), inner)

  def update(grads, state, params=None, **extra):
    wide = _map_moments(lambda x: x.astype(jnp.float32), state.inner, grads)
    updates, wide = tx.update(_widen(grads), wide, params, **extra)
    key = jax.random.fold_in(jax.random.key(seed, impl='threefry2x32'), state.count)
    keys = (jax.random.fold_in(key, i) for i in range(len(jax.tree.leaves(wide))))
    inner = _map_moments(lambda x: round_stochastically(x, next(keys)), wide, grads)
    return updates, MomentsState(optax.safe_increment(state.count), inner)

  return optax.GradientTransformationExtraArgs(init, update)


def round_stochastically(x, key):
  """Returns float32 x in bfloat16: one of its two neighbours there, the nearer the likelier.

  The mean over keys is x (arXiv:1502.02551, section 3.2).  What bfloat16 holds exactly, infinities and NaN
  stay as they are, and no finite number becomes infinite.
  """
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
  # bfloat16 is the upper half of a float32.  The lower half, as a part of 2^16, is the way to the next
  # value, and so is the chance that adding a random lower half carries into the upper.
  noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
  upper = lambda b: jax.lax.bitcast_convert_type((b >> 16).astype(jnp.uint16), jnp.bfloat16)
  rounded = upper(bits + noise)
  rounded = jnp.where(jnp.isinf(rounded), upper(bits), rounded)
  return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))


def _widen(tree):
  return jax.tree.map(
      lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def _map_moments(function, state, params):
  """Returns the state with the function applied to its moments.  params: a tree like the parameters."""
  return jax.tree.map(
      lambda leaf, name: function(leaf) if name and jnp.issubdtype(leaf.dtype, jnp.floating) else leaf,
      state, mirrored(state, params))
