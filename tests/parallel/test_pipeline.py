"""Pipeline schedules: order of layers and microbatches, and memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from llmjax.model.model import Model
from llmjax.model.spec import ModelSpec
from llmjax.parallel import pipeline, sharding
from llmjax.parallel.mesh import make_mesh
from llmjax.parallel.spec import MeshSpec, PipelineSpec
from llmjax.train import objectives
from llmjax.train.spec import TrainSpec


@pytest.mark.parametrize(('stages', 'rounds'), [(2, 2), (4, 2), (2, 3), (4, 3), (4, 4), (8, 2)])
def test_every_stage_gets_its_own_groups_of_layers(stages, rounds):
  layers = jnp.arange(stages * rounds * 2).reshape(-1, 1)  # Two layers a group.
  with jax.set_mesh(make_mesh(MeshSpec(data=-1, stage=stages))):
    dealt = jax.jit(jax.shard_map(
        lambda p: pipeline._deal({'w': p}, stages, rounds)['w'][None], in_specs=P('stage'),
        out_specs=P('stage'), axis_names={'stage'}, check_vma=False))(layers)
  for stage in range(stages):
    for turn in range(rounds):
      first = 2 * (turn * stages + stage)
      assert dealt[stage, turn, :, 0].tolist() == [first, first + 1]


@pytest.mark.parametrize(('rounds', 'microbatches'), [(1, 4), (1, 12), (2, 4), (2, 8)])
def test_every_microbatch_passes_every_layer_in_order(rounds, microbatches):
  """A layer maps x to 3 x + its number, so that order and count show; aux counts visits."""
  stages, rows = 4, 24
  numbers = jnp.arange(1.0, 9.0)
  x = jnp.arange(rows, dtype=jnp.float32).reshape(rows, 1, 1)

  def stage_fn(params, x, ids, index):
    for i in range(params.shape[0]):
      x = 3 * x + params[i]
    return x, {'visits': jnp.float32(params.shape[0]), 'rows': jnp.sum(ids['row'] * 1.0), 'index': index * 1.0,
               'square': index * 1.0 * index}

  with jax.set_mesh(make_mesh(MeshSpec(data=-1, stage=stages))):
    run = jax.jit(lambda p, x: pipeline.forward(
        stage_fn, p, x, {'row': jnp.arange(rows)}, microbatches=microbatches, rounds=rounds))
    y, aux = run(numbers, x)
  expected = x
  for number in numbers:
    expected = 3 * expected + number
  np.testing.assert_array_equal(y, expected)
  assert aux['visits'] == microbatches * 8
  assert aux['rows'] == stages * rounds * sum(range(rows))
  numbers = np.arange(microbatches * stages * rounds)  # Each once: no two draw the same dropout.
  assert (aux['index'], aux['square']) == (numbers.sum(), np.square(numbers).sum())


def compiled_step(schedule, microbatches, rows_each=8):
  """Returns the compiled gradient of a small model on stage 4 x data 2, remat full."""
  model = ModelSpec(num_layers=4, d_model=64, num_heads=2, mlp_dim=128, vocab_size=128)
  mesh, length = make_mesh(MeshSpec(data=2, stage=4)), 64
  with jax.set_mesh(mesh):
    layout = sharding.tree_shardings(mesh, Model(model).param_names())
    params = jax.tree.map(lambda s, n: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=n),
                          Model(model).abstract_params(), layout)
    rows = jax.NamedSharding(mesh, sharding.mesh_spec(('batch', 'length')))
    batch = {name: jax.ShapeDtypeStruct((microbatches * rows_each, length), dtype, sharding=rows)
             for name, dtype in (('tokens', jnp.int32), ('targets', jnp.int32), ('positions', jnp.int32),
                                 ('segment_ids', jnp.int32), ('loss_mask', jnp.float32))}
    loss_fn = objectives.next_token(objectives.make_model(
        model, TrainSpec(compute_dtype='float32', remat='full', scan_unroll=1), 'cpu',
        PipelineSpec(schedule=schedule, microbatches=microbatches)))
    return jax.jit(jax.grad(lambda p, b: loss_fn(p, {}, b, None)[0]), out_shardings=layout).lower(
        params, batch).compile()


@pytest.mark.slow
def test_memory_of_1f1b_does_not_grow_with_microbatches():
  temp = {(s, m): compiled_step(s, m).memory_analysis().temp_size_in_bytes
          for s, m in (('1f1b', 4), ('1f1b', 16), ('gpipe', 4), ('gpipe', 16))}
  assert temp['1f1b', 16] <= 1.15 * temp['1f1b', 4]
  assert temp['gpipe', 16] > 1.15 * temp['gpipe', 4]  # So that the bound says something.


def test_bubble():
  assert pipeline.bubble('gpipe', 4, 8) == (3, 11)
  assert pipeline.bubble('interleaved', 4, 8, rounds=2) == (3, 19)
  assert PipelineSpec().count(4, rows=6) == 12
  assert PipelineSpec(microbatches=16).count(4, rows=4) == 16
