"""Documents from files: plain text, Markdown, JSON, JSONL, Parquet, compressed and in tar and zip archives.

formats.py reads what each holds; a bad one yields a `Rejected`, and reading goes on.  Archives are read as streams
and nothing is unpacked to a path, so a member's name is only a label; links within them are not followed, and what
one file on the disk unpacks to is bounded, absolutely and by its own size.
"""

import collections
import contextlib
import io
import os
import pathlib
import shutil
import stat
import tarfile
import tempfile
import zipfile
import zlib

from llmjax.data import compression as compressions
from llmjax.data.compression import BLOCK, Unsupported
from llmjax.data.documents import Limits, Rejected, one_line
from llmjax.data.formats import Counted, read_parquet, read_records, read_text

# Names of one suffix for two.
_JOINED = {'.tgz': ['.tar', '.gz'], '.tbz': ['.tar', '.bz2'], '.tbz2': ['.tar', '.bz2'], '.txz': ['.tar', '.xz'],
           '.tzst': ['.tar', '.zst']}
RECORD_SUFFIXES = ('.jsonl', '.ndjson')
ARCHIVES = ('.tar', '.zip')
# An archive within an archive within an archive is somebody's backup; deeper ones are made to do harm.
_DEPTH = 3
# Below this no ratio is looked at: small files of blank lines are harmless.
_SMALL = 64 << 20


class Found:
  """Counts what a walk came across, for error messages and the manifest."""

  def __init__(self):
    self.files, self.ignored = 0, collections.Counter()

  def describe_ignored(self):
    common = self.ignored.most_common(5)
    return ', '.join(f'{count} {suffix or "without suffix"}' for suffix, count in common)


class _TooLarge(OSError):
  """A file unpacks to more than it may."""


class _Budget:
  """What one file on the disk may still unpack to, its archives' archives included."""

  def __init__(self, size, limits):
    self._limits = limits
    self._most = min(limits.max_unpacked_bytes, max(_SMALL, size * limits.max_unpacked_ratio))
    self._spent = 0

  def spend(self, count):
    """Notes that `count` more bytes came out; raises _TooLarge."""
    self._spent += count
    if self._spent > self._most:
      limits = self._limits
      name = ('max_unpacked_bytes' if self._most == limits.max_unpacked_bytes else 'max_unpacked_ratio')
      raise _TooLarge(f'it unpacks to more than {self._most:,} bytes ({name}={getattr(limits, name)})')


class _Capped(io.RawIOBase):
  """A binary stream whose bytes are counted against a budget."""

  def __init__(self, stream, budget):
    self._stream, self._budget = stream, budget

  def readable(self):
    return True

  def read1(self, size):
    data = self._stream.read1(size) if hasattr(self._stream, 'read1') else self._stream.read(size)
    self._budget.spend(len(data))
    return data

  def read(self, size):
    # tarfile takes a short answer for the end.
    data = self._stream.read(size)
    self._budget.spend(len(data))
    return data


def list_files(path):
  """Returns the files under a path, sorted, hidden ones left out; a file is its own only one."""
  if os.path.isfile(path):
    return [str(path)]
  files = []
  for folder, folders, names in os.walk(path):
    folders[:] = sorted(f for f in folders if not f.startswith('.'))
    files += [os.path.join(folder, n) for n in names if not n.startswith('.')]
  return sorted(files)


def readable_name(path):
  """Returns a file's name as text that can be encoded and printed, whatever its bytes are."""
  name = os.fsencode(path).decode('utf-8', 'backslashreplace')
  return ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in name)


def _why_not(file, root, limits):
  """Returns why a path is not opened, or ''.  A pipe would wait for ever, a device has no end."""
  if not stat.S_ISREG(os.stat(file).st_mode):
    return 'not a regular file'
  if not limits.follow_links:
    real, top = os.path.realpath(file), os.path.realpath(root)
    if os.path.isdir(root) and os.path.commonpath([real, top]) != top:
      return 'a link to outside the folder; follow_links=true reads it'
  return ''


def read_files(path, limits: Limits, found: Found | None = None):
  """Yields the Documents and the Rejected of a folder, a file or an archive, in sorted order."""
  found = found if found is not None else Found()
  root = path if os.path.isdir(path) else os.path.dirname(path) or '.'
  for file in list_files(path):
    name = readable_name(os.path.relpath(file, root))
    try:
      # A file that the user names himself may be a link to anywhere.
      if reason := _why_not(file, path, limits):
        yield Rejected(name, reason)
        continue
      with open(file, 'rb') as raw:
        yield from _read_file(raw, name, limits, found, _Budget(os.fstat(raw.fileno()).st_size, limits))
    except OSError as e:
      yield Rejected(name, f'cannot be read: {e.strerror or e}')


def _read_file(raw, name, limits, found, budget, depth=0):
  """Yields what an open file holds; suffixes say how to read it.  depth: archives around it."""
  suffixes = [s.lower() for s in pathlib.PurePath(name).suffixes] or ['']
  suffixes[-1:] = _JOINED.get(suffixes[-1], suffixes[-1:])
  compression = suffixes.pop() if suffixes[-1] in (*compressions.SUFFIXES, *compressions.UNSUPPORTED) else ''
  kind = suffixes[-1] if suffixes else ''
  # A bare `text.gz` is taken for text if plain text is asked for.
  wanted = kind in ARCHIVES or kind in limits.suffixes or (
      compression and not kind and '.txt' in limits.suffixes)
  if remedy := compressions.UNSUPPORTED.get(compression):
    if wanted or compression in ('.7z', '.rar'):
      yield Rejected(name, f'{compression} is not supported; unpack or repack it: {remedy}')
      return
  if not wanted:
    found.ignored[readable_name(kind + compression)] += 1
    return
  stream = raw
  if compression:
    short = {'.zstd': '.zst', '.lzma': '.xz'}.get(compression, compression)
    stream = _Capped(compressions.Members(raw, short, limits.max_window_bytes), budget)
  if kind in ARCHIVES:
    if depth == _DEPTH:
      yield Rejected(name, f'an archive within {_DEPTH} archives')
      return
    read = _read_tar if kind == '.tar' else _read_zip
    yield from read(stream, name, limits, found, budget, depth + 1)
    return
  found.files += 1
  counted = None
  try:
    if kind == '.parquet':
      with _seekable(stream) as file:
        yield from read_parquet(file, name, limits, budget)
      return
    counted = Counted(compressions.as_utf8(stream))
    if kind in RECORD_SUFFIXES or kind == '.json' and limits.take:
      yield from read_records(counted, name, limits)
    else:
      yield from read_text(counted, name, limits)
  except Exception as e:
    # What a damaged Parquet file makes pyarrow raise is of many kinds, UnicodeDecodeError among them.
    if not _is_damage(e) and kind != '.parquet':
      raise
    yield Rejected(name, _fault('file', e), offset=counted.offset if counted else None)


def _fault(what, error):
  """Returns the reason for a file or an archive that cannot be read further."""
  if isinstance(error, (Unsupported, NotImplementedError)):
    remedy = '' if isinstance(error, Unsupported) else '; unpack it, or pack it again with deflate'
    return f'unsupported {what}, the rest is left out: {one_line(error)}{remedy}'
  return f'damaged {what}, the rest is lost: {one_line(error)}'


def _is_damage(error):
  """Says whether an error is the fault of a file's bytes, not of this program."""
  if isinstance(error, (OSError, EOFError, zlib.error, tarfile.TarError, zipfile.BadZipFile)):
    return True
  return type(error).__name__ in ('ZstdError', 'LZMAError') or type(error).__name__.startswith('Arrow')


def _read_tar(stream, name, limits, found, budget, depth):
  try:
    with tarfile.open(fileobj=stream, mode='r|') as archive:
      for member in archive:
        label = f'{name}/{readable_name(member.name)}'
        if os.path.basename(member.name).startswith('.') or member.isdir():
          continue
        if not member.isfile():
          yield Rejected(label, 'a link or a device in an archive')
          continue
        # Counted again: a sparse member is larger than what the archive holds of it.
        file = _Capped(archive.extractfile(member), budget) if member.issparse() else archive.extractfile(member)
        yield from _read_file(file, label, limits, found, budget, depth)
  except Exception as e:
    # tarfile lets what a header's numbers mean to Python pass through.
    if not _is_damage(e) and not isinstance(e, (ValueError, OverflowError, RecursionError, AttributeError)):
      raise
    yield Rejected(name, _fault('archive', e))


def _read_zip(stream, name, limits, found, budget, depth):
  try:
    with _seekable(stream) as file, zipfile.ZipFile(file) as archive:
      for member in archive.infolist():
        label = f'{name}/{readable_name(member.filename)}'
        if member.is_dir() or os.path.basename(member.filename).startswith('.'):
          continue
        if stat.S_ISLNK(member.external_attr >> 16):
          yield Rejected(label, 'a link or a device in an archive')
          continue
        if member.flag_bits & 1:
          yield Rejected(label, 'encrypted, which is not supported: unpack it')
          continue
        try:
          with archive.open(member) as content:
            yield from _read_file(_Capped(content, budget), label, limits, found, budget, depth)
        except Exception as e:
          if not _is_damage(e) and not isinstance(e, (NotImplementedError, RuntimeError, ValueError)):
            raise
          yield Rejected(label, _fault('file', e))
  except Exception as e:
    if not _is_damage(e) and not isinstance(e, (NotImplementedError, ValueError, OverflowError)):
      raise
    yield Rejected(name, _fault('archive', e))


@contextlib.contextmanager
def _seekable(stream):
  """Yields a stream that can go back: itself, or a temporary file of what it holds."""
  if type(stream) is io.BufferedReader:  # A file; members of archives are of subclasses, and cannot go back.
    yield stream
    return
  with tempfile.TemporaryFile() as copy:
    shutil.copyfileobj(stream, copy, BLOCK)
    copy.seek(0)
    yield copy
