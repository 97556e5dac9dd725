"""Paths in the config that a run records: absolute, and found again when the run's folder was moved.  No JAX here."""

import json
import os
import pathlib

# Settings that name files or folders: one each, or several.
PATHS = (('train', 'init_from'), ('distill', 'teacher'), ('rl', 'reward_model'), ('data', 'tokenizer'))
FOLDERS = (('data', 'sources'), ('evaluate', 'extra_sources'))


def absolute_paths(settings):
  """Returns a config's nested dicts with absolute paths, so that they mean the same in every working directory."""
  return _map_paths(settings, lambda path: path if '://' in path else os.path.abspath(path))


def find_paths(settings, workdir):
  """Returns a run's recorded config with paths that exist now, where they can be found.

  A path that is gone is looked for where it is from the run's folder as it was from the folder's old place.
  """
  try:
    old = json.loads((pathlib.Path(workdir) / 'environment.json').read_bytes())['workdir']
  except (OSError, ValueError, KeyError, TypeError):
    return settings

  def find(path):
    moved = os.path.normpath(os.path.join(os.path.abspath(workdir), os.path.relpath(path, old)))
    return moved if os.path.isabs(path) and not os.path.exists(path) and os.path.exists(moved) else path

  return _map_paths(settings, find) if isinstance(old, str) else settings


def _map_paths(settings, change):
  found = {group: dict(fields) if isinstance(fields, dict) else fields for group, fields in settings.items()}
  for group, name in (*PATHS, *FOLDERS):
    value = found[group].get(name) if isinstance(found.get(group), dict) else None
    if isinstance(value, str) and value:
      found[group][name] = change(value)
    elif isinstance(value, dict):
      found[group][name] = {change(path): weight for path, weight in value.items()}
    elif isinstance(value, list):
      found[group][name] = [change(path) for path in value]
  return found
