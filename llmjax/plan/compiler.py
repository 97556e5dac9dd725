"""Compiles programs for TPUs with libtpu, which needs no TPU, and caches the results."""

import contextlib
import dataclasses
import gzip
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import sys
import tempfile
import time

from llmjax.config import ConfigError
from llmjax.plan.memory import Tensor, parse_out_of_memory

# libtpu must neither query the metadata server of a TPU VM nor lock out other processes.
ENVIRONMENT = {'TPU_SKIP_MDS_QUERY': '1', 'JAX_PLATFORMS': 'cpu', 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
               'TPU_ACCELERATOR_TYPE': 'v5litepod-1', 'TPU_WORKER_HOSTNAMES': 'localhost', 'TPU_WORKER_ID': '0'}
PACKAGES = ('jax', 'jaxlib', 'libtpu')


class OutOfMemory(Exception):
  """The program does not fit into memory.  details: see `memory.parse_out_of_memory`."""

  def __init__(self, details):
    self.details = details
    super().__init__(f'{details["used"]} bytes of {details["limit"]}')


def versions():
  """Return the versions of the packages that determine a compiled program."""
  return {name: importlib.metadata.version(name) for name in PACKAGES}


def tpu_devices(topology):
  """Return the compile-only devices of a topology; the first call in a process loads libtpu."""
  os.environ.update({k: v for k, v in ENVIRONMENT.items() if k == 'JAX_PLATFORMS' or k not in os.environ})
  import jax
  if importlib.util.find_spec('libtpu') is None:
    raise ConfigError([f"libtpu is missing: pip install 'jax[tpu]=={jax.__version__}', or use --fast, which needs no "
                       'compiler'])
  logging.getLogger('jax._src').setLevel(logging.ERROR)
  from jax.experimental import topologies
  jax.config.update('jax_platforms', 'cpu')
  options = {'num_slices': topology.slices} if topology.slices > 1 else {}
  if topology.chip.name == 'v4':  # Its two cores form one device, as on Cloud TPUs.
    options['chip_config_name'] = 'megacore'
  try:
    with captured_stderr():
      return topologies.get_topology_desc(platform='tpu', topology_name=topology.name, **options).devices
  except Exception as e:  # libtpu raises several types for a name that it does not know.
    raise ConfigError([f'--topology={topology.name}: libtpu has no such slice '
                       f'({str(e).splitlines()[0][:200]})']) from e


@contextlib.contextmanager
def captured_stderr():
  """Redirect file descriptor 2, to which C++ code writes; yield a list that holds the lines after the block."""
  lines = []
  sys.stderr.flush()
  saved = os.dup(2)
  with tempfile.TemporaryFile() as file:
    os.dup2(file.fileno(), 2)
    try:
      yield lines
    finally:
      os.dup2(saved, 2)
      os.close(saved)
      file.seek(0)
      lines.extend(file.read().decode(errors='replace').splitlines())


def compile_text(lowered):
  """Return (HLO text, memory in bytes, seconds) of a lowered program; raise OutOfMemory."""
  start = time.perf_counter()
  try:
    with captured_stderr():
      compiled = lowered.compile()
  except Exception as e:
    if details := parse_out_of_memory(str(e)):
      raise OutOfMemory(details) from e
    raise
  stats = compiled.memory_analysis()
  memory = {'arguments': stats.argument_size_in_bytes, 'output': stats.output_size_in_bytes,
            'alias': stats.alias_size_in_bytes, 'temp': stats.temp_size_in_bytes,
            'code': stats.generated_code_size_in_bytes}
  return compiled.as_text(), memory, time.perf_counter() - start


def compile_cached(lowered, mesh, topology, folder):
  """Return `compile_text(lowered)`, read from the cache folder if the same program was compiled before.

  The key is the StableHLO text, the chips, the mesh sizes (a MeshSpec), and the versions of JAX and libtpu.
  """
  parts = [lowered.as_text(), topology.name, str(topology.slices), str(sorted(vars(mesh).items())),
           *versions().values()]
  file = folder / f'{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()}.json.gz'
  if file.exists():
    cached = json.loads(gzip.decompress(file.read_bytes()))
    if 'used' in cached:
      cached['allocations'] = [Tensor(**a) for a in cached['allocations']]
      raise OutOfMemory(cached)
    return cached['text'], cached['memory'], cached['seconds']
  try:
    text, memory, seconds = compile_text(lowered)
  except OutOfMemory as e:
    write_cache(file, {**e.details, 'allocations': [dataclasses.asdict(a) for a in e.details['allocations']]})
    raise
  write_cache(file, {'text': text, 'memory': memory, 'seconds': seconds})
  return text, memory, seconds


def write_cache(file, content):
  """Write gzipped JSON; a failure is only reported."""
  try:
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(f'.{os.getpid()}')  # Another process must never read a partial file.
    temporary.write_bytes(gzip.compress(json.dumps(content).encode()))
    temporary.replace(file)
  except OSError as e:
    print(f'cannot cache the compiled program: {e}', file=sys.stderr)
