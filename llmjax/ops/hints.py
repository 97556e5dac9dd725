"""XLA scheduling hints: where an array is written to memory instead of being fused with what uses it.

XLA fuses elementwise operations into the matrix products around them and recomputes them for every tile.  Beyond a few
operations, that takes longer than the product and one pass over memory.  No hint changes a value.  Except for
`transpose_in_memory`, hints act on TPUs alone.
"""

import functools

import jax
import jax.numpy as jnp


def materialize(arrays):
  """Put a tree of arrays behind an optimization barrier: all are in memory before anything uses one of them."""
  return jax.lax.platform_dependent(arrays, tpu=jax.lax.optimization_barrier, default=lambda a: a)


@jax.custom_vjp
def materialize_gradient(x):
  """Return x; its gradient is materialized."""
  return x


materialize_gradient.defvjp(lambda x: (x, None), lambda _, g: (materialize(g),))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def materialize_result(x, enabled):
  """Return x, materialized if `enabled`; its gradient is not."""
  return materialize(x) if enabled else x


materialize_result.defvjp(lambda x, enabled: (materialize_result(x, enabled), None), lambda enabled, _, g: (g,))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def fan_out(x, count, enabled):
  """Return x `count` times, once for each product that uses it; if `enabled`, their gradients are materialized.

  Leave it off where a gradient is summed over devices: each materialized one has a sum of its own.
  """
  return (x,) * count


fan_out.defvjp(lambda x, count, enabled: (fan_out(x, count, enabled), None),
               lambda count, enabled, _, gradients: (functools.reduce(
                   jnp.add, materialize(gradients) if enabled else gradients),))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def gate_product(activation, gate, up):
  """Return activation(gate) * up; the result and both gradients are materialized."""
  return materialize(activation(gate) * up)


def _gate_product_bwd(activation, residuals, d_hidden):
  pullback = jax.vjp(lambda gate, up: activation(gate) * up, *residuals)[1]
  return materialize(pullback(materialize(d_hidden)))


gate_product.defvjp(lambda activation, gate, up: (gate_product(activation, gate, up), (gate, up)), _gate_product_bwd)


def transpose_in_memory(x, axes):
  """Return x with its axes permuted, in memory: the transpose is not fused into the product that follows.

  XLA's CPU backend has a fast matrix product for a left factor that is summed over its last axis alone, and a slow one
  for all others.
  """
  return jax.lax.optimization_barrier(x.transpose(axes))
