"""One block: a mixer and a channel mixer, each normalized and added to the residual stream."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from llmjax.model.channel_mixers import Mlp, MoeMlp
from llmjax.model.layers import Norm, dropout
from llmjax.model.mixers import mixer_class
from llmjax.model.spec import ModelSpec
from llmjax.ops.hints import materialize_gradient
from llmjax.parallel.sharding import constrain


class LayerKind(NamedTuple):
  """The kind of a layer.  attention: 'global' or 'local'.  experts: whether its MLP is a mixture of experts.

  Layers with parameters of the same shapes are stacked, so `stack` depends on `experts` alone.
  """

  attention: str
  experts: bool

  @property
  def stack(self):
    return 'moe' if self.experts else 'dense'


def layer_kinds(spec):
  """Return the LayerKind of every layer of a ModelSpec, in order."""
  default = 'local' if spec.window and not spec.attention_pattern else 'global'
  pattern = spec.attention_pattern or (default,)
  return [LayerKind(pattern[i % len(pattern)], bool(spec.num_experts) and i >= spec.first_dense_layers)
          for i in range(spec.num_layers)]


class Block(nn.Module):
  """x [B, T, D] -> (x, cache, aux); aux: dict of float32 sums over sequences, {} without experts.

  norm_placement, f the mixer or channel mixer: pre: x + f(norm(x)); output: x + norm(f(x)) (OLMo 2,
  arXiv:2501.00656, section 3.3); both: x + norm(f(norm(x))) (Gemma 2, arXiv:2408.00118, section 2); post:
  norm(x + f(x)) (arXiv:1706.03762, section 3.1).  parallel_residual: both read the input of the block
  (arXiv:2204.06745, section 2.1).
  """

  spec: ModelSpec
  kind: LayerKind
  param_dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x, cache, context):
    spec, placement = self.spec, self.spec.norm_placement
    keys = (None, None) if context.key is None else jax.random.split(context.key)
    norm = lambda name, x: Norm(spec.norm, spec.norm_epsilon, self.param_dtype, name=name)(x)
    # The product that follows needs the whole sequence: norms run before the gather, on each device's share.
    before = lambda name, x: materialize_gradient(constrain(
        norm(name, x) if placement in ('pre', 'both') else x, 'batch', 'length', 'act_embed'))

    def add(x, y, name, key):
      if placement in ('output', 'both'):
        y = norm(f'{name}_output_norm', y)
      y = dropout(y, spec.dropout, key, context.zigzag)
      x = x + (y if spec.residual_scale == 1.0 else spec.residual_scale * y)
      return constrain(norm(f'{name}_norm', x) if placement == 'post' else x, 'batch', 'block_length', 'act_embed')

    x = entry = checkpoint_name(x, 'block_input')
    y, cache = mixer_class(spec)(spec, self.kind.attention, self.param_dtype, name='attention')(
        before('attention_norm', x), cache, context)
    x = checkpoint_name(add(x, y, 'attention', keys[0]), 'attended')
    if self.kind.experts:
      mlp = MoeMlp(spec, self.param_dtype, name='mlp')
    else:
      mlp = Mlp(spec, spec.dense_mlp_dim if spec.num_experts else spec.mlp_dim, self.param_dtype, name='mlp')
    y, aux = mlp(before('mlp_norm', entry if spec.parallel_residual else x), context)
    return add(x, y, 'mlp', keys[1]), cache, aux
