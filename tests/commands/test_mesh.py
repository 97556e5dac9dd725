"""`llmjax mesh` against the arrays of a real state, and on the command line."""

import pathlib
import re
import time

import jax
import numpy as np
import pytest

from llmjax.commands.mesh import draw, table
from llmjax.model.spec import ModelSpec
from llmjax.parallel.mesh import make_mesh
from llmjax.parallel.spec import MeshSpec
from llmjax.train.optimizers import make_optimizer
from llmjax.train.spec import OptimizerSpec
from llmjax.train.state import init_state
from llmjax.train.trainable import whole_model
from tests.helpers import call_and_read, run_process

ROOT = pathlib.Path(__file__).parents[2]
MODEL = dict(num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, mlp_dim=64, vocab_size=4096)
ARGUMENTS = [*(f'--config.model.{k}={v}' for k, v in MODEL.items()), '--config.train.batch_size=8',
             '--config.data.seq_len=16', '--config.train.compute_dtype=float32']


@pytest.fixture
def recipe(tmp_path):
  path = tmp_path / 'recipe.py'
  path.write_text("def get_config():\n  return {'data': {'sources': {'data/nowhere': 1.0}}}\n")
  return f'--config={path}'


def call(capfd, *argv):
  jax.devices()  # Initialize JAX with eight devices before the command chooses a number.
  return call_and_read(capfd, 'mesh', *argv)


def row(out, name):
  line = next(line for line in out.splitlines() if re.match(rf'{name}  ', line))
  return re.split(r'\s{2,}', line)


@pytest.mark.slow
def test_bytes_and_shardings_match_a_real_state(recipe, capfd):
  status, out, err = call(capfd, recipe, *ARGUMENTS, '--config.mesh.data=2', '--config.mesh.fsdp=2',
                          '--config.mesh.tensor=2', '--config.optimizer.moment_dtype=bfloat16')
  assert status == 0, err
  assert max(map(len, out.splitlines())) <= 100
  tx, _ = make_optimizer(OptimizerSpec(moment_dtype='bfloat16'), 10)
  state = init_state(whole_model(ModelSpec(**MODEL)), tx, 0, make_mesh(MeshSpec(data=2, fsdp=2, tensor=2)))
  local = lambda tree: sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree)) / 2**20
  table_ = state.params['embed']['table']
  assert row(out, 'embed/table') == ['embed/table', '4096x32', 'P(tensor, fsdp)', 'float32',
                                     f'{table_.addressable_shards[0].data.nbytes / 2**20:.3f}', '0.125']
  assert row(out, 'blocks/mlp/gate')[2] == 'P(-, fsdp, tensor)'
  total = row(out, 'total')
  assert total[1] == f'{sum(x.size for x in jax.tree.leaves(state.params)):,}'
  assert float(total[2]) == pytest.approx(local(state.params), abs=5e-4)
  assert float(total[3]) == pytest.approx(local(state.opt_state), abs=2e-3)
  assert 'P(data+fsdp, -): 2 x 16 per device, replicated over tensor' in out
  # All-gather of weights over fsdp, all-reduce of activations over tensor and of gradients over data.
  for kind, over in (('all-gather', 'fsdp'), ('all-reduce', 'tensor'), ('all-reduce', 'data')):
    assert any(re.match(rf'{kind} +{over}  +\d+ +\d+ ', line) for line in out.splitlines()), (kind, over)


def test_data_parallelism_reduces_only_the_gradients(recipe, capfd):
  _, out, _ = call(capfd, recipe, *ARGUMENTS, '--devices=4', '--config.mesh.data=-1')
  assert out.startswith('mesh: 4 cpu devices = data 4\n data    0    1    2    3\n         0    1    2    3\n')
  lines = [re.split(r'\s{2,}', line) for line in out.splitlines() if line.startswith(('all-', 'collective-'))]
  assert [line[:2] for line in lines] == [['all-reduce', 'data']]
  params = float(row(out, 'total')[2])
  assert params <= float(lines[0][4]) < 1.01 * params  # Plus the loss and its weight.


def test_no_compile_is_fast_and_needs_no_data(recipe, tmp_path):
  """In a subprocess, with more devices than other tests."""
  start = time.perf_counter()
  done = run_process(tmp_path, 'mesh', recipe, *ARGUMENTS, '--no-compile', '--config.mesh.data=4',
                     '--config.mesh.context=8', '--config.mesh.tensor=2', JAX_PLATFORMS='cpu')
  assert done.returncode == 0, done.stderr
  assert time.perf_counter() - start < 20  # 3 s on an idle machine.
  assert 'mesh: 64 cpu devices = data 4 x context 8 x tensor 2' in done.stdout
  assert 'collectives' not in done.stdout
  assert max(map(len, done.stdout.splitlines())) <= 100


@pytest.mark.parametrize(('arguments', 'message'), [
    (['--devices=6', '--config.mesh.fsdp=4'], 'mesh: data -1 x fsdp 4 does not fill 6 devices'),
    (['--config.model.vocab_size=0'], 'data/nowhere'),
    (['--config.model.vocab_size=0'], 'or set model.vocab_size'),
    (['--config.model.vocab_size=4095', '--config.mesh.tensor=2'],
     'model.vocab_size=4095 is not divisible by mesh.tensor=2; write model.vocab_size=4094 or 4096'),
    (['--devices=8', '--config.train.batch_size=4'],
     'train.batch_size=4 is not divisible by mesh.data=8; write train.batch_size=8, or change the mesh'),
    (['--devices=900', '--config.train.batch_size=900'], 'this process has started JAX with 8 CPU devices'),
])
def test_mistakes_are_reported(recipe, capfd, arguments, message):
  status, _, err = call(capfd, recipe, *ARGUMENTS, '--no-compile', *arguments)
  assert status == 2
  assert message in err
  assert 'Traceback' not in err


class Device:
  platform = 'tpu'

  def __init__(self, number):
    self.id = number


class Mesh:
  """The attributes of a mesh that `draw` uses, with fake devices."""

  def __init__(self, devices, **shape):
    self.shape, self.axis_names, self.size = shape, tuple(shape), len(devices)
    places = np.empty(len(devices), object)
    places[:] = [Device(i) for i in devices]
    self.devices = places.reshape(tuple(shape.values()))


def test_draw_shows_the_position_of_each_device():
  assert draw(Mesh([5], data=1, tensor=1)) == 'mesh: one tpu device'
  picture = draw(Mesh([0, 1, 3, 2, 4, 5, 7, 6], data=2, fsdp=2, stage=1, tensor=2))
  assert picture == '''\
mesh: 8 tpu devices = data 2 x fsdp 2 x tensor 2
data 0
         tensor    0    1
  fsdp 0           0    1
  fsdp 1           3    2
data 1
         tensor    0    1
  fsdp 0           4    5
  fsdp 1           7    6'''


def test_draw_abbreviates_large_meshes():
  lines = draw(Mesh(range(4 * 8 * 12 * 40), data=4, fsdp=8, context=12, tensor=40)).splitlines()
  assert max(map(len, lines)) <= 100
  assert len(lines) < 60
  assert lines[1] == 'data 0, fsdp 0'
  assert lines[-1].split()[-1] == str(4 * 8 * 12 * 40 - 1)
  assert lines[-1].startswith('  context 11')
  assert '...' in lines


def test_table_aligns_and_truncates_columns():
  lines = table([('name', 'n'), ('x' * 150 + '/tail', 12345), ('short', 7)], right=(1,)).splitlines()
  assert [len(line) for line in lines] == [100] * 3
  assert lines[1].startswith('...xxx')
  assert lines[1].endswith('/tail  12345')
  assert lines[2].endswith('      7')
