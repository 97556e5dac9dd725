"""The text of a Python installation: language reference, sources of the standard library, docstrings.

About 11 MB: the language reference (pydoc_data.topics), the sources, and the docstrings of modules written in C.
Losses are comparable only between equal versions of Python.
"""

import importlib
import inspect
import os
import pathlib
import sys
import sysconfig
import warnings

from llmjax.config import ConfigError
from llmjax.data.documents import Document, Limits, Rejected, check_text

# Tables, tests, demos and tools; pydoc_data is read as topics.
EXCLUDED = frozenset((
    'encodings', 'test', 'tests', 'idlelib', 'lib2to3', 'turtledemo', 'pydoc_data', 'ensurepip',
    'site-packages', 'dist-packages', '__pycache__', 'idle_test', '__phello__'))
# Fixed lists, about 6 % of the bytes each on 3.11 to 3.13: a random choice of so few modules would be uneven.
HELD_OUT_MODULES = {
    'validation': ('statistics', 'textwrap', 'heapq', 'calendar', 'zipfile', 'email'),
    'test': ('fractions', 'difflib', 'argparse', 'shelve', 'sched', 'tarfile', 'ipaddress',
             'configparser')}
# Many topics are excerpts of others (`with` of `compound`); these share no passage with others.
HELD_OUT_TOPICS = {
    'validation': ('import', 'typesmapping', 'slicings', 'lambda', 'assert'),
    'test': ('strings', 'calls', 'raise', 'yield', 'booleans', 'subscriptions')}
_NO_TEXT = ('this Python has no sources to read ({where}): zipped and stripped installations leave '
            'them out; use a Python from python.org, your system or uv, or your own text with '
            '`llmjax prepare --text-dir=DIR`')


def version() -> str:
  """Return the version of the corpus, that of Python."""
  return '.'.join(map(str, sys.version_info[:3]))


def split_of(module: str) -> str:
  """Return the split of a module by its top-level name; a C accelerator belongs to its module."""
  name = module.split('.')[0].lstrip('_')
  return next((s for s, names in HELD_OUT_MODULES.items() if name in names), 'train')


def read_python_docs(*, include_site_packages=False, library=None):
  """Yield the Documents (with their splits) and Rejected of this Python, in a fixed order.

  library: folder of the standard library, by default this Python's.  Raises ConfigError where there are no sources or
  no topics.
  """
  library = pathlib.Path(library or sysconfig.get_path('stdlib'))
  sources = _list_sources(library)
  if len(sources) < 50:
    raise ConfigError([_NO_TEXT.format(where=f'{library} holds {len(sources)} modules')])
  yield from _read_topics()
  for path in sources:
    relative = path.relative_to(library)
    module = '.'.join(relative.with_suffix('').parts)
    yield _read_source(path, f'source/{relative.as_posix()}', split_of(module))
  for module in _compiled_modules(library):
    if text := _docstrings(module):
      yield _checked(text, f'builtin/{module}', split_of(module))
  if include_site_packages:
    # In train only, so that the held-out text is the same for everyone.
    folder = pathlib.Path(sysconfig.get_path('purelib'))
    for path in sorted(folder.rglob('*.py')):
      relative = path.relative_to(folder)
      if not EXCLUDED & set(relative.parts) and path.stat().st_size:
        yield _read_source(path, f'site-packages/{relative.as_posix()}', 'train')


def _read_topics():
  try:
    topics = importlib.import_module('pydoc_data.topics').topics
  except ImportError as e:
    raise ConfigError([_NO_TEXT.format(where='pydoc_data.topics is missing')]) from e
  for name in sorted(topics):
    split = next((s for s, names in HELD_OUT_TOPICS.items() if name in names), 'train')
    yield _checked(topics[name], f'topic/{name}', split)


def _list_sources(library):
  """Return the source files that are not empty."""
  paths = []
  for folder, folders, names in os.walk(library):
    folders[:] = sorted(f for f in folders if f not in EXCLUDED and not f.startswith('config-'))
    paths += [pathlib.Path(folder, n) for n in sorted(names)
              if n.endswith('.py') and not n.startswith('_sysconfigdata')]
  return [path for path in paths if path.stat().st_size]


def _read_source(path, name, split):
  try:
    text = path.read_bytes().decode()
  except UnicodeDecodeError as e:
    return Rejected(name, f'invalid UTF-8 (byte 0x{e.object[e.start]:02x})', e.start)
  except OSError as e:
    return Rejected(name, f'cannot be read: {e.strerror}')
  return _checked(text, name, split)


def _checked(text, name, split):
  item = check_text(text, name, name, Limits(()))
  return item if isinstance(item, Rejected) else Document(item.name, item.text, item.file, split)


def _compiled_modules(library):
  """Return the names of standard modules without Python source."""
  names = set(sys.builtin_module_names)
  for path in (library / 'lib-dynload').glob('*'):
    names.add(path.name.split('.')[0])
  odd = ('_test', '_xx', 'xx', '_tkinter', '_ctypes_test', 'readline', '_sysconfigdata', '_idle')
  return sorted(n for n in names & set(sys.stdlib_module_names) if not n.startswith(odd))


def _docstrings(name):
  """Return the docstrings of a compiled module as one text, '' if there are none."""
  try:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')
      module = importlib.import_module(name)
  except ImportError:
    return ''  # A shared library is missing.
  page = [f'{name}\n\n{inspect.cleandoc(module.__doc__)}\n'] if module.__doc__ else []
  for key, value in sorted(vars(module).items()):
    owner = getattr(value, '__module__', name)
    if key.startswith('_') or owner != name or not callable(value):
      continue
    if text := _own_doc(value):
      page.append(f'{name}.{key}\n\n{text}\n')
    if isinstance(value, type):
      for attribute, member in sorted(vars(value).items()):
        if not attribute.startswith('_') and (text := _own_doc(member)):
          page.append(f'{name}.{key}.{attribute}\n\n{text}\n')
  return '\n'.join(page)


def _own_doc(value):
  text = getattr(value, '__doc__', None)
  if isinstance(value, (int, float, str, bytes, tuple, dict)) or not isinstance(text, str):
    return ''
  return inspect.cleandoc(text)
