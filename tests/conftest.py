"""Tests run on eight emulated CPU devices and touch none of the user's caches.

LLVM's optimisation and the fusion emitters are off: programs here are tiny, and compiling them takes most of the time.
What XLA computes is the same.  Programs that several tests or workers compile are compiled once.
"""

import importlib.metadata
import os
import pathlib
import tempfile

os.environ['JAX_PLATFORMS'] = 'cpu'
# On a busy machine eight devices may need longer to meet than the 40 seconds after which XLA aborts.
os.environ['XLA_FLAGS'] = (
    '--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 '
    '--xla_cpu_collective_call_terminate_timeout_seconds=600 --xla_cpu_collective_timeout_seconds=600')
if importlib.metadata.version('jax').startswith('0.10.'):  # Later ones do not know the flag.
  os.environ['XLA_FLAGS'] += ' --xla_cpu_use_fusion_emitters=false'
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
