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


def find_base(recorded, source):
  """Returns the path of the recorded base.  source: train.init_from, where to look when it is not where it was.

  recorded: what `identify` said.  Raises ConfigError when another checkpoint is in its place, or it is gone.
  """
  path = epath.Path(recorded['path'])
  if path.exists():
    if identify(path)['sha256'] != recorded['sha256']:
      raise ConfigError([f'{path} is not the base of this adapter: it has other weights than the adapter was trained '
                         f'on (SHA-256 of the parameters was {recorded["sha256"][:16]}...); put the base back'])
    return path
  for other in _candidates(source):
    try:
      if identify(other)['sha256'] == recorded['sha256']:
        return other
    except ConfigError:
      continue  # What has no seal cannot be it.
  raise ConfigError([f'the base of this adapter, {path}, is gone; put it back, or name where it is now with '
                     f'train.init_from (SHA-256 of its parameters: {recorded["sha256"][:16]}...)'])


def _candidates(source):
  """Returns the checkpoints that a path names: itself, or those of a run."""
  if not source:
    return []
  path = epath.Path(source)
  folder = path / 'checkpoints'
  if folder.exists():
    return [folder / str(step) for step in seal.find_steps(folder)]
  return [path] if path.exists() else []
