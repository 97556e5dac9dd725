"""Where a run's wall time went, over all its sittings: buckets that sum to it.

`time.jsonl` has a line for every log line and checkpoint: `time` (Unix seconds), `step`, and `seconds` by
bucket since the run began.  So a killed sitting is accounted for up to its last line, and the next one
charges the gap to `restart`, and the steps that it must do again to `lost`.
"""

import contextlib
import os
import pathlib
import time

from llmjax.evaluate.metrics import read_lines
from llmjax.run.writers import Lines

BUCKETS = ('init', 'compile', 'data_wait', 'rollout', 'step', 'eval', 'sample', 'checkpoint', 'lost', 'restart',
           'other')
OF_STEPS = ('step', 'data_wait', 'rollout')  # What is lost with a step that must be done again.


class Goodput:
  """Charges wall time to buckets.  Whatever no bucket claims is `other`.

  age: seconds since the process began, charged to `init`.  clock: monotonic seconds.  now: Unix seconds.
  """

  def __init__(self, workdir, clock=time.perf_counter, now=time.time, age=0.0):
    self._path, self._clock, self._now = pathlib.Path(workdir) / 'time.jsonl', clock, now
    self._start, self._file = clock() - age, None
    self.seconds = dict.fromkeys(BUCKETS, 0.0)
    self.seconds['init'] = age
    lines = [row for row in read_lines(self._path) if isinstance(row.get('seconds'), dict)]
    self._marks = [(row['step'], row['seconds']) for row in lines]  # Of OF_STEPS at least.
    last = lines[-1] if lines else {'seconds': {}, 'done': True}
    self._before = {bucket: last['seconds'].get(bucket, 0.0) for bucket in BUCKETS}
    if not last.get('done'):
      self._before['restart'] += max(now() - age - last['time'], 0.0)

  @contextlib.contextmanager
  def charge(self, bucket):
    """Charges the time inside the block to the bucket, less what blocks inside it claim themselves."""
    start, claimed = self._clock(), sum(self.seconds.values())
    try:
      yield
    finally:
      inner = sum(self.seconds.values()) - claimed
      self.seconds[bucket] += self._clock() - start - inner

  def go_back(self, step):
    """Charges the steps after this one to `lost`, for they will be done again; returns their seconds."""
    kept = next((seconds for at, seconds in reversed(self._marks) if at <= step), {})
    total = 0.0
    for bucket in OF_STEPS:
      lost = self._before[bucket] + self.seconds[bucket] - kept.get(bucket, 0.0)
      self._before[bucket] -= lost
      total += lost
    self._before['lost'] += total
    return total

  @property
  def sitting_seconds(self):
    """Seconds since this process began."""
    return self._clock() - self._start

  def totals(self):
    """Returns seconds by bucket over all sittings."""
    now = dict(self.seconds)
    now['other'] = max(self.sitting_seconds - sum(self.seconds.values()), 0.0)
    return {b: round(self._before[b] + now[b], 3) for b in BUCKETS}

  def write(self, step, done=False):
    """Appends a line; raises LogError.  step: the last one done.  done: whether the run is, and none restarts it."""
    totals = self.totals()
    self._marks.append((step, {bucket: totals[bucket] for bucket in OF_STEPS}))
    if self._file is None:
      self._file = Lines(self._path)
    row = {'time': round(self._now(), 3), 'step': step, 'seconds': totals}
    self._file.append(row | {'done': True} if done else row)

  def close(self):
    if self._file is not None:
      self._file.close()
      self._file = None


def process_age():
  """Returns the seconds since this process began (Linux), most of them spent on imports; else 0."""
  try:
    # The 22nd field, in ticks since the machine's start; the second one, a name, may hold spaces.
    started = int(pathlib.Path('/proc/self/stat').read_text().rpartition(')')[2].split()[19])
    uptime = float(pathlib.Path('/proc/uptime').read_text().split()[0])
    return max(uptime - started / os.sysconf('SC_CLK_TCK'), 0.0)
  except (OSError, ValueError, IndexError):
    return 0.0
