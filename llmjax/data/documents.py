"""Results of reading a source: documents, and rejected records with the reason."""

import dataclasses
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class Document:
  """A text and the file it came from.

  split: train, validation or test; '' to assign one at random.  record: whether it is independent of the other
  documents of its file, as a line of JSONL is.
  """

  name: str
  text: str
  file: str
  split: str = ''
  record: bool = False


@dataclasses.dataclass(frozen=True)
class Rejected:
  """A record that was left out.  offset: bytes from the start of the (uncompressed) file.  line: from 1.

  kept: True where only a byte-order mark was removed.
  """

  file: str
  reason: str
  offset: int | None = None
  line: int | None = None
  bytes: int | None = None
  kept: bool = False


@dataclasses.dataclass(frozen=True)
class Limits:
  """How files are read, and how much they may hold.

  suffixes: of the files to read.  document_bytes: size at which plain text is cut.  text_key: field of records with the
  text.  normalise: function of a whole record to its text, instead of text_key; it raises ValueError with the reason.
  max_unpacked_bytes, max_unpacked_ratio: of what a file unpacks to on all levels, absolutely and as a multiple of its
  size.  max_window_bytes: memory of a decompressor.  follow_links: read the targets of links to outside the folder.
  """

  suffixes: tuple[str, ...]
  text_key: str = 'text'
  document_bytes: int = 1 << 20
  max_record_bytes: int = 16 << 20
  max_unpacked_bytes: int = 1 << 38
  max_unpacked_ratio: int = 200
  follow_links: bool = False
  normalise: Callable[[dict], str] | None = None
  max_window_bytes: int = 1 << 31


def check_record(record, name, file, limits, offset=None, line=None):
  """Return the Document of a record, a dict of JSON types, or a Rejected with the reason."""
  if limits.normalise:
    try:
      return check_text(limits.normalise(record), name, file, limits, offset, line)
    except ValueError as e:
      return Rejected(file, one_line(e), offset, line)
  if not isinstance(record, dict) or limits.text_key not in record:
    fields = field_names(record) if isinstance(record, dict) else 'not an object'
    return Rejected(file, f'no field {limits.text_key!r} (found: {fields})', offset, line)
  return check_text(record[limits.text_key], name, file, limits, offset, line)


def check_text(text, name, file, limits, offset=None, line=None):
  """Return the Document of a record's text, or a Rejected with the reason."""
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


def field_names(names):
  """Return the first few names of fields in printable form."""
  return ', '.join(''.join(c if c.isprintable() else '?' for c in str(name)[:40]) for name in list(names)[:8])


def one_line(error):
  """Return the first line of an error's message in printable form: it may quote a file."""
  line = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
  return ''.join(c if c.isprintable() else '?' for c in line)
