"""Routing and experts against loops in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.ops import moe

B, T, D, F, E, K = 2, 12, 8, 16, 4, 2


@pytest.fixture(scope='module')
def data():
  rng = np.random.default_rng(0)
  make = lambda *shape: rng.normal(size=shape).astype(np.float32)
  mask = (np.arange(T) < [[T], [T - 3]]).astype(np.float32)
  return {'x': make(B, T, D), 'logits': make(B, T, E), 'mask': mask, 'gate': make(E, D, F),
          'up': make(E, D, F), 'down': make(E, F, D)}


def softmax(x):
  e = np.exp(x - x.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def choices(logits):
  """Returns (ids, weights) [B, T, K] by sorting."""
  ids = np.argsort(-logits, axis=-1, kind='stable')[..., :K]
  return ids, softmax(np.take_along_axis(logits, ids, -1))


def expert(data, e, x):
  gate = x @ data['gate'][e]
  return (gate / (1 + np.exp(-gate)) * (x @ data['up'][e])) @ data['down'][e]


def expected_output(data, kept=None):
  ids, weights = choices(data['logits'])
  out = np.zeros((B, T, D))
  for b, t, k in np.ndindex(B, T, K):
    if kept is None or kept[b, t, k]:
      out[b, t] += weights[b, t, k] * expert(data, ids[b, t, k], data['x'][b, t])
  return out


def test_routing_and_its_losses(data):
  weights, ids, probabilities = moe.route(jnp.asarray(data['logits']), K)
  expected_ids, expected_weights = choices(data['logits'])
  np.testing.assert_array_equal(ids, expected_ids)
  np.testing.assert_allclose(weights, expected_weights, rtol=1e-5)
  np.testing.assert_allclose(probabilities, softmax(data['logits']), rtol=1e-5)
  total = z = 0.0
  for b in range(B):
    tokens = int(data['mask'][b].sum())
    f = np.bincount(expected_ids[b, :tokens].reshape(-1), minlength=E) / (tokens * K)
    p = softmax(data['logits'][b, :tokens]).mean(0)
    total += tokens * E * (f * p).sum()
    z += (np.log(np.exp(data['logits'][b, :tokens]).sum(-1))**2).sum()
  assert moe.balance_loss(probabilities, ids, data['mask']) == pytest.approx(total, rel=1e-5)
  assert moe.router_z_loss(jnp.asarray(data['logits']), data['mask']) == pytest.approx(z, rel=1e-5)


def test_the_balance_loss_of_a_balanced_router_is_one_a_token():
  ids = jnp.arange(B * T * K).reshape(B, T, K) % E
  uniform = jnp.full((B, T, E), 1 / E)
  assert moe.balance_loss(uniform, ids, jnp.ones((B, T))) == pytest.approx(B * T)


@pytest.mark.parametrize('parts', [1, 2, 4])
def test_dropless_equals_a_loop_also_in_parts(data, parts):
  weights, ids, _ = moe.route(jnp.asarray(data['logits']), K)
  flat = lambda a: jnp.asarray(a).reshape(B * T, -1)
  size, total = E // parts, 0.0
  for first in range(0, E, size):
    own = slice(first, first + size)
    total += moe.dropless(flat(data['x']), flat(weights), flat(ids), *(data[n][own] for n in ('gate', 'up', 'down')),
                          jax.nn.silu, first)
  np.testing.assert_allclose(total.reshape(B, T, D), expected_output(data), rtol=1e-4, atol=1e-5)


def test_capacity_serves_first_choices_first(data):
  weights, ids, _ = moe.route(jnp.asarray(data['logits']), K)
  size = 3
  kept = np.zeros((B, T, K), bool)
  for b in range(B):
    used = np.zeros(E, int)
    for k in range(K):
      for t in range(T):
        e = int(ids[b, t, k])
        if data['mask'][b, t] and used[e] < size:
          kept[b, t, k], used[e] = True, used[e] + 1
  assert 0 < kept.sum() < data['mask'].sum() * K
  taken, slot = moe.slots(ids, jnp.asarray(data['mask']), E, size)
  rows = moe.gather_slots(jnp.asarray(data['x']), taken)
  y = jnp.stack([expert(data, e, rows[:, e]) for e in range(E)], axis=1)
  np.testing.assert_allclose(moe.combine_slots(y, weights, slot), expected_output(data, kept),
                             rtol=1e-4, atol=1e-5)


def test_enough_capacity_drops_nothing(data):
  weights, ids, _ = moe.route(jnp.asarray(data['logits']), K)
  taken, slot = moe.slots(ids, jnp.ones((B, T)), E, T)
  assert moe.capacity(T, E, K, E / K) == T
  rows = moe.gather_slots(jnp.asarray(data['x']), taken)
  y = jnp.stack([expert(data, e, rows[:, e]) for e in range(E)], axis=1)
  np.testing.assert_allclose(moe.combine_slots(y, weights, slot), expected_output(data), rtol=1e-4, atol=1e-5)
