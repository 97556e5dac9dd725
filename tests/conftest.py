"""Tests run on the CPU, with two emulated devices where a mesh is wanted and none of the user's caches."""

import os

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ.setdefault('XLA_FLAGS', '--xla_force_host_platform_device_count=8')
