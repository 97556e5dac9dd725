"""The mesh does not change the model: loss, gradients and training are one device's on every mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llmjax.model.spec import ModelSpec
from llmjax.parallel.mesh import make_mesh, place_batch
from llmjax.parallel.spec import MeshSpec, PipelineSpec
from llmjax.train import objectives
from llmjax.train.spec import TrainSpec
from llmjax.train.state import init_state
from llmjax.train.step import make_train_step

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
    'data4 fsdp2 zero1': dict(data=4, fsdp=2, zero1=True),
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
      rows['loss_mask'][b, start:end] = rng.random(end - start) < 0.9
    rows['tokens'][b] = rng.integers(0, 96, T)
    rows['targets'][b] = rng.integers(0, 96, T)
  return rows


def keep_gradients(lr):
  """Gradient descent whose state is the gradient, so that a test sees it with all its digits."""
  return optax.GradientTransformation(
      lambda params: {'grads': jax.tree.map(jnp.zeros_like, params)},
      lambda grads, state, params: (jax.tree.map(lambda g: -lr * g, grads), {'grads': grads}))


def run(model, mesh_spec, steps, pipe=None, **train):
  """Returns (gradients of the last step, losses) of `steps` steps on a mesh; None is one device."""
  mesh = make_mesh(mesh_spec or MeshSpec(), jax.devices()[:1] if mesh_spec is None else None)
  train = TrainSpec(compute_dtype='float32', scan_unroll=1, **train)
  tx = keep_gradients(0.5)
  with jax.set_mesh(mesh):
    state, shardings = init_state(model, tx, 0, 'float32', mesh, zero1=bool(mesh_spec and mesh_spec.zero1))
    loss_fn = objectives.next_token(model, train, 'cpu', pipe)
    step = jax.jit(make_train_step(loss_fn, tx, lambda _: 1.0, train.accumulation), donate_argnums=0,
                   out_shardings=(shardings, None))
    losses = []
    for i in range(steps):
      state, metrics = step(state, place_batch(mesh, packed_batch(i)))
      losses.append(float(metrics['loss']))
    return jax.device_get(state.opt_state['grads']), losses


@functools.cache
def alone(kind, steps):
  return run(MODELS[kind], None, steps)


@pytest.mark.parametrize('name', MESHES)
@pytest.mark.parametrize('kind', MODELS)
def test_the_mesh_does_not_change_the_model(kind, name):
  sizes = dict(MESHES[name])
  pipe = PipelineSpec(**sizes.pop('pipeline', {}))
  # The head starts at zero and hides what lies below it from the first gradient.
  grads, losses = run(MODELS[kind], MeshSpec(**sizes), 2, pipe)
  expected_grads, expected_losses = alone(kind, 2)
  np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
  for path, g in jax.tree_util.tree_flatten_with_path(expected_grads)[0]:
    found = functools.reduce(lambda tree, k: tree[k.key], path, grads)
    scale = np.abs(g).max()
    assert scale > 0
    np.testing.assert_allclose(found / scale, g / scale, atol=1e-5, err_msg=str(path))
