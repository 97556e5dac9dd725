"""Block-wise quantization of frozen weights to 8 or 4 bits.

A matrix is divided along its last axis into blocks of up to 64 values, each scaled by its absolute maximum; int8
rounds to multiples of 1/127, nf4 to the nearest of 16 quantiles of a normal distribution (arXiv:2305.14314, section 3).
The scales are quantized too (double quantization, ibid.): their logarithms to int8, around their mean over the matrix,
with one step size per entry of the first axis. So every array of the result has the axes of the matrix and its
sharding. Logarithms, because an outlier then costs the other scales of its group a fraction of their own size (2 % at
most for an outlier 100 times as large), not of the outlier's.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from llmjax.adapt.matrices import matrices, matrix_axes, path_text
from llmjax.config import ConfigError
from llmjax.ops.products import Weight, is_weight

BLOCK = 64
# Levels of the 4-bit NormalFloat, arXiv:2305.14314, appendix E.
NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
       -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
       0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)


@struct.dataclass
class Quantized(Weight):
  """A quantized matrix [..., first, ..., n].

  codes: int8 [..., n], or for nf4 uint8 [..., n / 2] with two neighbours per byte, the first in the lower half.
  scales: int8 [..., n / block], logarithms of the blocks' absolute maxima in units of step / 127 from mean.
  step: float32 [..., first]. mean: float32 [...]. value_dtype: dtype of `dense`.
  """

  codes: jax.Array
  scales: jax.Array
  step: jax.Array
  mean: jax.Array
  kind: str = struct.field(pytree_node=False)
  value_dtype: str = struct.field(pytree_node=False, default='float32')

  @property
  def shape(self):
    last = self.codes.shape[-1] * (2 if self.kind == 'nf4' else 1)
    return (*self.codes.shape[:-1], last)

  @property
  def ndim(self):
    return self.codes.ndim

  @property
  def dtype(self):
    return jnp.dtype(self.value_dtype)

  def astype(self, dtype):
    return self.replace(value_dtype=jnp.dtype(dtype).name)

  def dense(self):
    blocks = self.scales.shape[-1]
    scale = _dequantize_scales(self.scales, self.step, self.mean)
    if self.kind == 'nf4':
      pair = jnp.stack([self.codes & 15, self.codes >> 4], axis=-1)
      values = _look_up(pair.reshape(self.shape))
    else:
      values = self.codes.astype(jnp.float32) / 127
    split = values.reshape(*self.shape[:-1], blocks, -1)
    return (split * scale[..., None]).reshape(self.shape).astype(self.value_dtype)

  def all_gather(self, layout):
    """Gather the codes, which are smaller than the values, and dequantize."""
    if layout is None:
      return self.dense()
    gather = lambda *names: dataclasses.replace(layout, names=names).all_gather
    names = layout.names
    return self.replace(codes=layout.all_gather(self.codes), scales=gather(*names[:-1], None)(self.scales),
                        step=gather(names[0])(self.step)).dense()


def _dequantize_scales(scales, step, mean):
  """Compute the blocks' absolute maxima, float32 [..., n / block]."""
  expand = lambda a: a.reshape(a.shape + (1,) * (scales.ndim - a.ndim))
  return jnp.exp(scales.astype(jnp.float32) / 127 * expand(step) + expand(mean))


def _look_up(codes):
  """Map nf4 codes 0 to 15 to values: by selects on their bits, which vectorize on every platform, unlike a gather."""
  level = [jnp.float32(v) for v in NF4]
  for bit in range(4):
    is_set = (codes >> bit) & 1 == 1
    level = [jnp.where(is_set, high, low) for low, high in zip(level[::2], level[1::2], strict=True)]
  return level[0]


def block_size(length):
  """Return the largest divisor of a length that is at most BLOCK."""
  return next(b for b in range(min(BLOCK, length), 0, -1) if length % b == 0)


def quantize(w, kind, matrix_ndim):
  """Quantize w [*batch, *matrix], whose matrix has `matrix_ndim` axes. kind: int8 or nf4.

  Raises ConfigError for nf4 if the last axis has an odd length.
  """
  if kind == 'nf4' and w.shape[-1] % 2:
    raise ConfigError([f'adapter.quantize=nf4 packs two values per byte, and a matrix {w.shape} has an odd last '
                       'axis; write int8'])
  batch = w.ndim - matrix_ndim
  size = block_size(w.shape[-1])
  split = w.astype(jnp.float32).reshape(*w.shape[:-1], -1, size)
  absmax = jnp.max(jnp.abs(split), axis=-1)  # [*batch, first, ..., n / size]
  nonzero = absmax >= jnp.finfo(jnp.float32).tiny  # A block of zeros has no logarithm, and any scale fits it.
  logs = jnp.log(jnp.where(nonzero, absmax, 1.0))
  axes = tuple(range(batch, absmax.ndim))
  mean = jnp.sum(logs, axis=axes) / jnp.maximum(jnp.sum(nonzero, axis=axes), 1)
  # The order of the sum depends on the mesh, and with it the last bits; rounded, they change no code.
  mean = jnp.round(64 * mean) / 64
  offsets = jnp.where(nonzero, logs - mean.reshape(mean.shape + (1,) * (absmax.ndim - batch)), 0.0)
  step = jnp.max(jnp.abs(offsets), axis=tuple(range(batch + 1, absmax.ndim)))
  divisor = jnp.maximum(step, jnp.finfo(jnp.float32).tiny)
  divisor = divisor.reshape(divisor.shape + (1,) * (absmax.ndim - batch - 1))
  scales = jnp.round(offsets / divisor * 127).astype(jnp.int8)
  # The codes compensate the rounding of the scales.
  read = _dequantize_scales(scales, step, mean)[..., None]
  ratio = jnp.clip(split / read, -1, 1).reshape(w.shape)
  if kind == 'int8':
    codes = jnp.round(ratio * 127).astype(jnp.int8)
  else:
    levels = jnp.asarray(NF4, jnp.float32)
    nearest = jnp.searchsorted((levels[1:] + levels[:-1]) / 2, ratio, method='compare_all').astype(jnp.uint8)
    codes = nearest[..., ::2] | nearest[..., 1::2] << 4
  return Quantized(codes, scales, step, mean, kind, jnp.dtype(w.dtype).name)


def quantized_paths(params):
  """Return the paths of the parameters that `quantize_tree` quantizes: the matrices of the blocks."""
  return [path for path in matrices(params) if path.startswith('blocks/')]


def quantize_tree(params, kind, names=None, place=None, delete=True):
  """Quantize the matrices of the blocks one after the other; returns ShapeDtypeStructs for ShapeDtypeStructs.

  names: logical axis names of the parameters. place: function of a tree of such names that returns the shardings of
  the results. delete: with `place`, free each matrix once it is quantized, so that both forms of all matrices never
  exist at the same time.
  """
  selected = set(quantized_paths(params))

  def convert(path, w, w_names=None):
    path = path_text(path)
    if path not in selected:
      return w
    ndim = sum(matrix_axes(path))
    convert_one = lambda w: quantize(w, kind, ndim)
    if place is None:
      return jax.jit(convert_one)(w)
    shardings = place(quantized_names(w_names, kind, ndim, w.dtype))
    if isinstance(w, jax.ShapeDtypeStruct):
      return jax.tree.map(lambda s, n: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=n),
                          jax.eval_shape(convert_one, w), shardings)
    quantized = jax.jit(convert_one, out_shardings=shardings)(w)
    if delete:
      jax.block_until_ready(quantized)
      w.delete()
    return quantized

  rest = () if names is None else (names,)
  return jax.tree_util.tree_map_with_path(convert, params, *rest, is_leaf=is_weight)


def quantized_names(names, kind, matrix_ndim, dtype='float32'):
  """Return the logical axis names of a Quantized's arrays. names: those of the matrix and its batch axes."""
  batch = len(names) - matrix_ndim
  # The scales stay whole along the last axis: its shards need not be multiples of a block.
  return Quantized(names, (*names[:-1], None), names[:batch + 1], names[:batch], kind, jnp.dtype(dtype).name)
