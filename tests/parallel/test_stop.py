"""SIGTERM and Ctrl-C: saved once, and out at the second one; one process, and JAX's preemption service."""

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
@pytest.mark.parametrize(('signum', 'status'), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
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
