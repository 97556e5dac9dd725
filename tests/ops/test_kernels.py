"""The kernels of TPU and GPU, emulated, against the plain form: values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.ops.attention import attention, choose
from llmjax.ops.blockwise import Options
from llmjax.ops.kernels import LANES
from llmjax.ops.masks import self_attention

T = 2 * LANES
KERNELS = {'splash': {}, 'splash window soft cap': {'window': 70, 'soft_cap': 3.0, 'scale': 0.2},
           'splash bidirectional': {'causal': False}, 'splash bidirectional window': {'causal': False, 'window': 70},
           'cudnn': {}, 'cudnn window': {'window': 70, 'scale': 0.2}, 'cudnn bidirectional': {'causal': False},
           'cudnn prefix': {'prefix': True}}


def inputs(dtype=jnp.float32, kv_heads=2, length=T, head_dim=64):
  """Two sequences: three documents and padding, and one document.  Returns (q, k, v), (positions, segment_ids)."""
  keys = jax.random.split(jax.random.key(0), 3)
  shapes = ((2, length, 4, head_dim), *((2, length, kv_heads, head_dim),) * 2)
  tensors = tuple(jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes, strict=True))
  parts = [[length // 3, 3, length // 2 - 20], [length]]
  segments, positions = np.zeros((2, 2, length), np.int32)
  for row, lengths in enumerate(parts):
    start = 0
    for number, size in enumerate([*lengths, length - sum(lengths)], 1):
      segments[row, start:start + size] = number % 4
      positions[row, start:start + size] = np.arange(size)
      start += size
  return tensors, (positions, segments)


@functools.partial(jax.jit, static_argnames=('implementation', 'window', 'causal', 'prefix', 'soft_cap', 'scale'))
def value_and_gradients(tensors, weights, ids, window=None, causal=True, prefix=False, **options):
  mask = self_attention(*ids, window=window, causal=causal, k_prefix=ids[0] < 40 if prefix else None)

  def total(*tensors):
    out = attention(*tensors, mask, **options)
    return jnp.sum(out.astype(jnp.float32) * weights), out
  grads, out = jax.grad(total, argnums=(0, 1, 2), has_aux=True)(*tensors)
  return out, *grads


@pytest.mark.parametrize('name', KERNELS)
@pytest.mark.parametrize('dtype, kv_heads', [('float32', 2), ('bfloat16', 4), ('bfloat16', 1)])
def test_kernels_match_the_definition(name, dtype, kv_heads, monkeypatch):
  if name.startswith('cudnn') and dtype == 'float32':  # Only the GPU's kernel has no float32.
    monkeypatch.setattr('llmjax.ops.attention.PROBLEMS', {})
  tensors, ids = inputs(jnp.dtype(dtype), kv_heads)
  weights = jax.random.normal(jax.random.key(1), tensors[0].shape)
  exact = tuple(x.astype(jnp.float32) for x in tensors)
  expected = value_and_gradients(exact, weights, ids, implementation='reference', **KERNELS[name])
  found = value_and_gradients(tensors, weights, ids, implementation=f'{name.split()[0]}_emulated',
                              **KERNELS[name])
  tolerance = 1e-5 if dtype == 'float32' else 2e-2
  for ours, plain in zip(found, expected, strict=True):
    assert ours.dtype == dtype
    scale = np.abs(plain).max()
    np.testing.assert_allclose(ours.astype(np.float32) / scale, plain / scale, atol=tolerance)


@pytest.mark.slow
def test_a_longer_row_takes_several_blocks_of_different_sizes():
  (q, k, v), ids = inputs(kv_heads=1, length=1536)
  q, k, v = (x[:1] for x in (q[:, :, :1], k, v))
  ids = [a[:1] for a in ids]
  weights = jax.random.normal(jax.random.key(1), q.shape)
  expected = value_and_gradients((q, k, v), weights, ids, implementation='blockwise')
  found = value_and_gradients((q, k, v), weights, ids, implementation='splash_emulated')
  for ours, plain in zip(found, expected, strict=True):
    np.testing.assert_allclose(ours, plain, atol=1e-5 * np.abs(plain).max())


@pytest.mark.parametrize('name, change, message', [
    ('splash', {'length': 200}, 'length that is a multiple of 128, not 200; write blockwise'),
    ('splash', {'head_dim': 40}, 'head_dim that is a multiple of 64'),
    ('splash', {'aligned': False}, 'whole sequences'),
    ('splash', {'prefix': True}, 'no prefix mask'),
    ('cudnn', {'dtype': 'float32'}, 'bfloat16 or float16, not float32'),
    ('cudnn', {'soft_cap': 2.0}, 'no soft cap'),
    ('cudnn', {'head_dim': 260}, 'multiple of 8'),
    ('cudnn', {'length': 201}, 'even length'),
    ('cudnn', {'aligned': False}, 'whole sequences')])
def test_unsupported_arguments_are_an_error_or_left_to_the_next_implementation(name, change, message):
  shape = (2, 2, 2, change.get('length', T), change.get('head_dim', 64))
  q = jax.ShapeDtypeStruct(shape, change.get('dtype', 'bfloat16'))
  ids = np.zeros((2, T), np.int32)
  options = Options(change.get('soft_cap'), 1.0)
  mask = self_attention(ids, ids, aligned=change.get('aligned', True), k_prefix=ids > 0 if 'prefix' in change else None)
  with pytest.raises(ValueError, match=message):
    choose(name, q, q, mask, options)
  assert choose((name, 'blockwise'), q, q, mask, options) == 'blockwise'
  fine = jax.ShapeDtypeStruct((2, 2, 2, T, 64), 'bfloat16')
  assert choose((name, 'blockwise'), fine, fine, self_attention(ids, ids, window=70), Options(None, 1.0)) == name


def test_several_names_take_the_first_that_can():
  tensors, ids = inputs(length=24)
  call = functools.partial(attention, *tensors, self_attention(*ids))
  np.testing.assert_array_equal(call(implementation=('splash', 'blockwise')),
                                call(implementation='blockwise'))
