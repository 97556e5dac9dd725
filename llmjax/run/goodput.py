"""Account for the wall time of a run, over all its attempts, in buckets that sum to it.

`time.jsonl` has a line for each logged step and checkpoint: `time` (Unix seconds), `step`, and `seconds` per bucket
since the run began.  A killed attempt is accounted for up to its last line.  The next attempt charges the gap to
`restart`, and the steps that it repeats to `lost`.
"""

import contextlib
import os
import pathlib
import time

from llmjax.evaluate.metrics import read_lines
from llmjax.parallel import distributed
from llmjax.run.callback import Callback
from llmjax.run.writers import Lines

BUCKETS = ('init', 'compile', 'data_wait', 'rollout', 'step', 'eval', 'sample', 'checkpoint', 'lost', 'restart',
           'other')
STEP_BUCKETS = ('step', 'data_wait', 'rollout')  # Time that is lost when a step is repeated.


class Goodput(Callback):
  """Charge wall time to buckets; the remainder is `other`.

  age: seconds since the process began, charged to `init`.  clock: monotonic seconds.  now: Unix seconds.
  """

  def __init__(self, workdir, clock=time.perf_counter, now=time.time, age=0.0):
    self._path, self._clock, self._now = pathlib.Path(workdir) / 'time.jsonl', clock, now
    self._start, self._file = clock() - age, None
    self.seconds = dict.fromkeys(BUCKETS, 0.0)
    self.seconds['init'] = age
    lines = [row for row in read_lines(self._path) if isinstance(row.get('seconds'), dict)]
    self._marks = [(row['step'], row['seconds']) for row in lines]  # Only STEP_BUCKETS are used.
    last = lines[-1] if lines else {'seconds': {}, 'done': True}
    self._before = {bucket: last['seconds'].get(bucket, 0.0) for bucket in BUCKETS}
    if not last.get('done'):
      self._before['restart'] += max(now() - age - last['time'], 0.0)

  @contextlib.contextmanager
  def charge(self, bucket):
    """Charge the time of the block to a bucket, excluding what nested blocks charge."""
    start, charged = self._clock(), sum(self.seconds.values())
    try:
      yield
    finally:
      inner = sum(self.seconds.values()) - charged
      self.seconds[bucket] += self._clock() - start - inner

  def go_back(self, step):
    """Charge the steps after this one, which will be repeated, to `lost`; return their seconds."""
    kept = next((seconds for at, seconds in reversed(self._marks) if at <= step), {})
    total = 0.0
    for bucket in STEP_BUCKETS:
      lost = self._before[bucket] + self.seconds[bucket] - kept.get(bucket, 0.0)
      self._before[bucket] -= lost
      total += lost
    self._before['lost'] += total
    return total

  @property
  def attempt_seconds(self):
    """Wall time of this attempt: seconds since the process began."""
    return self._clock() - self._start

  def totals(self):
    """Return seconds by bucket over all attempts."""
    now = dict(self.seconds)
    now['other'] = max(self.attempt_seconds - sum(self.seconds.values()), 0.0)
    return {b: round(self._before[b] + now[b], 3) for b in BUCKETS}

  def write(self, step, done=False):
    """Append a line.  step: the last completed step.  done: whether the run is complete.  Raises LogError."""
    totals = self.totals()
    self._marks.append((step, {bucket: totals[bucket] for bucket in STEP_BUCKETS}))
    if self._file is None:
      self._file = Lines(self._path)
    row = {'time': round(self._now(), 3), 'step': step, 'seconds': totals}
    self._file.append(row | {'done': True} if done else row)

  def flush(self, run):
    if distributed.is_first():
      self.write(run.step, run.is_finished)

  def close(self, run=None):
    if self._file is not None:
      self._file.close()
      self._file = None


def process_age():
  """Return the seconds since this process began, mostly spent on imports; 0 on systems other than Linux."""
  try:
    # Field 22: start time in ticks since boot.  Field 2, the name in parentheses, may contain spaces.
    started = int(pathlib.Path('/proc/self/stat').read_text().rpartition(')')[2].split()[19])
    uptime = float(pathlib.Path('/proc/uptime').read_text().split()[0])
    return max(uptime - started / os.sysconf('SC_CLK_TCK'), 0.0)
  except (OSError, ValueError, IndexError):
    return 0.0
