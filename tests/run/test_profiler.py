"""A trace lists the operations that ran, with their self time and the JAX operation that each came from."""

import json

import jax
import jax.numpy as jnp
import pytest

from llmjax import config
from llmjax.run import profiler as profiling


@pytest.fixture(scope='module')
def traced(tmp_path_factory):
  """(profile folder, printed lines) of three traced steps, each a loop of four matrix products."""
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


def test_matrix_products_are_first_and_counted_once(traced):
  folder, _ = traced
  operations = json.loads((folder / 'top_operations.json').read_text())['operations']
  first = operations[0]
  assert 'dot_general' in first['origin'] and first['count'] == 3 * 4
  assert [o['total_ms'] for o in operations] == sorted(
      (o['total_ms'] for o in operations), reverse=True)
  assert len(operations) <= 10 and sum(o['percent'] for o in operations) <= 100.01
  # The self time of a loop excludes its body.
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


# A trace of CUDA graphs: the hlo_op of every kernel is the graph's, and the kernel's name is the event's.
GPU_TRACE = '''
planes {
  name: "/device:GPU:0"
  event_metadata { key: 1 value { id: 1 name: "loop_add_fusion_3" } }
  event_metadata { key: 2 value { id: 2 name: "void cutlass::Kernel2<gemm>" } }
  event_metadata { key: 3 value { id: 3 name: "other_fusion" } }
  stat_metadata { key: 1 value { id: 1 name: "hlo_op" } }
  stat_metadata { key: 2 value { id: 2 name: "hlo_module" } }
  lines { id: 1 name: "Stream #20(Compute)" EVENTS }
}'''


def gpu_event(kernel, begin_us, duration_us, hlo_op):
  return (f'events {{ metadata_id: {kernel} offset_ps: {begin_us}000000 duration_ps: {duration_us}000000 '
          f'stats {{ metadata_id: 1 str_value: "{hlo_op}" }} stats {{ metadata_id: 2 str_value: "jit_step" }} }}')


def test_kernels_of_a_cuda_graph_are_listed_by_their_own_names(tmp_path):
  events = [(1, 0, 10, 'command_buffer_178'), (2, 20, 70, 'command_buffer_178'), (1, 100, 10, 'command_buffer'),
            (3, 200, 10, 'dot.7')]
  trace = GPU_TRACE.replace('EVENTS', ' '.join(gpu_event(*event) for event in events))
  folder = tmp_path / 'plugins/profile/now'
  folder.mkdir(parents=True)
  (folder / 'a.xplane.pb').write_bytes(jax.profiler.ProfileData.text_proto_to_serialized_xspace(trace))
  operations = profiling.top_operations(tmp_path, {('jit_step', 'loop_add_fusion_3'): 'jit(step)/add'})
  assert [(o['name'], o['origin'], o['total_ms'], o['count']) for o in operations] == [
      ('cutlass::Kernel2<gemm>', '', 0.07, 1), ('loop_add_fusion_3', 'jit(step)/add', 0.02, 2), ('dot.7', '', 0.01, 1)]


def test_origins_are_read_from_the_loaded_programs():
  compiled = jax.jit(lambda x: jnp.tanh(x @ x)).lower(jnp.ones((8, 8))).compile()
  origins = profiling.operation_origins()
  assert any(origin.endswith('/dot_general') for origin in origins.values())
  del compiled


def test_the_table_fits_a_terminal():
  operation = {'name': 'x' * 60, 'total_ms': 1.0, 'percent': 50.0, 'count': 3, 'origin': 'y' * 90}
  for columns in (80, 120):
    table = profiling.format_operations([operation], '2:5', 'profile', columns)
    assert max(map(len, table.splitlines()[1:])) < columns
