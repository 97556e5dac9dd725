"""The seal of a checkpoint: size and SHA-256 of each of its files, so that damage is seen before it is loaded.

A checkpoint is good when its folder holds exactly the sealed files, with the sealed contents.  It is written as
`<step>.partial` and gets its name once its seal is written, so a folder with a step's name and no seal is damaged.
`seal.json` is the first process's; process k of several writes `seal.<k>.json`, and each lists the files whose names
fall to it.  Every seal, of every version, has the SHA-256 of its own text, so damage to it is seen too.  No JAX here.

Orbax itself loads files with flipped bits, and takes an empty folder for a checkpoint.
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
SEAL = re.compile(r'seal(\.[1-9][0-9]*)?\.json(\.tmp)?')
BLOCK_BYTES = 1 << 22
# A reader has nothing else to do; more threads than this would wait for the disk.
READERS = 4


class SealError(Exception):
  """There is no whole seal.  The text is one line: the file and the reason."""


class UnreadableError(SealError):
  """Whether a checkpoint is damaged cannot be found out: it cannot be read, or a newer version has written it."""


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
  """Returns the steps that have a checkpoint in the folder, good or not, in order; OSError when it cannot be listed."""
  return sorted(int(p.name) for p in _list(folder) if STEP.fullmatch(p.name))


def find_temporaries(folder):
  """Returns the paths of what interrupted saves and removals left in the folder; OSError as in find_steps."""
  return sorted(p for p in _list(folder) if TEMPORARY.fullmatch(p.name))


def _list(folder):
  """Returns the paths in a folder, none where there is no folder.  `is_dir` would take a failing disk for that."""
  folder = epath.Path(folder)
  try:
    return list(folder.iterdir())
  except (FileNotFoundError, NotADirectoryError):
    if os.path.islink(folder):  # To a disk that is not mounted, perhaps.
      raise
    return []


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
  return [line for line, _ in find_problems(checkpoint, contents, process, processes)]


def find_problems(checkpoint, contents=True, process=0, processes=1):
  """Returns [(line, damaged)] as `find_damage`; not damaged: whether it is cannot be found out now and here."""
  checkpoint = epath.Path(checkpoint)
  try:
    seal, found = read_seal(checkpoint), _list_files(checkpoint)
  except SealError as e:
    return [(str(e), not isinstance(e, UnreadableError))]
  except OSError as e:
    return [(f'it cannot be read ({e.strerror or e})', False)]
  if STEP.fullmatch(checkpoint.name) and seal.step != int(checkpoint.name):
    return [(f'seal.json is of step {seal.step}', True)]
  seals = {_seal_name(k) for k in range(seal.processes)}
  extra = [(f'{name} is no file of this checkpoint', True) for name in sorted(found)
           if name not in seal.files and name not in seals and not name.endswith('.json.tmp')]

  def look(name):
    size, digest = seal.files[name]
    try:
      if name not in found:
        return f'{name} is missing', True
      length = found[name].stat().length
      if length != size:
        return f'{name} is empty' if not length else f'{name} has {length} bytes instead of {size}', True
      if contents and _share(name, processes) == process and hash_file(found[name])[1] != digest:
        return f'{name} has other contents than were saved (SHA-256)', True
    except OSError as e:
      return f'{name} cannot be read ({e.strerror or e})', False
    return None

  with concurrent.futures.ThreadPoolExecutor(READERS) as pool:
    return [problem for problem in pool.map(look, sorted(seal.files)) if problem] + extra


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
    if not process and checkpoint.is_dir() and not any(checkpoint.iterdir()):
      raise SealError('it is an empty folder') from e
    raise SealError(f'{file.name} is missing') from e
  except NotADirectoryError as e:
    raise SealError('it is not a folder') from e
  except OSError as e:
    raise UnreadableError(f'{file.name} cannot be read ({e.strerror or e})') from e
  except (ValueError, TypeError, RecursionError) as e:
    raise SealError(f'{file.name} is damaged') from e
  if fields['version'] != VERSION:
    raise UnreadableError(f'{file.name} has version {fields["version"]}; this llmjax reads version {VERSION}')
  if fields['process'] != process or (
      first and any(fields[k] != first[k] for k in ('step', 'processes'))):
    raise SealError(f'{file.name} is of another save')
  return fields
