"""A run's folder: who may write there, and whose run it is; and the user's cache of compiled programs."""

import contextlib
import fcntl
import json
import os
import pathlib
import socket

import jax

from llmjax.config import ConfigError, to_dict
from llmjax.loops import doctor
from llmjax.parallel import distributed


def enable_compilation_cache(setting):
  """Keeps compiled programs between runs, by default in the user's cache directory."""
  if setting == 'none':
    return
  folder = doctor.cache_folder() if setting == 'default' else setting
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


def claim_workdir(workdir, spec):
  """Makes the run's folder and writes config.json; refuses a folder that holds a different run.

  What defines the weights and the stream must be as it was; lengths and intervals may change.  All
  processes call it, and the first one writes.
  """
  workdir = pathlib.Path(workdir)
  file, resolved = workdir / 'config.json', to_dict(spec)
  if file.exists() and any((workdir / 'checkpoints').glob('[0-9]*')):
    before = json.loads(file.read_text())
    fixed = [('model', k) for k in resolved['model']] + [
        ('data', 'sources'), ('data', 'seq_len'), ('data', 'packing'), ('data', 'long'), ('optimizer', 'name'),
        ('optimizer', 'moment_dtype'), ('optimizer', 'freeze'), ('guard', 'window'), ('train', 'batch_size'),
        ('train', 'seed'), ('train', 'param_dtype')] + [
            (group, k) for group in ('adapter', 'preference', 'reward', 'distill', 'rl', 'policy')
            for k in resolved.get(group, ())]
    changed = [f'{g}.{k} was {before[g][k]!r} in {workdir} and is {resolved[g][k]!r} now; keep it, or '
               'give a new --workdir' for g, k in fixed
               if k in before.get(g, {}) and before[g][k] != resolved[g][k]]
    if changed:
      raise ConfigError(changed)
  saved = [int(p.name) for p in (workdir / 'checkpoints').glob('[0-9]*') if p.name.isdecimal()]
  done = file.exists() and max(saved, default=0) >= spec.train.steps  # What would be written never ran.
  distributed.wait_for_all('looked at the workdir')
  try:
    if distributed.is_first() and not done:
      workdir.mkdir(parents=True, exist_ok=True)
      file.write_text(json.dumps(resolved, indent=2) + '\n')
  except OSError as e:
    raise ConfigError([f'--workdir={workdir} cannot be written: {e.strerror}']) from e
  distributed.wait_for_all('made the workdir')
  if not file.exists():
    raise ConfigError([f'--workdir={workdir} is not the same folder for process {jax.process_index()} as for '
                       'process 0; give one that all machines share'])
  return workdir
