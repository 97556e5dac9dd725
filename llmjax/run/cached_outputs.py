"""Cache of another model's outputs (reference log-probabilities, a teacher's top-k) in a run's folder.

File names hold the digests of the data and of the model's parameters, so outputs of other data or of another model are
never reused.
"""

import json
import pathlib

import jax
import numpy as np

from llmjax.checkpoint import bases
from llmjax.config import ConfigError
from llmjax.data import dataset, stream
from llmjax.parallel import distributed, in_flight


class CachedModel:
  """A second checkpoint that a run reads, fixed from its first step on, with a cache of its outputs."""

  def __init__(self, folder, role, setting, source, find_checkpoint):
    """folder: of the cache, in the run's folder.  role: such as 'teacher'.  setting: config field with value `source`.

    find_checkpoint: function without arguments that returns the checkpoint at `source`; called for a new run.
    """
    self.folder, self._role, self._setting, self._source = pathlib.Path(folder), role, setting, source
    file = self.folder / f'{role}.json'
    self._resumed = file.exists() and any((self.folder.parent / 'checkpoints').glob('[0-9]*'))
    if self._resumed:
      self.identity = json.loads(file.read_text())
      return
    self.identity = bases.identify(find_checkpoint())
    distributed.wait_for_all(f'identified the {role}')
    if distributed.is_first():
      self.folder.mkdir(exist_ok=True)
      file.write_text(json.dumps(self.identity) + '\n')
    distributed.wait_for_all(f'recorded the {role}')

  def checkpoint(self):
    """Return the checkpoint's folder, also where it has moved to `source`.  Raises ConfigError where it is missing."""
    if not self._resumed:
      return pathlib.Path(self.identity['path'])
    try:
      return pathlib.Path(bases.find_base(self.identity, self._source, self.folder.parent))
    except ConfigError as e:
      raise ConfigError([f'{self._setting}={self._source} is not the {self._role} that this run began with, '
                         f'{self.identity["path"]}; put it back, or start a new run']) from e

  def outputs(self, mesh, data, split, variant, fields, shape, make):
    """Return the model's outputs on a split, {field: dataset.Table}, computed where they are not cached.

    data: a DataSpec.  variant: text that identifies what else the outputs depend on.  fields: {name: dtype}.  shape: of
    each table; outputs beyond it are of padding.  make() -> (step, params, batches on the devices), where
    step(params, batch) -> {field: array}.
    """
    name = f'{split}-{stream.fingerprint(data, split)[:16]}-{self.identity["sha256"][:16]}-{variant}'
    files = {field: self.folder / f'{name}-{field}.npy' for field in fields}
    missing = not all(file.exists() for file in files.values())
    distributed.wait_for_all(f'looked up the outputs of the {self._role} on {split}')
    if missing:
      with jax.set_mesh(mesh):
        step, params, batches = make()
        step = jax.jit(step, out_shardings=jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
        _write(files, fields, shape, in_flight.results(step(params, batch) for batch in batches))
      distributed.wait_for_all(f'wrote the outputs of the {self._role} on {split}')
    return {field: dataset.Table(file) for field, file in files.items()}


def _write(files, fields, shape, batches):
  """Write tables of a shape from {field: array} per batch; the files get their names when they are complete."""
  partial = {field: file.with_suffix('.partial.npy') for field, file in files.items()}
  tables = {field: np.lib.format.open_memmap(partial[field], 'w+', np.dtype(dtype), shape)
            for field, dtype in fields.items()} if distributed.is_first() else {}
  start = 0
  for outputs in batches:  # Every process computes; the first one writes.
    for field, table in tables.items():
      rows = np.asarray(outputs[field]).reshape(-1, *shape[1:])
      table[start:start + len(rows)] = rows[:len(table) - start]
    start += len(rows) if tables else 0
  for field, table in tables.items():
    table.flush()
    partial[field].replace(files[field])
