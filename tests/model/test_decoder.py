"""The decoder against truths that hold for every causal language model."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.generate.decode import Generator
from llmjax.model import counts, decoder, presets
from llmjax.model.layers import MoeMlp
from llmjax.model.spec import ModelSpec
from llmjax.ops import moe

SPEC = ModelSpec(num_layers=3, d_model=32, num_heads=4, num_kv_heads=2, mlp_dim=48, vocab_size=67)
VARIANTS = {
    'plain': {}, 'multi_head': dict(num_kv_heads=0), 'tied': dict(tie_embeddings=True),
    'window': dict(window=5), 'caps': dict(attention_soft_cap=5.0, logits_soft_cap=9.0),
    'qk_norm': dict(qk_norm=True), 'gelu': dict(activation='gelu'), 'wide_heads': dict(head_dim=16),
}
T = 12


@pytest.fixture(params=VARIANTS)
def spec(request):
  return dataclasses.replace(SPEC, **VARIANTS[request.param])


def random_params(spec, seed=0):
  """Fresh parameters with every leaf moved, so that no zero or one hides a mistake."""
  params = jax.jit(decoder.init_params, static_argnums=0)(spec, jax.random.key(seed))
  leaves, tree = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
  return tree.unflatten([x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)])


def rows(seed=0, batch=2, length=T):
  tokens = jax.random.randint(jax.random.key(seed), (batch, length), 0, SPEC.vocab_size)
  positions = jnp.broadcast_to(jnp.arange(length), tokens.shape)
  return tokens, positions, jnp.ones_like(tokens)


@functools.partial(jax.jit, static_argnums=0)
def compiled(spec, params, tokens, positions, segments):
  context = decoder.make_context(spec, positions, segments)
  x, _, _ = decoder.hidden_states(spec, params, tokens, context)
  return decoder.unembed(spec, params, x)


def run(*arguments):
  return np.asarray(compiled(*arguments))


def numpy_forward(spec, params, tokens):
  """One row of tokens through the model, written out in float64 loops over positions and heads."""
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  cap = lambda x, c: c * np.tanh(x / c) if c else x
  norm = lambda x, s: x / np.sqrt(np.mean(x**2, -1, keepdims=True) + spec.norm_epsilon) * s
  half = spec.heads_dim // 2
  angle = np.arange(len(tokens))[:, None] * spec.rope_theta ** (-np.arange(half) / half)

  def rope(x, t):
    a, b = x[:half], x[half:]
    c, s = np.cos(angle[t]), np.sin(angle[t])
    return np.concatenate([a * c - b * s, b * c + a * s])

  x = p['embed']['table'][np.asarray(tokens)]
  for layer in range(spec.num_layers):
    w = jax.tree.map(lambda leaf, i=layer: leaf[i], p['blocks'])
    h = norm(x, w['attention_norm']['scale'])
    mixed = np.zeros_like(x)
    for head in range(spec.num_heads):
      kv = head // (spec.num_heads // spec.kv_heads)
      a = w['attention']
      q, k, v = (h @ a['query'][:, head], h @ a['key'][:, kv], h @ a['value'][:, kv])
      if spec.qk_norm:
        q, k = norm(q, a['query_norm']['scale']), norm(k, a['key_norm']['scale'])
      q = np.stack([rope(r, t) for t, r in enumerate(q)])
      k = np.stack([rope(r, t) for t, r in enumerate(k)])
      for t in range(len(tokens)):
        first = max(0, t - spec.window + 1) if spec.window else 0
        s = cap(k[first:t + 1] @ q[t] / np.sqrt(spec.heads_dim), spec.attention_soft_cap)
        weights = np.exp(s - s.max())
        mixed[t] += weights / weights.sum() @ v[first:t + 1] @ a['out'][head]
    x = x + mixed
    h = norm(x, w['mlp_norm']['scale'])
    gate = h @ w['mlp']['gate']
    if spec.activation == 'silu':
      gate = gate / (1 + np.exp(-gate))
    else:
      gate = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
    x = x + (gate * (h @ w['mlp']['up'])) @ w['mlp']['down']
  x = norm(x, p['final_norm']['scale'])
  out = x @ (p['embed']['table'].T if spec.tie_embeddings else p['head']['kernel'])
  return cap(out, spec.logits_soft_cap)


def test_equals_numpy(spec):
  params = random_params(spec)
  tokens, positions, segments = rows()
  logits = run(spec, params, tokens, positions, segments)
  for b in range(2):
    np.testing.assert_allclose(logits[b], numpy_forward(spec, params, tokens[b]), rtol=2e-4, atol=2e-4)


def test_is_causal(spec):
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
@pytest.mark.parametrize('unroll', [2, 3])
def test_unrolling_changes_nothing(unroll):
  params = random_params(SPEC)
  tokens, positions, segments = rows()

  def loss(params, unroll):
    context = decoder.make_context(SPEC, positions, segments)
    x, _, _ = decoder.hidden_states(SPEC, params, tokens, context, unroll=unroll)
    return jnp.sum(jnp.sin(x))

  expected = jax.grad(loss)(params, 1)
  found = jax.grad(loss)(params, unroll)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), expected, found)


def test_a_list_of_layers_equals_the_stack():
  params = random_params(SPEC)
  arguments = rows()
  np.testing.assert_allclose(run(SPEC, params, *arguments), run(SPEC, decoder.unstack(params), *arguments),
                             rtol=1e-5, atol=1e-5)


def test_dropout_depends_on_its_key_alone_and_is_off_without_one():
  spec = dataclasses.replace(SPEC, dropout=0.5)
  params = random_params(spec)
  tokens, positions, segments = rows()

  def x(key):
    context = decoder.make_context(spec, positions, segments, key=key)
    return np.asarray(decoder.hidden_states(spec, params, tokens, context)[0])

  np.testing.assert_array_equal(x(jax.random.key(1)), x(jax.random.key(1)))
  assert np.abs(x(jax.random.key(1)) - x(jax.random.key(2))).max() > 0.1
  plain = decoder.hidden_states(SPEC, params, tokens, decoder.make_context(SPEC, positions, segments))[0]
  np.testing.assert_allclose(x(None), plain, rtol=1e-6)


@pytest.mark.parametrize('preset', presets.PRESETS)
def test_presets_have_the_published_size(preset):
  billions = {'llama2_7b': 6.74, 'llama2_13b': 13.02, 'llama2_70b': 68.98, 'llama3_8b': 8.03,
              'llama3_70b': 70.55, 'llama3_405b': 405.85, 'mixtral_8x7b': 46.7}
  spec = ModelSpec(**{**ModelSpec.base({'preset': preset}), 'preset': preset})
  shapes = jax.eval_shape(lambda: decoder.init_params(spec, jax.random.key(0)))
  total = sum(x.size for x in jax.tree.leaves(shapes))
  assert total == counts.count_params(spec)['total']
  assert round(total / 1e9, 2) == billions[preset]


def test_counts_equal_the_parameters(spec):
  params = decoder.init_params(spec, jax.random.key(0))
  found = {k: sum(x.size for x in jax.tree.leaves(v)) for k, v in params.items()}
  expected = counts.count_params(spec)
  assert sum(found.values()) == expected['total']
  assert all(found[k] == expected[k] for k in found)


def test_flops_equal_the_compiler_count():
  """XLA counts the whole attention square where we count the causal half, and some elementwise work."""
  spec = ModelSpec(num_layers=2, d_model=256, num_heads=4, mlp_dim=512, vocab_size=512)
  tokens, positions, segments = rows(batch=1, length=128)
  params = decoder.init_params(spec, jax.random.key(0))

  def forward(params):
    context = decoder.make_context(spec, positions, segments, implementation='reference')
    x, _, _ = decoder.hidden_states(spec, params, tokens, context, unroll=2)
    return decoder.unembed(spec, params, x)

  compiler = jax.jit(forward).lower(params).compile().cost_analysis()['flops']
  # Forward is a third of the training FLOPs; the other half of the attention square is added.
  square = 4 * spec.num_layers * spec.num_heads * spec.heads_dim * 128 * (128 - 129 / 2)
  ours = counts.train_flops_per_token(spec, 128) / 3 * 128 + square
  assert compiler == pytest.approx(ours, rel=0.05)


MIXTURE = dataclasses.replace(SPEC, num_experts=8, shared_experts=1, qk_norm=True, value_head=True, projection=8)


def test_every_parameter_is_cast_by_its_name():
  shapes = jax.eval_shape(lambda: decoder.cast(decoder.init_params(MIXTURE, jax.random.key(0)), jnp.bfloat16))
  dtypes = {jax.tree_util.keystr(path, simple=True, separator='/'): p.dtype
            for path, p in jax.tree_util.tree_flatten_with_path(shapes)[0]}
  narrow = {path for path, dtype in dtypes.items() if dtype == jnp.bfloat16}
  assert narrow == {*(f'blocks/attention/{name}' for name in ('query', 'key', 'value', 'out')),
                    *(f'blocks/mlp/{part}{name}' for part in ('', 'shared/') for name in ('gate', 'up', 'down'))}
  assert {'blocks/mlp/router', 'blocks/attention/query_norm/scale', 'value/kernel'} < {*dtypes} - narrow
  with pytest.raises(ValueError, match='blocks/mystery'):
    decoder.cast({'blocks': {'mystery': jnp.zeros((2, 3, 4))}}, jnp.bfloat16)


def test_a_router_of_a_bfloat16_model_is_in_float32():
  """Its losses are those of float64 logits of the very inputs that it has, and each token's experts are the same."""
  params = random_params(MIXTURE)
  layer = decoder.unstack(decoder.cast(params, jnp.bfloat16))['blocks'][0]['mlp']
  x = jax.random.normal(jax.random.key(2), (2, T, MIXTURE.d_model)).astype(jnp.bfloat16)
  _, positions, segments = rows()
  context = decoder.make_context(MIXTURE, positions, segments)
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
