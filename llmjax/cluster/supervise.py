"""Supervises the processes of a run: detects crashed, hung and stopped ones, and restarts all of them.

Any command can be supervised; hangs and progress are detected for those that write heartbeats
(parallel/heartbeat.py).  Imports no JAX.
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
GRACE_SECONDS = 3.0  # After the failure of one process, for the others to report theirs before they are ended.
NOTICE_SECONDS = 0.1  # Processes that end within this time may be noticed in any order.
WATCHDOG_SECONDS = 5.0  # Beyond the hang limit, for the process's own watchdog to write stack traces and exit.
PREEMPTED_SECONDS = 60.0  # Grace period after a preemption.
STOPPED_SECONDS = 2.0  # A process counts as stopped after this time, since SIGCONT may follow SIGSTOP.
MAX_BACKOFF = 300.0  # Seconds.
PR_SET_PDEATHSIG = 1  # From linux/prctl.h.

_LIBC = ctypes.CDLL(None)  # Loaded here, because little is safe in a child between fork and exec.

REFUSED, INTERRUPTED = 2, 130  # Exit statuses: invalid settings; Ctrl-C.


@dataclasses.dataclass(frozen=True)
class Policy:
  """When to end and restart processes.

  restarts: maximum number in a row without a new verified checkpoint.  backoff: seconds before the second restart,
  doubled for each further one.  hang, start: limits in seconds, see `heartbeat.hang_limit`.  end: seconds between
  SIGTERM and SIGKILL.  shrink: restart without the processes that failed.
  """

  restarts: int = 0
  backoff: float = 1.0
  hang: float = 0.0
  start: float = heartbeat.START_SECONDS
  end: float = 2.0
  shrink: bool = False

  @property
  def ends_hung(self):
    """Whether hung processes are ended; otherwise they only report it."""
    return bool(self.restarts or self.hang)

  def delay(self, failures):
    """Return the seconds to wait after a number of failures in a row; 0 after the first."""
    return min(self.backoff * 2 ** (failures - 2), MAX_BACKOFF) if failures > 1 else 0.0


@dataclasses.dataclass(frozen=True)
class Outcome:
  """The outcome of an attempt.

  kind: done, preempted (saved after SIGTERM), hung, or failed.  rank: of the first process that failed.  status: exit
  status.  text: description, such as 'ended with signal SIGKILL'.  tail: its last lines of output.  lost: number of
  failed processes.  first, step, saved: the step that the attempt resumed from, the last step, and the last verified
  checkpoint.
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
  """The processes of an attempt.  Each leads its own process group, so that a terminal signals only the supervisor.

  folder: for logs and heartbeats.  quiet: process 0 writes to a log as well, instead of to the terminal.
  """

  def __init__(self, folder, policy=None, quiet=False):
    self.folder, self.policy, self._quiet = pathlib.Path(folder), policy or Policy(), quiet
    self.folder.mkdir(parents=True, exist_ok=True)
    self.beats = self.folder / 'heartbeats'
    self.children, self._changes, self._stopped, self._tails = [], {}, {}, {}
    self._ended = queue.SimpleQueue()  # Ranks, in the order in which they ended.
    self._signals = 0

  def start(self, argv, environment):
    """Start one more process.  argv: its command line."""
    rank = len(self.children)
    with contextlib.suppress(FileNotFoundError):
      (self.beats / f'{rank}.json').unlink()
    environment = {**environment, heartbeat.FOLDER: str(self.beats)}
    if self.policy.ends_hung:
      environment[heartbeat.LIMIT] = str(self.policy.hang)
    log = self._log(rank)
    with open(log, 'wb') if log else contextlib.nullcontext() as output:
      # The errors of a process on the terminal pass through the supervisor, which may have to repeat them.
      piped = subprocess.PIPE if self.policy.restarts and not log else None
      child = subprocess.Popen(
          argv, env=environment, start_new_session=True, stdin=subprocess.DEVNULL, stdout=output,
          stderr=subprocess.STDOUT if log else piped, preexec_fn=_die_with_parent)
    self.children.append(child)
    self._changes[rank] = (None, time.monotonic())
    if child.stderr:
      self._tails[rank] = collections.deque(maxlen=TAIL_LINES)
      threading.Thread(target=self._forward_stderr, args=[rank, child.stderr], daemon=True).start()
    threading.Thread(target=self._reap, args=[rank], daemon=True).start()

  def read(self):
    """Return {rank: Beat or None}."""
    return {k: heartbeat.read_beat(self.beats, k) for k in range(len(self.children))}

  def maximum(self, field):
    """Return the maximum of a field of Beat over the processes, 0 while there are no beats."""
    return max((getattr(b, field) for b in self.read().values() if b), default=0)

  def signal(self, signum, frame=None):
    """Forward a signal to all processes; a second one kills them.  Usable as a signal handler."""
    self._signals += 1
    if self._signals > 1:
      self.kill()
    for child in self.children:
      with contextlib.suppress(ProcessLookupError):
        child.send_signal(signal.SIGINT if signum == signal.SIGINT else signal.SIGTERM)

  def wait(self, watch=lambda: None):
    """Wait for all processes and return the Outcome; end the others if one fails or hangs.

    watch: called every POLL_SECONDS while nothing happens.
    """
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
        return self._finish(self._classify(*self._find_first(rank, status)), GRACE_SECONDS if status > 0 else 0.0)
    return self._with_steps(Outcome('done'))

  def kill(self):
    """Kill all processes that are left."""
    for child in self.children:
      if child.poll() is None:
        with contextlib.suppress(ProcessLookupError):
          os.killpg(child.pid, signal.SIGKILL)
    for child in self.children:
      child.wait()

  def _find_first(self, rank, status):
    """Return (rank, status) of the process that caused the failure; `rank` is the first one noticed.

    A process that was killed or ended by its watchdog may be noticed after those that failed because of it.  JAX aborts
    (SIGABRT) a process that lost another one.
    """
    time.sleep(NOTICE_SECONDS)
    ended = {k: child.returncode for k, child in enumerate(self.children) if child.returncode is not None}
    for is_cause in (lambda s: s == heartbeat.HUNG, lambda s: s < 0 and s != -signal.SIGABRT):
      if causes := [k for k, s in ended.items() if is_cause(s)]:
        rank = rank if rank in causes else causes[0]
        return rank, ended[rank]
    return rank, status

  def _classify(self, rank, status):
    """Return the Outcome for a process that failed."""
    if status == heartbeat.HUNG:
      if stopped := [k for k, child in enumerate(self.children) if _is_stopped(child)]:
        return Outcome('hung', stopped[0], 128 + signal.SIGSTOP, 'was stopped (SIGSTOP)', lost=len(stopped))
      return Outcome('hung', rank, status, f'hung: its watchdog ended it (status {status})')
    if status == heartbeat.PREEMPTED:
      return Outcome('preempted', rank, status, f'was preempted after saving (status {status})', lost=0)
    if status < 0:
      return Outcome('failed', rank, 128 - status, f'ended with signal {signal.Signals(-status).name}')
    return Outcome('failed', rank, status, f'ended with status {status}')

  def _find_hung(self):
    """Return an Outcome if processes are stopped or hung, else None."""
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
      return Outcome('hung', stopped[0], 128 + signal.SIGSTOP, 'was stopped (SIGSTOP)', lost=len(stopped))
    if hung:
      changed, rank = min(hung)
      return Outcome('hung', rank, heartbeat.HUNG, f'hung: no step for {now - changed:.0f} s')
    return None

  def _finish(self, end, grace):
    """Wait `grace` seconds for the other processes, end them, and complete the Outcome."""
    if end.kind == 'preempted':
      grace = PREEMPTED_SECONDS  # All processes save the same step.
    self._await(grace)
    if any(child.poll() is None for child in self.children):
      for child in self.children:
        with contextlib.suppress(ProcessLookupError):
          child.send_signal(signal.SIGTERM)
      self._await(self.policy.end)
    self.kill()
    time.sleep(0.02)  # For the threads that read the last output.
    return self._with_steps(dataclasses.replace(end, tail=self._tail(end.rank)))

  def _await(self, seconds):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(child.poll() is None for child in self.children):
      time.sleep(0.02)

  def _with_steps(self, end):
    return dataclasses.replace(end, **{name: self.maximum(name) for name in ('first', 'step', 'saved')})

  def _tail(self, rank):
    if rank in self._tails:
      return tuple(self._tails[rank])
    log = self._log(rank)
    return tuple(log.read_text(errors='replace').splitlines()[-TAIL_LINES:]) if log and log.exists() else ()

  def _log(self, rank):
    return self.folder / f'process-{rank}.log' if rank or self._quiet else None

  def _reap(self, rank):
    self.children[rank].wait()
    self._ended.put(rank)

  def _forward_stderr(self, rank, stream):
    with stream:
      for line in stream:
        text = line.decode(errors='replace')
        self._tails[rank].append(text.rstrip('\n'))
        with contextlib.suppress(OSError, ValueError):
          sys.stderr.write(text)
          sys.stderr.flush()


def supervise(start, processes, policy, report=None):
  """Run attempts until one succeeds or the policy allows no more; return the exit status.

  start(count, attempt): returns a Group of `count` started processes.  report: prints a line.  SIGINT and SIGTERM are
  forwarded to the processes and end the supervision.
  """
  report = report or (lambda text: print(f'llmjax launch: {text}', file=sys.stderr, flush=True))
  group, stopping = None, threading.Event()

  def forward(signum, frame):
    stopping.set()
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
      if stopping.is_set():  # A signal arrived while they were started.
        group.signal(signal.SIGTERM)
      end = group.wait()
      attempt += 1
      if end.kind == 'done':
        return 0
      summary = f'process {end.rank} of {count} {end.text}'
      if stopping.is_set() or end.status == INTERRUPTED or not policy.restarts:
        if end.kind != 'preempted' and not _reported_by_first(end, group):
          _report_end(report, summary, end, count)
        return end.status
      if end.status == REFUSED:
        # The mesh may not allow fewer processes: try fewer still, and finally all of them again.
        if count == processes or refused:
          if not _reported_by_first(end, group):
            _report_end(report, summary, end, count)
          return end.status
        refused, count = count == 1, count - 1 if count > 1 else processes
        report(f'the mesh does not allow that number of processes; trying {count}')
        continue
      refused = False
      if end.progressed:
        failures, first = 0, None
      failures += 1
      first = first or (summary, end, count)
      if failures > policy.restarts:
        report(f'{summary}. No new checkpoint in {failures} attempts: giving up. The first failure was:')
        _report_end(report, *first)
        return first[1].status
      if policy.shrink and end.lost:
        count = max(count - end.lost, 1)
      delay = policy.delay(failures)
      report(f'{summary} at step {end.step}; restarting {count} process{"es" * (count > 1)} from step {end.saved}'
             + (f' in {format_duration(delay)}' if delay else '') + f' ({failures} of {policy.restarts})')
      if stopping.wait(delay):
        return end.status


def _reported_by_first(end, group):
  """Return whether process 0 has reported the error on the terminal, as for invalid settings."""
  return end.status in (REFUSED, INTERRUPTED) and group.children[0].returncode == end.status


def _report_end(report, summary, end, count):
  text = summary + ('; the others were ended' if count > 1 else '')
  if end.tail:
    text += '\n' + '\n  '.join([f'its last line{"s" * (len(end.tail) > 1)}:', *end.tail])
  report(text)


def _is_stopped(child):
  """Return whether a process is stopped by a signal (Linux only)."""
  try:
    with open(f'/proc/{child.pid}/stat', encoding='utf-8', errors='replace') as f:
      return f.read().rpartition(')')[2].split()[0] in 'Tt'
  except OSError:
    return False


def _die_with_parent():
  """Ask the kernel to kill this process if the launcher dies; runs in the child (Linux only)."""
  if sys.platform.startswith('linux'):
    _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def start_processes(group, command, count, devices):
  """Start `llmjax <command>` in `count` processes.  devices: emulated CPU devices of each; 0: the machine's own."""
  coordinator = f'127.0.0.1:{_free_port()}'
  for i in range(count):
    environment = dict(os.environ)
    if devices:
      environment = _environment(os.environ, coordinator, count, i, devices, group.policy.hang)
    group.start([sys.executable, '-m', 'llmjax', *command], environment)


def _environment(environment, coordinator, count, process_id, devices, hang):
  """Return the environment of a process: its rank (see parallel/rendezvous.py) and its emulated devices."""
  # The caller's own device count does not apply to the processes.
  flags = re.sub(r'--xla_force_host_platform_device_count=\S+', '', environment.get('XLA_FLAGS', ''))
  if hang and 'collective_timeout' not in flags:
    # A fallback for the watchdog: the collective raises an exception after this time.
    flags += f' --xla_cpu_collective_timeout_seconds={int(hang + 2 * WATCHDOG_SECONDS)}'
  direct = {}
  if any(name.lower().endswith('_proxy') for name in environment):  # gRPC would use the proxy.
    direct = {'no_proxy': ','.join(filter(None, [environment.get('no_proxy', ''), '127.0.0.1,localhost']))}
  return {**environment, **direct, 'LLMJAX_COORDINATOR': coordinator, 'LLMJAX_PROCESSES': str(count),
          'LLMJAX_PROCESS_ID': str(process_id), 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': flags.strip(),
          'JAX_NUM_CPU_DEVICES': str(devices)}


def _free_port():
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    return s.getsockname()[1]
