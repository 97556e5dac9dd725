"""Resuming with changed settings: which ones are allowed, and that all of them are reported."""

import dataclasses
import json
import os
import shutil

import jax
import numpy as np
import pytest

from llmjax.checkpoint import manifest, recorded
from llmjax.config import ConfigError
from llmjax.evaluate.metrics import read_lines
from llmjax.evaluate.spec import EvaluateSpec
from llmjax.model.spec import ModelSpec
from llmjax.parallel.mesh import make_mesh
from llmjax.run import changes, loop, timer
from llmjax.run.goodput import Goodput
from llmjax.run.spec import FinetuneSpec, PretrainSpec, RewardSpec, RlCommandSpec
from llmjax.run.workdir import claim_workdir
from llmjax.run.writers import LogsSpec
from llmjax.train import objectives
from llmjax.train.spec import OptimizerSpec, TrainSpec

BASE = PretrainSpec(
    model=ModelSpec(num_layers=1, d_model=8, num_heads=1, mlp_dim=8, vocab_size=16),
    train=TrainSpec(steps=4, batch_size=4, log_every=1, checkpoint_every=2, compute_dtype='float32'),
    optimizer=OptimizerSpec(lr=0.01, schedule='cosine'), logs=LogsSpec(writers=()), evaluate=EvaluateSpec(splits=()))


class Batches:
  """Batches that follow from their number.  fingerprint: of the data that they are said to be of."""

  def __init__(self, rows, fingerprint='of no text'):
    self.rows, self.fingerprint, self.state, self.began = rows, fingerprint, 0, None

  def __next__(self):
    self.state += 1
    tokens = np.random.default_rng(self.state).integers(0, 16, (self.rows, 9)).astype(np.int32)
    ones = np.ones((self.rows, 8), np.int32)
    return {'tokens': tokens[:, :-1], 'targets': tokens[:, 1:], 'segment_ids': ones,
            'positions': ones * np.arange(8, dtype=np.int32), 'loss_mask': ones.astype(np.float32)}

  def restore(self, state):
    self.state = self.began = state

  def close(self):
    pass


def changed(spec, **groups):
  """Returns the spec with fields of its groups replaced: changed(BASE, train={'steps': 6})."""
  return dataclasses.replace(spec, **{
      name: dataclasses.replace(getattr(spec, name), **fields) for name, fields in groups.items()})


def train(workdir, fingerprint='of no text', **groups):
  """Returns (exit status, its Batches) of a run whose settings differ from BASE in these groups."""
  spec = changed(BASE, **groups)
  mesh, batches = make_mesh(spec.mesh, jax.devices()[:1]), Batches(spec.train.batch_size, fingerprint)
  attempt = claim_workdir(workdir, spec)
  job = loop.Job(spec=spec, mesh=mesh, batches=batches, goodput=Goodput(workdir), sample=None,
                    loss_fn=objectives.next_token(objectives.make_model(spec.model, spec.train, 'cpu')), evaluators={})
  with jax.set_mesh(mesh):
    return loop.train(job, workdir, attempt), batches


def events(workdir, kind):
  return [e for e in read_lines(workdir / 'events.jsonl') if e['kind'] == kind]


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  """A run of 4 steps with the checkpoints 2 and 4."""
  workdir = tmp_path_factory.mktemp('run') / 'run'
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(timer.chips, 'peak_flops', lambda device: None)
    assert train(workdir)[0] == 0
    yield workdir


@pytest.fixture
def workdir(finished, tmp_path):
  shutil.copytree(finished, tmp_path / 'run')
  return tmp_path / 'run'


def all_groups():
  """Returns {name: spec class} of the groups of every command that trains."""
  return {f.name: f.type for spec in (PretrainSpec, FinetuneSpec, RewardSpec, RlCommandSpec)
          for f in dataclasses.fields(spec)}


def test_every_recorded_path_is_absolute_and_found_after_a_move(tmp_path):
  paths = {(name, f.name) for name, spec in all_groups().items() for f in dataclasses.fields(spec)
           if f.metadata['kind'] == 'path'}
  assert paths - {('train', 'compilation_cache')} == {*recorded.PATHS, *recorded.FOLDERS}
  settings = {'train': {'init_from': 'runs/a', 'steps': 3}, 'data': {'sources': {'data/x': 0.5}, 'tokenizer': ''},
              'evaluate': {'extra_sources': ['data/y']}}
  found = recorded.absolute_paths(settings)
  here = os.getcwd()
  assert found == {'train': {'init_from': f'{here}/runs/a', 'steps': 3},
                   'evaluate': {'extra_sources': [f'{here}/data/y']},
                   'data': {'sources': {f'{here}/data/x': 0.5}, 'tokenizer': ''}}
  (tmp_path / 'runs/b').mkdir(parents=True)
  (tmp_path / 'data/x').mkdir(parents=True)
  assert recorded.find_paths(found, tmp_path / 'runs/b') == found  # It is not known where the run was.
  (tmp_path / 'runs/b/environment.json').write_text(json.dumps({'workdir': f'{here}/runs/b'}))
  moved = recorded.find_paths(found, tmp_path / 'runs/b')
  assert moved['data']['sources'] == {f'{tmp_path}/data/x': 0.5}  # It is there now.
  assert moved['train']['init_from'] == f'{here}/runs/a'  # And this is gone, and stays as it was recorded.


def test_every_setting_has_a_kind():
  groups = all_groups()
  assert set(groups) == set(changes.KINDS)
  for name, spec in groups.items():
    kind, others = changes.KINDS[name]
    fields = {f.name for f in dataclasses.fields(spec)}
    assert set(others) <= fields, name
    assert {kind, *others.values()} <= {changes.HARMLESS, changes.MEANING, changes.FIXED}
  assert all(field in {f.name for f in dataclasses.fields(groups[group])} for group, field in changes.ABOUT_CHANGES)


@pytest.mark.parametrize(('groups', 'field'), [
    ({'optimizer': {'lr': 0.02}}, 'optimizer.lr was 0.01'),
    ({'optimizer': {'schedule': 'linear'}}, "optimizer.schedule was 'cosine'"),
    ({'optimizer': {'weight_decay': 0.0}}, 'optimizer.weight_decay was 0.1'),
    ({'data': {'packing': 'pad'}}, "data.packing was 'concat'"),
    ({'data': {'sources': {'data/b': 1.0}}}, 'data.sources was'),
    ({'model': {'dropout': 0.5}}, 'model.dropout was 0.0'),
    ({'train': {'batch_size': 8}}, 'train.batch_size was 4'),
    ({'train': {'z_loss': 1e-4}}, 'train.z_loss was 0.0'),
    ({'train': {'seed': 1}}, 'train.seed was 0'),
    ({'evaluate': {'limit': 8}}, 'evaluate.limit was 0'),
])
def test_changes_that_affect_metrics_need_a_flag(workdir, groups, field):
  before = {p: p.read_bytes() for p in workdir.rglob('*') if p.is_file()}
  groups = {**groups, 'train': {'steps': 6, **groups.get('train', {})}}
  with pytest.raises(ConfigError) as e:
    claim_workdir(workdir, changed(BASE, **groups))
  line, = e.value.problems
  assert field in line and '--config.train.allow_changes=true' in line
  assert before == {p: p.read_bytes() for p in workdir.rglob('*') if p.is_file()}
  groups['train']['allow_changes'] = True
  found = claim_workdir(workdir, changed(BASE, **groups)).changes
  assert {c.field for c in found} == {'train.steps', field.split()[0]}


@pytest.mark.parametrize(('groups', 'field'), [
    ({'optimizer': {'clip_norm': 0.0}}, 'optimizer.clip_norm was 1.0'),
    ({'optimizer': {'name': 'lion'}}, "optimizer.name was 'adamw'"),
    ({'optimizer': {'moment_dtype': 'bfloat16'}}, "optimizer.moment_dtype was 'float32'"),
    ({'optimizer': {'layer_decay': 0.5}}, 'optimizer.layer_decay was 1.0'),
    ({'model': {'d_model': 16}}, 'model.d_model was 8'),
    ({'train': {'param_dtype': 'bfloat16'}}, "train.param_dtype was 'float32'"),
    ({'guard': {'window': 16}}, 'guard.window was 128'),
])
def test_changes_that_are_incompatible_with_checkpoints_are_errors(workdir, groups, field):
  for allowed in (False, True):
    with pytest.raises(ConfigError) as e:
      claim_workdir(workdir, changed(
          BASE, **{**groups, 'train': {'steps': 6, 'allow_changes': allowed, **groups.get('train', {})}}))
    line, = e.value.problems
    assert field in line and 'incompatible with its checkpoints' in line and 'give a new --workdir' in line


def test_harmless_changes_are_printed_and_recorded(workdir, capsys):
  assert train(workdir, train={'steps': 6, 'log_every': 2}, checkpoint={'keep': 5})[0] == 0
  out = capsys.readouterr().out
  assert 'changed at step 4: train.log_every: 1 -> 2' in out
  assert 'changed at step 4: checkpoint.keep: 3 -> 5' in out
  assert 'train.steps, which was 4 and is 6' in out  # The finished cosine begins anew.
  event, = events(workdir, 'config_change')
  assert event['step'] == 4
  assert event['details']['changes'] == {'train.steps': [4, 6], 'train.log_every': [1, 2], 'checkpoint.keep': [3, 5]}
  configs = {p.name: json.loads(p.read_text()) for p in (workdir / 'configs').iterdir()}
  assert {name: c['train']['steps'] for name, c in configs.items()} == {'1.json': 4, '2.json': 6}
  assert configs['2.json'] == json.loads((workdir / 'config.json').read_text())
  assert [e['details']['config'] for e in events(workdir, 'start')] == ['configs/1.json', 'configs/2.json']


def test_the_same_settings_print_nothing(workdir, capsys):
  shutil.rmtree(workdir / 'checkpoints/4')
  assert train(workdir)[0] == 0
  assert 'changed' not in (out := capsys.readouterr().out) and 'warning' not in out
  assert not events(workdir, 'config_change')
  assert [p.name for p in (workdir / 'configs').iterdir()] == ['1.json']


def test_an_allowed_change_keeps_the_position_in_the_data(workdir, capsys):
  shutil.rmtree(workdir / 'checkpoints/4')
  status, batches = train(workdir, 'of another text', train={'batch_size': 3, 'allow_changes': True},
                          optimizer={'lr': 0.005})
  assert status == 0
  assert batches.began == 3  # 2 batches of 4 sequences are 3 of 3, none twice.
  out = capsys.readouterr().out
  assert 'the learning rate jumps at step 2: ' in out and ', was 0.00325 with the earlier settings' in out
  assert "changed at step 2: data: 'of no text' -> 'of another text'" in out
  event, = events(workdir, 'config_change')
  assert set(event['details']['changes']) == {'optimizer.lr', 'train.batch_size', 'data'}
  with pytest.raises(ConfigError, match='the data differs from what steps 1 to 4 read'):
    train(workdir, train={'steps': 6, 'batch_size': 3}, optimizer={'lr': 0.005})


def test_moved_folders_are_a_harmless_change():
  find = lambda old, new: [c.kind for c in changes.find_changes({'data': {'sources': old}}, {'data': {'sources': new}})]
  assert find({'/a/x': 1.0, '/a/y': 2.0}, {'/b/x': 1.0, '/b/y': 2.0}) == [changes.HARMLESS]
  assert find({'/a/x': 1.0}, {'/a/y': 1.0}) == find({'/a/x': 1.0, '/a/y': 1.0}, {'/a/x': 1.0}) == [changes.MEANING]


def test_a_fresh_start_renames_the_checkpoints_once(workdir, capsys):
  for step in (2, 4):
    (workdir / f'checkpoints/{step}/params/_METADATA').write_text('')
  with pytest.raises(ConfigError, match='checkpoints in .* are damaged'):
    train(workdir)
  fresh = {'checkpoint': {'fresh_start': True}}
  assert train(workdir, **fresh)[0] == 0
  assert f'checkpoints was renamed to {workdir}/checkpoints.1; the run starts from' in capsys.readouterr().out
  assert manifest.find_steps(workdir / 'checkpoints.1') == manifest.find_steps(workdir / 'checkpoints') == [2, 4]
  assert train(workdir, **fresh)[0] == 0  # As a supervisor starts the same command again.
  assert 'is done: step 4 of 4' in capsys.readouterr().out
  assert not (workdir / 'checkpoints.2').exists()
  shutil.rmtree(workdir / 'checkpoints')
  shutil.copytree(workdir / 'checkpoints.1', workdir / 'checkpoints')
  assert train(workdir, **fresh)[0] == 0
  assert manifest.find_steps(workdir / 'checkpoints.2') == [2, 4]


def test_a_checkpoint_of_another_model_is_refused(workdir, finished, tmp_path):
  other = changed(BASE, model={'d_model': 16})
  (tmp_path / 'other').mkdir()
  shutil.copytree(finished / 'checkpoints', tmp_path / 'other/checkpoints')  # Without its config.json.
  with pytest.raises(ConfigError, match='model.d_model was 8 in .*/other and is 16 now'):
    claim_workdir(tmp_path / 'other', other)
