"""The supervisor with scripted processes, without JAX: crash, hang, stop, crash loop, fewer processes."""

import os
import pathlib
import signal
import sys
import threading
import time

import pytest

from llmjax.cluster import supervise
from llmjax.cluster.supervise import Group, Policy
from llmjax.parallel import heartbeat

ROOT = pathlib.Path(__file__).parents[2]
HEAD = '''
import os, signal, sys, time
from llmjax.parallel.heartbeat import Heartbeat
rank, attempt, count = map(int, sys.argv[1:])
heart = Heartbeat(rank, count, 10 * attempt, folder=os.environ['LLMJAX_HEARTBEATS'], pulse=0.05,
                  hang_seconds=float(os.environ['LLMJAX_HANG_SECONDS']), stacks='stacks', leave=True)
'''


class Runs:
  """Runs a script under the supervisor and records its reports."""

  def __init__(self, folder, script, policy):
    self.folder, self.script, self.policy = folder, HEAD + script, policy
    self.counts, self.reports, self.groups, self.times = [], [], [], []

  def start(self, count, attempt):
    group = Group(self.folder, self.policy)
    self.times.append(time.monotonic())
    for rank in range(count):
      group.start([sys.executable, '-c', self.script, str(rank), str(attempt), str(count)],
                  {**os.environ, 'PYTHONPATH': str(ROOT)})
    self.counts.append(count)
    self.groups.append(group)
    return group

  def run(self, count):
    return supervise.supervise(self.start, count, self.policy, self.reports.append)


@pytest.fixture
def runs(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(supervise, 'WATCHDOG_SECONDS', 3.0)
  monkeypatch.setattr(supervise, 'STOPPED_SECONDS', 0.3)
  monkeypatch.setattr(supervise, 'GRACE_SECONDS', 0.3)

  def make(script, **policy):
    return Runs(tmp_path, script, Policy(**{'backoff': 0.05, 'end': 0.2, **policy}))

  return make


def test_crash_restarts_all_processes_at_once(runs, tmp_path):
  attempts = runs('''
heart.beat(11 + 10 * attempt, waited=True, saved=10 + 10 * attempt)
if attempt == 0 and rank == 1:
  open('died', 'w').close()
  os.kill(os.getpid(), signal.SIGKILL)
if attempt == 0:
  signal.signal(signal.SIGTERM, signal.SIG_IGN)  # As in a collective.
  time.sleep(60)
''', restarts=1)
  assert attempts.run(3) == 0
  assert attempts.counts == [3, 3]
  assert attempts.times[1] - (tmp_path / 'died').stat().st_mtime + time.time() - time.monotonic() < 1.0 + 0.2
  assert attempts.reports == [
      'process 1 of 3 ended with signal SIGKILL at step 11; restarting 3 processes from step 10 (1 of 1)']
  assert all(child.poll() is not None for group in attempts.groups for child in group.children)


def test_report_names_the_killed_process_and_not_its_victims(runs):
  """Processes that end together may be noticed in any order."""
  attempts = runs("""
if rank == 1:
  while not os.path.exists('left'):
    time.sleep(0.001)
  os.kill(os.getpid(), signal.SIGKILL)
open('left', 'w').close()
os._exit(1)
""", hang=60.0)
  assert attempts.run(2) == 128 + signal.SIGKILL
  assert attempts.reports[0].startswith('process 1 of 2 ended with signal SIGKILL')


def test_hang_is_detected_and_names_the_late_rank(runs, tmp_path):
  attempts = runs('''
heart.beat(1, waited=True)
if attempt == 0 and rank == 0:
  heart.beat(2, waited=True)
while attempt == 0:
  time.sleep(60)
''', restarts=1, hang=0.5)
  begin = time.monotonic()
  assert attempts.run(2) == 0
  assert time.monotonic() - begin < 8
  assert 'hung: its watchdog ended it (status 76) at step 2; restarting 2 processes' in attempts.reports[0]
  stacks = (tmp_path / 'stacks/0.txt').read_text()
  assert 'rank 0 has made no progress for ' in stacks and ' after step 2 (step)' in stacks
  assert 'rank 1 last seen at step 1 (step); rank 0 waits at step 2' in stacks
  assert 'most recent call first' in stacks and 'in _watch' in stacks


@pytest.mark.parametrize('moment', ['starting', 'step'])
def test_stopped_process_is_detected(runs, moment):
  attempts = runs(f'''
if {moment == "step"}:
  heart.beat(1, waited=True)
if attempt == 0 and rank == 1:
  os.kill(os.getpid(), signal.SIGSTOP)
if attempt == 0:
  time.sleep(60)
''', restarts=1)
  assert attempts.run(2) == 0
  assert attempts.reports[0].startswith('process 1 of 2 was stopped (SIGSTOP) at step')


def test_hang_is_detected_without_the_watchdog(runs):
  attempts = runs('''
heart.beat(1, waited=True)
heart.close()
if attempt == 0:
  time.sleep(60)
''', restarts=1, hang=0.3)
  assert attempts.run(1) == 0
  assert 'process 0 of 1 hung: no step for 3 s' in attempts.reports[0]


def test_crash_loop_backs_off_and_shows_the_first_error(runs):
  attempts = runs('''
print(f'error number {attempt}', file=sys.stderr)
sys.exit(40 + attempt)
''', restarts=3, backoff=0.2)
  assert attempts.run(1) == 40
  assert attempts.counts == [1] * 4
  pauses = [b - a for a, b in zip(attempts.times, attempts.times[1:], strict=False)]
  assert pauses[1] > 0.2 and pauses[2] > 0.4 and pauses[2] > pauses[0]
  assert 'No new checkpoint in 4 attempts: giving up' in attempts.reports[-2]
  assert attempts.reports[-1].splitlines()[-1].strip() == 'error number 0'


def test_progress_resets_the_number_of_failures(runs):
  attempts = runs('''
heart.beat(9, waited=True, saved=10 * attempt + (attempt == 1))
sys.exit(7 if attempt < 3 else 0)
''', restarts=2)
  assert attempts.run(1) == 0
  assert [s.rpartition('(')[2] for s in attempts.reports] == ['1 of 2)', '1 of 2)', '2 of 2)']


def test_shrink_restarts_with_fewer_processes(runs):
  attempts = runs('''
if count == 3:
  sys.exit(2)  # Invalid settings, such as a mesh that three processes do not fill.
if count == 4:
  time.sleep(0.3)
  if rank == 2:
    os.kill(os.getpid(), signal.SIGKILL)
  time.sleep(60)
''', restarts=2, shrink=True)
  assert attempts.run(4) == 0
  assert attempts.counts == [4, 3, 2]


def test_preempted_run_restarts_unless_the_supervisor_was_terminated(runs):
  attempts = runs('sys.exit(75 if attempt == 0 else 0)', restarts=1)
  assert attempts.run(2) == 0
  assert 'was preempted after saving (status 75)' in attempts.reports[0]
  attempts = runs('''
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
open(f'ready-{rank}', 'w').close()
time.sleep(60)
''', restarts=5)

  def terminate():
    while not all(pathlib.Path(f'ready-{k}').exists() for k in (0, 1)):
      time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGTERM)

  thread = threading.Thread(target=terminate)
  thread.start()
  assert attempts.run(2) == heartbeat.PREEMPTED
  thread.join()
  assert attempts.counts == [2] and not attempts.reports


def test_hang_limits():
  beat = heartbeat.Beat(phase='step', longest=40.0)
  assert heartbeat.hang_limit(beat) == 400
  assert heartbeat.hang_limit(heartbeat.Beat(phase='step', longest=0.1)) == 300
  assert heartbeat.hang_limit(beat, 7) == 7
  assert heartbeat.hang_limit(heartbeat.Beat(phase='save'), 7, 500) == 500
  assert [Policy(backoff=2).delay(n) for n in (1, 2, 3, 4, 30)] == [0, 2, 4, 8, 300]


def test_steps_are_watched_after_the_first_finished_one():
  with heartbeat.Heartbeat(pulse=60) as heart:
    heart.beat(1)
    assert heart.now.phase == 'starting'  # Dispatched, but possibly still compiling.
    heart.beat(2, waited=True)
    time.sleep(0.02)
    heart.beat(3)
    assert (heart.now.phase, heart.now.longest) == ('step', 0)
    heart.beat(4, waited=True)
    longest = heart.now.longest
    assert 0.02 <= longest < 1
    heart.beat(4, 'save')
    time.sleep(longest + 0.05)
    heart.beat(5, waited=True)
    assert heart.now.longest == longest  # Saving does not count as a step.


@pytest.mark.parametrize(('beats', 'silent', 'text'), [
    ({0: heartbeat.Beat(0, 42, 'step'), 1: heartbeat.Beat(1, 42, 'step'), 2: heartbeat.Beat(2, 41, 'step')}, {2},
     'rank 2 last seen at step 41 (step), not responding: stopped or dead; ranks 0, 1 wait at step 42'),
    ({0: heartbeat.Beat(0, 42, 'step'), 1: heartbeat.Beat(1, 42, 'save')}, set(),
     'rank 1 last seen at step 42 (save); rank 0 waits at step 42'),
    ({0: heartbeat.Beat(0, 42, 'step'), 1: None}, set(), 'rank 1 never started; rank 0 waits at step 42'),
    ({0: heartbeat.Beat(0, 4, 'step'), 1: heartbeat.Beat(1, 4, 'step')}, set(), 'all 2 ranks are at step 4'),
])
def test_describe_ranks(beats, silent, text):
  assert heartbeat.describe_ranks(beats, silent, 0).startswith(text)
