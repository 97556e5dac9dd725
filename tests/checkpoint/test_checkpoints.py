"""Saved states are restored bit-exactly."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.checkpoint.checkpoints import Checkpoints
from llmjax.checkpoint.load import find_step, load_params, read_config
from llmjax.checkpoint.spec import CheckpointSpec
from llmjax.config import ConfigError
from llmjax.model.spec import ModelSpec
from llmjax.parallel.mesh import make_mesh
from llmjax.parallel.spec import MeshSpec
from llmjax.train.optimizers import make_optimizer
from llmjax.train.spec import OptimizerSpec
from llmjax.train.state import abstract_state, init_state
from llmjax.train.trainable import whole_model

MODEL = ModelSpec(num_layers=2, d_model=16, num_heads=2, mlp_dim=32, vocab_size=64)
SETTINGS = {'model': {'num_layers': 2, 'd_model': 16, 'num_heads': 2, 'mlp_dim': 32, 'vocab_size': 64},
            'train': {'param_dtype': 'float32'}}


@pytest.mark.slow
def test_save_and_restore_on_another_mesh(tmp_path):
  tx, _ = make_optimizer(OptimizerSpec(), 10)
  mesh = make_mesh(MeshSpec(fsdp=8, data=1))
  with jax.set_mesh(mesh):
    state = init_state(whole_model(MODEL), tx, 3, mesh)
    state = state.replace(step=state.step + 7, opt_state=jax.tree.map(lambda x: x + 1, state.opt_state))
    checkpoints = Checkpoints(tmp_path, CheckpointSpec(keep=2))
    for step in (5, 6, 7):
      checkpoints.save(step, state, {'batches': 123, 'fingerprint': 'abc'}, SETTINGS)
    checkpoints.close()
  (tmp_path / 'config.json').write_text(json.dumps(SETTINGS))
  assert sorted(p.name for p in (tmp_path / 'checkpoints').iterdir()) == ['6', '7']
  assert find_step(tmp_path) == 7

  other = make_mesh(MeshSpec(fsdp=2, tensor=2))
  checkpoints = Checkpoints(tmp_path)
  found, stream = checkpoints.restore(
      checkpoints.latest(), abstract_state(whole_model(MODEL), tx, other))
  checkpoints.close()
  assert stream == {'batches': 123, 'fingerprint': 'abc'}
  for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(found), strict=True):
    np.testing.assert_array_equal(a, b)
    assert a.dtype == b.dtype
  params, model, settings, step = load_params(tmp_path)
  assert (step, model, settings) == (7, MODEL, SETTINGS)
  jax.tree.map(np.testing.assert_array_equal, params, state.params)
  assert all(isinstance(x, jnp.ndarray) for x in jax.tree.leaves(params))


def test_messages(tmp_path):
  with pytest.raises(ConfigError, match='no config.json'):
    read_config(tmp_path)
  with pytest.raises(ConfigError, match='has no checkpoint yet'):
    find_step(tmp_path)
  for name in ('3', '40', '7.orbax-checkpoint-tmp'):
    (tmp_path / 'checkpoints' / name).mkdir(parents=True)
  with pytest.raises(ConfigError, match='it has 3, 40'):
    find_step(tmp_path, 7)
  with pytest.raises(ConfigError, match='40 is not loaded: it is an empty folder'):
    find_step(tmp_path, 40)
