"""Schedules and update rules against their formulas in NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.model import decoder
from llmjax.model.spec import ModelSpec
from llmjax.train.optimizers import OPTIMIZERS, decay_mask, make_optimizer, make_schedule, matrix_axes
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
  loss = lambda p: sum(jnp.mean((x - target)**2) for x in p.values())
  params = {name: jnp.zeros((8, 8)) for name in ('kernel', 'gate')}  # A head's, and one in a block.

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


def newton_schulz(m):
  """The quintic iteration of Muon on one matrix."""
  x = m / np.linalg.norm(m)
  x = x.T if m.shape[0] > m.shape[1] else x
  for _ in range(5):
    a = x @ x.T
    x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
  return x.T if m.shape[0] > m.shape[1] else x


def test_muon_equals_numpy():
  spec = dataclasses.replace(SPEC, name='muon', warmup_steps=0, schedule='constant', weight_decay=0.3,
                             clip_norm=0.0)
  tx, _ = make_optimizer(spec, 10)
  rng = np.random.default_rng(0)
  shapes = {'query': (2, 6, 2, 4), 'out': (2, 2, 4, 6), 'down': (2, 10, 6)}  # [layers, ...]
  matrix = {'query': (6, 8), 'out': (8, 6), 'down': (10, 6)}
  params = {k: rng.normal(size=s) for k, s in shapes.items()}
  mine = jax.tree.map(jnp.asarray, params)
  state, m = tx.init(mine), dict.fromkeys(params, 0.0)
  for step in range(1, 4):
    grads = {k: rng.normal(size=x.shape) for k, x in params.items()}
    updates, state = tx.update(jax.tree.map(jnp.asarray, grads), state, mine)
    mine = jax.tree.map(jnp.add, mine, updates)
    for k, g in grads.items():
      b = spec.momentum
      m[k] = b * m[k] + (1 - b) * g
      nesterov = b * m[k] / (1 - b**(step + 1)) + (1 - b) * g / (1 - b**step)
      update = np.stack([newton_schulz(x.reshape(matrix[k])) for x in nesterov])
      # arXiv:2502.16982, eq. 4.
      update = 0.2 * np.sqrt(max(matrix[k])) * update.reshape(shapes[k])
      params[k] = params[k] - 0.1 * (update + 0.3 * params[k])
  for k in params:
    np.testing.assert_allclose(mine[k], params[k], rtol=2e-4, atol=2e-5)


def test_muon_takes_every_matrix_of_the_blocks_and_nothing_else():
  model = ModelSpec(num_layers=2, d_model=8, num_heads=2, mlp_dim=16, vocab_size=32)
  params = jax.eval_shape(lambda: decoder.init_params(model, jax.random.key(0)))
  is_axes = lambda x: x is None or hasattr(x, 'output_axis')
  flat = jax.tree_util.tree_flatten_with_path(matrix_axes(params), is_leaf=is_axes)[0]
  for path, axes in flat:
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    assert (axes is not None) == ('blocks' in name and 'norm' not in name), name
