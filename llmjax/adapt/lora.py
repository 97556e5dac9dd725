"""Low-rank adapters: LoRA, rsLoRA and DoRA as a leaf type, and trees of them.

An adapter is a nested dict like that of the parameters with, in the place of each weight W that it adapts,
its factors {'a' [*batch, *in, rank], 'b' [*batch, rank, *out]} and for DoRA 'magnitude' [*batch, *out]; batch
are layers and experts.  Several adapters are {name: adapter}.  `combine` puts them and frozen parameters
together to parameters that every function of the model takes.
"""

import dataclasses
import functools
import math
import zlib

import jax
import jax.numpy as jnp
from flax import struct
from jax.custom_derivatives import SymbolicZero

from llmjax.adapt.matrices import find, find_targets, matrices, matrix_axes, path_text, place
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
  """What one adapter adds to one weight.

  a: [..., *in, rank].  b: [..., rank, *out].  magnitude: float32 [..., *out], DoRA's, or None.  key: uint32
  [..., 2], of the dropout, or None for none.  scale: the factor of a b.  weight: of all that is added.
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
    """Returns scale a b in float32, in the shape of the weight."""
    batch = w_shape[:self.a.ndim - in_dims - 1]
    rank = self.a.shape[-1]
    a = self.a.astype(jnp.float32).reshape(*batch, -1, rank)
    b = self.b.astype(jnp.float32).reshape(*batch, rank, -1)
    return (self.scale * jnp.matmul(a, b, precision='highest')).reshape(w_shape)

  def gain(self, w, in_dims):
    """Returns DoRA's magnitude / ||W + scale a b||, float32 [..., *out]; norms are over the input's axes.

    Without a gradient through the norm (arXiv:2402.09353, section 4.3, eq. 11).  w: the dense weight.
    """
    moved = jax.lax.stop_gradient(w.astype(jnp.float32) + self.product(w.shape, in_dims))
    first = self.a.ndim - in_dims - 1
    norm = jnp.sqrt(jnp.sum(jnp.square(moved), axis=tuple(range(first, first + in_dims))))
    return self.magnitude / norm

  def delta(self, w, in_dims):
    """Returns what is added to the dense weight w, float32."""
    change = self.product(w.shape, in_dims)
    if self.magnitude is not None:
      gain = jnp.expand_dims(self.gain(w, in_dims), [self.a.ndim - in_dims - 1 + i for i in range(in_dims)])
      change = (gain - 1) * w.astype(jnp.float32) + gain * change
    return self.weight * change

  @property
  def is_plain(self):
    """Whether all that is added is a product with x: no dropout, no magnitude."""
    return self.magnitude is None and (self.key is None or not self.dropout)

  def output(self, x, y, w, in_dims, layout):
    """Returns what is added to y = x W."""
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
  """Returns how a and b lie on the mesh, given how their weight does."""
  if layout is None:
    return None, None
  names = layout.names
  return (dataclasses.replace(layout, names=(*names[:in_dims], 'rank')),
          dataclasses.replace(layout, names=('rank', *names[in_dims:])))


def _pays_to_merge(x, w, factors, in_dims):
  """Returns whether making w + a b and multiplying once is less work than two products more for every row of x.

  Only in float32: in bfloat16 the sum would lose what is small in a b.
  """
  rows, inner, outer = (math.prod(s) for s in (x.shape[:-in_dims], w.shape[:in_dims], w.shape[in_dims:]))
  return x.dtype == jnp.float32 and rows * (inner + outer) > len(factors) * inner * outer


def _with_change(w, factors, scales, in_dims):
  """Returns w + the sum of scale a b."""
  return w + sum(contract(scale * a, b, 1) for (a, b), scale in zip(factors, scales, strict=True))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _low_rank(in_dims, layout, scales, x, w, factors):
  """Returns x W + the sum of scale (x a) b, for factors ((a, b), ...) in x's dtype.

  On CPUs, whose products with a narrow side run at a fraction of the speed of wide ones, by one product with
  w + a b where that is less work.
  """
  layouts = _factor_layouts(layout, in_dims)
  w = all_gather(w, layout)
  factors = tuple((all_gather(a, layouts[0]), all_gather(b, layouts[1])) for a, b in factors)

  def beside(x, w, factors):
    return contract(x, w, in_dims) + sum(
        contract(scale * contract(x, a, in_dims), b, 1) for (a, b), scale in zip(factors, scales, strict=True))

  def merged(x, w, factors):
    return contract(x, _with_change(w, factors, scales, in_dims), in_dims)

  if not _pays_to_merge(x, w, factors, in_dims):
    return beside(x, w, factors)
  return jax.lax.platform_dependent(x, w, factors, cpu=merged, default=beside)


def _low_rank_fwd(in_dims, layout, scales, x, w, factors):
  trains = is_differentiated(w)
  x, w, factors = values((x, w, factors))
  # An entry of the residuals that holds no array: whether w is differentiated, which a frozen one is not.
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

  def beside(d_out, d_hidden, w, factors):
    return contract_back(d_out, w, in_dims) + sum(
        contract_back(d_h, a, in_dims) for (a, _), d_h in zip(factors, d_hidden, strict=True))

  def merged(d_out, d_hidden, w, factors):
    return contract_back(d_out, _with_change(w, factors, scales, in_dims), in_dims)

  if _pays_to_merge(x, w, factors, in_dims):
    d_x = jax.lax.platform_dependent(d_out, d_hidden, w, factors, cpu=merged, default=beside)
  else:
    d_x = beside(d_out, d_hidden, w, factors)
  return d_x, None if trains is None else weight_gradient(x, d_out, in_dims, layout), d_factors


_low_rank.defvjp(_low_rank_fwd, _low_rank_bwd, symbolic_zeros=True)


@struct.dataclass
class Adapted(Weight):
  """A frozen weight with adapters, which multiply beside it: x W + scale (x a) b for each.

  base: an array or another Weight.  With DoRA the frozen part sees no dropout, the low-rank part does.
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
  """Returns a fresh adapter, which changes nothing yet: a is uniform within 1 / sqrt(fan-in), b zero.

  spec: AdapterSpec.  params: what it is for; DoRA's magnitudes begin as their norms (arXiv:2402.09353, eq. 5).
  Raises ConfigError when a target matches nothing.
  """
  adapter = {}
  for path, w in find_targets(params, spec.targets).items():
    in_dims, out_dims = matrix_axes(path)
    split = w.ndim - out_dims
    batch, inner, outer = w.shape[:split - in_dims], w.shape[split - in_dims:split], w.shape[split:]
    fan_in = 1
    for size in inner:
      fan_in *= size
    made = jax.random.uniform(_fold(key, path), (*batch, *inner, spec.rank), jnp.float32, -1, 1) / fan_in**0.5
    factors = {'a': made.astype(dtype), 'b': jnp.zeros((*batch, spec.rank, *outer), dtype)}
    if spec.kind == 'dora':
      axes = tuple(range(len(batch), split))
      factors['magnitude'] = jnp.sqrt(jnp.sum(jnp.square(dense(w).astype(jnp.float32)), axis=axes))
    place(adapter, path, factors)
  return adapter


def adapter_names(spec, names):
  """Returns the logical names of the arrays of an adapter.  names: those of the parameters."""
  adapter = {}
  for path, axes in find_targets(names, spec.targets).items():
    in_dims, out_dims = matrix_axes(path)
    split = len(axes) - out_dims
    factors = {'a': (*axes[:split], 'rank'), 'b': (*axes[:split - in_dims], 'rank', *axes[split:])}
    if spec.kind == 'dora':
      factors['magnitude'] = (*axes[:split - in_dims], *axes[split:])
    place(adapter, path, factors)
  return adapter


def combine(base, adapters, specs, *, key=None, active=None, weights=None):
  """Returns parameters for the model: `base` with the adapters in their places.

  adapters: {name: adapter}.  specs: {name: AdapterSpec}.  key: of the dropout; None for none.  active: the
  names that are switched on; None: all.  weights: {name: what its part is multiplied with}, 1 by default.
  Where no active adapter is, the base's own leaf is, so that with none active the result is the base itself.
  """
  active, weights = adapters if active is None else active, weights or {}
  if unknown := [name for name in (*active, *weights) if name not in adapters]:
    raise ConfigError([f'there is no adapter {unknown[0]!r}; there are {", ".join(adapters) or "none"}'])

  def one(path, w):
    path, factors = path_text(path), []
    for name in adapters:
      found = find(adapters[name], path) if name in active else None
      if isinstance(found, dict) and 'a' in found:
        spec = specs[name]
        layer_keys = None
        if key is not None and spec.dropout:
          _require_product(path, w)
          layer_keys = _fold(key, f'{name}/{path}')
          if w.ndim > sum(matrix_axes(path)):
            layer_keys = jax.random.split(layer_keys, w.shape[0])
          layer_keys = jax.random.key_data(layer_keys)
        factors.append(Factors(found['a'], found['b'], found.get('magnitude'), layer_keys, scale=spec.scale,
                               weight=float(weights.get(name, 1.0)), dropout=spec.dropout))
    return Adapted(w, tuple(factors), matrix_axes(path)[0]) if factors else w

  return jax.tree_util.tree_map_with_path(one, base, is_leaf=is_weight)


def _require_product(path, w):
  """Raises ConfigError where a weight is no factor of `project`: then there is no input to drop features of."""
  if not path.startswith('blocks/') or w.ndim > 1 + sum(matrix_axes(path)):
    raise ConfigError([f'adapter.dropout cannot be had at {path}: embeddings, heads and experts add their adapters to '
                       'the weight; write adapter.dropout=0, or leave them out of adapter.targets'])


def merge(base, adapters, specs, *, active=None, weights=None):
  """Returns plain parameters that have the adapters in them; arguments as in `combine`.

  A quantised base is dequantised first: what comes out is what the adapters were trained on.
  """
  return jax.tree.map(dense, combine(base, adapters, specs, active=active, weights=weights), is_leaf=is_weight)


def unmerge(merged, adapters, specs, *, active=None, weights=None):
  """Returns the base of merged parameters, to rounding; arguments as in `combine`.

  Raises ConfigError for DoRA, whose merged weight no longer has the norm of its base.
  """
  active = adapters if active is None else active
  if scaled := [name for name in active if specs[name].kind == 'dora']:
    raise ConfigError([f'adapter {scaled[0]!r} is a dora, which cannot be taken out of merged weights: keep the base'])
  negative = {name: -(weights or {}).get(name, 1.0) for name in active}
  return merge(merged, adapters, specs, active=active, weights=negative)


def _fold(key, text):
  """Returns a key of its own for a path, whatever else is adapted."""
  return jax.random.fold_in(key, zlib.crc32(text.encode()))


def count(adapter):
  """Returns (arrays, values) of an adapter."""
  leaves = jax.tree.leaves(adapter)
  return len(leaves), sum(leaf.size for leaf in leaves)


__all__ = ['Adapted', 'Factors', 'adapter_names', 'combine', 'count', 'init_adapter', 'matrices', 'merge', 'unmerge']
