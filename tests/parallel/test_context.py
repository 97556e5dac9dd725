"""Attention on a mesh is attention on one device: ring, gather, and kernels inside shard_map."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.config import ConfigError
from llmjax.model.model import Model
from llmjax.model.spec import ModelSpec
from llmjax.ops import attention as table
from llmjax.ops import blockwise
from llmjax.ops.masks import self_attention
from llmjax.parallel import attention as module
from llmjax.parallel.mesh import make_mesh, place_batch
from llmjax.parallel.spec import MeshSpec
from llmjax.train.objectives import make_model, next_token
from llmjax.train.spec import TrainSpec

B, T, N, H = 4, 64, 4, 8
BIG = 256  # Length where kernels, or the shape of the program, are looked at.


def draw(length=T, kv_heads=2, heads=N, head_dim=H, batch=B, dtype=jnp.float32):
  """Returns (q, k, v), ids of packed rows with padding at the end."""
  rng = np.random.default_rng(0)
  shapes = ((batch, length, heads, head_dim), *((batch, length, kv_heads, head_dim),) * 2)
  tensors = tuple(jnp.asarray(rng.normal(size=s), dtype) for s in shapes)
  segments, positions = np.zeros((2, batch, length), np.int32)
  for row in range(batch):
    ends = [0, *sorted(rng.choice(np.arange(1, length), 1 + row % 3, replace=False))]
    for i, (start, stop) in enumerate(zip(ends[:-1], ends[1:], strict=True)):
      segments[row, start:stop], positions[row, start:stop] = i + 1, np.arange(stop - start)
    positions[row, ends[-1]:] = np.arange(length - ends[-1])
  return tensors, (segments, positions)


def run(call, tensors, ids, kind='gather', window=None, **options):
  """Returns (out, *gradients) in the rows' order of a weighted sum of outputs."""
  zigzag = kind == 'ring'
  weights = jnp.asarray(np.random.default_rng(1).normal(size=tensors[0].shape), jnp.float32)
  if zigzag:
    order = module.zigzag_order(tensors[0].shape[1])
    tensors, ids, weights = jax.tree.map(lambda a: a[:, order], (tensors, ids, weights))
    options['zigzag'] = True

  def total(*tensors):
    out = call(*tensors, self_attention(ids[1], ids[0], window=window), **options)
    return jnp.sum(out.astype(jnp.float32) * weights), out

  grads, out = jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(*tensors)
  back = np.argsort(order) if zigzag else slice(None)
  return [np.asarray(a, np.float32)[:, back] for a in (out, *grads)]


def assert_near(found, expected, tolerance=1e-5):
  for a, b in zip(found, expected, strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


OPTIONS = {'': {}, 'window soft cap': {'window': 11, 'soft_cap': 2.0, 'scale': 0.6}}


@functools.cache
def expected(kv_heads, options):
  return run(table.attention, *draw(kv_heads=kv_heads), implementation='reference', **OPTIONS[options])


@pytest.mark.parametrize('kind, sizes, kv_heads, options', [
    pytest.param('ring', dict(context=8), 2, '', marks=pytest.mark.slow),
    pytest.param('ring', dict(context=8), 1, 'window soft cap', marks=pytest.mark.slow),
    ('ring', dict(context=4, data=2), 4, 'window soft cap'),
    ('ring', dict(context=4, tensor=2), 2, ''),
    ('ring', dict(context=2, tensor=4), 2, ''),
    ('gather', dict(context=8), 2, ''),
    ('gather', dict(context=4, data=2), 4, 'window soft cap'),
    ('gather', dict(context=4, tensor=2), 1, '')])
def test_context_parallel_attention_is_that_of_one_device(kind, sizes, kv_heads, options):
  with jax.set_mesh(make_mesh(MeshSpec(**{'data': 1, **sizes}))):
    found = run(module.attention, *draw(kv_heads=kv_heads), kind, implementation=('splash', 'blockwise'),
                **OPTIONS[options])
  assert_near(found, expected(kv_heads, options))


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['ring', 'gather'])
def test_context_parallel_attention_in_bfloat16(kind):
  with jax.set_mesh(make_mesh(MeshSpec(data=2, context=4))):
    found = run(module.attention, *draw(dtype=jnp.bfloat16), kind)
  assert_near(found, expected(2, ''), 2e-2)


@pytest.mark.parametrize('sizes, kv_heads, batch', [
    (dict(data=2, fsdp=2, tensor=2), 2, 4),
    (dict(data=1, expert=2, tensor=4), 2, 4),  # Each key/value head is needed on two devices.
    (dict(data=2, tensor=4), 1, 3)])  # Three rows for two devices.
@pytest.mark.parametrize('implementation', ['splash_emulated', 'cudnn_emulated'])
def test_kernels_are_divided_over_rows_and_heads(implementation, sizes, kv_heads, batch, monkeypatch):
  monkeypatch.setitem(table.PROBLEMS, 'cudnn_emulated', lambda *_: None)  # Emulated, it takes float32.
  inputs = draw(BIG // 2, kv_heads, head_dim=64, batch=batch)
  plain = run(table.attention, *inputs, implementation='reference')
  with jax.set_mesh(make_mesh(MeshSpec(**sizes))):
    assert_near(run(module.attention, *inputs, implementation=implementation), plain)


@pytest.mark.slow
def test_a_kernel_and_a_ring_run_inside_another_shard_map():
  """As in a pipeline, whose stages have rows of their own."""
  tensors, ids = draw()
  plain = run(table.attention, tensors, ids, implementation='reference')
  for kind, sizes, inputs, want in (
      ('ring', dict(stage=2, context=2, data=2), (tensors, ids), plain),
      ('gather', dict(stage=2, context=2, data=2), (tensors, ids), plain)):

    def staged(q, k, v, mask, **options):
      stage = jax.P('stage')
      return jax.shard_map(functools.partial(module.attention, **options), in_specs=stage, out_specs=stage,
                           axis_names={'stage'}, check_vma=False)(q, k, v, mask)

    with jax.set_mesh(make_mesh(MeshSpec(**sizes))):
      assert_near(run(staged, *inputs, kind), want)
  big = draw(BIG // 2, head_dim=64)
  plain = run(table.attention, *big, implementation='reference')
  with jax.set_mesh(make_mesh(MeshSpec(stage=2, tensor=2, data=2))):
    assert_near(run(staged, *big, implementation='splash_emulated'), plain)


def dot_flops(jaxpr):
  """Returns 2 m n k of every matrix product of a program without loops or branches, summed."""
  total = 0
  for eqn in jaxpr.eqns:
    assert eqn.primitive.name not in ('scan', 'while', 'cond')
    if eqn.primitive.name == 'dot_general':
      (contracted, _), _ = eqn.params['dimension_numbers']
      left, out = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
      total += 2 * math.prod(out) * math.prod(left[axis] for axis in contracted)
    for value in eqn.params.values():
      inner = getattr(value, 'jaxpr', value)
      total += dot_flops(inner) if hasattr(inner, 'eqns') else 0
  return total


def program(kind, window=None, batch=1):
  """Returns (the compiled gradient of attention over eight devices as text, FLOPs of one of them)."""
  (q, k, v), ids = draw(BIG, batch=batch)
  mesh = make_mesh(MeshSpec(data=1, context=8))
  with jax.set_mesh(mesh):
    place = lambda a: jax.device_put(a, jax.NamedSharding(mesh, jax.P(None, 'context')))
    total = lambda q, k, v, s, p: jnp.sum(jnp.square(module.attention(
        q, k, v, self_attention(p, s, window=window), zigzag=kind == 'ring')))
    args = jax.tree.map(place, (q, k, v, *ids))
    traced = jax.jit(jax.grad(total, argnums=(0, 1, 2))).trace(*args)
    return traced.lower().compile().as_text(), dot_flops(traced.jaxpr.jaxpr)


@pytest.mark.slow
def test_the_ring_gathers_nothing_and_computes_half_of_the_square(monkeypatch):
  monkeypatch.setattr(blockwise, 'BLOCK', 16)  # So that the causal part of a device leaves out what it can.
  (ring, ring_flops), (gather, gather_flops) = program('ring'), program('gather')
  assert not re.search('all-gather|all-to-all|all-reduce|reduce-scatter', ring)
  assert 'collective-permute' in ring
  assert 'all-gather' in gather and 'collective-permute' not in gather
  # 2 products of T x T x H a head forward, 5 backward; and dO . O.
  square, delta = (7 * 2 * N * H * BIG * keys / 8 for keys in (BIG, 1 / 7))
  assert gather_flops == square + delta
  assert 0.5 < (ring_flops - delta) / square < 0.54
  near, near_flops = program('ring', window=8)  # A chunk is twice as long: only neighbours see each other.
  assert (near_flops - delta) / square < 0.21
  assert len(re.findall('collective-permute', near)) < len(re.findall('collective-permute', ring)) / 2


def test_zigzag_order_gives_every_device_an_early_and_a_late_chunk():
  assert module.zigzag_order(16, 2).tolist() == [*range(4), *range(12, 16), *range(4, 12)]
  with jax.set_mesh(make_mesh(MeshSpec(data=2, context=4))):
    row = jnp.arange(48)[None]
    np.testing.assert_array_equal(module.from_zigzag(module.to_zigzag(row)), row)
    assert sorted(module.to_zigzag(row)[0, :12].tolist()) == [*range(6), *range(42, 48)]


def test_refuses():
  tensors, ids = draw()
  with jax.set_mesh(make_mesh(MeshSpec(data=1, context=8))):
    with pytest.raises(ConfigError, match='write 48 or 64, or train.context_attention=gather'):
      module.zigzag_order(56)
    with pytest.raises(ValueError, match='splash attention works on whole sequences.*auto or blockwise'):
      run(module.attention, tensors, ids, implementation='splash')
    with pytest.raises(ValueError, match='ring attention is causal; for other masks write train.context_attention'):
      module.attention(*tensors, self_attention(*ids[::-1], causal=False), zigzag=True)
  with pytest.raises(ValueError, match='zigzag order must be whole'):
    run(module.attention, tensors, ids, 'ring')


@pytest.mark.skipif(jax.device_count() < 8, reason='needs 8 devices')
def test_dropout_and_noise_do_not_depend_on_the_order_of_tokens():
  """In zigzag order each token loses the features that it loses in the order of the text."""
  model = ModelSpec(num_layers=2, d_model=16, num_heads=2, mlp_dim=16, vocab_size=32, dropout=0.3, tie_embeddings=True)
  params = Model(model).init(jax.random.key(0))
  (tokens, targets), (segments, positions) = np.random.default_rng(0).integers(0, 32, (2, B, T)), draw()[1]
  batch = {'tokens': tokens, 'targets': targets, 'loss_mask': (segments > 0).astype(np.float32),
           'segment_ids': segments, 'positions': positions}
  losses = []
  for sizes, count in ((dict(data=2, context=4), 8), ({}, 1)):
    mesh = make_mesh(MeshSpec(**sizes), jax.devices()[:count])
    with jax.set_mesh(mesh):
      loss_fn = next_token(make_model(model, TrainSpec(compute_dtype='float32'), 'cpu'), neftune_alpha=5.0)
      losses.append(float(jax.jit(loss_fn)(params, {}, place_batch(mesh, batch), jax.random.key(1))[0]))
  assert losses[0] == pytest.approx(losses[1], rel=1e-5)
