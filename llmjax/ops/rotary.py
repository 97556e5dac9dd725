"""Rotary position embedding."""

import jax.numpy as jnp


def rotary_angles(positions, head_dim, theta=10000.0):
  """Returns (cos, sin), each float32 [B, T, 1, H/2], of the angles position * theta^(-2i/H).

  positions: int [B, T].  float32 throughout: bf16 keeps 8 significand bits, so positions past 256
  would collide.  Source: RoFormer, arXiv:2104.09864, section 3.2.2.
  """
  frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
  angles = positions.astype(jnp.float32)[..., None, None] * frequencies
  return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x, angles):
  """Returns x with feature i turned together with feature i + H/2 (the half-split form of Llama).

  x: [B, T, N, H].  angles: (cos, sin) from `rotary_angles`.  The result has x's dtype.
  """
  cos, sin = angles
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
  return turned.astype(x.dtype)
