"""Decide which settings of a run may change when it resumes from a checkpoint."""

import dataclasses
import os

import jax

from llmjax import config
from llmjax.config import ConfigError
from llmjax.train.optimizers import make_optimizer, make_schedule
from llmjax.train.spec import OptimizerSpec

HARMLESS = 'harmless'  # Durations, intervals, devices, logs: all metrics remain comparable.
MEANING = 'meaning'  # Metrics before and after are not comparable: requires train.allow_changes=true.
FIXED = 'fixed'  # The checkpoint's arrays, or its position in the data, are incompatible with another value.

# {group: (kind of a change of its fields, {field: exception})}.  tests/run/test_changes.py checks that it is complete.
KINDS = {
    'model': (FIXED, {'preset': HARMLESS, 'init_scale': HARMLESS, 'dropout': MEANING, 'capacity_factor': MEANING,
                      'balance_loss': MEANING, 'router_z_loss': MEANING}),
    'data': (MEANING, {'workers': HARMLESS, 'tokenizer': HARMLESS, 'allow_mismatch': HARMLESS}),
    'mesh': (HARMLESS, {}),
    'distributed': (HARMLESS, {}),
    'pipeline': (HARMLESS, {}),
    'train': (HARMLESS, {'batch_size': MEANING, 'seed': MEANING, 'param_dtype': FIXED, 'compute_dtype': MEANING,
                         'objective': MEANING,
                         'z_loss': MEANING, 'neftune_alpha': MEANING, 'init_from': MEANING}),
    'optimizer': (MEANING, {'name': FIXED, 'moment_dtype': FIXED, 'freeze': FIXED}),
    'adapter': (FIXED, {'alpha': MEANING, 'dropout': MEANING}),
    'distill': (MEANING, {'teacher': HARMLESS, 'init': HARMLESS}),  # The teacher is identified by its hash.
    'preference': (MEANING, {'reference': HARMLESS}),
    'reward': (MEANING, {'scores': FIXED}),
    # A checkpoint in the middle of an iteration resumes with the sequences in its rollout file.
    'rl': (MEANING, {'prompts_per_iteration': FIXED, 'num_generations': FIXED, 'epochs': FIXED}),
    'policy': (MEANING, {'advantage_estimator': FIXED}),
    'guard': (HARMLESS, {'window': FIXED}),
    'checkpoint': (HARMLESS, {}),
    'evaluate': (HARMLESS, {'limit': MEANING}),
    'sample': (HARMLESS, {}),
    'profile': (HARMLESS, {}),
    'logs': (HARMLESS, {}),
    'cost': (HARMLESS, {}),
}
ABOUT_CHANGES = (('train', 'allow_changes'), ('checkpoint', 'fresh_start'))


@dataclasses.dataclass(frozen=True)
class Change:
  """A setting whose value differs from the checkpoint's.  kind: HARMLESS, MEANING or FIXED."""

  field: str
  old: object
  new: object
  kind: str = MEANING

  def __str__(self):
    return f'{self.field}: {config.shown(self.old)} -> {config.shown(self.new)}'


def find_changes(before, now):
  """Return the Changes between two resolved configs: nested dicts with absolute paths."""
  changes = []
  for group, fields in now.items():
    for name, new in fields.items():
      old = before.get(group, {}).get(name, new)  # A field that the checkpoint lacks is unchanged.
      if old != new and (group, name) not in ABOUT_CHANGES:
        changes.append(Change(f'{group}.{name}', old, new, _kind(group, name, before, now)))
  return changes


def require_allowed(changes, allowed, workdir):
  """Raise ConfigError for incompatible changes, and for those that require train.allow_changes."""
  describe = lambda c: f'{c.field} was {config.shown(c.old)} in {workdir} and is {config.shown(c.new)} now'
  fixed = [f'{describe(c)}, which is incompatible with its checkpoints; keep it, or give a new --workdir'
           for c in changes if c.kind == FIXED]
  meaning = [f'{describe(c)}; keep it, give a new --workdir, or allow it with --config.train.allow_changes=true'
             for c in changes if c.kind == MEANING]
  if fixed or (meaning and not allowed):
    raise ConfigError([*fixed, *(() if allowed else meaning)])


def describe_jump(before, spec, step):
  """Describe a jump of the learning rate by more than 5% caused by changed settings; '' if there is none.

  before: config of the checkpoint of this step, as nested dicts.
  """
  if not before.get('optimizer') or not before.get('train', {}).get('steps'):
    return ''
  steps = before['train']['steps']
  old = float(make_schedule(_optimizer_spec(before['optimizer']), steps)(step))
  new = float(make_schedule(spec.optimizer, spec.train.steps)(step))
  if abs(new - old) <= max(new, old) / 20:
    return ''
  shape = (f'; optimizer.schedule={spec.optimizer.schedule} spans train.steps, which was {steps} and is '
           f'{spec.train.steps}')
  return (f'the learning rate jumps at step {step}: {new:.3g}, was {old:.3g} with the earlier settings'
          + shape * (steps != spec.train.steps))


def _optimizer_spec(settings):
  known = {field.name for field in dataclasses.fields(OptimizerSpec)}
  return config.build(OptimizerSpec, {k: v for k, v in settings.items() if k in known})


def _kind(group, name, before, now):
  default, others = KINDS[group]
  old, new = before[group][name], now[group][name]
  if group == 'optimizer' and others.get(name) != FIXED:
    return MEANING if _state_shape(before[group]) == _state_shape({**before[group], name: new}) else FIXED
  if (group, name) == ('train', 'batch_size') and 'rl' in now:
    return FIXED  # The position in the data is a number of minibatches.
  if (group, name) == ('train', 'init_from') and now.get('adapter', {}).get('kind'):
    return HARMLESS  # The base of an adapter is identified by its hash.
  if (group, name) == ('data', 'sources') and _moved(old, new):
    return HARMLESS  # The fingerprint of the data detects changed contents.
  return others.get(name, default)


def _moved(old, new):
  """Return whether two {folder: weight} have the same folder names and weights in other locations."""
  names = lambda sources: [(os.path.basename(folder), sources[folder]) for folder in sorted(sources)]
  return names(old) == names(new)


def _state_shape(settings):
  """Return the structure, shapes and dtypes of the optimizer state, for a few example parameters."""
  spec = _optimizer_spec({**settings, 'freeze': ()})  # Its patterns need not match the example.
  leaf = lambda *shape: jax.ShapeDtypeStruct(shape, 'float32')
  params = {'embed': {'table': leaf(8, 4)}, 'final_norm': {'scale': leaf(4)},
            'blocks': {'attention': {'query': leaf(2, 4, 2, 2)}, 'mlp': {'up': leaf(2, 4, 8)}}}
  state = jax.eval_shape(make_optimizer(spec, 1)[0].init, params)
  return jax.tree.structure(state), [(x.shape, x.dtype) for x in jax.tree.leaves(state)]
