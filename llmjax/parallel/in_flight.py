"""A limit on the number of programs in flight: dispatched by the host and not known to be finished.

JAX calls return before the devices have finished, so a loop that reads no result runs ahead without limit.  On emulated
CPU devices that deadlocks (jaxlib 0.10): launches and executions share one pool of as many threads as there are
devices, and a device queues 32 programs.  One more launch blocks its thread until a program of that device ends, and a
collective that needs this thread for its last participant never ends.  tools/stress_dispatch.py reproduces it without
llmjax.  On accelerators each program in flight keeps its inputs in device memory.

LIMIT does not slow a loop down.  The host waits for program n - 2 while n - 1 runs and n is queued, so it has the time
of a whole program to dispatch n + 1.  A slower host is the bottleneck with any limit.
"""

import collections

import jax

LIMIT = 2  # Programs, or steps of a few programs each.

_finished = 0  # Programs that this process has waited for; the watchdog's progress within evaluations and rollouts.


def finished():
  """Return the number of programs that this process has waited for."""
  return _finished


def wait(outputs):
  """Wait until a program's outputs, a tree of arrays, are computed; return them."""
  global _finished
  jax.block_until_ready(outputs)
  _finished += 1
  return outputs


class InFlight:
  """The programs of one loop that are in flight."""

  def __init__(self, limit=None):
    """limit: number of programs; None: LIMIT."""
    self._limit = LIMIT if limit is None else limit
    self._outputs = collections.deque()

  def add(self, outputs):
    """Add a dispatched program, wait for the one `limit` before it, and return that one's outputs, or None.

    outputs: a tree of arrays that are not donated to a later program.
    """
    self._outputs.append(outputs)
    return wait(self._outputs.popleft()) if len(self._outputs) > self._limit else None

  def drain(self):
    """Wait for all programs; return their outputs, in order."""
    outputs = [wait(o) for o in self._outputs]
    self._outputs.clear()
    return outputs


def results(programs):
  """Yield each program's outputs as host arrays, in order, with at most LIMIT programs in flight.

  programs: an iterator that dispatches a program and yields its outputs.
  """
  in_flight = InFlight()
  for outputs in programs:
    if (done := in_flight.add(outputs)) is not None:
      yield jax.device_get(done)
  for done in in_flight.drain():
    yield jax.device_get(done)
