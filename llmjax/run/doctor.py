"""`llmjax doctor`: what this machine has, what is wrong with it, and what to do about that.

JAX is tried in a process of its own: a wrong XLA_FLAGS aborts the process that reads it, and a
driver can hang, and both must end in a sentence.  `require_platform` judges the same for a run.
"""

import dataclasses
import glob
import importlib
import importlib.metadata
import json
import logging
import os
import pathlib
import platform as host
import re
import shutil
import subprocess
import sys
import warnings

from llmjax.config import ConfigError
from llmjax.run.progress import format_bytes

CORE = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'tensorflow-datasets',
        'array-record', 'sentencepiece', 'ml-collections', 'absl-py', 'numpy')
OPTIONAL = ('tensorboardX', 'libtpu', 'jax-cuda13-plugin', 'jax-cuda12-plugin',
            'jax-rocm7-plugin', 'tensorflow')
# What a training process imports; TensorFlow must come with none of it.
TRAINING_MODULES = ('jax', 'flax.linen', 'optax', 'orbax.checkpoint', 'grain.python',
                    'tensorflow_datasets', 'sentencepiece', 'tensorboardX')
PYTHONS = ((3, 11), (3, 13))
PROBE_SECONDS = 120  # A start from a cold disk takes 20 s; libtpu may look around for a minute.
MIN_MEMORY, MIN_DISK = 1.5e9, 2e9  # Bytes that the quickstart takes, with room to spare.
SHOWN_VARIABLES = re.compile(
    r'(JAX_|XLA_|LIBTPU_|TPU_|NCCL_).*|CUDA_VISIBLE_DEVICES|LD_LIBRARY_PATH|OMP_NUM_THREADS|'
    r'XDG_CACHE_HOME|TFDS_DATA_DIR|(https?|all|no)_proxy', re.IGNORECASE)
# TPU v3 to v7.  A list, for Google Cloud's network cards and disks are of the same vendor.
TPU_PCI_DEVICES = ('0x0027', '0x005e', '0x0062', '0x0063', '0x006f', '0x0076')
GPU_INSTALL = "pip install -U -e '.[cuda]' in llmjax's checkout"
TPU_INSTALL = "pip install -U -e '.[tpu]' in llmjax's checkout"


@dataclasses.dataclass
class Facts:
  """What was found.  Everything `find_problems` judges is here, so that tests can make it up."""

  versions: dict = dataclasses.field(default_factory=dict)  # Of CORE and OPTIONAL, None if absent.
  python: tuple = sys.version_info[:2]
  devices: dict = dataclasses.field(default_factory=dict)  # Platform -> [kind of each device].
  default: str = ''  # The platform JAX runs on.
  error: str = ''  # Why JAX did not start.
  complaints: list = dataclasses.field(default_factory=list)  # Warnings JAX logged.
  gpu_present: bool = False  # A device file of the NVIDIA driver.
  tpu_present: bool = False  # A Google chip on the PCI bus.
  environment: dict = dataclasses.field(default_factory=dict)
  memory: tuple = (None, None)  # Bytes: free, total; a container's limit counts.
  disk: tuple = (None, None)  # Bytes: free, total, where the command was started.
  cpus: int = 1  # That this process may use.
  cache: dict = dataclasses.field(default_factory=dict)  # path, bytes, files, writable.
  import_errors: dict = dataclasses.field(default_factory=dict)  # Module -> error.
  tensorflow_by: str = ''  # The module whose import brought TensorFlow in.


def run(spec, options):
  """Prints what was found and what is wrong; returns 1 if anything is, 0 if not."""
  del spec  # The command takes no recipe.
  facts = gather()
  print('\n'.join(describe(facts)))
  problems = find_problems(facts, options.platform)
  for what, fix in problems:
    print(f'\nWRONG  {what}\n  fix  {fix}')
  print(f'\n{len(problems)} problem{"s" if len(problems) > 1 else ""} found' if problems else
        '\nall is well')
  return 1 if problems else 0


def require_platform(name=''):
  """Returns the platform JAX runs on, having made sure that it is the one asked for.

  name: cpu, gpu, tpu, or '' for the best this machine has.  Raises ConfigError where JAX does not
  start, where the platform is absent, and where a GPU or TPU is present but JAX would run on the
  CPU without having been told to.  Call it before the first array is made, and on many hosts after
  `jax.distributed.initialize`, for it starts the devices.
  """
  complaints = _LogLines()
  logger = logging.getLogger('jax._src.xla_bridge')
  logger.addHandler(complaints)
  facts = Facts(versions=installed_versions(), environment=dict(os.environ), **_hardware())
  try:
    import jax
    if name == 'cpu':
      jax.config.update('jax_platforms', 'cpu')
    facts.default = jax.default_backend()
    facts.devices = _devices()
    # The program may have chosen the CPU itself, as tests do; that is no silent fall-back.
    if jax.config.jax_platforms:
      facts.environment['JAX_PLATFORMS'] = jax.config.jax_platforms
  except (RuntimeError, ImportError) as e:
    facts.error = f'{type(e).__name__}: {e}'
  finally:
    logger.removeHandler(complaints)
  facts.complaints = complaints.lines
  problems = list(_platform_problems(facts, name))
  if problems:
    raise ConfigError([f'{what}; {fix}' for what, fix in problems])
  return facts.default


def cache_folder():
  """Returns the default folder of compiled programs, in the user's cache directory."""
  if chosen := os.environ.get('JAX_COMPILATION_CACHE_DIR'):
    return pathlib.Path(chosen)
  base = os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'
  return pathlib.Path(base) / 'llmjax' / 'xla'


def gather():
  """Returns the Facts of this machine; takes a few seconds, for JAX is started once."""
  facts = Facts(versions=installed_versions(), environment=dict(os.environ), memory=_memory(),
                disk=_disk(), cpus=available_cpus(), cache=_cache(), **_hardware())
  package_parent = str(pathlib.Path(__file__).parents[2])
  path = os.pathsep.join(filter(None, [package_parent, os.environ.get('PYTHONPATH')]))
  try:
    done = subprocess.run(
        [sys.executable, '-m', 'llmjax.run.doctor'], capture_output=True, text=True,
        timeout=PROBE_SECONDS, check=False, env=os.environ | {'PYTHONPATH': path})
  except subprocess.TimeoutExpired:
    facts.error = f'JAX did not answer within {PROBE_SECONDS} s'
    return facts
  try:
    found = json.loads(done.stdout.splitlines()[-1])
  except (IndexError, ValueError):
    last = [line for line in done.stderr.splitlines() if line.strip()][-3:]
    facts.error = f'the process ended with status {done.returncode}: ' + ' | '.join(last)[-600:]
    return facts
  return dataclasses.replace(facts, **found)


def probe():
  """Returns the Facts that need JAX and the other libraries imported, as a dict for JSON."""
  complaints, errors, culprit = _LogLines(), {}, ''
  logging.getLogger('jax._src.xla_bridge').addHandler(complaints)
  devices, default, error = {}, '', ''
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')  # Other libraries' deprecations are not this machine's fault.
    try:
      import jax
      default, devices = jax.default_backend(), _devices()
    except Exception as e:  # Drivers and broken installs fail in their own ways; each is a finding.
      error = f'{type(e).__name__}: {e}'
    for module in TRAINING_MODULES:
      try:
        importlib.import_module(module)
      except Exception as e:  # As above.
        errors[module] = f'{type(e).__name__}: {e}'
      if not culprit and 'tensorflow' in sys.modules:
        culprit = module
  return {'devices': devices, 'default': default, 'error': error, 'complaints': complaints.lines,
          'import_errors': errors, 'tensorflow_by': culprit}


def describe(facts):
  """Yields the lines that say what was found."""
  def rows(title, entries):
    yield title
    for name, value in entries:
      yield f'  {name:<22}{value}'

  yield from rows('versions', [
      ('python', '.'.join(map(str, facts.python))),
      *((name, facts.versions.get(name) or 'not installed') for name in CORE),
      *((name, facts.versions[name]) for name in OPTIONAL if facts.versions.get(name))])
  devices = [(p + (' (in use)' if p == facts.default else ''),
              ', '.join(f'{kinds.count(k)} × {k}' for k in dict.fromkeys(kinds)))
             for p, kinds in facts.devices.items()]
  yield from rows('devices', devices or [('none', facts.error or 'JAX was not started')])
  size = lambda pair: ('unknown' if pair[0] is None else
                       f'{format_bytes(pair[0])} free of {format_bytes(pair[1])}')
  yield from rows('machine', [
      ('system', f'{host.system()} {host.machine()}'), ('CPUs usable', facts.cpus),
      ('memory', size(facts.memory)), ('disk here', size(facts.disk))])
  if facts.cache:
    yield from rows('compiled programs', [
        ('folder', facts.cache['path']),
        ('kept', f'{facts.cache["files"]} files, {format_bytes(facts.cache["bytes"])}')])
  yield from rows('TensorFlow at training time', [
      ('imported', f'yes, by {facts.tensorflow_by}' if facts.tensorflow_by else 'no')])
  shown = [(k, _mask(v)) for k, v in sorted(facts.environment.items())
           if SHOWN_VARIABLES.fullmatch(k)]
  yield from rows('environment variables', shown or [('none that matter', '')])


def find_problems(facts, platform=''):
  """Returns [(what is wrong, what to do)] of a machine that must offer the platform."""
  problems = []
  if not PYTHONS[0] <= facts.python <= PYTHONS[1]:
    problems.append(('Python {}.{} is not supported'.format(*facts.python),
                     'use Python 3.11, 3.12 or 3.13'))
  missing = [name for name in CORE if not facts.versions.get(name)]
  if missing:
    problems.append((f'not installed: {", ".join(missing)}', f'pip install {" ".join(missing)}'))
  for module, error in facts.import_errors.items():
    package = {'orbax': 'orbax-checkpoint', 'tensorflow_datasets': 'tensorflow-datasets'}.get(
        module.split('.')[0], module.split('.')[0])
    is_absent_mirror = package == 'tensorboardX' and 'No module' in error
    if package not in ('jax', *missing) and not is_absent_mirror:  # JAX's own error comes below.
      problems.append((f'importing {module} fails: {error}',
                       f'pip install --force-reinstall {package}'))
  problems += _version_problems(facts.versions)
  if not {'jax', 'jaxlib'} & set(missing):
    problems += _platform_problems(facts, platform)
  if facts.tensorflow_by:
    problems.append((f'importing {facts.tensorflow_by} brings in TensorFlow, which is slow to '
                     'start and takes the memory of GPUs for itself', 'pip uninstall tensorflow'))
  if facts.memory[0] is not None and facts.memory[0] < MIN_MEMORY:
    problems.append((f'only {format_bytes(facts.memory[0])} of memory is free; the quickstart '
                     f'needs {format_bytes(MIN_MEMORY)}',
                     'end other programs, or lower train.batch_size'))
  if facts.disk[0] is not None and facts.disk[0] < MIN_DISK:
    problems.append((f'only {format_bytes(facts.disk[0])} of disk is free here; checkpoints need '
                     f'{format_bytes(MIN_DISK)}',
                     'free some, or choose a --workdir on another disk'))
  if facts.cache and not facts.cache['writable']:
    problems.append((f'compiled programs cannot be kept in {facts.cache["path"]}',
                     'make the folder writable, or set JAX_COMPILATION_CACHE_DIR to one that is'))
  return problems


def _version_problems(versions):
  cuda = {n: v for n, v in versions.items() if v and n.startswith('jax-cuda')}
  if len(cuda) > 1:
    yield (f'two CUDA plugins are installed: {", ".join(sorted(cuda))}',
           'pip uninstall the one that your driver does not support (12: driver 525 or later, '
           '13: driver 580 or later)')
  for name, version in cuda.items():
    if _series(version) != _series(versions.get('jaxlib')):
      yield (f'{name} {version} does not belong to jaxlib {versions.get("jaxlib")}', GPU_INSTALL)


def _series(version):
  return (version or '').split('.')[:3]


def _platform_problems(facts, asked):
  """Yields (what, fix) about the platform asked for, or about one that is left unused."""
  chosen = facts.environment.get('JAX_PLATFORMS', '')
  installed = {'gpu': [n for n, v in facts.versions.items()
                       if v and n.startswith(('jax-cuda', 'jax-rocm'))],
               'tpu': ['libtpu'] if facts.versions.get('libtpu') else []}
  present = {'gpu': facts.gpu_present, 'tpu': facts.tpu_present}
  install = {'gpu': GPU_INSTALL, 'tpu': TPU_INSTALL}
  available = {_family(p) for p in facts.devices}
  reason = facts.error or ' '.join(facts.complaints)
  if facts.error and asked in ('', 'cpu'):
    yield (f'JAX does not start: {facts.error}', _start_hint(facts.error, chosen))
    return
  if asked in ('gpu', 'tpu') and asked not in available:
    label = asked.upper()
    if chosen and not facts.error and asked not in map(_family, chosen.split(',')):
      yield (f'a {label} was asked for, but JAX_PLATFORMS={chosen} keeps JAX from it',
             f'unset JAX_PLATFORMS, or set it to {"cuda" if asked == "gpu" else "tpu"}')
    elif not installed[asked]:
      yield (f"a {label} was asked for, but JAX's {label} plugin is not installed", install[asked])
    elif not present[asked]:
      yield (f'a {label} was asked for, and {installed[asked][0]} is installed, but this machine '
             f'shows no {label}', _driver_hint(asked))
    else:
      yield (f'a {label} was asked for and is in this machine, but JAX could not start it'
             + (f': {reason}' if reason else ''), _driver_hint(asked))
  elif asked and _family(facts.default) != asked:
    yield (f'{asked} was asked for, but JAX runs on {facts.default}',
           f'set JAX_PLATFORMS={"cuda" if asked == "gpu" else asked}')
  elif not asked and _family(facts.default) == 'cpu' and not chosen:
    for kind in ('gpu', 'tpu'):
      if present[kind]:
        yield (f'a {kind.upper()} is in this machine, but JAX fell back to the CPU'
               + (f': {reason}' if reason else ''),
               (_driver_hint(kind) if installed[kind] else install[kind])
               + ' (or choose the CPU yourself: JAX_PLATFORMS=cpu)')


def _family(platform):
  return {'cuda': 'gpu', 'rocm': 'gpu'}.get(platform, platform)


def _start_hint(error, chosen):
  if 'XLA_FLAGS' in error:
    return 'remove the flag from XLA_FLAGS, or spell it as this version of XLA does'
  if 'did not answer' in error:
    return 'look for another process that holds the device; JAX_PLATFORMS=cpu goes without it'
  if chosen:
    return f'unset JAX_PLATFORMS={chosen}, or install what it asks for'
  return "pip install -U jax jaxlib (their versions must match); JAX_PLATFORMS=cpu skips plugins"


def _driver_hint(kind):
  if kind == 'gpu':
    return ('run nvidia-smi: if it fails, install the NVIDIA driver (in a container, start it with '
            '--gpus all); if it works, look at CUDA_VISIBLE_DEVICES and LD_LIBRARY_PATH, and for '
            'another process that holds the memory')
  return ('run this on a Cloud TPU VM; on one, end other processes that hold the chips '
          '(sudo lsof -w /dev/accel* /dev/vfio/*), then look at /tmp/tpu_logs')


class _LogLines(logging.Handler):
  """Keeps the warnings of a logger."""

  def __init__(self):
    super().__init__(logging.WARNING)
    self.lines = []

  def emit(self, record):
    self.lines.append(record.getMessage())


def installed_versions():
  versions = {}
  for name in (*CORE, *OPTIONAL):
    try:
      versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      versions[name] = None
  return versions


def _devices():
  """Returns {platform: [device kinds]} of the default platform and of the CPU beside it."""
  import jax
  found = {}
  try:
    beside = jax.local_devices(backend='cpu')
  except RuntimeError:  # JAX_PLATFORMS=cuda leaves the CPU out.
    beside = []
  for device in [*jax.devices(), *beside]:
    found.setdefault(device.platform, {})[device.id] = device.device_kind
  return {platform: list(kinds.values()) for platform, kinds in found.items()}


def _hardware():
  """Returns which accelerators the operating system shows, whatever JAX makes of them."""
  def is_tpu(path):
    try:
      return (pathlib.Path(path).read_text().strip() == '0x1ae0' and
              (pathlib.Path(path).parent / 'device').read_text().strip() in TPU_PCI_DEVICES)
    except OSError:
      return False
  return {
      'gpu_present': any(map(os.path.exists, ('/dev/nvidia0', '/dev/nvidiactl'))),
      'tpu_present': any(map(is_tpu, glob.glob('/sys/bus/pci/devices/*/vendor')))}


def accelerator_present():
  """Returns whether the operating system shows a GPU or a TPU; JAX is not asked."""
  return any(_hardware().values())


def _memory():
  """Returns (free, total) bytes, of the container if it is limited."""
  try:
    text = pathlib.Path('/proc/meminfo').read_text()
    fields = dict(re.findall(r'^(\w+):\s+(\d+) kB', text, re.M))
    free, total = int(fields['MemAvailable']) * 1024, int(fields['MemTotal']) * 1024
  except (OSError, KeyError):
    return None, None
  try:
    cgroup = pathlib.Path('/sys/fs/cgroup')
    limit = int((cgroup / 'memory.max').read_text())
    used = int((cgroup / 'memory.current').read_text())
    cached = re.search(r'^inactive_file (\d+)', (cgroup / 'memory.stat').read_text(), re.M)
    if limit < total:
      free = min(free, limit - used + (int(cached[1]) if cached else 0))
      total = limit
  except (OSError, ValueError):  # 'max' is not a number: no limit.
    pass
  return free, total


def _disk():
  usage = shutil.disk_usage('.')
  return usage.free, usage.total


def available_cpus():
  """Returns the CPUs this process may use."""
  return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def _cache():
  path = cache_folder()
  files = [f for f in path.rglob('*') if f.is_file()] if path.is_dir() else []
  nearest = next(p for p in (path, *path.parents) if p.exists())
  return {'path': str(path), 'files': len(files), 'bytes': sum(f.stat().st_size for f in files),
          'writable': nearest.is_dir() and os.access(nearest, os.W_OK)}


def _mask(value):
  """Hides the password of a URL such as a proxy's."""
  return re.sub(r'(://)[^/@\s]+@', r'\1***@', value)


if __name__ == '__main__':
  print(json.dumps(probe()))
