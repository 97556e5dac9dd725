"""A checkpoint read on the host, one array at a time, without its model or its mesh."""

import logging

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

ITEMS = ('params', 'optimizer')


class Arrays:
  """The arrays of a checkpoint by name: `params/decoder/...`, `optimizer/opt_state/0/mu/...`."""

  def __init__(self, checkpoint):
    self._checkpoint = epath.Path(checkpoint)
    self._orbax = ocp.PyTreeCheckpointer()
    # Orbax warns that an item has no metadata of a whole checkpoint, and of other devices than these.
    logging.getLogger('absl').addFilter(_not_of_reading)
    self._trees, self._places, self.shapes = {}, {}, {}
    for item in ITEMS:
      tree = self._orbax.metadata(self._checkpoint / item).item_metadata.tree
      self._trees[item] = tree
      for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = '/'.join([item, *(str(getattr(k, 'key', getattr(k, 'idx', k))) for k in path)])
        self._places[name] = item, path
        self.shapes[name] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)

  def read(self, name):
    """Returns one array."""
    item, wanted = self._places[name]
    tree = self._trees[item]
    only = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf if path == wanted else ocp.PLACEHOLDER, tree)
    plain = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    found = self._orbax.restore(self._checkpoint / item,
                                args=ocp.args.PyTreeRestore(item=only, restore_args=plain))
    return next(np.asarray(x) for x in jax.tree.leaves(found) if x is not ocp.PLACEHOLDER)


def read_json(checkpoint, item):
  """Returns what was saved as `stream` or `spec`."""
  with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as orbax:
    return orbax.restore(epath.Path(checkpoint) / item)


def _not_of_reading(record):
  return record.levelno > logging.WARNING or 'orbax' not in record.pathname
