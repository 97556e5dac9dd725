"""Closed forms of the parameters and FLOPs of a model.  No JAX here."""


def _attention_params(spec):
  d, h = spec.d_model, spec.resolved_head_dim
  biases = spec.qkv_bias * h * (spec.num_heads + 2 * spec.resolved_kv_heads) + spec.out_bias * d
  return 2 * d * h * (spec.num_heads + spec.resolved_kv_heads), biases


def _mlp_params(spec, width, experts=1):
  matrices = (3 if spec.mlp == 'gated' else 2) * spec.d_model * width * experts
  biases = spec.mlp_bias * ((2 if spec.mlp == 'gated' else 1) * width + spec.d_model)
  return matrices, biases


def count_params(spec):
  """Count the parameters, by part and in total."""
  d, v, layers = spec.d_model, spec.vocab_size, spec.num_layers
  norm = d * (2 if spec.norm == 'layer' else 1)
  norms = norm * (4 if spec.norm_placement == 'both' else 2) + (2 * spec.resolved_head_dim if spec.qk_norm else 0)
  per_layer = sum(_attention_params(spec)) + norms
  if spec.num_experts:
    dense = spec.first_dense_layers
    shared = sum(_mlp_params(spec, spec.shared_experts * spec.mlp_dim)) if spec.shared_experts else 0
    mixture = 3 * d * spec.mlp_dim * spec.num_experts + shared + spec.num_experts * d
    mlps = (layers - dense) * mixture + dense * sum(_mlp_params(spec, spec.dense_mlp_dim))
  else:
    mlps = layers * sum(_mlp_params(spec, spec.mlp_dim))
  positions = {'learned': spec.max_positions * d,
               'relative': spec.relative_buckets * spec.num_heads}.get(spec.position_embedding, 0)
  parts = {'embed': v * d + positions, **({'embed_norm': norm} if spec.embedding_norm else {}),
           'blocks': layers * per_layer + mlps, 'final_norm': 0 if spec.norm_placement == 'post' else norm,
           'head': 0 if spec.tie_embeddings else v * d,
           **({'value': d} if spec.value_head else {}),
           **({'projection': d * spec.projection} if spec.projection else {})}
  return {**parts, 'total': sum(parts.values())}


def matmul_params(spec):
  """Count the parameters in matrix products per token: no embeddings, norms, biases, or experts that are not used."""
  attention = spec.num_layers * _attention_params(spec)[0]
  if spec.num_experts:
    active = spec.experts_per_token + spec.shared_experts
    mixture = 3 * spec.d_model * spec.mlp_dim * active + spec.num_experts * spec.d_model
    mlps = ((spec.num_layers - spec.first_dense_layers) * mixture
            + spec.first_dense_layers * _mlp_params(spec, spec.dense_mlp_dim)[0])
  else:
    mlps = spec.num_layers * _mlp_params(spec, spec.mlp_dim)[0]
  return attention + mlps + spec.vocab_size * spec.d_model


def keys_per_query(spec, seq_len, window):
  """Return the average number of keys that a query of a sequence attends to.  window: 0 for none."""
  if not spec.causal:
    return min(seq_len, 2 * window - 1) if window else seq_len
  if window and window < seq_len:
    return (window * (window + 1) / 2 + (seq_len - window) * window) / seq_len
  return (seq_len + 1) / 2


def train_flops_per_token(spec, seq_len, frozen=False):
  """Return the model FLOPs of a forward and backward pass per token, for sequences of `seq_len` tokens.

  6 per parameter of `matmul_params` (PaLM, arXiv:2204.02311, appendix B) and, in attention, 12 x layers x heads x
  head_dim x the average number of keys.  Recomputation is not counted.  frozen: the parameters have no gradient, 4
  instead of 6; adapters are not counted.
  """
  pattern = spec.attention_pattern or ('local' if spec.window else 'global',)
  kinds = [pattern[i % len(pattern)] for i in range(spec.num_layers)]
  keys = sum(keys_per_query(spec, seq_len, spec.window if kind == 'local' else 0) for kind in kinds)
  attention = 12 * spec.num_heads * spec.resolved_head_dim * keys
  return (4 if frozen else 6) * matmul_params(spec) + attention
