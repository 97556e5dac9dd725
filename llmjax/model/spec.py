"""ModelSpec: the numbers and choices that make a model.  No JAX here."""

import dataclasses

from llmjax.config import setting
from llmjax.model import presets

ACTIVATIONS = ('silu', 'gelu', 'gelu_exact', 'relu', 'relu_squared')
ATTENTION_KINDS = ('global', 'local')


@dataclasses.dataclass(frozen=True)
class ModelSpec:
  """A transformer language model.  Letters: D d_model, N num_heads, K num_kv_heads, H head_dim, F mlp_dim."""

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
  mlp: str = setting('gated', 'gated: activation(x Wgate) * (x Wup) Wdown; plain: activation(x Wup) Wdown',
                     choices=('gated', 'plain'))
  activation: str = setting('silu', 'of the MLP; with a gate, silu is SwiGLU and gelu (tanh) GeGLU',
                            choices=ACTIVATIONS)
  norm: str = setting('rms', 'RMSNorm or LayerNorm', choices=('rms', 'layer'))
  norm_placement: str = setting('pre', 'of attention and MLP f. pre: x + f(norm(x)); output: x + norm(f(x)); both: '
                                'x + norm(f(norm(x))); post: norm(x + f(x))', choices=('pre', 'output', 'both', 'post'))
  parallel_residual: bool = setting(False, 'attention and MLP both read the input of the block')
  residual_scale: float = setting(1.0, 'factor of what attention and MLP add to the residual stream', minimum=0.0)
  embedding_scale: float = setting(1.0, 'factor of the token embeddings', minimum=0.0)
  embedding_norm: bool = setting(False, 'normalize the embeddings before the first block')
  qkv_bias: bool = setting(False, 'biases on queries, keys and values')
  out_bias: bool = setting(False, 'a bias on the output of attention')
  mlp_bias: bool = setting(False, 'biases in the MLP')
  tie_embeddings: bool = setting(False, 'use the embedding table as the output matrix')
  norm_epsilon: float = setting(1e-5, 'added to the mean square or variance in norms', minimum=0.0)
  position_embedding: str = setting('rotary', 'rotary: on queries and keys (arXiv:2104.09864); learned: added to the '
                                    'token embeddings; none', choices=('rotary', 'learned', 'none'))
  max_positions: int = setting(0, 'learned position embeddings: how many', minimum=0)
  rope_theta: float = setting(10000.0, 'base of the rotary wavelengths', minimum=1.0)
  local_rope_theta: float = setting(0.0, 'the same in local layers; 0: rope_theta', minimum=0.0)
  rotary_fraction: float = setting(1.0, 'part of each head that is rotated', minimum=0.0, maximum=1.0)
  rope_scaling: str = setting('none', 'stretch rotary wavelengths for longer sequences: linear (arXiv:2306.15595), '
                              'llama3 (arXiv:2407.21783, section 3.4.1) or yarn (arXiv:2309.00071); global layers only',
                              choices=('none', 'linear', 'llama3', 'yarn'))
  rope_factor: float = setting(1.0, 'factor of rope_scaling', minimum=1.0)
  rope_original_length: int = setting(8192, 'sequence length before rope_scaling', minimum=1)
  rope_low_frequency: float = setting(1.0, 'llama3: low_freq_factor; yarn: beta_slow', minimum=0.0)
  rope_high_frequency: float = setting(4.0, 'llama3: high_freq_factor; yarn: beta_fast, usually 32', minimum=0.0)
  causal: bool = setting(True, 'a token attends to itself and earlier tokens only')
  window: int = setting(0, 'local layers: keys that a query attends to, itself included; 0: no local layers', minimum=0)
  attention_pattern: tuple[str, ...] = setting((), 'kinds of attention, global or local, of the first layers; repeated '
                                               'to the last one. Empty: all local if window is set, else all global')
  attention_scale: float = setting(0.0, 'factor of the attention logits; 0: head_dim ** -0.5', minimum=0.0)
  attention_soft_cap: float = setting(0.0, 'cap * tanh(logits / cap) in attention; 0: off',
                                      minimum=0.0)
  logits_soft_cap: float = setting(0.0, 'the same for the output logits; 0: off', minimum=0.0)
  qk_norm: bool = setting(False, 'RMSNorm on queries and keys, per head')
  dropout: float = setting(0.0, 'rate after attention and MLP, while training; a pipeline drops others than one '
                           'device does', minimum=0.0, maximum=0.9)
  num_experts: int = setting(0, 'experts of the MLP, each of mlp_dim; 0: one MLP for all tokens', minimum=0)
  first_dense_layers: int = setting(0, 'layers before the first mixture of experts', minimum=0)
  dense_mlp_dim: int = setting(0, 'width of the MLP of those layers', minimum=0)
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
  def resolved_kv_heads(self):
    return self.num_kv_heads or self.num_heads

  @property
  def resolved_head_dim(self):
    return self.head_dim or self.d_model // self.num_heads

  @property
  def rotary_dim(self):
    """Features of a head that are rotated."""
    return int(self.resolved_head_dim * self.rotary_fraction)

  def validate(self):
    if not self.head_dim and self.d_model % self.num_heads:
      below = self.d_model // self.num_heads * self.num_heads
      yield (f'd_model={self.d_model} is not divisible by num_heads={self.num_heads}; write '
             f'd_model={below or self.num_heads} or {below + self.num_heads}, or set head_dim')
    elif self.position_embedding == 'rotary' and self.rotary_dim % 2:
      yield f'head_dim={self.resolved_head_dim} times rotary_fraction must be even: pairs of features are rotated'
    if self.num_heads % self.resolved_kv_heads:
      fits = [k for k in range(1, self.num_heads + 1) if self.num_heads % k == 0]
      yield (f'num_kv_heads={self.num_kv_heads} must divide num_heads={self.num_heads}; '
             f'write one of {", ".join(map(str, fits))}')
    if self.num_experts and self.experts_per_token > self.num_experts:
      yield (f'experts_per_token={self.experts_per_token} is more than num_experts={self.num_experts}; '
             f'write at most {self.num_experts}')
    if unknown := [kind for kind in self.attention_pattern if kind not in ATTENTION_KINDS]:
      yield f'attention_pattern: {unknown[0]!r} is not one of {", ".join(ATTENTION_KINDS)}'
    if 'local' in self.attention_pattern and not self.window:
      yield 'attention_pattern has local layers and window=0; set window to the keys that they attend to'
    if self.position_embedding == 'learned' and not self.max_positions:
      yield 'position_embedding=learned needs max_positions, such as data.seq_len'
    if self.first_dense_layers and not (self.num_experts and self.dense_mlp_dim):
      yield 'first_dense_layers needs num_experts and dense_mlp_dim'
    if self.first_dense_layers >= self.num_layers:
      yield f'first_dense_layers={self.first_dense_layers} must be less than num_layers={self.num_layers}'
