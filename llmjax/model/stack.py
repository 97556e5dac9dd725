"""Stacks of blocks: layers of one shape are stacked on a leading axis; a scan runs one period of the pattern a step.

`params['blocks']` has leaves [layers, ...].  A model whose layers differ in shape (dense first, experts after) has one
such tree for each stack, by name: {'dense': ..., 'moe': ...}.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from llmjax.model.block import Block, layer_kinds

# Values that the remat policy `minimal` saves per block besides its input, by the `checkpoint_name`s in model/ and
# ops/attention.py.  Number of values per token, and FLOPs to recompute one of them:
#
#   query, key, value   N H + 2 K H   2 D          attended   D     2 N H, and a sum over `tensor`
#   attention           N H + N       2 T          gate, up   2 F   2 D
#
# Recomputing a value of any matrix product costs about the same, so `minimal` drops the values that need none: norms,
# the activation and its product with `up`, and the output of `down`, which the backward pass does not use.  Without
# remat a block saves those, too, 8 D + 5 F values and more.  8 layers, D 512, F 1408, T 512, B 8, float32, XLA's CPU
# backend (temporary memory of the gradient, scanned; its FLOPs, unrolled):
#
#   none 2198 MiB, 802.0 GFLOP     minimal 1045 MiB, +0.7%     ... without attended         981 MiB, +2.8%
#   dots  980 MiB, +1.5%           full     404 MiB, +23%      ... without gate             875 MiB, +6.5%
#                                                              ... without query, key, value 853 MiB, +7.9%
#                                                              ... without gate and up       729 MiB, +12.4%
SAVED = ('query', 'key', 'value', 'attention', 'attended', 'gate', 'up')

REMAT = {
    'none': None,
    'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    'minimal': jax.checkpoint_policies.save_only_these_names(*SAVED),
    # One more product, for an eleventh of the memory: the first choice if `minimal` just does not fit.
    'out': jax.checkpoint_policies.save_only_these_names(*(n for n in SAVED if n != 'attended')),
    'mlp': jax.checkpoint_policies.save_only_these_names(*(n for n in SAVED if n not in ('gate', 'up'))),
    'full': jax.checkpoint_policies.nothing_saveable,
    # The values of `minimal` and the block's input, in host memory; on a CPU that is the same memory.
    'offload': jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[], names_which_can_be_offloaded=['block_input', *SAVED],
        offload_src='device', offload_dst='pinned_host'),
}


def init_stacks(spec, key, param_dtype, x, context):
  """Initialize the boxed parameters of all blocks; every leaf has a leading 'layers' axis."""
  kinds = layer_kinds(spec)
  names = list(dict.fromkeys(kind.stack for kind in kinds))
  # A single stack uses the key itself; several split it.
  keys = [key] if len(names) == 1 else jax.random.split(key, len(names))
  stacks = {}
  for name, stack_key in zip(names, keys, strict=True):
    members = [kind for kind in kinds if kind.stack == name]
    block = Block(spec, members[0], param_dtype)
    stacked = jax.vmap(lambda k, block=block: block.init(k, x, None, context)['params'])(
        jax.random.split(stack_key, len(members)))
    lift = lambda p: nn.LogicallyPartitioned(p.value, ('layers', *p.names))
    stacks[name] = jax.tree.map(lift, stacked, is_leaf=lambda p: isinstance(p, nn.Partitioned))
  return stacks if len(stacks) > 1 else stacks[names[0]]


def unstack(spec, blocks):
  """Return the blocks as a list of layers.

  A loop over the list reads the weights in place; a scan over the stack copies every layer first, which doubles the
  memory traffic of a decoding step.
  """
  kinds, counts, layers = layer_kinds(spec), {}, []
  for kind in kinds:
    index = counts[kind.stack] = counts.get(kind.stack, -1) + 1
    layers.append(jax.tree.map(lambda leaf, i=index: leaf[i], _stacks(kinds, blocks)[kind.stack]))
  return layers


def _stacks(kinds, blocks):
  """Return {name of a stack: its tree}."""
  names = {kind.stack for kind in kinds}
  return blocks if len(names) > 1 else {names.pop(): blocks}


def period(kinds):
  """Return the length of the shortest pattern that the layers repeat; the last repetition may be incomplete."""
  return next(p for p in range(1, len(kinds) + 1) if all(k == kinds[i % p] for i, k in enumerate(kinds)))


def apply_stacks(spec, blocks, x, context, cache=None, remat='none', unroll=1, kinds=None):
  """Run the blocks in order; return (x [B, T, D], the layers' caches or None, aux summed over layers).

  blocks: stacked, or a list of layers.  cache: list of the layers' caches, which needs a list of layers, or None.
  remat: a key of REMAT.  unroll: number of layers per iteration of the scan.  context.key: for the dropout of all
  layers, or None.  kinds: of these layers, by default those of the whole model.
  """
  kinds = layer_kinds(spec) if kinds is None else kinds
  use_keys = context.key is not None and spec.dropout > 0
  keys = jax.random.split(context.key, len(kinds)) if use_keys else None

  def run(kind, params, x, layer_cache, key):
    return Block(spec, kind).apply({'params': params}, x, layer_cache, context.replace(key=key))

  if isinstance(blocks, list):
    return _unrolled(kinds, blocks, x, keys, cache, run, remat)
  # Layers before the pattern begins (dense ones before a mixture), and those after its last period, are unrolled.
  start = next((i for i in range(len(kinds)) if kinds[i:] and period(kinds[i:]) <= max((len(kinds) - i) // 2, 1)), 0)
  size = period(kinds[start:])
  periods = (len(kinds) - start) // size
  if start or size > 1 or periods * size != len(kinds):
    return _scan_periods(spec, kinds, blocks, x, keys, run, remat, unroll, (start, size, periods))

  def body(x, layer):
    params, key = layer
    x, _, aux = run(kinds[0], params, x, None, key)
    return x, aux

  x, aux = jax.lax.scan(_remat(body, remat, in_loop=unroll == 1), x, (blocks, keys), unroll=unroll)
  return x, None, jax.tree.map(lambda a: a.sum(0), aux)


def _remat(body, remat, in_loop):
  """Apply a rematerialization policy to the body of a loop."""
  if remat == 'none':
    return body
  # Unrolled, XLA would merge the recomputation with the forward pass, and save its values; not across loops.
  return jax.checkpoint(body, policy=REMAT[remat], prevent_cse=not in_loop)


def _unrolled(kinds, layers, x, keys, cache, run, remat):
  caches, auxes = [], []
  for i, (kind, params) in enumerate(zip(kinds, layers, strict=True)):
    body = _remat(lambda x, layer, kind=kind: _regroup(run(kind, layer[0], x, layer[1], layer[2])), remat, False)
    x, (layer_cache, aux) = body(x, (params, None if cache is None else cache[i], None if keys is None else keys[i]))
    caches.append(layer_cache)
    auxes.append(aux)
  return x, None if cache is None else caches, _sum_aux(auxes)


def _regroup(result):
  x, cache, aux = result
  return x, (cache, aux)


def _sum_aux(auxes):
  """Return the sum of dicts of scalars; layers without experts have none."""
  names = dict.fromkeys(name for aux in auxes for name in aux)
  return {name: jnp.stack([aux[name] for aux in auxes if name in aux]).sum(0) for name in names}


def _scan_periods(spec, kinds, blocks, x, keys, run, remat, unroll, plan):
  """Run `apply_stacks` as a scan over the periods of a pattern, with the other layers unrolled."""
  start, size, periods = plan
  stacks, stop, pattern = _stacks(kinds, blocks), start + size * periods, kinds[start:start + size]
  count = lambda name, a, b: sum(kind.stack == name for kind in kinds[a:b])

  def layers_of(a, b):
    """Return the layers a to b of every stack that has some."""
    slices = {}
    for name, tree in stacks.items():
      first, number = count(name, 0, a), count(name, a, b)
      if number:
        slices[name] = jax.tree.map(lambda leaf, s=slice(first, first + number): leaf[s], tree)
    return slices

  def unrolled(x, a, b):
    """Run the layers a to b one by one."""
    own, used, layers = layers_of(a, b), {}, []
    for kind in kinds[a:b]:
      index = used[kind.stack] = used.get(kind.stack, -1) + 1
      layers.append(jax.tree.map(lambda leaf, i=index: leaf[i], own[kind.stack]))
    x, _, aux = _unrolled(kinds[a:b], layers, x, None if keys is None else keys[a:b], None, run, remat)
    return x, aux

  def body(x, inputs):
    params, period_keys = inputs
    used, auxes = {}, []
    for i, kind in enumerate(pattern):
      index = used[kind.stack] = used.get(kind.stack, -1) + 1
      layer = jax.tree.map(lambda leaf, i=index: leaf[i], params[kind.stack])
      x, _, aux = run(kind, layer, x, None, None if period_keys is None else period_keys[i])
      auxes.append(aux)
    return x, _sum_aux(auxes)

  x, first = unrolled(x, 0, start)
  params = jax.tree.map(lambda leaf: leaf.reshape(periods, -1, *leaf.shape[1:]), layers_of(start, stop))
  period_keys = None if keys is None else keys[start:stop].reshape(periods, size)
  x, middle = jax.lax.scan(_remat(body, remat, in_loop=unroll == 1), x, (params, period_keys),
                           unroll=min(max(unroll // size, 1), periods))
  x, last = unrolled(x, stop, len(kinds))
  return x, None, _sum_aux([first, jax.tree.map(lambda a: a.sum(0), middle), last])
