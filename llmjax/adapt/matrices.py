"""Which parameters are matrices, which of their axes the input runs over, and choosing them by pattern."""

import fnmatch
import re

import jax

from llmjax.config import ConfigError
from llmjax.ops.products import is_weight

# Path of a parameter -> axes of its input and of its output, its last ones.  Axes before them (layers,
# experts) are a batch of matrices.  Not here is the router of a mixture: which experts it picks has no
# gradient, so a low-rank change to it is hard to train and to merge.
MATRICES = (
    (r'(^|/)attention/(query|key|value)$', 1, 2),
    (r'(^|/)attention/out$', 2, 1),
    (r'(^|/)mlp/(shared/)?(gate|up|down)$', 1, 1),
    (r'^head/kernel$', 1, 1),
    (r'^embed/table$', 1, 1),
)


def path_text(path):
  """Returns a path of JAX as text: 'blocks/attention/query'."""
  return jax.tree_util.keystr(path, simple=True, separator='/')


def matrix_axes(path):
  """Returns (input axes, output axes) of the parameter at a path (text), or None where it is no matrix."""
  return next(((i, o) for pattern, i, o in MATRICES if re.search(pattern, path)), None)


def matrices(params):
  """Returns {path: parameter} of all matrices of a tree of parameters, names or shapes."""
  flat = jax.tree_util.tree_flatten_with_path(params, is_leaf=lambda x: is_weight(x) or isinstance(x, tuple))[0]
  found = {path_text(path): leaf for path, leaf in flat}
  return {path: leaf for path, leaf in found.items() if matrix_axes(path)}


def find_targets(params, patterns):
  """Returns {path: parameter} of the matrices that any pattern names: fnmatch, or re:... of the whole path.

  Raises ConfigError for every pattern that names none, with the paths there are.
  """
  known, found, wrong = matrices(params), set(), []
  for pattern in patterns:
    if pattern.startswith('re:'):
      matched = {p for p in known if re.fullmatch(pattern[3:], p)}
    else:
      matched = set(fnmatch.filter(known, pattern))
    if not matched:
      wrong.append(f'adapter.targets: {pattern!r} matches no matrix; there are {", ".join(known)}')
    found |= matched
  if wrong:
    raise ConfigError(wrong)
  return {path: leaf for path, leaf in known.items() if path in found}


def place(tree, path, leaf):
  """Writes a leaf into nested dicts at a path (text)."""
  *parents, last = path.split('/')
  for key in parents:
    tree = tree.setdefault(key, {})
  tree[last] = leaf


def find(tree, path):
  """Returns what nested dicts hold at a path (text), or None."""
  for key in path.split('/'):
    if not isinstance(tree, dict) or key not in tree:
      return None
    tree = tree[key]
  return tree
