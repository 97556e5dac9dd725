"""What fine-tuning adds to the step: weights, packing, NEFTune, freezing, rates by layer and path."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llmjax.config import ConfigError
from llmjax.data import packing, token_store
from llmjax.parallel.mesh import make_mesh
from llmjax.parallel.spec import MeshSpec
from llmjax.train import objectives
from llmjax.train.optimizers import make_optimizer
from llmjax.train.spec import OptimizerSpec
from llmjax.train.state import TrainState, init_state
from llmjax.train.step import make_train_step
from llmjax.train.trainable import whole_model
from tests.train.test_step import MODEL, TRAIN, assert_same, fresh_state, gradient

SGD = OptimizerSpec(name='sgd', lr=0.5, b1=0.0, schedule='constant', weight_decay=0.0, clip_norm=0.0)


@pytest.fixture(scope='module')
def store(tmp_path_factory):
  """Seven samples with uneven masks and weights; together they weigh less than 1 in some microbatches."""
  rng = np.random.default_rng(0)
  folder = tmp_path_factory.mktemp('store')
  with token_store.TokenStoreWriter(folder, vocab_size=97, bos_id=3, eos_id=1, columns=('loss_mask',)) as writer:
    for n in (9, 14, 5, 7, 12, 4, 3):
      weights = np.where(np.arange(n) < n // 2, 0, rng.choice([0.05, 0.5, 1], n))
      writer.add_encoded(rng.integers(4, 97, n), {'loss_mask': weights})
  return token_store.TokenStore(folder)


def rows(store, name, seq_len):
  made = packing.PACKINGS[name](store, seq_len)
  return made.batch(range(len(made)))


def grown(batch, size):
  """The batch with rows of padding up to a size."""
  return {k: np.concatenate([v, np.zeros((size - len(v), v.shape[1]), v.dtype)]) for k, v in batch.items()}


def shifted(batch, by):
  """The batch with its padding on the left."""
  return {k: np.pad(v, ((0, 0), (by, 0))) for k, v in batch.items()}


@pytest.mark.slow
def test_loss_and_gradient_do_not_depend_on_rows_padding_or_microbatches(store):
  alone = grown(rows(store, 'pad', 16), 8)
  expected = gradient(alone)
  mask = store.columns['loss_mask']
  weight = float(mask.sum() - mask[store.offsets[:-1]].sum())
  assert float(expected[0]['target_tokens']) == pytest.approx(weight, rel=1e-6)
  packed = rows(store, 'best_fit', 16)
  assert len(packed['tokens']) == 3  # 47 targets: it is packed.
  for batch, accumulation in ((packed, 3), (alone, 8), (shifted(packed, 5), 1), (grown(packed, 6), 2)):
    found = gradient(batch, accumulation)
    assert float(found[0]['loss']) == pytest.approx(float(expected[0]['loss']), rel=1e-6)
    assert_same(found[1], expected[1], atol=5e-6)  # Sums in another order.


@pytest.mark.slow
def test_small_weights_divide_as_large_ones_do(store):
  batch = rows(store, 'best_fit', 16)
  small = {**batch, 'loss_mask': batch['loss_mask'] * np.float32(1e-3)}
  assert small['loss_mask'].sum() < 0.05
  (metrics, expected), (other, found) = gradient(batch), gradient(small)
  assert float(other['loss']) == pytest.approx(float(metrics['loss']), rel=1e-5)
  assert_same(expected, found, atol=5e-6)


def test_pairs_stay_in_one_microbatch():
  """A loss of pairs that is not linear in rows is the same however many microbatches there are."""
  def loss_fn(params, frozen, batch, key):
    del frozen, key
    chosen, rejected = (batch['x'] @ params['w']).reshape(-1, 2).T
    return -jax.nn.log_sigmoid(chosen - rejected).sum(), (jnp.float32(len(chosen)), {})

  batch = {'x': np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32)}
  tx = optax.sgd(1.0)
  params = {'w': jnp.ones(3)}
  state = TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=tx.init(params),
                     key=jax.random.key_data(jax.random.key(1)))
  after = [make_train_step(loss_fn, tx, lambda _: 1.0, accumulation, together=2)(state, batch)[0].params
           for accumulation in (1, 2, 3, 6)]
  for other in after[1:]:
    assert_same(after[0], other)


def test_neftune_noise_is_algorithm_1():
  segments = np.array([[1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 0, 0]])
  x = jnp.zeros((1, 14, 64))
  noise = jax.vmap(lambda k: objectives.embedding_noise(k, x, segments, 5.0))(jax.random.split(jax.random.key(0), 500))
  for length, place in ((4, slice(0, 4)), (8, slice(4, 12))):
    found, bound = np.asarray(noise[:, 0, place]), 5 / np.sqrt(length * 64)
    assert np.abs(found).max() <= bound and np.abs(found).max() > 0.999 * bound
    assert np.abs(found.mean()) < 0.01 * bound
    assert found.std() == pytest.approx(bound / np.sqrt(3), rel=0.01)
    # The whole document's noise has about the norm alpha / sqrt(3), however long it is.
    assert np.sqrt((found ** 2).sum((1, 2))).mean() == pytest.approx(5 / np.sqrt(3), rel=0.02)


def test_neftune_is_for_training_alone(store):
  batch, train = rows(store, 'best_fit', 16), dataclasses.replace(TRAIN, neftune_alpha=5.0)
  params = fresh_state(optax.sgd(1.0)).params
  model = objectives.make_model(MODEL, train, 'cpu')
  loss = lambda loss_fn, key: float(jax.jit(loss_fn)(params, {}, batch, key)[0])
  plain = loss(objectives.next_token(model), None)
  assert loss(objectives.likelihood(model), jax.random.key(0)) == plain
  with_noise = objectives.next_token(model, neftune_alpha=train.neftune_alpha)
  noisy = [loss(with_noise, key) for key in (None, jax.random.key(0), jax.random.key(1))]
  assert noisy[0] == plain and len({round(x, 4) for x in noisy}) == 3


def trained(spec, store, steps=2):
  """Returns (state before, state after, metrics) of some steps by an OptimizerSpec."""
  tx, schedule = make_optimizer(spec, 10)
  trainable = whole_model(MODEL, freeze=spec.freeze)
  params, frozen = trainable.split(fresh_state(tx).params)
  state = fresh_state(tx).replace(params=params, frozen=frozen, opt_state=tx.init(params))
  loss_fn = trainable.wrap(objectives.next_token(objectives.make_model(MODEL, TRAIN, 'cpu')))
  step = jax.jit(make_train_step(loss_fn, tx, schedule))
  after = state
  for _ in range(steps):
    after, metrics = step(after, rows(store, 'best_fit', 16))
  return state, after, metrics


FREEZE = ('embed', 'blocks/.*/(query|key|value)$', 'scale$')


@pytest.mark.parametrize('name', ['adamw', pytest.param('muon', marks=pytest.mark.slow)])
def test_frozen_parameters_stay_to_the_bit_and_have_no_state(store, name):
  spec = OptimizerSpec(name=name, lr=0.01, freeze=FREEZE, moment_dtype='bfloat16')
  pack = whole_model(MODEL, freeze=FREEZE).pack
  before, after = (pack(state) for state in trained(spec, store)[:2])
  changed, sizes = {}, {}
  for (path, a), b in zip(jax.tree_util.tree_flatten_with_path(before.params)[0], jax.tree.leaves(after.params),
                          strict=True):
    key = jax.tree_util.keystr(path, simple=True, separator='/')
    changed[key], sizes[key] = not np.array_equal(a, b), a.size
  frozen = {k for k in changed if any(part in k for part in ('embed', 'query', 'key', 'value', 'scale'))}
  assert {k for k, c in changed.items() if not c} == frozen and len(frozen) == 7
  moments = sum(x.size for x in jax.tree.leaves(after.opt_state) if x.ndim > 1)
  trained_size = sum(n for k, n in sizes.items() if k not in frozen)
  assert moments == (2 * trained_size if name == 'adamw' else trained_size + sizes['head/kernel'])


@pytest.mark.devices(8)
def test_a_frozen_state_lies_on_a_mesh():
  tx, _ = make_optimizer(OptimizerSpec(freeze=FREEZE), 10)
  mesh = make_mesh(MeshSpec(data=2, fsdp=2, tensor=2))
  with jax.set_mesh(mesh):
    state = init_state(whole_model(dataclasses.replace(MODEL, vocab_size=96), freeze=FREEZE), tx, 0, mesh, zero=1)
  moments = [x.sharding for x in jax.tree.leaves(state.opt_state) if x.ndim > 2]
  assert moments and not any(s.is_fully_replicated for s in moments)


def test_wrong_patterns_are_refused(store):
  for freeze, message in ((('embde',), "no parameter matches 'embde'; there are blocks/"),
                          (('.',), 'nothing to train')):
    with pytest.raises(ConfigError, match=message):
      trained(OptimizerSpec(freeze=freeze), store)
  with pytest.raises(ConfigError, match="optimizer.lr_multipliers: no trained parameter matches 'hed'"):
    trained(OptimizerSpec(lr_multipliers={'hed': 0.1}), store)
  assert [p for p in OptimizerSpec(freeze=('(',), lr_multipliers={'a': -1.0}).validate()] == [
      "freeze: '(' is not a regular expression (missing ), unterminated subpattern at position 0); write a part of a "
      'path, such as embed', 'lr_multipliers[a]=-1 must be at least 0; to freeze parameters, use freeze']


def test_rates_by_layer_and_path(store):
  before, plain, _ = trained(SGD, store, steps=1)
  spec = dataclasses.replace(SGD, layer_decay=0.5, lr_multipliers={'query': 0.1, 'blocks': 2.0})
  _, after, _ = trained(spec, store, steps=1)
  steps = jax.tree.map(lambda a, b: np.asarray(b - a), before.params, plain.params)
  found = jax.tree.map(lambda a, b: np.asarray(b - a), before.params, after.params)
  depth = np.array([0.5, 1.0])  # Two layers: the upper one has the whole rate.

  def factor(path, x):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    if name.startswith('blocks'):
      return (0.1 if 'query' in name else 2.0) * depth.reshape(2, *[1] * (x.ndim - 1))
    return 0.25 if name.startswith('embed') else 1.0

  expected = jax.tree_util.tree_map_with_path(lambda p, x: x * factor(p, x), steps)
  assert_same(found, expected, rtol=1e-3, atol=1e-6)
  assert all(np.abs(x).max() > 1e-5 for x in jax.tree.leaves(found))
