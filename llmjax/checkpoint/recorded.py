"""Paths in the config of a run: recorded as absolute, and found again after the run's folder moved. No JAX here."""

import json
import os
import pathlib

# Fields that hold one path, and fields that hold several.
PATHS = (('train', 'init_from'), ('distill', 'teacher'), ('rl', 'reward_model'), ('data', 'tokenizer'))
FOLDERS = (('data', 'sources'), ('evaluate', 'extra_sources'))


def absolute_paths(settings):
  """Return a config's nested dicts with absolute paths, which mean the same in every working directory."""
  return _map_paths(settings, lambda path: path if '://' in path else os.path.abspath(path))


def find_paths(settings, workdir):
  """Return a run's recorded config with missing paths replaced by existing ones where possible.

  A missing path is looked up relative to the run's folder, as it was relative to the folder's recorded place.
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
  changed = {group: dict(fields) if isinstance(fields, dict) else fields for group, fields in settings.items()}
  for group, name in (*PATHS, *FOLDERS):
    value = changed[group].get(name) if isinstance(changed.get(group), dict) else None
    if isinstance(value, str) and value:
      changed[group][name] = change(value)
    elif isinstance(value, dict):
      changed[group][name] = {change(path): weight for path, weight in value.items()}
    elif isinstance(value, list):
      changed[group][name] = [change(path) for path in value]
  return changed
