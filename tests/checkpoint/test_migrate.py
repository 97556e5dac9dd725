"""Runs of older versions are rewritten for this one, or refused in one line per problem."""

import dataclasses
import json
import shutil

import jax.numpy as jnp
import pytest

from llmjax import renamed
from llmjax.checkpoint import bases, manifest, migrate
from llmjax.checkpoint.arrays import read_json
from llmjax.checkpoint.checkpoints import Checkpoints
from llmjax.checkpoint.load import read_config
from llmjax.commands.spec import PreviewSpec
from llmjax.config import ConfigError
from llmjax.train.state import TrainState
from tests.helpers import call_and_read

# A config as versions before the rename wrote it.
OLD = {'model': {'num_layers': 1}, 'data': {'sources': {'data/sums': 1.0}, 'long': 'drop'},
       'train': {'steps': 4, 'accumulation': 2}, 'optimizer': {'rates': {'embed': 0.5}},
       'policy': {'decay': 0.9, 'ratio': 'sequence'}, 'evaluate': {'also': ['data/other'], 'by_source': True},
       'rl': {'group': 4, 'prompts': 8, 'rewards': {'maths': 1.0, 'length': 0.5}}}
NEW = {'model': {'num_layers': 1}, 'data': {'sources': {'data/sums': 1.0}, 'overflow': 'drop'},
       'train': {'steps': 4, 'gradient_accumulation_steps': 2}, 'optimizer': {'lr_multipliers': {'embed': 0.5}},
       'policy': {'gae_lambda': 0.9, 'importance_sampling': 'sequence'},
       'evaluate': {'extra_sources': ['data/other'], 'per_source': True},
       'rl': {'num_generations': 4, 'prompts_per_iteration': 8, 'rewards': {'math': 1.0, 'length': 0.5}}}


def make_old(folder, settings=OLD, processes=1):
  """Write a run as versions before the rename did: old names in its configs, and seal.json in its checkpoints."""
  params = {'w': jnp.arange(6.0)}
  state = TrainState(step=jnp.int32(2), params=params, opt_state=(), key=jnp.zeros(2, jnp.uint32))
  checkpoints = Checkpoints(folder)
  for step in (2, 4):
    checkpoints.save(step, state, {'batches': step, 'fingerprint': ''}, settings, {'eval/x/loss': 1.5}, step)
  checkpoints.close()
  (folder / 'config.json').write_text(json.dumps(settings))
  for step in (2, 4):
    path = folder / f'checkpoints/{step}'
    for process in range(processes):
      manifest.write_manifest(path, step, {'eval/x/loss': 1.5}, step, process, processes)
    for file in list(path.glob('manifest*.json')):
      file.rename(path / file.name.replace('manifest', 'seal'))
  return folder


def contents(folder):
  return {path: path.read_bytes() for path in folder.rglob('*') if path.is_file()}


@pytest.mark.parametrize('processes', [1, 3])
def test_an_old_run_is_migrated(tmp_path, capsys, processes):
  run = make_old(tmp_path / 'run', processes=processes)
  with pytest.raises(ConfigError, match=f'checkpoint migrate --workdir={run}'):
    Checkpoints(run).latest()
  with pytest.raises(ConfigError, match=f'checkpoint migrate --workdir={run}'):
    read_config(run)
  before = contents(run)
  status, out, _ = call_and_read(capsys, 'checkpoint', 'migrate', f'--workdir={run}', '--dry-run')
  assert status == 0 and contents(run) == before
  assert f'{run}/config.json: rl.group is now rl.num_generations' in out
  assert f'{run}/checkpoints/4: seal.json is now manifest.json' in out
  status, again, _ = call_and_read(capsys, 'checkpoint', 'migrate', f'--workdir={run}')
  assert status == 0 and again == out
  assert json.loads((run / 'config.json').read_text()) == NEW
  for step in (2, 4):
    path = run / f'checkpoints/{step}'
    assert read_json(path, 'spec') == NEW
    assert manifest.find_damage(path) == []
    assert manifest.read_manifest(path).metrics == {'eval/x/loss': 1.5}
    assert manifest.read_manifest(path).processes == processes
    arrays = {p: data for p, data in before.items() if 'params' in p.parts or 'optimizer' in p.parts}
    assert arrays and arrays.items() <= contents(run).items()
  assert Checkpoints(run).latest() == 4
  assert 'nothing to change' in call_and_read(capsys, 'checkpoint', 'migrate', f'--workdir={run}')[1]


def test_a_migration_that_was_interrupted_is_repeated(tmp_path, capsys, monkeypatch):
  old, count, interrupted_at = make_old(tmp_path / 'old', processes=2), 0, 0

  def counted(write):
    def call(*args):
      nonlocal count
      count += 1
      if count == interrupted_at:
        raise KeyboardInterrupt
      return write(*args)
    return call

  monkeypatch.setattr(manifest, 'write_fields', counted(manifest.write_fields))
  monkeypatch.setattr(migrate, '_replace', counted(migrate._replace))
  # Of each of two checkpoints a config and two manifests are written, then config.json.
  for interrupted_at in range(1, 8):
    run, count = shutil.copytree(old, tmp_path / str(interrupted_at)), 0
    assert call_and_read(capsys, 'checkpoint', 'migrate', f'--workdir={run}')[0] == 130
    assert call_and_read(capsys, 'checkpoint', 'migrate', f'--workdir={run}')[0] == 0
    assert json.loads((run / 'config.json').read_text()) == NEW
    assert not list(run.glob('checkpoints/*/seal*'))
    assert all(manifest.find_damage(run / f'checkpoints/{step}') == [] for step in (2, 4))


def test_what_cannot_be_migrated_is_refused_before_anything_is_written(tmp_path, capsys):
  run = make_old(tmp_path / 'run', {**OLD, 'train': {'steps': 4, 'warp': 9}})
  file = run / 'checkpoints/4/params/_METADATA'
  file.write_bytes(file.read_bytes()[:-1] + b' ')
  before = contents(run)
  status, _, err = call_and_read(capsys, 'checkpoint', 'migrate', f'--workdir={run}')
  assert status == 2 and contents(run) == before
  assert f'{run}/config.json: train.warp has no counterpart' in err
  assert f'{run}/checkpoints/4: params/_METADATA is damaged' in err


def test_every_renamed_field_is_a_field_today():

  known = {f'{group.name}.{field.name}' for group in dataclasses.fields(PreviewSpec)
           for field in dataclasses.fields(group.type)}
  assert set(renamed.FIELDS.values()) <= known
  assert not set(renamed.FIELDS) & known


def test_the_base_of_an_adapter_must_be_migrated_too(tmp_path):
  recorded = {'path': str(tmp_path / 'base/checkpoints/4'), 'sha256': ''}
  make_old(tmp_path / 'base')
  with pytest.raises(ConfigError, match=f'checkpoint migrate --workdir={tmp_path}/base'):
    bases.find_base(recorded, '', tmp_path / 'lora')
