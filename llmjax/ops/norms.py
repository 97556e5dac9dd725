"""Normalisation."""

import jax
import jax.numpy as jnp


def rms_norm(x, scale, epsilon=1e-5):
  """Returns x / sqrt(mean(x^2) + epsilon) * scale over the last axis (arXiv:1910.07467, eq. 4).

  x: [..., D].  scale: [D].  Statistics are float32 whatever x is; the result has x's dtype.
  """
  wide = x.astype(jnp.float32)
  inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + epsilon)
  return (wide * inverse * scale.astype(jnp.float32)).astype(x.dtype)
