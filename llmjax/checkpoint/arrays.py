"""Reading a checkpoint on the host one array at a time, without its model or mesh."""

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from llmjax.checkpoint import orbax_io

ITEMS = ('params', 'optimizer')


class Arrays:
  """The arrays of a checkpoint by name, such as `params/blocks/mlp/up` or `optimizer/opt_state/0/mu/embed/table`.

  shapes: {name: ShapeDtypeStruct}.
  """

  def __init__(self, checkpoint):
    self._checkpoint = epath.Path(checkpoint)
    self._orbax = ocp.PyTreeCheckpointer()
    orbax_io.silence_reading()
    self._trees, self._paths, self.shapes = {}, {}, {}
    for item in ITEMS:
      tree = self._orbax.metadata(self._checkpoint / item).item_metadata.tree
      self._trees[item] = tree
      for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = '/'.join([item, *(str(getattr(k, 'key', getattr(k, 'idx', k))) for k in path)])
        self._paths[name] = item, path
        self.shapes[name] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)

  def read(self, name):
    """Read one array."""
    item, selected = self._paths[name]
    tree = self._trees[item]
    only = jax.tree_util.tree_map_with_path(lambda path, leaf: leaf if path == selected else ocp.PLACEHOLDER, tree)
    on_host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    restored = self._orbax.restore(self._checkpoint / item,
                                   args=ocp.args.PyTreeRestore(item=only, restore_args=on_host))
    return next(np.asarray(x) for x in jax.tree.leaves(restored) if x is not ocp.PLACEHOLDER)


def read_json(checkpoint, item):
  """Read the JSON item `stream` or `spec`."""
  with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as orbax:
    return orbax.restore(epath.Path(checkpoint) / item)
