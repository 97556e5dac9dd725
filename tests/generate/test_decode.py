"""Cached generation against the full forward pass."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.generate import decode
from llmjax.generate.spec import SamplingSpec
from llmjax.model.model import Execution, Model
from llmjax.model.spec import ModelSpec
from llmjax.parallel.mesh import make_mesh
from llmjax.parallel.sharding import tree_shardings
from llmjax.parallel.spec import MeshSpec

VOCAB, BOS = 98, 1
SIZES = dict(num_layers=2, d_model=32, num_heads=4, mlp_dim=48, vocab_size=VOCAB)
SPECS = {
    'plain': ModelSpec(**SIZES),
    'varied': ModelSpec(**SIZES, num_kv_heads=2, qk_norm=True, tie_embeddings=True, window=7,
                        attention_soft_cap=20.0, logits_soft_cap=30.0),
}
LENGTHS = (5, 37, 1, 0, 20)


@functools.cache
def make_params(spec):
  params = jax.jit(Model(spec).init)(jax.random.key(0))
  if not spec.tie_embeddings:
    kernel = params['head']['kernel']
    params['head']['kernel'] = 0.5 * jax.random.normal(jax.random.key(1), kernel.shape)
  return params


def make_generator(name='plain', **options):
  return decode.Generator(SPECS[name], make_params(SPECS[name]), bos_id=BOS, **options)


@pytest.fixture
def prompts():
  rng = np.random.default_rng(0)
  return [rng.integers(0, VOCAB, length) for length in LENGTHS]


@functools.partial(jax.jit, static_argnames='spec')
def full_logits(spec, params, rows):
  """Returns the logits [B, T, V] of rows [B, T], without a cache."""
  positions = jnp.broadcast_to(jnp.arange(rows.shape[1]), rows.shape)
  model = Model(spec, Execution(attention=('reference',)))
  batch = {'tokens': rows, 'positions': positions, 'segment_ids': jnp.ones(rows.shape, int)}
  return model.logits(params, model.apply(params, batch)[0])


@pytest.mark.parametrize('name', ['plain', pytest.param('varied', marks=pytest.mark.slow)])
def test_greedy_equals_the_full_forward(name, prompts):
  spec, new = SPECS[name], 12
  params = make_params(spec)
  made = make_generator(name).generate(prompts, new)
  np.testing.assert_array_equal(made.lengths, new)
  for prompt, tokens, logprobs in zip(prompts, made.tokens, made.logprobs, strict=True):
    prompt = prompt if prompt.size else np.array([BOS])
    row = np.zeros(64, int)  # Causal: what stands after the row changes nothing.
    row[:len(prompt) + new] = np.concatenate([prompt, tokens])
    logits = full_logits(spec, params, row[None])[0, len(prompt) - 1:len(prompt) + new - 1]
    np.testing.assert_array_equal(tokens, logits.argmax(-1))
    want = jax.nn.log_softmax(logits)[np.arange(new), tokens]
    np.testing.assert_allclose(logprobs, want, atol=1e-5)


@pytest.mark.parametrize('name', [pytest.param('plain', marks=pytest.mark.slow), 'varied'])
def test_prefill_and_steps_give_the_logits_of_the_full_forward(name):
  spec = SPECS[name]
  params = make_params(spec)
  model = Model(spec)
  layers = jax.jit(model.unstack)(params)
  prefill = jax.jit(decode.prefill, static_argnums=(0, 4))
  decode_step = jax.jit(decode.decode_step, static_argnums=0)
  rows = jax.random.randint(jax.random.key(5), (2, 20), 0, VOCAB)
  want = full_logits(spec, params, rows)
  logits, cache = prefill(model, layers, rows[:, :9], jnp.full(2, 9), 4)
  np.testing.assert_allclose(logits, want[:, 8], atol=1e-5)
  cache = model.grow_cache(cache, 24, step=4)
  start = 9
  for count in (1, 4, 4, 1):  # Several tokens at once, as for a draft or a prompt that goes on.
    logits, cache = decode_step(model, layers, cache, rows[:, start:start + count])
    np.testing.assert_allclose(logits, want[:, start:start + count], atol=1e-5)
    start += count
  # From an empty cache, with no prefill at all.
  logits, _ = decode_step(model, layers, model.init_cache(2, 24), rows)
  np.testing.assert_allclose(logits, want, atol=1e-5)


SAMPLED = SamplingSpec(temperature=1.2, top_k=40, top_p=0.95, min_p=0.01, repetition_penalty=1.1)


@pytest.mark.slow
@pytest.mark.parametrize('sampling', [None, SAMPLED])
def test_results_do_not_depend_on_the_batch(prompts, sampling):
  generator = make_generator('varied')
  keys = jax.random.split(jax.random.key(9), len(prompts))
  together = generator.generate(prompts, 20, sampling, keys)
  for i, prompt in enumerate(prompts):
    alone = generator.generate([prompt], 20, sampling, keys[i:i + 1])
    np.testing.assert_array_equal(alone.tokens[0], together.tokens[i])
    np.testing.assert_allclose(alone.logprobs[0], together.logprobs[i], atol=1e-5)


def test_streaming_and_stop_ids(prompts):
  generator = make_generator('plain')
  key = jax.random.key(4)
  free = generator.generate(prompts, 40, SAMPLED, key)
  stops = (int(free.tokens[0, 6]), int(free.tokens[1, 20]))
  whole = generator.generate(prompts, 40, SAMPLED, key, stops)
  for tokens, length, unstopped in zip(whole.tokens, whole.lengths, free.tokens, strict=True):
    ends = np.flatnonzero(np.isin(unstopped, stops))
    assert length == (ends[0] + 1 if ends.size else 40)
    np.testing.assert_array_equal(tokens[:length], unstopped[:length])
    assert not tokens[length:].any()
  for chunk in (1, 7):
    pieces = list(generator.stream(prompts, 40, SAMPLED, key, stops, chunk=chunk))
    assert pieces[0][0].shape[1] == 1 and max(p[0].shape[1] for p in pieces) == chunk
    tokens = np.concatenate([p[0] for p in pieces], axis=1)
    np.testing.assert_array_equal(tokens, whole.tokens[:, :tokens.shape[1]])
    np.testing.assert_array_equal(sum(p[2] for p in pieces), whole.lengths)


def test_stops_on_the_device_when_all_rows_are_done(prompts):
  generator = make_generator('plain')
  prompts = [prompts[1]] * len(prompts)
  made = generator.generate(prompts, 40)
  stop = int(made.tokens[0, 9])
  first = list(made.tokens[0]).index(stop)
  pieces = list(generator.stream(prompts, 40, stop_ids=(stop,), chunk=64))
  assert sum(p[0].shape[1] for p in pieces) == first + 1


@pytest.mark.slow
def test_one_program_for_a_bucket():
  spec = ModelSpec(**{**SIZES, 'd_model': 16})  # No other test has filled this spec's buckets.
  generator = decode.Generator(spec, make_params(spec))
  sizes = lambda: (decode._start._cache_size(), decode._decode_chunk._cache_size())
  before = sizes()
  for length, new in ((33, 9), (34, 30), (40, 70)):  # One bucket of prompts, one of caches.
    generator.generate([np.arange(length)], new)
    list(generator.stream([np.arange(length)], new, SAMPLED, jax.random.key(1), (3, 4), chunk=5))
  assert [b - a for a, b in zip(before, sizes(), strict=True)] == [1, 1]
  generator.generate([np.arange(30)], 2)  # Shorter prompts: another prefill, the same decode step.
  assert [b - a for a, b in zip(before, sizes(), strict=True)] == [2, 1]
  decode.Generator(spec, make_params(spec)).generate([np.arange(35)], 3)  # New parameters: nothing.
  assert [b - a for a, b in zip(before, sizes(), strict=True)] == [2, 1]


@pytest.mark.slow
def test_cache_grows(prompts, monkeypatch):
  want = make_generator('plain').generate(prompts, 60)
  monkeypatch.setattr(decode, 'MIN_CACHE', 8)
  slots = []
  grow = decode._grow
  monkeypatch.setattr(decode, '_grow', lambda model, cache, n: slots.append(n) or grow(model, cache, n))
  made = make_generator('plain').generate(prompts, 60)
  np.testing.assert_array_equal(made.tokens, want.tokens)
  assert slots == [80, 112]  # A prompt of 37 lies in 40 slots; 99 are needed in the end.


def test_buckets():
  sizes = sorted({decode.bucket(n) for n in range(1, 5000)})
  assert sizes[:8] == [32, 40, 48, 56, 64, 80, 96, 112]
  assert all(n <= decode.bucket(n) <= max(32, 1.25 * n) for n in range(1, 5000))


def test_tokens_beyond_the_vocabulary_are_never_chosen(prompts):
  made = make_generator('plain', vocab_size=10).generate(prompts, 30, SAMPLED, jax.random.key(2))
  assert made.tokens.max() < 10


def test_errors_and_warnings(prompts):
  generator = make_generator('plain', context_length=30)
  with pytest.warns(UserWarning, match='trained on'):
    generator.generate(prompts[:1], 30)
  with pytest.raises(ValueError, match=f'0 to {VOCAB - 1}'):
    generator.generate([np.array([VOCAB])], 1)
  assert generator.generate(prompts, 0).tokens.shape == (len(prompts), 0)
  generator.bos_id = None
  with pytest.raises(ValueError, match='bos_id'):
    generator.generate([np.array([], int)], 1)


@pytest.mark.slow
def test_a_mesh_gives_the_same_tokens(prompts):
  spec, key = SPECS['plain'], jax.random.key(3)
  want = make_generator('plain').generate(prompts, 20, SAMPLED, key)
  mesh = make_mesh(MeshSpec(data=2, fsdp=2, tensor=2))
  params = jax.device_put(make_params(spec), tree_shardings(mesh, Model(spec).param_names()))
  generator = decode.Generator(spec, params, mesh=mesh, bos_id=BOS)
  made = generator.generate(prompts, 20, SAMPLED, key)  # Five rows on four shards.
  np.testing.assert_array_equal(made.tokens, want.tokens)
  np.testing.assert_allclose(made.logprobs, want.logprobs, atol=1e-4)
