"""Stop signals: the first one saves, the second one ends the process; alone, and with JAX's preemption service."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = '''
import socket, sys, time
import jax
from llmjax.parallel.distributed import agreed_stop
if sys.argv[1] == 'service':
  with socket.create_server(('127.0.0.1', 0)) as s:
    port = s.getsockname()[1]
  jax.distributed.initialize(f'127.0.0.1:{port}', 1, 0)
for sitting in range(2):
  with agreed_stop() as stop:
    step = 1000 * sitting
    assert not stop(step)
    if sitting:
      print('ready', flush=True)
    while sitting and not stop(step := step + 1):
      time.sleep(0.02)
    if sitting:
      print('stopped', stop.status, flush=True)
      time.sleep(60)  # A save that never ends.
'''


@pytest.mark.parametrize('place', ['alone', 'service'])
@pytest.mark.parametrize(('signum', 'status'), [(signal.SIGTERM, 75), (signal.SIGINT, 130), (signal.SIGHUP, 75)])
def test_the_first_signal_stops_and_the_second_ends(place, signum, status):
  child = subprocess.Popen([sys.executable, '-c', SCRIPT, place], env={**os.environ, 'PYTHONPATH': str(ROOT)},
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
  try:
    assert child.stdout.readline() == 'ready\n', child.communicate()[1]
    child.send_signal(signum)
    child.send_signal(signum)  # The same notice by another way.
    assert child.stdout.readline() == f'stopped {status}\n'
    time.sleep(1.1)
    assert child.poll() is None
    child.send_signal(signum)
    assert child.wait(timeout=5) == 128 + signum
    assert 'leaving without a save' in child.stderr.read()
  finally:
    child.kill()
    child.communicate()


def test_a_run_under_nohup_ignores_sighup():
  child = subprocess.Popen(['bash', '-c', 'trap "" HUP; exec "$@"', 'bash', sys.executable, '-c', SCRIPT, 'alone'],
                           env={**os.environ, 'PYTHONPATH': str(ROOT)}, stdout=subprocess.PIPE, text=True)
  try:
    assert child.stdout.readline() == 'ready\n'
    child.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    child.send_signal(signal.SIGTERM)
    assert child.stdout.readline() == 'stopped 75\n'  # A second signal would have ended it.
  finally:
    child.kill()
    child.communicate()


COMPILING = '''
import os, signal, sys, threading, time
import jax, jax.numpy as jnp
from llmjax import main

def run(argv):
  def f(x):
    for i in range(120):
      x = jnp.tanh(x @ x + i) + jnp.sin(x) * jax.nn.softmax(x)
    return x.sum()
  lowered = jax.jit(jax.grad(f)).lower(jnp.ones((16, 16)))
  threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
  lowered.compile()
  print('compiled', flush=True)

main._run = run
main.main()
'''


def test_ctrl_c_while_xla_compiles_ends_with_130():
  """XLA goes on compiling; Python's finalization under it ended in a segmentation fault."""
  done = subprocess.run([sys.executable, '-c', COMPILING, 'pretrain'], env={
      **os.environ, 'PYTHONPATH': str(ROOT), 'JAX_ENABLE_COMPILATION_CACHE': 'false'}, capture_output=True, text=True,
                        timeout=60, check=False)
  assert (done.returncode, done.stdout, done.stderr) == (130, '', '\nllmjax pretrain: stopped by Ctrl-C\n')


LOST = '''
import gc, os, signal, time
from llmjax import main

def interrupt(phase, info):
  if phase == 'start':
    os.kill(os.getpid(), signal.SIGINT)

def run(argv):
  gc.callbacks.append(interrupt)
  gc.collect()
  gc.callbacks.remove(interrupt)
  time.sleep(20)

main._run = run
main.main()
'''


def test_ctrl_c_inside_a_callback_of_the_garbage_collector_is_not_lost():
  begin = time.monotonic()
  done = subprocess.run([sys.executable, '-c', LOST, 'prepare'], env={**os.environ, 'PYTHONPATH': str(ROOT)},
                        capture_output=True, text=True, timeout=60, check=False)
  assert (done.returncode, done.stderr) == (130, '\nllmjax prepare: stopped by Ctrl-C\n')
  assert time.monotonic() - begin < 15
