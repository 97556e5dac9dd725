"""Logical axis names, the table that maps them to mesh axes, and what follows from it."""

import dataclasses
import math

import jax
from jax.sharding import NamedSharding, PartitionSpec

from llmjax.config import ConfigError
from llmjax.parallel.spec import ROW_AXES, indivisible

# Weight axes (`embed`) and activation axes (`act_embed`) have their own names, so that one mesh axis
# never appears twice in a spec.
TRAIN_RULES = {
    # Rows.  A stage or an expert that held no rows of its own would stand idle outside its layers.
    'batch': ('stage', 'data', 'fsdp', 'expert'),
    'length': 'context',
    # Between blocks a row lies over `tensor` too (sequence parallelism, arXiv:2205.05198, section 4.2.2).
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
    # Embedding and head belong to no stage: all of them share the matrices.
    'vocab': 'tensor',
    'table_embed': ('fsdp', 'expert', 'stage'),
}

# ZeRO (arXiv:1910.02054, section 5): what lies over `data` as well.
ZERO_RULES = {**TRAIN_RULES, 'embed': ('fsdp', 'expert', 'data'), 'expert_embed': ('fsdp', 'data'),
               'table_embed': ('fsdp', 'expert', 'stage', 'data')}


# What a product takes: weights whole but for what `tensor` divides.
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
  """Return x laid out as its logical names say; x itself where no mesh is set.

  Inside a shard_map, axes that it handles itself are left out.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return x
  free = set(auto_axes(mesh))
  spec = PartitionSpec(*(tuple(a for a in axes_of(n, rules) if a in free) or None if n else None
                         for n in names))
  return jax.lax.with_sharding_constraint(x, spec)


def auto_axes(mesh=None):
  """Return the axes, larger than 1, that XLA divides work over: no shard_map around us has them."""
  mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
  if mesh.empty:
    return ()
  return tuple(a for a in mesh.axis_names if mesh.shape[a] > 1 and a not in mesh.manual_axes)


def row_shards():
  """Return into how many parts the mesh that is set divides the rows of a batch."""
  return math.prod(mesh_size(axis) for axis in axes_of('batch'))


def require_divisible(name, whole, axes=ROW_AXES, times=1, words=''):
  """Raise ConfigError where a number is not divisible by axes of the mesh that is set; see `spec.indivisible`."""
  if problems := list(indivisible(name, whole, axes, mesh_size, times, words)):
    raise ConfigError(problems)


def mesh_size(axis):
  """Return the size of an axis of the mesh that is set; 1 without one."""
  return dict(jax.sharding.get_abstract_mesh().shape).get(axis, 1)


def sum_over_rows(fn, weights, *rows):
  """Return fn(weights, *rows) where fn's outputs are sums over rows and tokens.

  rows: arrays [B, T, ...].  Each device adds up its own tokens, and one sum over the devices at the end
  joins them: in a loop inside fn, XLA would join them in every turn.
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
  """Return which parameter every leaf of a state mirrors, as the text of its path; '' for none.

  state: any tree whose paths end in a parameter's path where it mirrors that parameter (as optimizer
  moments do).  Leaves of another shape (counters, factored moments) mirror nothing.
  """
  shapes = {jax.tree_util.keystr(path): leaf.shape
            for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]}

  def find(path, leaf):
    keys = (jax.tree_util.keystr(path[start:]) for start in range(len(path)))
    return next((key for key in keys if key in shapes and shapes[key] == leaf.shape), '')

  return jax.tree_util.tree_map_with_path(find, state)


@dataclasses.dataclass(frozen=True)
class WeightLayout:
  """The logical axis names of a weight on the mesh that is set.  join_gradients: see `ops.products.project`."""

  names: tuple[str, ...]
  join_gradients: bool = False

  def all_gather(self, w):
    """Return the weight as a product takes it, gathered over `data` first and `fsdp` after.

    In two steps, because a TPU's network gathers over one part of its torus at a time: over all of it at
    once XLA sums arrays of zeros instead, which sends twice as much.
    """
    return constrain(constrain(w, *self.names), *self.names, rules=GATHERED_RULES)

  def reduce_scatter(self, gradient):
    """Return a weight's gradient, summed over the rows and divided as the weight is."""
    return constrain(gradient, *self.names)


def by_rows(fn, *rows, weights=None):
  """Return fn(*rows), arrays [B, T, ...], where fn works on every token by itself.

  Each device works on its own tokens; left to XLA, some functions (top_k) would gather those of all.
  weights: arrays that every token needs whole, fn's first argument then; None for none.
  """
  axes, layout = row_layout(rows[0].shape)
  row = PartitionSpec(*layout)
  whole = () if weights is None else (weights,)
  if not axes:
    return fn(*whole, *rows)
  specs = *(PartitionSpec() for _ in whole), *(row for _ in rows)
  return jax.shard_map(fn, axis_names=set(axes), check_vma=False, in_specs=specs, out_specs=row)(*whole, *rows)


def row_layout(shape=None):
  """Return (mesh axes that XLA divides tokens over, (those of the batch or None, of the length or None)).

  shape: of arrays [B, T, ...]; where B or T does not divide, its axes are left out.
  """
  free = auto_axes()
  found = []
  for i, name in enumerate(('batch', 'length')):
    axes = tuple(a for a in axes_of(name) if a in free)
    fits = shape is None or shape[i] % math.prod(map(mesh_size, axes)) == 0
    found.append(axes if fits and axes else None)
  return tuple(a for axes in found for a in axes or ()), tuple(found)


def state_names(abstract_state, params, names):
  """Return the logical names of every leaf of a state: a leaf that mirrors a parameter takes its names.

  params, names: the abstract parameters and their names, in the same tree.  Leaves that mirror no
  parameter are replicated.
  """
  flat = {jax.tree_util.keystr(path): n
          for path, n in jax.tree_util.tree_flatten_with_path(names, is_leaf=is_names)[0]}
  return jax.tree.map(lambda leaf, key: flat[key] if key else (None,) * len(leaf.shape), abstract_state,
                      mirrored(abstract_state, params))


def zero_rules(zero, stage):
  """Return the sharding rules of arrays that ZeRO shards over `data` from `stage` on.  zero: the stage in use."""
  return ZERO_RULES if zero >= stage else TRAIN_RULES
