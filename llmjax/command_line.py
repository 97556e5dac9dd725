"""Parse a command line: `--config` arguments become the command's spec, absl flags its options.

Neither JAX nor the command's module is imported: everything that the user typed is checked first.
"""

import dataclasses
import difflib
import re

from absl import flags

from llmjax import config, recipes, renamed
from llmjax.command_table import COMMANDS, command_names, load

# absl's messages of malformed flags, and what they become.
_ABSL_ERRORS = (
    (r'Missing value for flag (\S+)', r'\1 needs a value: write \1=VALUE'),
    (r'flag (--\w+)=(.*): .*Non-boolean argument to boolean flag.*', r'\1=\2 must be true or false'),
    (r'--no(\w+)=.* does not take an argument', r'--no\1 takes no value; write --no\1 or --\1=false'),
)


def split_command(argv):
  """Return (name of the command, of one or two words; its arguments)."""
  num_words = 2 if ' '.join(argv[:2]) in COMMANDS else 1
  return ' '.join(argv[:num_words]), argv[num_words:]


def unknown_command(argv):
  """Return the error message of arguments that do not start with a command."""
  first, second = argv[0], argv[1] if len(argv) > 1 else ''
  shown = config.shown(first)
  if first.startswith('-'):
    return f'llmjax: the command must come before {shown}, as in llmjax pretrain; known: {command_names()}'
  if new := renamed.COMMANDS.get(f'{first} {second}'):
    return f'llmjax {first}: {second} is now called {new.split()[1]}; write `llmjax {new}`'
  if group := [name for name in COMMANDS if name.startswith(f'{first.lower()} ')]:
    group_name, words = group[0].split()[0], [name.split()[1] for name in group]
    near = difflib.get_close_matches(second, words, n=1)
    hint = f'did you mean `llmjax {group_name} {near[0]}`?' if near else f'write one of {", ".join(words)}'
    problem = f'{config.shown(second)} is not one of its commands' if second else 'the second word is missing'
    return f'llmjax {group_name}: {problem}; {hint}'
  near = (difflib.get_close_matches(f'{first} {second}'.lower(), COMMANDS, n=1) or
          difflib.get_close_matches(first.lower(), COMMANDS, n=1))
  hint = f'did you mean `llmjax {near[0]}`?' if near else f'known: {command_names()}'
  return f'llmjax: there is no command {shown}; {hint}'


def parse(command, arguments, elsewhere=False):
  """Return (spec or None, options) of a Command; raises ConfigError with all problems.

  elsewhere: the command will run on another machine; see `config.build`.
  """
  if command.launches:
    return _parse_launch(command, arguments)
  recipe_paths, overrides, flag_arguments, problems = _split_arguments(arguments)
  spec = options = None
  try:
    options = _parse_options(command, flag_arguments, elsewhere)
  except config.ConfigError as e:
    problems += e.problems
  if command.spec is None:
    if recipe_paths or overrides:
      problems.append('--config is not a flag of this command, which reads the config in its --workdir; leave it out')
  else:
    if len(recipe_paths) > 1:
      problems.append(f'--config is given {len(recipe_paths)} times; write one recipe, and changes of it as '
                      '--config.FIELD=VALUE')
    try:
      spec = _build_spec(command, recipe_paths[-1] if recipe_paths else '', overrides, options, elsewhere)
    except config.ConfigError as e:
      problems += e.problems
  if problems:
    raise config.ConfigError(problems)
  return spec, options


def _split_arguments(arguments):
  """Return (recipe paths, [(field, text)] of --config.FIELD=TEXT, other arguments, problems)."""
  recipe_paths, overrides, others, problems = [], [], [], []
  remaining = list(reversed(arguments))
  while remaining:
    argument = remaining.pop()
    match = re.fullmatch(r'--?config(?:\.(.*?))?(?:=(.*))?', argument, re.DOTALL)
    if match is None:
      others.append(argument)
      continue
    field, text = match.groups()
    if field == '':
      problems.append(f'{config.shown(argument)} names no field; write for example --config.train.steps=200')
      continue
    if text is None and remaining and not remaining[-1].startswith('--'):
      text = remaining.pop()
    if field is None:
      recipe_paths.append(text or '')
    elif text is None:
      name = f'--config.{config.shown(field, quote=False)}'
      problems.append(f'{name} needs a value: write {name}=VALUE')
    else:
      overrides.append((field, text))
  return recipe_paths, overrides, others, problems


def _build_spec(command, recipe_path, overrides, options, elsewhere):
  """Build a command's spec from a recipe, or '', and overrides.  options: None if the flags are wrong."""
  problems, recipe = [], {}
  needs_recipe = not recipe_path and not getattr(options, 'text_dir', '')
  if needs_recipe:
    problems.append(f'--config=FILE is missing; for example {command.example}')
  elif recipe_path:
    recipe = recipes.load_recipe(recipe_path)
    if other := _command_of_recipe(command, recipe):
      raise config.ConfigError(
          [f'--config={recipe_path} is a recipe of `llmjax {other}`; for example {command.example}'])
  try:
    spec = config.build(load(command.spec), recipe, [*overrides, *getattr(options, 'overrides', ())], elsewhere)
  except config.ConfigError as e:
    # Without a recipe, only the problems of fields that the user typed are worth reporting.
    problems += [p for p in e.problems if not needs_recipe or any(field in p for field, _ in overrides)]
  if problems:
    raise config.ConfigError(problems)
  return spec


def _command_of_recipe(command, recipe):
  """Return the command that all of a recipe's groups belong to, if none of them belongs to this command."""
  fields = lambda c: {field.name for field in dataclasses.fields(load(c.spec))}
  if not recipe or fields(command) & set(recipe):
    return None
  return next((name for name, c in COMMANDS.items() if c.spec and set(recipe) <= fields(c)), None)


def _parse_launch(command, arguments):
  """Return (arguments after `--`, options).  The launched command is checked as far as this machine can."""
  end = arguments.index('--') if '--' in arguments else len(arguments)
  launched, problems, options = arguments[end + 1:], [], None
  try:
    options = _parse_options(command, arguments[:end])
  except config.ConfigError as e:
    problems += e.problems
  name, launched_arguments = split_command(launched)
  if not launched:
    problems.append(f'the command to launch is missing; write it after `--`, for example {command.example}')
  elif name not in COMMANDS:
    near = difflib.get_close_matches(name, [c for c in COMMANDS if not COMMANDS[c].launches], n=1)
    hint = f'did you mean {near[0]}?' if near else f'for example {command.example}'
    problems.append(f'the command after `--`, {config.shown(name)}, does not exist; {hint}')
  elif COMMANDS[name].launches:
    problems.append(f'{name} cannot be launched itself; write another command after `--`, for example '
                    f'{command.example}')
  elif getattr(options or load(command.options), 'check', False):  # Local processes report their problems themselves.
    try:
      parse(COMMANDS[name], launched_arguments, elsewhere=True)
    except config.ConfigError as e:
      problems += [f'{name}: {p}' for p in e.problems]
  if problems:
    raise config.ConfigError(problems)
  return launched, options


def _parse_options(command, arguments, elsewhere=False):
  """Return the options that the flags set."""
  options_class = load(command.options)
  values = _parse_flags(options_class, arguments, command.spec)
  try:
    return config.build(options_class, values, elsewhere=elsewhere)
  except config.ConfigError as e:
    raise config.ConfigError([_as_typed(f'--{problem}') for problem in e.problems]) from e


def _parse_flags(options_class, arguments, spec=None):
  """Return {field: value} of the given flags; raises ConfigError for unknown and malformed ones.

  spec: that of the command, whose fields are written as --config.FIELD.
  """
  fields = {field.name: field for field in dataclasses.fields(options_class)}
  flag_values = flags.FlagValues()
  for name, field in fields.items():
    define = flags.DEFINE_bool if field.type is bool else flags.DEFINE_string
    define(name, None, field.metadata['doc'], flag_values=flag_values)
  typed = {_with_underscores(argument): argument for argument in arguments}
  try:
    rest = flag_values(['llmjax', *map(_with_underscores, arguments)], known_only=True)[1:]
  except (flags.Error, ValueError) as e:
    message = config.one_line(e)
    for pattern, replacement in _ABSL_ERRORS:
      message = re.sub(pattern, replacement, message)
    raise config.ConfigError([_as_typed(message)]) from e
  positional = getattr(options_class, 'positional', None)  # The field that positional arguments fill, if any.
  words = [argument for argument in rest if not argument.startswith('-')]
  problems = [_unknown_flag(typed.get(argument, argument), fields, spec) for argument in rest if argument not in words]
  if not positional:
    problems += [f'{config.shown(word)} is not expected here; flags are written --name=value' for word in words]
  if problems:
    raise config.ConfigError(list(dict.fromkeys(problems)))
  values = {name: flag_values[name].value for name in fields if flag_values[name].value is not None}
  values = {name: config.parse_text(fields[name].type, value, fields[name].metadata['kind'])
            if isinstance(value, str) else value for name, value in values.items()}
  if positional and words:
    values[positional] = tuple(config.parse_text(int, word) for word in words)
  return values


def _unknown_flag(argument, fields, spec):
  """Return the error message of a flag that does not exist, with the nearest that does."""
  typed = argument.partition('=')[0]
  name = typed.lstrip('-').replace('-', '_')
  if spec and name in [field for field, *_ in config.describe(load(spec), '')]:
    near = [f'--config.{name}']
  elif name in renamed.FLAGS:
    near = [_as_typed(f'--{renamed.FLAGS[name]}')]
  elif name.startswith('no_') and name[3:] in fields and fields[name[3:]].type is bool:
    near = [f'--no{name[3:]}']
  else:
    near = [_as_typed(f'--{field}') for field in difflib.get_close_matches(name, fields, n=1)]
  known = ', '.join(_as_typed(f'--{field}') for field in fields)
  hint = f'did you mean {near[0]}?' if near else f'known: {known}'
  return f'{config.shown(typed, quote=False)} is not a flag; {hint}'


def _as_typed(text):
  """Write the flag that a text starts with as users type it: --text_dir=a_b becomes --text-dir=a_b."""
  name = re.match(r'[\w-]*', text)[0]
  return name.replace('_', '-') + text[len(name):]


def _with_underscores(argument):
  """Write a flag's name as absl has it: --text-dir=a-b becomes --text_dir=a-b."""
  name, equals, value = argument.partition('=')
  return '--' + name[2:].replace('-', '_') + equals + value if argument.startswith('--') else argument
