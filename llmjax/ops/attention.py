"""Multi-head attention over packed batches; one table of implementations."""

import functools

from jax.ad_checkpoint import checkpoint_name

from llmjax.ops import kernels
from llmjax.ops.blockwise import blockwise_attention, reference_attention

# functions (options, q, k, v, q_ids, k_ids) of ops/blockwise.py's letters.
IMPLEMENTATIONS = {
    'reference': reference_attention,
    'blockwise': blockwise_attention,
    'splash': kernels.splash_attention,
    'splash_emulated': functools.partial(kernels.splash_attention, emulate=True),
    'cudnn': kernels.cudnn_attention,
    'cudnn_emulated': functools.partial(kernels.cudnn_attention, emulate=True),
}

# What a kernel cannot do.  Those that are not here are plain XLA: they do everything, on any platform,
# and XLA divides their work over a mesh.
PROBLEMS = {
    'splash': functools.partial(kernels.kernel_problem, 'splash'),
    'splash_emulated': functools.partial(kernels.kernel_problem, 'splash'),
    'cudnn': functools.partial(kernels.kernel_problem, 'cudnn'),
    'cudnn_emulated': functools.partial(kernels.kernel_problem, 'cudnn'),
}


def attention(q, k, v, *, q_positions, k_positions, q_segment_ids, k_segment_ids, window=None,
              soft_cap=None, scale=None, implementation='blockwise', aligned=True):
  """Returns the softmax-weighted mean of values, [B, T, N, H] in v's dtype.

  q: [B, T, N, H].  k, v: [B, S, K, H] with N a multiple of K (grouped queries, arXiv:2305.13245).
  q_positions, q_segment_ids: int [B, T].  k_positions, k_segment_ids: int [B, S].

  Query t sees key s if and only if q_segment == k_segment and q_position >= k_position and
  (window is None or q_position - k_position < window).  Segment 0 is padding, which sees padding.
  A query that sees no key gets a finite result without meaning.  Softmax is float32 whatever q is.

  soft_cap: logits become soft_cap * tanh(logits / soft_cap) before the mask (Gemma 2,
  arXiv:2408.00118, section 2).  scale: of the logits, H**-0.5 by default.
  implementation: a name of IMPLEMENTATIONS, or several, of which the first that can do it is taken.
  aligned: promises that the keys are those of the queries themselves (T == S), that segments are
  contiguous and that positions rise strictly within each; blocks that no query sees are then left
  out.  False, as against a cache, promises nothing.
  Raises ValueError on an unknown implementation or one that cannot do it, heads that do not divide, or
  aligned with T != S.
  """
  batch, length, heads, head_dim = q.shape
  kv_heads = k.shape[2]
  if heads % kv_heads:
    raise ValueError(f'{heads} query heads are no multiple of {kv_heads} key/value heads')
  if aligned and length != k.shape[1]:
    raise ValueError(f'aligned attention needs as many keys as queries: {k.shape[1]} != {length}')
  options = (window, soft_cap, head_dim**-0.5 if scale is None else scale, aligned)
  q = q.reshape(batch, length, kv_heads, heads // kv_heads, head_dim).transpose(0, 2, 3, 1, 4)
  # Marked as the kernel takes them: rematerialization that keeps them repeats no transpose either.
  q, k, v = (checkpoint_name(x, name) for x, name in (
      (q, 'query'), (k.swapaxes(1, 2), 'key'), (v.swapaxes(1, 2), 'value')))
  out = IMPLEMENTATIONS[choose(implementation, q, k, options)](
      options, q, k, v, (q_segment_ids, q_positions), (k_segment_ids, k_positions))
  return out.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, head_dim)


def choose(implementation, q, k, options):
  """Returns the first of the named implementations that can do it.  q: [B, K, G, T, H].  k: [B, K, S, H].

  Raises ValueError where one is unknown or none can.
  """
  names = (implementation,) if isinstance(implementation, str) else implementation
  found = {}
  for name in names:
    if name not in IMPLEMENTATIONS:
      raise ValueError(f'attention implementation {name!r} is not known; write one of '
                       f'{", ".join(IMPLEMENTATIONS)}')
    found[name] = PROBLEMS[name](q, k, options) if name in PROBLEMS else None
    if found[name] is None:
      return name
  reasons = '; '.join(f'{name} attention {reason}' for name, reason in found.items())
  raise ValueError(f'{reasons}; write blockwise, or auto for what the platform has')


def plain(implementation):
  """Returns those of the named implementations that are plain XLA, as a tuple."""
  names = (implementation,) if isinstance(implementation, str) else implementation
  return tuple(name for name in names if name not in PROBLEMS)
