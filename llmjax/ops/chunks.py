"""Chunks of sequences, so that the logits of a whole batch never exist.

Letters: B batch, T query length, D model, V vocab, C tokens of a sequence in one chunk.  A scan over the chunks keeps
the logits of one chunk in memory, whatever XLA's scheduler prefers.
"""

import jax
import jax.numpy as jnp

# Logits of one chunk: 134 MB of float32.  On x86, 512 to 4096 tokens per chunk take the same time.
CHUNK_LOGITS = 1 << 25


def count_chunks(shape, vocab_size, chunk=None, chunk_logits=CHUNK_LOGITS):
  """Return the number of chunks of a batch.

  shape: (B, T).  chunk: tokens of each sequence per chunk; None: as many as have chunk_logits logits.
  """
  batch, length = shape
  return -(-length // (chunk or max(1, chunk_logits // vocab_size // batch)))


def split(chunks, *arrays):
  """Split trees of arrays [B, T, ...] into [chunks, B, C, ...], padded with zeros.

  Chunk i has the tokens i, i + chunks, ... of every sequence, so that devices that share the batch or the length have
  an equal part of every chunk.
  """
  def split_array(a):
    size = -(-a.shape[1] // chunks)
    a = jnp.pad(a, ((0, 0), (0, size * chunks - a.shape[1])) + ((0, 0),) * (a.ndim - 2))
    return jnp.moveaxis(a.reshape(a.shape[0], size, chunks, *a.shape[2:]), 2, 0)
  return jax.tree.map(split_array, arrays)


def join(length, *arrays):
  """Undo `split` of sequences of `length` tokens."""
  def join_array(a):
    a = jnp.moveaxis(a, 0, 2)
    return a.reshape(a.shape[0], -1, *a.shape[3:])[:, :length]
  return jax.tree.map(join_array, arrays)


def chunk_logits_of(x, w, vocab_axis=1, soft_cap=None):
  """Compute float32 logits [B, C, V] of hidden states [B, C, D]; the products are in their dtype.

  w: the output matrix [D, V], or [V, D] with vocab_axis=0.  soft_cap: logits become soft_cap * tanh(logits / soft_cap).
  """
  logits = jax.lax.dot_general(x, w.astype(x.dtype), (((2,), (1 - vocab_axis,)), ((), ())),
                               preferred_element_type=jnp.float32)
  return logits if soft_cap is None else soft_cap * jnp.tanh(logits / soft_cap)
