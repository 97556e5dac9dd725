"""Measure the time that JAX spends on tracing and compiling, so that it can be excluded from reported speeds."""

import contextlib
import functools
import time

# Prefix of the events for tracing, lowering and compiling, the compilation cache included.
STAGES = '/jax/core/compile/'


class CompileClock:
  """Listener that sums the seconds of JAX's compile events.  Of nested events, only the outermost counts.

  clock: monotonic seconds.
  """

  def __init__(self, clock=time.perf_counter):
    self._clock, self._spans, self.seconds = clock, [], 0.0

  def __call__(self, event, seconds, **unused):
    if not event.startswith(STAGES):
      return
    begin = self._clock() - seconds  # Events are reported when they end.
    while self._spans and self._spans[-1][0] >= begin:
      self.seconds -= self._spans.pop()[1]
    self._spans.append((begin, seconds))
    self.seconds += seconds


@functools.cache
def compile_clock():
  """Return the CompileClock of this process, which counts from the first call."""
  import jax
  clock = CompileClock()
  jax.monitoring.register_event_duration_secs_listener(clock)
  return clock


class Stopwatch:
  """Measure seconds since construction: `compiling`, and `seconds` excluding them."""

  def __init__(self, clock=time.perf_counter, compiled=None):
    self._clock, self._compiled = clock, compiled or compile_clock()
    self._begin, self._before = clock(), self._compiled.seconds

  @property
  def compiling(self):
    return self._compiled.seconds - self._before

  @property
  def seconds(self):
    return max(self._clock() - self._begin - self.compiling, 0.0)


@contextlib.contextmanager
def charged(goodput, bucket):
  """Charge the block to a bucket of a Goodput, and its compilation to `compile`.  Yields the block's Stopwatch."""
  with goodput.charge(bucket):
    watch = Stopwatch()
    yield watch
    goodput.seconds['compile'] += watch.compiling
