"""Low-rank adapters: LoRA (arXiv:2106.09685), rsLoRA (arXiv:2312.03732) and DoRA (arXiv:2402.09353).

An adapter is a nested dict like the parameters that holds, for each adapted weight W, its factors
{'a' [*batch, *in, rank], 'b' [*batch, rank, *out]} and for DoRA 'magnitude' [*batch, *out]; batch axes are layers and
experts. Several adapters are {name: adapter}. `combine` merges adapters and frozen parameters into a tree whose adapted
leaves are `Adapted` weights; every function of the model accepts it.
"""

import dataclasses
import functools
import math
import zlib

import jax
import jax.numpy as jnp
from flax import struct
from jax.custom_derivatives import SymbolicZero

from llmjax.adapt.matrices import find_targets, get_leaf, matrix_axes, path_text, set_leaf
from llmjax.config import ConfigError
from llmjax.ops.products import (
  Weight,
  all_gather,
  contract,
  contract_back,
  dense,
  is_differentiated,
  is_weight,
  project,
  values,
  weight_gradient,
)


@struct.dataclass
class Factors:
  """The factors of one adapter for one weight.

  a: [..., *in, rank]. b: [..., rank, *out]. magnitude: float32 [..., *out] for DoRA, or None. key: uint32 [..., 2],
  PRNG key of the dropout, or None without dropout. scale: factor of the product a b. weight: factor of the adapter.
  """

  a: jax.Array
  b: jax.Array
  magnitude: jax.Array | None = None
  key: jax.Array | None = None
  scale: float = struct.field(pytree_node=False, default=1.0)
  weight: float = struct.field(pytree_node=False, default=1.0)
  dropout: float = struct.field(pytree_node=False, default=0.0)

  def astype(self, dtype):
    return self.replace(a=self.a.astype(dtype), b=self.b.astype(dtype))

  def product(self, w_shape, in_dims):
    """Compute scale a b in float32, in the shape of the weight."""
    batch = w_shape[:self.a.ndim - in_dims - 1]
    rank = self.a.shape[-1]
    a = self.a.astype(jnp.float32).reshape(*batch, -1, rank)
    b = self.b.astype(jnp.float32).reshape(*batch, rank, -1)
    return (self.scale * jnp.matmul(a, b, precision='highest')).reshape(w_shape)

  def gain(self, w, in_dims):
    """Compute DoRA's magnitude / ||W + scale a b||, float32 [..., *out], with norms over the input axes.

    No gradient flows through the norm (arXiv:2402.09353, section 4.3, eq. 11). w: the dense weight.
    """
    adapted = jax.lax.stop_gradient(w.astype(jnp.float32) + self.product(w.shape, in_dims))
    first = self.a.ndim - in_dims - 1
    norm = jnp.sqrt(jnp.sum(jnp.square(adapted), axis=tuple(range(first, first + in_dims))))
    return self.magnitude / norm

  def delta(self, w, in_dims):
    """Compute the float32 update of a dense weight w."""
    change = self.product(w.shape, in_dims)
    if self.magnitude is not None:
      gain = jnp.expand_dims(self.gain(w, in_dims), [self.a.ndim - in_dims - 1 + i for i in range(in_dims)])
      change = (gain - 1) * w.astype(jnp.float32) + gain * change
    return self.weight * change

  @property
  def is_plain(self):
    """Whether the update is linear in a b: no dropout, no magnitude."""
    return self.magnitude is None and (self.key is None or not self.dropout)

  def output(self, x, y, w, in_dims, layout):
    """Compute the update of the output y = x W."""
    if self.key is not None and self.dropout:
      keep = jax.random.bernoulli(jax.random.wrap_key_data(self.key), 1 - self.dropout, x.shape)
      x = jnp.where(keep, x / (1 - self.dropout), 0).astype(x.dtype)
    narrow, wide = _factor_layouts(layout, in_dims)
    change = project(project(x, self.a, in_dims, narrow) * self.scale, self.b, 1, wide)
    if self.magnitude is not None:
      gain = self.gain(dense(w), in_dims)
      change = (gain - 1).astype(x.dtype) * y + gain.astype(x.dtype) * change
    return self.weight * change


def _factor_layouts(layout, in_dims):
  """Return the layouts of a and b on the mesh, given their weight's."""
  if layout is None:
    return None, None
  names = layout.names
  return (dataclasses.replace(layout, names=(*names[:in_dims], 'rank')),
          dataclasses.replace(layout, names=('rank', *names[in_dims:])))


def _pays_to_merge(x, w, factors, in_dims):
  """Return whether one product with w + a b needs fewer FLOPs than two narrow products for every row of x.

  Only in float32: in bfloat16 the sum would round away small values of a b.
  """
  rows, inner, outer = (math.prod(s) for s in (x.shape[:-in_dims], w.shape[:in_dims], w.shape[in_dims:]))
  return x.dtype == jnp.float32 and rows * (inner + outer) > len(factors) * inner * outer


def _merged_weight(w, factors, scales, in_dims):
  """Compute w + the sum of scale a b."""
  return w + sum(contract(scale * a, b, 1) for (a, b), scale in zip(factors, scales, strict=True))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _low_rank(in_dims, layout, scales, x, w, factors):
  """Compute x W + the sum of scale (x a) b for factors ((a, b), ...) in x's dtype.

  CPUs multiply narrow matrices at a fraction of the speed of wide ones; there it is one product with w + a b if that
  is less work.
  """
  layouts = _factor_layouts(layout, in_dims)
  w = all_gather(w, layout)
  factors = tuple((all_gather(a, layouts[0]), all_gather(b, layouts[1])) for a, b in factors)

  def separate(x, w, factors):
    return contract(x, w, in_dims) + sum(
        contract(scale * contract(x, a, in_dims), b, 1) for (a, b), scale in zip(factors, scales, strict=True))

  def merged(x, w, factors):
    return contract(x, _merged_weight(w, factors, scales, in_dims), in_dims)

  if not _pays_to_merge(x, w, factors, in_dims):
    return separate(x, w, factors)
  return jax.lax.platform_dependent(x, w, factors, cpu=merged, default=separate)


def _low_rank_fwd(in_dims, layout, scales, x, w, factors):
  trains = is_differentiated(w)
  x, w, factors = values((x, w, factors))
  # The last residual holds no array, only whether w is differentiated; a frozen weight is not.
  return _low_rank(in_dims, layout, scales, x, w, factors), (x, w, factors, () if trains else None)


def _low_rank_bwd(in_dims, layout, scales, residuals, d_out):
  x, stored, factors, trains = residuals
  if isinstance(d_out, SymbolicZero):
    return None, None, None
  layouts = _factor_layouts(layout, in_dims)
  w = all_gather(stored, layout)
  factors = tuple((all_gather(a, layouts[0]), all_gather(b, layouts[1])) for a, b in factors)
  d_hidden = [scale * contract_back(d_out, b, 1) for (_, b), scale in zip(factors, scales, strict=True)]
  d_factors = tuple(
      (weight_gradient(x, d_h, in_dims, layouts[0]),
       weight_gradient(scale * contract(x, a, in_dims), d_out, 1, layouts[1]))
      for (a, _), d_h, scale in zip(factors, d_hidden, scales, strict=True))

  def separate(d_out, d_hidden, w, factors):
    return contract_back(d_out, w, in_dims) + sum(
        contract_back(d_h, a, in_dims) for (a, _), d_h in zip(factors, d_hidden, strict=True))

  def merged(d_out, d_hidden, w, factors):
    return contract_back(d_out, _merged_weight(w, factors, scales, in_dims), in_dims)

  if _pays_to_merge(x, w, factors, in_dims):
    d_x = jax.lax.platform_dependent(d_out, d_hidden, w, factors, cpu=merged, default=separate)
  else:
    d_x = separate(d_out, d_hidden, w, factors)
  return d_x, None if trains is None else weight_gradient(x, d_out, in_dims, layout), d_factors


_low_rank.defvjp(_low_rank_fwd, _low_rank_bwd, symbolic_zeros=True)


@struct.dataclass
class Adapted(Weight):
  """A frozen weight with adapters: x W + scale (x a) b, summed over the adapters.

  base: an array or another Weight. Dropout applies to the input of the low-rank product only, for DoRA as well.
  """

  base: jax.Array | Weight
  factors: tuple[Factors, ...]
  in_dims: int = struct.field(pytree_node=False)

  @property
  def shape(self):
    return self.base.shape

  @property
  def ndim(self):
    return self.base.ndim

  @property
  def dtype(self):
    return self.base.dtype

  def astype(self, dtype):
    return self.replace(base=self.base.astype(dtype), factors=tuple(f.astype(dtype) for f in self.factors))

  def dense(self):
    w = dense(self.base)
    total = w.astype(jnp.float32)
    for factors in self.factors:
      total = total + factors.delta(w, self.in_dims)
    return total.astype(w.dtype)

  def all_gather(self, layout):
    return self.dense() if layout is None else layout.all_gather(self.dense())

  def product(self, x, in_dims, layout):
    factors = [f.astype(x.dtype) for f in self.factors]
    plain = [f for f in factors if f.is_plain]
    if len(plain) == len(factors):
      return _low_rank(in_dims, layout, tuple(f.scale * f.weight for f in plain), x, self.base.astype(x.dtype),
                       tuple((f.a, f.b) for f in plain))
    y = project(x, self.base, in_dims, layout)
    return y + sum(f.output(x, y, self.base, in_dims, layout) for f in factors)


def init_adapter(spec, params, key, dtype=jnp.float32):
  """Initialize an adapter that leaves the model unchanged: a is uniform within 1 / sqrt(fan-in), b is zero.

  spec: AdapterSpec. params: the frozen parameters; DoRA's magnitudes start as their norms (arXiv:2402.09353, eq. 5).
  Raises ConfigError if a target pattern matches nothing.
  """
  adapter = {}
  for path, w in find_targets(params, spec.targets).items():
    in_dims, out_dims = matrix_axes(path)
    split = w.ndim - out_dims
    batch, inner, outer = w.shape[:split - in_dims], w.shape[split - in_dims:split], w.shape[split:]
    a = jax.random.uniform(_fold(key, path), (*batch, *inner, spec.rank), jnp.float32, -1, 1)
    factors = {'a': (a / math.prod(inner)**0.5).astype(dtype), 'b': jnp.zeros((*batch, spec.rank, *outer), dtype)}
    if spec.kind == 'dora':
      axes = tuple(range(len(batch), split))
      factors['magnitude'] = jnp.sqrt(jnp.sum(jnp.square(dense(w).astype(jnp.float32)), axis=axes))
    set_leaf(adapter, path, factors)
  return adapter


def adapter_names(spec, names):
  """Return the logical axis names of an adapter's arrays. names: those of the parameters."""
  adapter = {}
  for path, axes in find_targets(names, spec.targets).items():
    in_dims, out_dims = matrix_axes(path)
    split = len(axes) - out_dims
    factors = {'a': (*axes[:split], 'rank'), 'b': (*axes[:split - in_dims], 'rank', *axes[split:])}
    if spec.kind == 'dora':
      factors['magnitude'] = (*axes[:split - in_dims], *axes[split:])
    set_leaf(adapter, path, factors)
  return adapter


def combine(base, adapters, specs, *, key=None, active=None, weights=None):
  """Return the model's parameters: `base` with `Adapted` leaves where an adapter is active.

  adapters: {name: adapter}. specs: {name: AdapterSpec}. key: PRNG key of the dropout; None for no dropout. active:
  names of the active adapters; None for all. weights: {name: factor of that adapter}, 1 by default.
  """
  active, weights = adapters if active is None else active, weights or {}
  if unknown := [name for name in (*active, *weights) if name not in adapters]:
    raise ConfigError([f'there is no adapter {unknown[0]!r}; there are {", ".join(adapters) or "none"}'])

  def adapt(path, w):
    path, factors = path_text(path), []
    for name in adapters:
      leaf = get_leaf(adapters[name], path) if name in active else None
      if isinstance(leaf, dict) and 'a' in leaf:
        spec = specs[name]
        layer_keys = None
        if key is not None and spec.dropout:
          _require_product(path, w)
          layer_keys = _fold(key, f'{name}/{path}')
          if w.ndim > sum(matrix_axes(path)):
            layer_keys = jax.random.split(layer_keys, w.shape[0])
          layer_keys = jax.random.key_data(layer_keys)
        factors.append(Factors(leaf['a'], leaf['b'], leaf.get('magnitude'), layer_keys, scale=spec.scale,
                               weight=float(weights.get(name, 1.0)), dropout=spec.dropout))
    return Adapted(w, tuple(factors), matrix_axes(path)[0]) if factors else w

  return jax.tree_util.tree_map_with_path(adapt, base, is_leaf=is_weight)


def _require_product(path, w):
  """Raise ConfigError if a weight is not used by `project`, so that there is no input for the dropout."""
  if not path.startswith('blocks/') or w.ndim > 1 + sum(matrix_axes(path)):
    raise ConfigError([f'adapter.dropout is not supported for {path}: embeddings, heads and experts add the adapter '
                       'to the weight; write adapter.dropout=0, or leave them out of adapter.targets'])


def merge(base, adapters, specs, *, active=None, weights=None):
  """Merge adapters into plain parameters; arguments as in `combine`.

  A quantized base is dequantized, because the adapters were trained on its quantized values.
  """
  return jax.tree.map(dense, combine(base, adapters, specs, active=active, weights=weights), is_leaf=is_weight)


def unmerge(merged, adapters, specs, *, active=None, weights=None):
  """Subtract adapters from merged parameters, exact up to rounding; arguments as in `combine`.

  Raises ConfigError for DoRA: the norm of the base weight is lost in the merged one.
  """
  active = adapters if active is None else active
  if dora := [name for name in active if specs[name].kind == 'dora']:
    raise ConfigError([f'adapter {dora[0]!r} is a dora, which cannot be unmerged: keep the base'])
  negative = {name: -(weights or {}).get(name, 1.0) for name in active}
  return merge(merged, adapters, specs, active=active, weights=negative)


def _fold(key, text):
  """Derive a key from a path, independent of the other adapted weights."""
  return jax.random.fold_in(key, zlib.crc32(text.encode()))


def count(adapter):
  """Return (number of arrays, number of values) of an adapter."""
  leaves = jax.tree.leaves(adapter)
  return len(leaves), sum(leaf.size for leaf in leaves)
