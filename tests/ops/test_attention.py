"""Attention against a NumPy double loop, and its gradients against those of the plain form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies

from llmjax.ops import blockwise as module
from llmjax.ops.attention import attention
from llmjax.ops.masks import Mask

PLAIN = ('blockwise', 'reference')  # Kernels are tested in test_kernels.py.


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  """Several blocks and a ragged last one at lengths that are quick to test."""
  monkeypatch.setattr(module, 'BLOCK', 8)
  monkeypatch.setattr(module, 'MAX_BLOCKS', 4)


def numpy_attention(q, k, v, q_ids, k_ids, window=None, soft_cap=None, scale=None, causal=True, prefix=None):
  """Float64, one query and head at a time.  ids: (segment_ids, positions)."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  (q_segment, q_position), (k_segment, k_position) = q_ids, k_ids
  group = q.shape[2] // k.shape[2]
  scale = q.shape[-1]**-0.5 if scale is None else scale
  out = np.zeros(q.shape)
  for b, t, n in np.ndindex(*q.shape[:3]):
    distance = q_position[b, t] - k_position[b]
    seen = q_segment[b, t] == k_segment[b]
    if causal:
      seen &= (distance >= 0) | (False if prefix is None else prefix[b])
    if window is not None:
      seen &= np.abs(distance) < window
    if not seen.any():
      continue
    logits = scale * k[b, seen, n // group] @ q[b, t, n]
    if soft_cap is not None:
      logits = soft_cap * np.tanh(logits / soft_cap)
    p = np.exp(logits - logits.max())
    out[b, t, n] = p / p.sum() @ v[b, seen, n // group]
  return out


def draw(length, keys=None, heads=4, kv_heads=2, head_dim=8, batch=2, seed=0, dtype=jnp.float32):
  shapes = ((batch, length, heads, head_dim), *((batch, keys or length, kv_heads, head_dim),) * 2)
  draws = zip(jax.random.split(jax.random.key(seed), 3), shapes, strict=True)
  return tuple(2 * jax.random.normal(k, s, dtype) for k, s in draws)


def packed_ids(lengths, total):
  """(segment_ids, positions) int32 [1, total] of documents of these lengths, then padding."""
  parts = [*lengths, total - sum(lengths)]
  numbers = [*range(1, len(lengths) + 1), 0]
  segment = np.concatenate([np.full(n, i) for n, i in zip(parts, numbers, strict=True)])
  position = np.concatenate([np.arange(n) for n in parts])
  return segment[None].astype(np.int32), position[None].astype(np.int32)


def rows(*packed):
  return tuple(np.concatenate(part) for part in zip(*packed, strict=True))


@functools.partial(jax.jit, static_argnames=('window', 'causal', 'soft_cap', 'scale', 'implementation', 'aligned'))
def call(q, k, v, q_ids, k_ids, prefix=None, window=None, causal=True, aligned=True, **options):
  mask = Mask(q_ids[1], q_ids[0], k_ids[1], k_ids[0], prefix, causal, window, aligned)
  return attention(q, k, v, mask, **options)


IDS = rows(packed_ids([5, 1, 12], 21), packed_ids([21], 21))
PREFIX = np.arange(21)[None] % 7 < 3
OPTIONS = [{}, {'window': 9, 'soft_cap': 2.0, 'scale': 0.7}, {'causal': False}, {'causal': False, 'window': 4},
           {'prefix': np.repeat(PREFIX, 2, axis=0)}, {'prefix': np.repeat(PREFIX, 2, axis=0), 'window': 6}]


@pytest.mark.parametrize('implementation', PLAIN)
@pytest.mark.parametrize('kv_heads', [1, 2, 4])
@pytest.mark.parametrize('options', OPTIONS)
def test_matches_numpy(implementation, kv_heads, options):
  q, k, v = draw(21, kv_heads=kv_heads)
  out = call(q, k, v, IDS, IDS, implementation=implementation, **options)
  np.testing.assert_allclose(out, numpy_attention(q, k, v, IDS, IDS, **options), atol=1e-5)


@pytest.mark.parametrize('options', OPTIONS)
@pytest.mark.parametrize('aligned', [True, False])
def test_gradients_match_the_plain_form(options, aligned):
  q, k, v = draw(21)
  weights = jax.random.normal(jax.random.key(1), q.shape)

  def gradients(implementation):
    total = lambda *x: jnp.sum(weights * call(*x, IDS, IDS, implementation=implementation,
                                              aligned=aligned, **options))
    return jax.grad(total, argnums=(0, 1, 2))(q, k, v)

  for ours, plain in zip(gradients('blockwise'), gradients('reference'), strict=True):
    np.testing.assert_allclose(ours, plain, atol=2e-5)


@settings(max_examples=15, deadline=None)
@given(lengths=strategies.lists(strategies.integers(1, 5), min_size=1, max_size=5))
def test_any_packing_matches_numpy(lengths):
  total = 25
  ids = packed_ids(lengths, total)
  q, k, v = draw(total, batch=1, heads=2, kv_heads=1)
  expected = numpy_attention(q, k, v, ids, ids, 4)
  np.testing.assert_allclose(call(q, k, v, ids, ids, window=4), expected, atol=1e-5)


@pytest.mark.parametrize('implementation', PLAIN)
def test_other_segments_and_the_future_change_nothing(implementation):
  ids = packed_ids([10, 12], 24)
  q, k, v = draw(24, batch=1)
  run = functools.partial(call, q_ids=ids, k_ids=ids, implementation=implementation)
  before = run(q, k, v)
  after = run(q, k.at[:, 15:].set(9.0), v.at[:, 15:].set(-9.0))
  np.testing.assert_array_equal(before[:, :15], after[:, :15])
  after = run(q, k.at[:, :10].set(9.0), v.at[:, :10].set(-9.0))
  np.testing.assert_array_equal(before[:, 10:], after[:, 10:])


@pytest.mark.parametrize('implementation', PLAIN)
def test_cross_attention_sees_all_of_its_segment(implementation):
  q, k, v = draw(12, keys=20)
  q_ids, k_ids = (rows(packed_ids([5, 7], n), packed_ids([9], n)) for n in (12, 20))
  out = call(q, k, v, q_ids, k_ids, causal=False, aligned=False, implementation=implementation)
  np.testing.assert_allclose(out, numpy_attention(q, k, v, q_ids, k_ids, causal=False), atol=1e-5)


def test_cache_of_which_part_is_filled():
  """Three new tokens against 20 slots: 9 filled, out of order, the others of segment 0."""
  q, k, v = draw(3, keys=20)
  positions = np.tile(np.random.default_rng(0).permutation(20), (2, 1)).astype(np.int32)
  k_ids = ((positions < 9).astype(np.int32), positions)
  q_ids = (np.ones((2, 3), np.int32), np.tile(np.arange(6, 9, dtype=np.int32), (2, 1)))
  out = call(q, k, v, q_ids, k_ids, aligned=False)
  np.testing.assert_allclose(out, numpy_attention(q, k, v, q_ids, k_ids), atol=1e-5)


@pytest.mark.parametrize('implementation', PLAIN)
@pytest.mark.parametrize('soft_cap', [None, 5.0])
def test_a_query_without_keys_is_finite(implementation, soft_cap):
  q, k, v = draw(12)
  q_ids = (np.ones((2, 12), np.int32), np.tile(np.arange(12, dtype=np.int32), (2, 1)))
  k_ids = (np.full((2, 12), 2, np.int32), q_ids[1])
  total = lambda *x: jnp.sum(call(*x, q_ids, k_ids, implementation=implementation, aligned=False,
                                  soft_cap=soft_cap))
  value, grads = jax.value_and_grad(total, argnums=(0, 1, 2))(q, k, v)
  assert np.isfinite(value) and all(np.isfinite(g).all() for g in grads)


def test_bfloat16_keeps_its_dtype_and_float32_softmax():
  q, k, v = draw(21, dtype=jnp.bfloat16)
  total = lambda *x: jnp.sum(call(*x, IDS, IDS).astype(jnp.float32))
  out, grads = call(q, k, v, IDS, IDS), jax.grad(total, argnums=(0, 1, 2))(q, k, v)
  assert out.dtype == jnp.bfloat16 and all(g.dtype == jnp.bfloat16 for g in grads)
  np.testing.assert_allclose(out.astype(np.float32), numpy_attention(q, k, v, IDS, IDS), atol=0.04)


def test_transformations_agree():
  """jit, vmap, scan and checkpoint give what the plain call gives, and so do their gradients."""
  q, k, v = draw(12)
  ids = tuple(np.repeat(x, 2, axis=0) for x in packed_ids([5, 6], 12))
  total = lambda q: jnp.sum(jnp.square(call(q, k, v, ids, ids)))
  expected = jax.grad(total)(q)
  remat = jax.jit(jax.grad(jax.checkpoint(total)))(q)
  np.testing.assert_allclose(remat, expected, atol=1e-4)
  several = jnp.stack([q, 2 * q])
  mapped = jax.jit(jax.vmap(jax.grad(total)))(several)
  scan = jax.jit(lambda qs: jax.lax.scan(lambda c, q: (c, jax.grad(total)(q)), None, qs)[1])
  np.testing.assert_allclose(mapped, scan(several), atol=1e-4)
  np.testing.assert_allclose(mapped[0], expected, atol=1e-4)


@pytest.mark.devices(4)
def test_rows_and_heads_may_be_sharded():
  mesh = jax.make_mesh((2, 2), ('data', 'tensor'), axis_types=(jax.sharding.AxisType.Auto,) * 2,
                       devices=jax.devices()[:4])
  sharding = jax.NamedSharding(mesh, jax.P('data', None, 'tensor', None))
  q, k, v = draw(21)
  gradient = jax.jit(jax.grad(lambda *x: jnp.sum(jnp.square(call(*x, IDS, IDS))), argnums=(0, 1, 2)))
  placed = jax.device_put((q, k, v), sharding)
  for sharded, whole in zip(gradient(*placed), gradient(q, k, v), strict=True):
    np.testing.assert_allclose(sharded, whole, rtol=1e-5, atol=2e-5)
  text = gradient.lower(*placed).compile().as_text()
  assert 'all-gather' not in text and 'all-reduce' not in text and 'all-to-all' not in text


@pytest.mark.parametrize('change, message', [
    ({'implementation': 'flash'}, 'reference, blockwise'),
    ({'kv_heads': 3}, 'no multiple'),
    ({'keys': 5}, 'as many keys')])
def test_refuses(change, message):
  shapes = {k: change[k] for k in ('kv_heads', 'keys') if k in change}
  q, k, v = draw(8, **shapes)
  ids = lambda n: (np.ones((2, n), np.int32), np.tile(np.arange(n), (2, 1)))
  with pytest.raises(ValueError, match=message):
    call(q, k, v, ids(8), ids(k.shape[1]), implementation=change.get('implementation', 'blockwise'))
