"""metrics.jsonl is valid JSON, is rewound when a run resumes, and survives kills and failing mirrors."""

import json
import math
import sys
import types

import pytest

from llmjax.config import ConfigError
from llmjax.evaluate.metrics import curve
from llmjax.run import writers


def _strict(line):
  def refuse(constant):
    raise ValueError(f'{constant} is not JSON')
  return json.loads(line, parse_constant=refuse)


def _steps(path):
  return [row['step'] for row in writers.read_metrics(path)]


def test_every_line_is_valid_json_and_reading_restores_the_floats(tmp_path):
  values = {'train/loss': math.nan, 'train/grad_norm': math.inf, 'eval/v/loss': -math.inf,
            'train/lr': 3e-4, 'train/mfu': None, 'count': 7}
  with writers.open_writers(tmp_path, {}, names=()) as writer:
    writer.write(1, values)
  (line,) = (tmp_path / 'metrics.jsonl').read_text().splitlines()
  assert list(_strict(line))[:2] == ['step', 'time']
  (row,) = writers.read_metrics(tmp_path)
  assert math.isnan(row['train/loss'])
  assert (row['train/grad_norm'], row['eval/v/loss']) == (math.inf, -math.inf)
  assert (row['step'], row['train/lr'], row['train/mfu'], row['count']) == (1, 3e-4, None, 7)


def test_a_line_is_on_disk_when_write_returns(tmp_path):
  writer = writers.open_writers(tmp_path, {}, names=())
  writer.write(1, {'train/loss': 2.5})
  assert _steps(tmp_path) == [1]
  writer.close()
  writer.close()


def test_resuming_removes_metrics_after_the_checkpoint(tmp_path):
  with writers.open_writers(tmp_path, {}, names=()) as writer:
    for step in range(1, 8):
      writer.write(step, {'train/loss': float(step)})
      writer.write_sample(step, 'def ', f'f{step}')
  with writers.open_writers(tmp_path, {}, names=(), resume_step=4) as writer:
    writer.write(5, {'train/loss': 50.0})
  assert _steps(tmp_path) == [1, 2, 3, 4, 5]
  assert writers.read_metrics(tmp_path)[-1]['train/loss'] == 50.0
  samples = [json.loads(x) for x in (tmp_path / 'samples.jsonl').read_text().splitlines()]
  assert [s['step'] for s in samples] == [1, 2, 3, 4]
  assert not list(tmp_path.glob('*.tmp'))


def test_rewinding_keeps_the_encoding_of_nan(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  path.write_text('{"step": 1, "a": "NaN"}\n{"step": 2, "a": 1.0}\n')
  writers.rewind(path, 1)
  assert path.read_text() == '{"step": 1, "a": "NaN"}\n'


def test_a_new_run_renames_the_old_metrics(tmp_path):
  (tmp_path / 'metrics.jsonl').write_text('{"step": 9}\n')
  with writers.open_writers(tmp_path, {}, names=()) as writer:
    writer.write(1, {})
  assert _steps(tmp_path) == [1]
  assert _steps(tmp_path / 'metrics.jsonl.bak') == [9]


@pytest.mark.parametrize('tail', ['{"step": 3, "tra', '\0\0\0\0', '{"step": 3, "a": "é'])
def test_a_truncated_last_line_is_dropped(tmp_path, tail):
  path = tmp_path / 'metrics.jsonl'
  path.write_bytes(b'{"step": 1}\n{"step": 2}\n' + tail.encode()[:-1])
  assert _steps(path) == [1, 2]
  with writers.open_writers(tmp_path, {}, names=(), resume_step=2) as writer:
    writer.write(3, {})
  assert _steps(path) == [1, 2, 3]


def test_a_damaged_line_is_reported_with_its_number(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
  with pytest.raises(ConfigError, match=r'metrics\.jsonl: line 2 is not a JSON object'):
    writers.read_metrics(path)


def test_unknown_and_missing_mirrors_are_errors_with_a_remedy(tmp_path, monkeypatch):
  with pytest.raises(ConfigError, match="'tensorbord' is not one of: tensorboard, wandb"):
    writers.open_writers(tmp_path, {}, names=('tensorbord',))
  for package in ('wandb', 'mlflow'):
    monkeypatch.setitem(sys.modules, package, None)
  (tmp_path / 'metrics.jsonl').write_text('{"step": 1}\n')
  with pytest.raises(ConfigError) as e:
    writers.open_writers(tmp_path, {}, names=('wandb', 'mlflow'))
  assert 'pip install wandb' in e.value.problems[0] and 'pip install mlflow' in e.value.problems[1]
  assert _steps(tmp_path) == [1]  # Not rewound, since the run did not start.


def test_tensorboard_holds_the_same_numbers(tmp_path):
  with writers.open_writers(tmp_path, {'model': {'d_model': 8}}) as writer:
    writer.write(3, {'train/loss': 2.5, 'train/mfu': None})
  (events,) = (tmp_path / 'tensorboard').iterdir()
  assert b'train/loss' in events.read_bytes() and b'train/mfu' not in events.read_bytes()
  assert 'tensorflow' not in sys.modules


def test_a_failing_mirror_is_dropped_and_the_file_is_still_written(tmp_path, monkeypatch, capsys):
  class Broken:
    def __init__(self, *unused):
      pass

    def scalars(self, *unused):
      raise ConnectionError('no server')

  monkeypatch.setitem(writers.MIRRORS, 'broken', Broken)
  with writers.open_writers(tmp_path, {}, names=('broken',)) as writer:
    for step in range(3):
      writer.write(step, {'train/loss': 1.0})
  assert _steps(tmp_path) == [0, 1, 2]
  assert capsys.readouterr().err.count('broken stopped (ConnectionError: no server)') == 1


def test_wandb_resumes_the_same_run_with_its_own_step_metric(tmp_path, monkeypatch):
  started, logged = [], []
  run = types.SimpleNamespace(define_metric=lambda *a, **k: None, log=logged.append,
                              finish=lambda: None)
  fake = types.SimpleNamespace(init=lambda **k: (started.append(k), run)[1])
  monkeypatch.setitem(sys.modules, 'wandb', fake)
  for resume_step in (None, 1, None):
    with writers.open_writers(tmp_path, {'a': 1}, ('wandb',), resume_step) as writer:
      writer.write(2, {'train/loss': 1.5, 'train/mfu': None})
  first, resumed, fresh = (s['id'] for s in started)
  assert first == resumed != fresh and started[0]['config'] == {'a': 1}
  assert logged[0] == {'step': 2, 'train/loss': 1.5}


def test_secrets_are_masked_in_events_and_metrics_but_not_in_samples(tmp_path, monkeypatch):
  monkeypatch.setenv('HF_TOKEN', 'canary-0f3a9')
  text = 'a canary-0f3a9 b'
  with writers.open_writers(tmp_path, {}, names=()) as writer:
    writer.write(1, {'eval/v/source': text})
    writer.event(1, 'start', reason=text, changes={'a': [text]})
    writer.write_sample(1, text, text)
  read = lambda name: json.loads((tmp_path / name).read_text())
  assert read('metrics.jsonl')['eval/v/source'] == 'a *** b'
  assert read('events.jsonl')['details'] == {'reason': 'a *** b', 'changes': {'a': ['a *** b']}}
  assert read('samples.jsonl') == {'step': 1, 'prompt': text, 'text': text}


def test_only_the_first_process_writes(tmp_path, monkeypatch):
  monkeypatch.setattr('jax.process_index', lambda: 1)
  with writers.open_writers(tmp_path / 'run', {}) as writer:
    writer.write(1, {'train/loss': 1.0})
    writer.write_sample(1, 'a', 'b')
  assert not (tmp_path / 'run').exists()


def test_a_curve_skips_missing_values():
  assert curve([{'step': 1, 'a': 2}, {'step': 2}, {'step': 3, 'a': None}], 'a') == ([1], [2.0])
