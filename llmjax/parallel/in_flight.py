"""How many programs the host dispatches before it waits for the devices: a few, the same in every loop.

JAX returns from a call before the devices have done it, so a loop that reads nothing runs ahead without limit.  On
emulated CPU devices that deadlocks (jaxlib 0.10): launches and executions share one pool of as many threads as there
are devices, and a device takes 32 programs.  The launch of one more blocks its thread until a program of that device
ends, and a collective that needs this thread for its last participant never does.  tools/stress_dispatch.py shows it
without llmjax.  On accelerators each program in flight keeps its inputs in the devices' memory.

LIMIT does not slow a loop down.  The host waits for program n - 2 with n - 1 running and n queued, so the devices have
work until the host has dispatched n + 1, for which it has the time of a whole program.  A host that needs longer than
that is the bottleneck whatever the limit.
"""

import collections

import jax

LIMIT = 2  # Programs (or steps, of a few programs each) that are not known to be done.

_finished = 0  # Programs waited for by this process: how the watchdog sees progress inside an evaluation or a rollout.


def finished():
  """Return how many programs this process has waited for."""
  return _finished


def wait(outputs):
  """Return a program's outputs, a tree of arrays, once they are computed."""
  global _finished
  jax.block_until_ready(outputs)
  _finished += 1
  return outputs


class InFlight:
  """The programs of one loop that are not known to be done."""

  def __init__(self, limit=None):
    """limit: of programs; None: LIMIT."""
    self._limit = LIMIT if limit is None else limit
    self._outputs = collections.deque()

  def add(self, outputs):
    """Record a dispatched program, waits for the one `limit` before it, and returns that one's outputs, or None.

    outputs: a tree of arrays that no later program takes by donation.
    """
    self._outputs.append(outputs)
    return wait(self._outputs.popleft()) if len(self._outputs) > self._limit else None

  def drain(self):
    """Wait for the programs that are left; returns their outputs, in order."""
    outputs = [wait(o) for o in self._outputs]
    self._outputs.clear()
    return outputs


def results(programs):
  """Yield each program's outputs as host arrays, in order, with at most LIMIT programs in flight.

  programs: an iterable that dispatches a program for each item, its outputs.
  """
  in_flight = InFlight()
  for outputs in programs:
    if (done := in_flight.add(outputs)) is not None:
      yield jax.device_get(done)
  for done in in_flight.drain():
    yield jax.device_get(done)
