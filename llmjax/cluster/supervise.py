"""Processes of one run, watched from outside: who died, hung or was stopped, and starting all of them again.

The commands may be anything; one that writes heartbeats (parallel/heartbeat.py) is seen to hang, and to make
progress.  No JAX here.
"""

import collections
import contextlib
import ctypes
import dataclasses
import os
import pathlib
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time

from llmjax.parallel import heartbeat
from llmjax.run.progress import format_duration

POLL_SECONDS = 0.1
TAIL_LINES = 25
# When one process has failed, the others may be about to say why, too; then they are ended.
GRACE_SECONDS = 3.0
NOTICE_SECONDS = 0.1  # Processes that end together are noticed in any order within this.
# A process's own watchdog writes its stacks and leaves; then it is ended from here.
WATCHDOG_SECONDS = 5.0
PREEMPTED_SECONDS = 60.0
STOPPED_SECONDS = 2.0  # SIGSTOP and SIGCONT may follow one another: a stop this long is one.
LONGEST_BACKOFF = 300.0  # Seconds.
PR_SET_PDEATHSIG = 1  # From linux/prctl.h.

_LIBC = ctypes.CDLL(None)  # Not in the child: between fork and exec as little as may be is done.

REFUSED, INTERRUPTED = 2, 130  # Statuses: a wrong setting; Ctrl-C.


@dataclasses.dataclass(frozen=True)
class Policy:
  """When to end processes, and when to start them again.

  restarts: in a row, without a new good checkpoint between them.  backoff: seconds before the second of
  them, doubled for each further one.  hang, start: seconds, see heartbeat.hang_limit.  end: seconds between
  SIGTERM and SIGKILL.  shrink: go on with the processes that are left.
  """

  restarts: int = 0
  backoff: float = 1.0
  hang: float = 0.0
  start: float = heartbeat.START_SECONDS
  end: float = 2.0
  shrink: bool = False

  @property
  def ends_hung(self):
    """Whether processes that hang are ended; else they only say so."""
    return bool(self.restarts or self.hang)

  def delay(self, failures):
    """Returns the seconds to wait after so many failures in a row; none after the first."""
    return min(self.backoff * 2 ** (failures - 2), LONGEST_BACKOFF) if failures > 1 else 0.0


@dataclasses.dataclass(frozen=True)
class End:
  """How all processes of one attempt ended.

  kind: done, preempted (saved after SIGTERM), hung, or failed.  rank: of the one that was first.  status: for
  the shell.  text: what it did, such as 'ended with signal SIGKILL'.  tail: its last lines.  lost: how many
  processes are at fault.  first, step, saved: the step that the attempt went on from, the farthest that
  was done, the last good checkpoint.
  """

  kind: str
  rank: int = 0
  status: int = 0
  text: str = ''
  tail: tuple[str, ...] = ()
  lost: int = 1
  first: int = 0
  step: int = 0
  saved: int = 0

  @property
  def progressed(self):
    return self.saved > self.first


class Group:
  """The processes of one attempt.  Each leads a process group, so that a terminal signals only us.

  folder: for logs and heartbeats.  quiet: process 0 has a log, too, and not the terminal.
  """

  def __init__(self, folder, policy=None, quiet=False):
    self.folder, self.policy, self._quiet = pathlib.Path(folder), policy or Policy(), quiet
    self.folder.mkdir(parents=True, exist_ok=True)
    self.beats = self.folder / 'heartbeats'
    self.children, self._changes, self._stopped, self._tails = [], {}, {}, {}
    self._ended = queue.SimpleQueue()  # Numbers of processes, in the order in which they ended.
    self._signals = 0

  def start(self, argv, environment):
    """Starts one more process.  argv: the whole command."""
    rank = len(self.children)
    with contextlib.suppress(FileNotFoundError):
      (self.beats / f'{rank}.json').unlink()
    environment = {**environment, heartbeat.FOLDER: str(self.beats)}
    if self.policy.ends_hung:
      environment[heartbeat.LIMIT] = str(self.policy.hang)
    log = self._log(rank)
    with open(log, 'wb') if log else contextlib.nullcontext() as output:
      # Of a process that has the terminal, what it complains of goes by way of us, who may have to say it again.
      watched = subprocess.PIPE if self.policy.restarts and not log else None
      child = subprocess.Popen(
          argv, env=environment, start_new_session=True, stdin=subprocess.DEVNULL, stdout=output,
          stderr=subprocess.STDOUT if log else watched, preexec_fn=_end_with_parent)
    self.children.append(child)
    self._changes[rank] = (None, time.monotonic())
    if child.stderr:
      self._tails[rank] = collections.deque(maxlen=TAIL_LINES)
      threading.Thread(target=self._pass_on, args=[rank, child.stderr], daemon=True).start()
    threading.Thread(target=self._note_end, args=[rank], daemon=True).start()

  def read(self):
    """Returns {rank: Beat or None}."""
    return {k: heartbeat.read_beat(self.beats, k) for k in range(len(self.children))}

  def signal(self, signum, frame=None):
    """Passes a signal on; the second Ctrl-C ends everything.  A signal handler itself."""
    self._signals += 1
    if self._signals > 1:
      self.kill()
    for child in self.children:
      with contextlib.suppress(ProcessLookupError):
        child.send_signal(signal.SIGINT if signum == signal.SIGINT else signal.SIGTERM)

  def wait(self, watch=lambda: None):
    """Returns an End once all have ended, having ended them if one failed or hung.  watch: called meanwhile."""
    left = len(self.children)
    while left:
      try:
        rank = self._ended.get(timeout=POLL_SECONDS)
      except queue.Empty:
        watch()
        if self.policy.ends_hung and (end := self._find_hung()):
          return self._finish(end, 0.0)
        continue
      status, left = self.children[rank].returncode, left - 1
      if status:
        return self._finish(self._judge(*self._find_first(rank, status)), GRACE_SECONDS if status > 0 else 0.0)
    return self._with_steps(End('done'))

  def kill(self):
    """Ends every process that is left, now."""
    for child in self.children:
      if child.poll() is None:
        with contextlib.suppress(ProcessLookupError):
          os.killpg(child.pid, signal.SIGKILL)
    for child in self.children:
      child.wait()

  def _find_first(self, rank, status):
    """Returns (number, status) of the process that took the others with it; `rank` was the first to be noticed.

    One that its watchdog ended, or that was killed, may be noticed a moment after those that miss it.
    SIGABRT is how JAX ends a process that misses another.
    """
    time.sleep(NOTICE_SECONDS)
    ended = {k: child.returncode for k, child in enumerate(self.children) if child.returncode is not None}
    for cause in (lambda s: s == heartbeat.HUNG, lambda s: s < 0 and s != -signal.SIGABRT):
      if found := [k for k, s in ended.items() if cause(s)]:
        rank = rank if rank in found else found[0]
        return rank, ended[rank]
    return rank, status

  def _judge(self, rank, status):
    """Returns the End for a process that ended badly."""
    if status == heartbeat.HUNG:
      if stopped := [k for k, child in enumerate(self.children) if _is_stopped(child)]:
        return End('hung', stopped[0], 128 + signal.SIGSTOP, 'is stopped (SIGSTOP)', lost=len(stopped))
      return End('hung', rank, status, f'hung: its watchdog ended it (status {status})')
    if status == heartbeat.PREEMPTED:
      return End('preempted', rank, status, f'was asked to end, and saved (status {status})', lost=0)
    if status < 0:
      return End('failed', rank, 128 - status, f'ended with signal {signal.Signals(-status).name}')
    return End('failed', rank, status, f'ended with status {status}')

  def _find_hung(self):
    """Returns an End for the processes that are stopped or stand still, or None."""
    now, stopped, hung = time.monotonic(), [], []
    for k, child in enumerate(self.children):
      if child.poll() is not None:
        continue
      if not _is_stopped(child):
        self._stopped.pop(k, None)
      elif now - self._stopped.setdefault(k, now) > STOPPED_SECONDS:
        stopped.append(k)
      beat = heartbeat.read_beat(self.beats, k) or heartbeat.Beat()
      before, changed = self._changes[k]
      if beat.beats != before:
        self._changes[k] = beat.beats, now
      elif now - changed > heartbeat.hang_limit(beat, self.policy.hang, self.policy.start) + WATCHDOG_SECONDS:
        hung.append((changed, k))
    if stopped:
      return End('hung', stopped[0], 128 + signal.SIGSTOP, 'is stopped (SIGSTOP)', lost=len(stopped))
    if hung:
      changed, rank = min(hung)
      return End('hung', rank, heartbeat.HUNG, f'hung: no step for {now - changed:.0f} s')
    return None

  def _finish(self, end, grace):
    """Waits `grace` seconds for the others, ends them, and returns the End with all that is known."""
    if end.kind == 'preempted':
      grace = PREEMPTED_SECONDS  # They have saved the same step together.
    self._await(grace)
    if any(child.poll() is None for child in self.children):
      for child in self.children:
        with contextlib.suppress(ProcessLookupError):
          child.send_signal(signal.SIGTERM)
      self._await(self.policy.end)
    self.kill()
    time.sleep(0.02)  # For the threads that read what it printed last.
    return self._with_steps(dataclasses.replace(end, tail=self._tail(end.rank)))

  def _await(self, seconds):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(child.poll() is None for child in self.children):
      time.sleep(0.02)

  def _with_steps(self, end):
    beats = [b for b in self.read().values() if b]
    return dataclasses.replace(end, **{
        name: max((getattr(b, name) for b in beats), default=0) for name in ('first', 'step', 'saved')})

  def _tail(self, rank):
    if rank in self._tails:
      return tuple(self._tails[rank])
    log = self._log(rank)
    return tuple(log.read_text(errors='replace').splitlines()[-TAIL_LINES:]) if log and log.exists() else ()

  def _log(self, rank):
    return self.folder / f'process-{rank}.log' if rank or self._quiet else None

  def _note_end(self, rank):
    self.children[rank].wait()
    self._ended.put(rank)

  def _pass_on(self, rank, stream):
    with stream:
      for line in stream:
        text = line.decode(errors='replace')
        self._tails[rank].append(text.rstrip('\n'))
        with contextlib.suppress(OSError, ValueError):
          sys.stderr.write(text)
          sys.stderr.flush()


def supervise(start, processes, policy, say=None):
  """Runs attempts until one is done or nothing more is to be tried; returns the exit status.

  start(count, attempt): returns a Group of that many started processes.  say: prints a line.
  SIGINT and SIGTERM go to the processes, and nothing is started again after them.
  """
  say = say or (lambda text: print(f'llmjax launch: {text}', file=sys.stderr, flush=True))
  group, asked = None, threading.Event()

  def forward(signum, frame):
    asked.set()
    if group is not None:
      group.signal(signum)

  with contextlib.ExitStack() as stack:
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
      if signum == signal.SIGHUP and signal.getsignal(signum) == signal.SIG_IGN:
        continue  # Under nohup.
      stack.callback(signal.signal, signum, signal.signal(signum, forward))
    count, failures, attempt, refused, first = processes, 0, 0, False, None
    while True:
      group = start(count, attempt)
      stack.callback(group.kill)
      if asked.is_set():  # While they were being started.
        group.signal(signal.SIGTERM)
      end = group.wait()
      attempt += 1
      if end.kind == 'done':
        return 0
      words = f'process {end.rank} of {count} {end.text}'
      if asked.is_set() or end.status == INTERRUPTED or not policy.restarts:
        if end.kind != 'preempted' and not _said_by_first(end, group):
          _say_end(say, words, end, count)
        return end.status
      if end.status == REFUSED:
        # A mesh may not fit on fewer processes; fewer still may do, or else it waits for all of them.
        if count == processes or refused:
          if not _said_by_first(end, group):
            _say_end(say, words, end, count)
          return end.status
        refused, count = count == 1, count - 1 if count > 1 else processes
        say(f'the mesh does not allow that; trying {count}')
        continue
      refused = False
      if end.progressed:
        failures, first = 0, None
      failures += 1
      first = first or (words, end, count)
      if failures > policy.restarts:
        say(f'{words}. No new checkpoint in {failures} attempts: giving up. The first failure was:')
        _say_end(say, *first)
        return first[1].status
      if policy.shrink and end.lost:
        count = max(count - end.lost, 1)
      delay = policy.delay(failures)
      say(f'{words} at step {end.step}; starting {count} again from step {end.saved}'
          + (f' in {format_duration(delay)}' if delay else '') + f' ({failures} of {policy.restarts})')
      if asked.wait(delay):
        return end.status


def _said_by_first(end, group):
  """Returns whether process 0 has said on the terminal what all of them ended with, as with a wrong setting."""
  return end.status in (REFUSED, INTERRUPTED) and group.children[0].returncode == end.status


def _say_end(say, words, end, count):
  others = '; the others were ended' if count > 1 else ''
  shown = end.tail if end.rank or end.tail else ()
  lines = [f'its last {"lines" if len(shown) > 1 else "line"}:', *shown] if shown else []
  say('\n  '.join([words + others, *lines]) if not lines else f'{words}{others}\n' + '\n  '.join(lines))


def _is_stopped(child):
  """Returns whether a process is stopped by a signal (Linux only)."""
  try:
    with open(f'/proc/{child.pid}/stat', encoding='utf-8', errors='replace') as f:
      return f.read().rpartition(')')[2].split()[0] in 'Tt'
  except OSError:
    return False


def _end_with_parent():
  """In the child: the kernel ends it should the launcher be killed (Linux only)."""
  if sys.platform.startswith('linux'):
    _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def start_processes(group, command, count, devices):
  """Starts `llmjax <command>` as `count` processes of the group, with `devices` emulated devices each, or 0."""
  coordinator = f'127.0.0.1:{_free_port()}'
  for i in range(count):
    environment = dict(os.environ)
    if devices:
      environment = _environment(os.environ, coordinator, count, i, devices, group.policy.hang)
    group.start([sys.executable, '-m', 'llmjax', *command], environment)


def _environment(environment, coordinator, count, process_id, devices, hang):
  """Returns the variables that tell a process its place (see parallel/rendezvous.py) and its devices."""
  # An emulated device count of the caller's would hold for each process.
  flags = re.sub(r'--xla_force_host_platform_device_count=\S+', '', environment.get('XLA_FLAGS', ''))
  if hang and 'collective_timeout' not in flags:
    # Should a watchdog not come to its turn: an exception out of the collective instead of none.
    flags += f' --xla_cpu_collective_timeout_seconds={int(hang + 2 * WATCHDOG_SECONDS)}'
  direct = {}
  if any(name.lower().endswith('_proxy') for name in environment):  # gRPC would go through it.
    direct = {'no_proxy': ','.join(filter(None, [environment.get('no_proxy', ''), '127.0.0.1,localhost']))}
  return {**environment, **direct, 'LLMJAX_COORDINATOR': coordinator, 'LLMJAX_PROCESSES': str(count),
          'LLMJAX_PROCESS_ID': str(process_id), 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': flags.strip(),
          'JAX_NUM_CPU_DEVICES': str(devices)}


def _free_port():
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    return s.getsockname()[1]
