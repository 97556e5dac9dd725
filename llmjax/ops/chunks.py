"""Logits of a few tokens of each row at a time: rows cut into chunks, and put together again.

Letters: B batch, T query length, D model, V vocab, C tokens of a row that are in one chunk.  A scan over the
chunks keeps one chunk's logits alive, whatever XLA's scheduler prefers.
"""

import jax
import jax.numpy as jnp

# Logits of one chunk: 131 MB of float32.  With 512 to 4096 tokens a chunk, all take the same time on x86.
CHUNK_LOGITS = 1 << 25


def count_chunks(shape, vocab_size, chunk=None, chunk_logits=CHUNK_LOGITS):
  """Returns how many chunks there are of rows [B, T].

  chunk: tokens of each row per chunk; None takes as many as have chunk_logits logits.
  """
  batch, length = shape
  return -(-length // (chunk or max(1, chunk_logits // vocab_size // batch)))


def split(chunks, *rows):
  """[B, T, ...] to [chunks, B, C, ...] with zeros at the end, of trees; chunk i has tokens i, i + chunks, ...

  Rows are cut, not the flattened batch, and each chunk takes tokens from all over the row, so that a
  batch or a row which lies over many devices gives each of them an equal part of every chunk.
  """
  def cut(a):
    size = -(-a.shape[1] // chunks)
    a = jnp.pad(a, ((0, 0), (0, size * chunks - a.shape[1])) + ((0, 0),) * (a.ndim - 2))
    return jnp.moveaxis(a.reshape(a.shape[0], size, chunks, *a.shape[2:]), 2, 0)
  return jax.tree.map(cut, rows)


def join(length, *parts):
  """Undoes `split` of rows of `length` tokens."""
  def put_together(a):
    a = jnp.moveaxis(a, 0, 2)
    return a.reshape(a.shape[0], -1, *a.shape[3:])[:, :length]
  return jax.tree.map(put_together, parts)


def chunk_logits_of(x, w, vocab_axis=1, soft_cap=None):
  """Returns float32 logits [B, C, V] of hidden states [B, C, D]; products in their dtype.

  w: the output matrix [D, V], or [V, D] with vocab_axis=0.  soft_cap: they become soft_cap * tanh(logits / soft_cap).
  """
  logits = jax.lax.dot_general(x, w.astype(x.dtype), (((2,), (1 - vocab_axis,)), ((), ())),
                               preferred_element_type=jnp.float32)
  return logits if soft_cap is None else soft_cap * jnp.tanh(logits / soft_cap)
