"""Warpers against transformers' own output; draws against their probabilities."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.ops import sampling

ORACLES = pathlib.Path(__file__).parents[3] / 'shared' / 'oracles' / 'aux.npz'
DRAWS = 20_000
DEFAULTS = {'temperature': 1.0, 'top_k': 0, 'top_p': 1.0, 'min_p': 0.0}

sample = jax.jit(sampling.sample)  # Parameters are traced, so most tests share a program.
warp = jax.jit(sampling.warp)


@pytest.fixture(scope='module')
def golden():
  if not ORACLES.exists():
    pytest.skip(f'golden arrays are not at {ORACLES}')
  return np.load(ORACLES)


@pytest.mark.parametrize('name, warper, value', [
    ('temp0_7', sampling.scale_temperature, 0.7),
    ('topk5', sampling.keep_top_k, 5),
    ('topp0_8', sampling.keep_top_p, 0.8),
    ('minp0_1', sampling.keep_min_p, 0.1),
])
def test_warpers_equal_transformers(golden, name, warper, value):
  np.testing.assert_allclose(warper(golden['samp/logits'], value), golden[f'samp/{name}'], 1e-6)


def test_repetition_penalty_equals_transformers(golden):
  logits = golden['samp/logits']
  seen = np.zeros(logits.shape, bool)
  np.put_along_axis(seen, golden['samp/ids'], True, axis=1)
  np.testing.assert_allclose(sampling.penalise_repeats(logits, seen, 1.3), golden['samp/rep1_3'],
                             1e-6)


def some_logits(rows=3, vocab=300, seed=0):
  return 3 * jax.random.normal(jax.random.key(seed), (rows, vocab))


def test_thresholds_equal_a_sort():
  logits = np.asarray(some_logits(8))
  kept = np.isfinite(sampling.keep_top_k(logits, 17))
  order = np.argsort(-logits, axis=1)
  want = np.zeros_like(kept)
  np.put_along_axis(want, order[:, :17], True, axis=1)
  np.testing.assert_array_equal(kept, want)
  probs = np.asarray(jax.nn.softmax(jnp.asarray(logits, jnp.float32)), np.float64)
  before = np.cumsum(np.take_along_axis(probs, order, 1), 1) - np.take_along_axis(probs, order, 1)
  want = np.zeros_like(kept)
  np.put_along_axis(want, order, before < 0.9, axis=1)  # Kept until 0.9 is reached.
  np.testing.assert_array_equal(np.isfinite(sampling.keep_top_p(logits, 0.9)), want)


@pytest.mark.parametrize('settings', [
    {}, {'temperature': 0.5}, {'top_k': 12}, {'top_p': 0.7}, {'min_p': 0.05},
    {'temperature': 1.7, 'top_k': 40, 'top_p': 0.9}])
def test_draws_follow_the_warped_distribution(settings):
  logits = some_logits(1)
  keys = jax.random.split(jax.random.key(7), DRAWS)
  settings = DEFAULTS | settings
  tokens, _ = sample(keys, jnp.broadcast_to(logits, (DRAWS, logits.shape[1])), **settings)
  expected = DRAWS * np.asarray(jax.nn.softmax(warp(logits, **settings)))[0]
  found = np.bincount(tokens, minlength=expected.size)
  assert found[expected == 0].sum() == 0
  likely = expected >= 5  # Rare tokens go into one cell, as the test wants.
  cells = [(found[likely], expected[likely]), (found[~likely].sum(), expected[~likely].sum())]
  chi_square = sum(np.sum((f - e)**2 / np.maximum(e, 1e-9)) for f, e in cells)
  freedom = likely.sum() - 1 + (cells[1][1] > 0)
  assert chi_square < freedom + 4 * np.sqrt(2 * freedom)  # Four standard deviations.


def test_temperature_zero_is_greedy_and_rows_may_differ():
  logits = some_logits(4)
  temperature = jnp.array([0.0, 1.0, 0.0, 1.0])
  token, logprob = sample(jax.random.key(3), logits, temperature=temperature,
                          top_k=jnp.array([0, 1, 0, 1]))
  np.testing.assert_array_equal(token, jnp.argmax(logits, -1))  # top_k=1 is greedy as well.
  want = jax.nn.log_softmax(logits)[jnp.arange(4), token]
  np.testing.assert_allclose(logprob, want, 1e-5)


def test_parameters_never_compile_again():
  logits, key = some_logits(2), jax.random.key(0)
  before = sample._cache_size()
  for temperature, top_k, top_p in ((0.0, 0, 1.0), (1.0, 5, 0.5), (0.3, 0, 0.9)):
    sample(key, logits, temperature=temperature, top_k=top_k, top_p=top_p)
  assert sample._cache_size() == before + 1


def test_removed_tokens_are_never_drawn():
  logits = jnp.where(jnp.arange(1000) % 3 == 0, 0.0, -jnp.inf)
  drawn = jax.jit(jax.vmap(sampling.draw, (0, None)))(jax.random.split(jax.random.key(1), 5000), logits)
  assert np.all(np.asarray(drawn) % 3 == 0) and len(set(drawn.tolist())) > 300


def test_extreme_logits():
  logits = jnp.array([[-3e38, 3e38, 0.0], [0.0, -0.0, -jnp.inf]])
  token, logprob = sample(jax.random.key(0), logits, top_k=2, top_p=0.9)
  assert token[0] == 1 and token[1] in (0, 1)
  np.testing.assert_allclose(logprob, [0.0, np.log(0.5)], atol=1e-6)
