"""`llmjax chaos`: its parts, and short runs."""

import io
import json
import math
import os
import random
import types

import pytest

from llmjax.checkpoint import manifest
from llmjax.cluster import chaos, chaos_report, faults
from llmjax.cluster.spec import FAULTS
from llmjax.run.spec import PretrainSpec
from llmjax.train.spec import TrainSpec
from tests.helpers import prepare_words, run_process

RECIPE = """def get_config():
  return {
      'model': {'num_layers': 1, 'd_model': 16, 'num_heads': 2, 'mlp_dim': 32, 'dropout': 0.1},
      'data': {'sources': {'text': 1.0}, 'seq_len': 16},
      'train': {'steps': 60, 'batch_size': 8, 'gradient_accumulation_steps': 2,
                'checkpoint_every': 5, 'eval_every': 30},
      'optimizer': {'lr': 0.01, 'warmup_steps': 5},
      'evaluate': {'limit': 16},
  }
"""


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A folder with a prepared corpus and a recipe."""
  folder = prepare_words(tmp_path_factory.mktemp('chaos'))
  (folder / 'recipe.py').write_text(RECIPE)
  return folder


def run(folder, *argv):
  """Returns (status, output, chaos.json or None)."""
  # One device, and not the tests' eight.  The time limit is for what hangs: a busy machine needs 30 s an event.
  done = run_process(folder, 'chaos', '--config=recipe.py', *argv, timeout=1200,
                     XLA_FLAGS=os.environ['XLA_FLAGS'].replace('device_count=8', 'device_count=1'))
  workdir = next(a.partition('=')[2] for a in argv if a.startswith('--workdir='))
  file = folder / workdir / 'chaos.json'
  return done.returncode, done.stdout + done.stderr, json.loads(file.read_text()) if file.exists() else None


@pytest.mark.slow
def test_run_survives_three_faults(folder):
  status, out, found = run(folder, '--workdir=short', '--kills=3', '--events=damage,terminate,refuse')
  assert status == 0, out
  assert found['passed'] and not found['bits_differing'] and not found['problems']
  assert sorted(e['kind'] for e in found['events']) == ['damage', 'refuse', 'terminate']
  assert all(e['step'] >= 1 and e['compared'] > 0 for e in found['events'])
  (damaged,) = (e for e in found['events'] if e['kind'] == 'damage')
  assert damaged['lost'] >= 1 and damaged['detail']
  assert next(e['lost'] for e in found['events'] if e['kind'] == 'terminate') == 0
  assert next(e['detail'] for e in found['events'] if e['kind'] == 'refuse').endswith(' damaged, kept')
  assert found['checkpoint_every'] == 5
  rows = [json.loads(line) for line in (folder / 'short/run/metrics.jsonl').read_text().splitlines()]
  assert [row['step'] for row in rows if 'train/loss' in row] == list(range(1, 61))
  assert '\nall ' in out and 'to the bit' in out
  status, out, _ = run(folder, '--workdir=short')
  assert status == 2 and '--workdir=short is not empty' in out


@pytest.mark.slow
@pytest.mark.parametrize('processes, kills', [(1, 10), (2, 6)])
def test_run_survives_all_faults(folder, processes, kills):
  status, out, found = run(folder, f'--workdir=full{processes}', f'--kills={kills}', '--steps=200', '--seed=1',
                           f'--processes={processes}')
  assert status == 0, out
  assert found['passed'] and len(found['events']) == kills


def test_recipe_that_fails_undisturbed_is_reported(folder):
  status, out, _ = run(folder, '--workdir=wrong', '--config.train.platform=tpu')
  assert status == 1
  assert 'the undisturbed run failed: process 0 ended with status 2' in out
  assert 'tpu' in out.splitlines()[-1]


def test_checkpoint_interval():
  for asked, steps, taken in ((5, 60, 5), (59, 60, 59), (400, 200, 10), (0, 60, 3), (2, 5, 2)):
    spec = PretrainSpec(train=TrainSpec(steps=1000, checkpoint_every=asked))
    assert chaos.make_recipe(spec, steps)['train']['checkpoint_every'] == taken


def test_plan_faults():
  for seed in range(3):
    assert set(faults.plan_faults(20, seed)) == set(FAULTS)
  assert faults.plan_faults(20, 0) == faults.plan_faults(20, 0) != faults.plan_faults(20, 1)
  assert set(faults.plan_faults(5, 0, ('stop', 'save'))) == {'stop', 'save'}


def test_damage_is_always_detected(tmp_path):
  (tmp_path / '7/params/d').mkdir(parents=True)
  generator, kinds = random.Random(0), set()
  for _ in range(40):
    for name, size in (('params/d/a', 300), ('params/manifest', 40), ('spec', 3)):
      (tmp_path / '7' / name).write_bytes(generator.randbytes(size))
    manifest.write_manifest(tmp_path / '7', 7)
    assert faults.newest_verified(tmp_path) == 7
    description = faults.damage(tmp_path / '7', generator)
    kinds.add(description.split()[1])
    assert manifest.find_damage(tmp_path / '7'), description
    assert faults.newest_verified(tmp_path) == 0
  assert {'deleted', 'truncated'} < kinds


def test_differing_bits():
  assert chaos_report.differing_bits(1.5, 1.5) == 0
  assert chaos_report.differing_bits(1.0, math.nextafter(1.0, 2.0)) == 1
  assert chaos_report.differing_bits(0.0, -0.0) == 1
  assert chaos_report.differing_bits(1.5, 'NaN') == 64
  assert chaos_report.differing_bits('NaN', 'NaN') == 0


def test_differences_are_problems(tmp_path):
  """One bit of one loss, a missing row, a duplicate row, a missing final checkpoint."""
  (tmp_path / 'run').mkdir()
  rows = [{'step': s, 'time': s, 'train/loss': 1 / s, 'train/step_seconds': 0.1 * s} for s in range(1, 6)]
  options = types.SimpleNamespace(workdir=str(tmp_path), kills=1, processes=1, devices_per_process=0, seed=0)
  comparison = chaos.Chaos({'train': {'steps': 5, 'checkpoint_every': 2}}, options, io.StringIO())
  comparison.reference = {(row['step'], 'train/loss'): row['train/loss'] for row in rows}

  def write(rows):
    comparison.problems = []
    (tmp_path / 'run/metrics.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))

  write([{**row, 'train/step_seconds': 9.0} for row in rows])
  assert comparison._compare(2) == (3, 0) and not comparison.problems
  write([*rows[:3], {**rows[3], 'train/loss': math.nextafter(0.25, 1)}, rows[4]])
  assert comparison._compare(2) == (3, 1)
  assert comparison.problems == ['step 4: train/loss is 0.25000000000000006 instead of 0.25']
  assert comparison._compare(4) == (1, 0)
  write([*rows[:2], *rows[3:], rows[4]])
  comparison._compare_final()
  assert comparison.problems == ['1 values are missing, first train/loss of step 3',
                           '1 lines of metrics.jsonl are duplicates', 'there is no undamaged checkpoint of step 5']


def test_render_table():
  injected = [faults.Fault('kill', lost=3, seconds=4.0), faults.Fault('kill', lost=2, seconds=6.0),
            faults.Fault('disk', lost=1, bits=2)]
  assert chaos_report.render_table(injected) == """\
fault                  count  steps lost  bits differing  median time to recover
kill -9 at any moment      2           5               0                   5.0 s
disk full                  1           1               2
all                        3           6               2                   5.0 s"""
