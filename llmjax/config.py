"""Build frozen, checked config dataclasses (specs) from nested dicts and command-line overrides.

A spec is a frozen dataclass whose fields are made by `setting`.  The spec of a command has a field per group (`train`,
`model`, ...), made by `group`, whose type is a spec too.  A spec may define

- `validate(self)`, which yields the problems between its fields, each starting with the name of a field;
- `base(cls, values)`, a class method that returns the values of the fields that are not set in `values`, such as those
  of a preset.

All problems are reported at once.  JAX is not imported, so that they are reported quickly.
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
import types
import typing
from typing import Any

from llmjax import renamed, secrets


class ConfigError(Exception):
  """Wrong settings.  problems: a printable line for each, which says what to write instead."""

  def __init__(self, problems):
    self.problems = [_printable_line(problem) for problem in problems]
    super().__init__('\n'.join(self.problems))

  def __reduce__(self):  # Pickled between processes.
    return type(self), (self.problems,)


def _printable_line(text):
  """Escape newlines and control characters, which names and values may contain, and shorten long texts."""
  text = text.replace('\n', ' ')
  if not text.isprintable():
    text = ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in text)
  return text if len(text) <= 1200 else f'{text[:600]} ... {text[-500:]}'


PATHS = ('path', 'file', 'folder')  # Kinds of `setting` whose values are paths.


def setting(default, doc, *, kind='', choices=None, minimum=None, maximum=None):
  """Return a dataclass field of a spec.

  doc: description, for `--help`.  choices, minimum, maximum: allowed values, bounds inclusive; of the items of a list;
  in a mapping, choices of the names and bounds of the numbers.
  kind: 'path' if the value is the path of a local file or folder that is read, 'file' or 'folder' if it is written;
  choices are then allowed besides paths.  'text': texts that may contain commas, at which `parse_text` does not split
  them.  'extension': choices, or `module:name` (see `extensions`).
  """
  metadata = {'doc': doc, 'kind': kind, 'choices': choices, 'minimum': minimum, 'maximum': maximum}
  if isinstance(default, dict):
    return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
  return dataclasses.field(default=default, metadata=metadata)


def group(spec_class):
  """Return a dataclass field that holds a nested spec."""
  return dataclasses.field(default_factory=spec_class)


def build(spec_class, recipe, overrides=(), elsewhere=False):
  """Build a spec from a recipe and overrides.

  recipe: nested mappings.  overrides: pairs of a dotted field name and text, such as ('train.steps', '200').
  elsewhere: another machine will run it; then `validate()`, which reads files, is called only if all paths exist here.
  Raises ConfigError with all problems: unknown fields, wrong types and values, and those that `validate()` yields.
  """
  problems = []
  values = {str(name): _copy(v) for name, v in recipe.items()}
  for name, text in overrides:
    _set_override(spec_class, values, name.split('.'), text, name, problems, spec_class)
  spec = _build(spec_class, values, '', problems, spec_class)
  # Checks between fields are meaningless while a field itself is wrong.
  if not problems and not (elsewhere and not all(os.path.exists(path) for *_, path in paths(spec, kinds=('path',)))):
    problems = [] if elsewhere else [f'{name}={path} {problem}' for name, kind, path in paths(spec)
                                     if (problem := write_problem(kind, path))]
    problems += find_problems(spec)
  if problems:
    raise ConfigError(problems)
  return spec


def paths(spec, prefix='', kinds=PATHS):
  """Yield (dotted name, kind, path) of every path that is set in a spec and its groups."""
  for field in dataclasses.fields(spec):
    value, name, kind = getattr(spec, field.name), prefix + field.name, field.metadata.get('kind')
    if dataclasses.is_dataclass(value):
      yield from paths(value, f'{name}.', kinds)
    elif kind in kinds:
      values = value if isinstance(value, (tuple, dict)) else (value,)
      yield from ((name, kind, path) for path in values if path and path not in (field.metadata['choices'] or ()))


def write_problem(kind, path):
  """Return why a 'file' or 'folder' cannot be written at a path, or ''.  Of another kind: ''."""
  if kind == 'folder' and os.path.lexists(path) and not os.path.isdir(path):
    return 'is not a folder; write the path of a folder'
  if kind == 'file' and os.path.isdir(path):
    return 'is a folder; write the path of a file'
  if kind == 'path':
    return ''
  existing = path
  while not os.path.lexists(existing):
    existing = os.path.dirname(existing.rstrip('/')) or '.'
  if existing != path and not os.path.isdir(existing):
    return f'cannot be written: {existing} is not a folder; write another path'
  if not os.access(existing, os.W_OK):
    return f'cannot be written: you have no permission to write to {existing}; write another path'
  return ''


def _copy(value):
  return {str(k): _copy(v) for k, v in value.items()} if isinstance(value, collections.abc.Mapping) else value


def shown(value, quote=True):
  """Format a value for an error message: one line, shortened if long."""
  text = repr(value) if quote or not str(value).isprintable() else str(value)
  return text if len(text) <= 80 else f'{text[:60]}... ({len(text):,} characters)'


def one_line(error):
  """Return the text of an exception in one line of at most 300 characters."""
  return ' '.join(str(error).split())[:300] or type(error).__name__


def find_problems(spec, prefix=''):
  """Yield the problems that `validate()` of a spec and of its groups yields."""
  for field in dataclasses.fields(spec):
    value = getattr(spec, field.name)
    if dataclasses.is_dataclass(value):
      yield from find_problems(value, f'{prefix}{field.name}.')
  if hasattr(spec, 'validate'):
    for problem in spec.validate():
      yield f'{prefix}{problem}'


def to_dict(spec) -> dict[str, Any]:
  """Return a spec as nested dicts for JSON, from which `build` makes an equal spec.  Secrets are masked."""
  return secrets.hide_within(json.loads(json.dumps(dataclasses.asdict(spec))))


def describe(spec_class, prefix='--config.', nested=True):
  """Yield (flag, type, default, documentation, choices or None) of all fields.  nested: include those of groups."""
  for field in dataclasses.fields(spec_class):
    if not dataclasses.is_dataclass(field.type):
      meta = field.metadata
      yield prefix + field.name, _type_name(field.type, meta['kind']), _default(field), meta['doc'], meta['choices']
    elif nested:
      yield from describe(field.type, f'{prefix}{field.name}.')


def _default(field):
  return field.default if field.default is not dataclasses.MISSING else field.default_factory()


def _fields(spec_class):
  return {f.name: f for f in dataclasses.fields(spec_class)}


def _unknown_field(name, spec_class):
  """Return the error message of a dotted name that is not a field of a spec, with the nearest that is."""
  known = [flag for flag, *_ in describe(spec_class, '')]
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


def _set_override(spec_class, values, path, text, name, problems, root):
  """Parse the text of an override and set it in nested values.

  path: names of the groups and the field in spec_class.  name: the dotted name in root, the spec of the command.
  """
  field = _fields(spec_class).get(path[0])
  is_group = field is not None and dataclasses.is_dataclass(field.type)
  if field is not None and typing.get_origin(field.type) is dict and len(path) > 1:
    entries = values.setdefault(path[0], {})  # An entry of a mapping, such as data.sources.corpus=0.5.
    if not isinstance(entries, dict):
      entries = values[path[0]] = {}
    entries['.'.join(path[1:])] = parse_text(typing.get_args(field.type)[1], text)
  elif is_group and len(path) == 1:
    problems.append(f'{name} is a group; set one of its fields: {", ".join(sorted(_fields(field.type)))}')
  elif field is None or (len(path) > 1 and not is_group):
    problems.append(_unknown_field(name, root))
  elif is_group:
    nested = values.setdefault(path[0], {})
    if isinstance(nested, dict):
      _set_override(field.type, nested, path[1:], text, name, problems, root)
  else:
    values[path[0]] = parse_text(field.type, text, field.metadata['kind'])


def _build(spec_class, values, prefix, problems, root):
  """Build a spec from nested values, and append unknown fields and wrong values to the problems."""
  base = spec_class.base(values) if hasattr(spec_class, 'base') else {}
  fields, arguments = _fields(spec_class), {}
  problems += [_unknown_field(prefix + name, root) for name in values if name not in fields]
  for name, field in fields.items():
    value = values.get(name, base.get(name, _default(field)))
    if dataclasses.is_dataclass(field.type):
      if dataclasses.is_dataclass(value):
        value = {}
      if isinstance(value, collections.abc.Mapping) and name in base:
        value = {**base[name], **value}
      if isinstance(value, collections.abc.Mapping):
        arguments[name] = _build(field.type, value, f'{prefix}{name}.', problems, root)
      else:
        problems.append(f'{prefix}{name} must be a group of fields, not {shown(value)}')
      continue
    try:
      arguments[name] = _check(field, _convert(field.type, value), prefix + name)
    except ValueError as e:
      is_list = isinstance(value, tuple) and all(isinstance(v, str) for v in value)
      problems.append(f'{prefix}{name}={shown(",".join(value), quote=False) if is_list else shown(value)} {e}')
  return None if problems else spec_class(**arguments)


def _check(field, value, name):
  """Return the value; raises ValueError if it, or an item of it, breaks the field's choices or bounds."""
  meta, is_mapping = field.metadata, isinstance(value, dict)
  has_items = is_mapping or isinstance(value, tuple)
  for item in (value if has_items else () if value is None else (value,)):
    if meta['choices'] is not None and item in meta['choices']:
      continue
    if meta['kind'] == 'extension' and ':' in str(item):  # The spec's `validate` loads it.
      continue
    if meta['kind'] in PATHS:
      if problem := path_problem(item):
        raise ValueError(f'has {shown(item)}, which {problem}' if has_items else problem)
    elif meta['choices'] is not None:
      if new := renamed.renamed_value(name, item):
        raise ValueError(f'has {shown(item)}, which' * has_items + f' is now called {new}; write {new}'[not has_items:])
      raise ValueError(_wrong_choice(item, meta['choices'], has_items))
    number = value[item] if is_mapping else item
    if meta['minimum'] is not None and number < meta['minimum']:
      raise ValueError(f'must be at least {meta["minimum"]}')
    if meta['maximum'] is not None and number > meta['maximum']:
      raise ValueError(f'must be at most {meta["maximum"]}')
  return value


def _wrong_choice(value, choices, is_item):
  """Return the error message of a value that is not one of the choices.  is_item: it is part of a list or mapping."""
  near = difflib.get_close_matches(str(value)[:80], [str(c) for c in choices], n=1)
  hint = f'; did you mean {near[0]}?' if near else ''
  known = ', '.join(str(c) for c in choices if c != '')
  if is_item:
    return f'has {shown(value)}, which is not one of {known}{hint}'
  return f'must be one of {known}{", or empty" if "" in choices else ""}{hint}'


def path_problem(path):
  """Return why a text cannot be a local path, such as gs://bucket/run, or ''."""
  if max(map(len, os.fsencode(path).split(b'/'))) > 255 or len(path) > 4000:
    return 'is too long for a path; names are limited to 255 bytes, and paths to 4,000'
  if '\0' in path:
    return 'contains a null byte, which a path cannot; leave it out'
  url = re.match(r'([A-Za-z][A-Za-z0-9+.-]+):/+', path)  # Also gs:/bucket, as pathlib shortens it.
  if not url:
    return ''
  if url[1].lower() == 'file':
    return f'is a URL; write the path itself, /{path[url.end():]}'
  return 'is a URL: remote storage is not supported yet; write a local path, such as that of a mounted bucket'


def _type_name(annotation, kind=''):
  """Return the name of a type in `--help`: int, path, list[str], dict[str, float]."""
  origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
  if origin is tuple:
    return f'list[{_type_name(arguments[0], kind)}]'
  if origin is dict:
    return f'dict[{_type_name(arguments[0], kind)}, {_type_name(arguments[1])}]'
  if annotation is str and kind in PATHS:
    return 'path'
  return annotation.__name__ if isinstance(annotation, type) else str(annotation)


def parse_text(annotation, text, kind=''):
  """Parse the text of a field on the command line; returns the text itself if it cannot be parsed.

  annotation: type of the field.  A list is a Python or JSON list, ["a, b", "c"], or items separated by commas: a,b.  If
  kind is 'text', a text without brackets is one item, including its commas and quotes.  A mapping is a Python or JSON
  dict, {"a": 0.7, "b": 0.3}, or names separated by commas, which get the value 1.
  """
  origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
  if annotation is str:
    return text
  if origin is dict and not text.lstrip().startswith('{'):
    # Unquoted, a shell expands {'a':0.7,'b':0.3} to a:0.7 and b:0.3, which are not names.
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
  """Return the value of a Python literal, or the text itself if it is not one."""
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
    return text


def _convert(annotation, value):
  """Convert a value to the annotated type.  Raises ValueError with the expected type."""
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
  raise TypeError(f'settings of type {annotation} are not supported')
