"""Finding and loading a run's checkpoints: for resuming, evaluation, generation and `train.init_from`."""

import json
import os
import pathlib
import sys

import jax
import orbax.checkpoint as ocp
from etils import epath

from llmjax import config, renamed
from llmjax.adapt import lora
from llmjax.adapt.quantize import quantize_tree
from llmjax.adapt.spec import AdapterSpec
from llmjax.checkpoint import bases, manifest, orbax_io, pickle_guard
from llmjax.checkpoint.arrays import read_json
from llmjax.checkpoint.recorded import find_paths
from llmjax.config import ConfigError
from llmjax.model.model import Model
from llmjax.model.spec import ModelSpec
from llmjax.parallel import distributed


def checkpoints_folder(workdir):
  """Return the folder of a run's checkpoints."""
  folder = epath.Path(workdir) / 'checkpoints'
  return folder if '://' in str(workdir) else folder.absolute()  # Orbax takes no relative paths.


def newest_verified(folder, strict=False):
  """Return (newest verified step or None, one line per newer checkpoint that is skipped).

  All processes must call it: each hashes its share of the files, and they agree on the result.

  strict: raise ConfigError instead of skipping where a new save could replace checkpoints of use (see
  `Checkpoints.latest`). Always raises ConfigError if the folder cannot be listed, if its manifests have their old
  name, or if no checkpoint has a manifest, because these are not signs of damage.
  """
  steps, skipped = _list_checkpoints(folder)
  without_manifest, reason = 0, ''
  for step in reversed(steps):
    path = folder / str(step)
    problems = manifest.find_problems(path, process=jax.process_index(), processes=jax.process_count())
    problems = list(dict.fromkeys((line, damaged) for part in gather(problems) for line, damaged in part))
    if not problems:
      return step, skipped
    unchecked = [line for line, damaged in problems if not damaged]
    if strict and unchecked:
      raise ConfigError([f'{path} may be undamaged but cannot be verified: {unchecked[0]}. Make it readable, or move '
                         f'it away to resume from an older one; {_start_anew(folder)}'])
    damage = problems[0][0] + (f', and {len(problems) - 1} more' if len(problems) > 1 else '')
    skipped.append(f'{path} is skipped: {damage}')
    without_manifest, reason = without_manifest + (damage == 'manifest.json is missing'), reason or damage
  if steps and without_manifest == len(steps):
    raise ConfigError([f'no checkpoint in {folder} has a manifest.json: they are damaged, or written by other means. '
                       f'Sign one that you trust: llmjax checkpoint sign {steps[-1]} --workdir={folder.parent}; '
                       f'{_start_anew(folder)}'])
  if strict and steps:
    raise ConfigError([f'all {len(steps)} checkpoints in {folder} are damaged ({steps[-1]}: {reason}). List the '
                       f'damage: llmjax checkpoint verify --workdir={folder.parent}; {_start_anew(folder)}'])
  return None, skipped


def _start_anew(folder):
  return (f'to start anew give another --workdir, or --config.checkpoint.fresh_start=true, which renames {folder.name} '
          'and removes nothing')


def _list_checkpoints(folder):
  """Return (steps, lines about interrupted saves) as all processes see them."""
  try:
    steps, error = manifest.find_steps(folder), ''
    interrupted = [f'{path} is skipped: its save was interrupted' for path in manifest.find_temporaries(folder)
                   if not path.name.endswith('.deleted')]
    if any(manifest.is_legacy(folder / str(step)) for step in steps):
      error = (f'{folder} has checkpoints of an older llmjax (seal.json in place of manifest.json): run '
               f'llmjax checkpoint migrate --workdir={folder.parent}')
  except OSError as e:
    steps, interrupted = [], []
    error = (f'{folder} cannot be listed: {e.strerror or e}. It may hold checkpoints: make it readable, or give '
             'another --workdir')
  gathered = gather([steps, interrupted, error])
  if error := next((e for _, _, e in gathered if e), ''):
    raise ConfigError([error])
  return gathered[0][:2]


def gather(value):
  """Return every process's value, in order. value: anything that JSON can hold."""
  return distributed.gather(value, 'looked at the checkpoints')


def read_config(workdir):
  """Read the resolved config of a run as nested dicts, with its recorded paths looked up (see `find_paths`)."""
  if refusal := pickle_guard.refusal(workdir):
    raise ConfigError([f'--workdir={refusal}'])
  if problems := [f'--{problem}' for problem in pickle_guard.no_run(workdir)]:
    raise ConfigError(problems)
  settings = json.loads((epath.Path(workdir) / 'config.json').read_bytes())
  if missing := [name for name in ('model', 'train') if not isinstance(settings.get(name), dict)]:
    raise ConfigError([f"--workdir={workdir}: its config.json is not a run's config: it has no group {missing[0]!r}; "
                       'give the --workdir that `llmjax pretrain` had'])
  if old := next(iter(renamed.migrate(settings)[1]), ''):
    raise ConfigError([f'--workdir={workdir} is a run of an older version (its config has {old}): run llmjax '
                       f'checkpoint migrate --workdir={workdir}'])
  return find_paths(settings, workdir)


def find_step(workdir, step=0):
  """Return the step to load: `step`, or the newest verified one for 0. Raises ConfigError if there is none.

  Prints a line on standard error for each newer checkpoint that is skipped.
  """
  folder = checkpoints_folder(workdir)
  steps = manifest.find_steps(folder)
  if not steps:
    raise ConfigError([f'--workdir={workdir} has no checkpoint yet; let `llmjax pretrain` reach its first one'])
  if step and step not in steps:
    raise ConfigError([f'--step={step} is not a checkpoint of {workdir}; it has {", ".join(map(str, steps))}'])
  if step:
    require_verified(folder / str(step))
    return step
  newest, skipped = newest_verified(folder)
  if newest is None:
    raise ConfigError([f'--workdir={workdir} has no undamaged checkpoint', *skipped])
  for line in skipped:
    print(line, file=sys.stderr)
  return newest


def require_verified(checkpoint):
  """Raise ConfigError if a checkpoint is damaged or has no manifest."""
  if damage := manifest.find_damage(checkpoint):
    raise ConfigError([f'{checkpoint} is not loaded: {line}' for line in damage])


def load_params(workdir, step=0, shardings=None):
  """Load a run's parameters; returns (params, ModelSpec, config, step).

  step: 0 for the newest verified checkpoint. shardings: function of the ModelSpec that returns the tree of shardings;
  None loads onto the first device. Adapters are merged into their base; raises ConfigError if it is not the one that
  they were trained on.
  """
  settings = read_config(workdir)
  step = find_step(workdir, step)
  model = config.build(ModelSpec, settings['model'])
  shapes = Model(model).abstract_params(settings['train']['param_dtype'])
  tree = shardings(model) if shardings else jax.tree.map(lambda _: _first_device(), shapes)
  abstract = jax.tree.map(lambda s, n: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=n), shapes, tree)
  checkpoint = checkpoints_folder(workdir) / str(step)
  if not is_adapter(checkpoint):
    return restore_params(checkpoint, abstract), model, settings, step
  base, adapters, specs = load_adapters(checkpoint, abstract)
  return jax.jit(lambda b, a: lora.merge(b, a, specs), out_shardings=tree)(base, adapters), model, settings, step


def _first_device():
  return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def is_adapter(checkpoint):
  """Return whether a checkpoint holds adapters without their base."""
  return bool(read_json(checkpoint, 'spec').get('adapter', {}).get('kind'))


def load_adapters(checkpoint, abstract, with_base=True):
  """Load an adapter checkpoint; returns (base or None, {name: adapter}, {name: AdapterSpec}).

  abstract: the base's parameters as ShapeDtypeStructs with shardings. The base is quantized if it was while training.
  """
  settings = read_json(checkpoint, 'spec')
  spec = config.build(AdapterSpec, settings['adapter'])
  shapes = jax.eval_shape(
      lambda b: {spec.name: lora.init_adapter(spec, b, jax.random.key(0), settings['train']['param_dtype'])}, abstract)
  adapters = restore_params(checkpoint, jax.tree.map(
      lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=_first_device()), shapes))
  if len(jax.tree.leaves(abstract)[0].sharding.device_set) > 1:
    adapters = jax.device_get(adapters)  # So that jit may place them like the base.
  if not with_base:
    return None, adapters, {spec.name: spec}
  run = epath.Path(checkpoint).parent.parent
  init_from = find_paths(settings, run)['train'].get('init_from', '')
  folder = bases.find_base(read_json(checkpoint, 'stream')['base'], init_from, run)
  require_verified(folder)
  base = restore_params(folder, abstract)
  return (quantize_tree(base, spec.quantize) if spec.quantize else base), adapters, {spec.name: spec}


def restore_params(checkpoint, abstract):
  """Restore the parameters of one checkpoint. abstract: ShapeDtypeStructs with shardings."""
  if refusal := pickle_guard.refusal(checkpoint):
    raise ConfigError([refusal])
  path = checkpoint if '://' in str(checkpoint) else pathlib.Path(os.path.abspath(checkpoint))
  with ocp.Checkpointer(orbax_io.make_reader(abstract)) as orbax:
    return orbax.restore(epath.Path(path) / 'params', args=ocp.args.StandardRestore(abstract))
