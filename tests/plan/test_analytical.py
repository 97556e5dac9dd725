"""The analytical model against compiled programs in experiments/tpu_calibration, and `llmjax plan --fast`."""

import json
import os
import pathlib
import re
import resource
import subprocess
import sys

import pytest

from llmjax import config, recipes
from llmjax.commands.plan import nearest_meshes, settle
from llmjax.commands.spec import PlanSpec
from llmjax.model.counts import count_params
from llmjax.plan import analytical
from llmjax.plan.topology import Topology, parse_topology
from llmjax.report import plan_page
from tests.helpers import call_and_read

ROOT = pathlib.Path(__file__).parents[2]
COMPILED = ROOT / 'experiments/tpu_calibration'
LLAMA = ['--config=configs/pretrain/llama2_7b.py', '--topology=v5p:4x4x4']


def fast(recipe, topology, **changes):
  path, _, variant = recipe.partition(':')
  spec = config.build(PlanSpec, recipes.load_recipe(str(ROOT / f'configs/pretrain/{path}.py') + f':{variant}' * bool(
      variant)), [(name.replace('__', '.'), str(value)) for name, value in changes.items()])
  topology = topology if isinstance(topology, Topology) else parse_topology(topology)
  return analytical.plan(settle(spec, topology), topology)


def call(capsys, monkeypatch, *argv):
  monkeypatch.chdir(ROOT)
  return call_and_read(capsys, 'plan', *argv)


@pytest.mark.parametrize(('name', 'recipe', 'topology', 'memory', 'seconds'), [
    ('llama2_7b-v5p', 'llama2_7b', 'v5p:4x4x4', 0.05, 0.03),
    ('llama2_70b-v5p', 'llama2_70b', 'v5p:4x4x4', 0.05, 0.06),
    ('mixtral_8x7b-v5p', 'mixtral_8x7b', 'v5p:4x4x4', 0.03, 0.03),
    ('llama2_7b-v5e', 'llama2_7b:v5e', 'v5e:4x4', 0.08, 0.05),
    ('llama3_8b-v6e', 'llama3_8b', 'v6e:16x16', 0.15, 0.05)])
def test_errors_against_the_compiled_program(name, recipe, topology, memory, seconds):
  compiled, found = json.loads((COMPILED / f'{name}.json').read_text()), fast(recipe, topology)
  assert compiled['source'] == 'compiled'
  assert found['hbm_bytes']['total'] == pytest.approx(compiled['hbm_bytes']['total'], rel=memory)
  assert found['step_seconds'] == pytest.approx(compiled['step_seconds'], rel=seconds)
  for part in ('parameters', 'optimizer'):
    assert found['hbm_bytes'][part] == pytest.approx(compiled['hbm_bytes'][part], rel=0.01)
  sent = lambda plan: sum(r['sent_bytes'] for r in plan['collectives'])
  assert sent(found) == pytest.approx(sent(compiled), rel=0.1)


RECIPES = json.loads((ROOT / 'experiments/tpu_recipes/table.json').read_text())


@pytest.mark.parametrize('name', [
    'llama2_70b-v5p-4x4x8', 'llama3_70b-v5p-4x4x8', 'llama3_70b-v5p-8x8x8', 'llama3_405b-v5p-8x8x8',
    'llama3_405b-pod-v5p-16x16x24', 'llama2_7b-v5p-4x4x4-x2', 'llama2_7b-v5p-4x4x4-x4',
    'llama2_70b-pipeline-v5p-4x4x4'])
def test_errors_on_programs_outside_the_fit(name):
  """Up to 6144 chips, four slices and 405B parameters: time within 10 %, memory within 20 %."""
  entry = next(e for e in RECIPES if e['name'] == name)
  assert entry['source'] == 'compiled'
  topology = parse_topology(entry['topology'], entry['slices'])
  changes = {key.replace('.', '__'): value for key, value in entry['changes'].items()}
  found = fast(entry['recipe'].replace('.py', ''), topology, **changes)
  assert found['step_seconds'] == pytest.approx(entry['step_seconds'], rel=0.1)
  assert found['hbm_bytes']['total'] == pytest.approx(entry['hbm_bytes']['total'], rel=0.2)


def test_plan_follows_from_the_config():
  plan = fast('llama2_7b', 'v5p:4x4x4', train__batch_size=256)
  params = count_params(config.build(PlanSpec, {'model': {'preset': 'llama2_7b'},
                                                'data': {'sources': {'a': 1.0}}}).model)['total']
  assert plan['parameters'] == params
  assert plan['hbm_bytes']['parameters'] == pytest.approx(params * 4 / 64, rel=0.01)
  assert plan['step_seconds'] == pytest.approx(sum(plan['parts'].values()))
  assert plan['tokens_per_second_per_chip'] == pytest.approx(256 * 4096 / plan['step_seconds'] / 64)
  halved = fast('llama2_7b', 'v5p:4x4x4', train__batch_size=256, train__gradient_accumulation_steps=2)
  assert halved['hbm_bytes']['activations'] == pytest.approx(plan['hbm_bytes']['activations'] / 2)
  assert fast('llama2_7b', 'v5p:4x4x4', train__batch_size=256, train__remat='full')['step_seconds'] > (
      plan['step_seconds'])
  for key in ('fits', 'mfu', 'cycles', 'collectives'):
    assert key in plan
  for key in ('arguments', 'temp', 'total', 'limit'):
    assert plan['hbm_bytes'][key] > 0


def test_attention_fraction_averages_over_the_layer_pattern():
  spec = lambda **model: config.build(PlanSpec, {
      'model': dict(num_layers=4, vocab_size=512, **model), 'data': {'sources': {'a': 1.0}, 'seq_len': 8}})
  local = (2 * 3 / 2 + 6 * 2) / 64  # Queries 1 to 8 attend to 1, 2, 2, ... keys.
  assert analytical.attention_fraction(spec()) == analytical.attention_fraction(spec(window=8)) == 0.5
  assert analytical.attention_fraction(spec(window=2)) == pytest.approx(local)
  mixed = spec(window=2, attention_pattern=['local', 'local', 'local', 'global'])
  assert analytical.attention_fraction(mixed) == pytest.approx((3 * local + 0.5) / 4)


def test_fast_takes_two_seconds_and_imports_no_jax(tmp_path):
  code = ("import sys; from llmjax import main\n"
          "try:\n  main.main(sys.argv[1:])\nfinally:\n  assert 'jax' not in sys.modules")
  spent = lambda: sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
  before = spent()
  done = subprocess.run(
      [sys.executable, '-c', code, 'plan', *LLAMA, '--fast', '--config.train.batch_size=256', f'--output={tmp_path}',
       '--config.cost.price_per_chip_hour=4.2', '--config.cost.chip_watts=500',
       '--config.cost.grid_grams_per_kwh=100'],
      cwd=ROOT, env={**os.environ, 'PYTHONPATH': str(ROOT)}, text=True, capture_output=True, check=True)
  assert spent() - before < 2  # CPU seconds, because wall time depends on the load.
  assert max(len(line) for line in done.stdout.splitlines() if not line.startswith('wrote ')) <= 100
  plan = json.loads((tmp_path / 'plan.json').read_text())
  assert plan['fits'] is True
  cost = plan['cost']
  assert cost['money'] == pytest.approx(4.2 * cost['chip_hours'])
  assert cost['kg_co2'] == pytest.approx(cost['chip_hours'] * 0.5 * 1.09 * 0.1)
  assert re.search(r'kg CO2e at 100 g/kWh', done.stdout)
  text = (tmp_path / 'plan.html').read_text()
  assert 'llama2_7b on v5p:4x4x4' in text and 'over the limit' not in text
  shares = [float(s) for s in re.findall(r'<span>([\d.]+)%</span>', text.split('Memory per device</h2>')[1])]
  assert shares and max(shares) <= 100
  assert not re.search(r'(src|href)="?https?:', text)


def test_suggested_changes_fit(capsys, monkeypatch, tmp_path):
  status, out, _ = call(capsys, monkeypatch, '--config=configs/pretrain/llama2_7b.py', '--topology=v5e:8x8', '--fast',
                        '--config.train.batch_size=256', f'--output={tmp_path}')
  assert status == 1
  over = re.search(r'total +([\d.]+)  of ([\d.]+): DOES NOT FIT, ([\d.]+) GiB over', out).groups()
  assert float(over[2]) == pytest.approx(float(over[0]) - float(over[1]), abs=0.011)
  # The page shows the excess, and no shares of a limit that is exceeded.
  memory = (tmp_path / 'plan.html').read_text().split('Memory per device</h2>')[1].split('<h2>')[0]
  assert f'over the limit of {over[1]} GiB</span><b>{over[2]} GiB</b>' in memory
  assert '%</span>' not in memory
  lines = [line for line in out.splitlines() if line.startswith('  --config.')]
  assert len(lines) == 3
  # The fastest first, changes of the batch size last.
  order = [('batch_size' in line, -float(re.search(r'([\d,]+) tokens', line)[1].replace(',', ''))) for line in lines]
  assert order == sorted(order)
  assert order[0][0] is False
  for line in lines:
    flags = re.findall(r'--config\.([\w.]+)=(\w+)', line)
    changes = {'train__batch_size': 256, **{name.replace('.', '__'): value for name, value in flags}}
    assert fast('llama2_7b', 'v5e:8x8', **changes)['fits'], line


@pytest.mark.parametrize(('arguments', 'words'), [
    (['--topology=v5x:4x4x4', '--fast'], 'v6e: 1x1, 2x2'),
    (['--topology=v5p:4x4x4', '--config.mesh.fsdp=32'], '--config.mesh.fsdp=16'),
    (['--topology=h100:8', '--config.train.batch_size=64'], 'add --fast'),
    (['--topology=v5p:4x4x4', '--config.train.platform=gpu'], 'add --fast'),
    (['--topology=v5p:4x4x4', '--slices=2', '--config.mesh.dcn_fsdp=4'], 'write --slices=4'),
    (['--topology=v5p:3x4x4'], 'known are 2x2x1, 2x2x2'),
    (['--topology=v5e:2x4', '--config.mesh.fsdp=3'], 'which has 8 devices; the nearest that do: --config.mesh.'),
    (['--topology=v5p:4x4x4', '--config.mesh.fsdp=1', '--config.mesh.context=16', '--config.data.seq_len=48'],
     'write data.seq_len=32 or 64'),
    ([], 'topology=NAME is missing')])
def test_mistakes_are_reported(capsys, monkeypatch, arguments, words):
  status, _, err = call(capsys, monkeypatch, LLAMA[0], *arguments)
  assert status == 2
  assert words in err
  assert 'Traceback' not in err


def test_nearest_meshes_fill_the_devices():
  sizes = dict(data=1, fsdp=24, stage=1, expert=1, context=1, tensor=2)
  for change in nearest_meshes(sizes, 64):
    full = {**sizes, **change}
    product = 1
    for n in full.values():
      product *= n
    assert product == 64
  assert nearest_meshes(sizes, 64)[0] == {'fsdp': 32}


def test_plan_page_has_a_timeline():
  event = dict(name='fusion.1', category='matmul', begin=0.0, seconds=0.001, lane='core', op_name='a<b')
  svg = plan_page.timeline({'name': 'while.1', 'seconds': 0.002, 'events': [event, {**event, 'lane': 'network'}]})
  assert svg.count('<rect') == 2
  assert 'a&lt;b' in svg
  assert 'width="497.60"' in svg  # Half of the width without the labels.
