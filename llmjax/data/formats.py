"""Documents of one stream of bytes: plain text, JSON lines, a JSON array, Parquet.

Reading never stops at a bad record: it yields a `Rejected` that says where and why, and goes on.  Memory stays
bounded by the longest record that is allowed.
"""

import dataclasses
import itertools
import json

from llmjax.data.documents import Document, Rejected, check_record, check_text, field_names, one_line

BOM = b'\xef\xbb\xbf'
BLOCK = 1 << 20


def read_text(stream, name, limits):
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
  size = min(BLOCK, limits.max_record_bytes)
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


def read_jsonl(stream, name, limits):
  """Yields a Document or a Rejected for each line that is not blank."""
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
      yield Rejected(name, f'not JSON: {one_line(e)}', offset, number, len(line))
      continue
    found = check_record(record, f'{name}#{number}', name, limits, offset, number)
    yield dataclasses.replace(found, bytes=len(line)) if isinstance(found, Rejected) else found


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
  while part := stream.readline(BLOCK):
    length += len(part)
    if part.endswith(b'\n'):
      break
  return length


def read_json(stream, name, limits):
  """Yields the records of a JSON array; what comes after a mistake in it is lost."""
  data = b''.join(iter(lambda: stream.read(BLOCK), b''))
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
      yield Rejected(name, f'not JSON, the rest is lost: {one_line(e)}', None, line)
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


def read_parquet(raw, name, limits, budget):
  """Yields a Document or a Rejected for each row.  budget: whose `spend` hears how long each text is."""
  try:
    import pyarrow.parquet
  except ImportError as e:
    raise OSError('.parquet needs the package pyarrow: pip install pyarrow') from e
  table = pyarrow.parquet.ParquetFile(raw)
  if not limits.take and limits.text_key not in table.schema_arrow.names:
    yield Rejected(name, f'no field {limits.text_key!r} '
                   f'(found: {field_names(table.schema_arrow.names)})')
    return
  row = 0
  for batch in table.iter_batches(batch_size=256, columns=None if limits.take else [limits.text_key]):
    for value in batch.to_struct_array() if limits.take else batch.column(0):
      row += 1
      try:
        text = value.as_py()
      except UnicodeDecodeError as e:
        yield Rejected(name, f'invalid UTF-8 ({one_line(e)})', None, row)
        continue
      # A dictionary and run lengths make many long texts of few bytes.
      budget.spend(len(text) if isinstance(text, (str, bytes)) else len(repr(text)))
      check = check_record if limits.take else check_text
      yield check(text, f'{name}#{row}', name, limits, None, row)


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


class Counted:
  """A binary stream that knows how many bytes were taken, and loses none when reading fails.

  The standard library's buffered readers drop what they hold when a compressed file breaks off.
  """

  def __init__(self, stream):
    self._stream, self._buffer, self._start, self.offset = stream, b'', 0, 0

  def _fill(self):
    """Adds what one read gives to the buffer; returns False at the end."""
    data = self._stream.read1(BLOCK)
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
