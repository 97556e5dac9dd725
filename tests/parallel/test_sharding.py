"""Logical names, meshes, and a first proof that the mesh does not change the step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from llmjax.config import ConfigError
from llmjax.model.spec import ModelSpec
from llmjax.parallel.mesh import make_mesh, place_batch
from llmjax.parallel.sharding import TRAIN_RULES, mesh_spec
from llmjax.parallel.spec import MeshSpec
from llmjax.train import objectives
from llmjax.train.spec import TrainSpec
from llmjax.train.state import init_state
from llmjax.train.step import make_train_step

MODEL = ModelSpec(num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, mlp_dim=64, vocab_size=96)


def test_names_become_a_spec():
  assert mesh_spec(('embed', 'mlp')) == P('fsdp', 'tensor')
  assert mesh_spec((None, 'batch')) == P(None, ('data', 'fsdp'))
  with pytest.raises(ValueError, match=r"no sharding rule for \['embde'\]"):
    mesh_spec(('embde',))
  assert TRAIN_RULES['embed'] != TRAIN_RULES['act_embed']


def test_a_mesh_fills_the_devices():
  mesh = make_mesh(MeshSpec(fsdp=2, tensor=2))
  assert dict(mesh.shape) == {'data': 2, 'fsdp': 2, 'stage': 1, 'expert': 1, 'context': 1, 'tensor': 2}
  for spec in (MeshSpec(fsdp=3), MeshSpec(data=4)):
    with pytest.raises(ConfigError, match='8 devices'):
      make_mesh(spec)


@pytest.mark.parametrize('sizes', [dict(data=8), dict(data=1, fsdp=8), dict(data=2, fsdp=2, tensor=2)])
def test_the_mesh_does_not_change_the_step(sizes):
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, 96, (8, 17))
  batch = {'tokens': tokens[:, :-1], 'targets': tokens[:, 1:],
           'loss_mask': (rng.random((8, 16)) < 0.8).astype(np.float32),
           'segment_ids': np.ones((8, 16), np.int32), 'positions': np.tile(np.arange(16), (8, 1))}
  tx = optax.sgd(1.0)

  def run(mesh):
    with jax.set_mesh(mesh):
      state, shardings = init_state(MODEL, tx, 0, 'float32', mesh)
      step = jax.jit(make_train_step(
          objectives.next_token(MODEL, TrainSpec(compute_dtype='float32'), 'cpu'), tx, lambda _: 1.0,
          accumulation=1))
      for _ in range(2):  # The head starts at zero: only the second gradient reaches every weight.
        state, metrics = step(state, place_batch(mesh, batch))
      return jax.device_get((state.params, metrics)), state, shardings

  one = make_mesh(MeshSpec(), jax.devices()[:1])
  (params, metrics), _, _ = run(one)
  (found, found_metrics), state, _ = run(make_mesh(MeshSpec(**sizes)))
  assert found_metrics['loss'] == pytest.approx(metrics['loss'], rel=1e-5)
  for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(found), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
  if 'fsdp' in sizes:
    kernel = state.params['blocks']['mlp']['gate']
    local = kernel.addressable_shards[0].data.size
    assert local == kernel.size // (sizes['fsdp'] * sizes.get('tensor', 1))
    assert jnp.isfinite(kernel).all()
