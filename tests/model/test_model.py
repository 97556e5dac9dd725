"""The model against properties of every language model, and against NumPy."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.generate.decode import Generator
from llmjax.model import counts, presets
from llmjax.model.block import layer_kinds
from llmjax.model.channel_mixers import MoeMlp
from llmjax.model.context import Context
from llmjax.model.model import Execution, Model
from llmjax.model.spec import ModelSpec
from llmjax.ops import moe
from tests.ops.test_relative import bucket

SPEC = ModelSpec(num_layers=3, d_model=32, num_heads=4, num_kv_heads=2, mlp_dim=48, vocab_size=67)
CAUSAL = {
    'plain': {}, 'multi_head': dict(num_kv_heads=0), 'tied': dict(tie_embeddings=True),
    'window': dict(window=5), 'caps': dict(attention_soft_cap=5.0, logits_soft_cap=9.0),
    'qk_norm': dict(qk_norm=True), 'gelu': dict(activation='gelu'), 'wide_heads': dict(head_dim=16),
    'biases': dict(qkv_bias=True, out_bias=True, mlp_bias=True),
    'gpt2': dict(norm='layer', mlp='plain', activation='gelu', position_embedding='learned', max_positions=16,
                 qkv_bias=True, out_bias=True, mlp_bias=True),
    'neox': dict(norm='layer', mlp='plain', activation='gelu_exact', parallel_residual=True, rotary_fraction=0.5),
    'output_norm': dict(norm_placement='output'),
    'gemma': dict(num_layers=7, norm_placement='both', attention_pattern=('local', 'local', 'global'), window=4,
                  local_rope_theta=100.0, rope_scaling='linear', rope_factor=8.0, embedding_scale=32**0.5,
                  attention_scale=0.2),
    'llama3_scaling': dict(rope_scaling='llama3', rope_factor=8.0, rope_original_length=64),
    'yarn': dict(rope_scaling='yarn', rope_factor=4.0, rope_original_length=64, rope_high_frequency=32.0),
    'relative': dict(position_embedding='relative', relative_buckets=6, relative_max_distance=9,
                     attention_pattern=('global', 'local'), window=6),
    'no_positions': dict(position_embedding='none', residual_scale=0.5, mlp='plain', activation='relu_squared'),
}
VARIANTS = {
    **CAUSAL,
    'bert': dict(causal=False, norm='layer', norm_placement='post', embedding_norm=True, mlp='plain', activation='relu',
                 position_embedding='learned', max_positions=16, qkv_bias=True, out_bias=True, mlp_bias=True),
    't5_encoder': dict(causal=False, position_embedding='relative', relative_buckets=8, relative_max_distance=7),
    'modern_bert': dict(num_layers=4, causal=False, attention_pattern=('global', 'local'), window=3),
}
T = 12


@pytest.fixture(params=VARIANTS)
def spec(request):
  return dataclasses.replace(SPEC, **VARIANTS[request.param])


@pytest.fixture(params=CAUSAL)
def causal_spec(request):
  return dataclasses.replace(SPEC, **CAUSAL[request.param])


def random_params(spec, seed=0):
  """Initial parameters plus noise, so that no zero or one hides an error."""
  params = jax.jit(Model(spec).init)(jax.random.key(seed))
  leaves, tree = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
  return tree.unflatten([x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)])


def rows(seed=0, batch=2, length=T):
  tokens = jax.random.randint(jax.random.key(seed), (batch, length), 0, SPEC.vocab_size)
  positions = jnp.broadcast_to(jnp.arange(length), tokens.shape)
  return tokens, positions, jnp.ones_like(tokens)


def batch_of(tokens, positions, segment_ids, **more):
  return {'tokens': tokens, 'positions': positions, 'segment_ids': segment_ids, **more}


@functools.partial(jax.jit, static_argnums=0)
def compiled(model, params, batch):
  return model.logits(params, model.apply(params, batch)[0])


def run(spec, params, *arguments, **more):
  return np.asarray(compiled(Model(spec), params, batch_of(*arguments, **more)))


ACTIVATIONS = {
    'silu': lambda x: x / (1 + np.exp(-x)), 'relu': lambda x: np.maximum(x, 0),
    'relu_squared': lambda x: np.maximum(x, 0)**2,
    'gelu': lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    'gelu_exact': lambda x: x * np.vectorize(lambda v: 0.5 * (1 + math.erf(v / 2**0.5)))(x)}


def numpy_angles(spec, length, local):
  """Angles [T, R/2] and the factor of cos and sin, by the definitions of the papers."""
  dim = int(spec.resolved_head_dim * spec.rotary_fraction)
  theta = spec.local_rope_theta if local and spec.local_rope_theta else spec.rope_theta
  frequencies, factor, scale = theta ** (-np.arange(dim // 2) / (dim // 2)), 1.0, spec.rope_factor
  if not local and spec.rope_scaling == 'linear':
    frequencies = frequencies / scale
  elif not local and spec.rope_scaling == 'llama3':
    low = spec.rope_original_length / spec.rope_low_frequency
    high = spec.rope_original_length / spec.rope_high_frequency
    scaled = []
    for f in frequencies:
      wavelength = 2 * np.pi / f
      smooth = (spec.rope_original_length / wavelength - spec.rope_low_frequency) / (
          spec.rope_high_frequency - spec.rope_low_frequency)
      scaled.append(f if wavelength < high else f / scale if wavelength > low else (
          (1 - smooth) * f / scale + smooth * f))
    frequencies = np.array(scaled)
  elif not local and spec.rope_scaling == 'yarn':
    rotations = spec.rope_original_length * frequencies / (2 * np.pi)
    place = lambda n: dim * np.log(spec.rope_original_length / (n * 2 * np.pi)) / (2 * np.log(theta))
    first = max(np.floor(place(spec.rope_high_frequency)), 0)
    last = min(np.ceil(place(spec.rope_low_frequency)), dim - 1)
    assert np.all(np.diff(rotations) < 0)
    gamma = np.clip((np.arange(dim // 2) - first) / max(last - first, 1e-3), 0, 1)
    frequencies, factor = frequencies * (1 - gamma) + frequencies / scale * gamma, 0.1 * np.log(scale) + 1
  return np.arange(length)[:, None] * frequencies, factor


def numpy_forward(spec, params, tokens):
  """One sequence through the model, written out in float64 loops over positions and heads."""
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  cap = lambda x, c: c * np.tanh(x / c) if c else x

  def norm(x, w, kind=spec.norm):
    if kind == 'layer':
      x = x - np.mean(x, -1, keepdims=True)
    return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + spec.norm_epsilon) * w['scale'] + w.get('bias', 0)

  def rope(x, angle, factor):
    half = angle.shape[-1]
    a, b = x[:half], x[half:2 * half]
    c, s = factor * np.cos(angle), factor * np.sin(angle)
    return np.concatenate([a * c - b * s, b * c + a * s, x[2 * half:]])

  def attend(a, h, local):
    angles, factor = numpy_angles(spec, len(h), local)
    bias = lambda name: a.get(f'{name}_bias', 0)
    mixed = np.zeros_like(h)
    for head in range(spec.num_heads):
      kv = head // (spec.num_heads // spec.resolved_kv_heads)
      q = h @ a['query'][:, head] + (bias('query')[head] if spec.qkv_bias else 0)
      k = h @ a['key'][:, kv] + (bias('key')[kv] if spec.qkv_bias else 0)
      v = h @ a['value'][:, kv] + (bias('value')[kv] if spec.qkv_bias else 0)
      if spec.qk_norm:
        q, k = norm(q, a['query_norm'], 'rms'), norm(k, a['key_norm'], 'rms')
      if spec.position_embedding == 'rotary':
        q = np.stack([rope(r, angle, factor) for r, angle in zip(q, angles, strict=True)])
        k = np.stack([rope(r, angle, factor) for r, angle in zip(k, angles, strict=True)])
      for t in range(len(h)):
        keys = [j for j in range(len(h)) if (j <= t or not spec.causal) and (not local or abs(t - j) < spec.window)]
        s = k[keys] @ q[t] * (spec.attention_scale or spec.resolved_head_dim**-0.5)
        if spec.position_embedding == 'relative':
          buckets = [bucket(j - t, spec.relative_buckets, spec.relative_max_distance, spec.causal) for j in keys]
          s = s + p['embed']['relative_bias'][buckets, head]
        s = cap(s, spec.attention_soft_cap)
        weights = np.exp(s - s.max())
        mixed[t] += weights / weights.sum() @ v[keys] @ a['out'][head]
    return mixed + bias('out')

  def mlp(m, h):
    activation, bias = ACTIVATIONS[spec.activation], lambda name: m.get(f'{name}_bias', 0)
    up = h @ m['up'] + bias('up')
    up = activation(h @ m['gate'] + bias('gate')) * up if spec.mlp == 'gated' else activation(up)
    return up @ m['down'] + bias('down')

  x = spec.embedding_scale * p['embed']['table'][np.asarray(tokens)]
  if spec.position_embedding == 'learned':
    x = x + p['embed']['positions'][:len(tokens)]
  if spec.embedding_norm:
    x = norm(x, p['embed_norm'])
  for layer, kind in enumerate(layer_kinds(spec)):
    w = jax.tree.map(lambda leaf, i=layer: leaf[i], p['blocks'])
    entry = x
    for name in ('attention', 'mlp'):
      h = entry if spec.parallel_residual else x
      h = norm(h, w[f'{name}_norm']) if spec.norm_placement in ('pre', 'both') else h
      h = mlp(w['mlp'], h) if name == 'mlp' else attend(w['attention'], h, kind.attention == 'local')
      if spec.norm_placement in ('output', 'both'):
        h = norm(h, w[f'{name}_output_norm'])
      x = x + spec.residual_scale * h
      if spec.norm_placement == 'post':
        x = norm(x, w[f'{name}_norm'])
  if spec.norm_placement != 'post':
    x = norm(x, p['final_norm'])
  out = x @ (p['embed']['table'].T if spec.tie_embeddings else p['head']['kernel'])
  return cap(out, spec.logits_soft_cap)


def test_equals_numpy(spec):
  params = random_params(spec)
  tokens, positions, segments = rows()
  logits = run(spec, params, tokens, positions, segments)
  for b in range(2):
    np.testing.assert_allclose(logits[b], numpy_forward(spec, params, tokens[b]), rtol=2e-4, atol=2e-4)


def test_is_causal(causal_spec):
  spec = causal_spec
  params = random_params(spec)
  tokens, positions, segments = rows()
  before = run(spec, params, tokens, positions, segments)
  after = run(spec, params, tokens.at[:, 7].add(1) % spec.vocab_size, positions, segments)
  np.testing.assert_array_equal(before[:, :7], after[:, :7])
  assert np.abs(before[:, 7:] - after[:, 7:]).max(axis=(0, 2)).min() > 1e-6


def test_packed_documents_do_not_see_each_other(spec):
  params = random_params(spec)
  tokens, positions, segments = rows(batch=1)
  apart = [run(spec, params, tokens[:, a:b], positions[:, :b - a], segments[:, a:b])
           for a, b in ((0, 5), (5, 9))]
  packed_segments = jnp.array([[1] * 5 + [2] * 4 + [0] * 3])
  packed_positions = jnp.array([[*range(5), *range(4), 0, 0, 0]])
  packed = run(spec, params, tokens, packed_positions, packed_segments)
  assert np.isfinite(packed).all()
  np.testing.assert_allclose(packed[:, :9], np.concatenate(apart, axis=1), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('name, unroll, remat', [('plain', 2, 'none'), ('plain', 3, 'none'), ('gemma', 6, 'minimal')])
def test_unrolling_and_remat_change_nothing(name, unroll, remat):
  spec = dataclasses.replace(SPEC, **VARIANTS[name])
  params = random_params(spec)

  def loss(params, unroll, remat):
    model = Model(spec, Execution(unroll=unroll, remat=remat))
    return jnp.sum(jnp.sin(model.apply(params, batch_of(*rows()))[0]))

  expected = jax.grad(loss)(params, 1, 'none')
  found = jax.grad(loss)(params, unroll, remat)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), expected, found)


def test_a_list_of_layers_equals_the_stack(spec):
  params = random_params(spec)
  arguments = rows()
  np.testing.assert_allclose(run(spec, params, *arguments), run(spec, Model(spec).unstack(params), *arguments),
                             rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('name', ['plain', 'window', 'gemma', 'gpt2', 'relative'])
def test_tokens_one_by_one_through_a_cache_equal_the_whole_sequence(name):
  """Local layers keep no more than their window."""
  spec = dataclasses.replace(SPEC, **VARIANTS[name])
  model, params = Model(spec), random_params(spec)
  tokens, positions, segments = rows()
  expected = run(spec, params, tokens, positions, segments)
  layers = model.unstack(params)
  cache = model.init_cache(2, T)
  found = []
  for first, last in ((0, 3), *((t, t + 1) for t in range(3, T))):
    part = batch_of(tokens[:, first:last], positions[:, first:last], segments[:, first:last])
    if cache.fresh:
      cache = model.init_cache(2, last)
    else:
      cache = model.grow_cache(cache, last)
    x, cache, _ = model.apply(layers, part, cache=cache)
    found.append(model.logits(layers, x))
  np.testing.assert_allclose(np.concatenate(found, axis=1), expected, rtol=1e-4, atol=1e-4)
  for kind, slots in cache.slots.items():
    assert slots.positions.shape[1] == (spec.window if kind == 'local' else T)


def test_a_ring_refuses_tokens_that_would_overwrite_what_they_attend_to():
  spec = dataclasses.replace(SPEC, window=4)
  model, params = Model(spec), random_params(spec)
  tokens, positions, segments = rows()
  cut = lambda a, b: batch_of(tokens[:, a:b], positions[:, a:b], segments[:, a:b])
  layers = model.unstack(params)
  _, cache, _ = model.apply(layers, cut(0, 6), cache=model.init_cache(2, 6))
  with pytest.raises(ValueError, match='2 tokens at once overwrite'):
    model.apply(layers, cut(6, 8), cache=cache)
  _, cache, _ = model.apply(layers, cut(0, 6), cache=model.init_cache(2, 6, step=2))
  x, _, _ = model.apply(layers, cut(6, 8), cache=cache)
  np.testing.assert_allclose(model.logits(layers, x), run(spec, params, tokens, positions, segments)[:, 6:8],
                             rtol=1e-4, atol=1e-4)


def test_a_prefix_is_seen_by_its_whole_segment_and_nothing_else_changes():
  params = random_params(SPEC)
  tokens, positions, segments = rows()
  prefix = positions < 4
  found = run(SPEC, params, tokens, positions, segments, prefix=prefix)
  changed = run(SPEC, params, tokens.at[:, 3].add(1) % SPEC.vocab_size, positions, segments, prefix=prefix)
  assert np.abs(found[:, 0] - changed[:, 0]).max() > 1e-4  # An earlier position attends to a later one of the prefix.
  later = run(SPEC, params, tokens.at[:, 5].add(1) % SPEC.vocab_size, positions, segments, prefix=prefix)
  np.testing.assert_array_equal(found[:, :5], later[:, :5])


def test_dense_layers_before_a_mixture_are_a_stack_of_their_own():
  spec = dataclasses.replace(SPEC, num_layers=4, num_experts=4, first_dense_layers=1, dense_mlp_dim=80)
  params = random_params(spec)
  assert {name: jax.tree.leaves(tree)[0].shape[0] for name, tree in params['blocks'].items()} == {'dense': 1, 'moe': 3}
  arguments = rows()
  np.testing.assert_allclose(run(spec, params, *arguments), run(spec, Model(spec).unstack(params), *arguments),
                             rtol=1e-5, atol=1e-5)
  total = sum(x.size for x in jax.tree.leaves(params))
  assert total == counts.count_params(spec)['total']


def test_dropout_depends_on_its_key_alone_and_is_off_without_one():
  spec = dataclasses.replace(SPEC, dropout=0.5)
  params = random_params(spec)
  tokens, positions, segments = rows()

  def x(key):
    return np.asarray(Model(spec).apply(params, batch_of(tokens, positions, segments), key=key)[0])

  np.testing.assert_array_equal(x(jax.random.key(1)), x(jax.random.key(1)))
  assert np.abs(x(jax.random.key(1)) - x(jax.random.key(2))).max() > 0.1
  plain = Model(SPEC).apply(params, batch_of(tokens, positions, segments))[0]
  np.testing.assert_allclose(x(None), plain, rtol=1e-6)


@pytest.mark.parametrize('preset', presets.PRESETS)
def test_presets_have_the_published_size(preset):
  billions = {'llama2_7b': 6.74, 'llama2_13b': 13.02, 'llama2_70b': 68.98, 'llama3_8b': 8.03,
              'llama3_70b': 70.55, 'llama3_405b': 405.85, 'mixtral_8x7b': 46.7}
  spec = ModelSpec(**{**ModelSpec.base({'preset': preset}), 'preset': preset})
  shapes = Model(spec).abstract_params()
  total = sum(x.size for x in jax.tree.leaves(shapes))
  assert total == counts.count_params(spec)['total']
  assert round(total / 1e9, 2) == billions[preset]


def test_counts_equal_the_parameters(spec):
  params = Model(spec).init(jax.random.key(0))
  found = {k: sum(x.size for x in jax.tree.leaves(v)) for k, v in params.items()}
  expected = counts.count_params(spec)
  assert sum(found.values()) == expected['total']
  assert all(found.get(k, 0) == n for k, n in expected.items() if k != 'total')


def test_flops_equal_the_compiler_count():
  """XLA counts the whole attention square where we count the causal half, and some elementwise work."""
  spec = ModelSpec(num_layers=2, d_model=256, num_heads=4, mlp_dim=512, vocab_size=512)
  tokens, positions, segments = rows(batch=1, length=128)
  params = Model(spec).init(jax.random.key(0))

  def forward(params):
    model = Model(spec, Execution(attention=('reference',), unroll=2))
    return model.logits(params, model.apply(params, batch_of(tokens, positions, segments))[0])

  compiler = jax.jit(forward).lower(params).compile().cost_analysis()['flops']
  # Forward is a third of the training FLOPs; the other half of the attention square is added.
  square = 4 * spec.num_layers * spec.num_heads * spec.resolved_head_dim * 128 * (128 - 129 / 2)
  ours = counts.train_flops_per_token(spec, 128) / 3 * 128 + square
  assert compiler == pytest.approx(ours, rel=0.05)


MIXTURE = dataclasses.replace(SPEC, num_experts=8, shared_experts=1, qk_norm=True, value_head=True, projection=8)
HALF = Model(MIXTURE, Execution(compute_dtype='bfloat16'))


def test_every_parameter_is_cast_by_its_name():
  shapes = jax.eval_shape(lambda: HALF.cast(HALF.init(jax.random.key(0))))
  dtypes = {jax.tree_util.keystr(path, simple=True, separator='/'): p.dtype
            for path, p in jax.tree_util.tree_flatten_with_path(shapes)[0]}
  narrow = {path for path, dtype in dtypes.items() if dtype == jnp.bfloat16}
  assert narrow == {*(f'blocks/attention/{name}' for name in ('query', 'key', 'value', 'out')),
                    *(f'blocks/mlp/{part}{name}' for part in ('', 'shared/') for name in ('gate', 'up', 'down'))}
  assert {'blocks/mlp/router', 'blocks/attention/query_norm/scale', 'value/kernel'} < {*dtypes} - narrow
  with pytest.raises(ValueError, match='blocks/mystery'):
    HALF.cast({'blocks': {'mystery': jnp.zeros((2, 3, 4))}})


def test_a_router_of_a_bfloat16_model_is_in_float32():
  """Its losses are those of float64 logits of the very inputs that it has, and each token's experts are the same."""
  params = random_params(MIXTURE)
  layer = HALF.unstack(HALF.cast(params))['blocks'][0]['mlp']
  x = jax.random.normal(jax.random.key(2), (2, T, MIXTURE.d_model)).astype(jnp.bfloat16)
  segments = rows()[2]
  context = Context(segments, {})
  _, aux = jax.jit(lambda p, x: MoeMlp(MIXTURE).apply({'params': p}, x, context))(layer, x)
  logits = np.asarray(x, np.float64) @ np.asarray(params['blocks']['mlp']['router'][0], np.float64)
  z = np.sum(np.log(np.exp(logits).sum(-1))**2) / MIXTURE.num_layers
  np.testing.assert_allclose(aux['router_z'], z, rtol=1e-6)
  weights, ids, probabilities = moe.route(jnp.asarray(logits, jnp.float32), MIXTURE.experts_per_token)
  balance = moe.balance_loss(probabilities, ids, jnp.ones((2, T))) / MIXTURE.num_layers
  np.testing.assert_allclose(aux['load_balance'], balance, rtol=1e-6)


def test_generation_holds_what_training_casts():
  """Embedding and head besides, which training casts where they are used."""
  held = Generator(MIXTURE, random_params(MIXTURE), jnp.bfloat16).params
  assert held['blocks'][0]['mlp']['router'].dtype == jnp.float32
  assert held['blocks'][0]['attention_norm']['scale'].dtype == jnp.float32
  for p in (held['blocks'][0]['attention']['query'], held['blocks'][0]['mlp']['gate'], held['embed']['table'],
            held['head']['kernel']):
    assert p.dtype == jnp.bfloat16
