"""A real trace gives the operations that ran, once each, with where they came from."""

import json

import jax
import jax.numpy as jnp
import pytest

from llmjax import config
from llmjax.run import profiler as profiling


@pytest.fixture(scope='module')
def traced(tmp_path_factory):
  """(folder, what was said) of three traced steps, each a loop of four matrix products."""
  workdir, said = tmp_path_factory.mktemp('run'), []

  @jax.jit
  def step(x):
    return jax.lax.scan(lambda c, _: (jnp.tanh(c @ c), None), x, length=4)[0]

  x = jnp.full((768, 768), 0.005)
  step(x).block_until_ready()
  profiler = profiling.Profiler(workdir, '2:5', say=said.append)
  for i in range(1, 8):
    profiler.before(i)
    x = step(x)
    profiler.after(i)
  profiler.close()
  return workdir / 'profile', said


def test_products_lead_the_table_and_are_counted_once(traced):
  folder, _ = traced
  operations = profiling.top_operations(folder)
  first = operations[0]
  assert 'dot_general' in first['origin'] and first['count'] == 3 * 4
  assert [o['total_ms'] for o in operations] == sorted(
      (o['total_ms'] for o in operations), reverse=True)
  assert len(operations) <= 10 and sum(o['percent'] for o in operations) <= 100.01
  # A loop's own time is without its body's.
  assert all(o['percent'] < 50 for o in operations if o['name'].startswith('while'))


def test_files_for_viewers_and_for_programs(traced):
  folder, said = traced
  assert list(folder.glob('plugins/profile/*/*.xplane.pb'))
  assert list(folder.glob('plugins/profile/*/perfetto_trace.json.gz'))
  saved = json.loads((folder / 'top_operations.json').read_text())
  assert saved['steps'] == [2, 5] and saved['operations'][0]['name'] in said[0]
  assert len(said) == 1 and 'steps 2:5' in said[0]
  assert max(map(len, said[0].splitlines()[1:])) <= 130


def test_a_run_that_ends_inside_the_range_still_writes_its_trace(tmp_path):
  said = []
  profiler = profiling.Profiler(tmp_path, '0:100', say=said.append)
  profiler.before(5)
  jnp.ones((64, 64)).sum().block_until_ready()
  profiler.after(5)
  assert not said
  profiler.close()
  profiler.close()
  assert len(said) == 1 and list(tmp_path.glob('profile/plugins/profile/*/*.xplane.pb'))


def test_nothing_happens_without_a_range(tmp_path):
  profiler = profiling.Profiler(tmp_path)
  profiler.before(0)
  profiler.after(0)
  profiler.close()
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('steps', ['10', '13:10', '10:10', 'a:b', '-1:3', '1:2:3'])
def test_wrong_ranges_are_named(steps):
  with pytest.raises(config.ConfigError, match="must be 'first:end'"):
    config.build(profiling.ProfileSpec, {'steps': steps})


def test_right_ranges_are_read():
  assert profiling.parse_steps('10:13') == (10, 13)
  assert config.build(profiling.ProfileSpec, {}).steps == ''


def message(*fields):
  """Returns a protocol buffer message of (field number, int, text or bytes)."""
  def varint(value):
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + varint(value >> 7)

  out = b''
  for number, value in fields:
    if isinstance(value, int):
      out += varint(number << 3) + varint(value)
    else:
      value = value.encode() if isinstance(value, str) else value
      out += varint(number << 3 | 2) + varint(len(value)) + value
  return out


def test_kernels_of_a_gpu_graph_go_by_their_own_names(tmp_path):
  """In a trace of CUDA graphs every kernel's hlo_op is the graph's; its own name is the event's."""
  instruction = message((1, 'loop_add_fusion.3'), (7, message((2, 'jit(step)/add'))))
  program = message((1, message((1, 'jit_step'), (3, message((2, instruction))))))
  kernels = ['loop_add_fusion_3', 'void cutlass::Kernel2<gemm>', 'other_fusion']
  metadata = [(4, message((1, i), (2, message((1, i), (2, name))))) for i, name in enumerate(kernels, 1)]
  stats = [(5, message((1, i), (2, message((1, i), (2, name))))) for i, name in enumerate(('hlo_op', 'hlo_module'), 1)]
  event = lambda kernel, at, micros, op: (4, message(
      (1, kernel), (2, at * 10**6), (3, micros * 10**6), (4, message((1, 1), (5, op))),
      (4, message((1, 2), (5, 'jit_step')))))
  line = message((1, 1), (2, 'Stream #20(Compute)'), (3, 0), *(
      event(1, 0, 10, 'command_buffer_178'), event(2, 20, 70, 'command_buffer_178'),
      event(1, 100, 10, 'command_buffer'), event(3, 200, 10, 'dot.7')))
  gpu = message((1, 1), (2, '/device:GPU:0'), (3, line), *metadata, *stats)
  host = message((1, 2), (2, '/host:metadata'), (4, message((1, 1), (2, message((1, 1), (2, 'jit_step'), (5, message(
      (1, 1), (6, program))))))))
  folder = tmp_path / 'plugins/profile/now'
  folder.mkdir(parents=True)
  (folder / 'a.xplane.pb').write_bytes(message((1, gpu), (1, host)))
  found = profiling.top_operations(tmp_path)
  assert [(o['name'], o['origin'], o['total_ms'], o['count']) for o in found] == [
      ('cutlass::Kernel2<gemm>', '', 0.07, 1), ('loop_add_fusion_3', 'jit(step)/add', 0.02, 2), ('dot.7', '', 0.01, 1)]


def test_the_table_fits_a_terminal():
  operation = {'name': 'x' * 60, 'total_ms': 1.0, 'percent': 50.0, 'count': 3, 'origin': 'y' * 90}
  for columns in (80, 120):
    table = profiling.format_operations([operation], '2:5', 'profile', columns)
    assert max(map(len, table.splitlines()[1:])) < columns
