"""The command line: `llmjax <command> --config=FILE --config.group.field=VALUE --flag=VALUE`.

absl flags carry a command's own options; `--config...` arguments fill its spec.  A command's module,
and JAX with it, is imported only after everything the user typed has been checked.
"""

import contextlib
import dataclasses
import difflib
import errno
import importlib
import multiprocessing
import os
import shutil
import signal
import sys
import textwrap
import threading

from absl import flags

import llmjax
from llmjax import config, renamed, secrets


@dataclasses.dataclass(frozen=True)
class Command:
  """A row of the command table.

  module: holds `run(spec, options)`.  options: 'module:Class' of a spec whose fields are absl flags.
  spec: 'module:Class' of what `--config` fills, or None where the command takes no recipe.
  launches: it starts another command, which stands after `--` and takes the spec's place in `run`.
  """

  summary: str
  module: str
  options: str
  spec: str | None = None
  example: str = ''
  launches: bool = False


COMMANDS = {
    'prepare': Command(
        'text to a corpus, a tokenizer and a token store', 'llmjax.commands.prepare',
        'llmjax.data.spec:PrepareOptions', 'llmjax.data.spec:PrepareSpec',
        'llmjax prepare --config=configs/data/python_docs.py'),
    'pretrain': Command(
        'train a language model from scratch, or go on with a run', 'llmjax.loops.pretrain',
        'llmjax.run.spec:PretrainOptions', 'llmjax.run.spec:PretrainSpec',
        'llmjax pretrain --config=configs/pretrain/quickstart.py --workdir=runs/quickstart'),
    'finetune': Command(
        "go on with a run's model on conversations, or on other text", 'llmjax.loops.finetune',
        'llmjax.run.spec:PretrainOptions', 'llmjax.run.spec:FinetuneSpec',
        'llmjax finetune --config=configs/finetune/chat.py --workdir=runs/chat'),
    'reward': Command(
        "let a run's model learn to score answers, from pairs of a better and a worse one", 'llmjax.loops.reward',
        'llmjax.run.spec:PretrainOptions', 'llmjax.run.spec:RewardSpec',
        'llmjax reward --config=configs/reward/preference.py --workdir=runs/reward'),
    'rl': Command(
        "let a run's model learn from what its own answers are worth", 'llmjax.loops.rl',
        'llmjax.run.spec:PretrainOptions', 'llmjax.run.spec:RlCommandSpec',
        'llmjax rl --config=configs/rl/sums_grpo.py --workdir=runs/rl'),
    'preview': Command(
        'rows of a recipe as text, with what is trained told apart', 'llmjax.commands.preview',
        'llmjax.commands.spec:PreviewOptions', 'llmjax.commands.spec:PreviewSpec',
        'llmjax preview --config=configs/finetune/chat.py --rows=3'),
    'feedback revise': Command(
        'a model criticises and rewrites its answers by written principles', 'llmjax.commands.feedback',
        'llmjax.post.ai_feedback:ReviseOptions', None,
        'llmjax feedback revise --workdir=runs/chat --principles=configs/feedback/principles.toml '
        '--prompts=prompts.jsonl --output=data/revised.jsonl'),
    'feedback prefer': Command(
        'a model says which of two answers follows the principles better', 'llmjax.commands.feedback',
        'llmjax.post.ai_feedback:PreferOptions', None,
        'llmjax feedback prefer --workdir=runs/critic --policy=runs/chat --principles=configs/feedback/principles.toml '
        '--prompts=prompts.jsonl --output=data/preferences.jsonl'),
    'evaluate': Command(
        'held-out perplexity and bits per byte of a run, beside gzip and xz',
        'llmjax.loops.evaluate', 'llmjax.evaluate.spec:EvaluateOptions', None,
        'llmjax evaluate --workdir=runs/quickstart'),
    'generate': Command(
        'sample text from a run, streamed to the terminal', 'llmjax.loops.generate',
        'llmjax.generate.spec:GenerateOptions', None,
        "llmjax generate --workdir=runs/quickstart --prompt='def '"),
    'report': Command(
        "write a run's report.html again, or one page about several runs", 'llmjax.commands.report',
        'llmjax.evaluate.spec:ReportOptions', None,
        'llmjax report --workdir=runs/quickstart --compare=runs/chat,runs/rl'),
    'mesh': Command(
        'show how a recipe is sharded: mesh, parameters, memory, collectives', 'llmjax.commands.mesh',
        'llmjax.plan.spec:MeshOptions', 'llmjax.commands.spec:LayoutSpec',
        'llmjax mesh --config=configs/pretrain/quickstart.py --config.mesh.fsdp=4 --devices=8'),
    'plan': Command(
        'predict memory, speed and cost of a run on TPUs from its compiled program; needs no TPU',
        'llmjax.commands.plan',
        'llmjax.plan.spec:PlanOptions', 'llmjax.commands.spec:PlanSpec',
        'llmjax plan --config=configs/pretrain/llama2_7b.py --topology=v5p:4x4x4'),
    'checkpoint ls': Command(
        "list a run's checkpoints: size, time, metric, verified or damaged", 'llmjax.commands.checkpoint',
        'llmjax.checkpoint.spec:ListOptions', None, 'llmjax checkpoint ls --workdir=runs/quickstart'),
    'checkpoint verify': Command(
        'verify the checksums of every file of the checkpoints', 'llmjax.commands.checkpoint',
        'llmjax.checkpoint.spec:VerifyOptions', None, 'llmjax checkpoint verify --workdir=runs/quickstart'),
    'checkpoint show': Command(
        'print the contents of a checkpoint: config, position in the data, arrays and their norms',
        'llmjax.commands.checkpoint', 'llmjax.checkpoint.spec:ShowOptions', None,
        'llmjax checkpoint show 400 --workdir=runs/quickstart'),
    'checkpoint diff': Command(
        'compare the arrays of two checkpoints', 'llmjax.commands.checkpoint',
        'llmjax.checkpoint.spec:DiffOptions', None, 'llmjax checkpoint diff 400 800 --workdir=runs/quickstart'),
    'checkpoint prune': Command(
        'remove the checkpoints that no retention rule keeps', 'llmjax.commands.checkpoint',
        'llmjax.checkpoint.spec:PruneOptions', None,
        'llmjax checkpoint prune --workdir=runs/quickstart --dry-run'),
    'checkpoint sign': Command(
        'write a checksum manifest for checkpoints that have none and that you trust', 'llmjax.commands.checkpoint',
        'llmjax.checkpoint.spec:SignOptions', None, 'llmjax checkpoint sign 400 --workdir=runs/quickstart'),
    'checkpoint migrate': Command(
        'rewrite a run of an older version for this one', 'llmjax.commands.checkpoint',
        'llmjax.checkpoint.spec:MigrateOptions', None, 'llmjax checkpoint migrate --workdir=runs/quickstart'),
    'adapter show': Command(
        "print an adapter's settings, its base and its arrays", 'llmjax.commands.adapter',
        'llmjax.adapt.spec:AdapterShowOptions', None, 'llmjax adapter show --workdir=runs/lora'),
    'adapter merge': Command(
        'merge an adapter into its base model', 'llmjax.commands.adapter',
        'llmjax.adapt.spec:AdapterMergeOptions', None, 'llmjax adapter merge --workdir=runs/lora --output=runs/merged'),
    'adapter export': Command(
        'write an adapter in the format of Hugging Face peft', 'llmjax.commands.adapter',
        'llmjax.adapt.spec:AdapterExportOptions', None,
        'llmjax adapter export --workdir=runs/lora --output=adapter'),
    'adapter import': Command(
        'import an adapter from Hugging Face peft', 'llmjax.commands.adapter',
        'llmjax.adapt.spec:AdapterImportOptions', None,
        'llmjax adapter import --peft=adapter --init-from=runs/quickstart --workdir=runs/imported'),
    'chaos': Command(
        'test fault tolerance: kill and damage a run repeatedly, and compare it bit for bit',
        'llmjax.cluster.chaos', 'llmjax.cluster.spec:ChaosOptions', 'llmjax.run.spec:PretrainSpec',
        'llmjax chaos --config=configs/pretrain/quickstart.py --steps=200 --kills=20'),
    'doctor': Command(
        'report versions, devices, memory and disk, and how to fix their problems', 'llmjax.cluster.doctor',
        'llmjax.cluster.spec:DoctorOptions', None, 'llmjax doctor'),
    'launch local': Command(
        'run a command in several processes on this machine', 'llmjax.cluster.local',
        'llmjax.cluster.local:LocalOptions', None,
        'llmjax launch local --processes=2 --devices-per-process=4 -- pretrain --config=FILE --workdir=DIR',
        launches=True),
    'launch tpu-vm': Command(
        'run a command on all hosts of a Cloud TPU VM', 'llmjax.cluster.tpu_vm',
        'llmjax.cluster.tpu_vm:TpuVmOptions', None,
        'llmjax launch tpu-vm --name=pod --zone=us-east5-b -- pretrain --config=FILE --workdir=DIR', launches=True),
    'launch slurm': Command(
        'submit a command to Slurm', 'llmjax.cluster.slurm', 'llmjax.cluster.slurm:SlurmOptions', None,
        'llmjax launch slurm --nodes=4 --gpus-per-node=8 -- pretrain --config=FILE --workdir=DIR',
        launches=True),
    'launch gke': Command(
        'submit a command to Kubernetes as a JobSet', 'llmjax.cluster.gke', 'llmjax.cluster.gke:GkeOptions', None,
        'llmjax launch gke --name=run --image=IMAGE --accelerator=tpu-v6e-slice --topology=4x4 -- '
        'pretrain --config=FILE --workdir=DIR', launches=True),
}


# What the system says of paths that are wrong, and will be when the same command runs again.
_WRONG_PATH = (errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.EROFS)


def main(argv=None):
  """Runs a command and exits: 0 done, 1 the command failed, 2 the command line is wrong."""
  own = argv is None  # A process of our own; elsewhere the streams are the caller's.
  if own:
    for stream in filter(None, (sys.stdout, sys.stderr)):
      stream.reconfigure(errors='backslashreplace')  # Of what the terminal's encoding does not have.
    secrets.hide_output()
    _repeat_lost_interrupts()
  argv = list(sys.argv[1:] if argv is None else argv)
  try:
    try:
      _run(argv)
    finally:
      if sys.stdout:
        sys.stdout.flush()
  except KeyboardInterrupt as e:
    status = e.args[0] if e.args else 130  # Of another signal: see distributed.Stop.
    print(f'\nllmjax {" ".join(argv[:1])}: stopped by {"Ctrl-C" if status == 130 else "a signal"}', file=sys.stderr)
    if own:
      _leave_at_once(status)
    sys.exit(status)
  except BrokenPipeError:  # Whoever read the output, `head` for one, has had enough.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Nothing is left to fail at exit.
    sys.exit(141)


def _leave_at_once(status):
  """Ends an interrupted process without Python's finalization.

  JAX raises KeyboardInterrupt out of a compilation while XLA's threads go on with it; finalization would take the
  compiler's memory from under them, and end in a segmentation fault or never.
  """
  for child in multiprocessing.active_children():
    child.terminate()
  for stream in filter(None, (sys.stdout, sys.stderr)):
    with contextlib.suppress(OSError, ValueError):
      stream.flush()
  os._exit(status)


def _repeat_lost_interrupts():
  """Repeats a Ctrl-C that came inside a callback whose errors Python ignores, such as JAX's garbage collection."""
  told = sys.unraisablehook

  def hook(unraisable):
    if unraisable.exc_type is KeyboardInterrupt:
      threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
    else:
      told(unraisable)

  sys.unraisablehook = hook


def _import(module):
  """Imports a module; Ctrl-C waits for the end of it, as extensions turn it into an ImportError or abort."""
  before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
  try:
    return importlib.import_module(module)
  finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _run(argv):
  if argv[:1] == ['help'] and len(argv) > 1:
    argv = [*argv[1:], '--help']
  if not argv or argv[0] in ('-h', '--help', 'help'):
    print(_overview())
    sys.exit(0)
  if argv[0] in ('-V', '--version', 'version'):
    print(f'llmjax {llmjax.__version__}')
    sys.exit(0)
  name, arguments = _split_command(argv)
  parts = [c.split()[1] for c in COMMANDS if c.startswith(f'{name} ')]
  if parts and arguments[:1] in ([], ['-h'], ['--help'], ['help']):
    if not arguments:
      _fail(2, _overview(f'{name} '))
    print(_overview(f'{name} '))
    sys.exit(0)
  if new := renamed.COMMANDS.get(' '.join(argv[:2])):
    _fail(2, f'llmjax {name}: {arguments[0]} is now called {new.split()[1]}; write `llmjax {new}`')
  if parts:
    near = '' if arguments[0].startswith('-') else difflib.get_close_matches(arguments[0], parts, n=1)
    hint = f'did you mean `llmjax {name} {near[0]}`?' if near else f'known: {", ".join(parts)}'
    _fail(2, f'llmjax {name}: {arguments[0]!r} is not one of its commands; {hint}')
  if name not in COMMANDS:
    _fail(2, f'llmjax: {_no_command(argv)}')
  command = COMMANDS[name]
  own = arguments[:arguments.index('--')] if '--' in arguments else arguments
  if any(a in ('-h', '--help') for a in own):
    print(_help(name, command))
    sys.exit(0)
  try:
    spec, options = parse(command, arguments)
    status = _import(command.module).run(spec, options)
  except config.ConfigError as e:
    _fail(2, _listed(name, e))
  except OSError as e:  # The file and the system's reason say it all; python -X dev shows where.
    if e.filename is None or sys.flags.dev_mode:
      raise
    status = 2 if e.errno in _WRONG_PATH else 1
    _fail(status, f'llmjax {name}: {config.shown(str(e.filename), quote=False)}: {e.strerror}')
  sys.exit(status or 0)


def _split_command(argv):
  """Returns (the command's name, of one word or of two, what stands behind it)."""
  words = 2 if ' '.join(argv[:2]) in COMMANDS else 1
  return ' '.join(argv[:words]), argv[words:]


def _no_command(argv):
  """Returns the line for a command line that begins with no command."""
  first, two = config.shown(argv[0]), ' '.join(argv[:2]).lower()
  if argv[0].startswith('-'):
    return f'a command comes before {first}, such as llmjax pretrain; known: {_names()}'
  if group := [c for c in COMMANDS if c.startswith(f'{argv[0].lower()} ')]:
    if near := difflib.get_close_matches(two, group, n=1) if len(argv) > 1 else []:
      return f'there is no command {config.shown(" ".join(argv[:2]))}; did you mean `llmjax {near[0]}`?'
    return f'{first} needs a second word; write `llmjax {"` or `llmjax ".join(group)}`'
  near = (difflib.get_close_matches(two, COMMANDS, n=1) or
          difflib.get_close_matches(argv[0].lower(), COMMANDS, n=1))
  return f'there is no command {first}; ' + (
      f'did you mean `llmjax {near[0]}`?' if near else f'known: {_names()}')


def parse(command, arguments, elsewhere=False):
  """Returns (spec or None, options) of a command line; raises ConfigError with all problems.

  elsewhere: another machine will run it; see `config.build`.
  """
  if command.launches:
    return _parse_launch(command, arguments)
  problems, recipe, recipes, overrides, plain = [], {}, [], [], []
  waiting = None  # A `--config.a.b`, or '' for `--config` itself, whose value is the next argument.
  for argument in arguments:
    if waiting is not None and argument.startswith('--'):
      problems.append(_needs_value(waiting))
      waiting = None
    if waiting == '':  # Of a `--config` without a file so far.
      recipes.append(argument)
      waiting = None
    elif waiting is not None:
      overrides.append((waiting, argument))
      waiting = None
    elif argument in ('-config', '--config'):
      waiting = ''
    elif argument.lstrip('-').startswith('config.') and argument.startswith('-'):
      key, equals, text = argument.lstrip('-').removeprefix('config.').partition('=')
      if not key:
        problems.append(f'{config.shown(argument)} names no field; write --config.train.steps=200, for example')
      elif equals:
        overrides.append((key, text))
      else:
        waiting = key
    elif argument.startswith(('-config=', '--config=')):
      recipes.append(argument.partition('=')[2])
    else:
      plain.append(argument)
  if waiting is not None:
    problems.append(_needs_value(waiting))
  if len(recipes) > 1:
    problems.append(f'--config is there {len(recipes)} times; give one recipe, and its changes as --config.FIELD=VALUE')
  recipe_path = recipes[-1] if recipes else None
  options_class, options = _load(command.options), None
  try:
    options = _build_options(options_class, plain, command.spec, elsewhere)
  except config.ConfigError as e:
    problems += e.problems
  if command.spec is None:
    if recipe_path or overrides:
      problems.append('--config is not for this command: it reads the config in its --workdir')
    _raise(problems)
    return None, options
  missing = recipe_path is None and not getattr(options, 'text_dir', '')
  if missing and _needs_value('') not in problems:
    problems.append(f'--config=FILE is missing; for example {command.example}')
  if recipe_path is not None:
    try:
      recipe = config.load_recipe(recipe_path)
    except config.ConfigError as e:
      _raise(problems + e.problems)
    if other := _recipe_of(command, recipe):
      _raise([*problems, f'--config={recipe_path} is a recipe of `llmjax {other}`; for example {command.example}'])
  try:
    spec = config.build(_load(command.spec), recipe, [*overrides, *getattr(options, 'overrides', ())], elsewhere)
  except config.ConfigError as e:
    # Without a recipe, what the defaults lack is no mistake of the user's; what was typed may be.
    problems += [p for p in e.problems if not missing or any(key in p for key, _ in overrides)]
  _raise(problems)
  return spec, options


def _recipe_of(command, recipe):
  """Returns the command that a recipe is for when it fits another one and nothing in it fits this one."""
  fields = lambda c: {f.name for f in dataclasses.fields(_load(c.spec))}
  if not recipe or fields(command) & set(recipe):
    return None
  return next((name for name, c in COMMANDS.items() if c.spec and set(recipe) <= fields(c)), None)


def _parse_launch(command, arguments):
  """Returns (what stands after `--`, options); what stands there is checked as far as this machine can know."""
  end = arguments.index('--') if '--' in arguments else len(arguments)
  launched, problems, options = arguments[end + 1:], [], None
  options_class = _load(command.options)
  try:
    options = _build_options(options_class, arguments[:end])
  except config.ConfigError as e:
    problems = list(e.problems)
  name, rest = _split_command(launched)
  if name not in COMMANDS or COMMANDS[name].launches:
    known = [c for c in COMMANDS if not COMMANDS[c].launches]
    near = difflib.get_close_matches(name, known, n=1) if launched else []
    if launched and launched[0] in [c.split()[0] for c in COMMANDS if COMMANDS[c].launches]:
      problems.append(f'what stands after `--` cannot be {launched[0]!r} again; for example {command.example}')
    else:
      problems.append('the command to start stands after `--`' + (
          f', and {launched[0]!r} is none; did you mean {near[0]}?' if near else f'; for example {command.example}'))
  elif getattr(options or options_class, 'check', False):  # Processes of this machine say it themselves.
    try:
      parse(COMMANDS[name], rest, elsewhere=True)
    except config.ConfigError as e:
      problems += [f'{name}: {p}' for p in e.problems]
  _raise(problems)
  return launched, options


def _raise(problems):
  if problems:
    raise config.ConfigError(problems)


def _load(reference):
  module, _, name = reference.partition(':')
  return getattr(importlib.import_module(module), name)


def _needs_value(name):
  """Returns what to say of a `--config.NAME`, or a `--config`, with nothing behind it."""
  if not name:
    return '--config needs a file: write --config=FILE'
  name = config.shown(name, quote=False)
  return f'--config.{name} needs a value: write --config.{name}=VALUE'


def _build_options(options_class, arguments, spec=None, elsewhere=False):
  """Returns the options that the flags say; raises ConfigError with all problems.  spec: see `_parse_flags`."""
  given = _parse_flags(options_class, arguments, spec)
  try:
    return config.build(options_class, given, elsewhere=elsewhere)
  except config.ConfigError as e:
    raise config.ConfigError(['--' + p for p in e.problems]) from e


def _parse_flags(options_class, arguments, spec=None):
  """Returns {field: value} of the absl flags given; raises ConfigError on ones that do not exist.

  spec: the command's, whose fields people forget to write as `--config.FIELD`.
  """
  values = flags.FlagValues()
  for flag, kind, _, doc, _ in config.describe(options_class, ''):
    define = flags.DEFINE_bool if kind == 'bool' else flags.DEFINE_string
    define(flag, None, doc, flag_values=values)
  known = [a for f in config.describe(options_class, '') for a in (f[0], f[0].replace('_', '-'))]
  # Dashes in names are what people type; absl knows underscores.
  typed = {_with_underscores(a).partition('=')[0]: a.partition('=')[0] for a in arguments}
  arguments = [_with_underscores(a) for a in arguments]
  # absl compares an unknown name with all flags by a recursion as deep as the name is long.
  endless = [a for a in arguments if a.startswith('-') and len(a.partition('=')[0]) > 100]
  problems = [f'{config.shown(a, quote=False)} is not a flag' for a in endless]
  arguments = [a for a in arguments if a not in endless]
  while True:
    try:
      rest = values(['llmjax'] + arguments)[1:]
      break
    except flags.UnrecognizedFlagError as e:
      near = ([renamed.FLAGS[e.flagname]] if e.flagname in renamed.FLAGS else
              difflib.get_close_matches(e.flagname, known, n=1))
      if spec and e.flagname in [f for f, *_ in config.describe(_load(spec), '')]:
        near = [f'config.{e.flagname}']
      hint = f'; did you mean --{_with_dashes(near[0])}?' if near else (
          f'; known: {", ".join(f"--{_with_dashes(k)}" for k in known[::2])}')
      unknown = [a for a in arguments if a.lstrip('-').partition('=')[0] == e.flagname]
      name = typed[unknown[0].partition('=')[0]] if unknown else f'--{e.flagname}'
      problems.append(f'{config.shown(name, quote=False)} is not a flag{hint}')
      if not unknown:
        raise config.ConfigError(problems) from e
      arguments = [a for a in arguments if a not in unknown]
    except flags.Error as e:
      raise config.ConfigError(problems + [_flag_problem(arguments, values, e)]) from e
  words = getattr(options_class, 'words', None)  # The field that plain words fill, if there is one.
  if not words:
    problems += [f'{config.shown(a)} is not expected here; flags are written --name=value' for a in rest]
  if problems:
    raise config.ConfigError(problems)
  given = {f: values[f].value for f in values if values[f].present and values[f].value is not None}
  fields = {f.name: f for f in dataclasses.fields(options_class)}
  found = {f: config.parse_text(fields[f].type, v, fields[f].metadata['kind']) if isinstance(v, str) else v
           for f, v in given.items() if f in fields}
  if words and rest:
    found[words] = tuple(config.parse_text(int, a) for a in rest)
  return found


def _flag_problem(arguments, values, error):
  """Returns the line for a flag without a value, or a switch with a wrong one."""
  for argument in arguments:
    name, equals, value = argument.lstrip('-').partition('=')
    if not equals and name in values and not values[name].boolean and str(error).endswith(f'--{name}'):
      return f'--{name} needs a value: write --{name}=VALUE'
    if equals and name in values and values[name].boolean and value.lower() not in (
        'true', 'false', 't', 'f', '1', '0', 'yes', 'no', 'y', 'n'):
      return f'--{name}={config.shown(value)} must be true or false'
    if equals and name.startswith('no') and name[2:] in values:
      return f'--{name} takes no value; write --{name} or --{name[2:]}=false'
  return config.one_line(error)


def _names():
  """Returns the commands as a list to read; those of two words by their first."""
  return ', '.join(dict.fromkeys(name.split()[0] for name in COMMANDS))


def _with_dashes(name):
  return name.replace('_', '-')


def _with_underscores(argument):
  if not argument.startswith('--'):
    return argument
  name, equals, value = argument.partition('=')
  return '--' + name[2:].replace('-', '_') + equals + value


def _listed(name, error):
  if len(error.problems) == 1:
    return f'llmjax {name}: {error.problems[0]}'
  return '\n  '.join([f'llmjax {name}: {len(error.problems)} problems', *error.problems])


def _fail(status, message):
  print(message, file=sys.stderr)
  sys.exit(status)


def _overview(start=''):
  """Returns the table of the commands, or of those whose names start so."""
  commands = {name: command for name, command in COMMANDS.items() if name.startswith(start)}
  width = max(map(len, commands))
  lines = [f'llmjax {llmjax.__version__}: the whole life of a language model, in JAX.', '',
           f'usage: llmjax {start}<command> [--flag=value ...]', '']
  for name, command in commands.items():
    lines += _wrapped(command.summary, ' ' * (width + 4), f'  {name:<{width}}  ')
  return '\n'.join(lines + ['', '`llmjax <command> --help` shows its flags and config fields.'])


def _help(name, command):
  """Returns a command's flags and config fields with their types, defaults, choices and meanings."""
  lines = [*_wrapped(f'llmjax {name}: {command.summary}', '  '), '',
           ' \\\n'.join(_wrapped(command.example, '    ', 'example: ', room=2)), '', 'flags:']
  lines += _described(_load(command.options), '--')
  if command.spec:
    lines += ['', '--config=FILE is a recipe; these override it:', *_described(_load(command.spec), '--config.'), '',
              *_wrapped('A list is written as names with commas between them, a,b, or as a Python or JSON list, '
                        '\'["a, b", "c"]\'; a dict as \'{"a": 0.7, "b": 0.3}\', or entry by entry: '
                        '--config.data.sources.a=0.7.')]
  return '\n'.join(lines)


def _described(spec_class, prefix):
  """Yields the lines of `--help` about every field of a spec."""
  for flag, kind, default, doc, choices in config.describe(spec_class, prefix):
    default = list(default) if isinstance(default, tuple) else default
    yield from _wrapped(f'{flag} ({kind}, {default!r})', '      ', '  ')
    if choices is not None:
      word = 'some' if kind.startswith(('list', 'dict')) else 'one'
      names = ', '.join(str(choice) for choice in choices if choice != '')
      yield from _wrapped(f'{word} of {names}' + ', or a path' * (kind == 'path') + ', or empty' * ('' in choices),
                          '        ', '      ')
    yield from _wrapped(doc, '      ', '      ')


def _wrapped(text, indent='', first='', room=0):
  """Returns a text in lines of the terminal's width, at most 80 columns, less `room`.  indent: from the second line."""
  width = min(max(shutil.get_terminal_size().columns, 40), 80) - room
  return textwrap.wrap(text, width, initial_indent=first, subsequent_indent=indent, break_long_words=False,
                       break_on_hyphens=False)
