"""Mixers: the part of a block in which tokens exchange information.

Each is a linen module `(x [B, T, D], cache, context) -> (y [B, T, D], cache)`; cache is a leaf type of model/cache.py,
or None.  Letters: N query heads, K key/value heads, H head_dim.
"""

import jax.numpy as jnp
from flax import linen as nn

from llmjax.model.layers import Norm, linear, sum_over_tensor
from llmjax.model.spec import ModelSpec
from llmjax.ops.hints import fan_out
from llmjax.ops.rotary import apply_rope
from llmjax.parallel.attention import attention
from llmjax.parallel.chips import has_fast_memory
from llmjax.parallel.sharding import constrain, mesh_size


class Attention(nn.Module):
  """Grouped-query attention (arXiv:2305.13245) under the mask of its kind."""

  spec: ModelSpec
  kind: str = 'global'
  param_dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x, cache, context):
    spec, inputs = self.spec, context.attention[self.kind]
    d, n, k, h = spec.d_model, spec.num_heads, spec.resolved_kv_heads, spec.resolved_head_dim

    x = fan_out(x, 3, has_fast_memory() and mesh_size('tensor') == 1)
    query = linear(self, 'query', (d, n, h), ('embed', 'heads', 'head_dim'), bias=spec.qkv_bias)(x[0])
    keys = linear(self, 'key', (d, k, h), ('embed', 'kv_heads', 'head_dim'), bias=spec.qkv_bias)(x[1])
    values = linear(self, 'value', (d, k, h), ('embed', 'kv_heads', 'head_dim'), bias=spec.qkv_bias)(x[2])
    # Outputs into the residual stream start smaller with depth (GPT-2, section 2.3).
    out = linear(self, 'out', (n, h, d), ('heads', 'head_dim', 'embed'), 2, (2 * spec.num_layers)**-0.5,
                 bias=spec.out_bias)
    if spec.qk_norm:
      query = Norm('rms', spec.norm_epsilon, self.param_dtype, name='query_norm')(query)
      keys = Norm('rms', spec.norm_epsilon, self.param_dtype, name='key_norm')(keys)
    heads = lambda a: constrain(a, 'batch', 'length', 'act_heads', None)
    if inputs.angles is not None:
      query, keys = apply_rope(query, inputs.angles), apply_rope(keys, inputs.angles)
    query, keys, values = heads(query), heads(keys), heads(values)
    if cache is not None:
      cache = cache.update(inputs.slots, keys, values)
      if context.decoding:
        keys, values = cache.read()
    y = attention(query, keys, values, inputs.mask, soft_cap=spec.attention_soft_cap or None,
                  scale=spec.attention_scale or None, implementation=context.implementation, zigzag=context.zigzag)
    return sum_over_tensor(out(y)), cache
