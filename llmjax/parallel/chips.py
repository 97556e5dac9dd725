"""Peak matrix-product rates of devices."""

import time

import jax
import jax.numpy as jnp
import numpy as np

# Dense bf16 FLOP/s of one JAX device, from the vendors' data sheets; matched by the start of
# `device_kind`.  A v2 or v3 device is a core, half a chip.
PEAK_FLOPS = {
    'TPU v2': 22.5e12,
    'TPU v3': 61.5e12,
    'TPU v4': 275e12,
    'TPU v5 lite': 197e12,
    'TPU v5e': 197e12,
    'TPU v5p': 459e12,
    'TPU v5': 459e12,
    'TPU v6 lite': 918e12,
    'TPU v6e': 918e12,
    'TPU7x': 1154e12,
    'NVIDIA A100': 312e12,
    'NVIDIA H100': 989e12,
    'NVIDIA H200': 989e12,
    'NVIDIA B200': 2250e12,
    'NVIDIA L4': 121e12,
    'NVIDIA GeForce RTX 4090': 165e12,
}


def peak_flops(device):
  """Returns a device's peak FLOP/s in bf16, or None for a kind that is not in the table.

  A CPU's is measured: a 2048^3 float32 product on all cores, the best of five (about a second).
  """
  if device.platform == 'cpu':
    # On one device: every device of a mesh that is set would do the same product beside it.
    with jax.set_mesh(jax.sharding.Mesh(np.array(jax.local_devices()[:1]), ('alone',))):
      return measure_matmul_flops() / len(jax.local_devices())
  for kind, flops in PEAK_FLOPS.items():
    if device.device_kind.startswith(kind):
      return flops
  return None


def measure_matmul_flops(size=2048, rounds=5):
  """Returns the best measured FLOP/s of a float32 [size, size] product."""
  x = jnp.ones((size, size), jnp.float32)
  product = jax.jit(jnp.matmul)
  product(x, x).block_until_ready()
  best = float('inf')
  for _ in range(rounds):
    start = time.perf_counter()
    product(x, x).block_until_ready()
    best = min(best, time.perf_counter() - start)
  return 2 * size**3 / best
