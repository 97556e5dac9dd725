"""Recipes and overrides become frozen specs; every problem is reported, all of them at once.

A spec is a frozen dataclass whose fields are made with `setting`.  A command's spec is a dataclass of
groups (`train`, `model`, ...), each itself a spec.  Nothing here imports JAX, so a wrong config is
refused in well under a second.
"""

import ast
import collections.abc
import dataclasses
import difflib
import json
import math
import os
import pathlib
import re
import runpy
import types
import typing
from typing import Any

from ml_collections import config_dict

from llmjax import renamed, secrets


class ConfigError(Exception):
  """Wrong settings.  `problems` has one printable line for each, saying what to write instead."""

  def __init__(self, problems):
    self.problems = [_printable_line(problem) for problem in problems]
    super().__init__('\n'.join(self.problems))

  def __reduce__(self):  # As processes hand errors to one another.
    return type(self), (self.problems,)


def _printable_line(text):
  """Returns what a terminal shows safely in one line, whatever names and values are within."""
  text = text.replace('\n', ' ')
  if not text.isprintable():
    text = ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in text)
  return text if len(text) <= 1200 else f'{text[:600]} ... {text[-500:]}'


def setting(default, doc, *, kind='', choices=None, minimum=None, maximum=None):
  """Returns a dataclass field with its documentation, its choices and simple bounds (inclusive).

  kind: 'path' of local files and folders that are read, 'file' or 'folder' of one that is written; each may also be
  one of `choices`.  'text' where a comma is part of the text, so that `parse_text` does not split at it.  'extension'
  of names that may also be `module:name` (see `extensions`).  Of a list the
  choices and bounds hold for each item, of a mapping the choices for its names and the bounds for its numbers.
  """
  metadata = {'doc': doc, 'kind': kind, 'choices': choices, 'minimum': minimum, 'maximum': maximum}
  if isinstance(default, dict):
    return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
  return dataclasses.field(default=default, metadata=metadata)


PATHS = ('path', 'file', 'folder')  # Kinds of `setting` whose values are paths.


def group(spec_class):
  """Returns a dataclass field that holds a nested spec with its own defaults."""
  return dataclasses.field(default_factory=spec_class)


_RECIPES = ('.py', '.json')


def _recipes(folder):
  return [p for p in folder.glob('*') if p.suffix in _RECIPES]


def load_recipe(path: str) -> dict[str, Any]:
  """Returns a recipe as nested dicts: `get_config()` of a Python file, or a JSON object.

  `FILE.py:NAME` lays over it the fields of the file's `VARIANTS[NAME]`, nested dicts as well.
  Raises ConfigError when the file or the variant is missing, fails, or holds something else.
  """
  if problem := path_problem(path):
    raise ConfigError([f'--config={shown(path)} {problem}'])
  variant = ''
  if not os.path.exists(path) and '.py:' in path:
    path, _, variant = path.partition('.py:')
    path += '.py'
  file, variants = pathlib.Path(path), {}
  if path and os.path.isdir(path):
    within = sorted(p for p in file.glob('*') if p.suffix in ('.py', '.json'))
    raise ConfigError([f'--config={path} is a folder; name a recipe' + (
        f' in it, such as {within[0]}' if within else ' such as configs/pretrain/quickstart.py')])
  if not os.path.isfile(path):
    try:
      beside = [name for name in os.listdir(file.parent) if name.endswith(('.py', '.json'))]
    except (OSError, ValueError):
      beside = []
    near = difflib.get_close_matches(file.name[:255], beside, n=1)
    found = [str(file.parent / near[0])] if near else (
        sorted(map(str, file.parent.glob(f'*/{file.name[:255]}'))) if file.suffix in ('.py', '.json') else [])
    hint = f'; did you mean {found[0]}?' if found else (
        '; give the path of a recipe such as configs/pretrain/quickstart.py')
    raise ConfigError([f'--config={shown(path, quote=False)}: there is no such file{hint}'])
  if file.suffix not in ('.py', '.json'):
    raise ConfigError([f'--config={path} is no recipe: a recipe is a .py file with get_config(), or a .json file such '
                       "as a run's config.json"])
  try:
    if file.suffix == '.json':
      recipe, variants = json.loads(file.read_bytes()), {}
    else:
      made = runpy.run_path(str(file))
      recipe, variants = made['get_config'](), made.get('VARIANTS', {})
  except KeyError as e:
    raise ConfigError([f'--config={path}: the file must define get_config()']
                      if e.args == ('get_config',) else [f'--config={path}: KeyError: {e}']) from e
  except json.JSONDecodeError as e:
    raise ConfigError([f'--config={path} is not JSON: {e}']) from e
  except (Exception, SystemExit) as e:  # A recipe is the user's program: any error in it is theirs to see.
    raise ConfigError([f'--config={path}: {type(e).__name__}: {one_line(e)}']) from e
  if isinstance(recipe, config_dict.ConfigDict):
    recipe = recipe.to_dict()
  if not isinstance(recipe, dict):
    what = 'it must hold a JSON object' if file.suffix == '.json' else 'get_config() must return a ConfigDict'
    raise ConfigError([f'--config={path}: {what}, not {type(recipe).__name__}'])
  variants = variants if isinstance(variants, collections.abc.Mapping) else {}
  if variant and variant not in variants:
    known = f'known: {", ".join(variants)}' if variants else 'it has none'
    raise ConfigError([f'--config={path}:{shown(variant, quote=False)}: there is no such variant; {known}'])
  return _overlay(recipe, variants[variant]) if variant else recipe


def _overlay(below, above):
  """Returns nested mappings with the fields of the upper one in place of the lower one's."""
  if not isinstance(above, collections.abc.Mapping) or not isinstance(below, collections.abc.Mapping):
    return above
  return {**below, **{key: _overlay(below.get(key), value) for key, value in above.items()}}


def build(spec_class, recipe, overrides=(), elsewhere=False):
  """Returns the frozen spec that the recipe and then the overrides ask for.

  recipe: nested mapping.  overrides: pairs ('train.steps', '200') of dotted name and text.  elsewhere: another machine
  will run it, so that `validate()`, which reads files, counts only where all paths exist on this one.
  Raises ConfigError with every problem: unknown fields, wrong types, bounds, and whatever the
  specs' own `validate()` find.
  """
  problems = []
  values = {str(name): _copy(v) for name, v in recipe.items()}
  for name, text in overrides:
    _place(spec_class, values, name.split('.'), text, name, problems, spec_class)
  spec = _build(spec_class, values, '', problems, spec_class)
  # Checks between fields mean nothing while a field itself is wrong.
  if not problems and not (elsewhere and not all(os.path.exists(path) for *_, path in paths(spec, kinds=('path',)))):
    problems = [] if elsewhere else [f'{name}={path} {problem}' for name, kind, path in paths(spec)
                                     if (problem := write_problem(kind, path))]
    problems += find_problems(spec)
  if problems:
    raise ConfigError(problems)
  return spec


def paths(spec, prefix='', kinds=PATHS):
  """Yields (dotted name, kind, path) of every path that is set in a spec and the specs nested in it."""
  for field in dataclasses.fields(spec):
    value, name, kind = getattr(spec, field.name), prefix + field.name, field.metadata.get('kind')
    if dataclasses.is_dataclass(value):
      yield from paths(value, f'{name}.', kinds)
    elif kind in kinds:
      several = value if isinstance(value, (tuple, dict)) else (value,)
      yield from ((name, kind, path) for path in several if path and path not in (field.metadata['choices'] or ()))


def write_problem(kind, path):
  """Returns why a file or folder cannot be written at a path, or ''; of a path that is read, ''."""
  if kind == 'folder' and os.path.lexists(path) and not os.path.isdir(path):
    return 'is no folder; name a folder'
  if kind == 'file' and os.path.isdir(path):
    return 'is a folder; name a file'
  if kind == 'path':
    return ''
  place = path
  while not os.path.lexists(place):
    place = os.path.dirname(place.rstrip('/')) or '.'
  if place != path and not os.path.isdir(place):
    return f'cannot be written: {place} is no folder'
  return '' if os.access(place, os.W_OK) else f'cannot be written: {place} is read-only for you'


def _copy(value):
  return {str(k): _copy(v) for k, v in value.items()} if isinstance(value, collections.abc.Mapping) else value


def shown(value, quote=True):
  """Returns a value as an error message shows it: in one line, and not more of it than tells it apart."""
  text = repr(value) if quote or not str(value).isprintable() else str(value)
  return text if len(text) <= 80 else f'{text[:60]}... ({len(text):,} characters)'


def one_line(error):
  """Returns an exception's text in one line of at most 300 characters."""
  return ' '.join(str(error).split())[:300] or type(error).__name__


def find_problems(spec, prefix=''):
  """Yields what the spec and the specs nested in it find wrong with themselves."""
  for field in dataclasses.fields(spec):
    value = getattr(spec, field.name)
    if dataclasses.is_dataclass(value):
      yield from find_problems(value, f'{prefix}{field.name}.')
  if hasattr(spec, 'validate'):
    for problem in spec.validate():
      yield f'{prefix}{problem}'


def to_dict(spec) -> dict[str, Any]:
  """Returns the spec as nested plain dicts; `build` turns them back into an equal spec.

  Secrets within it are `***` (see `secrets`): this is what is written and shown of a config.
  """
  return secrets.hide_within(json.loads(json.dumps(dataclasses.asdict(spec))))


def describe(spec_class, prefix='--config.'):
  """Yields (flag, type, default, documentation, choices or None) of every field, nested ones included."""
  for field in dataclasses.fields(spec_class):
    if dataclasses.is_dataclass(field.type):
      yield from describe(field.type, f'{prefix}{field.name}.')
    else:
      meta = field.metadata
      yield prefix + field.name, _type_name(field.type, meta['kind']), _default(field), meta['doc'], meta['choices']


def _default(field):
  if field.default is not dataclasses.MISSING:
    return field.default
  return field.default_factory()


def _fields(spec_class):
  return {f.name: f for f in dataclasses.fields(spec_class)}


def _unknown(name, root):
  """Returns the message for a field that does not exist, naming the nearest that does."""
  known = [flag for flag, *_ in describe(root, '')]
  if len(name) > 200:
    return f'{shown(name)} is not a field'
  if name in renamed.FIELDS:
    return f'{name} is now called {renamed.FIELDS[name]}; write {renamed.FIELDS[name]}'
  last = name.split('.')[-1]
  near = ([k for k in known if k.split('.')[-1] == last] or
          difflib.get_close_matches(name, known, n=1, cutoff=0.75) or
          [k for k in known if k.split('.')[-1] in difflib.get_close_matches(
              last, [k.split('.')[-1] for k in known], n=1, cutoff=0.6)])
  if near:
    return f'{name} is not a field; did you mean {near[0]}?'
  siblings = [k for k in known if k.rpartition('.')[0] == name.rpartition('.')[0]]
  known = siblings or sorted({k.split('.')[0] for k in known})
  return f'{name} is not a field; known here: {", ".join(k.split(".")[-1] for k in known)}'


def _place(spec_class, values, path, text, name, problems, root):
  """Parses one override and writes it into the nested values."""
  field = _fields(spec_class).get(path[0])
  is_group = field is not None and dataclasses.is_dataclass(field.type)
  if field is not None and typing.get_origin(field.type) is dict and len(path) > 1:
    entry = values.setdefault(path[0], {})  # A mapping takes `data.sources.corpus=0.5`.
    if not isinstance(entry, dict):
      entry = values[path[0]] = {}
    entry['.'.join(path[1:])] = parse_text(typing.get_args(field.type)[1], text)
    return
  if is_group and len(path) == 1:
    problems.append(f'{name} is a group; set one of its fields: '
                    f'{", ".join(sorted(_fields(field.type)))}')
    return
  if field is None or (len(path) > 1 and not is_group):
    problems.append(_unknown(name, root))
    return
  if len(path) > 1:
    nested = values.setdefault(path[0], {})
    if isinstance(nested, dict):
      _place(field.type, nested, path[1:], text, name, problems, root)
  else:
    values[path[0]] = parse_text(field.type, text, field.metadata['kind'])


def _build(spec_class, values, prefix, problems, root):
  """Returns a spec of the class, noting every unknown field and every wrong value."""
  base = spec_class.base(values) if hasattr(spec_class, 'base') else {}
  fields, arguments = _fields(spec_class), {}
  for name in values:
    if name not in fields:
      problems.append(_unknown(prefix + name, root))
  for name, field in fields.items():
    value = values.get(name, base.get(name, _default(field)))
    if dataclasses.is_dataclass(field.type):
      if dataclasses.is_dataclass(value):
        value = {}
      if isinstance(value, collections.abc.Mapping) and name in base:
        value = {**base[name], **value}
      if not isinstance(value, collections.abc.Mapping):
        problems.append(f'{prefix}{name} is a group of fields, not {shown(value)}')
        continue
      arguments[name] = _build(field.type, value, f'{prefix}{name}.', problems, root)
    else:
      try:
        arguments[name] = _check(field, _convert(field.type, value), prefix + name)
      except ValueError as e:
        plain = isinstance(value, tuple) and all(isinstance(v, str) for v in value)  # As they were typed.
        problems.append(f'{prefix}{name}={shown(",".join(value), quote=False) if plain else shown(value)} {e}')
  return None if problems else spec_class(**arguments)


def _check(field, value, name):
  """Returns the value; raises ValueError when it breaks the field's bounds."""
  meta, is_mapping = field.metadata, isinstance(value, dict)
  many = is_mapping or isinstance(value, tuple)
  for item in (value if many else () if value is None else (value,)):
    if meta['choices'] is not None and item in meta['choices']:
      continue
    if meta['kind'] == 'extension' and ':' in str(item):  # The spec's `validate` loads it.
      continue
    if meta['kind'] in PATHS:
      if problem := path_problem(item):
        raise ValueError(f'has {shown(item)}, which {problem}' if many else problem)
    elif meta['choices'] is not None:
      new = renamed.renamed_value(name, item)
      if new:
        raise ValueError(f'has {shown(item)}, which' * many + f' is now called {new}; write {new}'[not many:])
      raise ValueError(_wrong_choice(item, meta['choices'], many))
    number = value[item] if is_mapping else item
    if meta['minimum'] is not None and number < meta['minimum']:
      raise ValueError(f'must be at least {meta["minimum"]}')
    if meta['maximum'] is not None and number > meta['maximum']:
      raise ValueError(f'must be at most {meta["maximum"]}')
  return value


def _wrong_choice(value, choices, many):
  """Returns what to say of a value that is none of the choices.  many: it is one item of a list or a mapping."""
  near = difflib.get_close_matches(str(value)[:80], [str(c) for c in choices], n=1)
  hint = f'; did you mean {near[0]}?' if near else ''
  known = ', '.join(str(c) for c in choices if c != '')
  if many:
    return f'has {shown(value)}, which is not one of {known}{hint}'
  return f'must be one of {known}{", or empty" if "" in choices else ""}{hint}'


def path_problem(path):
  """Returns what to say of a path that no file of this machine can have, such as gs://bucket/run; '' for others."""
  if max(map(len, os.fsencode(path).split(b'/'))) > 255 or len(path) > 4000:
    return 'is too long for a path: a name has 255 bytes at most, and a path 4,000'
  if '\0' in path:
    return 'has a zero byte, which no path may have'
  found = re.match(r'([A-Za-z][A-Za-z0-9+.-]+):/+', path)  # Also `gs:/bucket`, as path libraries shorten it.
  if not found:
    return ''
  if found[1].lower() == 'file':
    return f'is a URL; write the path itself, /{path[found.end():]}'
  return 'is a URL: remote storage is not supported yet; give a path of this machine, such as a mounted bucket'


def _type_name(annotation, kind=''):
  """Returns a type as `--help` writes it: int, path, list[str], dict[str, float]."""
  origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
  if origin is tuple:
    return f'list[{_type_name(arguments[0], kind)}]'
  if origin is dict:
    return f'dict[{_type_name(arguments[0], kind)}, {_type_name(arguments[1])}]'
  if annotation is str and kind in PATHS:
    return 'path'
  return annotation.__name__ if isinstance(annotation, type) else str(annotation)


def parse_text(annotation, text, kind=''):
  """Returns the value that a command-line text stands for, or the text where it stands for none.

  A list is written as Python or JSON write it, ["a, b", "c"], or as names with commas between them, a,b.  Where the
  field is of kind 'text' one text without brackets is one item, whatever commas and quotes are in it.  A mapping is
  written as {"a": 0.7, "b": 0.3}, or as names alone, which count alike.
  """
  origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
  if annotation is str:
    return text
  if origin is dict and not text.lstrip().startswith('{'):
    # Without quotes a shell makes of {'a':0.7,'b':0.3} one a:0.7 and one b:0.3, which are not two names.
    return text if re.search(r':\s*[0-9.]+$', text) else dict.fromkeys(_split(text), 1.0)
  if origin is tuple and arguments[0] is str:
    value = _literal(text)
    if isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value):
      return tuple(value)
    if kind == 'text':
      return (text,) if text else ()
    return (value,) if isinstance(value, str) and value != text else _split(text)
  lowered = text.strip().lower()
  if lowered in ('true', 'false'):
    return lowered == 'true'
  if lowered in ('none', 'null'):
    return None
  value = _literal(text)
  return _split(text) if origin is tuple and value is text else value


def _split(text):
  return tuple(part.strip() for part in text.split(',') if part.strip())


def _literal(text):
  """Returns the value of a Python literal; the text itself where it is none."""
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
    return text


def _convert(annotation, value):
  """Returns the value as the annotated type; raises ValueError saying what is wanted."""
  origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
  if origin in (typing.Union, types.UnionType):
    if value is None:
      return None
    return _convert(next(a for a in arguments if a is not type(None)), value)
  if origin is tuple:
    if isinstance(value, str) or not isinstance(value, collections.abc.Iterable):
      value = (value,)
    return tuple(_convert(arguments[0], v) for v in value)
  if origin is dict:
    if not isinstance(value, collections.abc.Mapping):
      raise ValueError('must map names to numbers, such as {"corpus": 1.0}')
    try:
      return {str(k): _convert(arguments[1], v) for k, v in value.items()}
    except ValueError as e:
      raise ValueError('must map names to numbers, such as {"corpus": 1.0}') from e
  if annotation is bool:
    if value in (True, False):
      return bool(value)
    raise ValueError('must be true or false')
  if annotation in (int, float):
    if isinstance(value, bool) or not isinstance(value, (int, float)) or (
        annotation is int and isinstance(value, float) and not value.is_integer()):
      raise ValueError(f'must be {"a whole number" if annotation is int else "a number"}')
    if isinstance(value, int) and abs(value) >= 1 << 63:
      raise ValueError(f'must be at most {(1 << 63) - 1}')
    if not math.isfinite(value):
      raise ValueError('must be a finite number')
    return annotation(value)
  if annotation is str:
    if not isinstance(value, (str, pathlib.PurePath)):
      raise ValueError('must be text')
    return str(value)
  raise TypeError(f'a setting cannot have the type {annotation}')
