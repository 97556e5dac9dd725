"""The step's loss and gradient do not depend on how the batch is cut, padded or ordered."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llmjax.config import ConfigError
from llmjax.model.model import Execution, Model
from llmjax.model.spec import ModelSpec
from llmjax.parallel.mesh import make_mesh, place_batch
from llmjax.parallel.spec import MeshSpec, PipelineSpec
from llmjax.train import objectives
from llmjax.train.optimizers import make_optimizer
from llmjax.train.spec import OptimizerSpec, TrainSpec
from llmjax.train.state import TrainState
from llmjax.train.step import lower_step, make_train_step

MODEL = ModelSpec(num_layers=2, d_model=32, num_heads=2, mlp_dim=64, vocab_size=97)
TRAIN = TrainSpec(compute_dtype='float32')
SGD = optax.sgd(1.0)


def packed_batch(seed=0, batch=4, length=16):
  """Rows of three documents and some padding, lengths differing from row to row."""
  rng = np.random.default_rng(seed)
  rows = {k: np.zeros((batch, length), np.int32) for k in ('tokens', 'targets', 'segment_ids', 'positions')}
  rows['loss_mask'] = np.zeros((batch, length), np.float32)
  for b in range(batch):
    cuts = [0, *sorted(rng.choice(np.arange(1, length), 3, replace=False))]
    for segment, (start, end) in enumerate(itertools.pairwise(cuts), 1):
      rows['segment_ids'][b, start:end] = segment
      rows['positions'][b, start:end] = np.arange(end - start)
      rows['loss_mask'][b, start:end] = 1
    rows['tokens'][b] = rng.integers(0, MODEL.vocab_size, length)
    rows['targets'][b] = rng.integers(0, MODEL.vocab_size, length)
  return rows


def fresh_state(tx, model=MODEL, seed=0):
  params = jax.jit(Model(model).init)(jax.random.key(seed))
  if not model.tie_embeddings:  # The head starts at zero, which would hide the rest.
    params['head']['kernel'] = 0.2 * jax.random.normal(jax.random.key(9), params['head']['kernel'].shape)
  return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=tx.init(params),
                    key=jax.random.key_data(jax.random.key(1)))


def gradient(batch, gradient_accumulation_steps=1, train=TRAIN, model=MODEL):
  """Returns (metrics, gradient) as the step sees them, from a plain SGD step of size 1."""
  loss_fn = objectives.next_token(objectives.make_model(model, train, 'cpu'))
  state = fresh_state(SGD, model)
  step = jax.jit(make_train_step(loss_fn, SGD, lambda _: 1.0, gradient_accumulation_steps))
  after, metrics = step(state, batch)
  return metrics, jax.tree.map(jnp.subtract, state.params, after.params)


def assert_same(a, b, rtol=2e-5, atol=1e-6):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_allclose(x, y, rtol=rtol, atol=atol)


def reference_loss(params, batch):
  model = Model(MODEL, Execution(attention=('reference',)))
  logprobs = jax.nn.log_softmax(model.logits(params, model.apply(params, batch)[0]))
  picked = jnp.take_along_axis(logprobs, batch['targets'][..., None], axis=-1)[..., 0]
  return -jnp.sum(picked * batch['loss_mask']) / jnp.sum(batch['loss_mask'])


def test_loss_and_gradient_equal_the_plain_form():
  batch = packed_batch()
  metrics, found = gradient(batch)
  loss, expected = jax.jit(jax.value_and_grad(reference_loss))(fresh_state(SGD).params, batch)
  assert float(metrics['loss']) == pytest.approx(float(loss), rel=1e-5)
  assert float(metrics['grad_norm']) == pytest.approx(float(optax.tree.norm(expected)), rel=1e-5)
  assert_same(found, expected)


@pytest.mark.parametrize('accumulation', [2, pytest.param(4, marks=pytest.mark.slow)])
def test_accumulation_changes_nothing(accumulation):
  batch = packed_batch()  # Rows hold different numbers of targets: a mean of means would differ.
  assert len(set(batch['loss_mask'].sum(1))) > 1
  assert_same(gradient(batch), gradient(batch, accumulation))


MIXTURE = dataclasses.replace(MODEL, num_experts=4, mlp_dim=16, balance_loss=0.5, router_z_loss=0.1)


def trained_part(batch, part):
  """Returns the batch with so large a part of its targets trained, one at least."""
  draw = np.random.default_rng(3).random(batch['loss_mask'].shape)
  mask = batch['loss_mask'] * (draw < part)
  mask[0, 0] = 1
  return {**batch, 'loss_mask': mask}


def test_the_routers_losses_do_not_depend_on_the_trained_part():
  """Nor on accumulation, padding and batch size: they are means over all tokens, their gradient with them."""
  sparse = trained_part(packed_batch(), 0.05)
  twice = {k: np.concatenate([v, v, np.zeros_like(v)]) for k, v in sparse.items()}  # And as many rows of padding.
  whole, expected = gradient(packed_batch(), model=MIXTURE)[0], gradient(sparse, model=MIXTURE)
  assert float(whole['penalty']) > 0.1 and float(whole['target_tokens']) > 8 * float(expected[0]['target_tokens'])
  parts, more = (gradient(batch, 4, model=MIXTURE) for batch in (sparse, twice))
  for metrics in (expected[0], parts[0], more[0]):
    for name in ('load_balance', 'router_z', 'penalty'):
      assert float(metrics[name]) == pytest.approx(float(whole[name]), rel=1e-5), name
  assert_same(parts, expected, rtol=1e-4, atol=2e-5)
  assert_same(more[1], expected[1], rtol=1e-4, atol=2e-5)


def test_padding_rows_and_their_content_change_nothing():
  batch = packed_batch()
  padded = {k: np.concatenate([v, np.zeros_like(v[:2])]) for k, v in batch.items()}
  assert_same(gradient(batch), gradient(padded))
  junk = {k: v.copy() for k, v in batch.items()}
  for name in ('tokens', 'targets'):
    junk[name][batch['segment_ids'] == 0] = 11
  assert_same(gradient(batch)[1], gradient(junk)[1])


def test_order_of_rows_changes_nothing():
  batch = packed_batch()
  assert_same(gradient(batch), gradient({k: v[::-1] for k, v in batch.items()}))


def test_a_batch_of_padding_is_harmless():
  batch = {k: np.zeros_like(v) for k, v in packed_batch().items()}
  metrics, found = gradient(batch)
  assert float(metrics['loss']) == 0.0
  assert all(np.all(np.asarray(g) == 0) for g in jax.tree.leaves(found))


@pytest.mark.slow
def test_bfloat16_is_near_float32():
  batch = packed_batch()
  narrow = dataclasses.replace(TRAIN, compute_dtype='bfloat16')
  loss = [float(gradient(batch, train=t)[0]['loss']) for t in (TRAIN, narrow)]
  assert loss[0] == pytest.approx(loss[1], rel=0.02)
  assert loss[0] != loss[1]


def test_dropout_follows_the_step_and_is_repeatable():
  model = dataclasses.replace(MODEL, dropout=0.3)
  step = jax.jit(make_train_step(objectives.next_token(objectives.make_model(model, TRAIN, 'cpu')), SGD, lambda _: 1.0))
  state, batch = fresh_state(SGD, model), packed_batch()
  loss = lambda s: float(step(s, batch)[1]['loss'])
  assert loss(state) == loss(state)
  assert loss(state) != loss(state.replace(step=state.step + 1))


@pytest.mark.parametrize('tied', [False, True])
def test_first_loss_is_the_entropy_of_a_uniform_guess(tied):
  model = dataclasses.replace(MODEL, vocab_size=1024, tie_embeddings=tied)
  batch = packed_batch()
  params = jax.jit(Model(model).init)(jax.random.key(0))
  loss_fn = objectives.next_token(objectives.make_model(model, TRAIN, 'cpu'))
  loss, (weight, _) = jax.jit(loss_fn)(params, {}, batch, None)
  assert float(loss / weight) == pytest.approx(np.log(1024), abs=0.05)


FORMS = {
    'gpt2': dict(norm='layer', mlp='plain', activation='gelu', position_embedding='learned', max_positions=64,
                 qkv_bias=True, out_bias=True, mlp_bias=True),
    'gemma': dict(num_layers=3, norm_placement='both', attention_pattern=('local', 'global'), window=4,
                  embedding_scale=4.0),
    'bert': dict(causal=False, norm='layer', norm_placement='post', embedding_norm=True),
}


@pytest.mark.parametrize('name', FORMS)
@pytest.mark.parametrize('optimizer', ['adamw', pytest.param('muon', marks=pytest.mark.slow)])
def test_models_of_other_forms_train(name, optimizer):
  """Every parameter has a row for its weight decay and its dtype, and moves."""
  model = dataclasses.replace(MODEL, **FORMS[name])
  tx, schedule = make_optimizer(OptimizerSpec(name=optimizer, lr=1e-2, schedule='constant'), 10)
  loss_fn = objectives.next_token(objectives.make_model(model, TrainSpec(compute_dtype='bfloat16'), 'cpu'))
  state, batch = fresh_state(tx, model), packed_batch()
  after, metrics = jax.jit(make_train_step(loss_fn, tx, schedule))(state, batch)
  moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), after.params, state.params)
  assert min(jax.tree.leaves(moved)) > 0 and np.isfinite(metrics['loss'])


def test_learns_one_batch_by_heart():
  spec = OptimizerSpec(lr=1e-2, warmup_steps=5, weight_decay=0.0)
  tx, schedule = make_optimizer(spec, 80)
  step = jax.jit(make_train_step(objectives.next_token(objectives.make_model(MODEL, TRAIN, 'cpu')), tx, schedule),
                 donate_argnums=0)
  state, batch = fresh_state(tx), packed_batch()
  losses = []
  for _ in range(80):
    state, metrics = step(state, batch)
    losses.append(float(metrics['loss']))
  assert losses[0] > 4
  assert losses[-1] < 0.05
  assert int(state.step) == 80


@pytest.mark.devices(8)
@pytest.mark.parametrize(('sequences', 'sizes', 'accumulation', 'said'), [
    (4, dict(data=8), 1, 'train.batch_size=4 is not divisible by mesh.data=8; write train.batch_size=8'),
    (12, dict(data=2, fsdp=4), 1, 'train.batch_size=12 is not divisible by mesh.data=2 x mesh.fsdp=4; write '
     'train.batch_size=8 or 16'),
    (8, dict(data=8), 2, 'train.batch_size=8 is not divisible by mesh.data=8 x 2 microbatches; write '
     'train.batch_size=16'),
    (6, dict(data=1, stage=2, tensor=4), 1, 'train.batch_size=6 is not divisible by mesh.stage=2 x 2 microbatches; '
     'write train.batch_size=4 or 8')])
def test_a_batch_that_the_mesh_does_not_divide_is_refused_as_by_the_command(sequences, sizes, accumulation, said):
  mesh = make_mesh(MeshSpec(**sizes))
  model, train = dataclasses.replace(MODEL, num_heads=4, vocab_size=96), TRAIN
  batch = {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in packed_batch(0, sequences).items()}
  layout = jax.NamedSharding(mesh, jax.P())
  state = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=layout),
                       jax.eval_shape(lambda: fresh_state(SGD, model)))
  loss_fn = objectives.next_token(objectives.make_model(model, train, 'cpu', PipelineSpec(microbatches=4)))
  with jax.set_mesh(mesh), pytest.raises(ConfigError) as refused:
    lower_step(make_train_step(loss_fn, SGD, lambda _: 1.0, accumulation), state, batch)
  assert str(refused.value) == f'{said}, or change the mesh'


@pytest.mark.devices(8)
def test_a_batch_that_cannot_be_placed_is_refused_and_no_sequence_left_out():
  with pytest.raises(ConfigError, match='train.batch_size=10 is not divisible by mesh.data=8'):
    place_batch(make_mesh(MeshSpec(data=8)), packed_batch(0, 10))
  with pytest.raises(ConfigError, match='data.seq_len=18 is not divisible by mesh.context=4'):
    place_batch(make_mesh(MeshSpec(data=2, context=4)), packed_batch(0, 2, 18))
