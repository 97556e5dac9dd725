"""Settings of the host's memory allocator: of glibc on Linux; no effect elsewhere."""

import ctypes
import sys

# glibc's mallopt parameters, from malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8


def share_arena():
  """Make all threads use one malloc arena; return whether that succeeded.

  Call it before JAX starts its threads, which would otherwise not share the memory that they free.
  """
  return _set((M_ARENA_MAX, 1))


def keep_freed_memory():
  """Make glibc keep freed memory instead of returning it to the system; return whether that succeeded.

  XLA's CPU backend allocates its temporaries, a gigabyte or more, in every step.  glibc maps and unmaps them, and each
  step pays for all page faults again: 330,000 faults and 2.3 CPU-seconds of system time in a step of 10.  Call it after
  the state is loaded, which needs memory that steps do not.
  """
  return _set((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1))


def _set(*settings):
  if not sys.platform.startswith('linux'):
    return False
  try:
    mallopt = ctypes.CDLL(None).mallopt
  except AttributeError:  # Another C library, such as musl.
    return False
  return all([mallopt(name, value) == 1 for name, value in settings])
