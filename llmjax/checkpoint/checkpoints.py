"""A run's checkpoints: `<workdir>/checkpoints/<step>/` with four Orbax items.

  params     the parameters alone, so that evaluation and generation read no optimizer state
  optimizer  step, optimizer state and PRNG key
  stream     the data stream's state, one number, and the fingerprint of its data
  spec       the resolved config of the run
"""

import json
import pathlib

import jax
import orbax.checkpoint as ocp
from etils import epath

from llmjax import config
from llmjax.config import ConfigError
from llmjax.model import decoder
from llmjax.model.spec import ModelSpec
from llmjax.train.state import TrainState


class Checkpoints:
  """Saves and restores TrainStates.  Saving is asynchronous: `close` waits for what is in flight."""

  def __init__(self, workdir, keep=3):
    self.folder = epath.Path(workdir) / 'checkpoints'
    if '://' not in str(workdir):
      self.folder = self.folder.absolute()  # Orbax takes no relative paths.
    self._manager = ocp.CheckpointManager(
        self.folder, item_names=('params', 'optimizer', 'stream', 'spec'),
        options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True))

  def latest(self):
    """Returns the newest step that is saved, or None."""
    return self._manager.latest_step()

  def save(self, step, state, stream, spec):
    """Starts to save; the state may be donated to the next step at once.

    stream: {'batches': drawn so far, 'fingerprint': of the data}.  spec: the config as nested dicts.
    """
    rest = {'step': state.step, 'opt_state': state.opt_state, 'key': state.key}
    self._manager.save(step, args=ocp.args.Composite(
        params=ocp.args.StandardSave(state.params), optimizer=ocp.args.StandardSave(rest),
        stream=ocp.args.JsonSave(stream), spec=ocp.args.JsonSave(spec)))

  def restore(self, step, abstract):
    """Returns (state, stream) as saved.  abstract: the TrainState of shapes, dtypes and shardings."""
    rest = {'step': abstract.step, 'opt_state': abstract.opt_state, 'key': abstract.key}
    items = self._manager.restore(step, args=ocp.args.Composite(
        params=ocp.args.StandardRestore(abstract.params),
        optimizer=ocp.args.StandardRestore(rest), stream=ocp.args.JsonRestore()))
    return TrainState(params=items.params, **items.optimizer), items.stream

  def wait(self):
    """Returns when every save has reached the disk."""
    self._manager.wait_until_finished()

  def close(self):
    self._manager.wait_until_finished()
    self._manager.close()


def read_config(workdir):
  """Returns the resolved config of a run's folder as nested dicts; ConfigError when it is not one."""
  file = epath.Path(workdir) / 'config.json'
  if not file.exists():
    raise ConfigError([f"--workdir={workdir} is not a run's folder (no config.json); give the "
                       '--workdir that `llmjax pretrain` had'])
  return json.loads(file.read_text())


def find_step(workdir, step=0):
  """Returns the step to load: the one asked for, or the newest; ConfigError when there is none."""
  folder = epath.Path(workdir) / 'checkpoints'
  # Orbax writes under another name until a checkpoint is whole.
  steps = sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.exists() else []
  if not steps:
    raise ConfigError([f'--workdir={workdir} has no checkpoint yet; let `llmjax pretrain` reach its '
                       'first one'])
  if step and step not in steps:
    raise ConfigError([f'--step={step} is not a checkpoint of {workdir}; it has '
                       f'{", ".join(map(str, steps))}'])
  return step or steps[-1]


def load_params(workdir, step=0, shardings=None):
  """Returns (params, ModelSpec, config, step) of a run.

  step: 0 for the newest checkpoint.  shardings: function of the ModelSpec that returns the tree of
  shardings to load into; None loads onto the first device.
  """
  settings = read_config(workdir)
  step = find_step(workdir, step)
  model = config.build(ModelSpec, settings['model'])
  dtype = settings['train']['param_dtype']
  shapes = jax.eval_shape(lambda: decoder.init_params(model, jax.random.key(0), dtype))
  if shardings is None:
    single = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    tree = jax.tree.map(lambda _: single, shapes)
  else:
    tree = shardings(model)
  abstract = jax.tree.map(lambda s, n: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=n), shapes, tree)
  return restore_params(epath.Path(workdir) / 'checkpoints' / str(step), abstract), model, settings, step


def restore_params(checkpoint, abstract):
  """Returns the parameters of one checkpoint's folder, shaped and placed as `abstract` says."""
  path = pathlib.Path(checkpoint).absolute() if '://' not in str(checkpoint) else checkpoint
  with ocp.StandardCheckpointer() as checkpointer:
    return checkpointer.restore(epath.Path(path) / 'params', abstract)
