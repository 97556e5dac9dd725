"""The one place where activations meet weights."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from llmjax.ops.hints import materialize, transpose_in_memory

# An output so many times narrower than the input is turned in the input's place.
NARROW = 4


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

  def all_gather(self, layout):
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
  methods `all_gather(w)` and `reduce_scatter(gradient)`; both passes all_gather it anew, so that no pass keeps what it
  fetched.  Where its `join_gradients` is true, a TPU's backward pass computes both gradients before it uses one:
  what they come from is then free; left alone, the compiler puts off the weight's for as long as that
  hides communication.  The gradient of a weight (of x) that is not differentiated is not computed, and what it would
  need is not kept.  Raises TypeError when the shapes do not meet.
  """
  if is_weight(w):
    return w.product(x, in_dims, layout)
  return multiply(x, w.astype(x.dtype), in_dims, layout)


def multiply(x, w, in_dims=1, layout=None):
  """Returns `project` of a w in x's dtype that needs no more than `all_gather`: an array or such a Weight."""
  return _product(in_dims, layout, x, w)


def all_gather(w, layout):
  """Returns a weight (an array or a Weight) as an array that a product takes.  layout: see `project`."""
  if is_weight(w):
    return w.all_gather(layout)
  return w if layout is None else layout.all_gather(w)


def contract(x, w, in_dims):
  """Returns the product of x's last `in_dims` axes with the first of an array w."""
  return jax.lax.dot_general(x, w, ((range(x.ndim - in_dims, x.ndim), range(in_dims)), ((), ())))


def contract_back(d_out, w, in_dims):
  """Returns the gradient of `contract` for x."""
  out_dims = w.ndim - in_dims
  return jax.lax.dot_general(d_out, w, ((range(d_out.ndim - out_dims, d_out.ndim), range(in_dims, w.ndim)), ((), ())))


def weight_gradient(x, d_out, in_dims, layout=None):
  """Returns the gradient of `contract` for w, given back to where the weight lies."""
  d_w = jax.lax.platform_dependent(x, d_out, cpu=functools.partial(_weight_gradient_cpu, in_dims),
                                   default=functools.partial(_weight_gradient, in_dims))
  return d_w if layout is None else layout.reduce_scatter(d_w)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(in_dims, layout, x, w):
  return contract(x, all_gather(w, layout), in_dims)


def _product_fwd(in_dims, layout, x, w):
  """x, w: trees of values that know whether they are differentiated."""
  needed = [is_differentiated(a) for a in (x, w)]
  x, w = values(x), values(w)
  # The plain product, not `_product` again: a rematerialization policy must see that it is a matrix product.
  y = contract(x, all_gather(w, layout), in_dims)
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
  d_x = None if w is None else contract_back(d_out, all_gather(w, layout), in_dims)
  d_w = None if x is None else weight_gradient(x, d_out, in_dims)
  if layout is not None and layout.join_gradients and x is not None and w is not None:
    d_x, d_w = materialize((d_x, d_w))
  return d_x, d_w if d_w is None or layout is None else layout.reduce_scatter(d_w)


_product.defvjp(_product_fwd, _product_bwd, symbolic_zeros=True)


def _weight_gradient(in_dims, x, d_out):
  rows = tuple(range(x.ndim - in_dims))
  return jax.lax.dot_general(x, d_out, ((rows, rows), ((), ())))


def _weight_gradient_cpu(in_dims, x, d_out):
  """The same with x transposed by hand; the barrier keeps XLA from folding the transpose back.

  XLA's CPU backend has two matrix products; the faster takes a left side that is summed over its last
  axis only.  It needs 20 to 30% less time on 512-wide layers, the transpose included.
  """
  rows, row_axes = x.ndim - in_dims, range(x.ndim - in_dims)
  transposed = lambda m: transpose_in_memory(m, (*range(rows, m.ndim), *row_axes))
  out_dims = d_out.ndim - rows
  if NARROW * math.prod(d_out.shape[rows:]) <= math.prod(x.shape[rows:]):
    # A narrow output, as of an adapter's A: to turn it, and the narrow result back, moves less.
    back = jax.lax.dot_general(transposed(d_out), x, ((range(out_dims, d_out.ndim), row_axes), ((), ())))
    return jnp.moveaxis(back, range(out_dims), range(in_dims, in_dims + out_dims))
  return jax.lax.dot_general(transposed(x), d_out, ((range(in_dims, x.ndim), row_axes), ((), ())))
