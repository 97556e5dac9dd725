"""Frozen weights in 8 or 4 bits: a leaf type, and making it.

A matrix is cut along its last axis into blocks of up to 64 values, each divided by its largest absolute
value; int8 rounds the quotients to 1/127ths, nf4 to the nearest of 16 quantiles of a normal distribution
(arXiv:2305.14314, section 3).  The largest values are quantised too (double quantisation, ibid.): their
logarithms to int8, around their mean over the matrix, in groups that share an entry of the first axis.  So every part
of the result has the axes of the matrix, and lies on a mesh as it does.  Of logarithms, because one outlier in a group
then costs the others a part of their own size (100 times the rest: 2 % at most), not of its.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from llmjax.adapt.matrices import matrices, matrix_axes, path_text
from llmjax.config import ConfigError
from llmjax.ops.products import Weight, is_weight

BLOCK = 64
# arXiv:2305.14314, appendix E.
NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
       -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
       0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)


@struct.dataclass
class Quantized(Weight):
  """A frozen matrix [..., first, ..., n] in few bits.

  codes: int8 [..., n], or nf4 uint8 [..., n / 2], two neighbours in a byte, the first in the lower half.
  scales: int8 [..., n / block], logarithms of the blocks' largest values; one counts step [..., first] / 127 above or
  below mean [...].  value_dtype: of `dense`.
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
    scale = _widen(self.scales, self.step, self.mean)
    if self.kind == 'nf4':
      pair = jnp.stack([self.codes & 15, self.codes >> 4], axis=-1)
      values = _look_up(pair.reshape(self.shape))
    else:
      values = self.codes.astype(jnp.float32) / 127
    split = values.reshape(*self.shape[:-1], blocks, -1)
    return (split * scale[..., None]).reshape(self.shape).astype(self.value_dtype)

  def all_gather(self, layout):
    """Gathers codes, not what they stand for."""
    if layout is None:
      return self.dense()
    part = lambda *names: dataclasses.replace(layout, names=names).all_gather
    names = layout.names
    return self.replace(codes=layout.all_gather(self.codes), scales=part(*names[:-1], None)(self.scales),
                        step=part(names[0])(self.step)).dense()


def _widen(scales, step, mean):
  """Returns float32 largest values [..., n / block]."""
  trail = lambda a: a.reshape(a.shape + (1,) * (scales.ndim - a.ndim))
  return jnp.exp(scales.astype(jnp.float32) / 127 * trail(step) + trail(mean))


def _look_up(codes):
  """Returns the nf4 values of codes 0 to 15: by selection, bit for bit, which every platform does in lanes."""
  level = [jnp.float32(v) for v in NF4]
  for bit in range(4):
    is_set = (codes >> bit) & 1 == 1
    level = [jnp.where(is_set, high, low) for low, high in zip(level[::2], level[1::2], strict=True)]
  return level[0]


def block_size(length):
  """Returns the largest divisor of a last axis that is at most BLOCK."""
  return next(b for b in range(min(BLOCK, length), 0, -1) if length % b == 0)


def quantize(w, kind, matrix_ndim):
  """Returns the Quantized form of w [*batch, *matrix]; the matrix has `matrix_ndim` axes.

  Raises ConfigError when an nf4 matrix has a last axis that is not even.
  """
  if kind == 'nf4' and w.shape[-1] % 2:
    raise ConfigError([f'adapter.quantize=nf4 packs pairs, and a matrix {w.shape} has a last axis of odd length; '
                       'write int8'])
  batch = w.ndim - matrix_ndim
  size = block_size(w.shape[-1])
  split = w.astype(jnp.float32).reshape(*w.shape[:-1], -1, size)
  largest = jnp.max(jnp.abs(split), axis=-1)  # [*batch, first, ..., n / size]
  some = largest >= jnp.finfo(jnp.float32).tiny  # A block of zeros is one at any scale, and has no logarithm.
  logs = jnp.log(jnp.where(some, largest, 1.0))
  axes = tuple(range(batch, largest.ndim))
  mean = jnp.sum(logs, axis=axes) / jnp.maximum(jnp.sum(some, axis=axes), 1)
  # A mesh changes the order of the sum, and so its last bits: rounded, they change no code.
  mean = jnp.round(64 * mean) / 64
  off = jnp.where(some, logs - mean.reshape(mean.shape + (1,) * (largest.ndim - batch)), 0.0)
  step = jnp.max(jnp.abs(off), axis=tuple(range(batch + 1, largest.ndim)))
  wide = jnp.maximum(step, jnp.finfo(jnp.float32).tiny)
  scales = jnp.round(off / wide.reshape(wide.shape + (1,) * (largest.ndim - batch - 1)) * 127).astype(jnp.int8)
  # Codes are of the scales as they will be read, so that rounding those costs no more than it must.
  read = _widen(scales, step, mean)[..., None]
  ratio = jnp.clip(split / read, -1, 1).reshape(w.shape)
  if kind == 'int8':
    codes = jnp.round(ratio * 127).astype(jnp.int8)
  else:
    levels = jnp.asarray(NF4, jnp.float32)
    nearest = jnp.searchsorted((levels[1:] + levels[:-1]) / 2, ratio, method='compare_all').astype(jnp.uint8)
    codes = nearest[..., ::2] | nearest[..., 1::2] << 4
  return Quantized(codes, scales, step, mean, kind, jnp.dtype(w.dtype).name)


def quantized_paths(params):
  """Returns the paths of what `quantize_tree` quantises: the matrices of the blocks."""
  return [path for path in matrices(params) if path.startswith('blocks/')]


def quantize_tree(params, kind, names=None, place=None, delete=True):
  """Returns the parameters with the blocks' matrices quantised, one after the other; others stay.

  names, place: the logical names of the parameters, and a function of a tree of names to the shardings to
  make the parts in.  delete: each matrix then goes once it is quantised, so that the two forms of all never
  exist together.  Of ShapeDtypeStructs, ShapeDtypeStructs.
  """
  chosen = set(quantized_paths(params))

  def one(path, w, w_names=None):
    path = path_text(path)
    if path not in chosen:
      return w
    ndim = sum(matrix_axes(path))
    make = lambda w: quantize(w, kind, ndim)
    if place is None:
      return jax.jit(make)(w)
    shardings = place(quantized_names(w_names, kind, ndim, w.dtype))
    if isinstance(w, jax.ShapeDtypeStruct):
      return jax.tree.map(lambda s, n: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=n), jax.eval_shape(make, w),
                          shardings)
    made = jax.jit(make, out_shardings=shardings)(w)
    if delete:
      jax.block_until_ready(made)
      w.delete()
    return made

  rest = () if names is None else (names,)
  return jax.tree_util.tree_map_with_path(one, params, *rest, is_leaf=is_weight)


def quantized_names(names, kind, matrix_ndim, dtype='float32'):
  """Returns the Quantized form's tree of logical names.  names: of w's axes, in the order of `quantize`."""
  batch = len(names) - matrix_ndim
  # A block must not be cut, and a mesh may well cut the last axis into parts that are no blocks.
  return Quantized(names, (*names[:-1], None), names[:batch + 1], names[:batch], kind, jnp.dtype(dtype).name)
