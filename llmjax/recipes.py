"""Load recipes, the files of `--config`."""

import collections.abc
import difflib
import json
import os
import pathlib
import runpy
from typing import Any

from ml_collections import config_dict

from llmjax.config import ConfigError, one_line, path_problem, shown

SUFFIXES = ('.py', '.json')
EXAMPLE = 'configs/pretrain/quickstart.py'


def load_recipe(path: str) -> dict[str, Any]:
  """Return a recipe as nested dicts: `get_config()` of a Python file, or the object in a JSON file.

  `FILE.py:NAME` overrides the fields of the recipe by those of the file's `VARIANTS[NAME]`, also nested dicts.
  Raises ConfigError if the file or variant is missing, fails, or is not a recipe.
  """
  if problem := path_problem(path):
    raise ConfigError([f'--config={shown(path)} {problem}'])
  variant = ''
  if not os.path.exists(path) and '.py:' in path:
    path, _, variant = path.partition('.py:')
    path += '.py'
  if problem := _file_problem(pathlib.Path(path)):
    raise ConfigError([f'--config={shown(path, quote=False)}{problem}'])
  is_json, variants = path.endswith('.json'), {}
  try:
    if is_json:
      recipe = json.loads(pathlib.Path(path).read_bytes())
    else:
      module = runpy.run_path(path)
      recipe, variants = module['get_config'](), module.get('VARIANTS', {})
  except json.JSONDecodeError as e:
    raise ConfigError([f'--config={path} is not JSON: {e}']) from e
  except (Exception, SystemExit) as e:  # A recipe is a program of the user, which may raise anything.
    problem = ('the file must define get_config()' if isinstance(e, KeyError) and e.args == ('get_config',) else
               f'{type(e).__name__}: {one_line(e)}')
    raise ConfigError([f'--config={path}: {problem}']) from e
  if isinstance(recipe, config_dict.ConfigDict):
    recipe = recipe.to_dict()
  if not isinstance(recipe, dict):
    expected = 'the file must contain a JSON object' if is_json else 'get_config() must return a ConfigDict'
    raise ConfigError([f'--config={path}: {expected}, not {type(recipe).__name__}'])
  if not variant:
    return recipe
  variants = variants if isinstance(variants, collections.abc.Mapping) else {}
  if variant not in variants:
    known = f'write one of {", ".join(variants)}' if variants else 'the recipe has none'
    raise ConfigError([f'--config={path}:{shown(variant, quote=False)}: there is no such variant; {known}'])
  return _merge(recipe, variants[variant])


def _file_problem(file):
  """Return why a path is not that of a recipe file, or ''."""
  if os.path.isdir(file):
    recipes = sorted(path for path in file.glob('*') if path.suffix in SUFFIXES)
    return f' is a folder; write the path of a recipe, such as {recipes[0] if recipes else EXAMPLE}'
  if not os.path.isfile(file):
    try:
      names = [name for name in os.listdir(file.parent) if name.endswith(SUFFIXES)]
    except (OSError, ValueError):
      names = []
    near = [str(file.parent / name) for name in difflib.get_close_matches(file.name[:255], names, n=1)]
    if not near and file.suffix in SUFFIXES:
      near = sorted(map(str, file.parent.glob(f'*/{file.name[:255]}')))
    hint = f'did you mean {near[0]}?' if near else f'write the path of a recipe, such as {EXAMPLE}'
    return f': there is no such file; {hint}'
  if file.suffix not in SUFFIXES:
    return (' is not a recipe; write a .py file that defines get_config(), or a .json file such as the config.json of '
            'a run')
  return ''


def _merge(base, changes):
  """Return nested mappings with the values of `changes` in place of those of `base`."""
  if not isinstance(changes, collections.abc.Mapping) or not isinstance(base, collections.abc.Mapping):
    return changes
  return {**base, **{key: _merge(base.get(key), value) for key, value in changes.items()}}
