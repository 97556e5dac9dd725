"""Describe the environment and the data of a run, for its environment.json and data.json.  Secrets are masked."""

import pathlib
import platform
import re
import shlex
import subprocess
import sys

from llmjax import secrets
from llmjax.data import prepared
from llmjax.run import hardware


def describe_environment(mesh, workdir):
  """Return package versions, devices, host CPU, git commit, command line and workdir."""
  device = mesh.devices.flat[0]
  versions = {name: v for name, v in hardware.installed_versions().items() if v}
  return {
      'command': secrets.hide(shlex.join(['llmjax', *map(secrets.hide, sys.argv[1:])])),
      'workdir': str(pathlib.Path(workdir).absolute()),
      'device_kind': device.device_kind, 'device_count': int(mesh.devices.size),
      'mesh': {axis: size for axis, size in mesh.shape.items() if size > 1},
      'host_cpu': _cpu_model(), 'host_cpus': hardware.available_cpus(),
      'python': platform.python_version(), 'system': platform.platform(),
      'git_commit': _git_commit(), **versions}


def describe_data(spec):
  """Return {source: {'records' (kind), 'documents', 'tokens', 'bytes', 'quarantined' (counts by reason)}}."""
  sources = {}
  for folder in spec.sources:
    manifest = prepared.read_manifest(folder)
    totals = {name: sum(split[name] for split in manifest['splits'].values())
              for name in ('documents', 'tokens', 'bytes')}
    sources[folder] = {'records': prepared.kind(manifest), **totals,
                         'quarantined': manifest['quarantine']['reasons']}
  return secrets.hide_within(sources)


def _cpu_model():
  try:
    match = re.search(r'model name\s*:\s*(.+)', pathlib.Path('/proc/cpuinfo').read_text())
  except OSError:
    match = None
  return match[1].strip() if match else platform.processor()


def _git_commit():
  """Return the git commit of the code, followed by '+' if files are modified; '' outside a repository."""
  git = ['git', '-C', str(pathlib.Path(__file__).parent)]
  try:
    commit = subprocess.run([*git, 'rev-parse', '--short=12', 'HEAD'], capture_output=True, text=True,
                            check=True, timeout=10).stdout.strip()
    changed = subprocess.run([*git, 'status', '--porcelain', '-uno'], capture_output=True, text=True,
                             check=True, timeout=10).stdout.strip()
  except (OSError, subprocess.SubprocessError):
    return ''
  return commit + ('+' if changed else '')
