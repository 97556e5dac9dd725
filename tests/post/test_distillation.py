"""Distillation of models: each loss is its formula on whole logits, whatever the padding, accumulation and mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llmjax.model.model import Model
from llmjax.model.spec import ModelSpec
from llmjax.parallel.mesh import make_mesh, place_batch
from llmjax.parallel.sharding import tree_shardings
from llmjax.parallel.spec import MeshSpec
from llmjax.post import distillation, rollout
from llmjax.post.distillation import TEACHER_FIELDS, Distillation
from llmjax.post.spec import DistillSpec
from llmjax.train.objectives import make_model, next_token
from llmjax.train.spec import TrainSpec
from llmjax.train.state import TrainState
from llmjax.train.step import make_train_step

WORDS, LENGTH = 32, 16
BIG = ModelSpec(num_layers=2, d_model=32, num_heads=2, mlp_dim=32, vocab_size=WORDS, logits_soft_cap=5.0)
SMALL = ModelSpec(num_layers=1, d_model=16, num_heads=2, mlp_dim=32, vocab_size=WORDS, tie_embeddings=True,
                  projection=32)
MIXTURE = dataclasses.replace(SMALL, num_experts=4, mlp_dim=8, balance_loss=0.5, router_z_loss=0.1)
TRAIN = TrainSpec(compute_dtype='float32')
SPECS = {
    'reverse_kl': DistillSpec(teacher='t', loss='reverse_kl'),
    'jsd': DistillSpec(teacher='t', loss='jsd', beta=0.3, temperature=2.0),
    'hinton': DistillSpec(teacher='t', loss='hinton', alpha=0.7, temperature=2.0),
    'hidden': DistillSpec(teacher='t', temperature=1.5, hidden_weight=0.5, cosine_weight=2.0),
    'top_k': DistillSpec(teacher='t', loss='hinton', top_k=5),
}


@functools.partial(jax.jit, static_argnums=0)
def noisy(model, seed):
  tree = Model(model).init(jax.random.key(seed))
  noise = iter(jax.random.split(jax.random.key(seed + 1), 100))
  return jax.tree.map(lambda p: p + 0.1 * jax.random.normal(next(noise), p.shape), tree)


@pytest.fixture(scope='module')
def params():
  return noisy(SMALL, 0)


@pytest.fixture(scope='module')
def teacher():
  return noisy(BIG, 10)


def make_lessons(spec, train=TRAIN, student=SMALL):
  # Several chunks of logits, the last of them partly padding.
  chunked = lambda m: dataclasses.replace(m, execution=dataclasses.replace(m.execution, chunk_logits=8 * WORDS * 2 * 3))
  return Distillation(spec, *(chunked(make_model(model, train, 'cpu')) for model in (student, BIG)))


@pytest.fixture(scope='module')
def batch(teacher):
  """Prompts and answers of many lengths, with tokens of different weights, and the teacher's 5 likeliest words."""
  draw = np.random.default_rng(0)
  rows = [[draw.integers(1, WORDS, draw.integers(1, most)) for _ in range(8)] for most in (6, 9)]
  batch = rollout.make_batch(*rows, LENGTH)
  batch['loss_mask'] = (batch['loss_mask'] * draw.choice([0.5, 1.0, 2.0], batch['loss_mask'].shape)).astype(np.float32)
  return {**batch, **jax.device_get(jax.jit(make_lessons(SPECS['top_k']).top_k)(teacher, batch))}


def whole_logits(params, teacher, batch):
  """Returns hidden states and logits [B, T, V] of both, all at once."""
  found = []
  for model, tree in ((SMALL, params), (BIG, teacher)):
    model = make_model(model, TRAIN, 'cpu')
    x, _, _ = model.apply(tree, batch)
    found.append((x, model.logits(tree, x)))
  return found


def by_formula(spec, params, teacher, batch):
  (x, student), (x_t, taught) = whole_logits(params, teacher, batch)
  targets, mask = batch['targets'], batch['loss_mask']
  if spec.top_k:
    values, ids = jax.lax.top_k(jax.nn.log_softmax(taught), spec.top_k)
    soft = distillation.top_k_kl(student, values, ids, mask, spec.temperature)[0]
    hard = jnp.sum(mask * optax.softmax_cross_entropy_with_integer_labels(student, targets))
    return spec.alpha * spec.temperature**2 * soft + (1 - spec.alpha) * hard
  soft = {'forward_kl': lambda: distillation.forward_kl(student, taught, mask, spec.temperature),
          'reverse_kl': lambda: distillation.reverse_kl(student, taught, mask, spec.temperature),
          'jsd': lambda: distillation.generalized_jsd(student, taught, mask, spec.beta, spec.temperature),
          'hinton': lambda: distillation.forward_kl(student, taught, mask, spec.temperature)}
  loss = soft[spec.loss]()[0]
  if spec.loss == 'hinton':
    hard = jnp.sum(mask * optax.softmax_cross_entropy_with_integer_labels(student, targets))
    loss = spec.alpha * spec.temperature**2 * loss + (1 - spec.alpha) * hard
  mine = x @ params['projection']['kernel']
  return (loss + spec.hidden_weight * distillation.hidden_mse(mine, x_t, mask)[0]
          + spec.cosine_weight * distillation.hidden_cosine(mine, x_t, mask)[0])


def frozen_of(spec, teacher):
  return {} if spec.top_k else {'teacher': teacher}


@pytest.mark.parametrize('name', [pytest.param(name, marks=[pytest.mark.slow] * (name in ('reverse_kl', 'jsd')))
                                  for name in SPECS])
def test_the_loss_is_its_formula(params, teacher, batch, name):
  spec, lessons = SPECS[name], make_lessons(SPECS[name])
  run = lambda p: lessons.train(p, frozen_of(spec, teacher), batch, None)
  both = lambda p: (jax.value_and_grad(run, has_aux=True)(p),
                    jax.value_and_grad(lambda p: by_formula(spec, p, teacher, batch))(p))
  ((loss, (weight, aux)), grad), expected = jax.jit(both)(params)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-5), (loss, grad), expected)
  assert weight == batch['loss_mask'].sum() and set(aux) >= {'divergence'}
  assert (np.abs(grad['projection']['kernel']).max() > 1e-3) == spec.compares_hidden


@pytest.mark.slow
@pytest.mark.parametrize('name, student', [('hidden', SMALL), ('top_k', SMALL), ('jsd', MIXTURE)])
def test_padding_accumulation_and_batch_size(teacher, batch, name, student):
  spec, lessons, params = SPECS[name], make_lessons(SPECS[name], student=student), noisy(student, 0)

  def step(batch, gradient_accumulation_steps=1):
    tx = optax.sgd(1.0)
    state = TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=tx.init(params),
                       key=jax.random.key_data(jax.random.key(0)), frozen=frozen_of(spec, teacher))
    return jax.jit(make_train_step(lessons.train, tx, lambda step: 1.0, gradient_accumulation_steps))(state, batch)

  state, metrics = step(batch)
  moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), state.params, params)
  assert max(jax.tree.leaves(moved)) > 1e-3

  def pad(name, a, left, right, rows):
    widths = ((0, rows), (left, right), *((0, 0),) * (a.ndim - 2))
    return np.pad(a, widths, constant_values=7 if name in ('tokens', 'targets', TEACHER_FIELDS[1]) else 0)

  wide = {key: pad(key, a, 5, 3, 2) for key, a in batch.items()}
  for other in (step(batch, 4), step(wide)):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6), other[0].params, state.params)
    for key in metrics:
      np.testing.assert_allclose(other[1][key], metrics[key], rtol=1e-4, atol=1e-6, err_msg=key)


@pytest.mark.slow
@pytest.mark.skipif(jax.device_count() < 8, reason='needs 8 devices')
@pytest.mark.parametrize('name, sizes', [
    ('hidden', {'fsdp': 2, 'context': 2, 'tensor': 2}), ('top_k', {'data': 2, 'context': 2, 'tensor': 2})])
def test_meshes(params, teacher, batch, name, sizes):
  """Loss, gradient, evaluation and top-k tables, as on one device."""
  spec = SPECS[name]

  def make(mesh):
    lessons = Distillation(spec, make_model(SMALL, TRAIN, 'cpu'), make_model(BIG, TRAIN, 'cpu'))
    place = lambda model, tree: jax.device_put(tree, tree_shardings(mesh, Model(model).param_names()))
    frozen = frozen_of(spec, place(BIG, teacher))
    with jax.set_mesh(mesh):
      rows = place_batch(mesh, batch)
      found = jax.jit(jax.value_and_grad(lessons.train, has_aux=True))(place(SMALL, params), frozen, rows, None)
      held_out = jax.jit(lessons.evaluate)(place(SMALL, params), frozen, rows, None)
      table = jax.jit(lessons.top_k)(place(BIG, teacher), rows) if spec.top_k else {}
    return jax.device_get((found, held_out, {k: v[batch['segment_ids'] != 0] for k, v in table.items()}))

  expected = make(make_mesh(MeshSpec(data=1), jax.devices()[:1]))
  found = make(make_mesh(MeshSpec(**{'data': 1, **sizes}), jax.devices()))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=5e-5), found, expected)


@pytest.mark.slow
def test_evaluation_is_the_ordinary_one_and_the_teachers_distance(params, teacher, batch):
  lessons, tied = make_lessons(SPECS['jsd']), make_lessons(DistillSpec(teacher='t', top_k=WORDS))
  nats, (weight, aux) = jax.jit(lessons.evaluate)(params, {'teacher': teacher}, batch, None)
  expected, (count, _) = jax.jit(next_token(make_model(SMALL, TRAIN, 'cpu')))(params, {}, batch, None)
  np.testing.assert_allclose([nats, weight], [expected, count], rtol=1e-5)
  (_, student), (_, taught) = whole_logits(params, teacher, batch)
  kl = distillation.forward_kl(student, taught, batch['loss_mask'])[0]
  np.testing.assert_allclose(aux['teacher_kl'], kl, rtol=1e-4)
  all_words = {**batch, **jax.jit(tied.top_k)(teacher, batch)}
  np.testing.assert_allclose(jax.jit(tied.evaluate)(params, {}, all_words, None)[1][1]['teacher_kl'], kl, rtol=1e-4)
  loss = jax.jit(tied.train)(params, {}, all_words, None)[0]
  np.testing.assert_allclose(loss, kl, rtol=1e-4)


@pytest.mark.slow
def test_a_part_of_nothing_is_the_datas_own_loss(params, teacher, batch):
  lessons = make_lessons(DistillSpec(teacher='t', loss='hinton', alpha=0.0))
  run = lambda p: lessons.train(p, {'teacher': teacher}, batch, None)[0]
  plain = lambda p: next_token(make_model(SMALL, TRAIN, 'cpu'))(p, {}, batch, None)[0]
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
               jax.jit(jax.value_and_grad(run))(params), jax.jit(jax.value_and_grad(plain))(params))
