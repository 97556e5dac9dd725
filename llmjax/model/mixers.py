"""Mixers: the part of a block in which tokens exchange information.

A mixer is a linen module with fields (spec, kind, param_dtype) that is called as (x [B, T, D], cache, context) -> (y
[B, T, D], cache).  `init_cache(spec, batch, slots, dtype)` of its class returns the empty cache of one layer: a pytree
with a method `grow(extra)`, such as those of model/cache.py.  The names of parameters decide on their compute dtype and
weight decay, so a mixer from outside, `model.mixer=module:name`, names its matrices query, key, value, out, gate, up or
down (see `linear` of model/layers.py).  Letters: N query heads, K key/value heads, H head_dim.
"""

import jax.numpy as jnp
from flax import linen as nn

from llmjax import extensions
from llmjax.model.cache import KvCache
from llmjax.model.layers import Norm, linear, sum_over_tensor
from llmjax.model.spec import ModelSpec
from llmjax.ops.hints import fan_out
from llmjax.ops.rotary import apply_rope
from llmjax.parallel.attention import attention
from llmjax.parallel.chips import has_fast_memory
from llmjax.parallel.sharding import constrain, mesh_size


class Attention(nn.Module):
  """Grouped-query attention (arXiv:2305.13245) with the mask and position encoding of its kind."""

  spec: ModelSpec
  kind: str = 'global'
  param_dtype: jnp.dtype = jnp.float32

  @staticmethod
  def init_cache(spec, batch, slots, dtype):
    return KvCache.empty((batch, spec.resolved_kv_heads, slots, spec.resolved_head_dim), dtype)

  @nn.compact
  def __call__(self, x, cache, context):
    spec, inputs = self.spec, context.attention[self.kind]
    d, n, k, h = spec.d_model, spec.num_heads, spec.resolved_kv_heads, spec.resolved_head_dim

    x = fan_out(x, 3, has_fast_memory() and mesh_size('tensor') == 1)
    query = linear(self, 'query', (d, n, h), ('embed', 'heads', 'head_dim'), bias=spec.qkv_bias)(x[0])
    keys = linear(self, 'key', (d, k, h), ('embed', 'kv_heads', 'head_dim'), bias=spec.qkv_bias)(x[1])
    values = linear(self, 'value', (d, k, h), ('embed', 'kv_heads', 'head_dim'), bias=spec.qkv_bias)(x[2])
    # Initial outputs into the residual stream shrink with depth (GPT-2, section 2.3).
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
    y = attention(query, keys, values, inputs.mask, bias=inputs.bias, soft_cap=spec.attention_soft_cap or None,
                  scale=spec.attention_scale or None, implementation=context.implementation, zigzag=context.zigzag)
    return sum_over_tensor(out(y)), cache


MIXERS = {'attention': Attention}


def mixer_class(spec):
  """Return the class that `spec.mixer` names: a key of MIXERS, or module:name."""
  return MIXERS[spec.mixer] if spec.mixer in MIXERS else extensions.load(spec.mixer, 'model.mixer')
