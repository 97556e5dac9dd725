"""Which process of a run is slow: all of them wait for it in every step, and each looks as slow as the others.

So what is compared is the time that a process's own host takes for a step: reading a batch and placing it on
its devices.  A slow chip, which makes no work for its host, is not seen here.
"""

import socket
import statistics

import jax
import numpy as np

NAME_BYTES = 64
# Of the step's time: a process that is late by less costs nothing worth naming.
FLOOR = 0.1


class Stragglers:
  """Gathers host times of all processes, at log intervals.  All processes must call `find` together."""

  def __init__(self, deviations):
    self._deviations = deviations
    self._names = []
    if self._active():
      name = np.zeros(NAME_BYTES, np.uint8)
      text = socket.gethostname().encode()[:NAME_BYTES]
      name[:len(text)] = np.frombuffer(text, np.uint8)
      self._names = [bytes(row).rstrip(b'\0').decode(errors='replace') for row in _gather(name)]
      _gather(np.zeros(1, np.float32))  # Compiled here, not in a timed step.

  def find(self, host_seconds, step_seconds):
    """Returns {process: its host's seconds a step} of those that are slow.

    host_seconds: of this process, for a step.  step_seconds: what a step takes, the same for all.
    """
    if not self._active():
      return {}
    seconds = _gather(np.array([host_seconds], np.float32)).reshape(-1).tolist()
    return {i: seconds[i] for i in slow_ones(seconds, step_seconds, self._deviations)}

  def describe(self, found):
    """Returns the end of a log line: who is slow, and by how much; '' for nobody."""
    return ', '.join(f'slow: process {i} ({self._names[i]}) {1e3 * s:.0f} ms on its host' for i, s in found.items())

  def _active(self):
    return bool(self._deviations) and jax.process_count() > 1


def slow_ones(seconds, step_seconds, deviations):
  """Returns the places of those beyond the median by so many (scaled) median absolute deviations.

  The lower medians: of two processes, the faster one is the measure.
  """
  median = statistics.median_low(seconds)
  deviation = 1.4826 * statistics.median_low([abs(s - median) for s in seconds])
  limit = median + max(deviations * deviation, FLOOR * step_seconds)
  return [i for i, s in enumerate(seconds) if s > limit]


def _gather(x):
  from jax.experimental import multihost_utils
  return np.asarray(multihost_utils.process_allgather(x))
