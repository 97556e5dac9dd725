"""The one place where activations meet weights."""

import jax


def project(x, w, in_dims=1):
  """Returns the product of x's last `in_dims` axes with w's first: [..., *in] x [*in, *out].

  The weight is used in x's dtype and the result has it too; sums are at least float32 inside the
  product on every platform.  Raises TypeError when the shapes do not meet.
  """
  axes = tuple(range(x.ndim - in_dims, x.ndim)), tuple(range(in_dims))
  return jax.lax.dot_general(x, w.astype(x.dtype), (axes, ((), ())))
