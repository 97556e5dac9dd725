"""Leaf layers of the transformer.

Letters: B batch, T query length, S key length, N query heads, K key/value heads, H head_dim,
D d_model, F mlp_dim, V vocab_size, E experts.
"""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax.ad_checkpoint import checkpoint_name

from llmjax.model.spec import ModelSpec
from llmjax.ops import moe
from llmjax.ops.norms import rms_norm
from llmjax.ops.products import dense, is_weight, project
from llmjax.ops.rotary import apply_rope
from llmjax.parallel.attention import attention, to_zigzag
from llmjax.parallel.chips import flops_per_byte
from llmjax.parallel.experts import dropless, with_capacity
from llmjax.parallel.sharding import WeightLayout, by_rows, constrain, mesh_size
from llmjax.parallel.vocabulary import lookup


@struct.dataclass
class Context:
  """What every block needs to know of the rows it works on.

  positions, segment_ids: int [B, T] of the queries.  angles: rotary (cos, sin) of `positions`.
  key_positions, key_segment_ids: int [B, S] of the keys; S = T without a cache.  cache_index: where in
  the S cache slots these T tokens go.  key: this layer's dropout key, or None for no dropout.
  implementation, aligned: see `ops.attention.attention`.  zigzag: see `parallel.attention.attention`.
  """

  positions: jax.Array
  segment_ids: jax.Array
  angles: tuple[jax.Array, jax.Array]
  key_positions: jax.Array
  key_segment_ids: jax.Array
  cache_index: jax.Array | int = 0
  key: jax.Array | None = None
  implementation: str | tuple[str, ...] = struct.field(pytree_node=False, default='blockwise')
  aligned: bool = struct.field(pytree_node=False, default=True)
  zigzag: bool = struct.field(pytree_node=False, default=False)


def scaled_normal(in_dims, scale=1.0):
  """Returns an initializer: truncated normal, variance scale^2 / product of the first in_dims axes."""

  def init(key, shape, dtype):
    fan_in = 1
    for size in shape[:in_dims]:
      fan_in *= size
    # 0.8796 is the standard deviation of a normal cut at two of its own.
    std = scale / fan_in**0.5 / 0.87962566103423978
    return (std * jax.random.truncated_normal(key, -2.0, 2.0, shape, jnp.float32)).astype(dtype)

  return init


def dropout(x, rate, key, zigzag=False):
  """Returns x with features zeroed at `rate` and the rest scaled up; x itself when key is None.

  zigzag: the tokens of x [B, T, D] are in zigzag order; each is dropped where it is in the order of the text.
  """
  if key is None or rate == 0.0:
    return x
  keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
  keep = to_zigzag(keep) if zigzag else keep
  return jnp.where(keep, x / (1.0 - rate), 0).astype(x.dtype)


def parameter(module, name, init, shape):
  """Returns a parameter of a module: an array of its shape, or the Weight that was put in its place."""
  found = module.get_variable('params', name) if module.has_variable('params', name) else None
  # Flax would compare the shape of a Weight's first array, which need not have the parameter's.
  return found if is_weight(found) else module.param(name, init, shape, module.param_dtype)


def linear(module, name, shape, names, in_dims=1, scale=1.0, at_once=False):
  """Returns the function x -> x W of a weight [*in, *out] that becomes a parameter of the module."""
  init = nn.with_logical_partitioning(scaled_normal(in_dims, scale * module.spec.init_scale), names)
  w = parameter(module, name, init, shape)
  return lambda x: project(x, w, in_dims, WeightLayout(names, at_once))


def summed(x):
  """Returns a product x [B, T, D] whose terms lie over `tensor`, summed over it and divided along the length.

  XLA joins the two into a reduce-scatter; asked for both at once it would gather rows that lie along `context`.
  """
  x = constrain(x, 'batch', 'length', 'act_embed')
  return result_apart(constrain(x, 'batch', 'block_length', 'act_embed'))


class Embed(nn.Module):
  """Token ids int [B, T] to vectors [B, T, D]."""

  spec: ModelSpec
  param_dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, tokens, dtype):
    init = nn.initializers.normal(0.02 * self.spec.init_scale)  # arXiv:2005.14165's choice.
    table = parameter(self, 'table', nn.with_logical_partitioning(init, ('vocab', 'table_embed')),
                      (self.spec.vocab_size, self.spec.d_model))
    return lookup(dense(table.astype(dtype)), tokens)


class Norm(nn.Module):
  """RMSNorm over the last axis with a learned scale."""

  epsilon: float
  param_dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x):
    scale = self.param('scale', nn.with_logical_partitioning(nn.initializers.ones, ('norm',)),
                       (x.shape[-1],), self.param_dtype)
    return rms_norm(x, scale, self.epsilon)


class Attention(nn.Module):
  """Causal grouped-query attention with rotary positions (arXiv:2305.13245)."""

  spec: ModelSpec
  param_dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x, kv_cache, context):
    spec = self.spec
    d, n, k, h = spec.d_model, spec.num_heads, spec.kv_heads, spec.heads_dim

    x = copies(x, 3)
    query = linear(self, 'query', (d, n, h), ('embed', 'heads', 'head_dim'))(x[0])
    keys = linear(self, 'key', (d, k, h), ('embed', 'kv_heads', 'head_dim'))(x[1])
    values = linear(self, 'value', (d, k, h), ('embed', 'kv_heads', 'head_dim'))(x[2])
    # Outputs into the residual stream start smaller with depth (GPT-2, section 2.3).
    out = linear(self, 'out', (n, h, d), ('heads', 'head_dim', 'embed'), 2, (2 * spec.num_layers)**-0.5)
    if spec.qk_norm:
      query = Norm(spec.norm_epsilon, self.param_dtype, name='query_norm')(query)
      keys = Norm(spec.norm_epsilon, self.param_dtype, name='key_norm')(keys)
    heads = lambda a: constrain(a, 'batch', 'length', 'act_heads', None)
    query = heads(apply_rope(query, context.angles))
    keys, values = heads(apply_rope(keys, context.angles)), heads(values)
    if kv_cache is not None:
      # [B, K, S, H]: each head's keys lie together, so a decoding step reads them where they are.
      start = (0, 0, context.cache_index, 0)
      swap = lambda a: a.transpose(0, 2, 1, 3)
      kv_cache = {'keys': jax.lax.dynamic_update_slice(kv_cache['keys'], swap(keys), start),
                  'values': jax.lax.dynamic_update_slice(kv_cache['values'], swap(values), start)}
      keys, values = swap(kv_cache['keys']), swap(kv_cache['values'])
    y = attention(
        query, keys, values, q_positions=context.positions, k_positions=context.key_positions,
        q_segment_ids=context.segment_ids, k_segment_ids=context.key_segment_ids,
        window=spec.window or None, soft_cap=spec.attention_soft_cap or None,
        implementation=context.implementation, aligned=context.aligned, zigzag=context.zigzag)
    return summed(out(y)), kv_cache


def apart(arrays):
  """Returns the arrays, each computed before anything is computed from it.

  On a TPU.  XLA joins elementwise work to the products before and after it, and does it anew for every
  tile; beyond a few operations that takes longer than the product and one pass over memory.
  """
  return jax.lax.platform_dependent(arrays, tpu=jax.lax.optimization_barrier, default=lambda a: a)


@jax.custom_vjp
def gradient_apart(x):
  """Returns x, whose gradient is computed `apart`."""
  return x


gradient_apart.defvjp(lambda x: (x, None), lambda _, g: (apart(g),))


def fast_memory(flops=200):
  """Returns whether the chips of the mesh do less than so many FLOPs while they read a byte of memory.

  A v5p does 166, a v5e 241, a v6e 560.  By the compiler's cycles results apart pay for their passes over memory on a
  v5p, both gradients at once on a v5e, too; both together cost 3 % of Llama 2 7B's step on a v5e and 13 % of Llama 3
  8B's on a v6e.
  """
  found = flops_per_byte()
  return found is None or found < flops


def apart_on_fast_memory(arrays):
  """Returns the arrays, `apart` on fast memory."""
  return apart(arrays) if fast_memory() else arrays


@jax.custom_vjp
def result_apart(x):
  """Returns x, computed apart on fast memory; its gradient is not."""
  return apart_on_fast_memory(x)


result_apart.defvjp(lambda x: (apart_on_fast_memory(x), None), lambda _, g: (g,))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def copies(x, count):
  """Returns x as often as products take it: their gradients, on fast memory computed apart, are added.

  Not along `tensor`: what is apart is summed over it, each gradient of its own.
  """
  return (x,) * count


copies.defvjp(lambda x, count: (copies(x, count), None),
              lambda count, _, gradients: (functools.reduce(
                  jnp.add, apart_on_fast_memory(gradients) if mesh_size('tensor') == 1 else gradients),))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def gate_product(activation, gated, raised):
  """Returns activation(gated) * raised, computed `apart` as are both gradients."""
  return apart(activation(gated) * raised)


def _gate_product_bwd(activation, residuals, d_hidden):
  pullback = jax.vjp(lambda g, r: activation(g) * r, *residuals)[1]
  return apart(pullback(apart(d_hidden)))


gate_product.defvjp(lambda activation, g, r: (gate_product(activation, g, r), (g, r)), _gate_product_bwd)


class GatedMlp(nn.Module):
  """activation(x Wgate) * (x Wup) Wdown (arXiv:2002.05202, eq. 6), `widths` times mlp_dim wide."""

  spec: ModelSpec
  param_dtype: jnp.dtype = jnp.float32
  widths: int = 1

  @nn.compact
  def __call__(self, x):
    spec = self.spec
    d, f = spec.d_model, self.widths * spec.mlp_dim

    # The widest arrays: their gradients should not wait for what attention's backward pass overlaps.
    at_once = fast_memory(400) and mesh_size('tensor') == 1
    wide = lambda name: linear(self, name, (d, f), ('embed', 'mlp'), at_once=at_once)
    gated, raised = (checkpoint_name(result_apart(wide(name)(x)), name) for name in ('gate', 'up'))
    down = linear(self, 'down', (f, d), ('mlp', 'embed'), 1, (2 * spec.num_layers)**-0.5)
    hidden = gate_product(getattr(nn, spec.activation), gated, raised)
    return summed(down(constrain(hidden, 'batch', 'length', 'act_mlp')))


class MoeMlp(nn.Module):
  """A mixture of gated MLPs of which each token uses a few (arXiv:2401.04088, section 2.1).

  Returns (y [B, T, D], aux): sums over tokens of `load_balance` and `router_z`, as means over layers,
  and of the weighted `penalty` that the loss adds.  Without capacity_factor, and always on a cache, no
  token is dropped.
  """

  spec: ModelSpec
  param_dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x, context):
    spec = self.spec
    d, f, e, k = spec.d_model, spec.mlp_dim, spec.num_experts, spec.experts_per_token

    def weight(name, shape, names, in_axis, scale=1.0):
      # Each expert is initialised like one MLP: its fan-in does not count the experts.
      init = lambda key, shape, dtype: jax.vmap(lambda key: scaled_normal(1, scale * spec.init_scale)(
          key, shape[1:], dtype))(jax.random.split(key, shape[0]))
      init = scaled_normal(1, spec.init_scale) if in_axis == 0 else init
      return dense(parameter(self, name, nn.with_logical_partitioning(init, names), shape))

    router = weight('router', (d, e), (None, 'router'), 0)
    gate = weight('gate', (e, d, f), ('experts', 'expert_embed', 'mlp'), 1)
    up = weight('up', (e, d, f), ('experts', 'expert_embed', 'mlp'), 1)
    down = weight('down', (e, f, d), ('experts', 'mlp', 'expert_embed'), 1, (2 * spec.num_layers)**-0.5)

    # In float32: close calls between experts would fall differently in bf16 (arXiv:2101.03961, 2.4).  The precision is
    # for TPUs and GPUs, which round the factors of a float32 product unless they are told not to.
    wide = constrain(x, 'batch', 'length', 'act_embed').astype(jnp.float32)
    logits = jnp.einsum('BTD,DE->BTE', wide, router.astype(jnp.float32), precision='highest')
    weights, ids, probabilities = by_rows(lambda rows: moe.route(rows, k), logits)
    mask = (context.segment_ids != 0).astype(jnp.float32)
    balance = moe.balance_loss(probabilities, ids, mask) / spec.num_layers
    router_z = moe.router_z_loss(logits, mask) / spec.num_layers
    aux = {'load_balance': balance, 'router_z': router_z,
           'penalty': spec.balance_loss * balance + spec.router_z_loss * router_z}

    activation = getattr(nn, spec.activation)
    if spec.capacity_factor and context.aligned:
      size = moe.capacity(x.shape[1], e, k, spec.capacity_factor)
      y = with_capacity(x, weights, ids, mask, gate, up, down, activation, size, context.zigzag)
    else:
      y = dropless(x, weights, ids, gate, up, down, activation)
    if spec.shared_experts:
      y = y + GatedMlp(spec, self.param_dtype, spec.shared_experts, name='shared')(x)
    return y, aux


class Block(nn.Module):
  """Attention, then MLP, each on a normalised copy and added to the residual stream x [B, T, D].

  Returns (x, kv_cache, aux): aux are float32 sums over rows, empty without experts.
  """

  spec: ModelSpec
  param_dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x, kv_cache, context):
    spec = self.spec
    # The product that follows needs all of the length: gathered here, each device norms its part alone.
    norm = lambda name: lambda x: gradient_apart(constrain(
        Norm(spec.norm_epsilon, self.param_dtype, name=name)(x), 'batch', 'length', 'act_embed'))
    keys = (None, None) if context.key is None else jax.random.split(context.key)
    x = checkpoint_name(x, 'block_input')
    y, kv_cache = Attention(spec, self.param_dtype, name='attention')(
        norm('attention_norm')(x), kv_cache, context)
    x = constrain(x + dropout(y, spec.dropout, keys[0], context.zigzag), 'batch', 'block_length', 'act_embed')
    x = checkpoint_name(x, 'attended')
    y, aux = norm('mlp_norm')(x), {}
    if spec.num_experts:
      y, aux = MoeMlp(spec, self.param_dtype, name='mlp')(y, context)
    else:
      y = GatedMlp(spec, self.param_dtype, name='mlp')(y)
    x = x + dropout(y, spec.dropout, keys[1], context.zigzag)
    return constrain(x, 'batch', 'block_length', 'act_embed'), kv_cache, aux


class Head(nn.Module):
  """The output matrix [D, V] of an untied model.  Zeros: the first loss is ln V (arXiv:2203.03466, D.2)."""

  spec: ModelSpec
  param_dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x):
    kernel = self.param('kernel',
                        nn.with_logical_partitioning(nn.initializers.zeros, ('table_embed', 'vocab')),
                        (self.spec.d_model, self.spec.vocab_size), self.param_dtype)
    return project(x, kernel)


class Projection(nn.Module):
  """A linear map of hidden states, [..., D] to float32 [..., width], in float32; rows of unit variance stay so."""

  width: int
  param_dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x):
    kernel = self.param('kernel', nn.with_logical_partitioning(nn.initializers.lecun_normal(), ('embed', None)),
                        (x.shape[-1], self.width), self.param_dtype)
    return jnp.einsum('...D,DE->...E', x.astype(jnp.float32), kernel.astype(jnp.float32))


class ValueHead(nn.Module):
  """One number for each token, [..., D] to float32 [...], in float32.  Zeros: the first value is 0."""

  param_dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x):
    kernel = self.param('kernel', nn.with_logical_partitioning(nn.initializers.zeros, ('norm',)), (x.shape[-1],),
                        self.param_dtype)
    return jnp.einsum('...D,D->...', x.astype(jnp.float32), kernel.astype(jnp.float32))
