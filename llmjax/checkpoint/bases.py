"""The frozen base model of an adapter: adapter checkpoints do not contain it, they record which one it was.

A base is a checkpoint with a manifest. It is identified by the SHA-256 of its parameter files, so it may be moved, and
another one in its place is refused.
"""

import hashlib
import os

from etils import epath

from llmjax.checkpoint import manifest
from llmjax.config import ConfigError


def identify(checkpoint):
  """Return {'path', 'sha256'} of a checkpoint, to be stored as JSON; the hash covers its parameter files.

  Raises ConfigError if it has no complete manifest.
  """
  try:
    files = manifest.read_manifest(checkpoint).files
  except manifest.ManifestError as e:
    raise ConfigError([f'{checkpoint} is not loaded: {e}']) from e
  lines = [f'{name} {digest}\n' for name, (_, digest) in sorted(files.items()) if name.startswith('params/')]
  path = str(checkpoint) if '://' in str(checkpoint) else os.path.abspath(checkpoint)
  return {'path': path, 'sha256': hashlib.sha256(''.join(lines).encode()).hexdigest()}


def find_base(recorded, init_from, run):
  """Find the checkpoint that was recorded as the base, wherever it is now.

  Looks at its recorded path, `<run>/base`, train.init_from, and the runs next to this one.

  recorded: result of `identify`. run: the folder of the adapter's run. Raises ConfigError if the base is gone or
  another checkpoint is in its place.
  """
  path, run = epath.Path(recorded['path']), epath.Path(run)
  for candidate in _candidates(path, init_from, run):
    try:
      if identify(candidate)['sha256'] == recorded['sha256']:
        return candidate
    except ConfigError:
      continue  # Without a manifest it cannot be the base.
  sha256, link = f'SHA-256 of its parameters: {recorded["sha256"][:16]}...', f'ln -s FOLDER {run / "base"}'
  if manifest.is_legacy(path):
    raise ConfigError([f'{path} is the base of this adapter and has the old manifest name seal.json: run llmjax '
                       f'checkpoint migrate --workdir={path.parent.parent}'])
  if path.exists():
    raise ConfigError([f'{path} is not the base of this adapter: it has other weights than the adapter was trained on. '
                       f'Put the base back, or link to where it is now: {link} ({sha256})'])
  raise ConfigError([f'the base of this adapter, {path}, is gone; put it back, or link to where it is now: {link} '
                     f'({sha256})'])


def _candidates(path, init_from, run):
  """Yield the checkpoints that may be the base, most probable first."""
  yield path
  yield from _checkpoints_of(run / 'base')
  if init_from:
    yield from _checkpoints_of(epath.Path(init_from))
  try:
    siblings = sorted(run.parent.iterdir())
  except OSError:
    siblings = []
  for folder in siblings:  # The same step of each.
    yield folder / 'checkpoints' / path.name


def _checkpoints_of(path):
  """List the checkpoints of a run, or the path itself if it is no run's folder."""
  folder = path / 'checkpoints'
  return [folder / str(step) for step in manifest.find_steps(folder)] if folder.exists() else [path]
