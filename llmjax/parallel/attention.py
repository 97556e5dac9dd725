"""Attention on a mesh: each device attends with its own rows and heads, also where a row lies over several.

XLA cannot divide kernels, and what it divides by itself it moves to and fro.  Rows lie over the batch axes
and heads over `tensor`: neither needs communication.  Along the axis `context` a row itself is divided.
`gather` brings all keys and values to every device.  `ring` (arXiv:2310.01889) hands them round, so that
no device ever holds more than two devices' share.

Causal rows cut into n equal parts leave the first device with 1 / (2 n - 1) of the work of the last.  So
for the ring, tokens lie in zigzag order: of 2 n chunks, device i holds chunks i (low) and 2 n - 1 - i
(high).  What device j < i holds is then for i's queries: its low chunk visible to both of them, its high
chunk to neither; of j > i, both chunks visible to the high queries and neither to the low ones.  Every
device computes 2 of the 4 squares of chunks in every turn, and the whole is half of the full square.
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
  """Return `ops.attention.attention` of the same arguments, on the mesh that is set.

  zigzag: the tokens of every sequence are in `zigzag_order`; ring attention runs, in plain XLA whatever the
  implementation.  Otherwise tokens are in order, and where `context` is larger than 1, aligned masks gather their keys.
  Raises ValueError where `implementation` names nothing that supports the arguments.
  """
  mesh = jax.sharding.get_abstract_mesh()
  free = auto_axes(mesh)
  along = AXIS in free and mask.aligned and q.shape[1] % mesh.shape[AXIS] == 0
  if zigzag and not along:
    raise ValueError('sequences in zigzag order must be whole and sharded over the mesh axis context')
  if zigzag and (not mask.causal or mask.k_prefix is not None):
    raise ValueError('ring attention is causal; for other masks write train.context_attention=gather')
  if zigzag and bias is not None:
    raise ValueError('ring attention has no relative position bias; write train.context_attention=gather')
  plain = table.plain(implementation)
  if along and not plain:
    raise ValueError(f'{implementation} attention works on whole sequences; with mesh.context above 1 write '
                     'attention=auto or blockwise')
  if not free:
    return table.attention(q, k, v, mask, bias=bias, implementation=implementation, **options)

  # All axes that are not handled yet, those of size 1 among them: a TPU kernel lowers only where none is
  # left, and what is not named in a spec would be summed over.
  names = [a for a in mesh.axis_names if a not in mesh.manual_axes]
  k, v, heads = _divide_heads(q, k, v, [a for a in axes_of('act_heads') if a in names])
  rows = tuple(a for a in axes_of('batch') if a in names)
  if q.shape[0] % math.prod(mesh.shape[a] for a in rows):
    rows = ()  # Too few sequences to shard; every device computes all of them.
  length = AXIS if along or (AXIS in names and AXIS not in free) else None
  tensor, flat = PartitionSpec(rows or None, length, heads), PartitionSpec(rows or None, length)
  if zigzag:
    local = lambda q, k, v, mask, bias: _ring(q, k, v, mask, **options)
  elif along:
    local = functools.partial(_gather, implementation=plain, **options)
  else:
    local = lambda q, k, v, mask, bias: table.attention(
        q, k, v, mask, bias=bias, implementation=implementation, **options)
  return jax.shard_map(local, in_specs=(tensor, tensor, tensor, flat, PartitionSpec(heads)), out_specs=tensor,
                       axis_names=set(names), check_vma=False)(q, k, v, mask, bias)


def _divide_heads(q, k, v, axes):
  """Return (k, v, the mesh axis that heads lie over, or None).

  Fewer key/value heads than devices are repeated, as few times as the devices need; their gradients are
  added up again.  Query heads that cannot be shared are whole on every device.
  """
  shards = math.prod(mesh_size(a) for a in axes)
  heads, kv_heads = q.shape[2], k.shape[2]
  if heads % shards:
    return k, v, None
  wanted = math.lcm(kv_heads, shards)
  wanted = wanted if heads % wanted == 0 else heads
  if wanted != kv_heads:
    k, v = (jnp.repeat(a, wanted // kv_heads, axis=2) for a in (k, v))
  return k, v, tuple(axes) or None


def _gather(q, k, v, mask, bias, *, implementation, **options):
  """The local queries against the keys of all devices.  Half of what is computed is masked."""
  gather = functools.partial(jax.lax.all_gather, axis_name=AXIS, axis=1, tiled=True)
  prefix = None if mask.k_prefix is None else gather(mask.k_prefix)
  mask = mask.replace(k_positions=gather(mask.k_positions), k_segment_ids=gather(mask.k_segment_ids), k_prefix=prefix,
                      aligned=False)
  return table.attention(q, gather(k), gather(v), mask, bias=bias, implementation=implementation, **options)


def zigzag_order(length, parts=None):
  """Return the places int [T] in a row of the tokens that lie on one device after the other.

  Of 2 n chunks device i has i and 2 n - 1 - i.  parts: n, by default the mesh's.  Raises ConfigError where
  the length does not divide.
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
  """Return a [B, T, ...] with its tokens in zigzag order."""
  return a[:, zigzag_order(a.shape[1])]


def from_zigzag(a):
  """Undo `to_zigzag`."""
  return a[:, np.argsort(zigzag_order(a.shape[1]))]


def zigzag_batch(batch):
  """Return a batch whose rows lie in zigzag order; losses, sums over tokens, do not see it."""
  return {name: constrain(to_zigzag(a), 'batch', 'length') if a.ndim > 1 else a for name, a in batch.items()}


def _ring(q, k, v, mask, *, soft_cap=None, scale=None):
  """Ring attention of this device's tokens, in zigzag order.  Shapes as in `ops.attention.attention`."""
  batch, length, heads, head_dim = q.shape
  kv_heads = k.shape[2]
  options = blockwise.Options(soft_cap, head_dim**-0.5 if scale is None else scale)
  q = q.reshape(batch, length, kv_heads, heads // kv_heads, head_dim).transpose(0, 2, 3, 1, 4)
  out = ring(options, q, k.swapaxes(1, 2), v.swapaxes(1, 2), mask)
  return out.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, head_dim)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def ring(options, q, k, v, mask):
  """Return attention of this device's tokens over the whole sequence; inside a shard_map over `context`.

  options: a blockwise.Options.  q: [B, K, G, T, H], k, v: [B, K, T, H], in zigzag order, T tokens on each device.
  mask: of these tokens among themselves.  The backward pass goes round as well: the gradients of keys and values
  travel with them, float32, and arrive home with the last turn.
  """
  return _ring_fwd(options, q, k, v, mask)[0]


def _ring_fwd(options, q, k, v, mask):
  result = blockwise.forward(options, q, k, v, mask)
  held, place = (k, v, (mask.k_segment_ids, mask.k_positions)), 0
  for turn in _turns(mask.window, q.shape[3] // 2):
    held, place = _hand_on(held, turn - place), turn
    result = _merge_queries(turn, result, blockwise.forward(options, *_visible(turn, q, held, mask)))
  out, log_sum = (checkpoint_name(a, 'attention') for a in (result[0].astype(v.dtype), result[1]))
  return out, (q, k, v, mask, out, log_sum)


def _ring_bwd(options, residuals, d_out):
  q, k, v, mask, out, log_sum = residuals
  delta = blockwise.row_sums(out, d_out)
  d_q, *d_held, _ = blockwise.backward(options, q, k, v, mask, log_sum, delta, d_out)
  held, place = (k, v, (mask.k_segment_ids, mask.k_positions)), 0
  for turn in _turns(mask.window, q.shape[3] // 2):
    (held, d_held), place = _hand_on((held, d_held), turn - place), turn
    of_queries = [_queries(turn, a, 3) for a in (log_sum, delta, d_out)]
    more_q, *more, _ = blockwise.backward(options, *_visible(turn, q, held, mask), *of_queries)
    d_q = d_q + _spread(turn, more_q, 3, first_low=False)
    d_held = [a + _spread(turn, d, 2, first_low=True) for a, d in zip(d_held, more, strict=True)]
  d_k, d_v = _hand_on(d_held, -place)
  return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), None


ring.defvjp(_ring_fwd, _ring_bwd)


def _turns(window, chunk):
  """Return the turns in which a device sees something: after turn r it holds what r devices before it had.

  The nearest chunks of two devices r apart are min(r, n - r) chunks apart; turns whose keys are out of
  every query's window are left out.
  """
  n = mesh_size(AXIS)
  nearest = lambda turn: (min(turn, n - turn) - 1) * chunk + 1
  return [turn for turn in range(1, n) if window is None or nearest(turn) < window]


def _hand_on(tree, by):
  """Send arrays to the device `by` further on, in a ring."""
  n = mesh_size(AXIS)
  if by % n == 0:
    return tree
  return jax.tree.map(lambda a: jax.lax.ppermute(a, AXIS, [(i, (i + by) % n) for i in range(n)]), tree)


def _from_before(turn):
  """Return whether what is held in this turn comes from a device with a lower number."""
  return jax.lax.axis_index(AXIS) >= turn


def _queries(turn, a, axis):
  """Return the query halves of the two squares to compute, side by side along the batch.

  The high half, and that half which sees the same half of the keys: low if they come from before.
  """
  low, high = jnp.split(a, 2, axis)
  return jnp.concatenate([high, jnp.where(_from_before(turn), low, high)])


def _keys(turn, a, axis):
  """Return the key halves of the two squares: the low one, and that which `_queries` has second."""
  low, high = jnp.split(a, 2, axis)
  return jnp.concatenate([low, jnp.where(_from_before(turn), low, high)])


def _visible(turn, q, held, mask):
  """Return (q, k, v, mask) of the two squares of this turn, as a batch twice as large."""
  k, v, (segment_ids, positions) = held
  queries = functools.partial(_queries, turn, axis=1)
  keys = functools.partial(_keys, turn, axis=1)
  mask = mask.replace(q_positions=queries(mask.q_positions), q_segment_ids=queries(mask.q_segment_ids),
                      k_positions=keys(positions), k_segment_ids=keys(segment_ids), aligned=False)
  return _queries(turn, q, 3), _keys(turn, k, 2), _keys(turn, v, 2), mask


def _spread(turn, a, axis, first_low):
  """Undo `_keys` (first_low) or `_queries` as a sum: returns what the two squares add to both halves."""
  first, second = jnp.split(a, 2)
  early = _from_before(turn)
  low, high = jnp.where(early, second, 0), jnp.where(early, 0, second)
  low, high = (low + first, high) if first_low else (low, high + first)
  return jnp.concatenate([low, high], axis)


def _merge_queries(turn, result, found):
  """Return `blockwise.forward` over the keys so far and those of this turn."""
  (low, high), (first, second) = (
      list(zip(*(jnp.split(a, 2, axis) for a in pair), strict=True)) for pair, axis in ((result, 3), (found, 0)))
  early = _from_before(turn)
  pick = lambda one, other: tuple(jnp.where(early, a, b) for a, b in zip(one, other, strict=True))
  high = blockwise.merge(high, first)
  merged = blockwise.merge(pick(low, high), second)
  return tuple(jnp.concatenate(halves, 3) for halves in zip(
      pick(merged, low), pick(high, merged), strict=True))
