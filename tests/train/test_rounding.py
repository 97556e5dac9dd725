"""Stochastic rounding to bfloat16, its bits and its mean, and moments that are kept so."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from llmjax.model.model import Model
from llmjax.model.spec import ModelSpec
from llmjax.parallel.mesh import make_mesh
from llmjax.parallel.spec import MeshSpec
from llmjax.train.optimizers import OPTIMIZERS, make_optimizer
from llmjax.train.rounding import keep_moments, round_stochastically
from llmjax.train.spec import OptimizerSpec
from llmjax.train.state import abstract_state
from llmjax.train.trainable import whole_model

rounded = jax.jit(round_stochastically)


def neighbours(x):
  """The bfloat16 values below and above float32 x in magnitude, by NumPy's bits."""
  low = (np.float32(x).view(np.uint32) >> 16) << 16
  return low.view(np.float32), (low + np.uint32(1 << 16)).view(np.float32)


@pytest.mark.parametrize('part', [0.1, 0.5, 0.87])
@pytest.mark.parametrize('scale', [1.7, -3e-9, 5e30, 1e-40])
def test_rounds_up_as_often_as_it_is_near(scale, part):
  low, high = neighbours(np.float32(scale))
  x = np.float32(np.float64(low) + part * (np.float64(high) - np.float64(low)))
  exact = (np.float64(x) - np.float64(low)) / (np.float64(high) - np.float64(low))
  n = 1 << 16
  found = np.asarray(rounded(jnp.full(n, x), jax.random.key(3))).astype(np.float32)
  assert set(found.view(np.uint32)) == {low.view(np.uint32), high.view(np.uint32)}
  up = np.mean(found.view(np.uint32) == high.view(np.uint32))
  assert up == pytest.approx(exact, abs=5 * np.sqrt(exact * (1 - exact) / n))


def test_the_mean_is_unbiased():
  x = jax.random.normal(jax.random.key(0), (64,)) * jnp.exp(jax.random.normal(jax.random.key(1), (64,)) * 5)
  n = 4096
  found = jax.vmap(lambda k: rounded(x, k))(jax.random.split(jax.random.key(2), n))
  step = np.abs(np.subtract(*neighbours(np.asarray(x))))
  z = (np.mean(np.asarray(found, np.float64), 0) - x) / (step / 2 / np.sqrt(n))  # At most step/2 deviation.
  assert np.abs(z).max() < 5
  nearest = np.asarray(x.astype(jnp.bfloat16).astype(jnp.float32)) - x  # This test would see a bias.
  assert np.abs(nearest / (step / 2 / np.sqrt(n))).max() > 20


def test_exact_values_and_specials_stay():
  exact = np.array([0.0, -0.0, 1.0, -2.5, 3.3895314e38, -3.3895314e38, np.inf, -np.inf, 2**-126], np.float32)
  for seed in range(20):
    found = np.asarray(rounded(exact, jax.random.key(seed))).astype(np.float32)
    np.testing.assert_array_equal(found.view(np.uint32), exact.view(np.uint32))
    # The quiet and the signalling NaN, and both largest numbers: none may become another kind.
    odd = np.array([0x7fc00000, 0x7f800001, 0xffffffff, 0x7f7fffff, 0xff7fffff], np.uint32).view(np.float32)
    found = np.asarray(rounded(odd, jax.random.key(seed))).astype(np.float32)
    assert np.isnan(found[:3]).all()
    assert np.isfinite(found[3:]).all()


def round_to_nearest(tx):
  """Moments in bfloat16 the plain way."""
  cast = lambda tree, dtype: jax.tree.map(
      lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)

  def update(grads, state, params=None):
    updates, state = tx.update(grads, cast(state, jnp.float32), params)
    return updates, cast(state, jnp.bfloat16)

  return optax.GradientTransformation(lambda p: cast(tx.init(p), jnp.bfloat16), update)


def minimize(tx, steps=3000):
  """Loss of a least-squares problem whose first gradients are far larger than its later ones."""
  matrix = jax.random.normal(jax.random.key(0), (64, 32))
  target = matrix @ jax.random.normal(jax.random.key(1), (32,))
  loss = lambda p: jnp.mean((matrix @ p['kernel'] - target)**2)
  params = {'kernel': jnp.full((32,), 20.0)}

  def step(carry, _):
    params, state = carry
    updates, state = tx.update(jax.grad(loss)(params), state, params)
    return (optax.apply_updates(params, updates), state), None

  (params, state), _ = jax.jit(lambda: jax.lax.scan(step, (params, tx.init(params)), length=steps))()
  return float(loss(params)), state


def test_training_is_as_with_float32_moments_where_the_nearest_stalls():
  """b2 = 0.999: a second moment falls by 0.1% a step, less than half of bfloat16's spacing."""
  tx = optax.adam(0.05, b2=0.999)
  wide, _ = minimize(tx)
  narrow, state = minimize(keep_moments(tx, 'bfloat16', 0))
  nearest, _ = minimize(round_to_nearest(tx))
  assert state.inner[0].nu['kernel'].dtype == jnp.bfloat16
  assert narrow == pytest.approx(wide, rel=0.5)
  assert nearest > 50 * narrow


def test_a_second_moment_follows_its_closed_form():
  tx = keep_moments(optax.scale_by_adam(b2=0.999), 'bfloat16', 0)
  params = {'w': jnp.zeros(2048)}

  def step(state, g):
    return tx.update({'w': jnp.full(2048, g)}, state)[1], None

  grads = jnp.concatenate([jnp.full(200, 1.0), jnp.full(1800, 0.05)])
  state = jax.jit(lambda: jax.lax.scan(step, tx.init(params), grads)[0])()
  expected = 0.0
  for g in np.asarray(grads, np.float64):
    expected = 0.999 * expected + 0.001 * g * g
  assert int(state.count) == int(state.inner.count) == 2000
  assert float(state.inner.nu['w'].astype(jnp.float32).mean()) == pytest.approx(expected, rel=0.01)


@pytest.mark.devices(8)
@pytest.mark.parametrize('name', OPTIMIZERS)
def test_every_optimizer_keeps_its_moments_narrow_and_all_else_as_it_is(name):
  model = ModelSpec(num_layers=2, d_model=32, num_heads=4, mlp_dim=64, vocab_size=96)
  mesh = make_mesh(MeshSpec(data=2, fsdp=2, tensor=2))
  spec = OptimizerSpec(name=name, moment_dtype='bfloat16')
  tx, _ = make_optimizer(spec, 10, seed=1)
  wide, _ = make_optimizer(OptimizerSpec(name=name), 10)
  state = abstract_state(whole_model(model), tx, mesh)
  shardings = jax.tree.map(lambda x: x.sharding, state)
  expected = jax.eval_shape(wide.init, state.params)
  assert jax.tree.structure(state.opt_state.inner) == jax.tree.structure(expected)
  shapes = {p.shape for p in jax.tree.leaves(state.params)}
  narrow = 0
  for before, after in zip(jax.tree.leaves(expected), jax.tree.leaves(state.opt_state.inner), strict=True):
    moment = before.dtype == jnp.float32 and before.shape in shapes
    assert after.dtype == (jnp.bfloat16 if moment else before.dtype)
    narrow += moment
  assert narrow >= len(jax.tree.leaves(state.params)) // (2 if name == 'muon' else 1)
  # A moment lies as its parameter does.
  gate = [s.spec for path, s in jax.tree_util.tree_flatten_with_path(shardings.opt_state)[0]
          if "['mlp']['gate']" in jax.tree_util.keystr(path) and s.spec != P(None) and s.spec]
  assert gate
  assert set(gate) <= {shardings.params['blocks']['mlp']['gate'].spec, P(None, None)}
  assert shardings.params['blocks']['mlp']['gate'].spec in gate


@pytest.mark.slow
@pytest.mark.devices(8)
def test_the_bits_do_not_depend_on_the_mesh():
  tx = keep_moments(optax.scale_by_adam(), 'bfloat16', 5)
  params = {'a': jnp.zeros((16, 8)), 'b': jnp.zeros((32,))}
  grads = jax.tree.map(lambda p: jax.random.normal(jax.random.key(p.size), p.shape), params)

  def two_steps(grads):
    state = tx.init(params)
    for _ in range(2):
      _, state = tx.update(grads, state)
    return state

  one = jax.jit(two_steps)(grads)
  mesh = make_mesh(MeshSpec(data=2, fsdp=4))
  spread = jax.device_put(grads, jax.NamedSharding(mesh, P('fsdp')))
  many = jax.jit(two_steps)(spread)
  assert not many.inner.nu['a'].sharding.is_fully_replicated
  jax.tree.map(np.testing.assert_array_equal, one, many)
  other = keep_moments(optax.scale_by_adam(), 'bfloat16', 6)
  assert (jax.jit(lambda g: other.update(g, other.init(params))[1])(grads).inner.mu['a'] !=
          jax.jit(lambda g: tx.update(g, tx.init(params))[1])(grads).inner.mu['a']).any()


def test_moments_are_float32_for_narrow_parameters_too():
  params = {'kernel': jax.ShapeDtypeStruct((8, 8), jnp.bfloat16)}
  tx, _ = make_optimizer(OptimizerSpec(), 10)
  before = jax.eval_shape(tx.init, params)
  updates, after = jax.eval_shape(tx.update, params, before, params)
  kinds = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  assert kinds(before) == kinds(after)
  assert {x.dtype for x in jax.tree.leaves(after) if x.ndim} == {jnp.dtype('float32')}
  assert jax.eval_shape(optax.apply_updates, params, updates)['kernel'].dtype == jnp.bfloat16


def test_abstract_parameters_have_the_same_state():
  model = ModelSpec(num_layers=1, d_model=8, num_heads=2, mlp_dim=16, vocab_size=32)
  tx, _ = make_optimizer(OptimizerSpec(moment_dtype='bfloat16'), 10)
  params = Model(model).abstract_params()
  state = jax.eval_shape(tx.init, params)
  again = jax.eval_shape(lambda p, s: tx.update(p, s, p)[1], params, state)
  kinds = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  assert kinds(state) == kinds(again)
