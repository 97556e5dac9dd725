"""A real trace gives the operations that ran, once each, with where they came from."""

import json

import jax
import jax.numpy as jnp
import pytest

from llmjax import config
from llmjax.loops import profiling


@pytest.fixture(scope='module')
def traced(tmp_path_factory):
  """(folder, what was said) of three traced steps, each a loop of four matrix products."""
  workdir, said = tmp_path_factory.mktemp('run'), []

  @jax.jit
  def step(x):
    return jax.lax.scan(lambda c, _: (jnp.tanh(c @ c), None), x, length=4)[0]

  x = jnp.full((384, 384), 0.01)
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
