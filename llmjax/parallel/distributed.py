"""Several processes of one run: start-up, barriers, an agreed stop, and failures that end one process alone."""

import atexit
import contextlib
import ctypes
import functools
import itertools
import json
import os
import signal
import socket
import sys
import threading
import time

import jax

from llmjax.config import ConfigError
from llmjax.parallel import heartbeat, in_flight, jax_internals
from llmjax.parallel.rendezvous import (
  REPORT_SECONDS,
  SLACK_SECONDS,
  WAIT_LONGER,
  all_interfaces,
  missing_processes,
  rendezvous,
  resolve_process,
)
from llmjax.parallel.spec import DistributedSpec

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # A run saves and stops after one of them.
REPEAT_SECONDS = 1.0  # Two signals within this time count as one.
POLL_SECONDS = 0.05  # Between two polls of a barrier.
SLICE_SECONDS = 1.0  # A call of JAX's client blocks this long at most, so that Ctrl-C is handled between two of them.

_limits = {'start_timeout_seconds': DistributedSpec().start_timeout_seconds}  # Of this process's run.


class AbsentError(Exception):
  """A process does not reach a barrier; the text is one line that says which one or why."""


# Start and end.


def initialize(spec):
  """Connect this process to the others of its run, if there are any; return whether there are.

  Call it before anything asks JAX for its devices.  A second call does nothing.  Raises ConfigError, on every process,
  if one of them does not connect in time.
  """
  if jax.distributed.is_initialized():
    return False
  process = resolve_process(spec)
  if process is None:
    return False
  _limits['start_timeout_seconds'] = spec.start_timeout_seconds
  host, port = process.coordinator
  bind = spec.bind or (host if host.startswith('127.') or host == 'localhost' else all_interfaces())
  rendezvous(process, bind, spec.start_timeout_seconds, functools.partial(print, flush=True))
  bracketed = lambda host: f'[{host}]' if ':' in host else host
  try:
    jax.distributed.initialize(
        f'{bracketed(host)}:{port}', process.count, process.process_id, local_device_ids=process.device_ids,
        cluster_detection_method='deactivate', initialization_timeout=spec.start_timeout_seconds,
        heartbeat_timeout_seconds=spec.heartbeat_seconds,
        coordinator_bind_address=f'{bracketed(bind)}:{port}')
  except (RuntimeError, ValueError) as e:
    raise ConfigError([f'distributed: process {process.process_id} of {process.count} could not join the others at '
                       f'{host}:{port} ({str(e).splitlines()[0]}); is another run on that port? Choose one with '
                       '--config.distributed.port']) from e
  return True


@contextlib.contextmanager
def together(spec):
  """Connect the processes for the duration of the block; an exception in it ends this process without the others.

  JAX would have it wait for them for five minutes before the error's exit status is seen.
  """
  initialize(spec)
  try:
    yield
  except AbsentError as e:
    leave_alone(1)
    raise SystemExit(f'llmjax: {e}') from None
  except BaseException as e:
    leave_alone(2 if isinstance(e, ConfigError) else 130 if isinstance(e, KeyboardInterrupt) else 1)
    raise


def leave_alone(status):
  """Make this process, if it is one of several, exit without waiting for the others."""
  if jax.distributed.is_initialized():
    # Before Python waits for threads, of which some may be waiting for the other processes; atexit is too late.
    getattr(threading, '_register_atexit', atexit.register)(_exit, status)


def _exit(status):
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(status)


def is_first():
  """Return whether this is process 0, which prints and writes files."""
  return jax.process_index() == 0


def start_heartbeat(spec, workdir):
  """Start this process's Heartbeat, which watches its loop.  spec: a DistributedSpec.  workdir: for stack traces.

  A loop that makes no progress for spec.hang_seconds ends its process; under a supervisor its limit applies.
  """
  supervisor, limit = os.environ.get(heartbeat.FOLDER, ''), os.environ.get(heartbeat.LIMIT, '')
  processes, seconds = jax.process_count(), float(limit or 0)
  folder = supervisor or (os.path.join(workdir, 'heartbeats') if processes > 1 else None)
  return heartbeat.Heartbeat(
      jax.process_index(), processes, folder=folder, stacks=os.path.join(workdir, 'stacks'), hang_seconds=seconds,
      leave=bool(limit), end_seconds=0.0 if seconds else spec.hang_seconds, progress=in_flight.finished,
      pulse=heartbeat.SUPERVISED_PULSE if supervisor else heartbeat.PULSE)


# Stop signals.


class Stop:
  """Whether to stop after a step, once Ctrl-C, SIGTERM or SIGHUP has arrived: see `agreed_stop`."""

  def __init__(self, poll=None, notify=None):
    self._poll, self._notify = poll, notify  # Both with several processes, else neither.
    self._signum, self._time, self._started = None, 0.0, False
    self._terminals = [stream for stream in (1, 2) if os.isatty(stream)]

  def __call__(self, step):
    """Return whether to stop, the same on all processes at the same step.  Call it before the first step, too."""
    self._started = True
    return self._poll(step) if self._poll else self._signum is not None

  @property
  def status(self):
    """The exit status of a stopped run: 130 after Ctrl-C, else PREEMPTED, which asks for a restart."""
    return 130 if self._signum == signal.SIGINT else heartbeat.PREEMPTED

  def receive(self, signum):
    """Record a signal.  Runs in a thread: the main one may be in a collective that never ends."""
    now = time.monotonic()
    if signum == signal.SIGHUP:  # Printing to a terminal that is gone would raise an error.
      for stream in self._terminals:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    if self._signum is None:
      self._time, self._signum = now, signum
      if self._notify:
        self._notify()
    elif now - self._time > REPEAT_SECONDS:  # Some launchers send the same notice in two ways.
      print(f'llmjax: a second {signal.Signals(signum).name}: leaving without a save', file=sys.stderr)
      _exit(128 + signum)

  def handle(self, signum, frame):
    """The signal handler; it raises KeyboardInterrupt only before the first step, when there is nothing to save."""
    if not self._poll and not self._started:
      if self._signum is None:
        self._time, self._signum = time.monotonic(), signum
      raise KeyboardInterrupt


@contextlib.contextmanager
def agreed_stop():
  """Yield a Stop; after one of STOP_SIGNALS, stop(step) is true on all processes at the same step.

  Any one of them may receive it.  A second signal, a second later or more, ends the process at once.  SIGHUP stays
  ignored if it is, as under nohup.
  """
  if threading.current_thread() is not threading.main_thread():  # Only it may handle signals.
    yield Stop()
    return
  with contextlib.ExitStack() as stack:
    stop = _preemption_stop(stack) if jax.distributed.is_initialized() else Stop()
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    thread = threading.Thread(target=_read_signals, args=(ours, stop.receive), name='signals', daemon=True)
    thread.start()
    for close in (ours.close, thread.join, theirs.close):  # The last one is called first: it ends the thread.
      stack.callback(close)
    for signum in STOP_SIGNALS:
      if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN:
        stack.callback(signal.signal, signum, signal.signal(signum, stop.handle))
    stack.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False))
    yield stop


def _preemption_stop(stack):
  """Return a Stop that uses JAX's preemption service.

  The service handles SIGTERM without Python's knowledge: its handler records the signal and its thread notifies the
  other processes.  The handler is called from here, so that signals can be counted.
  """
  from jax.experimental import multihost_utils
  libc = ctypes.CDLL(None)
  libc.signal.restype, libc.signal.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p)
  service = libc.signal(signal.SIGTERM, None)
  stack.callback(libc.signal, signal.SIGTERM, service)
  notice = ctypes.CFUNCTYPE(None, ctypes.c_int)(service)
  return Stop(multihost_utils.reached_preemption_sync_point, lambda: notice(signal.SIGTERM))


def _read_signals(pipe, receive):
  while numbers := pipe.recv(16):
    for number in numbers:
      if number in STOP_SIGNALS:
        receive(number)


# Barriers.


def wait_for_all(name):
  """Wait until all processes have called this.  name: what they have done.  Raises AbsentError as `gather` does."""
  gather(None, name)


_gather_numbers = itertools.count()  # The same on all processes.


def gather(value, name):
  """Return the values of all processes, in order, once all have called this.  value: anything of JSON.

  It uses JAX's coordination service, not the devices, whose collectives wait without a limit.  name: what the processes
  have done, for messages.  Raises AbsentError, on all processes, if one does not call it within the
  start_timeout_seconds that `initialize` was given.
  """
  if jax.process_count() == 1:
    return [value]
  client, number, seconds = jax_internals.coordination_client(), next(_gather_numbers), _limits['start_timeout_seconds']
  here, result_key = f'llmjax/gather/{number}/here/', f'llmjax/gather/{number}/result'
  begin = time.monotonic()
  client.key_value_set(f'{here}{jax.process_index()}', json.dumps(value))
  if is_first():
    result = _collect_values(client, here, name, begin, seconds)
    client.key_value_set(result_key, json.dumps(result))
    if number:  # All have read the last result, or they would not be here.
      client.key_value_delete(f'llmjax/gather/{number - 1}/')
  else:
    text = _read_key(client, result_key, begin + seconds + SLACK_SECONDS)
    result = json.loads(text) if text else {'absent': (
        f'process {jax.process_index()}: no word from process 0 within {seconds} s at: {name}; look at what it '
        f'printed; {WAIT_LONGER}')}
  if 'absent' in result:
    raise AbsentError(result['absent'])
  return result['values']


def _collect_values(client, here, name, begin, seconds):
  """Return {'values': those of all processes}, or {'absent': one line that says which are missing}.  For process 0."""
  values, count, reported = [], jax.process_count(), False
  while len(values) < count:
    text = _read_key(client, f'{here}{len(values)}', time.monotonic() + SLICE_SECONDS)
    if text:
      values.append(json.loads(text))
      continue
    waited = time.monotonic() - begin
    if not reported and waited > REPORT_SECONDS or waited > seconds:
      present = {int(key.rpartition('/')[2]) for key, _ in client.key_value_dir_get(here)}
      line = f'{missing_processes(count, present)} at: {name}'
      if waited > seconds:
        return {'absent': f'{line}: gave up after {seconds} s; look at what it printed; {WAIT_LONGER}'}
      reported = True
      print(f'llmjax: {line}', file=sys.stderr, flush=True)
  return {'values': values}


def _read_key(client, key, deadline):
  """Return a key's value once it is set, or None at the deadline (of time.monotonic)."""
  while (left := deadline - time.monotonic()) > 0:
    try:
      return client.blocking_key_value_get(key, max(int(1000 * min(left, SLICE_SECONDS)), 1))
    except jax.errors.JaxRuntimeError as e:
      if 'DEADLINE_EXCEEDED' not in str(e):
        raise
  return None


class Barrier:
  """A barrier of all processes that one of them can abort with a reason.

  JAX's own barriers would let the others wait for the whole timeout.  The state is in its coordination service.
  name: the same on all processes, and used by no other barrier.
  """

  def __init__(self, name):
    self._client, self._folder = jax_internals.coordination_client(), f'llmjax/{name}/'

  def abort(self, reason):
    """Make `check` and `wait` raise on all processes."""
    self._client.key_value_set(f'{self._folder}said/refused', f'{reason} (process {jax.process_index()})',
                               allow_overwrite=True)

  def check(self):
    """Raise AbsentError if a process has aborted; return the keys that all processes have reached."""
    state = {key.rpartition('said/')[2]: text for key, text in self._client.key_value_dir_get(f'{self._folder}said/')}
    if reason := state.get('refused'):
      raise AbsentError(reason)
    return state.keys()

  def wait(self, key, timeout_ms):
    """Wait until all processes wait for this key; raises AbsentError or TimeoutError.  It polls: for threads."""
    deadline, here = time.monotonic() + timeout_ms / 1000, f'{self._folder}{key}/'
    self._client.key_value_set(f'{here}{jax.process_index()}', '')
    while key not in self.check():
      if is_first() and len(self._client.key_value_dir_get(here)) == jax.process_count():
        self._client.key_value_set(f'{self._folder}said/{key}', '')
        return
      if time.monotonic() > deadline:
        raise TimeoutError(f'some processes did not come to {key} within {timeout_ms / 1000:.0f} s')
      time.sleep(POLL_SECONDS)

  def close(self):
    """Delete the barrier's keys, once every process has passed it."""
    if is_first():
      self._client.key_value_delete(self._folder)
