"""Documents from files: plain text, Markdown, JSON, JSONL, Parquet, compressed and in tar and zip archives.

`formats` reads the content; a bad record or file yields a `Rejected`, and reading continues.  Archives are read as
streams and never unpacked to a path, so the name of a member is only a label; links within them are not followed, and
the size that one file unpacks to is bounded, absolutely and relative to its own size.
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

from llmjax.data import compression
from llmjax.data.compression import BLOCK, Unsupported
from llmjax.data.documents import Limits, Rejected, one_line
from llmjax.data.formats import Counted, read_parquet, read_records, read_text

# One suffix for two.
_JOINED = {'.tgz': ['.tar', '.gz'], '.tbz': ['.tar', '.bz2'], '.tbz2': ['.tar', '.bz2'], '.txz': ['.tar', '.xz'],
           '.tzst': ['.tar', '.zst']}
RECORD_SUFFIXES = ('.jsonl', '.ndjson')
ARCHIVES = ('.tar', '.zip')
# Three levels of archives occur in backups; deeper nesting is an attack.
_DEPTH = 3
# The ratio is not checked below this: small files of blank lines are harmless.
_SMALL = 64 << 20


class Listing:
  """Counts of files read and of files ignored, by suffix, for error messages and the manifest."""

  def __init__(self):
    self.files, self.ignored = 0, collections.Counter()

  def describe_ignored(self):
    common = self.ignored.most_common(5)
    return ', '.join(f'{count} {suffix or "without suffix"}' for suffix, count in common)


class _TooLarge(OSError):
  """A file unpacks to more than is allowed."""


class _Budget:
  """The number of bytes to which one file on the disk may unpack, nested archives included."""

  def __init__(self, size, limits):
    self._limits = limits
    self._most = min(limits.max_unpacked_bytes, max(_SMALL, size * limits.max_unpacked_ratio))
    self._spent = 0

  def spend(self, count):
    """Add `count` unpacked bytes; raise _TooLarge."""
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
    # tarfile takes a short read for the end.
    data = self._stream.read(size)
    self._budget.spend(len(data))
    return data


def list_files(path):
  """Return the sorted files under a path, without hidden ones; of a file, the file itself."""
  if os.path.isfile(path):
    return [str(path)]
  files = []
  for folder, folders, names in os.walk(path):
    folders[:] = sorted(f for f in folders if not f.startswith('.'))
    files += [os.path.join(folder, n) for n in names if not n.startswith('.')]
  return sorted(files)


def readable_name(path):
  """Return a file name of any bytes as printable text."""
  name = os.fsencode(path).decode('utf-8', 'backslashreplace')
  return ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in name)


def _refusal(file, root, limits):
  """Return why a path is not opened, or ''.  A pipe would block for ever, a device has no end."""
  if not stat.S_ISREG(os.stat(file).st_mode):
    return 'not a regular file'
  if not limits.follow_links:
    real, top = os.path.realpath(file), os.path.realpath(root)
    if os.path.isdir(root) and os.path.commonpath([real, top]) != top:
      return 'a link to outside the folder; follow_links=true reads it'
  return ''


def read_files(path, limits: Limits, listing: Listing | None = None):
  """Yield the Documents and the Rejected of a folder, a file or an archive, in sorted order."""
  listing = listing if listing is not None else Listing()
  root = path if os.path.isdir(path) else os.path.dirname(path) or '.'
  for file in list_files(path):
    name = readable_name(os.path.relpath(file, root))
    try:
      # A file that the user names directly may be a link to anywhere.
      if reason := _refusal(file, path, limits):
        yield Rejected(name, reason)
        continue
      with open(file, 'rb') as raw:
        yield from _read_file(raw, name, limits, listing, _Budget(os.fstat(raw.fileno()).st_size, limits))
    except OSError as e:
      yield Rejected(name, f'cannot be read: {e.strerror or e}')


def _read_file(raw, name, limits, listing, budget, depth=0):
  """Yield the content of an open file, read as its suffixes say.  depth: of nested archives."""
  suffixes = [s.lower() for s in pathlib.PurePath(name).suffixes] or ['']
  suffixes[-1:] = _JOINED.get(suffixes[-1], suffixes[-1:])
  packed = suffixes.pop() if suffixes[-1] in (*compression.SUFFIXES, *compression.UNSUPPORTED) else ''
  kind = suffixes[-1] if suffixes else ''
  # A bare `text.gz` is plain text where that is requested.
  wanted = kind in ARCHIVES or kind in limits.suffixes or (
      packed and not kind and '.txt' in limits.suffixes)
  if remedy := compression.UNSUPPORTED.get(packed):
    if wanted or packed in ('.7z', '.rar'):
      yield Rejected(name, f'{packed} is not supported; unpack or repack it: {remedy}')
      return
  if not wanted:
    listing.ignored[readable_name(kind + packed)] += 1
    return
  stream = raw
  if packed:
    packed = {'.zstd': '.zst', '.lzma': '.xz'}.get(packed, packed)
    stream = _Capped(compression.Members(raw, packed, limits.max_window_bytes), budget)
  if kind in ARCHIVES:
    if depth == _DEPTH:
      yield Rejected(name, f'an archive within {_DEPTH} archives')
      return
    read = _read_tar if kind == '.tar' else _read_zip
    yield from read(stream, name, limits, listing, budget, depth + 1)
    return
  listing.files += 1
  yield from _read_content(stream, kind, name, limits, budget)


def _read_content(stream, kind, name, limits, budget):
  """Yield the Documents and the Rejected of a file that is no archive.  kind: its suffix."""
  counted = None
  try:
    if kind == '.parquet':
      with _seekable(stream) as file:
        yield from read_parquet(file, name, limits, budget)
      return
    counted = Counted(compression.as_utf8(stream))
    if kind in RECORD_SUFFIXES or kind == '.json' and limits.normalise:
      yield from read_records(counted, name, limits)
    else:
      yield from read_text(counted, name, limits)
  except Exception as e:
    # pyarrow raises errors of many types for a damaged file, UnicodeDecodeError among them.
    if not _is_damage(e) and kind != '.parquet':
      raise
    yield Rejected(name, _fault('file', e), offset=counted.offset if counted else None)


def _fault(noun, error):
  """Return the reason for a file or an archive that cannot be read further."""
  if isinstance(error, (Unsupported, NotImplementedError)):
    remedy = '' if isinstance(error, Unsupported) else '; unpack it, or pack it again with deflate'
    return f'unsupported {noun}, the rest is left out: {one_line(error)}{remedy}'
  return f'damaged {noun}, the rest is lost: {one_line(error)}'


def _is_damage(error):
  """Return whether an error is caused by the bytes of a file, not by this program."""
  if isinstance(error, (OSError, EOFError, zlib.error, tarfile.TarError, zipfile.BadZipFile)):
    return True
  return type(error).__name__ in ('ZstdError', 'LZMAError') or type(error).__name__.startswith('Arrow')


def _read_tar(stream, name, limits, listing, budget, depth):
  try:
    with tarfile.open(fileobj=stream, mode='r|') as archive:
      for member in archive:
        label = f'{name}/{readable_name(member.name)}'
        if os.path.basename(member.name).startswith('.') or member.isdir():
          continue
        if not member.isfile():
          yield Rejected(label, 'a link or a device in an archive')
          continue
        # Counted again: a sparse member is larger than its bytes in the archive.
        file = _Capped(archive.extractfile(member), budget) if member.issparse() else archive.extractfile(member)
        yield from _read_file(file, label, limits, listing, budget, depth)
  except Exception as e:
    # tarfile does not catch what invalid numbers of a header raise.
    if not _is_damage(e) and not isinstance(e, (ValueError, OverflowError, RecursionError, AttributeError)):
      raise
    yield Rejected(name, _fault('archive', e))


def _read_zip(stream, name, limits, listing, budget, depth):
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
            yield from _read_file(_Capped(content, budget), label, limits, listing, budget, depth)
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
  """Yield a seekable stream: the stream itself, or a temporary copy."""
  if type(stream) is io.BufferedReader:  # A file; members of archives are of subclasses, and not seekable.
    yield stream
    return
  with tempfile.TemporaryFile() as copy:
    shutil.copyfileobj(stream, copy, BLOCK)
    copy.seek(0)
    yield copy
