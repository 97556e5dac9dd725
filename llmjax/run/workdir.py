"""A run's folder: who may write there, and whose run it is; and the user's cache of compiled programs."""

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
  """Keeps compiled programs between runs, by default in the user's cache directory."""
  if setting == 'none':
    return
  folder = hardware.cache_folder() if setting == 'default' else setting
  jax.config.update('jax_compilation_cache_dir', str(folder))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)


@contextlib.contextmanager
def hold_workdir(workdir):
  """Makes the run's folder and keeps every other run out of it until the block ends.

  The first process locks `<workdir>/lock`; the system lets go of it when the process ends, however it ends.
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
      pass  # A filesystem without locks.
    with contextlib.suppress(OSError):  # A full disk is said by what needs the space.
      lock.truncate(0)
      lock.write(f'process {os.getpid()} on {socket.gethostname()}'.encode())
    try:
      yield
    finally:
      with contextlib.suppress(OSError):
        path.unlink()


@dataclasses.dataclass
class Attempt:
  """One start of a run in its folder.  first: the step it resumes from, 0 for a new run.

  before: the config of that step's checkpoint.  changes: what is another setting now.  config: the name of the file
  with this attempt's config.  notes: lines to print.
  """

  workdir: pathlib.Path
  checkpoints: Checkpoints
  first: int = 0
  before: dict = dataclasses.field(default_factory=dict)
  changes: list = dataclasses.field(default_factory=list)
  config: str = ''
  notes: list = dataclasses.field(default_factory=list)


def begin_attempt(workdir, spec):
  """Returns the Attempt of a run with this spec.  All processes call it.

  Raises ConfigError where the run's checkpoints cannot be resumed, or not with these settings.
  """
  workdir, checkpoints = pathlib.Path(workdir), Checkpoints(workdir, spec.checkpoint)
  attempt = Attempt(workdir, checkpoints)
  try:
    attempt.first, attempt.before = _find_start(attempt, spec)
    if not attempt.first:
      return attempt
    attempt.changes = changes.find_changes(attempt.before, absolute_paths(to_dict(spec)))
    done = attempt.first >= spec.train.steps  # Then nothing is trained with these settings.
    changes.require_allowed(attempt.changes, spec.train.allow_changes or done, workdir)
    if not (done or spec.data.allow_mismatch) and (problems := list(tokenizer_problems(spec.data.sources, workdir))):
      raise ConfigError(problems)
    return attempt
  except BaseException:
    checkpoints.close()
    raise


def _find_start(attempt, spec):
  """Returns (the step to resume from or 0, the config of its checkpoint); renames the checkpoints for a fresh start."""
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
      attempt.notes.append(f'{checkpoints.folder} is {checkpoints.set_aside()} now; the run starts anew')
    except OSError as e:
      raise ConfigError([f'{checkpoints.folder} cannot be renamed: {e.strerror or e}']) from e
  distributed.wait_for_all('set the checkpoints aside')
  checkpoints.passed_over = []
  return 0, {}


def claim_workdir(workdir, spec):
  """Returns the Attempt of a run, after making its folder and writing its config.

  All processes call it, and the first one writes.  Raises ConfigError as `begin_attempt` does.
  """
  attempt = begin_attempt(workdir, spec)
  workdir, file = attempt.workdir, attempt.workdir / 'config.json'
  distributed.wait_for_all('looked at the workdir')
  try:
    if distributed.is_first() and not (attempt.first and attempt.first >= spec.train.steps):
      text = json.dumps(absolute_paths(to_dict(spec)), indent=2) + '\n'
      attempt.config = _keep_config(workdir, text)
      file.write_text(text)
  except OSError as e:
    raise ConfigError([f'--workdir={workdir} cannot be written: {e.strerror}']) from e
  distributed.wait_for_all('made the workdir')
  if not file.exists():
    raise ConfigError([f'--workdir={workdir} is not the same folder for process {jax.process_index()} as for '
                       'process 0; give one that all machines share'])
  return attempt


def _keep_config(workdir, text):
  """Writes `configs/<n>.json`, n from 1, where the latest one has another text; returns its name."""
  folder = workdir / 'configs'
  folder.mkdir(parents=True, exist_ok=True)
  number = max((int(p.stem) for p in folder.glob('*.json') if p.stem.isdecimal()), default=0)
  if not number or (folder / f'{number}.json').read_text() != text:
    number += 1
    (folder / f'{number}.json').write_text(text)
  return f'configs/{number}.json'
