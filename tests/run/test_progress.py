"""Progress lines: their content, the estimated time left, and terminals and pipes."""

import io
import math

import pytest

from llmjax.run import progress


class Terminal(io.StringIO):
  def isatty(self):
    return True


class Clock:
  """A clock that moves when told."""

  def __init__(self):
    self.now = 100.0

  def __call__(self):
    return self.now


METRICS = {'train/loss': 3.4119, 'train/lr': 2.9e-3, 'train/grad_norm': 0.812,
           'train/tokens_per_second': 8912.0, 'train/mfu': 0.408, 'train/step_seconds': 0.1675,
           'train/data_wait_seconds': 0.00017}


def test_the_step_line_reads_as_documented():
  stream = io.StringIO()
  progress.Progress(1000, stream=stream).log(200, METRICS)
  assert stream.getvalue() == (
      'step   200/1000   20%  loss 3.412  lr 2.9e-03  gnorm 0.81  8.9k tok/s  mfu 41%  '
      'wait 0.1%  eta 2:14\n')


def test_small_losses_are_not_shown_as_zero():
  stream = io.StringIO()
  progress.Progress(10, stream=stream).log(10, {'train/loss': -2.34e-5})
  assert 'loss -2.3e-05' in stream.getvalue()


def test_a_rollout_names_its_units():
  stream = io.StringIO()
  metrics = {'reward': 0.5, 'tokens': 12.34, 'ended': 0.25, 'kl': 0.0123}
  progress.Progress(10, stream=stream).rollout(3, metrics, 1.5, 20.2)
  assert stream.getvalue() == ('roll   3/10  reward 0.500  12.3 tokens each  25% ended  kl 0.0123 nats  1.5s  '
                               'compiled in 20s\n')


def test_missing_metrics_are_left_out_and_nan_is_shown():
  stream = io.StringIO()
  progress.Progress(10, stream=stream).log(10, {'train/loss': math.nan, 'train/mfu': None})
  assert stream.getvalue() == 'step  10/10  100%  loss nan  eta ?\n'


def test_the_eta_excludes_compilation_and_includes_evaluations():
  clock = Clock()
  p = progress.Progress(100, stream=io.StringIO(), clock=clock)
  assert p.seconds_left(0) is None
  clock.now += 30.0  # Compilation.
  p.log(10, {'train/step_seconds': 2.0})
  assert p.seconds_left(10) == pytest.approx(90 * 2.0)
  clock.now += 40.0  # Ten steps of 2 s, and an evaluation of 20 s.
  p.log(20, {'train/step_seconds': 2.0})
  assert p.seconds_left(20) == pytest.approx(80 * 3.0)  # Half way from 2 to 4 s a step.
  assert p.seconds_left(100) == 0


def test_the_eta_of_a_resumed_run_starts_at_its_first_step():
  clock = Clock()
  p = progress.Progress(100, start_step=50, stream=io.StringIO(), clock=clock)
  p.log(60, {})
  assert p.seconds_left(60) is None
  clock.now += 10.0
  p.log(70, {})
  assert p.seconds_left(70) == pytest.approx(30.0)


def test_a_pipe_gets_whole_lines_only():
  stream = io.StringIO()
  p = progress.Progress(100, stream=stream)
  for step in range(1, 5):
    p.tick(step)
  p.evaluated(4, 'validation', {'loss': 3.301, 'perplexity': 27.139, 'bits_per_byte': 1.9206}, 0.93)
  p.saved(4, 'checkpoints/4', 0.41, 702_000_000)
  p.close()
  assert stream.getvalue() == (
      'eval    4/100  validation  loss 3.301  ppl 27.14  1.921 bits/byte  0.9s\n'
      'save    4/100  checkpoints/4  702 MB  0.4s\n')


def test_a_terminal_has_a_live_line():
  clock, stream = Clock(), Terminal()
  p = progress.Progress(100, stream=stream, clock=clock)
  p.tick(1)
  p.tick(2)  # Too soon to repaint.
  clock.now += 1
  p.tick(3)
  assert stream.getvalue().count('\r') == 2 and '\n' not in stream.getvalue()
  assert 'step    3/100    3%' in stream.getvalue() and '2/100' not in stream.getvalue()
  p.log(4, METRICS)
  shown = stream.getvalue().rsplit('\r', 1)[1]
  assert shown.startswith('step    4/100') and shown.endswith('\n')


def test_other_processes_are_silent():
  stream = Terminal()
  p = progress.Progress(100, stream=stream, enabled=False)
  p.tick(1)
  p.log(1, METRICS)
  p.say('hello')
  assert stream.getvalue() == ''


@pytest.mark.parametrize('seconds, text', [
    (0.04, '0.0s'), (9.94, '9.9s'), (9.96, '10s'), (59.6, '1:00'), (134, '2:14'),
    (3599.7, '1:00:00'), (11109, '3:05:09'),
    (86400 * 2 + 4 * 3600, '2d 4h'), (None, '?'), (math.inf, '?')])
def test_durations(seconds, text):
  assert progress.format_duration(seconds) == text


@pytest.mark.parametrize('value, text', [
    (0, '0'), (12.34, '12.3'), (999, '999'), (8912, '8.9k'), (99_960, '100k'), (999_960, '1.0M'),
    (58_470_000, '58.5M'), (702e6, '702M'), (1.5e9, '1.5G'), (3e12, '3.0T')])
def test_counts(value, text):
  assert progress.format_count(value) == text


LONG = {**METRICS, 'train/loss': 13.4119, 'train/data_wait_seconds': 0.0001}


@pytest.mark.parametrize('columns, left_out', [
    (80, ('wait', 'lr')), (120, ()), (75, ('wait', 'lr', ' 95%')), (60, ('wait', 'lr', ' 95%', 'gnorm', 'mfu'))])
def test_lines_stay_within_a_terminal(columns, left_out, monkeypatch):
  monkeypatch.setenv('COLUMNS', str(columns))
  stream = Terminal()
  p = progress.Progress(16000, stream=stream)
  p.log(15200, LONG)
  line = stream.getvalue().rstrip('\n')
  assert len(line) < columns and line.startswith('step  15200/16000') and 'loss 13.412' in line and 'eta' in line
  for part in ('wait', 'lr', ' 95%', 'gnorm', 'mfu'):
    assert (part in line) != (part in left_out), part
  p.evaluated(15200, 'validation', {'loss': 3.301, 'perplexity': 27.139, 'bits_per_byte': 1.9206}, 0.9, 7.1)
  p.saved(15200, 'a/folder/with/a/long/name/runs/quickstart/checkpoints/15200', 0.41, 702_000_000)
  p.say('1.31 M parameters, 0.05 M trained, 1024 tokens a step, 8 x cpu (data 2 x tensor 4), compiled in 7s')
  lines = stream.getvalue().splitlines()
  assert max(map(len, lines)) < columns
  assert '1.921 bits/byte' in stream.getvalue() and '/15200  702 MB' in stream.getvalue()
  assert ('compiled in 7.1s' in stream.getvalue()) == (columns == 120)


def test_a_pipe_gets_lines_in_full():
  stream = io.StringIO()
  p = progress.Progress(16000, stream=stream)
  p.log(15200, LONG)
  p.say('a ' * 100)
  assert 'wait' in stream.getvalue() and len(stream.getvalue().splitlines()) == 2


def test_a_stage_is_timed_from_its_beginning():
  stream, clock = io.StringIO(), Clock()
  show = progress.Stages(stream, 'prompts', clock)
  show('feedback', 0, 8)
  clock.now += 30.0
  show('feedback', 8, 8)
  show.finish('; compiled in 4.0 s')
  assert stream.getvalue().splitlines()[-1] == 'feedback: 8 prompts, 30.0 s; compiled in 4.0 s'
