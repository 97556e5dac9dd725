"""ModelSpec: the numbers and choices that make a model.  No JAX here."""

import dataclasses

from llmjax.config import setting
from llmjax.model import presets


@dataclasses.dataclass(frozen=True)
class ModelSpec:
  """A decoder-only transformer.  Letters: D d_model, N num_heads, K num_kv_heads, H head_dim, F mlp_dim."""

  preset: str = setting('', 'start from this model; other fields change it',
                        choices=('', *presets.PRESETS))
  num_layers: int = setting(8, 'blocks', minimum=1)
  d_model: int = setting(512, 'width of the residual stream', minimum=1)
  num_heads: int = setting(8, 'query heads', minimum=1)
  num_kv_heads: int = setting(0, 'key and value heads; 0: as many as num_heads', minimum=0)
  head_dim: int = setting(0, 'width of a head; 0: d_model / num_heads', minimum=0)
  mlp_dim: int = setting(1408, 'width of the gated MLP', minimum=1)
  vocab_size: int = setting(0, "token ids; 0: the tokenizer's, rounded up to a multiple of 128",
                            minimum=0)
  activation: str = setting('silu', 'gate of the MLP: silu is SwiGLU, gelu is GeGLU',
                            choices=('silu', 'gelu'))
  tie_embeddings: bool = setting(False, 'use the embedding table as the output matrix')
  norm_epsilon: float = setting(1e-5, 'added to the mean square in RMSNorm', minimum=0.0)
  rope_theta: float = setting(10000.0, 'base of the rotary wavelengths', minimum=1.0)
  window: int = setting(0, 'keys a query sees, itself included; 0: all before it', minimum=0)
  attention_soft_cap: float = setting(0.0, 'cap * tanh(logits / cap) in attention; 0: off',
                                      minimum=0.0)
  logits_soft_cap: float = setting(0.0, 'the same for the output logits; 0: off', minimum=0.0)
  qk_norm: bool = setting(False, 'RMSNorm on queries and keys, per head')
  dropout: float = setting(0.0, 'rate after attention and MLP, while training; a pipeline drops others than one '
                           'device does', minimum=0.0, maximum=0.9)
  num_experts: int = setting(0, 'experts of the MLP, each of mlp_dim; 0: one MLP for all tokens', minimum=0)
  experts_per_token: int = setting(2, 'experts that each token uses', minimum=1)
  shared_experts: int = setting(0, 'experts, besides, that every token uses', minimum=0)
  capacity_factor: float = setting(0.0, "slots of an expert over its fair share of a row's tokens; what finds "
                                   'none is dropped. 0: as many as it takes', minimum=0.0)
  balance_loss: float = setting(0.01, 'weight of the load-balance loss, a mean over layers', minimum=0.0)
  router_z_loss: float = setting(0.001, "weight of the router's log(Z)^2, a mean over layers", minimum=0.0)
  init_scale: float = setting(1.0, 'factor on the initial weights', minimum=0.0)
  value_head: bool = setting(False, 'a second output, one number for each token: of a reward model, or the critic of '
                             'PPO')
  projection: int = setting(0, "width of a teacher's hidden states that a distilled student's are mapped to; a run "
                            'sets it itself', minimum=0)

  @classmethod
  def base(cls, values):
    """Returns the fields that the preset named in `values` sets."""
    name = values.get('preset', '')
    return presets.PRESETS.get(name, {}) if isinstance(name, str) else {}

  @property
  def kv_heads(self):
    return self.num_kv_heads or self.num_heads

  @property
  def heads_dim(self):
    return self.head_dim or self.d_model // self.num_heads

  def problems(self):
    if not self.head_dim and self.d_model % self.num_heads:
      below = self.d_model // self.num_heads * self.num_heads
      yield (f'd_model={self.d_model} is not divisible by num_heads={self.num_heads}; write '
             f'd_model={below or self.num_heads} or {below + self.num_heads}, or set head_dim')
    elif self.heads_dim % 2:
      yield f'head_dim={self.heads_dim} must be even: rotary positions turn pairs of features'
    if self.num_heads % self.kv_heads:
      fits = [k for k in range(1, self.num_heads + 1) if self.num_heads % k == 0]
      yield (f'num_kv_heads={self.num_kv_heads} must divide num_heads={self.num_heads}; '
             f'write one of {", ".join(map(str, fits))}')
    if self.num_experts and self.experts_per_token > self.num_experts:
      yield (f'experts_per_token={self.experts_per_token} is more than num_experts={self.num_experts}; '
             f'write at most {self.num_experts}')
