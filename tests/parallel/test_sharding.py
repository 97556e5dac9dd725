"""Logical names, meshes, and the sharding of a state."""

import jax
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from llmjax.config import ConfigError
from llmjax.model.spec import ModelSpec
from llmjax.parallel.mesh import make_mesh
from llmjax.parallel.sharding import TRAIN_RULES, mesh_spec
from llmjax.parallel.spec import MeshSpec
from llmjax.train.state import init_state
from llmjax.train.trainable import whole_model

MODEL = ModelSpec(num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, mlp_dim=64, vocab_size=96)


def test_names_become_a_spec():
  assert mesh_spec(('embed', 'mlp')) == P(('fsdp', 'expert'), 'tensor')
  assert mesh_spec((None, 'batch')) == P(None, ('stage', 'data', 'fsdp', 'expert'))
  with pytest.raises(ValueError, match=r"no sharding rule for \['embde'\]"):
    mesh_spec(('embde',))
  assert TRAIN_RULES['embed'] != TRAIN_RULES['act_embed']


def test_a_mesh_fills_the_devices():
  mesh = make_mesh(MeshSpec(fsdp=2, tensor=2))
  assert dict(mesh.shape) == {'data': 2, 'fsdp': 2, 'stage': 1, 'expert': 1, 'context': 1, 'tensor': 2}
  for spec in (MeshSpec(fsdp=3), MeshSpec(data=4)):
    with pytest.raises(ConfigError, match='8 devices'):
      make_mesh(spec)


def test_slices_are_crossed_along_the_outer_part_of_an_axis():
  mesh = make_mesh(MeshSpec(data=1, fsdp=2, tensor=2, dcn_data=2))
  ids = np.vectorize(lambda d: d.id)(mesh.devices).reshape(2, 2, 2)
  assert dict(mesh.shape)['data'] == 2
  assert ids.tolist() == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]  # The first slice is devices 0 to 3.
  with pytest.raises(ConfigError, match='in each of 2 slices does not fill 8 devices'):
    make_mesh(MeshSpec(data=1, fsdp=2, dcn_stage=2))


def test_no_device_holds_the_whole_model():
  mesh = make_mesh(MeshSpec(data=1, fsdp=4, tensor=2))
  tx = optax.adam(1e-3)
  with jax.set_mesh(mesh):
    state = init_state(whole_model(MODEL), tx, 0, mesh)
  for leaf in jax.tree.leaves((state.params, state.opt_state)):
    if leaf.ndim >= 2 and leaf.shape[-1] > 2 and 'norm' not in str(leaf.sharding.spec):
      shards = {s.data.size for s in leaf.addressable_shards}
      expected = leaf.size // (1 if leaf.sharding.is_fully_replicated else 8)
      assert shards == {expected}, (leaf.shape, leaf.sharding)
  whole = sum(leaf.size for leaf in jax.tree.leaves(state.params))
  on_one = sum(leaf.addressable_shards[0].data.size for leaf in jax.tree.leaves(state.params))
  assert on_one < 1.1 * whole / 8  # Norms alone are whole everywhere.


def test_zero1_shares_the_optimizer_state():
  mesh = make_mesh(MeshSpec(data=8, zero=1))
  with jax.set_mesh(mesh):
    state = init_state(whole_model(MODEL), optax.adam(1e-3), 0, mesh, zero=1)
  gate = state.params['blocks']['mlp']['gate']
  moment = state.opt_state[0].mu['blocks']['mlp']['gate']
  assert gate.sharding.is_fully_replicated
  assert moment.addressable_shards[0].data.size == moment.size // 8
