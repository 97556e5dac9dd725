"""Which parameters are matrices, which of their axes are inputs, and selecting them by path pattern."""

import fnmatch
import re

import jax

from llmjax.config import ConfigError
from llmjax.ops.products import is_weight

# Path of a parameter -> number of input and of output axes, which are its last ones. Axes before them (layers, experts)
# are a batch of matrices. The router of a mixture of experts is left out: its choice of experts has no gradient, so a
# low-rank change to it is hard to train and to merge.
MATRICES = (
    (r'(^|/)attention/(query|key|value)$', 1, 2),
    (r'(^|/)attention/out$', 2, 1),
    (r'(^|/)mlp/(shared/)?(gate|up|down)$', 1, 1),
    (r'^head/kernel$', 1, 1),
    (r'^embed/table$', 1, 1),
)


def path_text(path):
  """Format a JAX key path as text: 'blocks/attention/query'."""
  return jax.tree_util.keystr(path, simple=True, separator='/')


def matrix_axes(path):
  """Return (number of input axes, number of output axes) of the parameter at a path, or None if it is no matrix."""
  return next(((i, o) for pattern, i, o in MATRICES if re.search(pattern, path)), None)


def matrices(params):
  """Return {path: leaf} of all matrices in a tree of parameters, logical names or shapes."""
  flat = jax.tree_util.tree_flatten_with_path(params, is_leaf=lambda x: is_weight(x) or isinstance(x, tuple))[0]
  leaves = {path_text(path): leaf for path, leaf in flat}
  return {path: leaf for path, leaf in leaves.items() if matrix_axes(path)}


def find_targets(params, patterns):
  """Return {path: leaf} of the matrices that any pattern matches: fnmatch, or `re:` and a regex of the whole path.

  Raises ConfigError for every pattern that matches nothing, with the available paths.
  """
  known, matched, problems = matrices(params), set(), []
  for pattern in patterns:
    if pattern.startswith('re:'):
      paths = {p for p in known if re.fullmatch(pattern[3:], p)}
    else:
      paths = set(fnmatch.filter(known, pattern))
    if not paths:
      problems.append(f'adapter.targets: {pattern!r} matches no matrix; there are {", ".join(known)}')
    matched |= paths
  if problems:
    raise ConfigError(problems)
  return {path: leaf for path, leaf in known.items() if path in matched}


def set_leaf(tree, path, leaf):
  """Set the leaf of nested dicts at a path (text)."""
  *parents, last = path.split('/')
  for key in parents:
    tree = tree.setdefault(key, {})
  tree[last] = leaf


def get_leaf(tree, path):
  """Return what nested dicts hold at a path (text), or None."""
  for key in path.split('/'):
    if not isinstance(tree, dict) or key not in tree:
      return None
    tree = tree[key]
  return tree
