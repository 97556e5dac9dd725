"""Find processes with slow hosts.

All processes wait for the slowest one in every step, so step times are equal.  The time that each host takes to load
a batch and place it on its devices is compared instead.  A slow chip is not detected.
"""

import socket
import statistics

import jax
import numpy as np

from llmjax.run.callback import Callback

NAME_BYTES = 64
# Minimum delay to report, as a fraction of the step time.
FLOOR = 0.1


class Stragglers(Callback):
  """Compare the host times of all processes.

  deviations: see `slow_processes`; 0 disables the comparison.
  """

  def __init__(self, deviations):
    self._deviations = deviations
    self._names, self._slow = [], {}

  def on_start(self, run):
    if self._active():
      name = np.zeros(NAME_BYTES, np.uint8)
      text = socket.gethostname().encode()[:NAME_BYTES]
      name[:len(text)] = np.frombuffer(text, np.uint8)
      self._names = [bytes(row).rstrip(b'\0').decode(errors='replace') for row in _gather(name)]
      _gather(np.zeros(1, np.float32))  # Compile it now, not in a timed step.

  def on_log(self, run, values):
    slow = self.find(values.pop('host_seconds'), values['train/step_seconds'])
    if slow and set(slow) != set(self._slow):
      run.event('straggler', step_seconds=values['train/step_seconds'],
                host_seconds={str(process): seconds for process, seconds in slow.items()})
    self._slow = slow
    return self.describe(slow)

  def find(self, host_seconds, step_seconds):
    """Return {process index: host seconds per step} of the slow processes.  A collective: all processes call it.

    host_seconds: of this process, per step.  step_seconds: per step, equal on all processes.
    """
    if not self._active():
      return {}
    seconds = _gather(np.array([host_seconds], np.float32)).reshape(-1).tolist()
    return {i: seconds[i] for i in slow_processes(seconds, step_seconds, self._deviations)}

  def describe(self, slow):
    """Format the result of `find` for the log; '' if no process is slow."""
    return ', '.join(f'slow: process {i} ({self._names[i]}) {1e3 * s:.0f} ms on its host' for i, s in slow.items())

  def _active(self):
    return bool(self._deviations) and jax.process_count() > 1


def slow_processes(seconds, step_seconds, deviations):
  """Return the indices whose seconds exceed the median by `deviations` scaled median absolute deviations.

  Lower medians are used, so that of two processes the faster one is the reference.
  """
  median = statistics.median_low(seconds)
  deviation = 1.4826 * statistics.median_low([abs(s - median) for s in seconds])
  limit = median + max(deviations * deviation, FLOOR * step_seconds)
  return [i for i, s in enumerate(seconds) if s > limit]


def _gather(x):
  from jax.experimental import multihost_utils
  return np.asarray(multihost_utils.process_allgather(x))
