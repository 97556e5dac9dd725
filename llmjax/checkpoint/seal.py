"""The seal of a checkpoint: size and SHA-256 of each of its files, so that damage is seen before it is loaded.

A checkpoint is good when its folder holds exactly the sealed files, with the sealed contents.  The seal
is written last, by renaming, so a folder that a kill left half done has none.  `seal.json` is the first
process's; process k of several writes `seal.<k>.json`, and each lists the files whose names fall to it.
Every seal has the SHA-256 of its own text, so damage to it is seen too.  No JAX here.

Orbax itself loads files with flipped bits, and takes an empty folder for a checkpoint.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import math
import re
import time
import zlib

from etils import epath

VERSION = 1
STEP = re.compile('0|[1-9][0-9]*')
TEMPORARY = re.compile(r'[0-9]+\.(orbax-checkpoint-tmp.*|deleted)')
SEAL = re.compile(r'seal(\.[1-9][0-9]*)?\.json(\.tmp)?')
BLOCK_BYTES = 1 << 22
# A reader has nothing else to do; more threads than this would wait for the disk.
READERS = 4


class SealError(Exception):
  """There is no whole seal.  The text is one line: the file and the reason."""


@dataclasses.dataclass(frozen=True)
class Seal:
  """What is known of a sealed checkpoint.

  time: of sealing, in Unix seconds.  metrics: of the run when it was saved, measured at metrics_step.
  files: name within the folder -> (bytes, SHA-256).
  """

  step: int
  time: float
  metrics: dict[str, float]
  metrics_step: int | None
  files: dict[str, tuple[int, str]]
  processes: int

  @property
  def size(self):
    """Bytes of all files."""
    return sum(size for size, _ in self.files.values())


def find_steps(folder):
  """Returns the steps that have a checkpoint in the folder, good or not, in order."""
  folder = epath.Path(folder)
  return sorted(int(p.name) for p in folder.iterdir() if STEP.fullmatch(p.name)) if folder.is_dir() else []


def find_temporaries(folder):
  """Returns the paths of what interrupted saves and removals left in the folder."""
  folder = epath.Path(folder)
  return sorted(p for p in folder.iterdir() if TEMPORARY.fullmatch(p.name)) if folder.is_dir() else []


def write_seal(checkpoint, step, metrics=None, metrics_step=None, process=0, processes=1):
  """Seals a checkpoint that is whole, or this process's share of its files."""
  checkpoint = epath.Path(checkpoint)
  files = {name: hash_file(path) for name, path in sorted(_list_files(checkpoint).items())
           if not SEAL.fullmatch(name) and _share(name, processes) == process}
  metrics = {k: float(v) for k, v in (metrics or {}).items() if math.isfinite(v)}
  fields = {'version': VERSION, 'hash': 'sha256', 'step': int(step), 'time': round(time.time(), 3),
            'process': process, 'processes': processes, 'metrics': metrics, 'metrics_step': metrics_step,
            'files': files}
  name = _seal_name(process)
  temporary = checkpoint / f'{name}.tmp'
  # Not synced: a seal that a power failure emptied is no seal, and the checkpoint is passed over.
  temporary.write_text(_render(fields))
  temporary.replace(checkpoint / name)


def read_seal(checkpoint):
  """Returns the Seal of a checkpoint, of all processes; raises SealError when it is not whole."""
  checkpoint = epath.Path(checkpoint)
  if not checkpoint.is_dir():
    raise SealError('it is not a folder')
  first = _read_part(checkpoint, 0, None)
  files = dict(first['files'])
  for process in range(1, first['processes']):
    files.update(_read_part(checkpoint, process, first)['files'])
  return Seal(first['step'], first['time'], first['metrics'], first['metrics_step'],
              {name: tuple(entry) for name, entry in files.items()}, first['processes'])


def find_damage(checkpoint, contents=True, process=0, processes=1):
  """Returns one line for each file that is not as it was sealed; an empty list for a good checkpoint.

  contents: False looks at names and sizes only.  process, processes: whose share of the contents to read.
  """
  checkpoint = epath.Path(checkpoint)
  try:
    seal, found = read_seal(checkpoint), _list_files(checkpoint)
  except SealError as e:
    return [str(e)]
  except OSError as e:
    return [f'it cannot be read ({e.strerror or e})']
  if STEP.fullmatch(checkpoint.name) and seal.step != int(checkpoint.name):
    return [f'seal.json is of step {seal.step}']
  seals = {_seal_name(k) for k in range(seal.processes)}
  extra = [f'{name} is no file of this checkpoint' for name in sorted(found)
           if name not in seal.files and name not in seals and not name.endswith('.json.tmp')]

  def look(name):
    size, digest = seal.files[name]
    try:
      if name not in found:
        return f'{name} is missing'
      length = found[name].stat().length
      if length != size:
        return f'{name} is empty' if not length else f'{name} has {length} bytes instead of {size}'
      if contents and _share(name, processes) == process and hash_file(found[name])[1] != digest:
        return f'{name} has other contents than were saved (SHA-256)'
    except OSError as e:
      return f'{name} cannot be read ({e.strerror or e})'
    return None

  with concurrent.futures.ThreadPoolExecutor(READERS) as pool:
    return [line for line in pool.map(look, sorted(seal.files)) if line] + extra


def hash_file(path):
  """Returns (bytes, SHA-256 in hexadecimal) of a file."""
  digest, size = hashlib.sha256(), 0
  with epath.Path(path).open('rb') as f:
    while block := f.read(BLOCK_BYTES):
      digest.update(block)
      size += len(block)
  return size, digest.hexdigest()


def _list_files(folder, prefix=''):
  """Returns {name within the folder: path} of every file below it."""
  files = {}
  for path in folder.iterdir():
    if path.is_dir():
      files.update(_list_files(path, f'{prefix}{path.name}/'))
    else:
      files[prefix + path.name] = path
  return files


def _share(name, processes):
  """Returns the process that a file falls to.  By name: two machines may list a folder differently."""
  return zlib.crc32(name.encode()) % processes


def _seal_name(process):
  return f'seal.{process}.json' if process else 'seal.json'


def _render(fields):
  """Returns a seal's text, which has the SHA-256 of the rest of it."""
  fields = {**fields, 'sha256': ''}
  text = json.dumps(fields, indent=1, sort_keys=True, ensure_ascii=False)
  fields['sha256'] = hashlib.sha256(text.encode()).hexdigest()
  return json.dumps(fields, indent=1, sort_keys=True, ensure_ascii=False) + '\n'


def _read_part(checkpoint, process, first):
  """Returns one process's seal.  first: the first process's, which the others must agree with."""
  file = checkpoint / _seal_name(process)
  try:
    text = file.read_bytes().decode()
    fields = json.loads(text)
    if _render(fields) != text:
      raise ValueError
  except FileNotFoundError as e:
    if not process and not any(checkpoint.iterdir()):
      raise SealError('it is an empty folder') from e
    raise SealError(f'{file.name} is missing: the save was cut off before its end') from e
  except OSError as e:
    raise SealError(f'{file.name} cannot be read ({e.strerror or e})') from e
  except (ValueError, TypeError, RecursionError) as e:
    raise SealError(f'{file.name} is damaged') from e
  if fields['version'] != VERSION:
    raise SealError(f'{file.name} has version {fields["version"]}; this llmjax reads version {VERSION}')
  if fields['process'] != process or (
      first and any(fields[k] != first[k] for k in ('step', 'processes'))):
    raise SealError(f'{file.name} is of another save')
  return fields
