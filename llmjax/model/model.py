"""Model: initialization, forward pass, logits and caches of a language model.

  params = {'embed': {'table'}, 'blocks': {... each leaf [layers, ...]}, 'final_norm': {'scale'}, 'head': {'kernel'},
            'value': {'kernel'}, 'projection': {'kernel'}}, the last two if spec.value_head and spec.projection are set

Letters: B batch, T tokens, D d_model, V vocab_size, S cache slots.  Losses take hidden states and `output_matrix`, so
that the logits of a whole batch never exist.
"""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from llmjax.model import counts, stack
from llmjax.model.block import layer_kinds
from llmjax.model.cache import Cache, Slots
from llmjax.model.context import AttentionInputs, Context
from llmjax.model.layers import Embed, Head, Norm, Projection, ValueHead
from llmjax.model.mixers import mixer_class
from llmjax.model.spec import ModelSpec
from llmjax.ops.chunks import CHUNK_LOGITS
from llmjax.ops.masks import Mask
from llmjax.ops.products import dense, is_weight, project
from llmjax.ops.relative import RelativeBias
from llmjax.ops.rotary import RopeScaling, rotary_angles
from llmjax.parallel import pipeline
from llmjax.parallel.attention import from_zigzag, zigzag_batch
from llmjax.parallel.sharding import constrain, mesh_size, row_shards

# Whether a parameter is cast to the compute dtype before the layers, by its path; the first pattern that matches
# counts.  Products with the router, value head and projection are in float32, norms and biases use their parameters'
# dtype, and embedding and head are cast where they are used.
CAST = (
    (r'(^|/)(router|scale|bias|\w+_bias)$', False),
    (r'^(embed|head|value|projection)/', False),
    (r'(^|/)(query|key|value|out|gate|up|down)$', True),
)


@dataclasses.dataclass(frozen=True)
class Execution:
  """Execution options: they affect speed and memory, and results only by rounding.

  compute_dtype: of matrix products and activations.  attention: names of implementations, of which the first that
  supports the arguments runs.  remat, unroll: see model/stack.py.  pipeline: PipelineSpec for meshes with several
  stages, or None.  ring: use ring attention along the mesh axis `context`.  chunk_logits: number of logits in memory in
  a loss.
  """

  compute_dtype: str = 'float32'
  attention: tuple[str, ...] = ('blockwise',)
  remat: str = 'none'
  unroll: int = 1
  pipeline: Any = None
  ring: bool = False
  chunk_logits: int = CHUNK_LOGITS


@dataclasses.dataclass(frozen=True)
class Model:
  """A language model: a ModelSpec and Execution options.  It holds no arrays; parameters are arguments."""

  spec: ModelSpec
  execution: Execution = Execution()

  @property
  def dtype(self):
    return jnp.dtype(self.execution.compute_dtype)

  def init(self, key, param_dtype=jnp.float32):
    """Initialize parameters of `param_dtype`."""
    return _split(self._init(key, param_dtype))[0]

  def abstract_params(self, param_dtype=jnp.float32):
    """Return the ShapeDtypeStructs of `init`."""
    return jax.eval_shape(lambda: self.init(jax.random.key(0), jnp.dtype(param_dtype)))

  def param_names(self):
    """Return the logical axis names of every parameter: the tree of `init`, tuples at its leaves."""
    return _split(jax.eval_shape(lambda: self._init(jax.random.key(0), jnp.float32)))[1]

  def count_params(self):
    """Count the parameters, by part and in total."""
    if self.spec.mixer == 'attention':
      return counts.count_params(self.spec)
    parts = {name: sum(p.size for p in jax.tree.leaves(tree)) for name, tree in self.abstract_params().items()}
    return {**parts, 'total': sum(parts.values())}

  def train_flops_per_token(self, seq_len, frozen=False):
    """See `counts.train_flops_per_token`."""
    return counts.train_flops_per_token(self.spec, seq_len, frozen)

  def _init(self, key, param_dtype):
    spec, keys = self.spec, jax.random.split(key, 3)
    tokens = jnp.zeros((1, 2), jnp.int32)
    x = jnp.zeros((1, 2, spec.d_model), param_dtype)
    context = self._context({'positions': tokens, 'segment_ids': tokens}, attention=('reference',))
    norm = lambda: Norm(spec.norm, spec.norm_epsilon, param_dtype).init(keys[2], x)['params']
    params = {'embed': Embed(spec, param_dtype).init(keys[0], tokens, tokens, param_dtype)['params'],
              'blocks': stack.init_stacks(spec, keys[1], param_dtype, x, context)}
    if spec.embedding_norm:
      params['embed_norm'] = norm()
    if spec.norm_placement != 'post':
      params['final_norm'] = norm()
    if spec.value_head:
      params['value'] = ValueHead(param_dtype).init(keys[2], x)['params']
    if spec.projection:
      params['projection'] = Projection(spec.projection, param_dtype).init(jax.random.fold_in(keys[2], 1), x)['params']
    if not spec.tie_embeddings:
      params['head'] = Head(spec, param_dtype).init(keys[2], x)['params']
    return params

  # Forward.

  def apply(self, params, batch, *, cache=None, key=None, perturb=None):
    """Run the model; return (final hidden states [B, T, D] of the compute dtype, cache, aux).

    batch: {'tokens', 'positions', 'segment_ids'}, int [B, T], and optionally 'prefix', bool [B, T]: tokens that their
    whole segment attends to.  cache: a Cache, to which the tokens are appended, or None; with one, blocks must be a
    list of layers (see `unstack`).  key: for dropout; None: no dropout.  perturb: function applied to the embeddings
    [B, T, D], or None.  aux: float32 sums over sequences and layers.
    """
    spec, execution = self.spec, self.execution
    params = self.cast(params)
    x = self.embed(params, batch)
    x = perturb(x) if perturb else x
    context = self._context(batch, cache, key, params=params)
    pipe, stages = execution.pipeline, pipeline.num_stages()
    if pipe is None or stages == 1 or cache is not None:
      layers = None if cache is None else cache.layers
      x, layers, aux = stack.apply_stacks(spec, params['blocks'], x, context, layers, execution.remat, execution.unroll)
    else:
      rows = {name: a for name, a in batch.items() if name in ('positions', 'segment_ids', 'prefix')}
      x, aux = pipeline.forward(self.stage(key), params['blocks'], x, rows, rounds=pipe.groups,
                                microbatches=pipe.count(stages, x.shape[0] // row_shards()))
    if cache is not None:
      slots = {kind: inputs.slots.advance(batch['positions'], batch['segment_ids'])
               for kind, inputs in context.attention.items()}
      added = jnp.sum(batch['segment_ids'] != 0, axis=1, dtype=jnp.int32)
      cache = Cache(layers, slots, cache.lengths + added)
    return self.normalize(params, x), cache, aux

  def cast(self, params):
    """Cast the parameters that CAST names to the compute dtype.

    Once, before the layers, so that they are gathered over the mesh in this dtype.  Raises ValueError for a parameter
    that no pattern matches.
    """
    def one(path, p):
      name = jax.tree_util.keystr(path, simple=True, separator='/')
      for pattern, is_cast in CAST:
        if re.search(pattern, name):
          return p.astype(self.dtype) if is_cast else p
      raise ValueError(f'no dtype pattern matches the parameter {name}; add one to CAST')

    return jax.tree_util.tree_map_with_path(one, params, is_leaf=is_weight)

  def embed(self, params, batch):
    """Embed the tokens: the input of the blocks, [B, T, D] of the compute dtype."""
    spec = self.spec
    x = Embed(spec).apply({'params': params['embed']}, batch['tokens'], batch['positions'], self.dtype)
    if spec.embedding_norm:
      x = Norm(spec.norm, spec.norm_epsilon).apply({'params': params['embed_norm']}, x)
    return constrain(x, 'batch', 'block_length', 'act_embed')

  def normalize(self, params, x):
    """Apply the final norm to the output x of the blocks."""
    spec = self.spec
    if spec.norm_placement != 'post':
      x = Norm(spec.norm, spec.norm_epsilon).apply({'params': params['final_norm']}, x)
    return constrain(x, 'batch', 'length', 'act_embed')

  def stage(self, key):
    """Return the stage function of the schedules of parallel/pipeline.py.  key: for dropout, or None."""
    spec, execution = self.spec, self.execution
    if spec.position_embedding == 'relative':
      raise ValueError('model.position_embedding=relative: pipeline stages have no shared bias; write mesh.stage=1')

    def run(blocks, x, rows, index):
      stage_key = None if key is None or not spec.dropout else jax.random.fold_in(key, index)
      kinds = layer_kinds(spec)[:jax.tree.leaves(blocks)[0].shape[0]]
      x, _, aux = stack.apply_stacks(spec, blocks, x, self._context(rows, key=stage_key), None, execution.remat,
                                     execution.unroll, kinds)
      return x, aux

    return run

  def _context(self, batch, cache=None, key=None, attention=None, params=None):
    """Return the Context of the tokens of a batch.  params: for a relative position bias."""
    spec, execution = self.spec, self.execution
    positions, segments = batch['positions'], batch['segment_ids']
    decoding = cache is not None and not cache.fresh
    inputs, angles, bias = {}, {}, None
    if spec.position_embedding == 'relative' and params is not None:
      bias = RelativeBias.from_table(params['embed']['relative_bias'], spec.relative_max_distance, spec.causal)
    for kind in dict.fromkeys(kind.attention for kind in layer_kinds(spec)):
      local = kind == 'local'
      slots = cache.slots[kind] if cache else None
      window = spec.window if local else None
      keys = slots.advance(positions, segments) if decoding else None
      if decoding and slots.ring and positions.shape[1] > slots.positions.shape[1] - spec.window + 1:
        raise ValueError(f'{positions.shape[1]} tokens at once overwrite keys that they attend to: the cache has '
                         f'{slots.positions.shape[1]} slots and the window is {spec.window}')
      mask = Mask(positions, segments, keys.positions if decoding else positions,
                  keys.segment_ids if decoding else segments, batch.get('prefix'), spec.causal, window, not decoding)
      if spec.position_embedding == 'rotary':
        theta = spec.local_rope_theta if local and spec.local_rope_theta else spec.rope_theta
        scaling = RopeScaling() if local else RopeScaling(
            spec.rope_scaling, spec.rope_factor, spec.rope_original_length, spec.rope_low_frequency,
            spec.rope_high_frequency)
        if (theta, scaling) not in angles:
          angles[theta, scaling] = rotary_angles(positions, spec.rotary_dim, theta, scaling)
        inputs[kind] = AttentionInputs(mask, angles[theta, scaling], slots)
      else:
        inputs[kind] = AttentionInputs(mask, None, slots, bias)
    return Context(segments, inputs, key if spec.dropout else None, attention or execution.attention,
                   zigzag=self.use_ring() and cache is None and attention is None,
                   cached=cache is not None, decoding=decoding)

  # Outputs.

  def output_matrix(self, params):
    """Return (matrix, vocab_axis): [D, V] and 1, or the tied embedding table [V, D] and 0."""
    if self.spec.tie_embeddings:
      return constrain(dense(params['embed']['table']), 'vocab', None), 0
    return constrain(dense(params['head']['kernel']), None, 'vocab'), 1

  def logits(self, params, x):
    """Compute float32 logits [..., V] of hidden states [..., D].  Only for a few positions at a time."""
    matrix, vocab_axis = self.output_matrix(params)
    logits = project(x, matrix.T if vocab_axis == 0 else matrix).astype(jnp.float32)
    cap = self.spec.logits_soft_cap
    return cap * jnp.tanh(logits / cap) if cap else logits

  @property
  def chunking(self):
    """Arguments of the losses of `ops.losses`: soft cap, and number of logits per chunk."""
    return {'soft_cap': self.spec.logits_soft_cap or None, 'chunk_logits': self.execution.chunk_logits}

  def values(self, params, x):
    """Compute the value head's output, float32 [...], for hidden states [..., D]."""
    return ValueHead().apply({'params': params['value']}, x)

  def project_hidden(self, params, x):
    """Project hidden states [..., D] to a teacher's width, float32 [..., E], if the parameters have a projection."""
    if 'projection' not in params:
      return x
    kernel = params['projection']['kernel']
    return Projection(kernel.shape[-1]).apply({'params': params['projection']}, x)

  # The order of tokens on the mesh.

  def use_ring(self):
    """Return whether ring attention runs on the mesh that is set."""
    return self.execution.ring and mesh_size('context') > 1

  def order(self, batch):
    """Put the tokens of a batch into the order that `apply` expects on the mesh that is set."""
    return zigzag_batch(batch) if self.use_ring() else batch

  def restore(self, a):
    """Put an array [B, T, ...] of an ordered batch back into the order of the text."""
    return from_zigzag(a) if self.use_ring() else a

  # Generation.

  def unstack(self, params):
    """Return the parameters with `blocks` as a list of layers, as needed with a cache."""
    return {**params, 'blocks': stack.unstack(self.spec, params['blocks'])}

  def init_cache(self, batch_size, length, step=1):
    """Create an empty Cache of `length` slots; local layers have slots for their window only.

    step: maximum number of tokens per call of `apply` after the first.
    """
    spec, kinds = self.spec, layer_kinds(self.spec)
    sizes = {kind.attention: self._slots(kind.attention, length, step) for kind in kinds}
    init_cache = mixer_class(spec).init_cache
    layers = [init_cache(spec, batch_size, sizes[kind.attention], self.dtype) for kind in kinds]
    slots = {kind: Slots.empty(batch_size, size, ring=size < length) for kind, size in sizes.items()}
    return Cache(layers, slots, jnp.zeros((batch_size,), jnp.int32), fresh=True)

  def _slots(self, kind, length, step=1):
    return min(length, self.spec.window + step - 1) if kind == 'local' else length

  def grow_cache(self, cache, length, step=1):
    """Extend the cache to `length` slots; rings that are full stay as they are."""
    kinds, extra, slots = layer_kinds(self.spec), {}, {}
    for kind, old in cache.slots.items():
      size, now = self._slots(kind, length, step), old.positions.shape[1]
      extra[kind] = 0 if old.ring else size - now
      pad = lambda a, n=extra[kind]: jnp.pad(a, ((0, 0), (0, n)))
      slots[kind] = old.replace(positions=pad(old.positions), segment_ids=pad(old.segment_ids),
                                ring=old.ring or size < length)
    layers = [layer.grow(extra[kind.attention]) for layer, kind in zip(cache.layers, kinds, strict=True)]
    return cache.replace(layers=layers, slots=slots)


def _split(boxed):
  """Split a tree of flax boxes into (arrays, logical names)."""
  is_box = lambda p: isinstance(p, nn.Partitioned)
  return (jax.tree.map(lambda p: p.value, boxed, is_leaf=is_box),
          jax.tree.map(lambda p: p.names, boxed, is_leaf=is_box))
