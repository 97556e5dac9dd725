"""Expert parallelism: each device of the mesh axis `expert` holds some experts."""

import functools
import math

import jax
from jax.sharding import PartitionSpec

from llmjax.ops import moe
from llmjax.parallel.sharding import auto_axes, axes_of, mesh_size


def dropless(x, weights, ids, gate, up, down, activation):
  """Returns each token's weighted sum over its experts, [B, T, D]; see `ops.moe.dropless`.

  x: [B, T, D].  weights, ids: [B, T, k].  gate, up: [E, D, F].  down: [E, F, D].
  The devices that share experts gather their tokens, each computes what its own experts (and its own
  columns of them) add, and the sums are scattered back.
  """
  def local(x, weights, ids, gate, up, down, first=0):
    flat = lambda a: a.reshape(-1, a.shape[-1])
    return moe.dropless(flat(x), flat(weights), flat(ids), gate, up, down, activation,
                        first).reshape(x.shape)

  free = auto_axes()
  # Rows that the mesh cannot share, such as the one that initialisation traces with, are left to XLA.
  shards = [math.prod(mesh_size(a) for a in axes_of(name) if a in free) for name in ('batch', 'length')]
  if not free or x.shape[0] % shards[0] or x.shape[1] % shards[1]:
    return local(x, weights, ids, gate, up, down)

  def divided(x, weights, ids, gate, up, down):
    summed = [a for a in axes_of('mlp') if a in free]
    if 'expert' not in free:
      y = local(x, weights, ids, gate, up, down)
    else:
      gather = functools.partial(jax.lax.all_gather, axis_name='expert', axis=0, tiled=True)
      first = jax.lax.axis_index('expert') * gate.shape[0]
      y = local(gather(x), gather(weights), gather(ids), gate, up, down, first)
      y = jax.lax.psum_scatter(y, 'expert', scatter_dimension=0, tiled=True)
    return jax.lax.psum(y, summed) if summed else y

  only = lambda name: tuple(a for a in axes_of(name) if a in free) or None
  rows = PartitionSpec(only('batch'), only('length'))
  wide, back = PartitionSpec(only('experts'), None, only('mlp')), PartitionSpec(only('experts'), only('mlp'))
  return jax.shard_map(divided, in_specs=(rows, rows, rows, wide, wide, back), out_specs=rows,
                       axis_names=set(free), check_vma=False)(x, weights, ids, gate, up, down)
