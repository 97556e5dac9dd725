"""The decoder: plain functions over one nested dict of parameters.

  {'embed': {'table'}, 'blocks': {... each leaf [layers, ...]}, 'final_norm': {'scale'}, 'head': {'kernel'},
   'value': {'kernel'}, 'projection': {'kernel'}}, the last two with spec.value_head and spec.projection only

Letters as in layers.py.  `init_params` makes the dict and its logical axis names; `hidden_states` runs
it; `unembed` makes logits.  A loss takes hidden states and `output_matrix`, so that the logits of a
whole batch never exist.
"""

import re

import jax
import jax.numpy as jnp
from flax import linen as nn

from llmjax.model.layers import Block, Context, Embed, Head, Norm, Projection, ValueHead
from llmjax.ops.norms import rms_norm
from llmjax.ops.products import dense, is_weight, project
from llmjax.ops.rotary import rotary_angles
from llmjax.parallel import pipeline
from llmjax.parallel.sharding import constrain, row_shards

# What `minimal` keeps of a block besides its input, by the marks in layers.py and ops/attention.py.  Values
# a token, and the FLOPs to make one of them again:
#
#   query, key, value   N H + 2 K H   2 D          attended   D     2 N H, and a sum over `tensor`
#   attention           N H + N       2 T          gate, up   2 F   2 D
#
# Every product costs as much a value as any other, so what is left out is what costs no product: norms, the
# activation and its product with `up`, and the `down` projection, whose result the backward pass does not
# need.  Without any remat a block keeps those too, 8 D + 5 F values and more.  8 layers, D 512, F 1408, T
# 512, B 8, float32, XLA's CPU backend (temporary memory of the gradient, scanned; FLOPs of it, unrolled):
#
#   none 2198 MiB, 802.0 GFLOP     minimal 1045 MiB, +0.7%     ... without attended         981 MiB, +2.8%
#   dots  980 MiB, +1.5%           full     404 MiB, +23%      ... without gate             875 MiB, +6.5%
#                                                              ... without query, key, value 853 MiB, +7.9%
#                                                              ... without gate and up       729 MiB, +12.4%
KEPT = ('query', 'key', 'value', 'attention', 'attended', 'gate', 'up')

REMAT = {
    'none': None,
    'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    'minimal': jax.checkpoint_policies.save_only_these_names(*KEPT),
    # One product more, for an eleventh of the memory: the first place to save where `minimal` just does not fit.
    'out': jax.checkpoint_policies.save_only_these_names(*(n for n in KEPT if n != 'attended')),
    'mlp': jax.checkpoint_policies.save_only_these_names(*(n for n in KEPT if n not in ('gate', 'up'))),
    'full': jax.checkpoint_policies.nothing_saveable,
    # What `minimal` keeps and the block's input, in the host's memory.  A CPU's is the same memory.
    'offload': jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[], names_which_can_be_offloaded=['block_input', *KEPT],
        offload_src='device', offload_dst='pinned_host'),
}


# Whether a parameter is cast to the compute dtype before the layers, by its path; the first pattern that matches.  What
# is not keeps its own: products with a router, value head or projection are in float32, and norms and biases widen what
# they are applied to.  Embedding and head are cast where they are used.
CAST = (
    (r'(^|/)(router|scale|bias)$', False),
    (r'^(embed|head|value|projection)/', False),
    (r'(^|/)(query|key|value|out|gate|up|down)$', True),
)


def init_params(spec, key, param_dtype=jnp.float32):
  """Returns the parameters of a fresh model, leaves of `param_dtype`."""
  return _split(_init(spec, key, param_dtype))[0]


def param_names(spec):
  """Returns the logical axis names of every parameter: the tree of `init_params`, tuples at its leaves."""
  return _split(jax.eval_shape(lambda: _init(spec, jax.random.key(0), jnp.float32)))[1]


def _init(spec, key, param_dtype):
  keys = jax.random.split(key, 3)
  tokens = jnp.zeros((1, 2), jnp.int32)
  x = jnp.zeros((1, 2, spec.d_model), param_dtype)
  context = make_context(spec, tokens, tokens, implementation='reference')
  params = {
      'embed': Embed(spec, param_dtype).init(keys[0], tokens, param_dtype)['params'],
      'blocks': init_stack(Block(spec, param_dtype), spec.num_layers, keys[1], x, None, context),
      'final_norm': Norm(spec.norm_epsilon, param_dtype).init(keys[2], x)['params'],
  }
  if spec.value_head:
    params['value'] = ValueHead(param_dtype).init(keys[2], x)['params']
  if spec.projection:
    params['projection'] = Projection(spec.projection, param_dtype).init(jax.random.fold_in(keys[2], 1), x)['params']
  if not spec.tie_embeddings:
    params['head'] = Head(spec, param_dtype).init(keys[2], x)['params']
  return params


def _split(boxed):
  """Returns (plain arrays, names) of a tree of flax boxes."""
  is_box = lambda p: isinstance(p, nn.Partitioned)
  return (jax.tree.map(lambda p: p.value, boxed, is_leaf=is_box),
          jax.tree.map(lambda p: p.names, boxed, is_leaf=is_box))


def init_stack(block, num_layers, key, *example):
  """Returns the boxed parameters of `num_layers` blocks; every leaf gains a leading 'layers' axis."""
  stacked = jax.vmap(lambda k: block.init(k, *example)['params'])(jax.random.split(key, num_layers))
  lift = lambda p: nn.LogicallyPartitioned(p.value, ('layers', *p.names))
  return jax.tree.map(lift, stacked, is_leaf=lambda p: isinstance(p, nn.Partitioned))


def unstack(params):
  """Returns the parameters with `blocks` as a list of layers.

  A loop over the list reads each weight where it lies; a scan over the stack first copies every layer
  out of it, which doubles the memory traffic of a decoding step.
  """
  count = jax.tree.leaves(params['blocks'])[0].shape[0]
  layers = [jax.tree.map(lambda leaf, i=i: leaf[i], params['blocks']) for i in range(count)]
  return {**params, 'blocks': layers}


def apply_stack(block, params, x, kv_cache, context, remat='none', unroll=1):
  """Runs the blocks in order; returns (x [B, T, D], kv_cache, aux).

  params: leaves [layers, ...], scanned `unroll` layers at a time, or a list of layers.  kv_cache: in the
  same form, or None.  context.key: the key that layers' dropout keys come from, or None.
  """
  num_layers = len(params) if isinstance(params, list) else jax.tree.leaves(params)[0].shape[0]
  use_keys = context.key is not None and block.spec.dropout > 0
  keys = jax.random.split(context.key, num_layers) if use_keys else None

  def body(x, layer):
    layer_params, layer_cache, key = layer
    x, layer_cache, aux = block.apply({'params': layer_params}, x, layer_cache,
                                      context.replace(key=key))
    return x, (layer_cache, aux)

  if remat != 'none':
    # Inside a loop nothing can be shared between the passes; unrolled, XLA would merge what is computed
    # again with what was computed before, and keep it.
    in_loop = unroll == 1 and not isinstance(params, list)
    body = jax.checkpoint(body, policy=REMAT[remat], prevent_cse=not in_loop)
  if isinstance(params, list):
    outputs = []
    for i, layer_params in enumerate(params):
      x, output = body(x, (layer_params, None if kv_cache is None else kv_cache[i],
                           None if keys is None else keys[i]))
      outputs.append(output)
    caches = None if kv_cache is None else [cache for cache, _ in outputs]
    return x, caches, jax.tree.map(lambda *a: jnp.stack(a), *[aux for _, aux in outputs])
  x, (kv_cache, aux) = jax.lax.scan(body, x, (params, kv_cache, keys), unroll=unroll)
  return x, kv_cache, aux


def make_context(spec, positions, segment_ids, *, key=None, implementation='blockwise', cache=None,
                 aligned=True, zigzag=False):
  """Returns the Context of T tokens; with a cache, their keys are written into it first.

  cache: {'index': where they go, 'positions', 'segment_ids': int [B, S] of all slots, these T included}.
  """
  cache = cache or {'index': 0, 'positions': positions, 'segment_ids': segment_ids}
  return Context(
      positions=positions, segment_ids=segment_ids,
      angles=rotary_angles(positions, spec.heads_dim, spec.rope_theta),
      key_positions=cache['positions'], key_segment_ids=cache['segment_ids'],
      cache_index=cache['index'], key=key, implementation=implementation, aligned=aligned, zigzag=zigzag)


def hidden_states(spec, params, tokens, context, kv_cache=None, *, compute_dtype=jnp.float32,
                  remat='none', unroll=1, pipe=None, perturb=None):
  """Returns (final normalised hidden states [B, T, D] of compute_dtype, kv_cache, aux).

  tokens: int [B, T].  kv_cache: leaves [layers, B, K, S, H] or None.  aux: sums over rows and layers.
  pipe: the PipelineSpec by which rows go through the stages of the mesh; None runs the layers in order
  on whatever mesh there is.  perturb: function of the embeddings [B, T, D] to what the blocks get, or None.
  """
  params = cast(params, compute_dtype)
  x = embed(spec, params, tokens, compute_dtype)
  x = perturb(x) if perturb else x
  stages = pipeline.num_stages()
  if pipe is None or stages == 1 or kv_cache is not None:
    x, kv_cache, aux = apply_stack(Block(spec), params['blocks'], x, kv_cache, context, remat, unroll)
    aux = jax.tree.map(lambda a: a.sum(0), aux)
  else:
    rows = {'positions': context.positions, 'segment_ids': context.segment_ids}
    x, aux = pipeline.forward(
        stage_fn(spec, context, remat, unroll), params['blocks'], x, rows, rounds=pipe.groups,
        microbatches=pipe.count(stages, x.shape[0] // row_shards()))
  return final_norm(spec, params, x), kv_cache, aux


def cast(params, compute_dtype):
  """Returns the parameters with those that CAST names in compute_dtype.  params: the whole tree, or `blocks` alone.

  Once, outside the layers: what is gathered over the mesh is then already small.  Raises ValueError for a parameter
  that no pattern names.
  """
  def one(path, p):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    for pattern, is_cast in CAST:
      if re.search(pattern, name):
        return p.astype(compute_dtype) if is_cast else p
    raise ValueError(f'no dtype pattern matches the parameter {name}; add one to CAST')

  return jax.tree_util.tree_map_with_path(one, params, is_leaf=is_weight)


def embed(spec, params, tokens, compute_dtype):
  """Returns the vectors of int tokens [B, T], [B, T, D] of compute_dtype."""
  x = Embed(spec).apply({'params': params['embed']}, tokens, compute_dtype)
  return constrain(x, 'batch', 'block_length', 'act_embed')


def final_norm(spec, params, x):
  """Returns the normalised hidden states that the output matrix takes."""
  x = rms_norm(x, params['final_norm']['scale'], spec.norm_epsilon)
  return constrain(x, 'batch', 'length', 'act_embed')


def stage_fn(spec, context, remat, unroll):
  """Returns the function of one group of layers that the schedules of parallel/pipeline.py run.

  context: that of the whole batch; of it, the dropout key and the choice of kernels are used.
  """
  def run(params, x, rows, index):
    key = None if context.key is None or not spec.dropout else jax.random.fold_in(context.key, index)
    part = make_context(spec, rows['positions'], rows['segment_ids'], key=key,
                        implementation=context.implementation, zigzag=context.zigzag)
    x, _, aux = apply_stack(Block(spec), params, x, None, part, remat, unroll)
    return x, jax.tree.map(lambda a: a.sum(0), aux)

  return run


def output_matrix(spec, params):
  """Returns (matrix, vocab_axis): [D, V] and 1, or the tied embedding table [V, D] and 0."""
  if spec.tie_embeddings:
    return constrain(dense(params['embed']['table']), 'vocab', None), 0
  return constrain(dense(params['head']['kernel']), None, 'vocab'), 1


def token_values(params, x):
  """Returns what the value head says of hidden states [..., D]: float32 [...]."""
  return ValueHead().apply({'params': params['value']}, x)


def project_hidden(params, x):
  """Returns hidden states [..., D] in a teacher's width, float32 [..., E], where the parameters have a projection."""
  if 'projection' not in params:
    return x
  kernel = params['projection']['kernel']
  return Projection(kernel.shape[-1]).apply({'params': params['projection']}, x)


def unembed(spec, params, x):
  """Returns float32 logits [..., V] of hidden states [..., D].  Only for a few positions at a time."""
  matrix, vocab_axis = output_matrix(spec, params)
  logits = project(x, matrix.T if vocab_axis == 0 else matrix).astype(jnp.float32)
  cap = spec.logits_soft_cap
  return cap * jnp.tanh(logits / cap) if cap else logits
