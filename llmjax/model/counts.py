"""Closed forms: parameters and FLOPs of a model.  No JAX here."""


def count_params(spec):
  """Returns the number of parameters, by part and in total."""
  d, f, v = spec.d_model, spec.mlp_dim, spec.vocab_size
  attention = 2 * d * spec.heads_dim * (spec.num_heads + spec.kv_heads)
  norms = 2 * d + (2 * spec.heads_dim if spec.qk_norm else 0)
  mlps = (spec.num_experts + spec.shared_experts if spec.num_experts else 1) * 3 * d * f
  router = spec.num_experts * d
  parts = {'embed': v * d, 'blocks': spec.num_layers * (attention + mlps + router + norms),
           'final_norm': d, 'head': 0 if spec.tie_embeddings else v * d,
           **({'value': d} if spec.value_head else {}),
           **({'projection': d * spec.projection} if spec.projection else {})}
  return {**parts, 'total': sum(parts.values())}


def matmul_params(spec):
  """Returns the parameters that multiply a token: not the embedding look-up, the norms, and experts it skips."""
  d = spec.d_model
  attention = 2 * d * spec.heads_dim * (spec.num_heads + spec.kv_heads)
  mlps = spec.experts_per_token + spec.shared_experts if spec.num_experts else 1
  router = spec.num_experts * d
  return spec.num_layers * (attention + mlps * 3 * d * spec.mlp_dim + router) + spec.vocab_size * d


def train_flops_per_token(spec, seq_len, frozen=False):
  """Returns model FLOPs of forward and backward for one token of a row of `seq_len` tokens.

  6 for each multiplying parameter (PaLM, arXiv:2204.02311, appendix B) and, in attention,
  12 x layers x heads x head_dim x the keys seen on average: half the row, since it is causal, or less
  under a window.  Recomputation is not counted.  frozen: the parameters have no gradient, which leaves 4 of
  the 6; what adapters add is not counted.
  """
  keys = (seq_len + 1) / 2
  if spec.window and spec.window < seq_len:
    keys = (spec.window * (spec.window + 1) / 2 + (seq_len - spec.window) * spec.window) / seq_len
  attention = 12 * spec.num_layers * spec.num_heads * spec.heads_dim * keys
  return (4 if frozen else 6) * matmul_params(spec) + attention
