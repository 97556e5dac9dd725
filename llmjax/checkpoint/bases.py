"""The frozen base of an adapter: adapter checkpoints leave it out and say which one it was.

A base is a sealed checkpoint of a run.  It is known by the SHA-256 of its parameters' sealed files, so it
may be moved, and another one in its place is refused.
"""

import hashlib
import os

from etils import epath

from llmjax.checkpoint import seal
from llmjax.config import ConfigError


def identify(checkpoint):
  """Returns {'path', 'sha256'} of a sealed checkpoint, as JSON keeps it: the hash is over its parameters' files.

  Raises ConfigError when it has no whole seal.
  """
  try:
    files = seal.read_seal(checkpoint).files
  except seal.SealError as e:
    raise ConfigError([f'{checkpoint} is not loaded: {e}']) from e
  lines = [f'{name} {digest}\n' for name, (_, digest) in sorted(files.items()) if name.startswith('params/')]
  path = str(checkpoint) if '://' in str(checkpoint) else os.path.abspath(checkpoint)
  return {'path': path, 'sha256': hashlib.sha256(''.join(lines).encode()).hexdigest()}


def find_base(recorded, source, run):
  """Returns the path of the recorded base, wherever it is now.

  Looked for are its old place, `<run>/base`, what train.init_from names, and the runs beside this one.

  recorded: what `identify` said.  source: train.init_from.  run: the folder of the adapter's run.  Raises ConfigError
  when another checkpoint is in its place, or it is gone.
  """
  path, run = epath.Path(recorded['path']), epath.Path(run)
  for other in _candidates(path, source, run):
    try:
      if identify(other)['sha256'] == recorded['sha256']:
        return other
    except ConfigError:
      continue  # What has no seal cannot be it.
  where = f'link to where it is now: ln -s FOLDER {run / "base"}'
  if path.exists():
    raise ConfigError([f'{path} is not the base of this adapter: it has other weights than the adapter was trained on '
                       f'(SHA-256 of the parameters was {recorded["sha256"][:16]}...); put the base back, or {where}'])
  raise ConfigError([f'the base of this adapter, {path}, is gone; put it back, or {where} (SHA-256 of its parameters: '
                     f'{recorded["sha256"][:16]}...)'])


def _candidates(path, source, run):
  """Yields the checkpoints that may be the base at this path once, the likeliest first."""
  yield path
  yield from _checkpoints_of(run / 'base')
  if source:
    yield from _checkpoints_of(epath.Path(source))
  try:
    beside = sorted(run.parent.iterdir())
  except OSError:
    beside = []
  for folder in beside:  # One seal of each, where the step is known.
    yield folder / 'checkpoints' / path.name


def _checkpoints_of(path):
  """Returns the checkpoints that a path names: itself, or those of a run."""
  folder = path / 'checkpoints'
  return [folder / str(step) for step in seal.find_steps(folder)] if folder.exists() else [path]
