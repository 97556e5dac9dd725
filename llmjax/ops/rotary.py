"""Rotary position embedding."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp


class RopeScaling(NamedTuple):
  """Longer wavelengths for sequences longer than `original_length`.

  kind: none; linear (arXiv:2306.15595, eq. 1); llama3 (arXiv:2407.21783, section 3.4.1, with the interpolation of the
  published code); yarn (arXiv:2309.00071, section 3.2 and 3.4).  factor: on the length.  low, high: llama3's frequency
  factors; YaRN's beta_slow and beta_fast, in rotations over the original length.
  """

  kind: str = 'none'
  factor: float = 1.0
  original_length: int = 8192
  low: float = 1.0
  high: float = 4.0


NO_SCALING = RopeScaling()


def rotary_frequencies(dim, theta, scaling=NO_SCALING):
  """Return (float32 [dim/2] radians per position, factor on cos and sin)."""
  frequencies = theta ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)
  if scaling.kind == 'none':
    return frequencies, 1.0
  if scaling.kind == 'linear':
    return frequencies / scaling.factor, 1.0
  if scaling.kind == 'llama3':
    rotations = scaling.original_length * frequencies / (2 * math.pi)
    keep = jnp.clip((rotations - scaling.low) / (scaling.high - scaling.low), 0.0, 1.0)
    return frequencies * (keep + (1 - keep) / scaling.factor), 1.0
  # YaRN: index of the feature with so many rotations over the original length; a linear ramp between two of them.
  index = lambda rotations: dim * math.log(scaling.original_length / (rotations * 2 * math.pi)) / (2 * math.log(theta))
  first, last = max(math.floor(index(scaling.high)), 0), min(math.ceil(index(scaling.low)), dim - 1)
  ramp = jnp.clip((jnp.arange(dim // 2) - first) / max(last - first, 1e-3), 0.0, 1.0)
  return frequencies * (1 - ramp + ramp / scaling.factor), 0.1 * math.log(scaling.factor) + 1.0


def rotary_angles(positions, dim, theta=10000.0, scaling=NO_SCALING):
  """Compute (cos, sin), each float32 [B, T, 1, dim/2], of the angles position * theta^(-2i/dim), scaled.

  positions: int [B, T].  dim: number of rotated features.  float32 throughout: bfloat16 keeps 8 significand bits, so
  positions past 256 would collide.  Source: RoFormer, arXiv:2104.09864, section 3.2.2.
  """
  frequencies, factor = rotary_frequencies(dim, theta, scaling)
  angles = positions.astype(jnp.float32)[..., None, None] * frequencies
  cos, sin = jnp.cos(angles), jnp.sin(angles)
  return (cos, sin) if factor == 1.0 else (factor * cos, factor * sin)


def apply_rope(x, angles):
  """Rotate the feature pairs (i, i + R/2) of x [B, T, N, H], the half-split form of Llama; return x's dtype.

  angles: (cos, sin) from `rotary_angles`, of the first R <= H features; the others are unchanged.
  """
  dim = 2 * angles[0].shape[-1]
  if dim == x.shape[-1]:
    return _rotate(x, angles)
  return jnp.concatenate([_rotate(x[..., :dim], angles), x[..., dim:]], axis=-1)


@jax.custom_vjp
def _rotate(x, angles):
  return jax.lax.platform_dependent(x, *angles, tpu=_rotate_by_product, default=_rotate_halves)


# The gradient is rotated back.
_rotate.defvjp(lambda x, angles: (_rotate(x, angles), angles),
               lambda angles, g: (_rotate(g, (angles[0], -angles[1])), None))


def _rotate_halves(x, cos, sin):
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
  return rotated.astype(x.dtype)


def _rotate_by_product(x, cos, sin):
  """Rotate with the halves exchanged by a product with a permutation matrix, which is exact.

  A TPU's vector unit is slow at moving features between lanes; its matrix unit is idle.  The compiler counts 0.7 M
  cycles for this and 1.9 M for `_rotate_halves` on [4, 4096, 32, 128] of a v5p.
  """
  wide = lambda a, b: jnp.concatenate([a, b], axis=-1)
  exchange = jnp.roll(jnp.eye(x.shape[-1], dtype=x.dtype), x.shape[-1] // 2, axis=0)
  exchanged = jax.lax.dot_general(x, exchange, (((x.ndim - 1,), (0,)), ((), ())),
                                  preferred_element_type=jnp.float32)
  return (x.astype(jnp.float32) * wide(cos, cos) + exchanged * wide(-sin, sin)).astype(x.dtype)
