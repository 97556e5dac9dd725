"""Statistics under a mask."""

import jax
import jax.numpy as jnp


def masked_sum(x, mask):
  """Sum x in float32, weighted by the mask; NaN where the mask is 0 is ignored."""
  return jnp.sum(jnp.where(mask != 0, x.astype(jnp.float32) * mask, 0.0))


def masked_mean(x, mask):
  """Compute the float32 mean of x, weighted by the mask; 0 if the mask is 0 everywhere."""
  return masked_sum(x, mask) / jnp.maximum(jnp.sum(mask.astype(jnp.float32)), 1.0)


def masked_sums(metrics, mask):
  """Return the masked_sum of every entry of a dict, without gradient: the aux of a loss."""
  return {name: jax.lax.stop_gradient(masked_sum(x, mask)) for name, x in metrics.items()}
