"""Multi-head attention over packed batches; one table of implementations."""

import functools

from jax.ad_checkpoint import checkpoint_name

from llmjax.ops import kernels
from llmjax.ops.blockwise import Options, blockwise_attention, reference_attention

# Functions (options, q, k, v, mask) in the letters of ops/blockwise.py.
IMPLEMENTATIONS = {
    'reference': reference_attention,
    'blockwise': blockwise_attention,
    'splash': kernels.splash_attention,
    'splash_emulated': functools.partial(kernels.splash_attention, emulate=True),
    'cudnn': kernels.cudnn_attention,
    'cudnn_emulated': functools.partial(kernels.cudnn_attention, emulate=True),
}

# What a kernel does not support.  Those that are not listed are plain XLA: they support every mask on every platform,
# and XLA partitions them over a mesh.
PROBLEMS = {
    'splash': functools.partial(kernels.kernel_problem, 'splash'),
    'splash_emulated': functools.partial(kernels.kernel_problem, 'splash'),
    'cudnn': functools.partial(kernels.kernel_problem, 'cudnn'),
    'cudnn_emulated': functools.partial(kernels.kernel_problem, 'cudnn'),
}


def attention(q, k, v, mask, *, soft_cap=None, scale=None, implementation='blockwise'):
  """Returns softmax(scale * q k^T) v over the visible keys, [B, T, N, H] in v's dtype.

  q: [B, T, N, H].  k, v: [B, S, K, H] with N a multiple of K (grouped queries, arXiv:2305.13245).  mask: a Mask.
  A query that sees no key gets a finite result without meaning.  Softmax is float32 whatever q is.

  soft_cap: logits become soft_cap * tanh(logits / soft_cap) before the mask (Gemma 2, arXiv:2408.00118, section 2).
  scale: of the logits, H**-0.5 by default.  implementation: a name of IMPLEMENTATIONS, or several, of which the first
  that supports the arguments runs.
  Raises ValueError on an unknown implementation, where none supports the arguments, heads that do not divide, or an
  aligned mask with T != S.
  """
  batch, length, heads, head_dim = q.shape
  kv_heads = k.shape[2]
  if heads % kv_heads:
    raise ValueError(f'{heads} query heads are no multiple of {kv_heads} key/value heads')
  if mask.aligned and length != k.shape[1]:
    raise ValueError(f'aligned attention needs as many keys as queries: {k.shape[1]} != {length}')
  options = Options(soft_cap, head_dim**-0.5 if scale is None else scale)
  q = q.reshape(batch, length, kv_heads, heads // kv_heads, head_dim).transpose(0, 2, 3, 1, 4)
  # Marked as the kernel takes them: rematerialization that keeps them repeats no transpose either.
  q, k, v = (checkpoint_name(x, name) for x, name in (
      (q, 'query'), (k.swapaxes(1, 2), 'key'), (v.swapaxes(1, 2), 'value')))
  out = IMPLEMENTATIONS[choose(implementation, q, k, mask, options)](options, q, k, v, mask)
  return out.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, head_dim)


def choose(implementation, q, k, mask, options):
  """Returns the first of the named implementations that supports the arguments.  q: [B, K, G, T, H].  k: [B, K, S, H].

  Raises ValueError where one is unknown or none does.
  """
  names = (implementation,) if isinstance(implementation, str) else implementation
  found = {}
  for name in names:
    if name not in IMPLEMENTATIONS:
      raise ValueError(f'attention implementation {name!r} is not known; write one of '
                       f'{", ".join(IMPLEMENTATIONS)}')
    found[name] = PROBLEMS[name](q, k, mask, options) if name in PROBLEMS else None
    if found[name] is None:
      return name
  reasons = '; '.join(f'{name} attention {reason}' for name, reason in found.items())
  raise ValueError(f'{reasons}; write blockwise, or auto for what the platform has')


def plain(implementation):
  """Returns those of the named implementations that are plain XLA, as a tuple."""
  names = (implementation,) if isinstance(implementation, str) else implementation
  return tuple(name for name in names if name not in PROBLEMS)
