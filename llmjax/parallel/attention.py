"""Attention on a mesh: sharded over sequences and heads, and over the sequence length (context parallelism).

XLA cannot partition kernels, and partitions plain attention with needless communication.  Sequences are sharded over
the batch axes and heads over `tensor`, without communication.  Along the axis `context` the length is sharded: `gather`
all-gathers keys and values; ring attention (arXiv:2310.01889) passes them around a ring, so that no device holds more
than two devices' share.

With n contiguous shards of a causal sequence, the first device would have 1 / (2 n - 1) of the work of the last.  So
ring attention uses zigzag order: of 2 n chunks, device i holds chunks i (low) and 2 n - 1 - i (high).  Of the keys of
device j < i, the low chunk is visible to both chunks of queries of i, and the high one to neither; of j > i, both are
visible to the high queries and neither to the low ones.  Every device computes 2 of the 4 squares of chunks in every
step of the ring, half of the full square in total.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from llmjax.config import ConfigError
from llmjax.ops import attention as table
from llmjax.ops import blockwise
from llmjax.parallel.sharding import auto_axes, axes_of, constrain, mesh_size

AXIS = 'context'


def attention(q, k, v, mask, *, bias=None, implementation='blockwise', zigzag=False, **options):
  """Compute `ops.attention.attention` of the same arguments, on the mesh that is set.

  zigzag: the tokens of every sequence are in `zigzag_order`; ring attention runs, in plain XLA regardless of the
  implementation.  Otherwise tokens are in order, and with `context` above 1, aligned masks gather their keys.
  Raises ValueError if no named implementation supports the arguments.
  """
  mesh = jax.sharding.get_abstract_mesh()
  free = auto_axes(mesh)
  is_length_sharded = AXIS in free and mask.aligned and q.shape[1] % mesh.shape[AXIS] == 0
  if zigzag and not is_length_sharded:
    raise ValueError('sequences in zigzag order must be whole and sharded over the mesh axis context')
  if zigzag and (not mask.causal or mask.k_prefix is not None):
    raise ValueError('ring attention is causal; for other masks write train.context_attention=gather')
  if zigzag and bias is not None:
    raise ValueError('ring attention has no relative position bias; write train.context_attention=gather')
  plain = table.plain(implementation)
  if is_length_sharded and not plain:
    raise ValueError(f'{implementation} attention works on whole sequences; with mesh.context above 1 write '
                     'attention=auto or blockwise')
  if not free:
    return table.attention(q, k, v, mask, bias=bias, implementation=implementation, **options)

  # All auto axes, those of size 1 included: a TPU kernel lowers only if none is left, and gradients are summed over
  # axes that no spec names.
  names = [a for a in mesh.axis_names if a not in mesh.manual_axes]
  k, v, heads = _shard_heads(q, k, v, [a for a in axes_of('act_heads') if a in names])
  rows = tuple(a for a in axes_of('batch') if a in names)
  if q.shape[0] % math.prod(mesh.shape[a] for a in rows):
    rows = ()  # The mesh does not divide the batch: every device computes all of it.
  length = AXIS if is_length_sharded or (AXIS in names and AXIS not in free) else None
  tensor, flat = PartitionSpec(rows or None, length, heads), PartitionSpec(rows or None, length)
  if zigzag:
    local = lambda q, k, v, mask, bias: _ring(q, k, v, mask, **options)
  elif is_length_sharded:
    local = functools.partial(_gather, implementation=plain, **options)
  else:
    local = lambda q, k, v, mask, bias: table.attention(
        q, k, v, mask, bias=bias, implementation=implementation, **options)
  return jax.shard_map(local, in_specs=(tensor, tensor, tensor, flat, PartitionSpec(heads)), out_specs=tensor,
                       axis_names=set(names), check_vma=False)(q, k, v, mask, bias)


def _shard_heads(q, k, v, axes):
  """Return (k, v, the mesh axes of the heads, or None).

  Fewer key/value heads than devices are repeated as often as needed; their gradients are summed.  Query heads that the
  mesh does not divide are replicated.
  """
  shards = math.prod(mesh_size(a) for a in axes)
  heads, kv_heads = q.shape[2], k.shape[2]
  if heads % shards:
    return k, v, None
  repeated = math.lcm(kv_heads, shards)
  repeated = repeated if heads % repeated == 0 else heads
  if repeated != kv_heads:
    k, v = (jnp.repeat(a, repeated // kv_heads, axis=2) for a in (k, v))
  return k, v, tuple(axes) or None


def _gather(q, k, v, mask, bias, *, implementation, **options):
  """Compute attention of the local queries to the keys of all devices.  Half of the logits are masked."""
  gather = functools.partial(jax.lax.all_gather, axis_name=AXIS, axis=1, tiled=True)
  prefix = None if mask.k_prefix is None else gather(mask.k_prefix)
  mask = mask.replace(k_positions=gather(mask.k_positions), k_segment_ids=gather(mask.k_segment_ids), k_prefix=prefix,
                      aligned=False)
  return table.attention(q, gather(k), gather(v), mask, bias=bias, implementation=implementation, **options)


def zigzag_order(length, parts=None):
  """Return the index int [T] in the sequence of each token in zigzag order.

  Of 2 n chunks device i has i and 2 n - 1 - i.  parts: n, by default that of the mesh.  Raises ConfigError if 2 n does
  not divide the length.
  """
  parts = mesh_size(AXIS) if parts is None else parts
  if length % (2 * parts):
    below = length // (2 * parts) * 2 * parts
    raise ConfigError([f'data.seq_len={length} must be a multiple of 2 x mesh.context = {2 * parts} for ring '
                       f'attention; write {below or 2 * parts} or {below + 2 * parts}, or '
                       'train.context_attention=gather'])
  chunks = np.arange(length).reshape(2 * parts, -1)
  return chunks[[c for i in range(parts) for c in (i, 2 * parts - 1 - i)]].reshape(-1)


def to_zigzag(a):
  """Put the tokens of a [B, T, ...] into zigzag order."""
  return a[:, zigzag_order(a.shape[1])]


def from_zigzag(a):
  """Undo `to_zigzag`."""
  return a[:, np.argsort(zigzag_order(a.shape[1]))]


def zigzag_batch(batch):
  """Put the tokens of a batch into zigzag order; losses, which are sums over tokens, do not change."""
  return {name: constrain(to_zigzag(a), 'batch', 'length') if a.ndim > 1 else a for name, a in batch.items()}


def _ring(q, k, v, mask, *, soft_cap=None, scale=None):
  """Compute ring attention of this device's tokens, in zigzag order.  Shapes as in `ops.attention.attention`."""
  batch, length, heads, head_dim = q.shape
  kv_heads = k.shape[2]
  options = blockwise.Options(soft_cap, head_dim**-0.5 if scale is None else scale)
  q = q.reshape(batch, length, kv_heads, heads // kv_heads, head_dim).transpose(0, 2, 3, 1, 4)
  out = ring(options, q, k.swapaxes(1, 2), v.swapaxes(1, 2), mask)
  return out.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, head_dim)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def ring(options, q, k, v, mask):
  """Compute attention of this device's tokens over the whole sequence, inside a shard_map over `context`.

  options: a blockwise.Options.  q: [B, K, G, T, H], k, v: [B, K, T, H], in zigzag order, T tokens per device.  mask: of
  these tokens among themselves.  In the backward pass the float32 gradients of keys and values travel around the ring
  with them, and return to their device in the last step.
  """
  return _ring_fwd(options, q, k, v, mask)[0]


def _ring_fwd(options, q, k, v, mask):
  result = blockwise.forward(options, q, k, v, mask)
  held, shift = (k, v, (mask.k_segment_ids, mask.k_positions)), 0
  for step in _steps(mask.window, q.shape[3] // 2):
    held, shift = _rotate(held, step - shift), step
    result = _merge_queries(step, result, blockwise.forward(options, *_visible(step, q, held, mask)))
  out, log_sum = (checkpoint_name(a, 'attention') for a in (result[0].astype(v.dtype), result[1]))
  return out, (q, k, v, mask, out, log_sum)


def _ring_bwd(options, residuals, d_out):
  q, k, v, mask, out, log_sum = residuals
  delta = blockwise.row_sums(out, d_out)
  d_q, *d_held, _ = blockwise.backward(options, q, k, v, mask, log_sum, delta, d_out)
  held, shift = (k, v, (mask.k_segment_ids, mask.k_positions)), 0
  for step in _steps(mask.window, q.shape[3] // 2):
    (held, d_held), shift = _rotate((held, d_held), step - shift), step
    of_queries = [_queries(step, a, 3) for a in (log_sum, delta, d_out)]
    step_d_q, *step_d_held, _ = blockwise.backward(options, *_visible(step, q, held, mask), *of_queries)
    d_q = d_q + _unselect(step, step_d_q, 3, first_low=False)
    d_held = [a + _unselect(step, d, 2, first_low=True) for a, d in zip(d_held, step_d_held, strict=True)]
  d_k, d_v = _rotate(d_held, -shift)
  return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), None


ring.defvjp(_ring_fwd, _ring_bwd)


def _steps(window, chunk):
  """Return the steps of the ring with visible keys; in step r a device holds the keys of the r-th device before it.

  The nearest chunks of two devices at distance r in the ring are min(r, n - r) chunks apart; steps whose keys are
  outside every query's window are left out.
  """
  n = mesh_size(AXIS)
  nearest = lambda step: (min(step, n - step) - 1) * chunk + 1
  return [step for step in range(1, n) if window is None or nearest(step) < window]


def _rotate(tree, by):
  """Send arrays to the `by`-th next device of the ring."""
  n = mesh_size(AXIS)
  if by % n == 0:
    return tree
  return jax.tree.map(lambda a: jax.lax.ppermute(a, AXIS, [(i, (i + by) % n) for i in range(n)]), tree)


def _from_before(step):
  """Return whether the keys held in this step come from a device with a lower index."""
  return jax.lax.axis_index(AXIS) >= step


def _queries(step, a, axis):
  """Return the query chunks of the two visible squares, concatenated along the batch.

  The high chunk, and the low one if the keys come from before, else the high one again.
  """
  low, high = jnp.split(a, 2, axis)
  return jnp.concatenate([high, jnp.where(_from_before(step), low, high)])


def _keys(step, a, axis):
  """Return the key chunks of the two visible squares: the low one, and the high one unless they come from before."""
  low, high = jnp.split(a, 2, axis)
  return jnp.concatenate([low, jnp.where(_from_before(step), low, high)])


def _visible(step, q, held, mask):
  """Return (q, k, v, mask) of the two visible squares of this step, as a batch of twice the size."""
  k, v, (segment_ids, positions) = held
  queries = functools.partial(_queries, step, axis=1)
  keys = functools.partial(_keys, step, axis=1)
  mask = mask.replace(q_positions=queries(mask.q_positions), q_segment_ids=queries(mask.q_segment_ids),
                      k_positions=keys(positions), k_segment_ids=keys(segment_ids), aligned=False)
  return _queries(step, q, 3), _keys(step, k, 2), _keys(step, v, 2), mask


def _unselect(step, a, axis, first_low):
  """Sum the gradients of the two squares for both chunks: the transpose of `_keys` (first_low) or `_queries`."""
  first, second = jnp.split(a, 2)
  is_before = _from_before(step)
  low, high = jnp.where(is_before, second, 0), jnp.where(is_before, 0, second)
  low, high = (low + first, high) if first_low else (low, high + first)
  return jnp.concatenate([low, high], axis)


def _merge_queries(step, result, step_result):
  """Merge the results of `blockwise.forward` over the earlier keys and those of this step."""
  (low, high), (first, second) = (
      list(zip(*(jnp.split(a, 2, axis) for a in pair), strict=True)) for pair, axis in ((result, 3), (step_result, 0)))
  is_before = _from_before(step)
  pick = lambda one, other: tuple(jnp.where(is_before, a, b) for a, b in zip(one, other, strict=True))
  high = blockwise.merge(high, first)
  merged = blockwise.merge(pick(low, high), second)
  return tuple(jnp.concatenate(halves, 3) for halves in zip(
      pick(merged, low), pick(high, merged), strict=True))
