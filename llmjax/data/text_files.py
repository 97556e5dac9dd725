"""Documents from files: plain text, Markdown, JSON, JSONL, Parquet, compressed and in tar and zip archives.

Reading never stops at a bad record: it yields a `Rejected` that says where and why, and goes on.
Memory stays bounded by the longest record that is allowed.  Archives are read as streams and nothing is
unpacked to a path, so a member's name is only a label; links within them are not followed, and what one
file on the disk unpacks to is bounded, absolutely and by its own size.
"""

import collections
import contextlib
import dataclasses
import gzip
import io
import itertools
import json
import os
import pathlib
import shutil
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable

COMPRESSIONS = ('.gz', '.zst', '.bz2', '.xz')
RECORD_SUFFIXES = ('.jsonl', '.ndjson')
BOM = b'\xef\xbb\xbf'
ARCHIVES = ('.tar', '.zip')
_BLOCK = 1 << 20
# An archive within an archive within an archive is somebody's backup; deeper ones are made to do harm.
_DEPTH = 3
# Below this no ratio is looked at: small files of blank lines are harmless.
_SMALL = 64 << 20


@dataclasses.dataclass(frozen=True)
class Document:
  """A text and the file it came from.

  split: where it must go, '' where it may go anywhere.  record: it is one of many independent ones
  in its file, as in JSONL.
  """

  name: str
  text: str
  file: str
  split: str = ''
  record: bool = False


@dataclasses.dataclass(frozen=True)
class Rejected:
  """What was left out.  offset: in bytes from the start of the (uncompressed) file; line: from 1.

  kept: True where only a byte-order mark was removed and the text went on.
  """

  file: str
  reason: str
  offset: int | None = None
  line: int | None = None
  bytes: int | None = None
  kept: bool = False


@dataclasses.dataclass(frozen=True)
class Limits:
  """suffixes: of files to read.  document_bytes: where plain text is cut.  text_key: the field of records.

  take: makes a record's text of the whole record, in place of text_key; it raises ValueError with a reason.

  max_unpacked_bytes, max_unpacked_ratio: of what one file unpacks to, on all levels together, and how many
  times its size that is.  follow_links: read what links of the file system lead to outside the folder.
  """

  suffixes: tuple[str, ...]
  text_key: str = 'text'
  document_bytes: int = 1 << 20
  max_record_bytes: int = 16 << 20
  max_unpacked_bytes: int = 1 << 38
  max_unpacked_ratio: int = 200
  follow_links: bool = False
  take: Callable[[dict], str] | None = None


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
  if suffixes[-1] == '.tgz':
    suffixes = [*suffixes[:-1], '.tar', '.gz']
  compression = suffixes.pop() if suffixes[-1] in COMPRESSIONS else ''
  kind = suffixes[-1] if suffixes else ''
  # A bare `text.gz` is taken for text if plain text is asked for.
  wanted = kind in ARCHIVES or kind in limits.suffixes or (
      compression and not kind and '.txt' in limits.suffixes)
  if not wanted:
    found.ignored[readable_name(kind + compression)] += 1
    return
  try:
    stream = _decompress(raw, compression)
  except OSError as e:
    yield Rejected(name, f'cannot be read: {e}')
    return
  if compression:
    stream = _Capped(stream, budget)
  if kind in ARCHIVES:
    if depth == _DEPTH:
      yield Rejected(name, f'an archive within {_DEPTH} archives')
      return
    read = _read_tar if kind == '.tar' else _read_zip
    yield from read(stream, name, limits, found, budget, depth + 1)
    return
  found.files += 1
  counted = _Counted(stream)
  try:
    if kind == '.parquet':
      with _seekable(stream) as file:
        yield from _read_parquet(file, name, limits, budget)
    elif kind in RECORD_SUFFIXES:
      yield from _read_jsonl(counted, name, limits)
    elif kind == '.json' and limits.take:
      yield from _read_json(counted, name, limits)
    else:
      yield from _read_text(counted, name, limits)
  except Exception as e:
    # What a damaged Parquet file makes pyarrow raise is of many kinds, UnicodeDecodeError among them.
    if not _is_damage(e) and kind != '.parquet':
      raise
    yield Rejected(name, f'damaged file, the rest is lost: {_one_line(e)}', offset=counted.offset)


def _is_damage(error):
  """Says whether an error is the fault of a file's bytes, not of this program."""
  if isinstance(error, (OSError, EOFError, zlib.error, tarfile.TarError, zipfile.BadZipFile)):
    return True
  return type(error).__name__ in ('ZstdError', 'LZMAError') or type(error).__name__.startswith('Arrow')


def _one_line(error):
  line = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
  return ''.join(c if c.isprintable() else '?' for c in line)


def _decompress(raw, compression):
  if compression == '.gz':
    return gzip.open(raw)
  if compression == '.zst':
    try:
      import zstandard
    except ImportError as e:
      raise OSError('.zst needs the package zstandard: pip install zstandard') from e
    return io.BufferedReader(
        zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True), _BLOCK)
  if compression == '.bz2':
    import bz2
    return bz2.open(raw)
  if compression == '.xz':
    import lzma
    return lzma.open(raw)
  return raw


class _Counted:
  """A binary stream that knows how many bytes were taken, and loses none when reading fails.

  The standard library's buffered readers drop what they hold when a compressed file breaks off.
  """

  def __init__(self, stream):
    self._stream, self._buffer, self._start, self.offset = stream, b'', 0, 0

  def _fill(self):
    """Adds what one read gives to the buffer; returns False at the end."""
    data = self._stream.read1(_BLOCK)
    self._buffer = self._buffer[self._start:] + data
    self._start = 0
    return bool(data)

  def _take(self, end):
    data = self._buffer[self._start:end]
    self._start = end
    self.offset += len(data)
    return data

  def read(self, size):
    """Returns up to `size` bytes, b'' at the end."""
    if self._start == len(self._buffer):
      self._fill()
    return self._take(min(self._start + size, len(self._buffer)))

  def readline(self, size):
    """Returns a line with its end, or its first `size` bytes."""
    searched = self._start
    while True:
      end = self._buffer.find(b'\n', searched, self._start + size)
      if end >= 0:
        return self._take(end + 1)
      held = len(self._buffer) - self._start
      if held >= size or not self._fill():
        return self._take(min(self._start + size, len(self._buffer)))
      searched = held


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
    yield Rejected(name, f'damaged archive, the rest is lost: {_one_line(e)}')


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
          yield Rejected(label, 'encrypted')
          continue
        try:
          with archive.open(member) as content:
            yield from _read_file(_Capped(content, budget), label, limits, found, budget, depth)
        except Exception as e:
          if not _is_damage(e) and not isinstance(e, (NotImplementedError, RuntimeError, ValueError)):
            raise
          yield Rejected(label, f'damaged file, the rest is lost: {_one_line(e)}')
  except Exception as e:
    if not _is_damage(e) and not isinstance(e, (NotImplementedError, ValueError, OverflowError)):
      raise
    yield Rejected(name, f'damaged archive, the rest is lost: {_one_line(e)}')


@contextlib.contextmanager
def _seekable(stream):
  """Yields a stream that can go back: itself, or a temporary file of what it holds."""
  if type(stream) is io.BufferedReader:  # A file; members of archives are of subclasses, and cannot go back.
    yield stream
    return
  with tempfile.TemporaryFile() as copy:
    shutil.copyfileobj(stream, copy, _BLOCK)
    copy.seek(0)
    yield copy


def _lines(stream, name, limits):
  """Yields (offset, line number, bytes with line end) or Rejected, of lines of any length."""
  offset, limit = stream.offset, limits.max_record_bytes
  for number in itertools.count(1):
    line = stream.readline(limit + 1)
    if not line:
      return
    if number == 1 and (rejected := _encoding_mark(line, name)):
      yield rejected
      if not rejected.kept:
        return
      line, offset = line[len(BOM):], len(BOM)
    if len(line) > limit and not line.endswith(b'\n'):
      length = len(line) + _skip_line(stream)
      yield Rejected(name, f'line longer than max_record_bytes={limit}', offset, number, length)
      offset += length
      continue
    yield offset, number, line
    offset += len(line)


def _skip_line(stream):
  """Reads to the end of the line; returns how many bytes that was."""
  length = 0
  while part := stream.readline(_BLOCK):
    length += len(part)
    if part.endswith(b'\n'):
      break
  return length


def _encoding_mark(start, name):
  """Returns a Rejected when a file starts with a byte-order mark: of UTF-8 (kept) or UTF-16."""
  if start.startswith(BOM):
    return Rejected(name, 'byte-order mark removed, text kept', 0, 1, len(BOM), kept=True)
  if start[:2] in (b'\xff\xfe', b'\xfe\xff'):
    return Rejected(name, 'UTF-16 or UTF-32, not UTF-8: convert the file', 0, 1)
  return None


def _bad_text(data):
  """Returns (reason, offset within data) when bytes are not text, else None."""
  nul = data.find(b'\0')
  try:
    data.decode()
  except UnicodeDecodeError as e:
    if nul < 0 or e.start < nul:
      return f'invalid UTF-8 (byte 0x{data[e.start]:02x})', e.start
  return ('NUL byte', nul) if nul >= 0 else None


def _read_text(stream, name, limits):
  """Yields a plain-text file as documents that, joined, are the file without its bad lines."""
  pending, parts, rejected = bytearray(), 0, 0

  def documents(final):
    nonlocal pending, parts
    while pending:
      cut = _cut(pending, limits.document_bytes, final)
      if not cut:
        return
      text = bytes(pending[:cut]).decode()
      del pending[:cut]
      if not text.strip():
        continue  # Nothing but blank lines.
      whole = final and not parts and not pending
      parts += 1
      yield Document(name if whole else f'{name}#{parts}', text, name)

  try:
    for block in _blocks(stream, name, limits):
      if isinstance(block, Rejected):
        rejected += not block.kept
        yield block
        continue
      pending += block
      if len(pending) > 2 * limits.document_bytes:
        yield from documents(final=False)
  except Exception:  # A damaged file: what came before the damage is good.
    yield from documents(final=True)
    raise
  yield from documents(final=True)
  if not parts and not rejected:
    yield Rejected(name, 'empty', 0, 1)


def _blocks(stream, name, limits):
  """Yields good bytes that end with a line, or Rejected lines."""
  size = min(_BLOCK, limits.max_record_bytes)
  number = 1
  while block := stream.read(size):
    start = stream.offset - len(block)
    if start == 0 and (mark := _encoding_mark(block, name)):
      yield mark
      if not mark.kept:
        return
      block, start = block[len(BOM):], len(BOM)
    damage = None
    if not block.endswith(b'\n'):
      try:
        block += stream.readline(limits.max_record_bytes + 1)
      except Exception as e:  # Raised below, after the lines that are whole.
        damage, block = e, block[:block.rfind(b'\n') + 1]
    last = block.rfind(b'\n', 0, len(block) - 1) + 1
    tail, overlong = block[last:], None
    if len(tail) > limits.max_record_bytes:
      length = len(tail) + (0 if tail.endswith(b'\n') else _skip_line(stream))
      block = block[:last]
      overlong = Rejected(name, f'line longer than max_record_bytes={limits.max_record_bytes}',
                          start + last, number + block.count(b'\n'), length)
    if _bad_text(block) is None:
      yield block
    else:
      yield from _good_lines(block, name, start, number)
    number += block.count(b'\n')
    if overlong:
      yield overlong
      number += 1
    if damage:
      raise damage


def _good_lines(block, name, start, number):
  """Yields the lines of a block that are text, and a Rejected for each that is not."""
  end = start + len(block)
  for i, line in enumerate(block.split(b'\n')):  # Not splitlines: a lone \r ends no line here.
    line += b'\n' if start + len(line) < end else b''
    if bad := _bad_text(line):
      reason, where = bad
      yield Rejected(name, reason, start + where, number + i, len(line))
    else:
      yield line
    start += len(line)


def _cut(data, target, final):
  """Returns where to end the next document, about `target` bytes on; 0 to wait for more."""
  if len(data) <= target * 1.25:
    return len(data) if final else 0
  for mark in (b'\n\n', b'\n'):
    cut = data.rfind(mark, target // 2, target)
    if cut >= 0:
      return cut + len(mark)
  cut = data.find(b'\n', target)
  return cut + 1 if cut >= 0 else len(data)


def _read_jsonl(stream, name, limits):
  for item in _lines(stream, name, limits):
    if isinstance(item, Rejected):
      yield item
      continue
    offset, number, line = item
    if not line.strip():
      continue  # A blank line is not a record.
    if bad := _bad_text(line):
      yield Rejected(name, bad[0], offset + bad[1], number, len(line))
      continue
    try:
      record = json.loads(line)
    except (ValueError, RecursionError) as e:
      yield Rejected(name, f'not JSON: {_one_line(e)}', offset, number, len(line))
      continue
    found = check_record(record, f'{name}#{number}', name, limits, offset, number)
    yield dataclasses.replace(found, bytes=len(line)) if isinstance(found, Rejected) else found


def _read_json(stream, name, limits):
  """Yields the records of a JSON array; what comes after a mistake in it is lost."""
  data = b''.join(iter(lambda: stream.read(_BLOCK), b''))
  if bad := _bad_text(data):
    yield Rejected(name, *bad)
    return
  text = data.decode().removeprefix('\ufeff')
  decoder, at, line, counted = json.JSONDecoder(), _skip_space(text, 0), 1, 0
  if text[at:at + 1] != '[':
    yield Rejected(name, 'not a JSON array of records (JSON lines are to be named .jsonl)', 0, 1)
    return
  while (at := _skip_space(text, at + 1)) < len(text) and text[at] != ']':
    line, counted = line + text.count('\n', counted, at), at
    try:
      record, at = decoder.raw_decode(text, at)
    except (ValueError, RecursionError) as e:
      yield Rejected(name, f'not JSON, the rest is lost: {_one_line(e)}', None, line)
      return
    yield check_record(record, f'{name}#{line}', name, limits, None, line)
    at = _skip_space(text, at)
    if text[at:at + 1] not in (',', ']'):
      yield Rejected(name, 'not JSON, the rest is lost: no comma after a record', None, line)
      return
    if text[at] == ']':
      return
  if at >= len(text):
    yield Rejected(name, 'not JSON: the array does not end', None, line)


def _skip_space(text, at):
  while at < len(text) and text[at] in ' \t\r\n':
    at += 1
  return at


def _field_names(names):
  return ', '.join(''.join(c if c.isprintable() else '?' for c in str(name)[:40]) for name in list(names)[:8])


def _read_parquet(raw, name, limits, budget):
  try:
    import pyarrow.parquet
  except ImportError as e:
    raise OSError('.parquet needs the package pyarrow: pip install pyarrow') from e
  table = pyarrow.parquet.ParquetFile(raw)
  if not limits.take and limits.text_key not in table.schema_arrow.names:
    yield Rejected(name, f'no field {limits.text_key!r} '
                   f'(found: {_field_names(table.schema_arrow.names)})')
    return
  row = 0
  for batch in table.iter_batches(batch_size=256, columns=None if limits.take else [limits.text_key]):
    for value in batch.to_struct_array() if limits.take else batch.column(0):
      row += 1
      try:
        text = value.as_py()
      except UnicodeDecodeError as e:
        yield Rejected(name, f'invalid UTF-8 ({_one_line(e)})', None, row)
        continue
      # A dictionary and run lengths make many long texts of few bytes.
      budget.spend(len(text) if isinstance(text, (str, bytes)) else len(repr(text)))
      check = check_record if limits.take else check_text
      yield check(text, f'{name}#{row}', name, limits, None, row)


def check_record(record, name, file, limits, offset=None, line=None):
  """Returns the Document of a record, a dict as JSON has it, or the Rejected that says what is wrong with it."""
  if limits.take:
    try:
      return check_text(limits.take(record), name, file, limits, offset, line)
    except ValueError as e:
      return Rejected(file, _one_line(e), offset, line)
  if not isinstance(record, dict) or limits.text_key not in record:
    fields = _field_names(record) if isinstance(record, dict) else 'no object'
    return Rejected(file, f'no field {limits.text_key!r} (found: {fields})', offset, line)
  return check_text(record[limits.text_key], name, file, limits, offset, line)


def check_text(text, name, file, limits, offset=None, line=None):
  """Returns the Document of a record's text, or the Rejected that says what is wrong with it."""
  if isinstance(text, bytes):
    try:
      text = text.decode()
    except UnicodeDecodeError as e:
      return Rejected(file, f'invalid UTF-8 (byte 0x{text[e.start]:02x})', offset, line, len(text))
  if not isinstance(text, str):
    reason = f'field {limits.text_key!r} holds {type(text).__name__}, not text'
    return Rejected(file, reason, offset, line)
  if not text.strip():
    return Rejected(file, 'empty', offset, line)
  if '\0' in text:
    return Rejected(file, 'NUL byte', offset, line)
  try:
    size = len(text.encode())
  except UnicodeEncodeError:
    return Rejected(file, 'invalid UTF-8 (a lone surrogate)', offset, line)
  if size > limits.max_record_bytes:
    return Rejected(file, f'record longer than max_record_bytes={limits.max_record_bytes}', offset,
                    line, size)
  return Document(name, text, file, record=True)
