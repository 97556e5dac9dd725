"""What a process says of itself while it runs, and what it does when its loop stands still.

Each process has a small file, `<folder>/<rank>.json`, that it overwrites in place: the loop at every step,
and a thread all the time, so that a loop that stands still is told apart from a process that does.  The
thread is the watchdog, too.  A supervisor (cluster/supervise.py) reads the files.  No JAX here.
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

FOLDER = 'LLMJAX_HEARTBEATS'  # Set by a supervisor: where the files go.
LIMIT = 'LLMJAX_HANG_SECONDS'  # Set by a supervisor: the watchdog ends the process then; 0: it finds the limit.

# Exit statuses.  75 is EX_TEMPFAIL of sysexits.h: start the same command again.
PREEMPTED = 75
HUNG = 76

OF_STEPS = ('step', 'data')  # Phases: the devices work, or the loop waits for its next batch.

FILE_BYTES = 512  # Overwritten in one write, so that a reader sees one record or the other.
FLOOR_SECONDS = 300.0  # A limit that is found is never shorter: storage and data readers may stall for minutes.
TIMES_LONGEST = 10.0
START_SECONDS = 1800.0  # For what is not a step: starting, compiling, evaluating, saving.
SUPERVISED_PULSE, PULSE = 0.25, 5.0  # Seconds.  A file on a shared disk is not written more often than it must.
FLUSH_SECONDS = 5.0
# Between its report and its end: the others, whose limits are over at about the same time, lose their
# collectives with it, and are to look around first.
LINGER_SECONDS = 1.5


@dataclasses.dataclass(frozen=True)
class Beat:
  """What is in a file.  first: the step that this sitting went on from.  saved: the last good checkpoint.

  phase: starting, step, or what the loop does between steps, such as compile, evaluate or save.  beats, pulses: how
  often the loop and the thread wrote.  longest: seconds between two waits for the devices.
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
  """Returns how many seconds a loop may stand still where it is.  hang_seconds: for steps; 0: found."""
  if beat.phase not in OF_STEPS:
    return max(start_seconds, hang_seconds)
  return hang_seconds or max(FLOOR_SECONDS, TIMES_LONGEST * beat.longest)


def read_beat(folder, rank):
  """Returns a process's Beat, or None while it has none."""
  try:
    return Beat(**json.loads((pathlib.Path(folder) / f'{rank}.json').read_bytes()))
  except (OSError, ValueError, TypeError):
    return None


class Heartbeat:
  """This process's file and its watchdog.  Close it at the end.

  folder: of the files; None keeps the beats in memory.  stacks: folder for `<rank>.txt` when the loop
  stands still.  hang_seconds: see hang_limit.  leave: whether the watchdog then ends the process, with
  status HUNG, after `flush` (5 s at most).  end_seconds: it is also ended when its steps, and no other phase, stand
  still so long; 0: never.  progress: function to a number that grows whenever the devices finish a program, also
  where the loop does not beat.  say: prints a line.
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
    self._changed, self._waited, self._told = time.monotonic(), None, -1
    self._stepped = False  # Whether the devices have done a step.
    self._lock, self._closed, self._file = threading.Lock(), threading.Event(), None
    if self._folder:
      self._folder.mkdir(parents=True, exist_ok=True)
      self._file = os.open(self._folder / f'{rank}.json', os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
    self._write()
    self._thread = threading.Thread(target=self._watch, name='heartbeat', daemon=True)
    self._thread.start()

  def begin(self, first):
    """Notes the step that the loop continues from."""
    self._write(step=first, first=first, saved=first)

  def beat(self, step, phase='step', *, waited=False, saved=None):
    """Notes how far the loop is.  waited: the devices have done a step, and not only got it.

    Steps are watched from the first such beat on: how long a step takes is not known before.
    """
    now, old = time.monotonic(), self.now
    longest = old.longest
    if phase not in OF_STEPS:
      self._waited = None  # What comes between steps is no measure of them.
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
    """Ends the thread; the file stays."""
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
        with contextlib.suppress(OSError):  # A full disk is the checkpoints' to tell.
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
      ends = late and self._leave or beat.phase == 'step' and 0 < self._end_seconds < silent
      if ends or late and self._told != beat.beats:
        self._told = beat.beats  # Once for each standstill.
        self._report(beat, silent)
      if ends:
        self._closed.wait(LINGER_SECONDS)
        self._end()

  def _report(self, beat, silent):
    place = _place_of(self._loop)
    lines = [f'rank {beat.rank} has made no progress for {silent:.0f} s after step {beat.step} ({beat.phase})'
             + f', in {place}' * bool(place)]
    if self._folder and self._processes > 1:
      lines.append(describe_others(*self._look_twice(), beat.rank))
    if self._stacks:
      with contextlib.suppress(OSError):
        self._stacks.mkdir(parents=True, exist_ok=True)
        path = self._stacks / f'{beat.rank}.txt'
        with open(path, 'w', encoding='utf-8') as f:
          f.write('\n'.join(lines) + '\n\n')
          f.flush()
          faulthandler.dump_traceback(f, all_threads=True)
        lines.append(f'stacks of its threads: {path}')
    self._say('; '.join(lines))

  def _look_twice(self):
    """Returns all processes' beats ({rank: Beat}) and those that are silent, after two pulses' time."""
    before = {k: read_beat(self._folder, k) for k in range(self._processes)}
    self._closed.wait(2.2 * self._pulse)
    self._write()
    after = {k: read_beat(self._folder, k) for k in range(self._processes)}
    return after, {k for k in after if k != self.now.rank and before[k] == after[k]}

  def _end(self):
    if self.flush:  # In a thread: a mirror's server may hang, too.
      flush = threading.Thread(target=self.flush, daemon=True)
      flush.start()
      flush.join(FLUSH_SECONDS)
    with contextlib.suppress(OSError, ValueError):
      sys.stdout.flush()
      sys.stderr.flush()
    os._exit(HUNG)


def describe_others(beats, silent, rank):
  """Returns words on where the processes are and which of them the rest wait for.

  beats: {rank: Beat or None}.  silent: ranks whose threads write no more.  rank: of the process that asks.
  """
  steps = {k: b.step for k, b in beats.items() if b}
  farthest = max(steps.values(), default=0)
  late, rest = [], []
  for k, beat in beats.items():
    if beat is None:
      late.append(f'rank {k} was never seen')
    elif k in silent:
      late.append(f'rank {k} last seen at step {beat.step} ({beat.phase}), silent: stopped, or dead')
    elif beat.step < farthest or beat.phase != beats[rank].phase:
      late.append(f'rank {k} last seen at step {beat.step} ({beat.phase})')
    else:
      rest.append(k)
  words = f'rank{"s" * (len(rest) > 1)} {", ".join(map(str, rest))}'
  if not late:
    return f'all {len(beats)} ranks stand at step {farthest}: in a collective, or each at the same call'
  waiting = [f'{words} wait{"s" * (len(rest) == 1)} at step {farthest}'] if rest else []
  return '; '.join([*late, *waiting])


def _place_of(thread):
  """Returns 'run at harness.py:180: window.wait()' of a thread's innermost frame in this package, or ''.

  in_flight.py waits for every program; which one it is, its caller's line says.
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
