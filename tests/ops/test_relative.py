"""The relative position bias of T5 against a NumPy double loop: values and gradients."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.ops import blockwise
from llmjax.ops.attention import attention
from llmjax.ops.masks import Mask
from llmjax.ops.relative import RelativeBias, relative_buckets
from llmjax.parallel import attention as on_mesh
from llmjax.parallel.mesh import make_mesh
from llmjax.parallel.spec import MeshSpec

T, N, K, H, BUCKETS, DISTANCE = 24, 4, 2, 8, 8, 20


def bucket(relative, buckets, max_distance, causal):
  """One relative position, by comparing the distance with the bounds of the buckets (arXiv:1910.10683, section 2.1)."""
  if causal:
    offset, distance = 0, max(-relative, 0)
  else:
    buckets //= 2
    offset, distance = buckets * (relative > 0), abs(relative)
  exact = buckets // 2
  if distance < exact:
    return offset + distance
  bounds = [exact * (max_distance / exact) ** (i / (buckets - exact)) for i in range(1, buckets - exact)]
  return offset + exact + sum(distance > bound or math.isclose(distance, bound) for bound in bounds)


@pytest.mark.parametrize('buckets, distance', [(32, 128), (8, 20), (5, 7)])
@pytest.mark.parametrize('causal', [True, False])
def test_buckets(buckets, distance, causal):
  positions = np.arange(-3 * distance, 3 * distance)
  expected = [bucket(int(r), buckets, distance, causal) for r in positions]
  np.testing.assert_array_equal(relative_buckets(positions, buckets, distance, causal), expected)
  assert max(expected) == (buckets if causal else buckets // 2 * 2) - 1


def draw(seed=0):
  """Returns (q, k, v, table) and the ids of two packed sequences."""
  rng = np.random.default_rng(seed)
  tensors = [jnp.asarray(rng.normal(size=(2, T, heads, H)), jnp.float32) for heads in (N, K, K)]
  segments = np.ones((2, T), np.int32)
  segments[0, 9:] = 2
  positions = np.tile(np.arange(T, dtype=np.int32), (2, 1))
  positions[0, 9:] -= 9
  return (*tensors, jnp.asarray(rng.normal(size=(BUCKETS, N)), jnp.float32)), (positions, segments)


def run(tensors, ids, causal=True, call=attention, aligned=True, **options):
  """Returns (output, gradients of a weighted sum of it)."""
  positions, segments = ids
  weights = np.random.default_rng(1).normal(size=tensors[0].shape)

  def total(q, k, v, table):
    bias = RelativeBias.from_table(table, DISTANCE, causal)
    mask = Mask(positions, segments, positions, segments, None, causal, None, aligned)
    out = call(q, k, v, mask, bias=bias, **options)
    return jnp.sum(out * weights), out

  grads, out = jax.jit(jax.grad(total, argnums=(0, 1, 2, 3), has_aux=True))(*tensors)
  return out, *grads


@pytest.mark.parametrize('causal', [True, False])
@pytest.mark.parametrize('implementation', ['reference', 'blockwise'])
def test_equals_numpy(implementation, causal, monkeypatch):
  monkeypatch.setattr(blockwise, 'BLOCK', 8)
  tensors, (positions, segments) = draw()
  found = run(tensors, (positions, segments), causal, implementation=implementation, soft_cap=3.0)[0]
  q, k, v, table = (np.asarray(x, np.float64) for x in tensors)
  for b, t, n in np.ndindex(2, T, N):
    keys = [s for s in range(T) if segments[b, s] == segments[b, t] and (s <= t or not causal)]
    bias = [table[bucket(int(positions[b, s] - positions[b, t]), BUCKETS, DISTANCE, causal), n] for s in keys]
    logits = 3 * np.tanh((k[b, keys, n // 2] @ q[b, t, n] * H**-0.5 + bias) / 3)
    p = np.exp(logits - logits.max())
    np.testing.assert_allclose(found[b, t, n], p / p.sum() @ v[b, keys, n // 2], atol=1e-5)


@pytest.mark.parametrize('causal', [True, False])
@pytest.mark.parametrize('aligned', [True, False])
def test_gradients_equal_those_of_the_definition(causal, aligned, monkeypatch):
  monkeypatch.setattr(blockwise, 'BLOCK', 8)
  tensors, ids = draw()
  expected = run(tensors, ids, causal, implementation='reference')
  for ours, plain in zip(run(tensors, ids, causal, aligned=aligned), expected, strict=True):
    np.testing.assert_allclose(ours, plain, atol=2e-5)


@pytest.mark.devices(4)
@pytest.mark.parametrize('sizes', [dict(data=2, tensor=2), dict(data=1, tensor=4), dict(data=2, context=2)])
def test_sharded_heads_and_sequences(sizes):
  tensors, ids = draw()
  expected = run(tensors, ids)
  with jax.set_mesh(make_mesh(MeshSpec(**sizes), jax.devices()[:4])):
    found = run(tensors, ids, call=on_mesh.attention)
  for ours, plain in zip(found, expected, strict=True):
    np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize('name', ['splash', 'cudnn'])
def test_kernels_refuse(name):
  tensors, ids = draw()
  with pytest.raises(ValueError, match=f'^{name} attention has no relative position bias; write blockwise'):
    run(tensors, ids, implementation=name)


@pytest.mark.devices(2)
def test_ring_refuses():
  tensors, ids = draw()
  with jax.set_mesh(make_mesh(MeshSpec(data=1, context=2), jax.devices()[:2])), pytest.raises(
      ValueError, match='^ring attention has no relative position bias; write train.context_attention=gather'):
    run(tensors, ids, call=functools.partial(on_mesh.attention, zigzag=True))
