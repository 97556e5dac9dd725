"""The runs that another run begins from or learns from: what their configs say, before JAX is imported."""

import dataclasses
import json
import pathlib

from llmjax import config
from llmjax.checkpoint import pickle_guard
from llmjax.data import prepared
from llmjax.generate.spec import CHAT_TEMPLATE
from llmjax.model.spec import ModelSpec


def run_folder(source):
  """Returns the folder of the run that a path names: itself, or that of one of its checkpoints."""
  path = pathlib.Path(source)
  return path.parent.parent if path.parent.name == 'checkpoints' else path


def format_problems(data, run):
  """Yields a line for every source of a DataSpec whose tokenizer or chat template is not a run's."""
  if not data.allow_mismatch:
    for problem in (*tokenizer_problems(data.sources, run), *template_problems(data.sources, run)):
      yield f'{problem}, or allow it with --config.data.allow_mismatch=true'


def template_problems(sources, run):
  """Yields a line for every prepared folder whose chat template is not the one that a run was trained with."""
  try:
    trained = json.loads((run_folder(run) / CHAT_TEMPLATE).read_text(encoding='utf-8'))['template']
  except (OSError, ValueError, KeyError, TypeError, RecursionError):
    return  # It was trained on text, which any template may follow.
  from llmjax.text.chat import same_template, template_name  # Here: most commands have no use for NumPy so early.
  for folder in sources:
    try:
      manifest = prepared.read_manifest(folder)
    except ValueError:
      continue  # The data group says so.
    if prepared.kind(manifest) != 'text' and not same_template(manifest.get('template'), trained):
      name, other = template_name(trained), template_name(manifest.get('template'))
      yield (f'data.sources: {folder} was prepared with the chat template {other}, and {run} was trained with {name}; '
             f'prepare it again with --force --config.template={name}')


def tokenizer_problems(sources, run):
  """Yields a line for every prepared folder whose tokenizer is not a run's."""
  tokenizer = run_folder(run) / 'tokenizer.model'
  for folder in sources if tokenizer.is_file() else ():
    try:
      manifest = prepared.read_manifest(folder)
    except ValueError:
      continue  # The data group says so.
    if manifest['tokenizer']['sha256'] != prepared.file_sha256(tokenizer):
      yield (f'data.sources: {folder} has another tokenizer than {run}; prepare it again with --force '
             f'--config.tokenizer.path={tokenizer}')


def vocabulary_problems(name, model, sources, run=''):
  """Yields a line for every prepared folder whose tokenizer has more ids than a model.

  name: of the model's vocab_size.  run: the run that the model is of, or ''.
  """
  for folder in sources if model.vocab_size else ():
    try:
      ids = prepared.read_manifest(folder)['tokenizer']['vocab_size']
    except ValueError:
      continue  # The data group says so.
    if ids > model.vocab_size:
      remedy = (f'prepare it again with --force --config.tokenizer.path={run_folder(run) / "tokenizer.model"}' if run
                else f'write {name}={ids} or more, or leave it out')
      yield f'{name}={model.vocab_size} is less than the {ids} ids of the tokenizer of {folder}; {remedy}'


def run_groups(run, names):
  """Returns those groups of a run's config, of data only how long its rows are; nothing where there is no run."""
  try:
    before = json.loads((run_folder(run) / 'config.json').read_text(encoding='utf-8'))
    found = {name: before[name] for name in names if isinstance(before[name], dict)}
  except (TypeError, OSError, ValueError, KeyError, RecursionError):
    return {}
  if 'data' in found:
    found['data'] = {k: v for k, v in found['data'].items() if k == 'seq_len'}
  return found


def reward_problems(name, source, data):
  """Yields what is wrong with a reward model.  name: of the setting.  data: the DataSpec of what it is to score."""
  if not (run_folder(source) / 'config.json').is_file():
    yield f"{name}={source} is not a run's folder; give the --workdir of a reward model"
    return
  found = run_groups(source, ('reward',)).get('reward')
  if found is None:
    yield f'{name}={source} is no reward model; give the --workdir of a run of `llmjax reward`'
  elif not data.allow_mismatch and any(tokenizer_problems(data.sources, source)):
    folder = next(iter(data.sources))
    yield (f'{name}={source} has another tokenizer than {folder}; give one whose data were prepared with '
           f'--config.tokenizer.path={prepared.tokenizer_path(folder)}')
  else:
    if model := _run_model(source):
      yield from vocabulary_problems(f'{name}={source}: its model.vocab_size', model, data.sources, source)
    yield from (f'{name}={source}: {problem}' for problem in format_problems(data, source))


def _run_model(source):
  """Returns the ModelSpec of a run, or None where its config has none."""
  try:
    return config.build(ModelSpec, run_groups(source, ('model',))['model'])
  except (KeyError, config.ConfigError):
    return None


# What two models may differ in although one begins with the other's layers.
OF_ITS_OWN = ('preset', 'num_layers', 'dropout', 'balance_loss', 'router_z_loss', 'capacity_factor', 'init_scale',
              'value_head', 'projection')


def teacher_groups(values, names):
  """Returns what a recipe leaves to the teacher whose layers its student begins with."""
  distill = values.get('distill')
  if not isinstance(distill, dict) or not distill.get('init') or not distill.get('teacher'):
    return {}
  found = run_groups(distill['teacher'], names)
  if 'model' in found:
    found['model'] = {k: v for k, v in found['model'].items() if k not in ('value_head', 'projection')}
    layers = found['model'].get('num_layers')
    if distill['init'] == 'every_2nd' and isinstance(layers, int):
      found['model']['num_layers'] = -(-layers // 2)
  return found


def distill_problems(spec):
  """Yields what is wrong with a teacher, and with what a student takes from it."""
  distill, model, source = spec.distill, spec.model, spec.distill.teacher
  if not source:
    return
  if refused := pickle_guard.refusal(source):
    yield f'distill.teacher={refused}'
    return
  teacher = _run_model(source)
  if teacher is None:
    yield f"distill.teacher={source} is not a run's folder; give the --workdir of a run, such as runs/big"
    return
  yield from format_problems(spec.data, source)
  yield from vocabulary_problems(f'distill.teacher={source}: its model.vocab_size', teacher, spec.data.sources,
                                 source)
  if model.vocab_size and model.vocab_size != teacher.vocab_size:
    yield (f'model.vocab_size={model.vocab_size} is not that of distill.teacher={source}; write '
           f'model.vocab_size={teacher.vocab_size}')
  if spec.pipeline.schedule == '1f1b' and spec.mesh.size('stage') > 1:
    yield 'pipeline.schedule=1f1b is for next-token prediction; write pipeline.schedule=gpipe'
  if distill.on_policy_fraction and distill.max_new_tokens >= spec.data.seq_len:
    yield (f'distill.max_new_tokens={distill.max_new_tokens} leaves no room for a prompt in data.seq_len='
           f'{spec.data.seq_len}; write distill.max_new_tokens={max(spec.data.seq_len // 2, 1)}')
  if distill.on_policy_fraction and spec.guard.policy == 'rollback':
    yield ('guard.policy=rollback would leave out batches that the student has not said yet; write guard.policy=skip '
           'or guard.policy=abort')
  if distill.top_k > teacher.vocab_size:
    yield f'distill.top_k={distill.top_k} is more than there are words; write at most {teacher.vocab_size}'
  if distill.compares_hidden and spec.adapter.kind and model.d_model != teacher.d_model:
    yield (f'distill.hidden_weight and cosine_weight would train a projection from model.d_model={model.d_model} to '
           f"the teacher's {teacher.d_model}, and adapters train nothing else; write 0 for both, or train all weights")
  if not distill.init:
    return
  if spec.train.init_from:
    yield ('distill.init and train.init_from both say what the student begins with; leave one out')
  for name, mine in dataclasses.asdict(model).items():
    theirs = getattr(teacher, name)
    if name not in OF_ITS_OWN and mine != theirs and not (name == 'vocab_size' and not mine):
      yield f"model.{name}={mine} is not {theirs}, that of the teacher whose layers distill.init copies; leave it out"
  half = -(-teacher.num_layers // 2)
  if distill.init == 'every_2nd' and model.num_layers != half:
    yield (f"model.num_layers={model.num_layers} is not every second of the teacher's {teacher.num_layers}; write "
           f'model.num_layers={half}, or distill.init=evenly_spaced')
  elif model.num_layers > teacher.num_layers:
    yield (f"model.num_layers={model.num_layers} is more than the teacher's; write model.num_layers="
           f'{teacher.num_layers} at most')
