"""Time that JAX spends on making programs, so that no speed that is reported holds a compilation."""

import contextlib
import functools
import time

STAGES = '/jax/core/compile/'  # Events of tracing, lowering and compiling; the cache of programs is in the last.


class CompileClock:
  """Adds up the seconds of JAX's compile events; of nested ones, such as a trace within a trace, the outer counts.

  clock: seconds, monotonic; an event is told when it ends.
  """

  def __init__(self, clock=time.perf_counter):
    self._clock, self._spans, self.seconds = clock, [], 0.0

  def __call__(self, event, seconds, **unused):
    if not event.startswith(STAGES):
      return
    begin = self._clock() - seconds
    while self._spans and self._spans[-1][0] >= begin:
      self.seconds -= self._spans.pop()[1]
    self._spans.append((begin, seconds))
    self.seconds += seconds


@functools.cache
def compile_clock():
  """Returns the process's CompileClock, which counts from the first call on."""
  import jax
  clock = CompileClock()
  jax.monitoring.register_event_duration_secs_listener(clock)
  return clock


class Stopwatch:
  """Seconds since it was made, without those of compiling: `seconds`, and `compiling`."""

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
  """Charges the block's time to a bucket of a Goodput, but for compiling, which has its own; yields its Stopwatch."""
  with goodput.charge(bucket):
    watch = Stopwatch()
    yield watch
    goodput.seconds['compile'] += watch.compiling
