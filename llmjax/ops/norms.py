"""Normalization."""

import jax
import jax.numpy as jnp


def rms_norm(x, scale, epsilon=1e-5):
  """Compute x / sqrt(mean(x^2) + epsilon) * scale over the last axis (arXiv:1910.07467, eq. 4).

  x: [..., D].  scale: [D].  Statistics are float32; the result has x's dtype.
  """
  wide = x.astype(jnp.float32)
  inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + epsilon)
  return (wide * inverse * scale.astype(jnp.float32)).astype(x.dtype)


def layer_norm(x, scale, bias, epsilon=1e-5):
  """Compute (x - mean) / sqrt(var + epsilon) * scale + bias over the last axis (arXiv:1607.06450, eq. 4).

  x: [..., D].  scale, bias: [D].  Statistics are float32; the result has x's dtype.
  """
  wide = x.astype(jnp.float32)
  wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
  inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + epsilon)
  return (wide * inverse * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)
