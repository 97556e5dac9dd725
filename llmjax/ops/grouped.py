"""Grouped matrix products: each contiguous block of rows is multiplied by its own matrix, as for experts.

XLA's `ragged_dot` does it, but on a TPU it computes the gradient of the matrices as a dense product of all rows with
every matrix.  Two Pallas kernels compute only what is needed, in tiles of rows: `multiply`, and `outer` for the
gradient of the matrices.  A tile with rows of several blocks is visited once for each of them.

Letters: M rows, E blocks (experts), K and N the sides of their matrices.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

TILE = 256  # Rows.  E - 1 tiles are visited twice: of 32768 rows in 8 blocks that is 5.5% more work.
COLUMNS = 1024
MATRIX_BYTES = 16 << 20  # Of the part of a matrix that is in VMEM, double-buffered, while its rows are processed.
VMEM_BYTES = 60 << 20  # A v5p core has 64 MiB, v5e and v6e 128; v4's 16 are too few for matrices 14336 high.


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def product(rows, matrices, sizes, layout=None, share=1.0):
  """Multiply each row by the matrix of its block; return [M, N] of rows' dtype.

  rows: [M, K].  matrices: [E, K, N] of the same dtype.  sizes: int32 [E], rows of each block; the first block starts at
  row 0.  Rows after the last block are undefined in the result and in the gradient of `rows`, and contribute nothing to
  that of the matrices.  layout: see `ops.products.project`.  share: expected fraction of the rows that belong to a
  block, for the kernels' cost estimates.
  """
  return jax.lax.platform_dependent(rows, matrices if layout is None else layout.all_gather(matrices), sizes,
                                    tpu=functools.partial(multiply, share=share), default=jax.lax.ragged_dot)


def _product_bwd(layout, share, residuals, d_out):
  rows, matrices, sizes = residuals

  def on_tpu(rows, matrices, sizes, d_out):
    return (multiply(d_out, matrices, sizes, transposed=True, share=share),
            outer(rows, d_out, sizes, share=share))

  def plain(rows, matrices, sizes, d_out):
    return jax.vjp(lambda r, m: jax.lax.ragged_dot(r, m, sizes), rows, matrices)[1](d_out)

  d_rows, d_matrices = jax.lax.platform_dependent(
      rows, matrices if layout is None else layout.all_gather(matrices), sizes, d_out, tpu=on_tpu, default=plain)
  return d_rows, d_matrices if layout is None else layout.reduce_scatter(d_matrices), None


product.defvjp(lambda rows, matrices, sizes, layout, share: (product(rows, matrices, sizes, layout, share),
                                                             (rows, matrices, sizes)), _product_bwd)


def multiply(rows, matrices, sizes, transposed=False, share=1.0, emulate=False):
  """Multiply rows [M, K] by the matrices [E, K, N] of their blocks, or [E, N, K] if transposed.  A TPU kernel.

  All K rows of a part of a matrix stay in VMEM while the rows of its block are processed.
  """
  (count, depth), (blocks, *sides) = rows.shape, matrices.shape
  wide = sides[0] if transposed else sides[1]
  tile = min(TILE, _ceil(count, 16))
  columns = _part(wide, min(COLUMNS, MATRIX_BYTES // (depth * matrices.dtype.itemsize)))
  table, visits = _visits(sizes, count, tile)

  def kernel(blocks, tiles, starts, ends, used, rows, matrix, out):
    visit = pl.program_id(1)
    start, end = starts[blocks[visit]], ends[blocks[visit]]

    @pl.when((visit < used[0]) & (start < end))
    def _():
      axes = ((1,), (1 if transposed else 0,))
      result = jax.lax.dot_general(rows[...], matrix[...], (axes, ((), ())),
                                  preferred_element_type=jnp.float32).astype(out.dtype)
      out[...] = jnp.where(_inside(tiles[visit] * tile, start, end, tile), result, out[...])

  part = (None, columns, depth) if transposed else (None, depth, columns)
  return pl.pallas_call(
      kernel, out_shape=jax.ShapeDtypeStruct((count, wide), rows.dtype),
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=5, grid=(pl.cdiv(wide, columns), visits),
          in_specs=[pl.BlockSpec((tile, depth), lambda n, v, blocks, tiles, *_: (tiles[v], 0)),
                    pl.BlockSpec(part, lambda n, v, blocks, *_: (blocks[v], *((n, 0) if transposed else (0, n))))],
          out_specs=pl.BlockSpec((tile, columns), lambda n, v, blocks, tiles, *_: (tiles[v], n))),
      compiler_params=_compiler_params('parallel', 'arbitrary'), interpret=emulate, name='grouped_multiply',
      cost_estimate=_cost(visits * tile, depth, wide, blocks, rows.dtype, share))(*table, rows, matrices)


def outer(rows, others, sizes, share=1.0, emulate=False):
  """Sum the outer products of rows [M, K] and others [M, N] over each block: [E, K, N].  A TPU kernel.

  Sums are float32 and stay in VMEM while the rows of the block are processed; the result has rows' dtype, and zeros for
  a block without rows.
  """
  (count, high), wide, blocks = rows.shape, others.shape[1], sizes.shape[0]
  tile = min(TILE, _ceil(count, 16))
  parts = _part(high, COLUMNS), _part(wide, 2 * COLUMNS)
  table, visits = _visits(sizes, count, tile)

  def kernel(blocks, tiles, starts, ends, used, rows, others, out, total):
    visit = pl.program_id(2)
    block, first = blocks[visit], tiles[visit] * tile
    start, end, working = starts[block], ends[block], visit < used[0]
    whole = (start <= first) & (first + tile <= end)

    def add(keep):
      total[...] += jax.lax.dot_general(keep(rows[...]), keep(others[...]), (((0,), (0,)), ((), ())),
                                        preferred_element_type=jnp.float32)

    @pl.when((visit == 0) | (blocks[jnp.maximum(visit - 1, 0)] != block))
    def _():
      total[...] = jnp.zeros_like(total)

    pl.when(working & whole)(lambda: add(lambda a: a))
    # Both factors: rows after the last block may be NaN.
    pl.when(working & ~whole & (start < end))(
        lambda: add(lambda a: jnp.where(_inside(first, start, end, tile), a, jnp.zeros_like(a))))

    @pl.when((visit == used[0] - 1) | (working & (blocks[jnp.minimum(visit + 1, visits - 1)] != block)))
    def _():
      out[...] = total[...].astype(out.dtype)

  return pl.pallas_call(
      kernel, out_shape=jax.ShapeDtypeStruct((blocks, high, wide), rows.dtype),
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=5, grid=(pl.cdiv(high, parts[0]), pl.cdiv(wide, parts[1]), visits),
          in_specs=[pl.BlockSpec((tile, parts[0]), lambda k, n, v, blocks, tiles, *_: (tiles[v], k)),
                    pl.BlockSpec((tile, parts[1]), lambda k, n, v, blocks, tiles, *_: (tiles[v], n))],
          out_specs=pl.BlockSpec((None, *parts), lambda k, n, v, blocks, *_: (blocks[v], k, n)),
          scratch_shapes=[pltpu.VMEM(parts, jnp.float32)]),
      compiler_params=_compiler_params('parallel', 'arbitrary', 'arbitrary'), interpret=emulate,
      name='grouped_outer',
      cost_estimate=_cost(visits * tile, high, wide, blocks, rows.dtype, share))(*table, rows, others)


def _visits(sizes, count, tile):
  """Return ((block and tile of every visit, first row and end of every block, number of used visits), visits).

  Visits are ordered by block and tile; a block without rows has one, in which `outer` writes zeros.  There are E - 1
  more visits than tiles; unused ones repeat the last one.
  """
  blocks, tiles = sizes.shape[0], pl.cdiv(count, tile)
  ends = jnp.cumsum(sizes)
  starts = ends - sizes
  first = jnp.minimum(starts // tile, tiles - 1)
  last = jnp.where(sizes > 0, (ends - 1) // tile, first)
  until = jnp.cumsum(last - first + 1)
  visit = jnp.arange(tiles + blocks - 1)
  block = jnp.minimum(jnp.sum(visit[:, None] >= until, axis=1), blocks - 1)
  place = jnp.minimum(last[block] - (until[block] - 1 - visit), last[block])
  return tuple(a.astype(jnp.int32) for a in (block, place, starts, ends, until[-1:])), tiles + blocks - 1


def _inside(first, start, end, tile):
  """Return which rows of a tile belong to a block, bool [tile, 1]."""
  row = first + jax.lax.broadcasted_iota(jnp.int32, (tile, 1), 0)
  return (row >= start) & (row < end)


def _part(size, limit):
  """Return the size of the parts of a side: a multiple of 128 up to the limit, or all of it."""
  return size if size <= limit else max(limit // 128, 1) * 128


def _ceil(size, step):
  return -(-size // step) * step


def _compiler_params(*semantics):
  return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=VMEM_BYTES)


def _cost(rows, depth, wide, blocks, dtype, share):
  """Return the cost estimate of all visits."""
  size = dtype.itemsize
  return pl.CostEstimate(flops=int(2 * rows * depth * wide * share), transcendentals=0,
                         bytes_accessed=int(size * (rows * (depth + wide) * share + blocks * depth * wide)))
