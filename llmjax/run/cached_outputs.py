"""What a run keeps of another model that it learns from: which checkpoint that was, and tables of what it said.

Tables are made once, and are named by the digests of the data and of the model's parameters: what another model
said is made anew, never taken for this one's.
"""

import json
import pathlib

import jax
import numpy as np

from llmjax.checkpoint import bases
from llmjax.config import ConfigError
from llmjax.data import dataset, stream
from llmjax.parallel import distributed, in_flight


class Kept:
  """A checkpoint that a run learns from: from its first step on the same one."""

  def __init__(self, folder, role, setting, source, find):
    """folder: in the run's.  role: such as 'teacher'.  setting: what names it in the config; source: its value there.

    find: function without arguments to the checkpoint that source means now, for a run that has not begun.
    """
    self.folder, self._role, self._setting, self._source = pathlib.Path(folder), role, setting, source
    file = self.folder / f'{role}.json'
    self._begun = file.exists() and any((self.folder.parent / 'checkpoints').glob('[0-9]*'))
    if self._begun:
      self.known = json.loads(file.read_text())
      return
    self.known = bases.identify(find())
    distributed.wait_for_all(f'looked for the {role}')
    if distributed.is_first():
      self.folder.mkdir(exist_ok=True)
      file.write_text(json.dumps(self.known) + '\n')
    distributed.wait_for_all(f'named the {role}')

  def checkpoint(self):
    """Returns its folder, wherever it is now.  Raises ConfigError where it is gone."""
    if not self._begun:
      return pathlib.Path(self.known['path'])
    try:
      return pathlib.Path(bases.find_base(self.known, self._source, self.folder.parent))
    except ConfigError as e:
      raise ConfigError([f'{self._setting}={self._source} is not the {self._role} that this run began with, '
                         f'{self.known["path"]}; put it back, or start a new run']) from e

  def tables(self, mesh, data, split, variant, fields, shape, make):
    """Returns {field: dataset.Table} of what it says of a split, made where one is not kept yet.

    data: a DataSpec.  variant: names what else they depend on.  fields: {name: dtype}.  shape: of each table; rows
    beyond it are padding.  make() -> (step, params, batches on the devices), step(params, batch) -> {field: rows}.
    """
    name = f'{split}-{stream.fingerprint(data, split)[:16]}-{self.known["sha256"][:16]}-{variant}'
    files = {field: self.folder / f'{name}-{field}.npy' for field in fields}
    missing = not all(file.exists() for file in files.values())
    distributed.wait_for_all(f'looked for what the {self._role} said of {split}')
    if missing:
      with jax.set_mesh(mesh):
        step, params, batches = make()
        step = jax.jit(step, out_shardings=jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
        _write(files, fields, shape, in_flight.results(step(params, batch) for batch in batches))
      distributed.wait_for_all(f'wrote what the {self._role} said of {split}')
    return {field: dataset.Table(file) for field, file in files.items()}


def _write(files, fields, shape, parts):
  """Writes tables of a shape, {field: rows} after another.  They have their names once they are whole."""
  partial = {field: file.with_suffix('.partial.npy') for field, file in files.items()}
  tables = {field: np.lib.format.open_memmap(partial[field], 'w+', np.dtype(dtype), shape)
            for field, dtype in fields.items()} if distributed.is_first() else {}
  begin = dict.fromkeys(tables, 0)
  for part in parts:  # Every process computes; the first one writes.
    for field, table in tables.items():
      rows = np.asarray(part[field]).reshape(-1, *shape[1:])
      table[begin[field]:begin[field] + len(rows)] = rows[:len(table) - begin[field]]
      begin[field] += len(rows)
  for field, table in tables.items():
    table.flush()
    partial[field].replace(files[field])
