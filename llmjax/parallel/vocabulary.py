"""Embedding lookup in a table that is sharded over the mesh axis `tensor`."""

import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from llmjax.parallel.sharding import auto_axes, constrain, mesh_size, row_layout

AXIS = 'tensor'


def lookup(table, tokens):
  """Look up int tokens [B, T] in a table [V, D]; return [B, T, D].

  Each device looks up the tokens of its shard of the vocabulary, and a sum over devices combines them
  (arXiv:1909.08053, section 3).  The result is sharded along the length, as between blocks.  XLA alone would gather the
  whole table on every device.
  """
  table = constrain(table, 'vocab', None)
  if AXIS not in auto_axes():
    return jnp.take(table, tokens, axis=0)
  axes, (batch, length) = row_layout(tokens.shape)
  along = (*(length or ()), AXIS)
  scatter = tokens.shape[1] % math.prod(map(mesh_size, along)) == 0  # Not a decoding step of one token.

  def local(table, tokens):
    ids = tokens - jax.lax.axis_index(AXIS) * table.shape[0]
    here = (ids >= 0) & (ids < table.shape[0])
    x = jnp.where(here[..., None], jnp.take(table, jnp.where(here, ids, 0), axis=0), 0)
    return jax.lax.psum_scatter(x, AXIS, scatter_dimension=1, tiled=True) if scatter else jax.lax.psum(x, AXIS)

  return jax.shard_map(
      local, in_specs=(PartitionSpec(AXIS), PartitionSpec(batch, length)), axis_names={AXIS, *axes},
      out_specs=PartitionSpec(batch, along if scatter else length), check_vma=False)(table, tokens)
