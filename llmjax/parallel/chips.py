"""Table of accelerators, and peak matrix-product rates.  JAX is imported only where it is used."""

import dataclasses
import time

GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Chip:
  """A TPU generation, or a GPU in nodes with NVLink.  All numbers are per chip.

  name: as in `v5p:4x4x4`.  kinds: prefixes of JAX's `device_kind`.  devices: JAX devices per chip.  peak_flops: dense
  bfloat16 FLOP/s.  hbm: usable bytes of memory.  hbm_rate: bytes/s.  clock: Hz of the cores.  dims: dimensions of the
  torus.  link_rate: bytes/s of one link in one direction; there are two links per dimension.  wrap: a dimension whose
  size is a multiple of it is a ring, any other a line.  dcn_rate: bytes/s between slices or nodes.  watts: power under
  load, None if unpublished.  sources: of these numbers.
  """

  name: str
  kinds: tuple[str, ...]
  devices: int
  peak_flops: float
  hbm: int
  hbm_rate: float
  clock: float
  dims: int
  link_rate: float
  wrap: int
  dcn_rate: float
  watts: float | None
  sources: str

  @property
  def links(self):
    return 2 * self.dims

  @property
  def tpu(self):
    return self.kinds[0].startswith('TPU')


_DOCS = 'docs.cloud.google.com/tpu/docs/'
# Clocks follow from the peaks: peak / (2 x multipliers), 2 cores of 4 units of 128 x 128 (v4, v5p), 4 units (v5e),
# 4 times 256 x 256 each cycle (v6e), twice that (tpu7x).  Links: the documented bidirectional bytes/s of a chip over
# its links and two directions; v4's is documented in bits of one direction.  Memory: what libtpu's compiler says is
# available when a program is too large; of tpu7x the documented capacity.
TPUS = (
    Chip('v4', ('TPU v4',), 1, 275e12, int(30.5 * GIB), 1.228e12, 1.05e9, 3, 50e9, 4, 6.25e9, 170,
         f'{_DOCS}v4; watts: mean at work, arXiv:2304.01433, table 4'),
    Chip('v5e', ('TPU v5 lite', 'TPU v5e'), 1, 197e12, int(15.75 * GIB), 0.819e12, 1.5e9, 2, 50e9, 16, 3.125e9, None,
         f'{_DOCS}v5e'),
    Chip('v5p', ('TPU v5p', 'TPU v5'), 1, 459e12, int(95.74 * GIB), 2.765e12, 1.75e9, 3, 100e9, 4, 6.25e9, None,
         f'{_DOCS}v5p'),
    Chip('v6e', ('TPU v6 lite', 'TPU v6e'), 1, 918e12, int(31.25 * GIB), 1.638e12, 1.75e9, 2, 100e9, 16, 12.5e9, None,
         f'{_DOCS}v6e'),
    Chip('tpu7x', ('TPU7x',), 2, 2307e12, 192 * GIB, 7.38e12, 2.2e9, 3, 100e9, 4, 12.5e9, None,
         f'{_DOCS}tpu7x'),
)

# One dimension, a ring of any length: NVLink's switch lets every GPU of a node send at its full rate.
GPUS = (
    Chip('a100', ('NVIDIA A100',), 1, 312e12, 80 * 10**9, 2.039e12, 0.0, 1, 150e9, 1, 25e9, 400,
         'NVIDIA A100 80GB SXM data sheet; 200 Gb/s a GPU between nodes (DGX A100)'),
    Chip('h100', ('NVIDIA H100',), 1, 989e12, 80 * 10**9, 3.35e12, 0.0, 1, 225e9, 1, 50e9, 700,
         'NVIDIA H100 SXM data sheet; 400 Gb/s a GPU between nodes (DGX H100)'),
    Chip('h200', ('NVIDIA H200',), 1, 989e12, 141 * 10**9, 4.8e12, 0.0, 1, 225e9, 1, 50e9, 700,
         'NVIDIA H200 SXM data sheet; 400 Gb/s a GPU between nodes (DGX H200)'),
    Chip('b200', ('NVIDIA B200',), 1, 2250e12, 180 * 10**9, 8.0e12, 0.0, 1, 450e9, 1, 50e9, 1000,
         'NVIDIA DGX B200 data sheet; 400 Gb/s a GPU between nodes'),
)

# Dense bf16 FLOP/s of one JAX device, from the vendors' data sheets; matched by the start of
# `device_kind`.  A v2 or v3 device is a core, half a chip.
PEAK_FLOPS = {
    'TPU v2': 22.5e12,
    'TPU v3': 61.5e12,
    **{kind: chip.peak_flops / chip.devices for chip in (*TPUS, *GPUS) for kind in chip.kinds},
    'NVIDIA L4': 121e12,
    'NVIDIA GeForce RTX 4090': 165e12,
}


def peak_flops(device):
  """Return a device's peak bfloat16 FLOP/s, or None for a kind that is not in the table.

  That of a CPU is measured, in about a second: see `measure_matmul_flops`.
  """
  if device.platform == 'cpu':
    import jax
    import numpy as np
    # On one device: all devices of a mesh that is set would compute the product at the same time.
    with jax.set_mesh(jax.sharding.Mesh(np.array(jax.local_devices()[:1]), ('alone',))):
      return measure_matmul_flops() / len(jax.local_devices())
  for kind, flops in PEAK_FLOPS.items():
    if device.device_kind.startswith(kind):
      return flops
  return None


def has_fast_memory(max_flops_per_byte=200):
  """Return whether the mesh's chips do fewer FLOPs than this in the time that they read a byte of memory.

  True without a mesh and for chips that are not in the table.  A v5p does 166, a v5e 241, a v6e 560.  By the compiler's
  cycles, materialized results pay for their passes over memory on a v5p, and joined gradients also on a v5e; both
  together cost 3 % of Llama 2 7B's step on a v5e and 13 % of Llama 3 8B's on a v6e.
  """
  import jax
  device = getattr(jax.sharding.get_abstract_mesh(), 'abstract_device', None)
  for chip in TPUS if device is not None else ():
    if device.device_kind.startswith(chip.kinds):
      return chip.peak_flops / chip.hbm_rate < max_flops_per_byte
  return True


def measure_matmul_flops(sizes=(512, 2048), seconds=0.5, clock=time.perf_counter):
  """Measure the best FLOP/s of float32 [size, size] products, repeating each size for `seconds`.

  Other processes can only slow a product down, so the best one counts.  A small product ends before the system gives
  its cores to another process: with 20 processes on 2 cores, 512 gave 78 to 152 GFLOP/s and 2048 gave 7 to 19.  A large
  one uses many cores.
  """
  import jax
  import jax.numpy as jnp
  product, best = jax.jit(jnp.matmul), 0.0
  for size in sizes:
    x = jnp.ones((size, size), jnp.float32)
    product(x, x).block_until_ready()
    end = clock() + seconds
    while True:
      start = clock()
      product(x, x).block_until_ready()
      now = clock()
      best = max(best, 2 * size**3 / (now - start))
      if now >= end:
        break
  return best
