"""Saving in the training loop, and `llmjax checkpoint`."""

import functools
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.checkpoint import manifest
from llmjax.checkpoint.spec import CheckpointSpec
from llmjax.commands.checkpoint import compare
from llmjax.config import ConfigError, build
from llmjax.evaluate.spec import EvaluateSpec
from llmjax.model.spec import ModelSpec
from llmjax.parallel.mesh import make_mesh
from llmjax.run import loop as harness
from llmjax.run import timer
from llmjax.run.goodput import Goodput
from llmjax.run.spec import PretrainSpec
from llmjax.run.workdir import claim_workdir, hold_workdir
from llmjax.run.writers import LogsSpec
from llmjax.train.spec import OptimizerSpec, TrainSpec
from tests.helpers import call_and_read

MODEL = ModelSpec(num_layers=1, d_model=8, num_heads=1, mlp_dim=8, vocab_size=16)


class Batches:
  """Batches that contain their number."""

  fingerprint = 'of no text'
  state = 0

  def __next__(self):
    self.state += 1
    return {'tokens': np.full((8, 4), self.state, np.int32)}

  def restore(self, state):
    self.state = state

  def close(self):
    pass


def loss_fn(params, frozen, batch, key, lost_at=0):
  """Sum of squares; infinite from batch `lost_at` on."""
  scale = jnp.where((batch['tokens'][0, 0] == lost_at) & (lost_at > 0), jnp.inf, 1.0)
  loss = scale * sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(params))
  return loss, (jnp.float32(1.0), {})


def train(workdir, steps, losses=(), log_every=1, lost_at=0, **checkpoint):
  """Train a tiny model and save every second step; returns the exit status. losses: of the evaluations."""
  spec = PretrainSpec(
      model=MODEL, train=TrainSpec(steps=steps, batch_size=8, log_every=log_every, eval_every=2, checkpoint_every=2),
      optimizer=OptimizerSpec(warmup_steps=0, schedule='constant', clip_norm=0.0), logs=LogsSpec(writers=()),
      checkpoint=CheckpointSpec(**checkpoint), evaluate=EvaluateSpec())
  measured = iter(losses)
  evaluators = {'validation': lambda params, frozen: {'loss': next(measured)}} if losses else {}
  mesh = make_mesh(spec.mesh, jax.devices()[:1])
  claim_workdir(workdir, spec)
  job = harness.Job(spec=spec, mesh=mesh, batches=Batches(), goodput=Goodput(workdir), sample=None,
                    loss_fn=functools.partial(loss_fn, lost_at=lost_at),
                    evaluators=evaluators)
  with jax.set_mesh(mesh):
    return harness.train(job, workdir)


def test_two_runs_in_one_folder_are_refused(tmp_path):
  folder = tmp_path / 'run'
  with hold_workdir(folder):
    with pytest.raises(ConfigError, match=rf'is in use: process {os.getpid()} on .* trains there'), \
        hold_workdir(folder):
      pass
    assert (folder / 'lock').exists()
  assert not (folder / 'lock').exists()
  with hold_workdir(folder):
    pass


@pytest.fixture(scope='module', autouse=True)
def no_measured_peak():
  """The loop measures a CPU's peak for five seconds, which nothing here asks for."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(timer.chips, 'peak_flops', lambda device: None)
    yield


def steps_of(workdir):
  return manifest.find_steps(workdir / 'checkpoints')


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  """A run of 8 steps whose checkpoint 4 was the best, and another one of 4 steps."""
  folder = tmp_path_factory.mktemp('runs')
  assert train(folder / 'run', 8, losses=[3.0, 1.0, 2.5, 2.0], best_metric='eval/validation/loss', keep=2) == 0
  assert train(folder / 'other', 4, losses=[3.0, 1.0]) == 0
  return folder / 'run'


def damage(path):
  file = max((path / 'params/ocdbt.process_0/d').iterdir(), key=lambda p: p.stat().st_size)
  data = file.read_bytes()
  file.write_bytes(data[:-9] + bytes([data[-9] ^ 4]) + data[-8:])
  return file.name


def test_the_newest_two_and_the_best_are_kept(workdir):
  assert steps_of(workdir) == [4, 6, 8]
  listed = manifest.read_manifest(workdir / 'checkpoints/4')
  assert (listed.metrics, listed.metrics_step) == ({'eval/validation/loss': 1.0}, 4)


def test_list(workdir, capsys):
  status, out, _ = call_and_read(capsys, 'checkpoint', 'ls', f'--workdir={workdir}')
  assert status == 0
  rows = [line.split() for line in out.splitlines()]
  assert rows[0] == ['step', 'size', 'files', 'saved', 'eval/validation/loss', 'state']
  assert [(r[0], r[-2], r[-1]) for r in rows[1:2]] == [('4', 'verified,', 'best')]
  assert [(r[0], r[-2], r[-1]) for r in rows[2:]] == [('6', '2.5000', 'verified'), ('8', '2.0000', 'verified')]


def test_diff(workdir, capsys):
  status, out, _ = call_and_read(capsys, 'checkpoint', 'diff', '4', '8', f'--workdir={workdir}')
  assert status == 0
  assert 'equal to the bit' in out.splitlines()[-1]
  rows = [line.split() for line in out.splitlines()[1:-1]]
  assert 'optimizer/step' in [r[0] for r in rows] and any(r[0].startswith('params/') for r in rows)
  assert [float(r[1]) for r in rows] == sorted((float(r[1]) for r in rows), reverse=True)
  assert dict((r[0], r[1]) for r in rows)['optimizer/step'] == '4.000e+00'
  _, out, _ = call_and_read(capsys, 'checkpoint', 'diff', '4', f'--workdir={workdir}',
                            f'--other={workdir.parent}/other')
  assert 'are equal to the bit: ' in out  # The two runs did the same four steps.
  status, _, err = call_and_read(capsys, 'checkpoint', 'diff', '4', '5', f'--workdir={workdir}')
  assert status == 2 and 'there are 4, 6, 8' in err


def test_compare():
  a = np.array([1.0, -4.0, 0.5], np.float32)
  assert compare(a, a.copy()) == (True, 0.0, 0.0)
  assert compare(a, np.array([1.0, -3.0, 0.5], np.float32)) == (False, 1.0, 0.25)
  assert compare(np.array([0.0]), np.array([-0.0])) == (False, 0.0, 0.0)
  assert np.isnan(compare(a, np.array([np.nan, -4.0, 0.5], np.float32))[1])
  nan = np.array([np.nan])
  assert compare(nan, nan.copy())[0]


def test_show(workdir, capsys):
  status, out, _ = call_and_read(capsys, 'checkpoint', 'show', f'--workdir={workdir}', '--optimizer')
  assert status == 0
  assert 'checkpoints/8: step 8' in out
  assert 'stream: 8 batches drawn, data of no text' in out
  assert '"d_model": 8' in out
  rows = [line.split('  ') for line in out.splitlines() if line.startswith(('params/', 'optimizer/'))]
  assert len(rows) > 10 and all(r[-1].strip() == '0' for r in rows)
  from llmjax.checkpoint.load import load_params
  params, *_ = load_params(workdir)
  path, first = jax.tree_util.tree_flatten_with_path(params)[0][0]
  row = next(r for r in rows if r[0] == 'params/' + '/'.join(k.key for k in path))
  assert f'{float(jnp.linalg.norm(first)):.6g}' in row
  assert str(list(first.shape)) in ' '.join(row)


def test_damage_is_found_skipped_and_pruned(workdir, capsys):
  assert call_and_read(capsys, 'checkpoint', 'verify', f'--workdir={workdir}')[0] == 0
  name = damage(workdir / 'checkpoints/6')
  status, out, _ = call_and_read(capsys, 'checkpoint', 'verify', f'--workdir={workdir}')
  assert status == 1
  assert [line.split(': ')[1].split(',')[0] for line in out.splitlines()] == [
      'verified', f'params/ocdbt.process_0/d/{name} has other contents than were saved (SHA-256)', 'verified']
  assert call_and_read(capsys, 'checkpoint', 'verify', '4', '8', f'--workdir={workdir}')[0] == 0
  assert 'damaged: params/' in call_and_read(capsys, 'checkpoint', 'ls', f'--workdir={workdir}')[1]
  name = damage(workdir / 'checkpoints/8')
  assert train(workdir, 10, losses=[2.0, 2.0, 2.0]) == 0
  out = capsys.readouterr().out
  for step in (6, 8):
    assert f'checkpoints/{step} is skipped: params/ocdbt.process_0/d/' in out
  assert 'resuming from step 4' in out
  assert steps_of(workdir) == [6, 8, 10]
  assert call_and_read(capsys, 'checkpoint', 'verify', f'--workdir={workdir}')[0] == 0
  damage(workdir / 'checkpoints/6')
  _, out, _ = call_and_read(capsys, 'checkpoint', 'prune', f'--workdir={workdir}', '--keep=1', '--dry-run')
  assert 'would remove: 6, damaged' in out and 'would remove: 8\n' in out and 'kept: 10' in out
  assert steps_of(workdir) == [6, 8, 10]
  call_and_read(capsys, 'checkpoint', 'prune', f'--workdir={workdir}', '--keep=1')
  assert steps_of(workdir) == [10]
  (workdir / 'checkpoints/10/manifest.json').unlink()
  assert call_and_read(capsys, 'checkpoint', 'verify', f'--workdir={workdir}')[0] == 1
  assert call_and_read(capsys, 'checkpoint', 'sign', '10', f'--workdir={workdir}')[0] == 0
  assert call_and_read(capsys, 'checkpoint', 'verify', f'--workdir={workdir}')[0] == 0
  status, _, err = call_and_read(capsys, 'checkpoint', 'sign', '10', f'--workdir={workdir}')
  assert status == 2 and 'would hide damage' in err


@pytest.mark.parametrize(('on_error', 'last'), [('stop', 2), ('continue', 6)])
def test_what_happens_when_a_save_fails(tmp_path, capsys, on_error, last):
  (tmp_path / 'checkpoints').write_text('a file')
  assert train(tmp_path, 6, on_error=on_error) == 1
  out = capsys.readouterr().out
  assert f'{tmp_path}/checkpoints/2 is not saved: File exists; ' in out
  assert 'bytes are free there; there is no good checkpoint' in out
  assert ('on_error=continue would train on' in out) == (on_error == 'stop')
  rows = [json.loads(line)['step'] for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
  assert rows[-1] == last


def test_a_state_that_is_not_finite_is_no_checkpoint(tmp_path, capsys):
  # A loss that is not finite is seen before a save, whether it is logged then or not.
  assert train(tmp_path, 6, log_every=0, lost_at=4) == 1
  assert 'not finite at step 4; the last checkpoint is step 2' in capsys.readouterr().out
  assert steps_of(tmp_path) == [2]


def test_a_metric_that_is_not_measured_is_refused():
  recipe = {'model': {'num_layers': 1}, 'checkpoint': {'best_metric': 'eval/test/loss'}}
  with pytest.raises(ConfigError) as e:
    build(PretrainSpec, recipe)
  assert all(part in str(e.value) for part in ("checkpoint.best_metric='eval/test/loss'", 'write eval/validation/loss'))
