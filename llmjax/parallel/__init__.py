"""Device meshes, the table of logical axes, and what runs across devices."""

import importlib.metadata
import os

# What XLA must not do, most of it the CPU backend, whose devices stand in for others.  Read when JAX makes its backend.
_FLAGS = os.environ.get('XLA_FLAGS', '')
# Aborts ("Invalid binary instruction opcode copy") where it meets a bfloat16 sum inside a shard_map.  It widens such
# sums, as another pass does as well.
_AVOIDED = {'xla_disable_hlo_passes': 'all-reduce-promotion'}
if importlib.metadata.version('jax').startswith('0.12.'):
  # Aborts ("Manual axes must be sorted by mesh axis index") where a shard_map over `data` lies inside one over `stage`.
  _AVOIDED['xla_enable_hlo_sharding_v3'] = 'false'
if 'xla_force_host_platform_device_count' in _FLAGS or 'JAX_NUM_CPU_DEVICES' in os.environ:
  # Lets two devices enter two collectives in different orders (a hand-over between stages, and a gather in a stage's
  # conditional), and each waits for the other for ever.  A lone device is 10 to 15 % faster with it, and keeps it.
  _AVOIDED['xla_cpu_enable_concurrency_optimized_scheduler'] = 'false'
os.environ['XLA_FLAGS'] = ' '.join(
    [_FLAGS, *(f'--{name}={value}' for name, value in _AVOIDED.items() if name not in _FLAGS)]).strip()
