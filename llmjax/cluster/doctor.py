"""`llmjax doctor`: reports what this machine has, what is wrong with it, and how to fix it.

JAX is started in a subprocess: an invalid XLA_FLAGS aborts the process that reads it, and a driver can hang; both must
be reported instead of ending the command.
"""

import dataclasses
import importlib
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

from llmjax.run.hardware import (
  CORE,
  INSTALL,
  OPTIONAL,
  LogRecorder,
  Platforms,
  available_cpus,
  cache_folder,
  detect_accelerators,
  installed_versions,
  list_devices,
  platform_problems,
)
from llmjax.run.progress import format_bytes

# Imported by every training process; none of them may import TensorFlow.
TRAINING_MODULES = ('jax', 'flax.linen', 'optax', 'orbax.checkpoint', 'grain.python',
                    'tensorflow_datasets', 'sentencepiece', 'tensorboardX')
PYTHONS = ((3, 11), (3, 13))
PROBE_SECONDS = 120  # Starting JAX from a cold disk takes 20 s; libtpu may search for devices for a minute.
MIN_MEMORY, MIN_DISK = 1.5e9, 2e9  # Bytes; the quickstart needs slightly less.
SHOWN_VARIABLES = re.compile(
    r'(JAX_|XLA_|LIBTPU_|TPU_|NCCL_).*|CUDA_VISIBLE_DEVICES|LD_LIBRARY_PATH|OMP_NUM_THREADS|'
    r'XDG_CACHE_HOME|TFDS_DATA_DIR|(https?|all|no)_proxy', re.IGNORECASE)


@dataclasses.dataclass
class Machine(Platforms):
  """Everything that `find_problems` checks.

  memory, disk: bytes (free, total), None where unknown; memory respects a container's limit, disk is that of the
  current folder.  cache: path, files, bytes and writability of the compilation cache.  import_errors: error by module.
  tensorflow_by: the module that imported TensorFlow.
  """

  python: tuple = sys.version_info[:2]
  memory: tuple = (None, None)
  disk: tuple = (None, None)
  cpus: int = 1
  cache: dict = dataclasses.field(default_factory=dict)
  import_errors: dict = dataclasses.field(default_factory=dict)
  tensorflow_by: str = ''


def run(spec, options):
  """Print a description of the machine and its problems; return 1 if there are any, else 0."""
  del spec  # The command takes no recipe.
  machine = inspect_machine()
  print('\n'.join(describe(machine)))
  problems = find_problems(machine, options.platform)
  for problem, fix in problems:
    print(f'\nPROBLEM  {problem}\n    fix  {fix}')
  print(f'\n{len(problems)} problem{"s" if len(problems) > 1 else ""} found' if problems else '\nno problems found')
  return 1 if problems else 0


def inspect_machine():
  """Return the Machine; takes a few seconds, because it starts JAX in a subprocess."""
  machine = Machine(versions=installed_versions(), environment=dict(os.environ), memory=_memory(), disk=_disk(),
                    cpus=available_cpus(), cache=_cache(), **detect_accelerators())
  package_parent = str(pathlib.Path(__file__).parents[2])
  path = os.pathsep.join(filter(None, [package_parent, os.environ.get('PYTHONPATH')]))
  try:
    done = subprocess.run([sys.executable, '-m', 'llmjax.cluster.doctor'], capture_output=True, text=True,
                          timeout=PROBE_SECONDS, check=False, env=os.environ | {'PYTHONPATH': path})
  except subprocess.TimeoutExpired:
    machine.error = f'JAX did not respond within {PROBE_SECONDS} s'
    return machine
  try:
    return dataclasses.replace(machine, **json.loads(done.stdout.splitlines()[-1]))
  except (IndexError, ValueError):
    last = [line for line in done.stderr.splitlines() if line.strip()][-3:]
    machine.error = f'the process exited with status {done.returncode}: ' + ' | '.join(last)[-600:]
    return machine


def probe():
  """Import JAX and the other training modules; return the fields of Machine that need them, as a dict for JSON."""
  recorder, import_errors, tensorflow_by = LogRecorder(), {}, ''
  logging.getLogger('jax._src.xla_bridge').addHandler(recorder)
  devices, default, error = {}, '', ''
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')  # Deprecation warnings of other libraries say nothing about this machine.
    try:
      import jax
      default, devices = jax.default_backend(), list_devices()
    except Exception as e:  # Drivers and broken installations raise errors of any type.
      error = f'{type(e).__name__}: {e}'
    for module in TRAINING_MODULES:
      try:
        importlib.import_module(module)
      except Exception as e:  # As above.
        import_errors[module] = f'{type(e).__name__}: {e}'
      if not tensorflow_by and 'tensorflow' in sys.modules:
        tensorflow_by = module
  return {'devices': devices, 'default': default, 'error': error, 'warnings': recorder.lines,
          'import_errors': import_errors, 'tensorflow_by': tensorflow_by}


def describe(machine):
  """Yield the lines of the report."""
  def section(title, entries):
    yield title
    for name, value in entries:
      yield f'  {name:<22}{value}'

  yield from section('versions', [
      ('python', '.'.join(map(str, machine.python))),
      *((name, machine.versions.get(name) or 'not installed') for name in CORE),
      *((name, machine.versions[name]) for name in OPTIONAL if machine.versions.get(name))])
  devices = [(p + (' (in use)' if p == machine.default else ''),
              ', '.join(f'{kinds.count(k)} × {k}' for k in dict.fromkeys(kinds)))
             for p, kinds in machine.devices.items()]
  yield from section('devices', devices or [('none', machine.error or 'JAX was not started')])
  size = lambda pair: ('unknown' if pair[0] is None else
                       f'{format_bytes(pair[0])} free of {format_bytes(pair[1])}')
  yield from section('machine', [
      ('system', f'{host.system()} {host.machine()}'), ('usable CPUs', machine.cpus),
      ('memory', size(machine.memory)), ('disk', size(machine.disk))])
  if machine.cache:
    yield from section('compilation cache', [
        ('folder', machine.cache['path']),
        ('size', f'{machine.cache["files"]} files, {format_bytes(machine.cache["bytes"])}')])
  yield from section('TensorFlow during training', [
      ('imported', f'yes, by {machine.tensorflow_by}' if machine.tensorflow_by else 'no')])
  variables = [(k, _mask_password(v)) for k, v in sorted(machine.environment.items()) if SHOWN_VARIABLES.fullmatch(k)]
  yield from section('environment variables', variables or [('none that affect llmjax', '')])


def find_problems(machine, platform=''):
  """Return [(problem, fix)] of a machine on which the platform must be usable."""
  problems = []
  if not PYTHONS[0] <= machine.python <= PYTHONS[1]:
    problems.append(('Python {}.{} is not supported'.format(*machine.python), 'use Python 3.11, 3.12 or 3.13'))
  missing = [name for name in CORE if not machine.versions.get(name)]
  if missing:
    problems.append((f'not installed: {", ".join(missing)}', f'pip install {" ".join(missing)}'))
  for module, error in machine.import_errors.items():
    package = {'orbax': 'orbax-checkpoint', 'tensorflow_datasets': 'tensorflow-datasets'}.get(
        module.split('.')[0], module.split('.')[0])
    is_absent_extra = package == 'tensorboardX' and 'No module' in error
    if package not in ('jax', *missing) and not is_absent_extra:  # JAX's own error is reported below.
      problems.append((f'importing {module} fails: {error}', f'pip install --force-reinstall {package}'))
  problems += _cuda_problems(machine.versions)
  if not {'jax', 'jaxlib'} & set(missing):
    problems += platform_problems(machine, platform)
  if machine.tensorflow_by:
    problems.append((f'importing {machine.tensorflow_by} imports TensorFlow, which starts slowly and reserves GPU '
                     'memory', 'pip uninstall tensorflow'))
  for resource, (free, _), needed, fix in (
      ('memory', machine.memory, MIN_MEMORY, 'end other programs, or lower train.batch_size'),
      ('disk', machine.disk, MIN_DISK, 'delete files, or choose a --workdir on another disk')):
    if free is not None and free < needed:
      problems.append((f'only {format_bytes(free)} of {resource} is free; the quickstart needs {format_bytes(needed)}',
                       fix))
  if machine.cache and not machine.cache['writable']:
    problems.append((f'the compilation cache {machine.cache["path"]} is not writable',
                     'make the folder writable, or set JAX_COMPILATION_CACHE_DIR to one that is'))
  return problems


def _cuda_problems(versions):
  cuda = {n: v for n, v in versions.items() if v and n.startswith('jax-cuda')}
  if len(cuda) > 1:
    yield (f'two CUDA plugins are installed: {", ".join(sorted(cuda))}',
           'pip uninstall the one that your driver does not support (12: driver 525 or later, '
           '13: driver 580 or later)')
  release = lambda version: (version or '').split('.')[:3]
  for name, version in cuda.items():
    if release(version) != release(versions.get('jaxlib')):
      yield f'{name} {version} does not match jaxlib {versions.get("jaxlib")}', INSTALL['gpu']


def _memory():
  """Return (free, total) bytes, of the container if it has a limit."""
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
  except (OSError, ValueError):  # 'max' is no number: no limit.
    pass
  return free, total


def _disk():
  usage = shutil.disk_usage('.')
  return usage.free, usage.total


def _cache():
  path = cache_folder()
  files = [f for f in path.rglob('*') if f.is_file()] if path.is_dir() else []
  nearest = next(p for p in (path, *path.parents) if p.exists())
  return {'path': str(path), 'files': len(files), 'bytes': sum(f.stat().st_size for f in files),
          'writable': nearest.is_dir() and os.access(nearest, os.W_OK)}


def _mask_password(value):
  """Hide the password in a URL such as a proxy's."""
  return re.sub(r'(://)[^/@\s]+@', r'\1***@', value)


if __name__ == '__main__':
  print(json.dumps(probe()))
