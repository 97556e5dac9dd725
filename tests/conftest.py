"""Tests run on eight emulated CPU devices and touch none of the user's caches.

LLMJAX_TEST_PLATFORM=cuda (or tpu) runs them on the machine's own devices instead, with float32 products in full
precision, as on a CPU; LLMJAX_TEST_DEVICES is the number of emulated CPU devices, 8 by default.  A test that is marked
`devices(n)` is skipped where there are fewer.

On CPUs LLVM's optimisation and the fusion emitters are off: programs here are tiny, and compiling them takes most of
the time.  What XLA computes is the same.  Programs that several tests or workers compile are compiled once.
"""

import importlib.metadata
import os
import pathlib
import tempfile

import pytest

PLATFORM = os.environ.get('LLMJAX_TEST_PLATFORM', 'cpu')
if PLATFORM == 'cpu':
  os.environ['JAX_PLATFORMS'] = 'cpu'
  # On a busy machine eight devices may need longer to meet than the 40 seconds after which XLA aborts.
  os.environ['XLA_FLAGS'] = (
      f'--xla_force_host_platform_device_count={os.environ.get("LLMJAX_TEST_DEVICES", "8")} '
      '--xla_backend_optimization_level=0 '
      '--xla_cpu_collective_call_terminate_timeout_seconds=600 --xla_cpu_collective_timeout_seconds=600')
  if importlib.metadata.version('jax').startswith('0.10.'):  # Later ones do not know the flag.
    os.environ['XLA_FLAGS'] += ' --xla_cpu_use_fusion_emitters=false'
else:
  os.environ['JAX_PLATFORMS'] = f'{PLATFORM},cpu'
  # A GPU rounds the factors of float32 products to 10 bits (TF32) and a TPU to 7 (bfloat16); bounds assume 23.
  os.environ['JAX_DEFAULT_MATMUL_PRECISION'] = 'highest'
  # Some tests compare two programs bit by bit: both must run the same kernels, with sums in one order.
  os.environ['XLA_FLAGS'] = '--xla_gpu_deterministic_ops=true --xla_gpu_autotune_level=0'
  os.environ['XLA_PYTHON_CLIENT_PREALLOCATE'] = 'false'  # Several workers share a GPU.
# One folder for all of pytest-xdist's workers; the first process of a test run names it.
_CACHE = os.environ.setdefault(
    'LLMJAX_TEST_CACHE', tempfile.mkdtemp(prefix='llmjax-tests-'))
os.environ['JAX_COMPILATION_CACHE_DIR'] = str(pathlib.Path(_CACHE) / 'xla')
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0.2'
os.environ['JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES'] = '0'


def pytest_unconfigure(config):
  """Removes the shared cache when the process that made it ends."""
  import shutil
  if not hasattr(config, 'workerinput'):
    shutil.rmtree(_CACHE, ignore_errors=True)


def pytest_runtest_setup(item):
  """Skips a test that needs more devices than there are."""
  wanted = max((mark.args[0] for mark in item.iter_markers('devices')), default=1)
  if wanted > 1:
    import jax
    if wanted > jax.device_count():
      pytest.skip(f'needs {wanted} devices, this machine has {jax.device_count()}')
