"""Device meshes, logical axis rules, and parallelism over devices and processes."""

import importlib.metadata
import os

# XLA flags that avoid crashes and deadlocks, mostly of emulated CPU devices.  Read when JAX creates its backend.
_FLAGS = os.environ.get('XLA_FLAGS', '')
# The pass aborts ("Invalid binary instruction opcode copy") on a bfloat16 sum inside a shard_map.  Another pass widens
# such sums, too.
_AVOIDED = {'xla_disable_hlo_passes': 'all-reduce-promotion'}
if importlib.metadata.version('jax').startswith('0.12.'):
  # Aborts ("Manual axes must be sorted by mesh axis index") on a shard_map over `data` inside one over `stage`.
  _AVOIDED['xla_enable_hlo_sharding_v3'] = 'false'
if 'xla_force_host_platform_device_count' in _FLAGS or 'JAX_NUM_CPU_DEVICES' in os.environ:
  # Lets two devices enter two collectives in different orders (a transfer between stages, and a gather in a stage's
  # conditional): a deadlock.  A single device is 10 to 15 % faster with it, and keeps it.
  _AVOIDED['xla_cpu_enable_concurrency_optimized_scheduler'] = 'false'
os.environ['XLA_FLAGS'] = ' '.join(
    [_FLAGS, *(f'--{name}={value}' for name, value in _AVOIDED.items() if name not in _FLAGS)]).strip()
