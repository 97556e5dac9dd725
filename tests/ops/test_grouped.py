"""The TPU kernels of grouped products, emulated, against XLA's ragged products and loops in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.ops import grouped, moe

M, K, N = 90, 128, 200
SIZES = {'all rows, an empty block': [10, 0, 47, 33], 'one block': [0, 0, 90, 0], 'no rows': [0, 0, 0, 0],
         'rows behind the last block': [1, 31, 0, 33], 'several blocks in a tile': [5, 6, 7, 9]}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
  """Several tiles, the last one not full, and several parts of a matrix."""
  monkeypatch.setattr(grouped, 'TILE', 32)
  monkeypatch.setattr(grouped, 'COLUMNS', 128)


def draw(*shape, seed=0, dtype=jnp.float32):
  return jax.random.normal(jax.random.key(seed), shape, dtype)


def blocks(sizes):
  ends = np.cumsum(sizes)
  return [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]


@pytest.mark.parametrize('sizes', SIZES.values(), ids=SIZES)
def test_kernels_equal_loops(sizes):
  rows, matrices, others = draw(M, K), draw(4, K, N, seed=1), draw(M, N, seed=2)
  total = sum(sizes)
  # What lies behind the last block must not matter, whatever it is.
  rows, others = (a.at[total:].set(jnp.nan) for a in (rows, others))
  counts = jnp.array(sizes, jnp.int32)
  forward = grouped.multiply(rows, matrices, counts, emulate=True)
  back = grouped.multiply(others, matrices, counts, transposed=True, emulate=True)
  sums = grouped.outer(rows, others, counts, emulate=True)
  wide = lambda a: np.asarray(a, np.float64)
  for e, own in enumerate(blocks(sizes)):
    np.testing.assert_allclose(forward[own], wide(rows[own]) @ wide(matrices[e]), atol=1e-4)
    np.testing.assert_allclose(back[own], wide(others[own]) @ wide(matrices[e]).T, atol=1e-4)
    np.testing.assert_allclose(sums[e], wide(rows[own]).T @ wide(others[own]), atol=1e-4)


def test_sums_of_bfloat16_are_float32():
  rows, others = draw(M, K, dtype=jnp.bfloat16), draw(M, N, seed=1, dtype=jnp.bfloat16)
  found = grouped.outer(rows, others, jnp.array([M], jnp.int32), emulate=True)
  exact = np.asarray(rows, np.float64).T @ np.asarray(others, np.float64)
  # Rounded once, at the end: sums of three tiles in bfloat16 would be off by more.
  np.testing.assert_allclose(np.asarray(found[0], np.float64), exact, rtol=2**-8, atol=1e-4)


def test_estimates_count_the_tiles_that_are_visited(monkeypatch):
  """32768 rows in 8 blocks: 128 tiles of 256 rows, and 7 in which two blocks meet."""
  shapes = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((32768, 512), (8, 512, 1024), (32768, 1024))]
  sizes = jax.ShapeDtypeStruct((8,), jnp.int32)
  monkeypatch.setattr(grouped, 'TILE', 256)
  for kernel, sides in ((grouped.multiply, shapes[:2]), (grouped.outer, shapes[::2])):
    call = next(e for e in jax.make_jaxpr(kernel)(*sides, sizes).eqns if e.primitive.name == 'pallas_call')
    assert call.params['cost_estimate'].flops == 2 * 135 * 256 * 512 * 1024


@pytest.mark.slow
@pytest.mark.parametrize('first, here', [(0, 4), (2, 2), (1, 2)])
def test_dropless_through_the_kernels_equals_ragged_dot(monkeypatch, first, here):
  """Values and all gradients, of experts that are all here and of a part of them."""
  tokens, k, d, f = 24, 2, 128, 256
  x, logits = draw(tokens, d), draw(tokens, 4, seed=1)
  weights, ids, _ = moe.route(logits, k)
  matrices = tuple(0.1 * draw(here, *s, seed=i) for i, s in enumerate([(d, f), (d, f), (f, d)]))
  seen = draw(tokens, d, seed=5)

  def total(x, weights, matrices):
    return jnp.sum(moe.dropless(x, weights, ids, *matrices, jax.nn.silu, first) * seen)

  plain = jax.value_and_grad(total, argnums=(0, 1, 2))(x, weights, matrices)
  used = []

  def choose(*args, tpu, default):
    used.append(tpu)
    return tpu(*args)

  for name in ('multiply', 'outer'):
    kernel = getattr(grouped, name)
    monkeypatch.setattr(grouped, name, lambda *args, kernel=kernel, **options: kernel(*args, **options, emulate=True))
  monkeypatch.setattr(jax.lax, 'platform_dependent', choose)
  found = jax.value_and_grad(total, argnums=(0, 1, 2))(x, weights, matrices)
  assert len(used) == 6
  for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(plain), strict=True):
    assert float(jnp.abs(theirs).max()) > 0
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
