"""`llmjax launch local` with real processes: identical losses, signals, failures and restarts."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

from llmjax.evaluate.metrics import read_lines
from tests.helpers import environment_of, prepare_words, run_process

ROOT = pathlib.Path(__file__).parents[2]
TRAIN = ['pretrain', '--config=recipe.py', '--config.data.seq_len=16', '--config.train.batch_size=8',
         '--config.train.log_every=1', '--config.train.compute_dtype=float32', '--config.logs.writers=',
         '--config.model.num_layers=1', '--config.model.d_model=16', '--config.model.num_heads=2',
         '--config.model.mlp_dim=32', '--config.optimizer.lr=0.01',
         '--config.optimizer.schedule=constant', '--config.mesh.fsdp=2']
RECIPE = "def get_config():\n  return {'data': {'sources': {'text': 1.0}}}\n"


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A folder with a prepared corpus and a recipe."""
  folder = prepare_words(tmp_path_factory.mktemp('launch'))
  (folder / 'recipe.py').write_text(RECIPE)
  return folder


def start(folder, processes, devices, *argv, largest='unlimited', **environment):
  """Start `launch local`.  largest: file size limit in KiB, which emulates a full disk."""
  return subprocess.Popen(
      ['bash', '-c', f'ulimit -f {largest}; exec "$@"', 'bash',
       sys.executable, '-m', 'llmjax', 'launch', 'local', f'--processes={processes}',
       f'--devices-per-process={devices}', '--logs=logs', '--', *argv],
      env=environment_of(**environment), cwd=folder, text=True,
      stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def launch(folder, *argv, status=0, **environment):
  """Run `launch local` to completion; return its output."""
  process = start(folder, *argv, **environment)
  try:
    out, _ = process.communicate(timeout=120)
  finally:
    process.kill()
  assert process.returncode == status, out
  return out


def rows(workdir):
  """Return {step: metrics that do not depend on time}."""
  metrics = {}
  for row in read_lines(workdir / 'metrics.jsonl'):
    values = {k: v for k, v in row.items() if k.endswith(('loss', 'grad_norm', 'tokens', 'bits_per_byte'))}
    metrics[row['step']] = metrics.get(row['step'], {}) | values
  return metrics


@pytest.fixture(scope='module')
def four(folder):
  """A run of 4 steps by 4 processes of 1 device, with a checkpoint at step 2."""
  out = launch(folder, 4, 1, *TRAIN, '--workdir=four', '--config.train.steps=4',
               '--config.train.checkpoint_every=2')
  assert '4 of 4 processes here' in out
  assert out.count('step  4/4') == 1
  assert not (folder / 'logs/process-1.log').read_text().count('step  ')
  return folder / 'four'


@pytest.mark.slow
def test_fewer_processes_resume_exactly(folder, four):
  shutil.copytree(four, folder / 'one')
  shutil.rmtree(folder / 'one/checkpoints/4')
  out = launch(folder, 1, 4, *TRAIN, '--workdir=one', '--config.train.steps=4')
  assert 'resuming from step 2' in out
  assert list(rows(four)) == [1, 2, 3, 4]
  assert 'eval/validation/bits_per_byte' in rows(four)[4]
  assert rows(folder / 'one') == rows(four)


@pytest.mark.slow
def test_two_processes_have_equal_losses_and_ctrl_c_stops_them_at_the_same_step(folder, four):
  process = start(folder, 2, 2, *TRAIN, '--workdir=two', '--config.train.steps=100000', '--config.evaluate.splits=')
  file, deadline = folder / 'two/metrics.jsonl', time.monotonic() + 60
  while not file.exists() or len(file.read_text().splitlines()) < 4:
    assert time.monotonic() < deadline and process.poll() is None
    time.sleep(0.05)
  process.send_signal(signal.SIGINT)
  out, _ = process.communicate(timeout=60)
  assert process.returncode == 130, out
  (step,) = (int(p.name) for p in (folder / 'two/checkpoints').iterdir())
  assert f'the same command resumes from step {step}' in out
  assert 'Traceback' not in out
  found, expected = rows(folder / 'two'), rows(four)
  assert len(found) == step
  for step in (1, 2, 3):
    assert found[step] == expected[step]


@pytest.mark.slow
@pytest.mark.parametrize('processes', [1, 2])
def test_log_that_cannot_be_written_ends_the_run_with_one_line(folder, processes):
  name = f'full{processes}'
  train = [*TRAIN, f'--workdir={name}', '--config.train.steps=60', '--config.evaluate.splits=',
           '--config.train.compilation_cache=']
  begin = time.monotonic()
  out = launch(folder, processes, 2 // processes, *train, status=1, largest=9)
  assert time.monotonic() - begin < 60  # Process 0 must not wait for the other one.
  (line,) = (line for line in out.splitlines() if 'stopped: ' in line)
  assert f'{name}/' in line and 'cannot be written: File too large; free some space, and the same command' in line
  assert 'Traceback' not in out
  done = max(rows(folder / name))
  assert 5 < done < 60
  launch(folder, processes, 2 // processes, *train)  # The disk has space again.
  launch(folder, processes, 2 // processes, *train, f'--workdir={name}-undisturbed')
  assert rows(folder / name) == rows(folder / f'{name}-undisturbed')
  assert list(rows(folder / name)) == list(range(1, 61))


def test_batches_are_placed_by_the_mesh_and_a_crash_ends_the_run(folder):
  """Meshes whose processes hold adjacent, interleaved or equal sequences; then process 1 is killed."""
  (folder / 'place.py').write_text('''
import os, signal
import jax, numpy as np
from llmjax.data import stream
from llmjax.data.spec import DataSpec
from llmjax.parallel import distributed
from llmjax.parallel.mesh import batch_blocks, batch_shards, make_mesh, place_batch
from llmjax.parallel.spec import DistributedSpec, MeshSpec

def get_config():
  with distributed.together(DistributedSpec()):
    me, spec = jax.process_index(), DataSpec(sources={'text': 1.0}, seq_len=16)
    whole = next(stream.open_stream(spec, batch_size=8, seed=0))
    for sizes, blocks in ((dict(data=4), [(0, 1), (2, 3)]), (dict(data=2, stage=2), [(0, 2), (1, 3)]),
                          (dict(data=1, context=4), [(0,), (0,)]), (dict(data=1, context=2, fsdp=2), [(0,), (1,)]),
                          (dict(data=1, stage=2, context=2), [(0,), (1,)])):
      mesh = make_mesh(MeshSpec(**sizes))
      assert batch_blocks(mesh) == blocks[me], (sizes, me, batch_blocks(mesh))
      local = next(stream.open_stream(spec, batch_size=8, seed=0, blocks=blocks[me], block_count=batch_shards(mesh)))
      assert len(local['tokens']) == 8 * len(blocks[me]) // batch_shards(mesh)
      for name, array in place_batch(mesh, local).items():
        assert array.shape == (8, 16)
        for shard in array.addressable_shards:
          np.testing.assert_array_equal(shard.data, whole[name][shard.index])
    distributed.wait_for_all('placed')
    if me == 1:
      print('batches are right', flush=True)
      os.kill(os.getpid(), signal.SIGKILL)
    distributed.wait_for_all('never')
''')
  out = launch(folder, 2, 2, 'pretrain', '--config=place.py', '--workdir=x', status=137)
  assert 'process 1 of 2 ended with signal SIGKILL; the others were ended' in out
  assert 'batches are right' in out


def test_missing_process_is_reported_in_one_line(folder):
  done = run_process(
      folder, *TRAIN, '--workdir=alone', '--config.distributed.coordinator=127.0.0.1:1',
      '--config.distributed.processes=2', '--config.distributed.process_id=1',
      '--config.distributed.start_timeout_seconds=1')
  assert done.returncode == 2
  assert done.stdout + done.stderr == done.stderr
  assert done.stderr.count('\n') == 1
  assert 'process 1 of 2 cannot reach process 0 at 127.0.0.1:1: gave up after 1 s' in done.stderr


@pytest.mark.slow
def test_run_restarts_with_the_remaining_processes(folder):
  """Process 1 is killed, then process 0 is stopped; the run restarts with one process each time.  SIGTERM ends it."""
  process = subprocess.Popen(
      [sys.executable, '-m', 'llmjax', 'launch', 'local', '--processes=2', '--devices-per-process=2', '--restart=2',
       '--shrink', '--', *TRAIN, '--workdir=again', '--config.train.steps=100000', '--config.evaluate.splits=',
       '--config.train.checkpoint_every=20'],
      env=environment_of(), cwd=folder, text=True, stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT)
  file = folder / 'again/metrics.jsonl'

  def reach(step):
    deadline = time.monotonic() + 90
    while step > max(rows(folder / 'again') if file.exists() else [0], default=0):
      assert time.monotonic() < deadline and process.poll() is None
      time.sleep(0.05)
    return max(rows(folder / 'again'))

  def children():
    tasks = pathlib.Path(f'/proc/{process.pid}/task')
    return [int(pid) for task in tasks.iterdir() for pid in (task / 'children').read_text().split()]

  try:
    step = reach(30)
    os.kill(max(children()), signal.SIGKILL)
    step = reach(step + 40)
    (child,) = children()
    os.kill(child, signal.SIGSTOP)
    reach(step + 40)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
  finally:
    process.kill()
  assert process.returncode == 75, out
  first, second = (line for line in out.splitlines() if 'starting' in line and line.startswith('llmjax launch:'))
  assert 'process 1 of 2 ended with signal SIGKILL' in first and 'restarting 1 process from step' in first
  assert 'process 0 of 1 was stopped (SIGSTOP)' in second and 'restarting 1 process from step' in second
  found = rows(folder / 'again')
  assert list(found) == list(range(1, max(found) + 1))
  assert (folder / f'again/checkpoints/{max(found)}/manifest.json').exists()


@pytest.mark.slow
def test_hang_in_a_collective_names_the_missing_rank(folder):
  (folder / 'hang.py').write_text('''
import time
import jax
from llmjax.parallel import distributed
from llmjax.parallel.spec import DistributedSpec

def get_config():
  with distributed.together(DistributedSpec()):
    heart = distributed.start_heartbeat(DistributedSpec(), 'hung')
    distributed.wait_for_all('first')
    heart.beat(41, waited=True)
    if jax.process_index() == 1:
      time.sleep(600)
    heart.beat(42, waited=True)
    distributed.wait_for_all('never')
''')
  done = run_process(folder, 'launch', 'local', '--hang-seconds=2', '--logs=logs', '--', 'pretrain',
                     '--config=hang.py', '--workdir=x', timeout=90)
  assert done.returncode == 76, done.stdout + done.stderr
  stacks = (folder / 'hung/stacks/0.txt').read_text()
  assert 'rank 1 last seen at step 41 (step); rank 0 waits at step 42' in stacks
  assert 'in _read_key' in stacks  # The stack of the main thread, not only of the watchdog.
  assert 'rank 1 has made no progress' in (folder / 'hung/stacks/1.txt').read_text()


@pytest.mark.slow
def test_late_process_is_awaited_and_an_absent_one_is_named(folder):
  (folder / 'absent.py').write_text('''
import time
import jax
from llmjax.parallel import distributed
from llmjax.parallel.spec import DistributedSpec

def get_config():
  with distributed.together(DistributedSpec()):
    me = jax.process_index()
    distributed._limits['start_timeout_seconds'], distributed.REPORT_SECONDS = 6, 1
    distributed.wait_for_all('started')
    time.sleep(3 * me)
    assert distributed.gather({'rank': me}, 'been late') == [{'rank': 0}, {'rank': 1}]
    print('all were there', flush=True)
    time.sleep(100 * me)
    distributed.wait_for_all('opened the data')
''')
  out = launch(folder, 2, 1, 'pretrain', '--config=absent.py', '--workdir=x', status=1)
  lines = out.splitlines()
  assert 'llmjax: 1 of 2 processes here, waiting for rank 1 at: been late' in lines and 'all were there' in lines
  (line,) = (line for line in lines if 'gave up' in line)
  assert 'llmjax: 1 of 2 processes here, waiting for rank 1 at: opened the data: gave up after 6 s; look at' in line
  assert 'Traceback' not in out


# Appended to a recipe: rank 1 stops or sleeps at some point of the run.
LATE = '''
import os, signal, time
from llmjax.checkpoint import checkpoints
from llmjax.data import stream
from llmjax.parallel import heartbeat
heartbeat.MIN_HANG_SECONDS, heartbeat.PULSE, heartbeat.SUPERVISED_PULSE = 3.0, 0.5, 0.5
last = os.environ['LLMJAX_PROCESS_ID'] == '1'
seconds, stops = float(os.environ.get('TEST_DELAY', 0)), os.environ.get('TEST_STOP')
draw, restore = stream.BatchStream.__next__, checkpoints.Checkpoints.restore

def delayed(self):
  if last and seconds and self.state == 5:
    time.sleep(seconds)
  return draw(self)

def stopped(self, *arguments):
  if last and stops:
    os.kill(os.getpid(), signal.SIGSTOP)
  return restore(self, *arguments)

stream.BatchStream.__next__, checkpoints.Checkpoints.restore = delayed, stopped
'''


@pytest.mark.slow
def test_late_data_reader_is_awaited_and_a_stopped_process_ends_the_run(folder):
  (folder / 'late.py').write_text(LATE + RECIPE)
  train = ['pretrain', '--config=late.py', *TRAIN[2:], '--workdir=late', '--config.evaluate.splits=',
           '--config.distributed.heartbeat_seconds=10']
  out = launch(folder, 2, 1, *train, '--config.train.steps=8', TEST_DELAY='8')
  assert 'rank 0 has made no progress for ' in out
  assert ' (data); rank 0 waits at step ' in out
  begin = time.monotonic()
  out = launch(folder, 2, 1, *train, '--config.train.steps=9', TEST_STOP='1', status=134)
  assert time.monotonic() - begin < 100
  assert 'The following tasks are unhealthy (stopped sending heartbeats):\n1\n' in out  # Message of JAX.
