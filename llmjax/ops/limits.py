"""Limits of the attention kernels of TPU and GPU.  No JAX here."""

NO_BIAS = 'has no relative position bias'
LANES = 128  # Lanes of a TPU's vector registers; the blocks of splash attention are multiples of it.


def splash_limit(length, head_dim, soft_cap, dtype):
  """Return why TPU splash attention does not support these sequences, as a predicate (`needs ...`), or None."""
  del soft_cap, dtype
  if length % LANES:
    return f'needs a length that is a multiple of {LANES}, not {length}'
  if head_dim % 64:
    return f'needs a head_dim that is a multiple of 64, not {head_dim}'
  return None


def cudnn_limit(length, head_dim, soft_cap, dtype):
  """Return why cuDNN does not support them.  soft_cap: of the logits; None or 0: none.  dtype: of queries, by name."""
  if soft_cap:
    return 'has no soft cap on logits'
  if dtype not in ('bfloat16', 'float16'):
    return f'needs bfloat16 or float16, not {dtype}'
  if head_dim % 8 or head_dim > 128:
    return f'needs a head_dim that is a multiple of 8, at most 128, not {head_dim}'
  if length % 2:
    return f'needs an even length, not {length}'
  return None


LIMITS = {'splash': splash_limit, 'cudnn': cudnn_limit}
