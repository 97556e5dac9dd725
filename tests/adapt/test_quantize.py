"""Quantized weights: exact codes, bounded errors, sizes, and products with them."""

import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.adapt.quantize import NF4, block_size, quantize, quantize_tree
from llmjax.config import ConfigError
from llmjax.model.model import Model
from llmjax.model.spec import ModelSpec
from llmjax.ops.products import dense, project
from llmjax.parallel.sharding import WeightLayout


def weights(shape=(3, 128, 2, 64), seed=0):
  return jax.random.normal(jax.random.key(seed), shape) * jnp.exp(
      jax.random.normal(jax.random.key(seed + 1), (*shape[:2], *[1] * (len(shape) - 2))))


def test_the_values_of_nf4_are_quantiles_of_a_normal_distribution():
  """By the paper's construction: 8 and 9 quantiles on the two sides, both with 0, scaled to [-1, 1]."""
  quantile, end = statistics.NormalDist().inv_cdf, 0.9677083
  positive = [quantile(p) for p in np.linspace(end, 0.5, 9)[:-1]]
  negative = [-quantile(p) for p in np.linspace(end, 0.5, 8)[:-1]]
  np.testing.assert_allclose(NF4, np.sort([*negative, 0, *positive]) / max(positive), atol=2e-6)


@pytest.mark.parametrize(('kind', 'bits'), [('int8', 8), ('nf4', 4)])
def test_every_value_is_within_half_a_step(kind, bits):
  w = weights()
  q = jax.jit(lambda w: quantize(w, kind, 3))(w)
  found = jax.jit(dense)(q)
  assert (q.shape, q.ndim, found.dtype) == (w.shape, w.ndim, jnp.float32)
  largest = np.abs(w).max(-1, keepdims=True)  # A block is the last axis, 64 long.
  assert block_size(64) == 64
  gap = max(np.diff(NF4)) / 2 if kind == 'nf4' else 0.5 / 127
  # The scales' own rounding: half an int8 step of the spread of logarithms within an entry of the first axis.
  logs = np.log(largest)
  spread = np.abs(logs - logs.mean((1, 2, 3), keepdims=True)).max((2, 3), keepdims=True)
  assert np.all(np.abs(found - w) <= gap * largest + 1.01 * np.expm1(spread / 254) * largest + 1e-6)
  if kind == 'nf4':  # Each code is the nearest value.
    scale = np.exp(np.asarray(q.scales, np.float32)[..., None] / 127 * np.asarray(q.step)[..., None, None, None]
                   + np.asarray(q.mean)[:, None, None, None, None])
    ratio = np.clip(np.asarray(w) / scale[..., 0], -1, 1)
    best = np.abs(ratio[..., None] - np.asarray(NF4, np.float32)).min(-1)
    np.testing.assert_allclose(np.abs(np.asarray(found) / scale[..., 0] - ratio), best, atol=1e-5)
  size = sum(x.nbytes for x in jax.tree.leaves(q))
  assert 8 * size / w.size == pytest.approx(bits + 8 / 64, abs=0.3)


@pytest.mark.parametrize(('kind', 'most'), [('int8', 1.1), ('nf4', 1.01)])
def test_an_outlier_does_not_affect_other_blocks(kind, most):
  """With maxima rounded linearly, an outlier of 100 times the rest made int8's errors 4.8 times larger in its row."""
  w = np.random.default_rng(0).normal(size=(8, 4096)).astype(np.float32)
  outlier = w.copy()
  outlier[0, 3] = 300.0
  errors = [np.asarray(jax.jit(dense)(quantize(jnp.asarray(a), kind, 2)) - a)[:, block_size(4096):]
            for a in (w, outlier)]
  before, after = (np.sqrt(np.square(e).mean(1)) for e in errors)
  assert np.all(after <= most * before)


def test_blocks_of_zeros_stay_zero_and_do_not_affect_others():
  w = np.random.default_rng(0).normal(size=(4, 256)).astype(np.float32)
  w[:, 64:128] = 0
  w[1] = 0
  found = np.asarray(dense(quantize(jnp.asarray(w), 'int8', 2)))
  assert not found[w == 0].any()
  np.testing.assert_allclose(found, w, atol=0.6 / 127 * np.abs(w).max())


@pytest.mark.slow
def test_products_and_layers_accept_quantized_weights():
  w, x = weights((2, 24, 40)), jax.random.normal(jax.random.key(5), (4, 24))
  q = quantize(w, 'nf4', 2)
  one = jax.tree.map(lambda leaf: leaf[1], q)
  layout = WeightLayout(('embed', 'mlp'))
  np.testing.assert_allclose(project(x, one, 1, layout), x @ dense(q)[1], rtol=1e-4, atol=1e-5)
  gradient = jax.grad(lambda x: jnp.sum(jnp.sin(project(x, one))))(x)
  expected = jax.grad(lambda x: jnp.sum(jnp.sin(x @ dense(q)[1])))(x)
  np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-5)
  assert project(x.astype(jnp.bfloat16), one).dtype == jnp.bfloat16


def test_zeros_and_odd_axes():
  assert np.all(np.asarray(dense(quantize(jnp.zeros((4, 6)), 'int8', 2))) == 0)
  with pytest.raises(ConfigError, match='odd last axis; write int8'):
    quantize(jnp.ones((4, 7)), 'nf4', 2)
  np.testing.assert_allclose(dense(quantize(jnp.ones((4, 7)), 'int8', 2)), 1.0, rtol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize('experts', [pytest.param(0, marks=pytest.mark.slow), 4])
def test_a_quantized_model(experts):
  """Only the blocks' matrices are quantized; the outputs equal those with the dequantized values."""
  model = ModelSpec(num_layers=2, d_model=32, num_heads=2, mlp_dim=48, vocab_size=64, num_experts=experts,
                    tie_embeddings=True)
  params = jax.jit(Model(model).init)(jax.random.key(0))
  tokens = jax.random.randint(jax.random.key(1), (2, 8), 0, 64)

  @jax.jit
  def logits(params):
    batch = {'tokens': tokens, 'positions': jnp.tile(jnp.arange(8), (2, 1)), 'segment_ids': jnp.ones_like(tokens)}
    return Model(model).logits(params, Model(model).apply(params, batch)[0])

  quantized = quantize_tree(params, 'int8')
  plain = jax.tree.map(dense, quantized, is_leaf=lambda x: hasattr(x, 'dense'))
  assert quantized['embed']['table'] is params['embed']['table']
  router = ('blocks', 'mlp', 'router') if experts else ('blocks', 'mlp_norm', 'scale')
  at = lambda tree: tree[router[0]][router[1]][router[2]]
  assert at(quantized) is at(params)
  assert hasattr(quantized['blocks']['mlp']['gate'], 'codes')
  np.testing.assert_allclose(logits(quantized), logits(plain), atol=1e-5)
  error = np.abs(logits(quantized) - logits(params))
  assert 0 < error.max() < 0.1 * np.abs(logits(params)).max()
