"""Detects accelerators and package versions, and checks that JAX runs on the requested platform.

JAX is imported only inside functions, so that `llmjax doctor` can report on a machine where it does not start.
"""

import dataclasses
import glob
import importlib.metadata
import logging
import os
import pathlib

from llmjax.config import ConfigError

CORE = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'tensorflow-datasets',
        'array-record', 'sentencepiece', 'ml-collections', 'absl-py', 'numpy')
OPTIONAL = ('tensorboardX', 'libtpu', 'jax-cuda13-plugin', 'jax-cuda12-plugin',
            'jax-rocm7-plugin', 'tensorflow')
# TPU v3 to v7.  Listed one by one, because Google Cloud's network cards and disks have the same vendor ID.
TPU_PCI_DEVICES = ('0x0027', '0x005e', '0x0062', '0x0063', '0x006f', '0x0076')
INSTALL = {'gpu': "pip install -U -e '.[cuda]' in llmjax's checkout",
           'tpu': "pip install -U -e '.[tpu]' in llmjax's checkout"}
DRIVER_HINTS = {
    'gpu': 'run nvidia-smi: if it fails, install the NVIDIA driver (in a container, start it with --gpus all); if it '
           'works, check CUDA_VISIBLE_DEVICES and LD_LIBRARY_PATH, and look for another process that holds the memory',
    'tpu': 'run this on a Cloud TPU VM; on one, end other processes that hold the chips '
           '(sudo lsof -w /dev/accel* /dev/vfio/*), then check /tmp/tpu_logs'}


@dataclasses.dataclass
class Platforms:
  """The accelerators of a machine and the platform that JAX selected.

  versions: installed version of each CORE and OPTIONAL package, None if absent.  devices: device kinds by platform.
  default: platform JAX runs on.  error: why JAX failed to start.  warnings: what JAX logged meanwhile.
  gpu_present, tpu_present: whether the operating system shows one.  environment: environment variables.
  """

  versions: dict = dataclasses.field(default_factory=dict)
  devices: dict = dataclasses.field(default_factory=dict)
  default: str = ''
  error: str = ''
  warnings: list = dataclasses.field(default_factory=list)
  gpu_present: bool = False
  tpu_present: bool = False
  environment: dict = dataclasses.field(default_factory=dict)


def require_platform(name=''):
  """Start JAX and return its platform; raise ConfigError if it is not the requested one.

  name: cpu, gpu, tpu, or '' for the best available.  With '' a machine that has a GPU or TPU must not fall back to the
  CPU, unless the CPU was chosen explicitly.  Call this before creating arrays and, on several hosts, after
  `jax.distributed.initialize`, because it initializes the devices.
  """
  warnings = LogRecorder()
  logger = logging.getLogger('jax._src.xla_bridge')
  logger.addHandler(warnings)
  machine = Platforms(versions=installed_versions(), environment=dict(os.environ), **detect_accelerators())
  try:
    import jax
    if name == 'cpu':
      jax.config.update('jax_platforms', 'cpu')
    machine.default, machine.devices = jax.default_backend(), list_devices()
    # A program may choose the CPU through jax.config, as tests do; that is an explicit choice.
    if jax.config.jax_platforms:
      machine.environment['JAX_PLATFORMS'] = jax.config.jax_platforms
  except (RuntimeError, ImportError) as e:
    machine.error = f'{type(e).__name__}: {e}'
  finally:
    logger.removeHandler(warnings)
  machine.warnings = warnings.lines
  if problems := list(platform_problems(machine, name)):
    raise ConfigError([f'{problem}; {fix}' for problem, fix in problems])
  return machine.default


def platform_problems(machine, requested):
  """Yield (problem, fix) for a requested platform that is unusable, or an accelerator that is left idle."""
  chosen = machine.environment.get('JAX_PLATFORMS', '')
  plugins = {'gpu': [n for n, v in machine.versions.items() if v and n.startswith(('jax-cuda', 'jax-rocm'))],
             'tpu': ['libtpu'] if machine.versions.get('libtpu') else []}
  present = {'gpu': machine.gpu_present, 'tpu': machine.tpu_present}
  reason = machine.error or ' '.join(machine.warnings)
  suffix = f': {reason}' if reason else ''
  if machine.error and requested in ('', 'cpu'):
    yield f'JAX does not start: {machine.error}', _start_hint(machine.error, chosen)
  elif requested in ('gpu', 'tpu') and requested not in map(_family, machine.devices):
    label = requested.upper()
    if chosen and not machine.error and requested not in map(_family, chosen.split(',')):
      yield (f'a {label} was requested, but JAX_PLATFORMS={chosen} excludes it',
             f'unset JAX_PLATFORMS, or set it to {"cuda" if requested == "gpu" else "tpu"}')
    elif not plugins[requested]:
      yield f"a {label} was requested, but JAX's {label} plugin is not installed", INSTALL[requested]
    elif not present[requested]:
      yield (f'a {label} was requested and {plugins[requested][0]} is installed, but this machine shows no {label}',
             DRIVER_HINTS[requested])
    else:
      yield (f'a {label} was requested and is present, but JAX could not start it{suffix}', DRIVER_HINTS[requested])
  elif requested and _family(machine.default) != requested:
    yield (f'{requested} was requested, but JAX runs on {machine.default}',
           f'set JAX_PLATFORMS={"cuda" if requested == "gpu" else requested}')
  elif not requested and _family(machine.default) == 'cpu' and not chosen:
    for kind in ('gpu', 'tpu'):
      if present[kind]:
        yield (f'this machine has a {kind.upper()}, but JAX fell back to the CPU{suffix}',
               (DRIVER_HINTS if plugins[kind] else INSTALL)[kind] + ' (to use the CPU anyway: JAX_PLATFORMS=cpu)')


def _family(platform):
  return {'cuda': 'gpu', 'rocm': 'gpu'}.get(platform, platform)


def _start_hint(error, chosen):
  if 'XLA_FLAGS' in error:
    return 'remove the flag from XLA_FLAGS, or check its spelling for the installed XLA version'
  if 'did not respond' in error:
    return 'look for another process that holds the device, or set JAX_PLATFORMS=cpu to run without it'
  if chosen:
    return f'unset JAX_PLATFORMS={chosen}, or install the plugin that it needs'
  return 'pip install -U jax jaxlib (their versions must match); JAX_PLATFORMS=cpu skips plugins'


class LogRecorder(logging.Handler):
  """Logging handler that collects warnings in `lines`."""

  def __init__(self):
    super().__init__(logging.WARNING)
    self.lines = []

  def emit(self, record):
    self.lines.append(record.getMessage())


def installed_versions():
  """Return {package: version, or None if it is not installed} of the packages that llmjax uses."""
  versions = {}
  for name in (*CORE, *OPTIONAL):
    try:
      versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      versions[name] = None
  return versions


def list_devices():
  """Return {platform: [device kinds]} of JAX's default platform and of the CPU."""
  import jax
  try:
    cpus = jax.local_devices(backend='cpu')
  except RuntimeError:  # JAX_PLATFORMS=cuda excludes the CPU.
    cpus = []
  kinds = {}
  for device in [*jax.devices(), *cpus]:
    kinds.setdefault(device.platform, {})[device.id] = device.device_kind
  return {platform: list(by_id.values()) for platform, by_id in kinds.items()}


def detect_accelerators():
  """Return {'gpu_present', 'tpu_present'} as the operating system reports them, independent of JAX."""
  def is_tpu(path):
    try:
      return (pathlib.Path(path).read_text().strip() == '0x1ae0' and
              (pathlib.Path(path).parent / 'device').read_text().strip() in TPU_PCI_DEVICES)
    except OSError:
      return False
  return {'gpu_present': any(map(os.path.exists, ('/dev/nvidia0', '/dev/nvidiactl'))),
          'tpu_present': any(map(is_tpu, glob.glob('/sys/bus/pci/devices/*/vendor')))}


def accelerator_present():
  """Return whether the operating system shows a GPU or a TPU."""
  return any(detect_accelerators().values())


def available_cpus():
  """Return the number of CPUs that this process may use."""
  return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def cache_folder():
  """Return the default folder of compiled programs, in the user's cache directory."""
  if chosen := os.environ.get('JAX_COMPILATION_CACHE_DIR'):
    return pathlib.Path(chosen)
  base = os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'
  return pathlib.Path(base) / 'llmjax' / 'xla'
