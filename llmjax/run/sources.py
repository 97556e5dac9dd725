"""Checks of the runs that a run starts from, learns from or is scored by, from their configs, without JAX."""

import dataclasses
import json
import pathlib

from llmjax import config
from llmjax.checkpoint import pickle_guard
from llmjax.data import prepared
from llmjax.generate.spec import CHAT_TEMPLATE
from llmjax.model.spec import ModelSpec


def run_folder(source):
  """Return the folder of the run that a path names: the path itself, or the run of a checkpoint."""
  path = pathlib.Path(source)
  return path.parent.parent if path.parent.name == 'checkpoints' else path


def run_groups(run, names):
  """Return the named groups of a run's config, of data only seq_len; {} where there is no run or a group is missing."""
  try:
    values = json.loads((run_folder(run) / 'config.json').read_text(encoding='utf-8'))
    groups = {name: values[name] for name in names if isinstance(values[name], dict)}
  except (TypeError, OSError, ValueError, KeyError, RecursionError):
    return {}
  if 'data' in groups:
    groups['data'] = {k: v for k, v in groups['data'].items() if k == 'seq_len'}
  return groups


def _run_model(source):
  """Return the ModelSpec of a run, or None where its config has none."""
  try:
    return config.build(ModelSpec, run_groups(source, ('model',))['model'])
  except (KeyError, config.ConfigError):
    return None


def _manifests(sources):
  """Yield (folder, manifest) of the prepared folders; the data group reports the others."""
  for folder in sources:
    try:
      yield folder, prepared.read_manifest(folder)
    except ValueError:
      continue


def format_problems(data, run):
  """Yield a line for every source of a DataSpec whose tokenizer or chat template differs from a run's."""
  if not data.allow_mismatch:
    for problem in (*tokenizer_problems(data.sources, run), *template_problems(data.sources, run)):
      yield f'{problem}, or allow it with --config.data.allow_mismatch=true'


def template_problems(sources, run):
  """Yield a line for every prepared folder whose chat template differs from a run's."""
  try:
    template = json.loads((run_folder(run) / CHAT_TEMPLATE).read_text(encoding='utf-8'))['template']
  except (OSError, ValueError, KeyError, TypeError, RecursionError):
    return  # The run was trained on text, which does not determine a template.
  from llmjax.text.chat import same_template, template_name  # Imports NumPy, which most commands do not need.
  for folder, manifest in _manifests(sources):
    if prepared.kind(manifest) != 'text' and not same_template(manifest.get('template'), template):
      name, other = template_name(template), template_name(manifest.get('template'))
      yield (f'data.sources: {folder} was prepared with the chat template {other}, and {run} was trained with {name}; '
             f'prepare it again with --force --config.template={name}')


def tokenizer_problems(sources, run):
  """Yield a line for every prepared folder whose tokenizer differs from a run's."""
  tokenizer = run_folder(run) / 'tokenizer.model'
  for folder, manifest in _manifests(sources if tokenizer.is_file() else ()):
    if manifest['tokenizer']['sha256'] != prepared.file_sha256(tokenizer):
      yield (f'data.sources: {folder} has another tokenizer than {run}; prepare it again with --force '
             f'--config.tokenizer.path={tokenizer}')


def vocabulary_problems(name, model, sources, run=''):
  """Yield a line for every prepared folder whose tokenizer has more ids than a model.

  name: the field of the model's vocab_size.  run: the run of the model, or ''.
  """
  for folder, manifest in _manifests(sources if model.vocab_size else ()):
    ids = manifest['tokenizer']['vocab_size']
    if ids > model.vocab_size:
      remedy = (f'prepare it again with --force --config.tokenizer.path={run_folder(run) / "tokenizer.model"}' if run
                else f'write {name}={ids} or more, or leave it out')
      yield f'{name}={model.vocab_size} is less than the {ids} ids of the tokenizer of {folder}; {remedy}'


def reward_problems(name, source, data):
  """Yield the problems with a reward model.  name: the field that names it.  data: DataSpec of what it scores."""
  if not (run_folder(source) / 'config.json').is_file():
    yield f"{name}={source} is not a run's folder; give the --workdir of a reward model"
    return
  if run_groups(source, ('reward',)).get('reward') is None:
    yield f'{name}={source} is not a reward model; give the --workdir of a run of `llmjax reward`'
  elif not data.allow_mismatch and any(tokenizer_problems(data.sources, source)):
    folder = next(iter(data.sources))
    yield (f'{name}={source} has another tokenizer than {folder}; give one whose data were prepared with '
           f'--config.tokenizer.path={prepared.tokenizer_path(folder)}')
  else:
    if model := _run_model(source):
      yield from vocabulary_problems(f'{name}={source}: its model.vocab_size', model, data.sources, source)
    yield from (f'{name}={source}: {problem}' for problem in format_problems(data, source))


# Fields in which a student may differ from the teacher whose layers it is initialized from.
STUDENT_FIELDS = ('preset', 'num_layers', 'dropout', 'balance_loss', 'router_z_loss', 'capacity_factor', 'init_scale',
                  'value_head', 'projection')


def teacher_groups(values, names):
  """Return the groups of a recipe that are taken from the teacher from which its student is initialized."""
  distill = values.get('distill')
  if not isinstance(distill, dict) or not distill.get('init') or not distill.get('teacher'):
    return {}
  groups = run_groups(distill['teacher'], names)
  if 'model' in groups:
    groups['model'] = {k: v for k, v in groups['model'].items() if k not in ('value_head', 'projection')}
    layers = groups['model'].get('num_layers')
    if distill['init'] == 'every_2nd' and isinstance(layers, int):
      groups['model']['num_layers'] = -(-layers // 2)
  return groups


def distill_problems(spec):
  """Yield the problems with the teacher of a command's spec, and with a student initialized from it."""
  source = spec.distill.teacher
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
  yield from _teacher_loss_problems(spec, teacher)
  if spec.distill.init:
    yield from _student_init_problems(spec, teacher)


def _teacher_loss_problems(spec, teacher):
  """Yield the problems with training on the outputs of a teacher."""
  distill, model = spec.distill, spec.model
  if model.vocab_size and model.vocab_size != teacher.vocab_size:
    yield (f'model.vocab_size={model.vocab_size} is not that of distill.teacher={distill.teacher}; write '
           f'model.vocab_size={teacher.vocab_size}')
  if spec.pipeline.schedule == '1f1b' and spec.mesh.size('stage') > 1:
    yield 'pipeline.schedule=1f1b does not support distillation; write pipeline.schedule=gpipe'
  if distill.on_policy_fraction and distill.max_new_tokens >= spec.data.seq_len:
    yield (f'distill.max_new_tokens={distill.max_new_tokens} leaves no room for a prompt in data.seq_len='
           f'{spec.data.seq_len}; write distill.max_new_tokens={max(spec.data.seq_len // 2, 1)}')
  if distill.on_policy_fraction and spec.guard.policy == 'rollback':
    yield ('guard.policy=rollback cannot skip batches that the student has not generated yet; write guard.policy=skip '
           'or guard.policy=abort')
  if distill.top_k > teacher.vocab_size:
    yield (f'distill.top_k={distill.top_k} is more than the vocabulary size; write distill.top_k={teacher.vocab_size} '
           'or less')
  if distill.compares_hidden and spec.adapter.kind and model.d_model != teacher.d_model:
    yield (f'distill.hidden_weight and cosine_weight need a projection from model.d_model={model.d_model} to the '
           f"teacher's {teacher.d_model}, which adapters do not train; write 0 for both, or leave adapter.kind out")


def _student_init_problems(spec, teacher):
  """Yield the problems with a student that is initialized from layers of its teacher."""
  distill, model = spec.distill, spec.model
  if spec.train.init_from:
    yield 'distill.init and train.init_from both initialize the student; leave one out'
  for name, value in dataclasses.asdict(model).items():
    expected = getattr(teacher, name)
    if name not in STUDENT_FIELDS and value != expected and not (name == 'vocab_size' and not value):
      yield (f'model.{name}={value} is not {expected}, that of the teacher whose layers distill.init copies; leave it '
             'out')
  half = -(-teacher.num_layers // 2)
  if distill.init == 'every_2nd' and model.num_layers != half:
    yield (f"model.num_layers={model.num_layers} is not half of the teacher's {teacher.num_layers}; write "
           f'model.num_layers={half}, or distill.init=evenly_spaced')
  elif model.num_layers > teacher.num_layers:
    yield (f"model.num_layers={model.num_layers} is more than the teacher's; write model.num_layers="
           f'{teacher.num_layers} or less')
