"""Reading and writing arrays with Orbax, and everything that depends on its internals.

Internals are what its documentation does not promise: how it logs failed writes, what its threads do after one, and
how TensorStore reports an error of the operating system. tests/checkpoint/test_orbax_io.py states the version that
they were checked with.
"""

import logging
import math
import os
import re
import sys

import jax
import orbax.checkpoint as ocp

# A save or restore has at most 1/FRACTIONS of its bytes in flight, or its largest array.
FRACTIONS = 10


def make_writer(state, barrier):
  """Return an AsyncCheckpointer for a checkpoint's four items.

  state: tree of arrays like those to be saved; at most a tenth of it is copied to the host at a time. barrier:
  function of (key, timeout in ms) that synchronizes the processes.
  """
  limit = _concurrent_gb(state)
  handler = ocp.CompositeCheckpointHandler(
      params=ocp.StandardCheckpointHandler(save_concurrent_gb=limit),
      optimizer=ocp.StandardCheckpointHandler(save_concurrent_gb=limit),
      stream=ocp.JsonCheckpointHandler(), spec=ocp.JsonCheckpointHandler())
  # Asynchronous creation would leave Orbax's threads waiting for minutes when a folder cannot be created.
  return ocp.AsyncCheckpointer(handler, async_options=ocp.options.AsyncOptions(
      create_directories_asynchronously=False, barrier_sync_fn=lambda *, key, timeout_ms: barrier(key, timeout_ms)))


def make_reader(abstract):
  """Return a handler that restores a tree a tenth at a time, so that the host never holds it twice.

  abstract: ShapeDtypeStructs with shardings.
  """
  return ocp.StandardCheckpointHandler(restore_concurrent_gb=_concurrent_gb(abstract))


def _concurrent_gb(tree):
  """Return how many GB of a tree's arrays may be in flight: a tenth of all, and at least the largest."""
  arrays = [x for x in jax.tree.leaves(tree) if hasattr(x, 'sharding')]  # NumPy's arrays are small.
  local = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize * len(x.sharding.addressable_devices)
              for x in arrays)
  # An array that one device wrote is read in one piece, and may have been saved in float32.
  largest = max((math.prod(x.shape) * max(x.dtype.itemsize, 4) for x in arrays), default=0)
  return (max(local / FRACTIONS, largest) + 1) / 1e9


def failure_reason(error):
  """Return in a few words why a write failed: the operating system's reason, or the error's type and message."""
  code = re.search(r"os_error_code='(\d+)'", str(error))  # TensorStore's.
  if code or (isinstance(error, OSError) and error.errno):
    return os.strerror(int(code[1]) if code else error.errno)
  return f'{type(error).__name__}: {(str(error).splitlines() or [""])[0][:200]}'


def silence_failed_saves():
  """Suppress the tracebacks that Orbax prints for a failed save; `Checkpoints.finished` reports it in one line."""
  logging.getLogger('absl').addFilter(_is_no_orbax_error)  # Adding the same filter again has no effect.
  logging.getLogger('asyncio').addFilter(_is_no_leftover)
  if not hasattr(sys.unraisablehook, 'wrapped'):
    wrapped = sys.unraisablehook

    def hook(unraisable):
      # Pending writes report to the event loop of the save that has failed meanwhile.
      if str(unraisable.exc_value) != 'Event loop is closed':
        wrapped(unraisable)

    hook.wrapped = wrapped
    sys.unraisablehook = hook


def silence_reading():
  """Suppress Orbax's warnings about items without checkpoint metadata and about arrays of other devices."""
  logging.getLogger('absl').addFilter(_is_no_orbax_warning)


def _is_no_orbax_error(record):
  return record.levelno < logging.ERROR or 'orbax' not in record.pathname


def _is_no_orbax_warning(record):
  return record.levelno > logging.WARNING or 'orbax' not in record.pathname


def _is_no_leftover(record):
  """Whether a record is not about the writes that were pending when another one failed."""
  text = str(record.msg)
  return not ('orbax' in text and ('exception was never retrieved' in text or 'destroyed but it is pending' in text))
