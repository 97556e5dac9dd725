"""Where a run's wall time went: buckets that sum to it."""

import contextlib
import json
import pathlib
import time

BUCKETS = ('init', 'compile', 'data_wait', 'step', 'eval', 'sample', 'checkpoint', 'other')


class Ledger:
  """Charges wall time to buckets.  Whatever no bucket claims is `other`.

  Seconds of earlier sittings of the same run are kept in `time.json` and added to.
  """

  def __init__(self, workdir, clock=time.perf_counter):
    self._path = pathlib.Path(workdir) / 'time.json'
    self._clock = clock
    self._start = clock()
    self._before = json.loads(self._path.read_text()) if self._path.exists() else {}
    self.seconds = dict.fromkeys(BUCKETS, 0.0)

  @contextlib.contextmanager
  def charge(self, bucket):
    """Charges the time inside the block to the bucket, less what blocks inside it claim themselves."""
    start, claimed = self._clock(), sum(self.seconds.values())
    try:
      yield
    finally:
      inner = sum(self.seconds.values()) - claimed
      self.seconds[bucket] += self._clock() - start - inner

  def totals(self):
    """Returns seconds by bucket over all sittings."""
    now = dict(self.seconds)
    now['other'] = max(self._clock() - self._start - sum(self.seconds.values()), 0.0)
    return {b: round(self._before.get(b, 0.0) + now[b], 3) for b in BUCKETS}

  def write(self):
    self._path.write_text(json.dumps(self.totals(), indent=2))
