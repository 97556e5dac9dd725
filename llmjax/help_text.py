"""The texts of `llmjax help` and `llmjax COMMAND --help`."""

import dataclasses
import shutil
import textwrap

import llmjax
from llmjax import config
from llmjax.command_table import COMMANDS, load


def overview(prefix=''):
  """Return the list of the commands whose names start with the prefix."""
  commands = {name: command for name, command in COMMANDS.items() if name.startswith(prefix)}
  width = max(map(len, commands))
  lines = [f'llmjax {llmjax.__version__}: train, evaluate and use language models with JAX.', '',
           f'usage: llmjax {prefix}COMMAND [--FLAG=VALUE ...]', '']
  for name, command in commands.items():
    lines += _wrap(command.summary, ' ' * (width + 4), f'  {name:<{width}}  ')
  return '\n'.join([*lines, '', '`llmjax COMMAND --help` lists the flags and config fields of a command.'])


def command_help(name):
  """Return the flags and config fields of a command, with types, defaults, choices and descriptions."""
  command = COMMANDS[name]
  lines = [*_wrap(f'llmjax {name}: {command.summary}', '  '), '',
           ' \\\n'.join(_wrap(command.example, '    ', 'example: ', margin=2)), '', 'flags:']
  lines += _describe_fields(load(command.options), '--')
  if command.spec:
    lines += ['', 'config: --config=FILE reads a recipe, --config.FIELD=VALUE overrides it',
              '  lists: --config.FIELD=a,b or --config.FIELD=\'["a, b", "c"]\'',
              '  dicts: --config.FIELD=\'{"a": 0.7, "b": 0.3}\' or --config.FIELD.a=0.7']
    lines += _describe_groups(load(command.spec))
  return '\n'.join(lines)


def _describe_groups(spec_class):
  """Yield the lines of all fields of a config, group by group."""
  if ungrouped := list(_describe_fields(spec_class, '--config.')):
    yield from ['', *ungrouped]
  for field in dataclasses.fields(spec_class):
    if dataclasses.is_dataclass(field.type):
      summary = field.type.__doc__.partition('\n')[0].partition('.  ')[0].rstrip('.')
      yield ''
      yield from _wrap(f'{field.name}: {summary.removeprefix(f"The `{field.name}` group: ")}', '  ')
      yield from _describe_fields(field.type, f'--config.{field.name}.')


def _describe_fields(spec_class, prefix):
  """Yield the lines of the fields of a spec, except for nested groups."""
  for flag, kind, default, doc, choices in config.describe(spec_class, prefix, nested=False):
    flag = flag.replace('_', '-') if prefix == '--' else flag  # As in examples; the parser takes both.
    default = list(default) if isinstance(default, tuple) else default
    yield from _wrap(f'{flag} ({kind}, default: {default!r})', '      ', '  ')
    if choices is not None:
      names = ', '.join(str(choice) for choice in choices if choice != '')
      yield from _wrap(f'{"any" if kind.startswith(("list", "dict")) else "one"} of {names}' +
                       ', or a path' * (kind == 'path') + ', or empty' * ('' in choices), '        ', '      ')
    yield from _wrap(doc, '      ', '      ')


def _wrap(text, indent='', first='', margin=0):
  """Return the lines of a text as wide as the terminal, at most 80 columns, less `margin`.

  indent: of the lines after the first.  first: start of the first line.
  """
  width = min(max(shutil.get_terminal_size().columns, 40), 80) - margin
  return textwrap.wrap(text, width, initial_indent=first, subsequent_indent=indent, break_long_words=False,
                       break_on_hyphens=False)
