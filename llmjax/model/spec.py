"""ModelSpec: the architecture of a model as numbers and choices.  No JAX here."""

import dataclasses
import difflib

from llmjax import extensions
from llmjax.config import ConfigError, setting
from llmjax.model.presets import PRESETS

ACTIVATIONS = ('silu', 'gelu', 'gelu_exact', 'relu', 'relu_squared')
ATTENTION_KINDS = ('global', 'local')
MIXERS = ('attention',)


@dataclasses.dataclass(frozen=True)
class ModelSpec:
  """A transformer language model.  Letters: D d_model, N num_heads, K num_kv_heads, H head_dim, F mlp_dim."""

  preset: str = setting('', f'model to take the other fields from, unless they are set: {", ".join(PRESETS)}, or '
                        'module:name, a function without arguments that returns a dict of fields')
  num_layers: int = setting(8, 'number of blocks', minimum=1)
  d_model: int = setting(512, 'width of the residual stream (hidden size)', minimum=1)
  num_heads: int = setting(8, 'number of query heads', minimum=1)
  num_kv_heads: int = setting(0, 'number of key/value heads (grouped-query attention); 0: num_heads', minimum=0)
  head_dim: int = setting(0, 'width of a head; 0: d_model / num_heads', minimum=0)
  mlp_dim: int = setting(1408, 'hidden width of the MLP, or of each expert', minimum=1)
  vocab_size: int = setting(0, "size of the vocabulary; 0: the tokenizer's, rounded up to a multiple of 128",
                            minimum=0)
  mixer: str = setting('attention', 'how tokens exchange information: attention, or module:name, a flax module (see '
                       'llmjax/model/mixers.py)')
  mlp: str = setting('gated', 'gated: activation(x Wgate) * (x Wup) Wdown; plain: activation(x Wup) Wdown',
                     choices=('gated', 'plain'))
  activation: str = setting('silu', 'activation of the MLP; gated, silu is SwiGLU and gelu (tanh approximation) GeGLU',
                            choices=ACTIVATIONS)
  norm: str = setting('rms', 'rms: RMSNorm; layer: LayerNorm', choices=('rms', 'layer'))
  norm_placement: str = setting('pre', 'norms around f, attention or MLP. pre: x + f(norm(x)); output: x + norm(f(x)); '
                                'both: x + norm(f(norm(x))); post: norm(x + f(x))',
                                choices=('pre', 'output', 'both', 'post'))
  parallel_residual: bool = setting(False, 'attention and MLP both read the input of the block, as in GPT-NeoX')
  residual_scale: float = setting(1.0, 'factor on the outputs of attention and MLP before they are added', minimum=0.0)
  embedding_scale: float = setting(1.0, 'factor on the token embeddings', minimum=0.0)
  embedding_norm: bool = setting(False, 'normalize the embeddings before the first block')
  qkv_bias: bool = setting(False, 'biases on queries, keys and values')
  out_bias: bool = setting(False, 'bias on the output projection of attention')
  mlp_bias: bool = setting(False, 'biases in the MLP')
  tie_embeddings: bool = setting(False, 'use the embedding table as the output matrix')
  norm_epsilon: float = setting(1e-5, 'epsilon of the norms', minimum=0.0)
  position_embedding: str = setting('rotary', 'rotary: on queries and keys (arXiv:2104.09864); learned: added to the '
                                    'token embeddings; relative: bucketed bias on attention logits (arXiv:1910.10683, '
                                    'section 2.1); none', choices=('rotary', 'learned', 'relative', 'none'))
  max_positions: int = setting(0, 'learned: number of position embeddings', minimum=0)
  relative_buckets: int = setting(32, 'relative: number of buckets of distances', minimum=4)
  relative_max_distance: int = setting(128, 'relative: distance from which on all tokens share the last bucket',
                                       minimum=2)
  rope_theta: float = setting(10000.0, 'rotary: base of the wavelengths', minimum=1.0)
  local_rope_theta: float = setting(0.0, 'rope_theta of local layers; 0: rope_theta', minimum=0.0)
  rotary_fraction: float = setting(1.0, 'rotary: fraction of the features of each head that is rotated',
                                   minimum=0.0, maximum=1.0)
  rope_scaling: str = setting('none', 'extension of the context by longer wavelengths, in global layers: linear '
                              '(arXiv:2306.15595), llama3 (arXiv:2407.21783, section 3.4.1), yarn (arXiv:2309.00071)',
                              choices=('none', 'linear', 'llama3', 'yarn'))
  rope_factor: float = setting(1.0, 'rope_scaling: factor on the context length', minimum=1.0)
  rope_original_length: int = setting(8192, 'rope_scaling: context length before it', minimum=1)
  rope_low_frequency: float = setting(1.0, 'rope_scaling llama3: low_freq_factor; yarn: beta_slow', minimum=0.0)
  rope_high_frequency: float = setting(4.0, 'rope_scaling llama3: high_freq_factor; yarn: beta_fast, usually 32',
                                       minimum=0.0)
  causal: bool = setting(True, 'causal attention; false: bidirectional')
  window: int = setting(0, 'sliding window of local layers: number of keys a query attends to, its own included; 0: no '
                        'local layers', minimum=0)
  attention_pattern: tuple[str, ...] = setting((), 'kinds of attention, global or local, of consecutive layers, '
                                               'repeated to the last one; empty: all local if window is set, else all '
                                               'global')
  attention_scale: float = setting(0.0, 'factor on the attention logits; 0: 1 / sqrt(head_dim)', minimum=0.0)
  attention_soft_cap: float = setting(0.0, 'soft cap of the attention logits: cap * tanh(logits / cap); 0: none',
                                      minimum=0.0)
  logits_soft_cap: float = setting(0.0, 'soft cap of the output logits; 0: none', minimum=0.0)
  qk_norm: bool = setting(False, 'RMSNorm on queries and keys, per head')
  dropout: float = setting(0.0, 'dropout rate after attention and MLP, in training; a pipeline draws other masks than '
                           'one device', minimum=0.0, maximum=0.9)
  num_experts: int = setting(0, 'number of experts of a mixture of experts; 0: dense', minimum=0)
  first_dense_layers: int = setting(0, 'number of dense layers before the first mixture of experts', minimum=0)
  dense_mlp_dim: int = setting(0, 'hidden width of the MLP of first_dense_layers', minimum=0)
  experts_per_token: int = setting(2, 'number of experts that each token is routed to (top-k)', minimum=1)
  shared_experts: int = setting(0, 'number of experts that every token uses in addition', minimum=0)
  capacity_factor: float = setting(0.0, "capacity of an expert, relative to its fair share of a sequence's tokens; "
                                   'tokens beyond it are dropped. 0: dropless', minimum=0.0)
  balance_loss: float = setting(0.01, 'coefficient of the load-balancing loss, a mean over layers', minimum=0.0)
  router_z_loss: float = setting(0.001, 'coefficient of the router z-loss, log(Z)^2, a mean over layers', minimum=0.0)
  init_scale: float = setting(1.0, 'factor on the initial weights', minimum=0.0)
  value_head: bool = setting(False, 'add a scalar output per token: the score of a reward model, the critic of PPO')
  projection: int = setting(0, "hidden size of a teacher, to which the student's hidden states are projected; set by "
                            'distill', minimum=0)

  @classmethod
  def base(cls, values):
    """Return the fields of the preset that `values` names; {} if values has all fields, as a run's config has."""
    name = values.get('preset', '')
    fields = {field.name for field in dataclasses.fields(cls)}
    if not isinstance(name, str) or not extensions.is_path(name) or fields <= set(values):
      return PRESETS.get(name, {}) if isinstance(name, str) else {}
    preset = extensions.load(name, 'model.preset')()
    if not isinstance(preset, dict):
      raise ConfigError([f'model.preset={name} returns {type(preset).__name__}; return a dict of model fields'])
    if unknown := [f for f in preset if f not in fields - {'preset'}]:
      near = difflib.get_close_matches(str(unknown[0]), fields, n=1)
      hint = f'did you mean {near[0]}?' if near else 'return fields of the model group'
      raise ConfigError([f'model.preset={name} returns {unknown[0]!r}, which is not a field; {hint}'])
    return preset

  @property
  def resolved_kv_heads(self):
    return self.num_kv_heads or self.num_heads

  @property
  def resolved_head_dim(self):
    return self.head_dim or self.d_model // self.num_heads

  @property
  def rotary_dim(self):
    """Number of features of a head that are rotated."""
    return int(self.resolved_head_dim * self.rotary_fraction)

  def validate(self):
    for name, value, choices in (('preset', self.preset, ('', *PRESETS)), ('mixer', self.mixer, MIXERS)):
      if value not in choices and not extensions.is_path(value):
        near = difflib.get_close_matches(value, choices, n=1)
        hint = f'; did you mean {near[0]}?' if near else ''
        yield f'{name}={value!r} must be one of {", ".join(filter(None, choices))}, or module:name{hint}'
    if extensions.is_path(self.mixer):
      try:
        extensions.load(self.mixer, 'mixer')
      except ConfigError as e:
        yield from e.problems
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
      yield 'attention_pattern has local layers and window=0; set window, the number of keys that they attend to'
    if self.position_embedding == 'learned' and not self.max_positions:
      yield 'position_embedding=learned needs max_positions, such as data.seq_len'
    exact = self.relative_buckets // (2 if self.causal else 4)
    if self.position_embedding == 'relative' and self.relative_max_distance <= exact:
      yield (f'relative_max_distance={self.relative_max_distance} must be more than {exact}, the distances that have '
             f'a bucket each with relative_buckets={self.relative_buckets}; write {4 * exact}')
    if self.first_dense_layers and not (self.num_experts and self.dense_mlp_dim):
      yield 'first_dense_layers needs num_experts and dense_mlp_dim'
    if self.first_dense_layers >= self.num_layers:
      yield f'first_dense_layers={self.first_dense_layers} must be less than num_layers={self.num_layers}'
