"""The mesh does not change the model: loss, gradients and training are one device's on every mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llmjax.checkpoint.checkpoints import Checkpoints
from llmjax.model.spec import ModelSpec
from llmjax.parallel.mesh import make_mesh, place_batch
from llmjax.parallel.spec import MeshSpec, PipelineSpec
from llmjax.train import objectives
from llmjax.train.spec import TrainSpec
from llmjax.train.state import abstract_state, init_state
from llmjax.train.step import make_train_step
from llmjax.train.trainable import whole_model

B, T = 16, 32
MODELS = {
    'dense': ModelSpec(num_layers=4, d_model=32, num_heads=8, mlp_dim=64, vocab_size=96),
    'moe': ModelSpec(num_layers=4, d_model=32, num_heads=8, mlp_dim=32, vocab_size=96, num_experts=4,
                     experts_per_token=2, shared_experts=1, tie_embeddings=True),
}
MESHES = {
    'data8': dict(data=8),
    'fsdp8': dict(fsdp=8),
    'tensor8': dict(tensor=8),
    'data2 fsdp2 tensor2': dict(data=2, fsdp=2, tensor=2),
    'data4 fsdp2 zero1': dict(data=4, fsdp=2, zero=1),
    'data2 fsdp4 zero3': dict(data=2, fsdp=4, zero=3),
    'context8': dict(data=1, context=8),
    'context4 data2': dict(context=4, data=2),
    'context2 fsdp2 tensor2': dict(data=1, context=2, fsdp=2, tensor=2),
    'expert4 fsdp2': dict(data=1, expert=4, fsdp=2),
    'expert2 tensor2 context2': dict(data=1, expert=2, tensor=2, context=2),
    'two slices of data2 fsdp2': dict(data=2, fsdp=2, dcn_data=2),
    'stage2 data4': dict(stage=2, data=4, pipeline=dict(schedule='gpipe', microbatches=4)),
    'stage4 tensor2': dict(data=1, stage=4, tensor=2, pipeline=dict(schedule='1f1b', microbatches=8)),
    'stage2 fsdp2 tensor2': dict(data=1, stage=2, fsdp=2, tensor=2,
                                 pipeline=dict(schedule='interleaved', microbatches=4, rounds=2)),
    'stage2 fsdp2 context2 1f1b': dict(data=1, stage=2, fsdp=2, context=2,
                                       pipeline=dict(schedule='1f1b', microbatches=4)),
    'stage2 expert2 data2': dict(data=2, stage=2, expert=2,
                                 pipeline=dict(schedule='1f1b', microbatches=2)),
    'two slices of stage2 fsdp2': dict(data=1, stage=2, fsdp=2, dcn_stage=2,
                                       pipeline=dict(schedule='gpipe', microbatches=4)),
}


def packed_batch(seed=0):
  """Rows of three documents and some padding."""
  rng = np.random.default_rng(seed)
  names = ('tokens', 'targets', 'segment_ids', 'positions')
  rows = {k: np.zeros((B, T), np.int32) for k in names} | {'loss_mask': np.zeros((B, T), np.float32)}
  for b in range(B):
    ends = [0, *sorted(rng.choice(np.arange(1, T), 3, replace=False))]
    for i in range(3):
      start, end = ends[i], ends[i + 1]
      rows['segment_ids'][b, start:end] = i + 1
      rows['positions'][b, start:end] = np.arange(end - start)
      rows['loss_mask'][b, start:end] = rng.random(end - start) < 0.5
    rows['tokens'][b] = rng.integers(0, 96, T)
    rows['targets'][b] = rng.integers(0, 96, T)
  return rows


def keep_gradients(lr):
  """Gradient descent whose state is the gradient, so that a test sees it with all its digits."""
  return optax.GradientTransformation(
      lambda params: {'grads': jax.tree.map(jnp.zeros_like, params)},
      lambda grads, state, params: (jax.tree.map(lambda g: -lr * g, grads), {'grads': grads}))


@functools.cache
def fresh(model):
  """Returns a state on the host.  (That it can be made sharded: test_sharding.py.)"""
  mesh = make_mesh(MeshSpec(), jax.devices()[:1])
  with jax.set_mesh(mesh):
    return jax.device_get(init_state(whole_model(model), keep_gradients(0.1), 0, mesh))


def run(model, mesh_spec, pipe=None, steps=10, compute_dtype='float32', **train):
  """Trains; returns (gradients of the second step, final parameters, losses).  mesh_spec None: one device.

  The head starts at zero and hides all that lies below it from the first gradient.  At larger learning
  rates the mixture's ten steps double rounding errors in each: 0.5 turns 1e-7 into 3e-4.
  """
  mesh = make_mesh(mesh_spec or MeshSpec(), jax.devices()[:1] if mesh_spec is None else None)
  initial = fresh(model)  # Outside the mesh that is set below.
  train = TrainSpec(compute_dtype=compute_dtype, scan_unroll=1, **train)
  tx = keep_gradients(0.1)
  with jax.set_mesh(mesh):
    abstract = abstract_state(whole_model(model), tx, mesh, zero=mesh_spec.zero if mesh_spec else 0)
    shardings = jax.tree.map(lambda a: a.sharding, abstract)
    state = jax.device_put(initial, shardings)
    loss_fn = objectives.next_token(objectives.make_model(model, train, 'cpu', pipe))
    step = jax.jit(make_train_step(loss_fn, tx, lambda _: 1.0, train.gradient_accumulation_steps), donate_argnums=0,
                   out_shardings=(shardings, None))
    losses = []
    for i in range(steps):
      state, metrics = step(state, place_batch(mesh, packed_batch(i)))
      losses.append(float(metrics['loss']))
      if i == 1:
        grads = jax.device_get(state.opt_state['grads'])
    return grads, jax.device_get(state.params), losses


@functools.cache
def alone(kind):
  return run(MODELS[kind], None)


def assert_near(found, expected, tolerance):
  """Every array is within `tolerance` times its own largest value."""
  for path, a in jax.tree_util.tree_flatten_with_path(expected)[0]:
    b = functools.reduce(lambda tree, k: tree[k.key], path, found)
    scale = np.abs(a).max()
    assert scale > 0, path
    np.testing.assert_allclose(b / scale, a / scale, rtol=0, atol=tolerance, err_msg=str(path))


# Every kind of axis and schedule once; the rest is `slow`.
QUICK = [('dense', 'data2 fsdp2 tensor2'), ('dense', 'context4 data2'), ('dense', 'stage2 fsdp2 tensor2')]


@pytest.mark.parametrize(('kind', 'name'), [
    pytest.param(kind, name, marks=[] if (kind, name) in QUICK else pytest.mark.slow)
    for kind in MODELS for name in MESHES])
def test_the_mesh_does_not_change_the_model(kind, name):
  sizes = dict(MESHES[name])
  pipe = PipelineSpec(**sizes.pop('pipeline', {}))
  grads, params, losses = run(MODELS[kind], MeshSpec(**sizes), pipe)
  expected_grads, expected_params, expected_losses = alone(kind)
  np.testing.assert_allclose(losses[:2], expected_losses[:2], rtol=1e-5)
  assert_near(grads, expected_grads, 1e-5)
  np.testing.assert_allclose(losses, expected_losses, rtol=1e-4)
  assert_near(params, expected_params, 1e-4)


@pytest.mark.parametrize(('sizes', 'schedule', 'context'), [
    (dict(stage=2, expert=2, context=2), 'gpipe', 'ring'),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        (dict(expert=2, context=2, tensor=2), '', 'ring'),
        (dict(data=2, stage=2, context=2), 'interleaved', 'gather'),
        (dict(stage=2, context=2, tensor=2), '1f1b', 'ring')))])
def test_experts_with_capacity_drop_the_same_tokens_on_a_mesh(sizes, schedule, context):
  """Of 11 slots of an expert each device along `context` has 6: one stays free."""
  model = dataclasses.replace(MODELS['moe'], capacity_factor=0.65)
  pipe = PipelineSpec(schedule=schedule, microbatches=4) if schedule else None
  grads, params, losses = run(model, MeshSpec(**{'data': 1, **sizes}), pipe, steps=2, context_attention=context)
  expected = run(model, None, steps=2)
  assert_near(grads, expected[0], 1e-5)
  assert_near(params, expected[1], 1e-5)
  assert abs(losses[1] - alone('moe')[2][1]) > 1e-5  # Some were dropped.


@pytest.mark.slow
@pytest.mark.parametrize('sizes', [
    dict(stage=2, expert=2, tensor=2), pytest.param(dict(fsdp=2, tensor=2, context=2), marks=pytest.mark.slow)])
def test_in_bfloat16_too(sizes):
  losses = run(MODELS['moe'], MeshSpec(**{'data': 1, **sizes}), PipelineSpec(), steps=2,
               compute_dtype='bfloat16')[2]
  np.testing.assert_allclose(losses, alone('moe')[2][:2], rtol=1e-2)


@pytest.mark.slow
def test_accumulation_inside_a_pipeline():
  grads, _, losses = run(MODELS['dense'], MeshSpec(data=1, fsdp=4, stage=2), PipelineSpec(schedule='1f1b'),
                         gradient_accumulation_steps=2, remat='full')
  np.testing.assert_allclose(losses[:2], alone('dense')[2][:2], rtol=1e-5)
  assert_near(grads, alone('dense')[0], 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('source', [
    'data2 fsdp2 tensor2', pytest.param('stage2 fsdp2 tensor2', marks=pytest.mark.slow)])
def test_a_checkpoint_of_one_mesh_restores_on_every_other_to_the_bit(source, tmp_path, record_property):
  tx = optax.adamw(1e-3)

  def sizes(name):
    return MeshSpec(**{k: v for k, v in MESHES[name].items() if k != 'pipeline'})

  mesh = make_mesh(sizes(source))
  with jax.set_mesh(mesh):
    state = init_state(whole_model(MODELS['moe']), tx, 3, mesh)
    state = state.replace(opt_state=jax.tree.map(
        lambda x: x + jnp.asarray(0.1, x.dtype) if x.dtype == jnp.float32 else x, state.opt_state))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state, {'batches': 1, 'fingerprint': ''}, {})
    checkpoints.wait()
  expected = jax.device_get(state)
  for name in MESHES:
    mesh = make_mesh(sizes(name))
    with jax.set_mesh(mesh):
      abstract = abstract_state(whole_model(MODELS['moe']), tx, mesh, zero=sizes(name).zero)
      found, _ = checkpoints.restore(1, abstract)
      assert jax.tree.all(jax.tree.map(lambda f, a: f.sharding == a.sharding, found, abstract)), name
      jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), expected)
  checkpoints.close()
  record_property('inputs', len(MESHES))


@pytest.mark.slow
@pytest.mark.parametrize('kind, sizes, pipeline', [
    ('ring', dict(context=4, tensor=2), {}),
    ('ring', dict(stage=2, context=2, data=2), dict(schedule='gpipe', microbatches=4)),
    ('gather', dict(stage=2, context=2, data=2), dict(schedule='1f1b', microbatches=4))])
def test_rows_along_the_mesh_go_round_a_ring_or_are_gathered(kind, sizes, pipeline):
  grads, _, losses = run(MODELS['dense'], MeshSpec(**{'data': 1, **sizes}), PipelineSpec(**pipeline), steps=2,
                         context_attention=kind)
  np.testing.assert_allclose(losses, alone('dense')[2][:2], rtol=1e-5)
  assert_near(grads, alone('dense')[0], 1e-5)
