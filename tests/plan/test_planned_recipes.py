"""The recipes of configs/pretrain on their chips: all with the analytical model, the small ones compiled."""

import importlib.util
import json
import os
import pathlib
import runpy
import subprocess
import sys

import pytest

from llmjax import config, recipes
from llmjax.commands.plan import settle
from llmjax.commands.spec import PlanSpec
from llmjax.plan import analytical
from llmjax.plan.topology import parse_topology

ROOT = pathlib.Path(__file__).parents[2]


def load_tool(name):
  spec = importlib.util.spec_from_file_location(name, ROOT / f'tools/{name}.py')
  module = sys.modules[name] = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


PROGRAMS = load_tool('plan_recipes').PROGRAMS
KEPT = {e['name']: e for e in json.loads((ROOT / 'experiments/tpu_recipes/table.json').read_text())}


def test_the_list_covers_every_recipe_and_strategy():
  recipes = {p.name for p in (ROOT / 'configs/pretrain').glob('*.py')} - {'quickstart.py'}
  assert {p.recipe.partition(':')[0] for p in PROGRAMS} == recipes
  variants = {f'{name}:{variant}' for name in recipes
              for variant in load_recipe_variants(ROOT / 'configs/pretrain' / name)}
  assert {p.recipe for p in PROGRAMS if ':' in p.recipe} == variants
  assert len({p.name for p in PROGRAMS}) == len(PROGRAMS)
  axes = {axis for p in PROGRAMS for axis, n in KEPT[p.name].get('mesh', {}).items() if n > 1}
  assert axes == {'data', 'fsdp', 'stage', 'expert', 'context', 'tensor'}
  assert {1, 2, 4} <= {p.slices for p in PROGRAMS}


def load_recipe_variants(path):
  return runpy.run_path(str(path)).get('VARIANTS', {})


@pytest.mark.parametrize('program', PROGRAMS, ids=lambda p: p.name)
def test_the_mesh_fills_the_chips_and_divides_the_model(program, capsys):
  topology = parse_topology(program.topology, program.slices)
  spec = config.build(PlanSpec, recipes.load_recipe(str(ROOT / 'configs/pretrain' / program.recipe)),
                      [(name, str(value)) for name, value in program.changes.items()])
  spec = settle(spec, topology)
  assert spec.mesh.size(*('data', 'fsdp', 'stage', 'expert', 'context', 'tensor')) == topology.devices
  assert analytical.plan(spec, topology)['fits']


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec('libtpu') is None, reason="libtpu is missing: pip install 'jax[tpu]'")
def test_the_small_recipes_compile_and_fit(tmp_path):
  environment = {**os.environ, 'XDG_CACHE_HOME': str(tmp_path / 'cache')}
  environment.pop('JAX_COMPILATION_CACHE_DIR', None)
  environment.pop('XLA_FLAGS', None)
  done = subprocess.run([sys.executable, ROOT / 'tools/plan_recipes.py', '--small', f'--output={tmp_path}'],
                        env=environment, text=True, capture_output=True, check=False)
  assert done.returncode == 0, done.stdout + done.stderr
  entries = json.loads((tmp_path / 'table.json').read_text())
  assert [e['recipe'] for e in entries] == ['gpt2_124m.py', 'llm_1b.py', 'llm_1b.py:v5p']
  for entry in entries:
    assert entry['source'] == 'compiled'
    assert entry['fits']
    assert entry['unknown_loops'] == []
    kept = KEPT[entry['name']]
    if entry['versions'] == kept['versions']:  # Neither slower nor larger than what is written down.
      assert entry['step_seconds'] < 1.1 * kept['step_seconds'], entry['name']
      assert entry['hbm_bytes']['total'] < 1.1 * kept['hbm_bytes']['total'], entry['name']
