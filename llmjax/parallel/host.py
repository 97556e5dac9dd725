"""The host's memory allocator."""

import ctypes
import sys

# glibc's mallopt parameters, from malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8


def keep_freed_memory():
  """Makes glibc keep the memory that is freed; returns whether it could.

  XLA's CPU backend asks for its temporaries, a gigabyte or more, anew in every step.  glibc maps and
  unmaps them, and each step pays for every page again: 330,000 faults and 2.3 CPU-seconds of system
  time in a step of 10.  Call it before the first large allocation.
  """
  if not sys.platform.startswith('linux'):
    return False
  try:
    mallopt = ctypes.CDLL(None).mallopt
  except AttributeError:  # Another C library, such as musl.
    return False
  settings = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_ARENA_MAX, 1))
  return all([mallopt(name, value) == 1 for name, value in settings])
