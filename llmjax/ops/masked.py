"""Statistics over the places where a mask is on."""

import jax.numpy as jnp


def masked_sum(x, mask):
  """Returns the float32 sum of x where mask is nonzero, weighted by it.  Masked NaN stays out."""
  return jnp.sum(jnp.where(mask != 0, x.astype(jnp.float32) * mask, 0.0))


def masked_mean(x, mask):
  """Returns the float32 weighted mean of x under mask; 0 where nothing is unmasked."""
  return masked_sum(x, mask) / jnp.maximum(jnp.sum(mask.astype(jnp.float32)), 1.0)
