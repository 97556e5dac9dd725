"""The one place where activations meet weights."""

import functools

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero


class Weight:
  """What may stand in a parameter's place: a pytree that knows how to multiply.

  Its subclasses (adapt/) hold a weight in another form than an array, or with additions.  They have the
  `shape`, `ndim` and `dtype` of the array that they stand for, and may have axes before it, which a scan
  over layers or a vmap takes away.
  """

  def astype(self, dtype):
    """Returns the same weight, whose products and `dense` have this dtype."""
    raise NotImplementedError

  def dense(self):
    """Returns the array that it stands for."""
    raise NotImplementedError

  def fetch(self, layout):
    """Returns `dense` as a product takes it.  layout: see `project`; None: as it lies."""
    raise NotImplementedError

  def product(self, x, in_dims, layout):
    """Returns what `project` is to return."""
    return multiply(x, self.astype(x.dtype), in_dims, layout)


def is_weight(x):
  """Returns whether x is a Weight: for `jax.tree.map(..., is_leaf=is_weight)`."""
  return isinstance(x, Weight)


def dense(w):
  """Returns the array that a parameter stands for."""
  return w.dense() if is_weight(w) else w


def project(x, w, in_dims=1, layout=None):
  """Returns the product of x's last `in_dims` axes with w's first: [..., *in] x [*in, *out].

  w: an array or a Weight.  It is used in x's dtype and the result has it too; sums are at least float32
  inside the product on every platform.  layout: how the weight lies on a mesh, with `names` of its axes and
  methods `fetch(w)` and `give_back(gradient)`; both passes fetch it anew, so that no pass keeps what it
  fetched.  Where its `at_once` is true, a TPU's backward pass computes both gradients before it uses one:
  what they come from is then free; left alone, the compiler puts off the weight's for as long as that
  hides communication.  The gradient of a weight (of x) that is not differentiated is not computed, and what it would
  need is not kept.  Raises TypeError when the shapes do not meet.
  """
  if is_weight(w):
    return w.product(x, in_dims, layout)
  return multiply(x, w.astype(x.dtype), in_dims, layout)


def multiply(x, w, in_dims=1, layout=None):
  """Returns `project` of a w in x's dtype that needs no more than `fetch`: an array or such a Weight."""
  return _product(in_dims, layout, x, w)


def _fetch(w, layout):
  if is_weight(w):
    return w.fetch(layout)
  return w if layout is None else layout.fetch(w)


def _forward(in_dims, layout, x, w):
  axes = tuple(range(x.ndim - in_dims, x.ndim)), tuple(range(in_dims))
  return jax.lax.dot_general(x, _fetch(w, layout), (axes, ((), ())))


_product = jax.custom_vjp(_forward, nondiff_argnums=(0, 1))


def _product_fwd(in_dims, layout, x, w):
  """x, w: trees of values that know whether they are differentiated."""
  needed = [is_differentiated(a) for a in (x, w)]
  x, w = values(x), values(w)
  # The plain product, not `_product` again: a rematerialization policy must see that it is a matrix product.
  y = _forward(in_dims, layout, x, w)
  # Each gradient needs the other's factor.  What lies behind None is never computed or kept.
  return y, (x if needed[1] else None, w if needed[0] else None)


def is_differentiated(tree):
  """Returns whether any array of a tree is, given to a custom_vjp rule with symbolic zeros."""
  return any(leaf.perturbed for leaf in jax.tree.leaves(tree))


def values(tree):
  """Returns the arrays of a tree that is given to such a rule."""
  return jax.tree.map(lambda leaf: leaf.value, tree)


def _product_bwd(in_dims, layout, residuals, d_out):
  x, w = residuals
  if isinstance(d_out, SymbolicZero):
    return None, None
  d_x = d_w = None
  if w is not None:
    w = _fetch(w, layout)
    out_dims = w.ndim - in_dims
    axes = tuple(range(d_out.ndim - out_dims, d_out.ndim)), tuple(range(in_dims, w.ndim))
    d_x = jax.lax.dot_general(d_out, w, (axes, ((), ())))
  if x is not None:
    d_w = jax.lax.platform_dependent(x, d_out, cpu=functools.partial(_weight_gradient_cpu, in_dims),
                                     default=functools.partial(_weight_gradient, in_dims))
    if d_x is not None and layout is not None and layout.at_once:
      d_x, d_w = jax.lax.platform_dependent(
          d_x, d_w, tpu=lambda *both: jax.lax.optimization_barrier(both), default=lambda *both: both)
    d_w = d_w if layout is None else layout.give_back(d_w)
  return d_x, d_w


def _weight_gradient(in_dims, x, d_out):
  rows = tuple(range(x.ndim - in_dims))
  return jax.lax.dot_general(x, d_out, ((rows, rows), ((), ())))


def _weight_gradient_cpu(in_dims, x, d_out):
  """The same with x transposed by hand; the barrier keeps XLA from folding the transpose back.

  XLA's CPU backend has two matrix products; the faster takes a left side that is summed over its last
  axis only.  It needs 20 to 30% less time on 512-wide layers, the transpose included.
  """
  rows = x.ndim - in_dims
  columns = jax.lax.optimization_barrier(jnp.moveaxis(x, range(rows), range(in_dims, x.ndim)))
  return jax.lax.dot_general(columns, d_out, ((range(in_dims, x.ndim), range(rows)), ((), ())))


_product.defvjp(_product_fwd, _product_bwd, symbolic_zeros=True)
