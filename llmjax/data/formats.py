"""Documents of one byte stream: plain text, JSON lines, a JSON array, Parquet.

A bad record yields a `Rejected` with its place and the reason, and reading continues.  Memory is bounded by the longest
record allowed.
"""

import codecs
import dataclasses
import itertools
import json
import re

from llmjax.data.compression import BLOCK
from llmjax.data.documents import Document, Rejected, check_record, check_text, field_names, one_line

BOM = b'\xef\xbb\xbf'


def read_text(stream, name, limits):
  """Yield a plain-text file as documents whose concatenation is the file without its bad lines."""
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
  except Exception:  # A damaged file: the text before the damage is good.
    yield from documents(final=True)
    raise
  yield from documents(final=True)
  if not parts and not rejected:
    yield Rejected(name, 'empty', 0, 1)


def _blocks(stream, name, limits):
  """Yield valid bytes that end with a line, or Rejected lines."""
  size = min(BLOCK, limits.max_record_bytes)
  number = 1
  while block := stream.read(size):
    start = stream.offset - len(block)
    if start == 0 and (mark := _encoding_mark(block, name)):
      yield mark
      block, start = block[len(BOM):], len(BOM)
    damage = None
    if not block.endswith(b'\n'):
      try:
        block += stream.readline(limits.max_record_bytes + 1)
      except Exception as e:  # Raised below, after the complete lines.
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
  """Yield the valid lines of a block, and a Rejected for each other line."""
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
  """Return the size of the next document, about `target` bytes; 0 where more data are needed."""
  if len(data) <= target * 1.25:
    return len(data) if final else 0
  for mark in (b'\n\n', b'\n'):
    cut = data.rfind(mark, target // 2, target)
    if cut >= 0:
      return cut + len(mark)
  cut = data.find(b'\n', target)
  return cut + 1 if cut >= 0 else len(data)


def read_records(stream, name, limits):
  """Yield a Document or a Rejected for each record of JSON lines or of a JSON array."""
  begin = stream.peek().removeprefix(BOM).lstrip()
  if begin[:1] == b'{' and re.match(rb'\{\s*\n', begin):
    yield Rejected(name, 'one JSON object over several lines, not records; convert those in it to JSON lines, such as '
                   "by jq -c '.FIELD[]' FILE > NEW.jsonl", 0, 1)
    return
  yield from (read_json if begin[:1] == b'[' else read_jsonl)(stream, name, limits)


def read_jsonl(stream, name, limits):
  """Yield a Document or a Rejected for each line that is not blank."""
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
    item = check_record(record, f'{name}#{number}', name, limits, offset, number)
    yield dataclasses.replace(item, bytes=len(line)) if isinstance(item, Rejected) else item


def _lines(stream, name, limits):
  """Yield (offset, line number, bytes with line end) or Rejected, for lines of any length."""
  offset, limit = stream.offset, limits.max_record_bytes
  for number in itertools.count(1):
    line = stream.readline(limit + 1)
    if not line:
      return
    if number == 1 and (rejected := _encoding_mark(line, name)):
      yield rejected
      line, offset = line[len(BOM):], len(BOM)
    if len(line) > limit and not line.endswith(b'\n'):
      length = len(line) + _skip_line(stream)
      yield Rejected(name, f'line longer than max_record_bytes={limit}', offset, number, length)
      offset += length
      continue
    yield offset, number, line
    offset += len(line)


def _skip_line(stream):
  """Read to the end of the line; return the number of bytes read."""
  length = 0
  while part := stream.readline(BLOCK):
    length += len(part)
    if part.endswith(b'\n'):
      break
  return length


def read_json(stream, name, limits):
  """Yield the records of a JSON array; the rest after a syntax error is lost."""
  array, number, line = _Array(stream, limits.max_record_bytes), 0, 1
  try:
    if mark := _encoding_mark(array.begin, name):
      yield mark
    array.expect('[')
    while (record := array.next_record()) is not _END:
      line = array.line
      number += 1
      yield check_record(record, f'{name}#{number}', name, limits, None, line)
  except (ValueError, RecursionError) as e:  # A UnicodeDecodeError is a ValueError.
    yield Rejected(name, f'not JSON, the rest is lost: {one_line(e)}', None, array.line)


_END = object()


class _Array:
  """An incremental parser of a JSON array, with a few records in memory at a time."""

  def __init__(self, stream, most):
    self._stream, self._most = stream, most
    self._decode = codecs.getincrementaldecoder('utf-8')().decode
    self._text, self._at, self._counted, self.line, self._ended = '', 0, 0, 1, False
    self._fault, self._started = None, False
    self.begin = stream.peek()[:len(BOM)]
    self._more()
    self._text = self._text.removeprefix('\ufeff')

  def _more(self):
    """Read more and drop the text before the current place; return False at the end."""
    if self._fault:
      raise self._fault
    data = b'' if self._ended else self._stream.read(BLOCK)
    self._ended = not data
    self._count_lines()
    try:
      text = self._decode(data, final=self._ended)
    except UnicodeDecodeError as e:  # Raised above, once the text before it is read.
      text, self._fault = e.object[:e.start].decode(), e
    self._text, self._at, self._counted = self._text[self._at:] + text, 0, 0
    return not self._ended

  def _count_lines(self):
    self.line += self._text.count('\n', self._counted, self._at)
    self._counted = self._at

  def _next(self):
    """Return the next character that is not white space, '' at the end."""
    while True:
      while self._at < len(self._text) and self._text[self._at] in ' \t\r\n':
        self._at += 1
      if self._at < len(self._text):
        return self._text[self._at]
      if not self._more():
        return ''

  def expect(self, *expected):
    """Consume and return the next character, which must be one of these."""
    character = self._next()
    if character not in expected or not character:
      raise ValueError('the array does not end' if not character else
                       f'{character!r} where {" or ".join(expected)} is expected')
    self._at += 1
    return character

  def next_record(self):
    """Return the next record, or _END."""
    if self._started and self.expect(',', ']') == ']' or self._next() == ']':
      return _END
    self._started = True
    self._count_lines()
    while True:
      try:
        record, end = _DECODER.raw_decode(self._text, self._at)
        if end < len(self._text) or self._ended:  # A number at the end of the text may continue.
          break
      except ValueError:
        if self._ended:
          raise
        if len(self._text) - self._at > self._most:
          raise ValueError(f'no end of a record within max_record_bytes={self._most}') from None
      self._more()
    self._at = end
    return record


_DECODER = json.JSONDecoder()


def read_parquet(raw, name, limits, budget):
  """Yield a Document or a Rejected for each row.  budget: its `spend` is called with the size of each text."""
  try:
    import pyarrow.parquet
  except ImportError as e:
    raise OSError('.parquet needs the package pyarrow: pip install pyarrow') from e
  table = pyarrow.parquet.ParquetFile(raw)
  if not limits.normalise and limits.text_key not in table.schema_arrow.names:
    yield Rejected(name, f'no field {limits.text_key!r} '
                   f'(found: {field_names(table.schema_arrow.names)})')
    return
  row = 0
  for batch in table.iter_batches(batch_size=256, columns=None if limits.normalise else [limits.text_key]):
    for value in batch.to_struct_array() if limits.normalise else batch.column(0):
      row += 1
      try:
        text = value.as_py()
      except UnicodeDecodeError as e:
        yield Rejected(name, f'invalid UTF-8 ({one_line(e)})', None, row)
        continue
      # A dictionary and run lengths make many long texts of few bytes.
      budget.spend(len(text) if isinstance(text, (str, bytes)) else len(repr(text)))
      check = check_record if limits.normalise else check_text
      yield check(text, f'{name}#{row}', name, limits, None, row)


def _encoding_mark(start, name):
  """Return a Rejected with `kept` set where a file starts with a byte-order mark."""
  if start.startswith(BOM):
    return Rejected(name, 'byte-order mark removed, text kept', 0, 1, len(BOM), kept=True)
  return None


def _bad_text(data):
  """Return (reason, offset within data) where bytes are not text, else None."""
  nul = data.find(b'\0')
  try:
    data.decode()
  except UnicodeDecodeError as e:
    if nul < 0 or e.start < nul:
      return f'invalid UTF-8 (byte 0x{data[e.start]:02x})', e.start
  return ('NUL byte', nul) if nul >= 0 else None


class Counted:
  """A binary stream that counts the bytes read, and returns all bytes before an error.

  The standard library's buffered readers drop their buffer where a compressed file is truncated.
  """

  def __init__(self, stream):
    self._stream, self._buffer, self._start, self.offset, self._error = stream, b'', 0, 0, None

  def _fill(self):
    """Read once into the buffer; return False at the end."""
    if self._error:
      raise self._error
    data = self._stream.read1(BLOCK)
    self._buffer = self._buffer[self._start:] + data
    self._start = 0
    return bool(data)

  def _take(self, end):
    data = self._buffer[self._start:end]
    self._start = end
    self.offset += len(data)
    return data

  def peek(self):
    """Return some of the next bytes without consuming them; none only at the end."""
    try:
      while len(self._buffer) - self._start < 4096 and self._fill():
        pass
    except Exception as e:  # Raised once the bytes before it are read.
      self._error = e
    return self._buffer[self._start:self._start + BLOCK]

  def read(self, size):
    """Read up to `size` bytes, b'' at the end."""
    if self._start == len(self._buffer):
      self._fill()
    return self._take(min(self._start + size, len(self._buffer)))

  def readline(self, size):
    """Read a line with its end, or its first `size` bytes."""
    searched = self._start
    while True:
      end = self._buffer.find(b'\n', searched, self._start + size)
      if end >= 0:
        return self._take(end + 1)
      held = len(self._buffer) - self._start
      if held >= size or not self._fill():
        return self._take(min(self._start + size, len(self._buffer)))
      searched = held
