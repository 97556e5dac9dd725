"""Logical axis names, the table that maps them to mesh axes, and what follows from it."""

import jax
from jax.sharding import NamedSharding, PartitionSpec

# Weight axes (`embed`) and activation axes (`act_embed`) have their own names, so that one mesh axis
# never appears twice in a spec.
TRAIN_RULES = {
    'batch': ('data', 'fsdp'),
    'length': 'context',
    'act_embed': None,
    'act_heads': 'tensor',
    'act_mlp': 'tensor',
    'embed': 'fsdp',
    'mlp': 'tensor',
    'heads': 'tensor',
    'kv_heads': 'tensor',
    'head_dim': None,
    'vocab': 'tensor',
    'norm': None,
    'layers': 'stage',
}


def mesh_spec(names, rules=TRAIN_RULES):
  """Returns the PartitionSpec of an array with these logical axes; None replicates an axis.

  ('embed', 'mlp') -> PartitionSpec('fsdp', 'tensor').  Raises ValueError on an unknown name.
  """
  if unknown := [n for n in names if n is not None and n not in rules]:
    raise ValueError(f'no sharding rule for {unknown}; known: {sorted(rules)}')
  return PartitionSpec(*(None if n is None else rules[n] for n in names))


def is_names(x):
  """Returns whether x is the logical names of one array: a plain tuple of names and Nones."""
  return type(x) is tuple and all(n is None or isinstance(n, str) for n in x)


def tree_shardings(mesh, names, rules=TRAIN_RULES):
  """Returns the NamedSharding of every leaf, given the tree of its logical names."""
  return jax.tree.map(lambda n: NamedSharding(mesh, mesh_spec(n, rules)), names,
                      is_leaf=is_names)


def constrain(x, *names, rules=TRAIN_RULES):
  """Returns x laid out as its logical names say; x itself where no mesh is set."""
  if jax.sharding.get_abstract_mesh().empty:
    return x
  return jax.lax.with_sharding_constraint(x, mesh_spec(names, rules))


def mirrored(state, params):
  """Returns which parameter every leaf of a state mirrors, as the text of its path; '' for none.

  state: any tree whose paths end in a parameter's path where it mirrors that parameter (as optimizer
  moments do).  Leaves of another shape (counters, factored moments) mirror nothing.
  """
  shapes = {jax.tree_util.keystr(path): leaf.shape
            for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]}

  def find(path, leaf):
    keys = (jax.tree_util.keystr(path[start:]) for start in range(len(path)))
    return next((key for key in keys if key in shapes and shapes[key] == leaf.shape), '')

  return jax.tree_util.tree_map_with_path(find, state)


def state_names(abstract_state, params, names):
  """Returns the logical names of every leaf of a state: a leaf that mirrors a parameter takes its names.

  params, names: the abstract parameters and their names, in the same tree.  Leaves that mirror no
  parameter are replicated.
  """
  flat = {jax.tree_util.keystr(path): n
          for path, n in jax.tree_util.tree_flatten_with_path(names, is_leaf=is_names)[0]}
  return jax.tree.map(lambda leaf, key: flat[key] if key else (None,) * len(leaf.shape), abstract_state,
                      mirrored(abstract_state, params))
