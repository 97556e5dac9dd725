"""Training adapters on a mesh equals training on one device; the frozen base is sharded like parameters."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llmjax.adapt.lora import init_adapter
from llmjax.adapt.quantize import quantize_tree
from llmjax.adapt.spec import AdapterSpec
from llmjax.model.model import Model
from llmjax.model.spec import ModelSpec
from llmjax.parallel.mesh import make_mesh, place_batch
from llmjax.parallel.sharding import tree_shardings
from llmjax.parallel.spec import MeshSpec, PipelineSpec
from llmjax.train import objectives
from llmjax.train.spec import TrainSpec
from llmjax.train.state import init_state, zero_rules
from llmjax.train.step import make_train_step
from llmjax.train.trainable import adapters

MODELS = {
    'dense': ModelSpec(num_layers=2, d_model=32, num_heads=4, mlp_dim=64, vocab_size=96),
    'moe': ModelSpec(num_layers=2, d_model=32, num_heads=4, mlp_dim=32, vocab_size=96, num_experts=4,
                     shared_experts=1, tie_embeddings=True),
}
CASES = {
    'lora fsdp tensor': ('dense', dict(data=2, fsdp=2, tensor=2), dict(kind='lora', targets=('*',))),
    'dora nf4 fsdp zero3': ('dense', dict(data=2, fsdp=4, zero=3), dict(kind='dora', quantize='nf4')),
    'lora nf4 tensor stage': ('dense', dict(data=2, tensor=2, stage=2), dict(kind='lora', quantize='nf4')),
    'dora expert context': ('moe', dict(data=1, expert=2, context=2, tensor=2), dict(kind='dora', targets=('*',))),
    'lora int8 expert': ('moe', dict(data=2, expert=4), dict(kind='lora', quantize='int8')),
    'dropout': ('dense', dict(data=2, fsdp=2, tensor=2), dict(kind='lora', dropout=0.3)),
}
QUICK = ()


def batch():
  rng = np.random.default_rng(0)
  return {'tokens': rng.integers(0, 96, (8, 16)).astype(np.int32), 'segment_ids': np.ones((8, 16), np.int32),
          'targets': rng.integers(0, 96, (8, 16)).astype(np.int32),
          'positions': np.tile(np.arange(16, dtype=np.int32), (8, 1)),
          'loss_mask': (rng.random((8, 16)) < 0.8).astype(np.float32)}


@functools.cache
def base_of(kind):
  params = jax.jit(Model(MODELS[kind]).init)(jax.random.key(0))
  if 'head' in params:
    params['head']['kernel'] = 0.2 * jax.random.normal(jax.random.key(9), params['head']['kernel'].shape)
  return jax.device_get(params)


def train(kind, sizes, spec, steps=3):
  """Return (losses, parameters, state on the mesh)."""
  model = MODELS[kind]
  mesh_spec = MeshSpec(**(sizes or {}))
  mesh = make_mesh(mesh_spec, jax.devices()[:1] if sizes is None else None)
  names, place = Model(model).param_names(), lambda n: tree_shardings(mesh, n, zero_rules(mesh_spec.zero, 3))
  tx = optax.sgd(0.5)

  def moved(key, base):
    adapter = init_adapter(spec, base, key)
    return {'one': jax.tree.map(lambda x: x + 0.02 * jnp.cos(jnp.arange(x.size).reshape(x.shape)), adapter)}

  base = jax.tree.map(jax.device_put, base_of(kind), place(names))
  with jax.set_mesh(mesh):
    base = quantize_tree(base, spec.quantize, names, place, delete=False) if spec.quantize else base
    trained = adapters(model, dataclasses.replace(spec, name='one'))
    trained = dataclasses.replace(trained, init=lambda key, frozen: moved(key, frozen['base']))
    state = init_state(trained, tx, 0, mesh, mesh_spec.zero, {'base': base})
    loss_fn = trained.wrap(objectives.next_token(objectives.make_model(
        model, TrainSpec(compute_dtype='float32', scan_unroll=1), 'cpu', PipelineSpec(microbatches=2))))
    layout = jax.tree.map(lambda x: x.sharding, state)
    step = jax.jit(make_train_step(loss_fn, tx, lambda _: 0.5), donate_argnums=0, out_shardings=(layout, None))
    losses = []
    for _ in range(steps):
      state, metrics = step(state, place_batch(mesh, batch()))
      losses.append(float(metrics['loss']))
  return losses, jax.device_get(state.params), state


@pytest.mark.parametrize('name', [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CASES])
def test_the_mesh_does_not_change_the_training(name):
  kind, sizes, adapter = CASES[name]
  spec = AdapterSpec(rank=4, alpha=4.0, **adapter)
  expected_losses, expected, _ = train(kind, None, spec)
  losses, params, state = train(kind, sizes, spec)
  np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
  assert losses[-1] < losses[0] - 1e-3
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * np.abs(b).max()), params, expected)
  query = state.frozen['base']['blocks']['attention']['query']
  codes = query.codes if spec.quantize else query
  factors = state.params['one']['blocks']['attention']['query']
  whole = lambda x: x.sharding.shard_shape(x.shape) == x.shape
  divided = {axis: n for axis, n in sizes.items() if axis in ('fsdp', 'tensor', 'expert', 'stage') and n > 1}
  assert not whole(codes) and divided
  assert not whole(factors['a']) or set(divided) == {'tensor'}
  assert factors['a'].sharding.spec[1] == codes.sharding.spec[1]
