"""Schedules and update rules against their formulas in NumPy."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llmjax.model.model import Model
from llmjax.model.spec import ModelSpec
from llmjax.train.optimizers import OPTIMIZERS, decay_mask, make_optimizer, make_schedule, matrix_axes
from llmjax.train.spec import SCHEDULES, OptimizerSpec
from llmjax.train.trainable import Trainable

SPEC = OptimizerSpec(lr=0.1, warmup_steps=10, final_lr_fraction=0.2, decay_fraction=0.5)


def formula(name, step, steps=111, w=10, lr=0.1, end=0.2, fall=0.5):
  if step < w:
    return lr * (step + 1) / w
  t = (step - w) / (steps - 1 - w)
  return {
      'cosine': lr * (end + (1 - end) * 0.5 * (1 + np.cos(np.pi * t))),
      'linear': lr * (1 - (1 - end) * t),
      'constant': lr,
      'wsd': lr * (1 - (1 - end) * max(0.0, (t - (1 - fall)) / fall)),
      'rsqrt': lr * np.sqrt(w / step),
  }[name]


@pytest.mark.parametrize('name', SCHEDULES)
def test_schedules(name):
  schedule = make_schedule(dataclasses.replace(SPEC, schedule=name), 111)
  for step in (0, 4, 9, 10, 40, 60, 61, 110):
    assert float(schedule(step)) == pytest.approx(formula(name, step), rel=1e-5), step


@pytest.mark.parametrize('steps, warmup, rates', [
    (1, 0, [1.0]), (2, 0, [1.0, 0.2]), (1, 1, [1.0]), (2, 1, [1.0, 0.2]), (4, 4, [0.25, 0.5, 0.75, 1.0]),
    (5, 4, [0.25, 0.5, 0.75, 1.0, 0.2]), (4, 8, [0.125, 0.25, 0.375, 0.5])])
@pytest.mark.parametrize('name', ('cosine', 'linear', 'wsd'))
def test_the_last_step_has_the_final_rate_and_the_warmups_last_step_the_peak(name, steps, warmup, rates):
  spec = OptimizerSpec(lr=1.0, schedule=name, warmup_steps=warmup, final_lr_fraction=0.2)
  schedule = make_schedule(spec, steps)
  np.testing.assert_allclose([float(schedule(step)) for step in range(steps)], rates, rtol=1e-6)


@pytest.mark.parametrize('warmup', (0, 3))
@pytest.mark.parametrize('name', SCHEDULES)
def test_first_warmup_end_and_last_rate_of_a_run(name, warmup):
  spec = OptimizerSpec(lr=1.0, schedule=name, warmup_steps=warmup, final_lr_fraction=0.0)
  first, end, last = (float(make_schedule(spec, 12)(step)) for step in (0, max(warmup - 1, 0), 11))
  assert first == pytest.approx(1 / 3 if warmup else 1.0)
  assert end == 1.0
  assert last == pytest.approx({'constant': 1.0, 'rsqrt': (max(warmup, 1) / (11 + (not warmup)))**0.5}.get(name, 0.0),
                               abs=1e-7)


@pytest.mark.parametrize('steps, warmup, warns', [(100, 99, False), (100, 100, True), (100, 200, True), (0, 10, False),
                                                  (1, 0, False), (1, 1, True)])
def test_a_warmup_as_long_as_the_run_warns(steps, warmup, warns):
  lines = list(OptimizerSpec(warmup_steps=warmup).warnings(steps))
  assert len(lines) == warns
  assert all(f'optimizer.warmup_steps={warmup}' in line and f'train.steps={steps}' in line for line in lines)


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


MODEL = ModelSpec(num_layers=2, d_model=8, num_heads=2, mlp_dim=4, vocab_size=16, num_experts=2, shared_experts=1,
                  qk_norm=True, value_head=True)


def decoder_params():
  """Returns {path: parameter} of a decoder with every kind of parameter, all ones and a bias besides."""
  shapes = Model(MODEL).abstract_params()
  params = jax.tree.map(lambda s: jnp.ones(s.shape), shapes)
  params['blocks']['mlp']['shared']['bias'] = jnp.ones((2, 4))
  return params


def flatten(tree):
  return {jax.tree_util.keystr(path, simple=True, separator='/'): np.asarray(leaf)
          for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def train_without_gradient(spec, params, steps):
  """Returns {path: parameter} after so many steps, and the product of 1 - lr * weight_decay over them."""
  tx, schedule = make_optimizer(spec, steps)

  @jax.jit
  def step(params, state):
    updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
    return jax.tree.map(jnp.add, params, updates), state

  state = tx.init(params)
  for _ in range(steps):
    params, state = step(params, state)
  return flatten(params), lambda factor=1.0: np.prod([1 - float(schedule(k)) * factor * spec.weight_decay
                                                      for k in range(steps)])


@pytest.mark.parametrize('moment_dtype', ('float32', 'bfloat16'))
@pytest.mark.parametrize('name', OPTIMIZERS)
def test_weight_decay_shrinks_matrices_by_the_rate_and_nothing_else(name, moment_dtype):
  spec = OptimizerSpec(name=name, lr=0.1, warmup_steps=2, weight_decay=0.3, moment_dtype=moment_dtype)
  after, shrunk = train_without_gradient(spec, decoder_params(), 6)
  spared = {path for path in after if re.search('norm|bias|embed', path)}
  assert {'embed/table', 'final_norm/scale', 'blocks/attention/query_norm/scale', 'blocks/mlp/shared/bias'} <= spared
  for path, p in after.items():
    np.testing.assert_allclose(p, 1.0 if path in spared else shrunk(), rtol=1e-6, err_msg=path)


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_weight_decay_follows_factors_of_the_rate_and_spares_what_is_frozen(name):
  spec = OptimizerSpec(name=name, lr=0.1, weight_decay=0.3, lr_multipliers={'attention': 0.5}, layer_decay=0.25)
  params, _ = Trainable(None, None, freeze=('value',)).split(decoder_params())
  after, shrunk = train_without_gradient(spec, params, 4)
  assert 'value/kernel' not in after and (after['embed/table'] == 1).all()
  np.testing.assert_allclose(after['head/kernel'], shrunk(), rtol=1e-6)
  for path, factor in (('blocks/mlp/gate', 1.0), ('blocks/attention/query', 0.5)):
    for layer, depth in enumerate((0.25, 1.0)):
      np.testing.assert_allclose(after[path][layer], shrunk(factor * depth), rtol=1e-6, err_msg=path)


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_factors_of_the_rate_reach_adapters_by_the_paths_of_what_they_adapt(name):
  factors = lambda *shape: {'a': jnp.ones(shape), 'b': jnp.ones(shape), 'magnitude': jnp.ones(shape)}
  adapter = {'mine': {'blocks': {'attention': {'query': factors(2, 3, 4)}}, 'embed': {'table': factors(3, 4)}}}
  spec = OptimizerSpec(name=name, lr=0.1, weight_decay=0.3, layer_decay=0.5)
  after, shrunk = train_without_gradient(spec, adapter, 4)
  for layer, depth in enumerate((0.5, 1.0)):
    np.testing.assert_allclose(after['mine/blocks/attention/query/a'][layer], shrunk(depth), rtol=1e-6)
  np.testing.assert_allclose(after['mine/embed/table/b'], shrunk(0.25), rtol=1e-6)
  assert (after['mine/blocks/attention/query/magnitude'] == 1).all()


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_weight_decay_is_no_part_of_the_moments(name):
  params = jax.tree.map(lambda p: jax.random.normal(jax.random.key(p.size), p.shape), decoder_params())
  runs = []
  for decay in (0.0, 0.3):
    tx, schedule = make_optimizer(OptimizerSpec(name=name, lr=0.1, weight_decay=decay), 3)
    state, updates, update = tx.init(params), [], jax.jit(tx.update)
    for step in range(3):
      grads = jax.tree.map(lambda p, step=step: jax.random.normal(jax.random.key(p.size + step), p.shape), params)
      update_now, state = update(grads, state, params)
      updates.append(flatten(update_now))
    runs.append(updates)
  for step in range(3):
    for path, p in flatten(params).items():
      decays = not re.search('norm|bias|embed', path)
      np.testing.assert_allclose(runs[1][step][path] - runs[0][step][path], -0.3 * float(schedule(step)) * p * decays,
                                 atol=2e-6, err_msg=path)


def test_muon_leaves_other_parameters_to_adamw():
  rng = np.random.default_rng(0)
  params = {'embed': {'table': rng.normal(size=(6, 4))}, 'head': {'kernel': rng.normal(size=(4, 6))},
            'blocks': {'mlp_norm': {'scale': rng.normal(size=(2, 4))}, 'mlp': {'up': rng.normal(size=(2, 4, 4))}}}
  params = jax.tree.map(jnp.float32, params)
  options = dict(lr=0.1, b1=0.8, b2=0.9, weight_decay=0.3, clip_norm=0.0, schedule='linear')
  runs = []
  for tx in (make_optimizer(OptimizerSpec(name='muon', **options), 5)[0],
             optax.adamw(optax.linear_schedule(0.1, 0.01, 4), 0.8, 0.9, weight_decay=0.3, mask=decay_mask)):
    mine, state = params, tx.init(params)
    for step in range(5):
      grads = jax.tree.map(lambda p, step=step: jax.random.normal(jax.random.key(p.size + step), p.shape), params)
      updates, state = tx.update(grads, state, mine)
      mine = optax.apply_updates(mine, updates)
    runs.append(flatten(mine))
  assert np.abs(runs[0].pop('blocks/mlp/up') - runs[1].pop('blocks/mlp/up')).max() > 1e-3
  for path, p in runs[0].items():
    np.testing.assert_allclose(p, runs[1][path], rtol=1e-5, atol=1e-6, err_msg=path)


@pytest.mark.parametrize('name', ('lion', 'sgd'))
def test_lion_and_sgd_equal_numpy(name):
  spec = OptimizerSpec(name=name, lr=0.1, schedule='constant', b1=0.8, b2=0.9, weight_decay=0.3, clip_norm=0.0)
  tx, _ = make_optimizer(spec, 4)
  rng = np.random.default_rng(0)
  p, m = rng.normal(size=(3, 4)), 0.0
  mine = {'kernel': jnp.asarray(p)}
  state = tx.init(mine)
  for _ in range(4):
    g = rng.normal(size=p.shape)
    updates, state = tx.update({'kernel': jnp.asarray(g)}, state, mine)
    mine = optax.apply_updates(mine, updates)
    if name == 'lion':
      direction, m = np.sign(0.8 * m + 0.2 * g), 0.9 * m + 0.1 * g
    else:
      direction = m = 0.8 * m + g
    p = p - 0.1 * (direction + 0.3 * p)
  np.testing.assert_allclose(mine['kernel'], p, rtol=1e-5)


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
  params = Model(model).abstract_params()
  is_axes = lambda x: x is None or hasattr(x, 'output_axis')
  flat = jax.tree_util.tree_flatten_with_path(matrix_axes(params), is_leaf=is_axes)[0]
  for path, axes in flat:
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    assert (axes is not None) == ('blocks' in name and 'norm' not in name), name
