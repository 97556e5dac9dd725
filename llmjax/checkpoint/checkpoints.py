"""A run's checkpoints: `<workdir>/checkpoints/<step>/` with four Orbax items and a checksum manifest.

  params         the parameters alone, so that evaluation and generation read no optimizer state
  optimizer      step, optimizer state and PRNG key
  stream         state of the data stream (batches drawn) and the fingerprint of its data
  spec           the resolved config of the run
  manifest.json  size and SHA-256 of every file (see manifest.py)

A save writes `<step>.partial` and renames it once its manifest is complete.
"""

import dataclasses
import errno
import itertools
import os
import pathlib
import shutil
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from llmjax.checkpoint import manifest, orbax_io, retention
from llmjax.checkpoint.arrays import Arrays
from llmjax.checkpoint.load import checkpoints_folder, gather, newest_verified
from llmjax.checkpoint.spec import CheckpointSpec
from llmjax.config import ConfigError
from llmjax.parallel import distributed
from llmjax.train.state import TrainState

# Seconds that the first process waits for the manifests of the others before it removes older checkpoints.
MANIFEST_SECONDS = 60.0
CLEANUP_ATTEMPTS = 10  # To remove what a failed save left.
POLL_SECONDS = 0.2  # Between two checks whether another process's part of the save has failed.
LEAVE_SECONDS = 10.0  # How long a process that fails alone waits for its part of a save.
_SAVES = itertools.count()  # The same in all processes.


class SaveError(Exception):
  """A checkpoint could not be written. The message is one line: path, reason, bytes free."""


@dataclasses.dataclass(frozen=True)
class Save:
  """The outcome of one save. size: bytes. seconds: how long the caller was blocked.

  problem: why it failed, or ''. note: what else went wrong, or ''.
  """

  step: int
  path: epath.Path
  size: int = 0
  seconds: float = 0.0
  problem: str = ''
  note: str = ''


class Checkpoints:
  """Saves and restores TrainStates.

  Saving is asynchronous: writing, hashing and removing older checkpoints run in the background. `finished` returns
  the outcomes, `close` waits for the save in flight.
  """

  def __init__(self, workdir, spec=None):
    self.folder = checkpoints_folder(workdir)
    self.spec = spec or CheckpointSpec()
    self.passed_over = []
    self._orbax = None  # Created by the first save.
    orbax_io.silence_failed_saves()
    self._barrier = None  # Of the processes that write the save in flight, if there are several.
    self._thread, self._outcome, self._cleared = None, None, False
    self._finished = []

  def latest(self):
    """Return the newest verified step, or None without checkpoints; `passed_over` has a line per newer, damaged one.

    Raises ConfigError if a run must neither resume nor start anew, because starting would replace what is there: no
    checkpoint is undamaged, or the newest cannot be verified.
    """
    self._join()
    step, self.passed_over = newest_verified(self.folder, strict=True)
    return step

  def set_aside(self):
    """Rename the folder of checkpoints so that the run starts anew; returns the new path. One process calls it."""
    for number in itertools.count(1):
      path = self.folder.with_name(f'{self.folder.name}.{number}')
      if not os.path.lexists(path):
        return self.folder.rename(path)

  def save(self, step, state, stream, spec, metrics=None, metrics_step=None):
    """Start a save; the state may be donated to the next step at once.

    stream: {'batches': drawn so far, 'fingerprint': of the data}. spec: the config as nested dicts. metrics: of the
    latest evaluation, at metrics_step. Replaces a checkpoint of the same step; once it is complete, removes those of
    later steps, which the run has left. Never raises because of the values (not finite) or the disk: `finished`
    returns such failures.
    """
    begin = time.perf_counter()
    self._join()
    if jax.process_count() > 1:
      if self._barrier:
        self._barrier.close()
      self._barrier = distributed.Barrier(f'saves/{next(_SAVES)}')
    rest = {'step': state.step, 'opt_state': state.opt_state, 'key': state.key}
    try:
      if names := find_nonfinite({'params': state.params, 'optimizer': rest}):
        raise SaveError(f'{names[0]} is not finite' + f', nor are {len(names) - 1} more' * (len(names) > 1))
      self._prepare()
      self._orbax = self._orbax or orbax_io.make_writer(state, lambda key, ms: self._barrier.wait(key, ms))
      self._orbax.save(self._partial(step), force=True, args=ocp.args.Composite(
          params=ocp.args.StandardSave(state.params), optimizer=ocp.args.StandardSave(rest),
          stream=ocp.args.JsonSave(stream), spec=ocp.args.JsonSave(spec)))
      task, arguments = self._commit, (step, metrics, metrics_step, time.perf_counter() - begin)
    except Exception as e:  # Of any library: a failed save alone must not end the run.
      task, arguments = self._fail, (step, e)
    self._thread = threading.Thread(target=task, args=arguments, name='save')
    self._thread.start()
    if task == self._fail and jax.process_count() == 1:
      self._join()  # So that the loop sees the failure before its next step.

  def finished(self, wait=False):
    """Return the Saves that have ended since the last call. wait: including the one in flight.

    Several processes learn of a failure at the next save or when they wait, all at the same point: one that stopped
    alone would leave the others in a collective.
    """
    if wait or (jax.process_count() == 1 and self._thread is not None and not self._thread.is_alive()):
      self._join()
    saves, self._finished = self._finished, []
    return saves

  def restore(self, step, abstract):
    """Restore (state, stream). abstract: the TrainState of shapes, dtypes and shardings.

    Raises ConfigError if the checkpoint holds other arrays.
    """
    self._join()
    rest = {'step': abstract.step, 'opt_state': abstract.opt_state, 'key': abstract.key}
    _require_fit(self.folder / str(step), {'params': abstract.params, 'optimizer': rest})
    handler = ocp.CompositeCheckpointHandler(
        params=orbax_io.make_reader(abstract.params), optimizer=orbax_io.make_reader(rest),
        stream=ocp.JsonCheckpointHandler())
    with ocp.Checkpointer(handler) as orbax:
      items = orbax.restore(self.folder / str(step), args=ocp.args.Composite(
          params=ocp.args.StandardRestore(abstract.params),
          optimizer=ocp.args.StandardRestore(rest), stream=ocp.args.JsonRestore()))
    return TrainState(params=items.params, **items.optimizer), items.stream

  def wait(self):
    """Wait for the save in flight; raises SaveError if one failed that `finished` has not returned."""
    for save in self.finished(wait=True):
      if save.problem:
        raise SaveError(save.problem)

  def close(self):
    try:
      self.wait()
    finally:
      if self._orbax:
        self._orbax.close()

  def leave(self):
    """Give the save in flight a moment to end without the other processes, which may be gone."""
    if self._thread is not None:
      self._thread.join(LEAVE_SECONDS)

  def _join(self):
    """Wait for the save in flight and record its outcome, on which all processes agree."""
    if self._thread is None:
      return
    self._thread.join()
    self._thread, save = None, self._outcome
    problem = next((p for p in gather(save.problem) if p), '')
    self._finished.append(save if save.problem == problem else dataclasses.replace(save, problem=problem))

  def _partial(self, step):
    return self.folder / f'{step}.partial'

  def _prepare(self):
    """Create the folder and remove what interrupted saves left. Raises OSError on all processes if that fails."""
    code = 0
    if jax.process_index() == 0:
      try:
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in () if self._cleared else manifest.find_temporaries(self.folder):
          path.rmtree()
        self._cleared = True
      except OSError as e:
        code = e.errno or errno.EIO
    if code := gather(code)[0]:
      raise OSError(code, os.strerror(code))

  def _commit(self, step, metrics, metrics_step, seconds):
    """Wait for Orbax, write the manifest, rename the checkpoint, and remove older ones. Runs in its own thread."""
    path, partial, first = self.folder / str(step), self._partial(step), jax.process_index() == 0
    try:
      self._wait_for_orbax()
      manifest.write_manifest(partial, step, metrics, metrics_step, jax.process_index(), jax.process_count())
      size = self._wait_for_manifests(partial).size if first else 0
      if first:
        if path.exists():
          remove_checkpoint(path)
        partial.rename(path)
    except Exception as e:  # As in `save`.
      self._fail(step, e)
      return
    note = ''
    try:
      if first:
        self._remove_old(step)
    except OSError as e:
      note = f'older checkpoints in {self.folder} are not removed: {_reason(e)}'
    self._outcome = Save(step, path, size, seconds, note=note)

  def _wait_for_orbax(self):
    """Wait for Orbax to finish writing; raises its error, or another process's."""
    if self._barrier is None:
      self._orbax.wait_until_finished()
      return
    errors = []

    def wait(orbax=self._orbax):
      try:
        orbax.wait_until_finished()
      except Exception as e:
        errors.append(e)

    thread = threading.Thread(target=wait, name='wait for orbax', daemon=True)
    thread.start()
    while thread.is_alive():
      thread.join(POLL_SECONDS)
      try:
        self._barrier.check()
      except distributed.AbsentError:
        # This writer may continue until its timeout and would block the next save.
        self._orbax = None
        raise
    if errors:
      raise errors[0]

  def _wait_for_manifests(self, path):
    """Return the Manifest once all processes have written theirs; raises ManifestError when time is up."""
    deadline = time.monotonic() + MANIFEST_SECONDS
    while True:
      try:
        return manifest.read_manifest(path)
      except manifest.ManifestError:
        if time.monotonic() > deadline:
          raise
        if self._barrier:
          self._barrier.check()
        time.sleep(0.05)

  def _remove_old(self, saved):
    """Remove the steps after the saved one, and those with a manifest that no rule keeps."""
    metrics = {}
    for step in manifest.find_steps(self.folder):
      if step > saved:
        remove_checkpoint(self.folder / str(step))
        continue
      try:
        metrics[step] = manifest.read_manifest(self.folder / str(step)).metrics
      except manifest.ManifestError:
        continue  # Not counted; left for `llmjax checkpoint` to inspect.
    for step in set(metrics) - retention.kept_steps(self.spec, metrics):
      remove_checkpoint(self.folder / str(step))

  def _fail(self, step, error):
    """Record why a save failed and free the disk space that it used."""
    path = self.folder / str(step)
    if self._barrier and not isinstance(error, distributed.AbsentError):
      self._barrier.abort(_reason(error))
    problem = f'{path} is not saved: {_reason(error)}'
    if not isinstance(error, SaveError) and (free := free_bytes(self.folder)) is not None:
      problem += f'; {free:,} bytes are free there'
    if jax.process_index() == 0 and not isinstance(error, SaveError):
      self._cleared = False  # What cannot be removed now is removed before the next save.
      for _ in range(CLEANUP_ATTEMPTS):
        try:
          for left in manifest.find_temporaries(self.folder):
            left.rmtree()
        except OSError:
          pass  # It is no complete checkpoint either way.
        time.sleep(0.05)  # Orbax's other writers may still be at work there and create it again.
        if not manifest.find_temporaries(self.folder):
          break
    self._outcome = Save(step, path, problem=problem)


def _require_fit(checkpoint, tree):
  """Raise ConfigError if a checkpoint holds other arrays than a tree of shapes."""
  saved, expected = Arrays(checkpoint).shapes, _named_leaves(tree)
  lines = [f'{name} is missing' for name in expected if name not in saved]
  lines += [f'{name} has the shape {list(saved[name].shape)} and not {list(expected[name].shape)}'
            for name in expected if name in saved and saved[name].shape != expected[name].shape]
  lines += [f'{name} is unexpected' for name in saved if name not in expected]
  if lines:
    raise ConfigError([f'{checkpoint} holds other arrays than this model and optimizer: {lines[0]}'
                       + f', and {len(lines) - 1} more' * (len(lines) > 1) + '. It belongs to another run or to other '
                       'settings: give another --workdir'])


def _named_leaves(tree):
  """Return {path as text: array}."""
  return {'/'.join(str(getattr(k, 'key', getattr(k, 'name', getattr(k, 'idx', k)))) for k in path): x
          for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]}


def find_nonfinite(tree):
  """List the names of the arrays that hold a NaN or an infinity; reduced on the devices."""
  leaves = {name: x for name, x in _named_leaves(tree).items() if jnp.issubdtype(x.dtype, jnp.inexact)}
  finite = np.asarray(_all_finite(list(leaves.values()))) if leaves else ()
  return [name for name, is_finite in zip(leaves, finite, strict=True) if not is_finite]


@jax.jit
def _all_finite(leaves):
  return jnp.stack([jnp.all(jnp.isfinite(x)) for x in leaves])


def remove_checkpoint(path):
  """Remove a checkpoint's folder; if killed meanwhile, no part of it stays under its name."""
  if '://' not in str(path):  # Where renaming means copying, the missing files mark it as damaged.
    path = path.replace(path.with_name(f'{path.name}.deleted'))
  path.rmtree()


def free_bytes(folder):
  """Return the free bytes on the disk of a folder, or None if unknown."""
  if '://' in str(folder):
    return None
  folder = pathlib.Path(folder)
  while not folder.exists() and folder != folder.parent:
    folder = folder.parent
  try:
    return shutil.disk_usage(folder).free
  except OSError:
    return None


def _reason(error):
  """Return in a few words why a checkpoint could not be written."""
  return str(error) if isinstance(error, (SaveError, distributed.AbsentError)) else orbax_io.failure_reason(error)
