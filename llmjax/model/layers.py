"""Leaf layers of a language model.

Letters: B batch, T query length, D d_model, V vocab_size.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from llmjax.model.spec import ModelSpec
from llmjax.ops.hints import materialize_result
from llmjax.ops.norms import layer_norm, rms_norm
from llmjax.ops.products import dense, is_weight, project
from llmjax.parallel.attention import to_zigzag
from llmjax.parallel.chips import has_fast_memory
from llmjax.parallel.sharding import WeightLayout, constrain
from llmjax.parallel.vocabulary import lookup


def scaled_normal(in_dims, scale=1.0):
  """Return a truncated-normal initializer of variance scale^2 / fan_in, the product of the first in_dims axes."""

  def init(key, shape, dtype):
    fan_in = 1
    for size in shape[:in_dims]:
      fan_in *= size
    # 0.8796 is the standard deviation of a standard normal truncated at -2 and 2.
    std = scale / fan_in**0.5 / 0.87962566103423978
    return (std * jax.random.truncated_normal(key, -2.0, 2.0, shape, jnp.float32)).astype(dtype)

  return init


def dropout(x, rate, key, zigzag=False):
  """Apply dropout at `rate`, unless key is None.

  zigzag: the tokens of x [B, T, D] are in zigzag order; the mask is drawn in the order of the text.
  """
  if key is None or rate == 0.0:
    return x
  keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
  keep = to_zigzag(keep) if zigzag else keep
  return jnp.where(keep, x / (1.0 - rate), 0).astype(x.dtype)


def parameter(module, name, init, shape):
  """Return a parameter of a module: an array of its shape, or the Weight that replaces it."""
  value = module.get_variable('params', name) if module.has_variable('params', name) else None
  # Flax would check the shape of a Weight's first array, which may differ from the parameter's.
  return value if is_weight(value) else module.param(name, init, shape, module.param_dtype)


def linear(module, name, shape, names, in_dims=1, scale=1.0, bias=False, join_gradients=False):
  """Create a weight [*in, *out] (and bias) as parameters of the module; return the function x -> x W (+ b)."""
  init = nn.with_logical_partitioning(scaled_normal(in_dims, scale * module.spec.init_scale), names)
  w = parameter(module, name, init, shape)
  layout = WeightLayout(names, join_gradients)
  if not bias:
    return lambda x: project(x, w, in_dims, layout)
  zeros = nn.with_logical_partitioning(nn.initializers.zeros, tuple(
      'norm' if n == 'embed' else n for n in names[in_dims:]))
  b = module.param(f'{name}_bias', zeros, shape[in_dims:], module.param_dtype)
  return lambda x: project(x, w, in_dims, layout) + b.astype(x.dtype)


def sum_over_tensor(x):
  """Sum the partial products x [B, T, D] over `tensor`, and shard the result along the length.

  XLA fuses the two constraints into a reduce-scatter; one constraint alone would gather sequences over `context`.
  """
  x = constrain(x, 'batch', 'length', 'act_embed')
  return materialize_result(constrain(x, 'batch', 'block_length', 'act_embed'), has_fast_memory())


class Embed(nn.Module):
  """Embed token ids int [B, T] as [B, T, D], with learned position embeddings if the spec has them."""

  spec: ModelSpec
  param_dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, tokens, positions, dtype):
    spec = self.spec
    init = nn.initializers.normal(0.02 * spec.init_scale)  # arXiv:2005.14165's choice.
    table = parameter(self, 'table', nn.with_logical_partitioning(init, ('vocab', 'table_embed')),
                      (spec.vocab_size, spec.d_model))
    x = lookup(dense(table.astype(dtype)), tokens)
    if spec.embedding_scale != 1.0:
      x = (spec.embedding_scale * x).astype(dtype)
    if spec.position_embedding == 'learned':
      rows = self.param('positions', nn.with_logical_partitioning(init, (None, 'table_embed')),
                        (spec.max_positions, spec.d_model), self.param_dtype)
      x = x + jnp.take(constrain(rows.astype(dtype), None, None), jnp.maximum(positions, 0), axis=0)
    if spec.position_embedding == 'relative':  # Used by the layers, which share it: see `Model.apply`.
      self.param('relative_bias', nn.with_logical_partitioning(init, (None, 'heads')),
                 (spec.relative_buckets, spec.num_heads), self.param_dtype)
    return x


class Norm(nn.Module):
  """RMSNorm or LayerNorm over the last axis, with a learned scale, and bias for LayerNorm."""

  kind: str
  epsilon: float
  param_dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x):
    vector = lambda name, init: self.param(name, nn.with_logical_partitioning(init, ('norm',)), (x.shape[-1],),
                                           self.param_dtype)
    scale = vector('scale', nn.initializers.ones)
    if self.kind == 'rms':
      return rms_norm(x, scale, self.epsilon)
    return layer_norm(x, scale, vector('bias', nn.initializers.zeros), self.epsilon)


class Head(nn.Module):
  """Untied output matrix [D, V].  Initialized with zeros: the first loss is ln V (arXiv:2203.03466, D.2)."""

  spec: ModelSpec
  param_dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x):
    kernel = self.param('kernel',
                        nn.with_logical_partitioning(nn.initializers.zeros, ('table_embed', 'vocab')),
                        (self.spec.d_model, self.spec.vocab_size), self.param_dtype)
    return project(x, kernel)


class Projection(nn.Module):
  """Float32 linear map of hidden states, [..., D] to [..., width]; it preserves unit variance at initialization."""

  width: int
  param_dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x):
    kernel = self.param('kernel', nn.with_logical_partitioning(nn.initializers.lecun_normal(), ('embed', None)),
                        (x.shape[-1], self.width), self.param_dtype)
    return jnp.einsum('...D,DE->...E', x.astype(jnp.float32), kernel.astype(jnp.float32))


class ValueHead(nn.Module):
  """Float32 scalar output per token, [..., D] to [...].  Initialized with zeros: the first value is 0."""

  param_dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x):
    kernel = self.param('kernel', nn.with_logical_partitioning(nn.initializers.zeros, ('norm',)), (x.shape[-1],),
                        self.param_dtype)
    return jnp.einsum('...D,D->...', x.astype(jnp.float32), kernel.astype(jnp.float32))
