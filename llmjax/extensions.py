"""Objects of the user's own modules, named as `module:name` in the config."""

import contextlib
import difflib
import functools
import importlib
import os
import re
import sys

from llmjax.config import ConfigError, one_line

_PATH = re.compile(r'[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*')


def is_path(value: str) -> bool:
  """Return whether a config value has the form `module:name`; both may be dotted."""
  return _PATH.fullmatch(value) is not None


def load(path: str, field: str):
  """Import and return the callable that `module:name` names.

  The module is looked up as by `python -m`: in the current folder first, then among the installed packages.

  field: dotted name of the config field, for messages.  Raises ConfigError with one line that names the field: a
  malformed path, a module that is missing or fails on import, a missing name, or an object that is not callable.
  """
  def error(problem):
    return ConfigError([f'{field}={path}: {problem}'])

  if not is_path(path):
    raise error('write the name of a module and of a function in it, such as my_module:my_function')
  module_name, _, name = path.partition(':')
  module = _import(module_name, error)
  try:
    value = functools.reduce(getattr, name.split('.'), module)
  except AttributeError as e:
    near = difflib.get_close_matches(name, [n for n in vars(module) if not n.startswith('_')], n=1)
    hint = f'did you mean {module_name}:{near[0]}?' if near else f'define it in {_file_of(module)}'
    raise error(f'the module {module_name} has no {name}; {hint}') from e
  if not callable(value):
    raise error(f'{name} is not callable, but of type {type(value).__name__}; name a function or a class')
  return value


@contextlib.contextmanager
def errors_of(path: str, field: str):
  """Turn an exception of the user's code into a ConfigError of one line with its place; a ConfigError passes."""
  try:
    yield
  except ConfigError:
    raise
  except Exception as e:
    raise ConfigError([f'{field}={path}: {type(e).__name__}: {one_line(e)}; correct {_place_of(path, e)}']) from e


def _import(name, error):
  """Import a module, with the current folder on the search path."""
  folder = os.getcwd()
  if folder not in sys.path and '' not in sys.path:
    sys.path.insert(0, folder)
  importlib.invalidate_caches()
  try:
    return importlib.import_module(name)
  except ModuleNotFoundError as e:
    if e.name and (name == e.name or name.startswith(f'{e.name}.')):
      raise error(f'there is no module {e.name} in {folder} or among the installed packages; run the command in the '
                  'folder that holds it, or install it') from e
    raise error(f'{name} imports {e.name}, which is not installed; install it') from e
  except (Exception, SystemExit) as e:  # The user's own code may raise anything.
    place = _place_of(name, e)
    raise error(f'importing {name} failed with {type(e).__name__}: {one_line(e)}; correct {place}') from e


def _file_of(module):
  return getattr(module, '__file__', None) or f'the module {module.__name__}'


def _place_of(name, error):
  """Return 'FILE, line N' of the innermost frame of an exception, or the module's name."""
  if isinstance(error, SyntaxError) and error.filename:
    return f'{error.filename}, line {error.lineno}'
  traceback = error.__traceback__
  while traceback is not None and traceback.tb_next is not None:
    traceback = traceback.tb_next
  file = traceback.tb_frame.f_code.co_filename if traceback else ''
  return f'{file}, line {traceback.tb_lineno}' if os.path.isfile(file) else f'the module {name}'
