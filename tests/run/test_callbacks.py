"""Callbacks from a module outside the package: hooks, their order, and what they may do."""

import json

import pytest

from tests.run.test_guard import events, lines, losses, train

MODULE = '''
import json
from llmjax.run.callback import Callback


class Recorder(Callback):
  """Write the name of every hook that is called, with the step."""


def record(name):
  def hook(self, run, *arguments):
    with open(run.workdir / 'hooks.jsonl', 'a') as file:
      file.write(json.dumps([name, run.step]) + '\\n')
  return hook


for name in ('on_init', 'on_start', 'before_step', 'on_values', 'on_log', 'at_pause', 'on_evaluation', 'after_step',
             'on_rollback', 'flush', 'on_end', 'close'):
  setattr(Recorder, name, record(name))


class WeightNorm(Callback):
  """Log a metric of the parameters every second step, add one to the log lines, and stop at step 5."""

  def needs_values(self, run):
    return run.step % 2 == 0

  def on_values(self, run, rows):
    if run.step % 2 == 0:
      scale = run.params()['final_norm']['scale']
      run.log({'mine/scale': float(abs(scale).mean()), 'mine/steps': len(rows)})

  def on_log(self, run, values):
    values['mine/loss_twice'] = 2 * values['train/loss']
    return 'noted'

  def after_step(self, run):
    if run.step == 5:
      run.say('step 5 is enough')
      run.stop()
'''


@pytest.fixture
def module(tmp_path, monkeypatch):
  (tmp_path / 'my_callbacks.py').write_text(MODULE)
  monkeypatch.chdir(tmp_path)
  monkeypatch.syspath_prepend(tmp_path)


def test_hooks_are_called_in_the_documented_order(module, tmp_path):
  evaluators = {'validation': lambda params, frozen: {'loss': 1.0}}
  status, _ = train(tmp_path / 'run', steps=4, log_every=2, eval_every=4, evaluators=evaluators,
                    callbacks=('my_callbacks:Recorder',))
  assert status == 0
  hooks = [json.loads(line) for line in (tmp_path / 'run/hooks.jsonl').read_text().splitlines()]
  step = lambda n: [['before_step', n - 1], ['after_step', n]]
  logged = lambda n: [['before_step', n - 1], ['on_log', n], ['flush', n], ['on_values', n], ['at_pause', n]]
  assert hooks[:-1] == [
      ['on_init', 0], ['on_start', 0], ['flush', 0], *step(1), *logged(2), ['after_step', 2], *step(3),
      *logged(4)[:-1], ['on_evaluation', 4], ['flush', 4], ['at_pause', 4], ['after_step', 4], ['on_end', 4],
      ['close', 4], ['flush', 4]]
  assert hooks[-1] == ['flush', 4]  # After the report.


def test_a_callback_logs_metrics_and_ends_the_run(module, tmp_path, capsys):
  status, _ = train(tmp_path / 'run', steps=9, log_every=5, callbacks=('my_callbacks:WeightNorm',))
  assert status == 0 and 'step 5 is enough' in capsys.readouterr().out
  rows = lines(tmp_path / 'run', 'metrics.jsonl')
  assert [(row['step'], row['mine/steps']) for row in rows if 'mine/scale' in row] == [(2, 2), (4, 2)]
  (log,) = [row for row in rows if 'mine/loss_twice' in row]
  assert log['step'] == 5 and log['mine/loss_twice'] == 2 * log['train/loss']
  assert events(tmp_path / 'run', 'done')[0]['step'] == 5 and list(losses(tmp_path / 'run')) == [5]
  assert [p.name for p in (tmp_path / 'run/checkpoints').iterdir()] == ['5']
