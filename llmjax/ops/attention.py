"""Multi-head attention over packed sequences; the table of its implementations."""

import functools

from jax.ad_checkpoint import checkpoint_name

from llmjax.ops import kernels
from llmjax.ops.blockwise import Options, blockwise_attention, reference_attention

# Functions (options, q, k, v, mask, bias) in the letters of ops/blockwise.py.
IMPLEMENTATIONS = {
    'reference': reference_attention,
    'blockwise': blockwise_attention,
    'splash': kernels.splash_attention,
    'splash_emulated': functools.partial(kernels.splash_attention, emulate=True),
    'cudnn': kernels.cudnn_attention,
    'cudnn_emulated': functools.partial(kernels.cudnn_attention, emulate=True),
}

# Functions that return why a kernel does not support the arguments.  The others are plain XLA: they support every mask
# on every platform, and XLA partitions them over a mesh.
PROBLEMS = {
    'splash': functools.partial(kernels.kernel_problem, 'splash'),
    'splash_emulated': functools.partial(kernels.kernel_problem, 'splash'),
    'cudnn': functools.partial(kernels.kernel_problem, 'cudnn'),
    'cudnn_emulated': functools.partial(kernels.kernel_problem, 'cudnn'),
}


def attention(q, k, v, mask, *, bias=None, soft_cap=None, scale=None, implementation='blockwise'):
  """Compute softmax(scale * q k^T + bias) v over the visible keys, [B, T, N, H] in v's dtype.

  q: [B, T, N, H].  k, v: [B, S, K, H] with N a multiple of K (grouped queries, arXiv:2305.13245).  mask: a Mask.
  The softmax is float32 in every dtype.  A query without a visible key gets a finite, meaningless result.

  bias: a `relative.RelativeBias`, added to the scaled logits, or None.
  soft_cap: logits become soft_cap * tanh(logits / soft_cap) before the mask (Gemma 2, arXiv:2408.00118, section 2).
  scale: factor on the logits, H**-0.5 by default.  implementation: a name of IMPLEMENTATIONS, or several, of which the
  first that supports the arguments runs.
  Raises ValueError for an unknown implementation, for arguments that none supports, for heads that do not divide, and
  for an aligned mask with T != S.
  """
  batch, length, heads, head_dim = q.shape
  kv_heads = k.shape[2]
  if heads % kv_heads:
    raise ValueError(f'{heads} query heads are no multiple of {kv_heads} key/value heads')
  if mask.aligned and length != k.shape[1]:
    raise ValueError(f'aligned attention needs as many keys as queries: {k.shape[1]} != {length}')
  options = Options(soft_cap, head_dim**-0.5 if scale is None else scale)
  q = q.reshape(batch, length, kv_heads, heads // kv_heads, head_dim).transpose(0, 2, 3, 1, 4)
  # Named in the layout of the kernel: rematerialization that saves them does not repeat the transposes.
  q, k, v = (checkpoint_name(x, name) for x, name in (
      (q, 'query'), (k.swapaxes(1, 2), 'key'), (v.swapaxes(1, 2), 'value')))
  out = IMPLEMENTATIONS[choose(implementation, q, k, mask, options, bias)](options, q, k, v, mask, bias)
  return out.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, head_dim)


def choose(implementation, q, k, mask, options, bias=None):
  """Return the first of the named implementations that supports the arguments.  q: [B, K, G, T, H].  k: [B, K, S, H].

  Raises ValueError if one is unknown or none supports them.
  """
  names = (implementation,) if isinstance(implementation, str) else implementation
  problems = {}
  for name in names:
    if name not in IMPLEMENTATIONS:
      raise ValueError(f'attention implementation {name!r} is not known; write one of '
                       f'{", ".join(IMPLEMENTATIONS)}')
    problems[name] = PROBLEMS[name](q, k, mask, options, bias) if name in PROBLEMS else None
    if problems[name] is None:
      return name
  reasons = '; '.join(f'{name} attention {reason}' for name, reason in problems.items())
  raise ValueError(f'{reasons}; write blockwise, or auto for what the platform has')


def plain(implementation):
  """Return the plain XLA implementations among the named ones, as a tuple."""
  names = (implementation,) if isinstance(implementation, str) else implementation
  return tuple(name for name in names if name not in PROBLEMS)
