"""Device meshes, the table of logical axes, and what runs across devices."""

import os

# XLA's CPU backend aborts ("Invalid binary instruction opcode copy") where this pass meets a bfloat16 sum
# inside a shard_map.  It widens such sums, as another pass does as well.  Read when JAX makes its backend.
_FLAGS = os.environ.get('XLA_FLAGS', '')
if 'xla_disable_hlo_passes' not in _FLAGS:
  os.environ['XLA_FLAGS'] = f'{_FLAGS} --xla_disable_hlo_passes=all-reduce-promotion'.strip()
