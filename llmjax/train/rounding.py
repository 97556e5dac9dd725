"""Optimizer moments in bfloat16, with stochastic rounding."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from llmjax.parallel.sharding import mirrored


class MomentsState(NamedTuple):
  """count: int32, number of updates, from which the key of the next rounding is folded.  inner: state of tx."""

  count: jax.Array
  inner: Any


def keep_moments(tx, dtype, seed=0):
  """Return tx with its moments stored in `dtype` (float32 or bfloat16) and its arithmetic in float32.

  A moment is a floating-point leaf of the state with the path and shape of a parameter.  Other leaves (counts,
  factored statistics) keep their dtype.  bfloat16 moments are cast to float32 for the update and rounded stochastically
  afterwards.  Rounding to nearest would not do: with b2 = 0.999 a second moment decays by less than 0.1% per step,
  while neighbouring bfloat16 values are 0.4 to 0.8% apart.  The random bits depend on the seed, the count, and the
  index of the moment in the tree, not on the mesh.
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
  """Round float32 x to bfloat16 stochastically (arXiv:1502.02551, section 3.2).

  The result is one of the two neighbouring bfloat16 values; its expectation is x.  Exactly representable values,
  infinities and NaN are unchanged, and no finite value becomes infinite.
  """
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
  # bfloat16 is the upper half of a float32.  The lower half, divided by 2^16, is the distance to the next value, and
  # also the probability that adding 16 random bits carries into the upper half.
  noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
  upper = lambda b: jax.lax.bitcast_convert_type((b >> 16).astype(jnp.uint16), jnp.bfloat16)
  rounded = upper(bits + noise)
  rounded = jnp.where(jnp.isinf(rounded), upper(bits), rounded)
  return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))


def _widen(tree):
  return jax.tree.map(
      lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def _map_moments(function, state, params):
  """Apply the function to the moments in an optimizer state.  params: tree with the structure of the parameters."""
  return jax.tree.map(
      lambda leaf, name: function(leaf) if name and jnp.issubdtype(leaf.dtype, jnp.floating) else leaf,
      state, mirrored(state, params))
