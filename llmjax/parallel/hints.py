"""XLA scheduling hints: where a TPU should materialize an array instead of fusing what makes it.

XLA fuses elementwise work into the matrix products before and after it and repeats it for every tile.  Beyond a few
operations that takes longer than the product and one pass over memory.  No hint changes a value, and none does
anything on platforms other than TPU.
"""

import functools

import jax
import jax.numpy as jnp

from llmjax.parallel.chips import flops_per_byte
from llmjax.parallel.sharding import mesh_size


def materialize(arrays):
  """Returns the arrays behind an optimization barrier: each is written to memory before anything uses it."""
  return jax.lax.platform_dependent(arrays, tpu=jax.lax.optimization_barrier, default=lambda a: a)


@jax.custom_vjp
def materialize_gradient(x):
  """Returns x, whose gradient is materialized."""
  return x


materialize_gradient.defvjp(lambda x: (x, None), lambda _, g: (materialize(g),))


def has_fast_memory(flops=200):
  """Returns whether the chips of the mesh do fewer than so many FLOPs while they read a byte of memory.

  A v5p does 166, a v5e 241, a v6e 560.  By the compiler's cycles, materialized results pay for their passes over memory
  on a v5p, and joined gradients also on a v5e; both together cost 3 % of Llama 2 7B's step on a v5e and 13 % of
  Llama 3 8B's on a v6e.
  """
  found = flops_per_byte()
  return found is None or found < flops


def materialize_on_fast_memory(arrays):
  """Returns the arrays, materialized on fast memory."""
  return materialize(arrays) if has_fast_memory() else arrays


@jax.custom_vjp
def materialize_result(x):
  """Returns x, materialized on fast memory; its gradient is not."""
  return materialize_on_fast_memory(x)


materialize_result.defvjp(lambda x: (materialize_on_fast_memory(x), None), lambda _, g: (g,))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def fan_out(x, count):
  """Returns x once for each of `count` products; their gradients, materialized on fast memory, are added.

  Not along `tensor`: a materialized gradient is summed over it, each of its own.
  """
  return (x,) * count


fan_out.defvjp(lambda x, count: (fan_out(x, count), None),
               lambda count, _, gradients: (functools.reduce(
                   jnp.add, materialize_on_fast_memory(gradients) if mesh_size('tensor') == 1 else gradients),))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def gate_product(activation, gated, raised):
  """Returns activation(gated) * raised; it and both gradients are materialized."""
  return materialize(activation(gated) * raised)


def _gate_product_bwd(activation, residuals, d_hidden):
  pullback = jax.vjp(lambda g, r: activation(g) * r, *residuals)[1]
  return materialize(pullback(materialize(d_hidden)))


gate_product.defvjp(lambda activation, g, r: (gate_product(activation, g, r), (g, r)), _gate_product_bwd)
