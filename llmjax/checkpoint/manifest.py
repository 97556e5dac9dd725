"""Checksum manifests: size and SHA-256 of every file of a checkpoint, so that damage is found before it is loaded.

A checkpoint is verified if its folder holds exactly the listed files with the listed contents. It is written as
`<step>.partial` and renamed when its manifest is complete, so a folder named after a step without a manifest is
damaged. The first process writes `manifest.json`, process k of several `manifest.<k>.json`; each lists the files whose
names hash to it. A manifest contains the SHA-256 of its own text, so damage to it is found too. No JAX here.

Orbax itself loads files with flipped bits and accepts an empty folder as a checkpoint.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import math
import os
import re
import time
import zlib

from etils import epath

VERSION = 1
STEP = re.compile('0|[1-9][0-9]*')
TEMPORARY = re.compile(r'[0-9]+\.(partial.*|orbax-checkpoint-tmp.*|deleted)')
MANIFEST = re.compile(r'manifest(\.[1-9][0-9]*)?\.json(\.tmp)?')
LEGACY = re.compile(r'seal(\.[1-9][0-9]*)?\.json')  # The name of manifests before it was changed.
BLOCK_BYTES = 1 << 22
READERS = 4  # Threads that hash files; more would wait for the disk.


class ManifestError(Exception):
  """A manifest is missing or damaged. The message is one line with the file and the reason."""


class UnreadableError(ManifestError):
  """A checkpoint can be neither verified nor called damaged: unreadable, or written by another version."""


@dataclasses.dataclass(frozen=True)
class Manifest:
  """The merged manifest of all processes.

  time: Unix seconds when it was written. metrics: of the run at metrics_step. files: name -> (bytes, SHA-256).
  """

  step: int
  time: float
  metrics: dict[str, float]
  metrics_step: int | None
  files: dict[str, tuple[int, str]]
  processes: int

  @property
  def size(self):
    """Total bytes of the listed files."""
    return sum(size for size, _ in self.files.values())


def find_steps(folder):
  """List the steps with a checkpoint folder, damaged or not, in order. Raises OSError if it cannot be listed."""
  return sorted(int(p.name) for p in _list(folder) if STEP.fullmatch(p.name))


def find_temporaries(folder):
  """List the paths that interrupted saves and removals left. Raises OSError if the folder cannot be listed."""
  return sorted(p for p in _list(folder) if TEMPORARY.fullmatch(p.name))


def _list(folder):
  """List a folder; empty if it does not exist. `is_dir` would also be False for a failing disk."""
  folder = epath.Path(folder)
  try:
    return list(folder.iterdir())
  except (FileNotFoundError, NotADirectoryError):
    if os.path.islink(folder):  # Perhaps to a disk that is not mounted.
      raise
    return []


def is_legacy(checkpoint):
  """Return whether a checkpoint's manifest has the name that it had before `manifest.json`."""
  return (epath.Path(checkpoint) / 'seal.json').exists()


def write_manifest(checkpoint, step, metrics=None, metrics_step=None, process=0, processes=1):
  """Hash this process's share of a complete checkpoint's files and write its manifest."""
  checkpoint = epath.Path(checkpoint)
  files = {name: hash_file(path) for name, path in sorted(list_files(checkpoint).items())
           if not MANIFEST.fullmatch(name) and _share(name, processes) == process}
  metrics = {k: float(v) for k, v in (metrics or {}).items() if math.isfinite(v)}
  write_fields(checkpoint / file_name(process), {
      'version': VERSION, 'hash': 'sha256', 'step': int(step), 'time': round(time.time(), 3), 'process': process,
      'processes': processes, 'metrics': metrics, 'metrics_step': metrics_step, 'files': files})


def write_fields(file, fields):
  """Write a manifest's fields and the SHA-256 of their text. Atomic, not synced: an emptied manifest is damage."""
  temporary = file.with_name(f'{file.name}.tmp')
  temporary.write_text(_render(fields))
  temporary.replace(file)


def read_manifest(checkpoint):
  """Read and merge the manifests of all processes. Raises ManifestError if one is missing or damaged."""
  checkpoint = epath.Path(checkpoint)
  first = _read_part(checkpoint, 0)
  files = dict(first['files'])
  for process in range(1, first['processes']):
    part = _read_part(checkpoint, process)
    if any(part[key] != first[key] for key in ('step', 'processes')):
      raise ManifestError(f'{file_name(process)} belongs to another save')
    files.update(part['files'])
  return Manifest(first['step'], first['time'], first['metrics'], first['metrics_step'],
                  {name: tuple(entry) for name, entry in files.items()}, first['processes'])


def find_damage(checkpoint, contents=True, process=0, processes=1):
  """List one line per file that differs from the manifest; empty for a verified checkpoint.

  contents: False compares names and sizes only. process, processes: whose share of the contents to hash.
  """
  return [line for line, _ in find_problems(checkpoint, contents, process, processes)]


def find_problems(checkpoint, contents=True, process=0, processes=1):
  """List [(line, damaged)] as `find_damage` does; not damaged: the file could not be checked here and now."""
  checkpoint = epath.Path(checkpoint)
  try:
    manifest, present = read_manifest(checkpoint), list_files(checkpoint)
  except ManifestError as e:
    return [(str(e), not isinstance(e, UnreadableError))]
  except OSError as e:
    return [(f'it cannot be read ({e.strerror or e})', False)]
  if STEP.fullmatch(checkpoint.name) and manifest.step != int(checkpoint.name):
    return [(f'manifest.json belongs to step {manifest.step}', True)]
  listed = {*manifest.files, *map(file_name, range(manifest.processes))}
  extra = [(f'{name} is not in the manifest', True) for name in sorted(present)
           if name not in listed and not name.endswith('.json.tmp')]

  def check(name):
    size, digest = manifest.files[name]
    try:
      if name not in present:
        return f'{name} is missing', True
      length = present[name].stat().length
      if length != size:
        return f'{name} is empty' if not length else f'{name} has {length} bytes instead of {size}', True
      if contents and _share(name, processes) == process and hash_file(present[name])[1] != digest:
        return f'{name} has other contents than were saved (SHA-256)', True
    except OSError as e:
      return f'{name} cannot be read ({e.strerror or e})', False
    return None

  with concurrent.futures.ThreadPoolExecutor(READERS) as pool:
    return [problem for problem in pool.map(check, sorted(manifest.files)) if problem] + extra


def hash_file(path):
  """Return (bytes, SHA-256 in hexadecimal) of a file."""
  digest, size = hashlib.sha256(), 0
  with epath.Path(path).open('rb') as f:
    while block := f.read(BLOCK_BYTES):
      digest.update(block)
      size += len(block)
  return size, digest.hexdigest()


def list_files(folder, prefix=''):
  """Return {name relative to the folder: path} of all files below a folder."""
  files = {}
  for path in folder.iterdir():
    if path.is_dir():
      files.update(list_files(path, f'{prefix}{path.name}/'))
    else:
      files[prefix + path.name] = path
  return files


def _share(name, processes):
  """Return the process that hashes a file. By name, because two hosts may list a folder in different order."""
  return zlib.crc32(name.encode()) % processes


def file_name(process):
  """Return the name of one process's manifest."""
  return f'manifest.{process}.json' if process else 'manifest.json'


def _render(fields):
  """Return a manifest's text, which contains the SHA-256 of the rest of it."""
  fields = {**fields, 'sha256': ''}
  text = json.dumps(fields, indent=1, sort_keys=True, ensure_ascii=False)
  fields['sha256'] = hashlib.sha256(text.encode()).hexdigest()
  return json.dumps(fields, indent=1, sort_keys=True, ensure_ascii=False) + '\n'


def _read_part(checkpoint, process):
  """Return the fields of one process's manifest."""
  name = file_name(process)
  try:
    fields = read_fields(checkpoint / name)
  except FileNotFoundError as e:
    if not process and checkpoint.is_dir():
      names = [path.name for path in checkpoint.iterdir()]
      if not names:
        raise ManifestError('it is an empty folder') from e
      if 'seal.json' in names:
        raise UnreadableError('its manifest has the old name seal.json: run llmjax checkpoint migrate') from e
    raise ManifestError(f'{name} is missing') from e
  except NotADirectoryError as e:
    raise ManifestError('it is not a folder') from e
  except OSError as e:
    raise UnreadableError(f'{name} cannot be read ({e.strerror or e})') from e
  if fields['version'] != VERSION:
    raise UnreadableError(f'{name} has version {fields["version"]}; this llmjax reads version {VERSION}')
  if fields['process'] != process:
    raise ManifestError(f'{name} belongs to another save')
  return fields


def read_fields(file):
  """Read the fields of one manifest file. Raises ManifestError if its text does not match its SHA-256."""
  try:
    text = file.read_bytes().decode()
    fields = json.loads(text)
    if _render(fields) != text:
      raise ValueError
  except (ValueError, TypeError, RecursionError) as e:
    raise ManifestError(f'{file.name} is damaged') from e
  return fields
