"""Heartbeat files of the processes of a run, and the watchdog that detects a hung training loop.

Each process overwrites a small file, `<folder>/<rank>.json`: the loop at every step, and a background thread
periodically, which distinguishes a hung loop from a stopped process.  The thread is also the watchdog.  A supervisor
(cluster/supervise.py) reads the files.  Imports no JAX.
"""

import contextlib
import dataclasses
import faulthandler
import json
import os
import pathlib
import sys
import threading
import time

FOLDER = 'LLMJAX_HEARTBEATS'  # Set by a supervisor: folder of the files.
LIMIT = 'LLMJAX_HANG_SECONDS'  # Set by a supervisor: the watchdog exits after this time; 0: automatic.

# Exit statuses.  75 is EX_TEMPFAIL of sysexits.h: run the same command again.
PREEMPTED = 75
HUNG = 76

STEP_PHASES = ('step', 'data')  # The devices compute, or the loop waits for its next batch.

FILE_BYTES = 512  # Written in one call, so that a reader never sees a partial record.
MIN_HANG_SECONDS = 300.0  # Minimum of the automatic limit: storage and data readers may stall for minutes.
HANG_FACTOR = 10.0  # The automatic limit, as a multiple of the longest step so far.
START_SECONDS = 1800.0  # Limit outside of steps: starting, compiling, evaluating, saving.
SUPERVISED_PULSE, PULSE = 0.25, 5.0  # Seconds between writes; fewer on a shared disk.
FLUSH_SECONDS = 5.0
# Between its report and its exit.  The other processes, whose limits expire at about the same time, fail when this one
# exits, and must write their own reports first.
LINGER_SECONDS = 1.5


@dataclasses.dataclass(frozen=True)
class Beat:
  """The record in a heartbeat file.

  first: the step that this attempt resumed from.  saved: step of the last verified checkpoint.  phase: starting, step,
  data, or an activity between steps such as compile, evaluate or save.  beats, pulses: number of writes by the loop and
  in total.  longest: the longest time between two waits for the devices, in seconds.
  """

  rank: int = 0
  step: int = 0
  phase: str = 'starting'
  first: int = 0
  saved: int = 0
  beats: int = 0
  pulses: int = 0
  longest: float = 0.0


def hang_limit(beat, hang_seconds=0.0, start_seconds=START_SECONDS):
  """Return the seconds without progress after which a loop counts as hung.  hang_seconds: for steps; 0: automatic."""
  if beat.phase not in STEP_PHASES:
    return max(start_seconds, hang_seconds)
  return hang_seconds or max(MIN_HANG_SECONDS, HANG_FACTOR * beat.longest)


def read_beat(folder, rank):
  """Return the Beat of a process, or None if it has not written one."""
  try:
    return Beat(**json.loads((pathlib.Path(folder) / f'{rank}.json').read_bytes()))
  except (OSError, ValueError, TypeError):
    return None


class Heartbeat:
  """The heartbeat file of this process and its watchdog thread; a context manager.

  folder: of the files; None keeps the beats in memory.  stacks: folder for the stack traces `<rank>.txt` of a hung
  loop.  hang_seconds, start_seconds: see `hang_limit`.  leave: whether the watchdog exits a hung process, with status
  HUNG, after calling `flush` (for up to 5 s).  end_seconds: also exit after this time without progress in a step; 0:
  never.  progress: function that returns a counter of programs that the devices have finished, for phases in which the
  loop does not beat.  say: function that prints a line.
  """

  def __init__(self, rank=0, processes=1, first=0, *, folder=None, stacks=None, hang_seconds=0.0,
               start_seconds=START_SECONDS, leave=False, end_seconds=0.0, progress=None, flush=None, say=None,
               pulse=PULSE):
    self.now, self.flush = Beat(rank, step=first, first=first, saved=first), flush
    self._folder, self._stacks = folder and pathlib.Path(folder), stacks and pathlib.Path(stacks)
    self._processes, self._pulse = processes, pulse
    self._limits, self._leave, self._end_seconds = (hang_seconds, start_seconds), leave, end_seconds
    self._progress, self._finished = progress or (lambda: 0), 0
    self._say = say or (lambda text: print(f'llmjax: {text}', file=sys.stderr, flush=True))
    self._loop = threading.get_ident()
    self._changed, self._waited, self._reported = time.monotonic(), None, -1
    self._stepped = False  # Whether the devices have finished a step.
    self._lock, self._closed, self._file = threading.Lock(), threading.Event(), None
    if self._folder:
      self._folder.mkdir(parents=True, exist_ok=True)
      self._file = os.open(self._folder / f'{rank}.json', os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
    self._write()
    self._thread = threading.Thread(target=self._watch, name='heartbeat', daemon=True)
    self._thread.start()

  def begin(self, first):
    """Record the step that the loop resumes from."""
    self._write(step=first, first=first, saved=first)

  def beat(self, step, phase='step', *, waited=False, saved=None):
    """Record the progress of the loop.  waited: the devices have finished a step, not only received it.

    Steps are watched from the first such beat on, because their duration is unknown before.
    """
    now, old = time.monotonic(), self.now
    longest = old.longest
    if phase not in STEP_PHASES:
      self._waited = None  # Other phases do not count as step time.
    elif waited:
      if self._waited is not None:
        longest = max(longest, now - self._waited)
      self._waited, self._stepped = now, True
    elif not self._stepped and phase == 'step':
      phase = 'starting'
    self._changed = now
    self._write(step=step, phase=phase, beats=old.beats + 1, longest=round(longest, 3),
                saved=old.saved if saved is None else saved)

  def close(self):
    """Stop the thread; the file stays."""
    self._closed.set()
    self._thread.join()
    if self._file is not None:
      os.close(self._file)
      self._file = None

  def __enter__(self):
    return self

  def __exit__(self, *unused):
    self.close()

  def _write(self, **changes):
    with self._lock:
      self.now = dataclasses.replace(self.now, pulses=self.now.pulses + 1, **changes)
      if self._file is not None:
        with contextlib.suppress(OSError):  # The checkpointer reports a full disk.
          os.pwrite(self._file, json.dumps(dataclasses.asdict(self.now)).encode().ljust(FILE_BYTES), 0)

  def _watch(self):
    while not self._closed.wait(self._pulse):
      if (finished := self._progress()) != self._finished:
        self._finished, self._changed = finished, time.monotonic()
        self._write(beats=self.now.beats + 1)
      else:
        self._write()
      beat, silent = self.now, time.monotonic() - self._changed
      late = silent > hang_limit(beat, *self._limits)
      exits = late and self._leave or beat.phase == 'step' and 0 < self._end_seconds < silent
      if exits or late and self._reported != beat.beats:
        self._reported = beat.beats  # Once per hang.
        self._report(beat, silent)
      if exits:
        self._closed.wait(LINGER_SECONDS)
        self._exit()

  def _report(self, beat, silent):
    location = _current_line(self._loop)
    lines = [f'rank {beat.rank} has made no progress for {silent:.0f} s after step {beat.step} ({beat.phase})'
             + f', in {location}' * bool(location)]
    if self._folder and self._processes > 1:
      lines.append(describe_ranks(*self._read_twice(), beat.rank))
    if self._stacks:
      with contextlib.suppress(OSError):
        self._stacks.mkdir(parents=True, exist_ok=True)
        path = self._stacks / f'{beat.rank}.txt'
        with open(path, 'w', encoding='utf-8') as f:
          f.write('\n'.join(lines) + '\n\n')
          f.flush()
          faulthandler.dump_traceback(f, all_threads=True)
        lines.append(f'stack traces: {path}')
    self._say('; '.join(lines))

  def _read_twice(self):
    """Return ({rank: Beat or None}, ranks whose file did not change within two pulses)."""
    before = {k: read_beat(self._folder, k) for k in range(self._processes)}
    self._closed.wait(2.2 * self._pulse)
    self._write()
    after = {k: read_beat(self._folder, k) for k in range(self._processes)}
    return after, {k for k in after if k != self.now.rank and before[k] == after[k]}

  def _exit(self):
    if self.flush:  # In a thread, because the server of a metrics writer may hang as well.
      flush = threading.Thread(target=self.flush, daemon=True)
      flush.start()
      flush.join(FLUSH_SECONDS)
    with contextlib.suppress(OSError, ValueError):
      sys.stdout.flush()
      sys.stderr.flush()
    os._exit(HUNG)


def describe_ranks(beats, silent, rank):
  """Describe the progress of all processes, and which of them the others wait for.

  beats: {rank: Beat or None}.  silent: ranks that stopped writing.  rank: of the reporting process.
  """
  steps = {k: b.step for k, b in beats.items() if b}
  farthest = max(steps.values(), default=0)
  late, rest = [], []
  for k, beat in beats.items():
    if beat is None:
      late.append(f'rank {k} never started')
    elif k in silent:
      late.append(f'rank {k} last seen at step {beat.step} ({beat.phase}), not responding: stopped or dead')
    elif beat.step < farthest or beat.phase != beats[rank].phase:
      late.append(f'rank {k} last seen at step {beat.step} ({beat.phase})')
    else:
      rest.append(k)
  names = f'rank{"s" * (len(rest) > 1)} {", ".join(map(str, rest))}'
  if not late:
    return f'all {len(beats)} ranks are at step {farthest}: in a collective, or each in the same call'
  waiting = [f'{names} wait{"s" * (len(rest) == 1)} at step {farthest}'] if rest else []
  return '; '.join([*late, *waiting])


def _current_line(thread):
  """Return the innermost line of this package that a thread executes, 'run at loop.py:180: step()', or ''.

  Skips in_flight.py, which waits for all programs; its caller tells which one.
  """
  import linecache
  frame, package = sys._current_frames().get(thread), os.path.dirname(os.path.dirname(__file__))
  while frame is not None:
    file = frame.f_code.co_filename
    if file.startswith(package) and os.path.basename(file) != 'in_flight.py':
      text = linecache.getline(file, frame.f_lineno).strip()
      return f'{frame.f_code.co_name} at {os.path.basename(file)}:{frame.f_lineno}: {text}'
    frame = frame.f_back
  return ''
