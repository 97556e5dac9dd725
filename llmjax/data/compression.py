"""Decompression of gzip, zstd, bzip2 and xz files with any number of members, and conversion of UTF-16 to UTF-8.

The standard library's readers ignore the rest after a bad byte between members, and zstandard's a truncated file; here
all bytes before a fault are returned, and then the fault is raised.
"""

import codecs
import importlib
import io
import zlib

BLOCK = 1 << 20
SUFFIXES = ('.gz', '.zst', '.zstd', '.bz2', '.xz', '.lzma')
# Formats that are not supported, and how to convert them.
UNSUPPORTED = {
    '.lz4': 'lz4 -dc FILE | zstd -o NEW.zst', '.br': 'brotli -dc FILE | zstd -o NEW.zst',
    '.z': 'uncompress -c FILE | zstd -o NEW.zst', '.lzo': 'lzop -dc FILE | zstd -o NEW.zst',
    '.sz': 'snzip -dc FILE | zstd -o NEW.zst', '.snappy': 'snzip -dc FILE | zstd -o NEW.zst',
    '.7z': '7z x FILE', '.rar': 'unrar x FILE'}
# A zstd block of 4 bytes may unpack to 128 KiB, and one call unpacks all of its input: at most 64 MiB.
_ZSTD_INPUT = 2048
_ZSTD_HEADER = 18


class Unsupported(OSError):
  """A valid file uses a feature that is not supported; the message says how to convert it."""


class Filled(io.RawIOBase):
  """A stream of the blocks that `_block` returns, b'' at the end.

  An error of `_block` is raised once all bytes before it are read.
  """

  def __init__(self):
    self._buffer, self._start, self._error = b'', 0, None

  def readable(self):
    return True

  def read1(self, size=-1):
    """Read some bytes, at most `size` where it is not negative; b'' at the end."""
    if self._start == len(self._buffer):
      if self._error:
        raise self._error
      self._buffer, self._start = self._block(), 0
    end = len(self._buffer) if size < 0 else min(self._start + size, len(self._buffer))
    data = self._buffer[self._start:end]
    self._start = end
    return data

  def read(self, size=-1):
    """Read `size` bytes, fewer only at the end; all that are left where it is negative."""
    parts, count = [], 0
    while size < 0 or count < size:
      try:
        data = self.read1(-1 if size < 0 else size - count)
      except Exception as e:
        if not parts:
          raise
        self._error = e
        break
      if not data:
        break
      parts.append(data)
      count += len(data)
    return b''.join(parts)


class Members(Filled):
  """The decompressed content of all members of a file.  Raises EOFError where the file ends within a member."""

  def __init__(self, raw, compression, max_window_bytes):
    super().__init__()
    self._raw, self._member, self._input, self._count, self._most = raw, None, b'', 0, max_window_bytes
    self._begin, self._step = {
        '.gz': (lambda data: zlib.decompressobj(wbits=31), _inflate),
        '.zst': (lambda data: _open_zstd(data, max_window_bytes), _unzstd),
        '.bz2': (lambda data: _import('bz2').BZ2Decompressor(), _decompress),
        '.xz': (lambda data: _open_xz(max_window_bytes), _decompress)}[compression]
    # Zeros between and behind members are padding: of tapes behind gzip, by the definition of the format in xz.
    self._padding = b'\0' if compression in ('.gz', '.xz') else b''

  def _block(self):
    while True:
      if self._member is None and not self._next_member():
        return b''
      if not self._input and getattr(self._member, 'needs_input', True):
        self._input = self._raw.read(BLOCK)
        if not self._input:
          raise EOFError('it ends within its compressed data')
      try:
        data, self._input = self._step(self._member, self._input)
      except Exception as e:
        if 'too much memory' in str(e) or 'emory usage limit' in str(e):
          raise Unsupported(f'its window is more than max_window_bytes={self._most}; raise that, or repack it: '
                            'xz -dc FILE | zstd -o NEW.zst') from e
        raise
      if self._member.eof:
        self._member = None
      if data:
        return data

  def _next_member(self):
    """Start the next member; return False at the end of the file."""
    if self._count:
      self._input = self._input.lstrip(self._padding) if self._padding else self._input
    while len(self._input) < _ZSTD_HEADER and (more := self._raw.read(BLOCK)):
      self._input += more
      if self._count and self._padding:
        self._input = self._input.lstrip(self._padding)
    if not self._input:
      return False
    self._member, self._count = self._begin(self._input), self._count + 1
    return True


def _inflate(member, data):
  block = member.decompress(data, BLOCK)
  return block, member.unused_data if member.eof else member.unconsumed_tail


def _decompress(member, data):
  block = member.decompress(data, BLOCK)
  return block, member.unused_data if member.eof else b''


def _unzstd(member, data):
  block = member.decompress(data[:_ZSTD_INPUT])
  return block, (member.unused_data if member.eof else b'') + data[_ZSTD_INPUT:]


def _import(name):
  try:
    return importlib.import_module(name)
  except ImportError as e:
    raise OSError(f'it needs the package {name}: pip install {name}') from e


def _open_zstd(data, max_window_bytes):
  zstandard = _import('zstandard')
  try:
    frame = zstandard.get_frame_parameters(data)
  except zstandard.ZstdError:
    frame = None  # A skippable frame, or no frame: the decompressor reports it.
  if frame and frame.dict_id:
    raise Unsupported('it was compressed with a dictionary, which is not supported; repack it: '
                      'zstd -dc -D DICTIONARY FILE | zstd -o NEW.zst')
  if frame and frame.window_size > max_window_bytes:
    raise Unsupported(f'its window of {frame.window_size:,} bytes is more than max_window_bytes={max_window_bytes}; '
                      'raise that, or repack it: zstd -dc --memory=2048MB FILE | zstd -o NEW.zst')
  return zstandard.ZstdDecompressor(max_window_size=max_window_bytes).decompressobj()


def _open_xz(max_window_bytes):
  lzma = _import('lzma')
  # The decoder needs some memory besides its window.
  return lzma.LZMADecompressor(memlimit=max_window_bytes + (16 << 20))


class _Recoded(Filled):
  """UTF-16 or UTF-32 as UTF-8, with the byte-order mark.  A lone surrogate becomes invalid UTF-8."""

  def __init__(self, stream, encoding):
    super().__init__()
    self._stream, self._decoder = stream, codecs.getincrementaldecoder(encoding)('surrogatepass')
    self._ended = False

  def _block(self):
    while not self._ended:
      data = self._stream.read(BLOCK)
      self._ended = not data
      try:
        text = self._decoder.decode(data, final=self._ended)
      except UnicodeDecodeError as e:
        raise OSError(f'invalid {e.encoding}: {e.reason}') from e
      if text:
        return text.encode('utf-8', 'surrogatepass')
    return b''


class _Preceded(Filled):
  """A stream with some bytes put back in front."""

  def __init__(self, begin, stream):
    super().__init__()
    self._buffer, self._stream = begin, stream

  def _block(self):
    return self._stream.read1(BLOCK) if hasattr(self._stream, 'read1') else self._stream.read(BLOCK)


def as_utf8(stream):
  """Return a stream as UTF-8 where a byte-order mark announces UTF-16 or UTF-32; else unchanged."""
  begin = b''
  while len(begin) < 4 and (data := stream.read(4 - len(begin))):
    begin += data
  whole = _Preceded(begin, stream)
  for mark, encoding in ((codecs.BOM_UTF32_LE, 'utf-32-le'), (codecs.BOM_UTF32_BE, 'utf-32-be'),
                         (codecs.BOM_UTF16_LE, 'utf-16-le'), (codecs.BOM_UTF16_BE, 'utf-16-be')):
    if begin.startswith(mark):
      return _Recoded(whole, encoding)
  return whole
