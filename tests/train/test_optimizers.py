"""Schedules and update rules against their formulas in NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.train.optimizers import OPTIMIZERS, decay_mask, make_optimizer, make_schedule
from llmjax.train.spec import SCHEDULES, OptimizerSpec

SPEC = OptimizerSpec(lr=0.1, warmup_steps=10, final_lr_fraction=0.2, decay_fraction=0.5)


def formula(name, step, steps=110, w=10, lr=0.1, end=0.2, fall=0.5):
  if step < w:
    return lr * (step + 1) / w
  t = (step - w) / (steps - w)
  return {
      'cosine': lr * (end + (1 - end) * 0.5 * (1 + np.cos(np.pi * t))),
      'linear': lr * (1 - (1 - end) * t),
      'constant': lr,
      'wsd': lr * (1 - (1 - end) * max(0.0, (t - (1 - fall)) / fall)),
      'rsqrt': lr * np.sqrt(w / step),
  }[name]


@pytest.mark.parametrize('name', SCHEDULES)
def test_schedules(name):
  schedule = make_schedule(dataclasses.replace(SPEC, schedule=name), 110)
  for step in (0, 4, 9, 10, 40, 60, 61, 109):
    assert float(schedule(step)) == pytest.approx(formula(name, step), rel=1e-5), step


def test_no_warmup_starts_at_the_peak():
  assert float(make_schedule(dataclasses.replace(SPEC, warmup_steps=0), 100)(0)) == pytest.approx(0.1)


def test_adamw_with_clipping_equals_numpy():
  spec = dataclasses.replace(SPEC, warmup_steps=0, schedule='constant', weight_decay=0.3, clip_norm=0.5)
  tx, _ = make_optimizer(spec, 10)
  rng = np.random.default_rng(0)
  params = {'kernel': rng.normal(size=(3, 4)), 'scale': rng.normal(size=4)}
  mine = jax.tree.map(jnp.asarray, params)
  state = tx.init(mine)
  m = v = {k: 0.0 for k in params}
  for step in range(1, 4):
    grads = {k: rng.normal(size=x.shape) for k, x in params.items()}
    updates, state = tx.update(jax.tree.map(jnp.asarray, grads), state, mine)
    mine = jax.tree.map(jnp.add, mine, updates)
    norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
    grads = {k: g * min(1, 0.5 / norm) for k, g in grads.items()}
    m = {k: spec.b1 * m[k] + (1 - spec.b1) * g for k, g in grads.items()}
    v = {k: spec.b2 * v[k] + (1 - spec.b2) * g**2 for k, g in grads.items()}
    for k in params:
      step_size = (m[k] / (1 - spec.b1**step)) / (np.sqrt(v[k] / (1 - spec.b2**step)) + spec.epsilon)
      decay = 0.3 * params[k] if k == 'kernel' else 0.0  # Norm scales do not decay.
      params[k] = params[k] - 0.1 * (step_size + decay)
  for k in params:
    np.testing.assert_allclose(mine[k], params[k], rtol=1e-5)


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_every_optimizer_goes_downhill(name):
  spec = dataclasses.replace(SPEC, name=name, lr=0.02, weight_decay=0.0)
  tx, _ = make_optimizer(spec, 100)
  target = jax.random.normal(jax.random.key(0), (8, 8))
  loss = lambda p: jnp.mean((p['kernel'] - target)**2)
  params = {'kernel': jnp.zeros((8, 8))}

  @jax.jit
  def step(params, state):
    updates, state = tx.update(jax.grad(loss)(params), state, params)
    return jax.tree.map(jnp.add, params, updates), state

  state, before = tx.init(params), float(loss(params))
  for _ in range(100):
    params, state = step(params, state)
  assert float(loss(params)) < 0.7 * before


def test_a_parameter_that_no_pattern_names_is_an_error():
  with pytest.raises(ValueError, match='blocks/mystery'):
    decay_mask({'blocks': {'mystery': jnp.zeros(3)}})
