"""Logical axis names, the table that maps them to mesh axes, and functions that use it."""

import dataclasses
import math

import jax
from jax.sharding import NamedSharding, PartitionSpec

from llmjax.config import ConfigError
from llmjax.parallel.spec import ROW_AXES, indivisible

# Weights (`embed`) and activations (`act_embed`) have different names, so that no mesh axis appears twice in a spec.
TRAIN_RULES = {
    # Sequences.  A stage or an expert without sequences of its own would be idle outside its layers.
    'batch': ('stage', 'data', 'fsdp', 'expert'),
    'length': 'context',
    # Between blocks the length is sharded over `tensor`, too (sequence parallelism, arXiv:2205.05198, section 4.2.2).
    'block_length': ('context', 'tensor'),
    'act_embed': None,
    'act_heads': 'tensor',
    'act_mlp': 'tensor',
    # Weights.
    'embed': ('fsdp', 'expert'),
    'mlp': 'tensor',
    'heads': 'tensor',
    'kv_heads': 'tensor',
    'head_dim': None,
    'norm': None,
    'layers': 'stage',
    'experts': 'expert',
    'expert_embed': 'fsdp',
    'expert_rows': ('stage', 'data', 'fsdp'),
    'slots': 'context',
    'router': None,
    'rank': None,
    # Embedding and head belong to no stage: all stages shard the matrices.
    'vocab': 'tensor',
    'table_embed': ('fsdp', 'expert', 'stage'),
}

# ZeRO (arXiv:1910.02054, section 5): these are sharded over `data`, too.
ZERO_RULES = {**TRAIN_RULES, 'embed': ('fsdp', 'expert', 'data'), 'expert_embed': ('fsdp', 'data'),
               'table_embed': ('fsdp', 'expert', 'stage', 'data')}

# Weights as matrix products use them: sharded over `tensor` alone.
GATHERED_RULES = {**TRAIN_RULES, 'embed': None, 'expert_embed': None, 'table_embed': None}


def axes_of(name, rules=TRAIN_RULES):
  """Return the mesh axes of a logical name, as a tuple."""
  axes = rules[name]
  return axes if isinstance(axes, tuple) else () if axes is None else (axes,)


def mesh_spec(names, rules=TRAIN_RULES):
  """Return the PartitionSpec of an array with these logical axes; None replicates an axis.

  ('embed', 'mlp') -> PartitionSpec('fsdp', 'tensor').  Raises ValueError on an unknown name.
  """
  if unknown := [n for n in names if n is not None and n not in rules]:
    raise ValueError(f'no sharding rule for {unknown}; known: {sorted(rules)}')
  return PartitionSpec(*(None if n is None else rules[n] for n in names))


def is_names(x):
  """Return whether x is the logical names of one array: a plain tuple of names and Nones."""
  return type(x) is tuple and all(n is None or isinstance(n, str) for n in x)


def tree_shardings(mesh, names, rules=TRAIN_RULES):
  """Return the NamedSharding of every leaf, given the tree of its logical names."""
  return jax.tree.map(lambda n: NamedSharding(mesh, mesh_spec(n, rules)), names,
                      is_leaf=is_names)


def constrain(x, *names, rules=TRAIN_RULES):
  """Constrain the sharding of x by its logical names, over the auto axes of the mesh that is set, if any."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return x
  free = set(auto_axes(mesh))
  spec = PartitionSpec(*(tuple(a for a in axes_of(n, rules) if a in free) or None if n else None
                         for n in names))
  return jax.lax.with_sharding_constraint(x, spec)


def auto_axes(mesh=None):
  """Return the mesh axes larger than 1 that are not manual in an enclosing shard_map."""
  mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
  if mesh.empty:
    return ()
  return tuple(a for a in mesh.axis_names if mesh.shape[a] > 1 and a not in mesh.manual_axes)


def row_shards():
  """Return the number of shards of a batch on the mesh that is set."""
  return math.prod(mesh_size(axis) for axis in axes_of('batch'))


def require_divisible(name, whole, axes=ROW_AXES, times=1, words=''):
  """Raise ConfigError if a number is not divisible by axes of the mesh that is set; see `spec.indivisible`."""
  if problems := list(indivisible(name, whole, axes, mesh_size, times, words)):
    raise ConfigError(problems)


def mesh_size(axis):
  """Return the size of an axis of the mesh that is set; 1 without one."""
  return dict(jax.sharding.get_abstract_mesh().shape).get(axis, 1)


def sum_over_rows(fn, weights, *rows):
  """Compute fn(weights, *rows), whose outputs are sums over sequences and tokens.

  rows: arrays [B, T, ...].  Each device sums over its own tokens, with one sum over devices at the end: in a loop
  inside fn, XLA would sum over devices in every iteration.
  """
  axes, layout = row_layout()
  row = PartitionSpec(*layout)
  if not axes:
    return fn(weights, *rows)
  for name, size, divided in zip(('train.batch_size', 'data.seq_len'), rows[0].shape, layout, strict=False):
    require_divisible(name, size, divided or ())
  outputs = jax.shard_map(
      lambda *args: jax.tree.map(lambda y: y[None], fn(*args)), axis_names=set(axes), check_vma=False,
      in_specs=(PartitionSpec(), *(row for _ in rows)), out_specs=PartitionSpec(axes))(weights, *rows)
  return jax.tree.map(lambda y: y.sum(0), outputs)


def mirrored(state, params):
  """Map every leaf of an optimizer state to the path of the parameter that it belongs to, or ''.

  A leaf belongs to a parameter if its path ends in the parameter's and the shapes are equal, as for moments; counters
  and factored moments belong to none.
  """
  shapes = {jax.tree_util.keystr(path): leaf.shape
            for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]}

  def find(path, leaf):
    keys = (jax.tree_util.keystr(path[start:]) for start in range(len(path)))
    return next((key for key in keys if key in shapes and shapes[key] == leaf.shape), '')

  return jax.tree_util.tree_map_with_path(find, state)


@dataclasses.dataclass(frozen=True)
class WeightLayout:
  """Sharding of a weight by its logical axis names.  join_gradients: see `ops.products.project`."""

  names: tuple[str, ...]
  join_gradients: bool = False

  def all_gather(self, w):
    """Gather the weight for a product, over `data` and then over `fsdp`.

    A TPU's network gathers over one dimension of its torus at a time: for both in one step XLA would sum arrays padded
    with zeros, which sends twice as much.
    """
    return constrain(constrain(w, *self.names), *self.names, rules=GATHERED_RULES)

  def reduce_scatter(self, gradient):
    """Sum the gradient over sequences, and shard it as the weight."""
    return constrain(gradient, *self.names)


def by_rows(fn, *rows, weights=None):
  """Compute fn(*rows) of arrays [B, T, ...] for a fn that processes every token separately.

  Each device processes its own tokens; XLA would gather all of them for some functions (top_k).  weights: arrays that
  are replicated and passed as the first argument of fn, or None.
  """
  axes, layout = row_layout(rows[0].shape)
  row = PartitionSpec(*layout)
  replicated = () if weights is None else (weights,)
  if not axes:
    return fn(*replicated, *rows)
  specs = *(PartitionSpec() for _ in replicated), *(row for _ in rows)
  return jax.shard_map(fn, axis_names=set(axes), check_vma=False, in_specs=specs, out_specs=row)(*replicated, *rows)


def row_layout(shape=None):
  """Return (auto mesh axes of tokens, (those of the batch or None, those of the length or None)).

  shape: of arrays [B, T, ...]; axes that do not divide B or T are left out.
  """
  free = auto_axes()
  layout = []
  for i, name in enumerate(('batch', 'length')):
    axes = tuple(a for a in axes_of(name) if a in free)
    fits = shape is None or shape[i] % math.prod(map(mesh_size, axes)) == 0
    layout.append(axes if fits and axes else None)
  return tuple(a for axes in layout for a in axes or ()), tuple(layout)


def state_names(abstract_state, params, names):
  """Return the logical names of every leaf of an optimizer state: those of its parameter (see `mirrored`).

  params, names: the abstract parameters and their names, in the same tree.  Leaves without a parameter are replicated.
  """
  flat = {jax.tree_util.keystr(path): n
          for path, n in jax.tree_util.tree_flatten_with_path(names, is_leaf=is_names)[0]}
  return jax.tree.map(lambda leaf, key: flat[key] if key else (None,) * len(leaf.shape), abstract_state,
                      mirrored(abstract_state, params))


def zero_rules(zero, stage):
  """Return the sharding rules of arrays that ZeRO shards over `data` from `stage` on.  zero: the stage in use."""
  return ZERO_RULES if zero >= stage else TRAIN_RULES
