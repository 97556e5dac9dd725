"""Values for parameters by regular expressions of their paths, such as `blocks/mlp/up`."""

import re

import jax


def path_name(path):
  """Return a key path of JAX as text, its parts joined by `/`."""
  return jax.tree_util.keystr(path, simple=True, separator='/')


def path_names(params):
  """Return the paths of all leaves, in the order of `jax.tree.leaves`."""
  return [path_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]


def match_paths(rows, params, default):
  """Return, for every leaf, the value of the first row (pattern, value) that matches its path, else default(path)."""

  def find(path, _):
    name = path_name(path)
    for pattern, value in rows:
      if re.search(pattern, name):
        return value
    return default(name)

  return jax.tree_util.tree_map_with_path(find, params)
