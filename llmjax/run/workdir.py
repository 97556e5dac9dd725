"""The folder of a run: locking, resuming, recorded configs; and the compilation cache."""

import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
import socket

import jax

from llmjax.checkpoint.arrays import read_json
from llmjax.checkpoint.checkpoints import Checkpoints
from llmjax.checkpoint.recorded import absolute_paths
from llmjax.config import ConfigError, to_dict
from llmjax.parallel import distributed
from llmjax.run import changes, hardware
from llmjax.run.sources import tokenizer_problems


def enable_compilation_cache(setting):
  """Enable JAX's persistent compilation cache.  setting: train.compilation_cache."""
  if setting == 'none':
    return
  folder = hardware.cache_folder() if setting == 'default' else setting
  jax.config.update('jax_compilation_cache_dir', str(folder))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)


@contextlib.contextmanager
def hold_workdir(workdir):
  """Create the run's folder and lock it against other runs for the duration of the block.

  The first process locks `<workdir>/lock`; the system releases the lock when the process ends.
  """
  if not distributed.is_first():
    yield
    return
  path = pathlib.Path(workdir) / 'lock'
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = open(path, 'ab+', buffering=0)
  except OSError as e:
    raise ConfigError([f'--workdir={workdir} cannot be written: {e.strerror}']) from e
  with lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
      lock.seek(0)
      holder = lock.read().decode(errors='replace') or 'another process'
      raise ConfigError([f'--workdir={workdir} is in use: {holder} trains there; wait for it, stop it, or '
                         'give another --workdir']) from e
    except OSError:
      pass  # The filesystem does not support locks.
    with contextlib.suppress(OSError):  # A full disk is reported by the files that matter.
      lock.truncate(0)
      lock.write(f'process {os.getpid()} on {socket.gethostname()}'.encode())
    try:
      yield
    finally:
      with contextlib.suppress(OSError):
        path.unlink()


@dataclasses.dataclass
class Attempt:
  """One start of a run in its folder.

  first: the step that it resumes from, 0 for a new run.  before: config of that step's checkpoint.  changes: settings
  that differ from it.  config: name of the file with the config of this attempt.  notes: lines to print.
  """

  workdir: pathlib.Path
  checkpoints: Checkpoints
  first: int = 0
  before: dict = dataclasses.field(default_factory=dict)
  changes: list = dataclasses.field(default_factory=list)
  config: str = ''
  notes: list = dataclasses.field(default_factory=list)


def begin_attempt(workdir, spec):
  """Return the Attempt of a run with this spec.  All processes call it.

  Raises ConfigError if the run's checkpoints cannot be resumed, or not with these settings.
  """
  workdir, checkpoints = pathlib.Path(workdir), Checkpoints(workdir, spec.checkpoint)
  attempt = Attempt(workdir, checkpoints)
  try:
    attempt.first, attempt.before = _find_start(attempt, spec)
    if not attempt.first:
      return attempt
    attempt.changes = changes.find_changes(attempt.before, absolute_paths(to_dict(spec)))
    done = attempt.first >= spec.train.steps  # Then nothing is trained.
    changes.require_allowed(attempt.changes, spec.train.allow_changes or done, workdir)
    if not (done or spec.data.allow_mismatch) and (problems := list(tokenizer_problems(spec.data.sources, workdir))):
      raise ConfigError(problems)
    return attempt
  except BaseException:
    checkpoints.close()
    raise


def _find_start(attempt, spec):
  """Return (step to resume from or 0, config of its checkpoint); renames the checkpoints for a fresh start."""
  checkpoints, fresh = attempt.checkpoints, spec.checkpoint.fresh_start
  read = lambda step: absolute_paths(read_json(checkpoints.folder / str(step), 'spec')) if step else {}
  try:
    first = checkpoints.latest() or 0
    before = read(first)
    if not fresh or not first or before.get('checkpoint', {}).get('fresh_start'):
      return first, before
  except ConfigError:
    if not fresh:
      raise
  distributed.wait_for_all('looked at the checkpoints')
  if distributed.is_first():
    try:
      attempt.notes.append(f'{checkpoints.folder} was renamed to {checkpoints.set_aside()}; the run starts from step 0')
    except OSError as e:
      raise ConfigError([f'{checkpoints.folder} cannot be renamed: {e.strerror or e}']) from e
  distributed.wait_for_all('set the checkpoints aside')
  checkpoints.passed_over = []
  return 0, {}


def claim_workdir(workdir, spec):
  """Return the Attempt of a run, after creating its folder and writing its config.

  All processes call it; the first one writes.  Raises ConfigError as `begin_attempt` does.
  """
  attempt = begin_attempt(workdir, spec)
  workdir, file = attempt.workdir, attempt.workdir / 'config.json'
  distributed.wait_for_all('looked at the workdir')
  try:
    if distributed.is_first() and not (attempt.first and attempt.first >= spec.train.steps):
      text = json.dumps(absolute_paths(to_dict(spec)), indent=2) + '\n'
      attempt.config = _record_config(workdir, text)
      file.write_text(text)
  except OSError as e:
    raise ConfigError([f'--workdir={workdir} cannot be written: {e.strerror}']) from e
  distributed.wait_for_all('made the workdir')
  if not file.exists():
    raise ConfigError([f'--workdir={workdir} is not the same folder for process {jax.process_index()} as for '
                       'process 0; give one that all machines share'])
  return attempt


def _record_config(workdir, text):
  """Write `configs/<n>.json`, n from 1, unless the latest one is equal; returns its name."""
  folder = workdir / 'configs'
  folder.mkdir(parents=True, exist_ok=True)
  number = max((int(p.stem) for p in folder.glob('*.json') if p.stem.isdecimal()), default=0)
  if not number or (folder / f'{number}.json').read_text() != text:
    number += 1
    (folder / f'{number}.json').write_text(text)
  return f'configs/{number}.json'
