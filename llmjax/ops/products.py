"""All matrix products of activations and weights."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from llmjax.ops.hints import materialize, transpose_in_memory

# On CPUs, an output narrower than the input by this factor is transposed instead of the input.
NARROW = 4


class Weight:
  """Base class of pytrees that replace a parameter: adapters and quantized weights (adapt/).

  Subclasses have the `shape`, `ndim` and `dtype` of the array that they represent, and may have leading axes, which a
  scan over layers or a vmap removes.
  """

  def astype(self, dtype):
    """Return the weight with products and `dense` of this dtype."""
    raise NotImplementedError

  def dense(self):
    """Return the array that it represents."""
    raise NotImplementedError

  def all_gather(self, layout):
    """Return `dense`, gathered over the mesh.  layout: see `project`; None: no gather."""
    raise NotImplementedError

  def product(self, x, in_dims, layout):
    """Compute `project`."""
    return multiply(x, self.astype(x.dtype), in_dims, layout)


def is_weight(x):
  """Return whether x is a Weight: for `jax.tree.map(..., is_leaf=is_weight)`."""
  return isinstance(x, Weight)


def dense(w):
  """Return the array that a parameter represents."""
  return w.dense() if is_weight(w) else w


def project(x, w, in_dims=1, layout=None):
  """Multiply the last `in_dims` axes of x with the first of w: [..., *in] x [*in, *out].

  w: an array or a Weight, used in x's dtype.  The result has x's dtype; sums inside the product are at least float32 on
  every platform.  layout: sharding of the weight on a mesh, with the `names` of its axes and methods `all_gather(w)`
  and `reduce_scatter(gradient)`, or None; forward and backward pass both gather it, so that no gathered weight is
  saved.  If `layout.join_gradients`, a TPU's backward pass computes both gradients before it uses one, which frees
  their inputs early; otherwise the compiler delays the weight's gradient to hide communication.  Gradients of what is
  not differentiated are not computed, and their inputs are not saved.  Raises TypeError if the shapes do not match.
  """
  if is_weight(w):
    return w.product(x, in_dims, layout)
  return multiply(x, w.astype(x.dtype), in_dims, layout)


def multiply(x, w, in_dims=1, layout=None):
  """Compute `project` for an array, or a Weight that is dense after `all_gather`, of x's dtype."""
  return _product(in_dims, layout, x, w)


def all_gather(w, layout):
  """Return a weight (an array or a Weight) as an array, gathered over the mesh.  layout: see `project`."""
  if is_weight(w):
    return w.all_gather(layout)
  return w if layout is None else layout.all_gather(w)


def contract(x, w, in_dims):
  """Return the product of x's last `in_dims` axes with the first of an array w."""
  return jax.lax.dot_general(x, w, ((range(x.ndim - in_dims, x.ndim), range(in_dims)), ((), ())))


def contract_back(d_out, w, in_dims):
  """Return the gradient of `contract` for x."""
  out_dims = w.ndim - in_dims
  return jax.lax.dot_general(d_out, w, ((range(d_out.ndim - out_dims, d_out.ndim), range(in_dims, w.ndim)), ((), ())))


def weight_gradient(x, d_out, in_dims, layout=None):
  """Return the gradient of `contract` for w, sharded as w is."""
  d_w = jax.lax.platform_dependent(x, d_out, cpu=functools.partial(_weight_gradient_cpu, in_dims),
                                   default=functools.partial(_weight_gradient, in_dims))
  return d_w if layout is None else layout.reduce_scatter(d_w)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(in_dims, layout, x, w):
  return contract(x, all_gather(w, layout), in_dims)


def _product_fwd(in_dims, layout, x, w):
  """x, w: trees of CustomVJPPrimal, which say whether they are differentiated."""
  needed = [is_differentiated(a) for a in (x, w)]
  x, w = values(x), values(w)
  # The plain product, not `_product` again: remat policies must see a matrix product.
  y = contract(x, all_gather(w, layout), in_dims)
  # Each gradient needs the other factor.  A factor replaced by None is not saved.
  return y, (x if needed[1] else None, w if needed[0] else None)


def is_differentiated(tree):
  """Return whether any array of a tree is differentiated; a tree that a custom_vjp rule with symbolic zeros gets."""
  return any(leaf.perturbed for leaf in jax.tree.leaves(tree))


def values(tree):
  """Return the arrays of such a tree."""
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
  """Compute `_weight_gradient` with x transposed in memory.

  XLA's CPU backend has two matrix products; the faster one needs a left factor that is summed over its last axis only.
  It takes 20 to 30% less time on 512-wide layers, the transpose included.
  """
  rows, row_axes = x.ndim - in_dims, range(x.ndim - in_dims)
  transposed = lambda m: transpose_in_memory(m, (*range(rows, m.ndim), *row_axes))
  out_dims = d_out.ndim - rows
  if NARROW * math.prod(d_out.shape[rows:]) <= math.prod(x.shape[rows:]):
    # A narrow output, as of an adapter's A: transposing it, and the narrow result back, moves fewer bytes.
    back = jax.lax.dot_general(transposed(d_out), x, ((range(out_dims, d_out.ndim), row_axes), ((), ())))
    return jnp.moveaxis(back, range(out_dims), range(in_dims, in_dims + out_dims))
  return jax.lax.dot_general(transposed(x), d_out, ((range(in_dims, x.ndim), row_axes), ((), ())))
