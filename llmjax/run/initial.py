"""Parameters that a run starts from or keeps frozen: those of other checkpoints."""

import contextlib
import dataclasses
import pathlib

from llmjax.checkpoint import bases
from llmjax.checkpoint.load import find_step, is_adapter, require_verified, restore_params
from llmjax.config import ConfigError
from llmjax.train.trainable import abstract_params, quantize_base

# Parameters that a run may add to those of the model that it starts from.
OPTIONAL = ('value', 'projection')


def checkpoint_of(name, source):
  """Return the folder of the checkpoint that a config field names: a run's newest verified one, or itself.

  name: of the field.  Raises ConfigError when it is neither a run nor a checkpoint, or is damaged.
  """
  folder = pathlib.Path(source)
  if (folder / 'checkpoints').exists():
    folder = folder / 'checkpoints' / str(find_step(folder))
  if not (folder / 'params').exists():
    raise ConfigError([f"{name}={source} is neither a run's folder nor one of its checkpoints"])
  require_verified(folder)
  return folder


def initial_checkpoint(source):
  """Return the folder of the checkpoint that train.init_from names (see `checkpoint_of`).

  Raises ConfigError when it holds an adapter without its base.
  """
  folder = checkpoint_of('train.init_from', source)
  if is_adapter(folder):
    raise ConfigError([f'train.init_from={source} holds an adapter alone; put it into its base first: '
                       f'llmjax adapter merge --workdir={source} --output=FOLDER'])
  return folder


def restore_initial(source, folder, abstract):
  """Restore the parameters of a checkpoint with the shardings of `abstract`.

  A value head and a projection that the checkpoint lacks are left out.  Raises ConfigError when the checkpoint is of
  another model.
  """
  try:
    return restore_params(folder, abstract)
  except ValueError as e:
    for lacking in (('value',), ('projection',), OPTIONAL):
      if set(lacking) <= set(abstract):
        with contextlib.suppress(ValueError):
          return restore_params(folder, {name: tree for name, tree in abstract.items() if name not in lacking})
    raise ConfigError([f'train.init_from={source} holds another model: {str(e).splitlines()[0]}']) from e


def load_initial(spec, mesh, folder=None):
  """Load the initial parameters of a run, sharded as those that train, without a value head.

  folder: of their checkpoint; None: that of train.init_from.
  """
  source, model = spec.train.init_from, dataclasses.replace(spec.model, value_head=False)
  abstract = abstract_params(model, spec.train.param_dtype, mesh, spec.mesh.zero)
  return restore_initial(source, folder or initial_checkpoint(source), abstract)


class AdapterBase:
  """The frozen base of a run's adapters.  identity: which checkpoint it is, as the run's own checkpoints record it."""

  def __init__(self, spec, mesh, workdir):
    self._spec, self._mesh, self._workdir, self.identity = spec, mesh, workdir, None

  def load(self, identity=None):
    """Return the parameters of the base, sharded, and quantized if the spec asks for it.

    identity: of the base that the adapters were trained on; None: that of train.init_from.
    """
    spec, source = self._spec, self._spec.train.init_from
    folder = bases.find_base(identity, source, self._workdir) if identity else initial_checkpoint(source)
    require_verified(folder)
    abstract = abstract_params(spec.model, spec.train.param_dtype, self._mesh, spec.mesh.zero)
    base = restore_initial(source, folder, abstract)
    self.identity = identity or bases.identify(folder)
    return quantize_base(spec.model, spec.adapter, base, self._mesh, spec.mesh.zero)
