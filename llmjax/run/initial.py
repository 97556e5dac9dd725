"""What a training loop does for adapters: their frozen base, and what trains beside it."""

import contextlib
import dataclasses
import pathlib

import jax.numpy as jnp

from llmjax.adapt.lora import adapter_names, combine, count, init_adapter
from llmjax.adapt.quantize import quantize_tree
from llmjax.checkpoint import bases
from llmjax.checkpoint.load import find_step, is_adapter, require_verified, restore_params
from llmjax.config import ConfigError
from llmjax.model.model import Model
from llmjax.parallel.sharding import tree_shardings
from llmjax.train.objectives import with_adapters
from llmjax.train.state import Trained, abstract_params, zero_rules

# Parameters that a run may add to those of the model that it starts from.
OPTIONAL = ('value', 'projection')


def checkpoint_of(name, source):
  """Returns the folder of the checkpoint that a setting of this name says: a run's newest good one, or itself.

  Raises ConfigError when it is neither, or is damaged.
  """
  folder = pathlib.Path(source)
  if (folder / 'checkpoints').exists():
    folder = folder / 'checkpoints' / str(find_step(folder))
  if not (folder / 'params').exists():
    raise ConfigError([f"{name}={source} is neither a run's folder nor one of its checkpoints"])
  require_verified(folder)
  return folder


def initial_checkpoint(source):
  """Returns the folder of the checkpoint that train.init_from names (see `checkpoint_of`), which has all weights.

  Raises ConfigError when it holds adapters alone.
  """
  folder = checkpoint_of('train.init_from', source)
  if is_adapter(folder):
    raise ConfigError([f'train.init_from={source} holds an adapter alone; put it into its base first: '
                       f'llmjax adapter merge --workdir={source} --output=FOLDER'])
  return folder


def restore_initial(source, folder, abstract):
  """Returns the parameters of a checkpoint, laid out as abstract is; ConfigError when they are another model's.

  A value head and a projection that it does not have are left out.
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
  """Returns the parameters that training begins with, laid out as those that are trained, without a value head.

  folder: of their checkpoint; None: what train.init_from says now.
  """
  source, model = spec.train.init_from, dataclasses.replace(spec.model, value_head=False)
  abstract = abstract_params(model, spec.train.param_dtype, mesh, spec.mesh.zero)
  return restore_initial(source, folder or initial_checkpoint(source), abstract)


class Adapting:
  """The adapters that a run trains, by its spec; `base` says which frozen base they are for, once it is loaded."""

  def __init__(self, spec, mesh, workdir, base=None):
    """spec: a command's, with `adapter.kind` set.  base: as a checkpoint has recorded it, or None."""
    self.spec, self.mesh, self.workdir, self.base = spec, mesh, workdir, base
    self.specs = {spec.adapter.name: spec.adapter}

  def load_frozen(self):
    """Returns {'base': parameters}, sharded, and quantised if the spec says so."""
    train = self.spec.train
    folder = (bases.find_base(self.base, train.init_from, self.workdir) if self.base
              else initial_checkpoint(train.init_from))
    require_verified(folder)
    base = restore_initial(train.init_from, folder, self._abstract_base())
    self.base = self.base or bases.identify(folder)
    return {'base': self._quantize(base)}

  def abstract_frozen(self):
    """Returns the ShapeDtypeStructs, with shardings, of `load_frozen`."""
    return {'base': self._quantize(self._abstract_base())}

  def trained(self, frozen=None):
    """Returns the Trained of fresh adapters on frozen parameters, or of their shapes."""
    frozen = frozen or self.abstract_frozen()
    dtype, adapter = jnp.dtype(self.spec.train.param_dtype), self.spec.adapter
    init = lambda key, base: {adapter.name: init_adapter(adapter, base, key, dtype)}
    names = {adapter.name: adapter_names(adapter, Model(self.spec.model).param_names())}
    return Trained(init, names, (frozen['base'],))

  def loss_fn(self, loss_fn):
    """Returns the loss_fn of the adapters for one of the model's parameters."""
    return with_adapters(loss_fn, self.specs)

  def parameters(self, state):
    """Returns a state's parameters as the model takes them."""
    return combine(state.frozen['base'], state.params, self.specs)

  def describe(self, state):
    """Returns in words what trains."""
    return f'{self.spec.adapter.kind} {count(state.params)[1] / 1e6:.2f} M of them trained'

  def _abstract_base(self):
    spec = self.spec
    return abstract_params(spec.model, spec.train.param_dtype, self.mesh, spec.mesh.zero)

  def _quantize(self, base):
    kind = self.spec.adapter.quantize
    return quantize_tree(base, kind, Model(self.spec.model).param_names(), self._place) if kind else base

  def _place(self, names):
    return tree_shardings(self.mesh, names, zero_rules(self.spec.mesh.zero, 3))
