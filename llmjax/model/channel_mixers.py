"""Channel mixers: the part of a block that processes every token separately.

Each is a linen module `(x [B, T, D], context) -> (y [B, T, D], aux)`; aux holds float32 sums over sequences.
Letters: F mlp_dim, E experts, C slots of an expert.
"""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from llmjax.model.layers import linear, parameter, scaled_normal, sum_over_tensor
from llmjax.model.spec import ModelSpec
from llmjax.ops import moe
from llmjax.ops.hints import gate_product, materialize_result
from llmjax.ops.products import dense
from llmjax.parallel.chips import has_fast_memory
from llmjax.parallel.experts import dropless, with_capacity
from llmjax.parallel.sharding import by_rows, constrain, mesh_size


@functools.cache
def activation_function(name):
  """Return the activation function of a name of `spec.ACTIVATIONS`, always the same object."""
  return {'silu': jax.nn.silu, 'gelu': jax.nn.gelu, 'gelu_exact': functools.partial(jax.nn.gelu, approximate=False),
          'relu': jax.nn.relu, 'relu_squared': lambda x: jnp.square(jax.nn.relu(x))}[name]


class Mlp(nn.Module):
  """Gated: activation(x Wgate) * (x Wup) Wdown (arXiv:2002.05202, eq. 6).  Plain: activation(x Wup) Wdown."""

  spec: ModelSpec
  width: int
  param_dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x, context=None):
    spec, d, f = self.spec, self.spec.d_model, self.width

    # These are the largest arrays: their gradients should not be delayed into the backward pass of attention.
    join, materialized = has_fast_memory(400) and mesh_size('tensor') == 1, has_fast_memory()
    wide = lambda name: linear(self, name, (d, f), ('embed', 'mlp'), bias=spec.mlp_bias, join_gradients=join)
    gated = spec.mlp == 'gated'
    products = [checkpoint_name(materialize_result(wide(name)(x), materialized), name)
                for name in ('gate', 'up')[1 - gated:]]
    down = linear(self, 'down', (f, d), ('mlp', 'embed'), 1, (2 * spec.num_layers)**-0.5, bias=spec.mlp_bias)
    activation = activation_function(spec.activation)
    hidden = gate_product(activation, *products) if gated else activation(products[0])
    return sum_over_tensor(down(constrain(hidden, 'batch', 'length', 'act_mlp'))), {}


class MoeMlp(nn.Module):
  """Mixture of gated MLPs, of which the router picks a few for each token (arXiv:2401.04088, section 2.1).

  Returns (y [B, T, D], aux): sums over tokens of `load_balance` and `router_z`, divided by the number of layers, and of
  `penalty`, their weighted sum, which is added to the loss.  Without capacity_factor, and always with a cache, no token
  is dropped.
  """

  spec: ModelSpec
  param_dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x, context):
    spec = self.spec
    d, f, e, k = spec.d_model, spec.mlp_dim, spec.num_experts, spec.experts_per_token

    def weight(name, shape, names, in_axis, scale=1.0):
      # Each expert is initialized as a dense MLP: its fan-in does not count the experts.
      init = lambda key, shape, dtype: jax.vmap(lambda key: scaled_normal(1, scale * spec.init_scale)(
          key, shape[1:], dtype))(jax.random.split(key, shape[0]))
      init = scaled_normal(1, spec.init_scale) if in_axis == 0 else init
      return dense(parameter(self, name, nn.with_logical_partitioning(init, names), shape))

    router = weight('router', (d, e), (None, 'router'), 0)
    gate = weight('gate', (e, d, f), ('experts', 'expert_embed', 'mlp'), 1)
    up = weight('up', (e, d, f), ('experts', 'expert_embed', 'mlp'), 1)
    down = weight('down', (e, f, d), ('experts', 'mlp', 'expert_embed'), 1, (2 * spec.num_layers)**-0.5)

    # In float32: bfloat16 would change the choice between experts with close logits (arXiv:2101.03961, section 2.4).
    # The precision is for TPUs and GPUs, which round the factors of float32 products by default.
    wide = constrain(x, 'batch', 'length', 'act_embed').astype(jnp.float32)
    logits = jnp.einsum('BTD,DE->BTE', wide, router.astype(jnp.float32), precision='highest')
    weights, ids, probabilities = by_rows(lambda rows: moe.route(rows, k), logits)
    mask = (context.segment_ids != 0).astype(jnp.float32)
    balance = moe.balance_loss(probabilities, ids, mask) / spec.num_layers
    router_z = moe.router_z_loss(logits, mask) / spec.num_layers
    aux = {'load_balance': balance, 'router_z': router_z,
           'penalty': spec.balance_loss * balance + spec.router_z_loss * router_z}

    activation = activation_function(spec.activation)
    if spec.capacity_factor and not context.cached:
      size = moe.capacity(x.shape[1], e, k, spec.capacity_factor)
      y = with_capacity(x, weights, ids, mask, gate, up, down, activation, size, context.zigzag)
    else:
      y = dropless(x, weights, ids, gate, up, down, activation)
    if spec.shared_experts:
      y = y + Mlp(spec, spec.shared_experts * spec.mlp_dim, self.param_dtype, name='shared')(x)[0]
    return y, aux
