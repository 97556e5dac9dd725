"""What reading makes of files: documents, and what was left out and why."""

import dataclasses
from collections.abc import Callable


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
  times its size that is.  max_window_bytes: how far back a compressed file may refer, all of it memory.
  follow_links: read what links of the file system lead to outside the folder.
  """

  suffixes: tuple[str, ...]
  text_key: str = 'text'
  document_bytes: int = 1 << 20
  max_record_bytes: int = 16 << 20
  max_unpacked_bytes: int = 1 << 38
  max_unpacked_ratio: int = 200
  follow_links: bool = False
  take: Callable[[dict], str] | None = None
  max_window_bytes: int = 1 << 31


def check_record(record, name, file, limits, offset=None, line=None):
  """Returns the Document of a record, a dict as JSON has it, or the Rejected that says what is wrong with it."""
  if limits.take:
    try:
      return check_text(limits.take(record), name, file, limits, offset, line)
    except ValueError as e:
      return Rejected(file, one_line(e), offset, line)
  if not isinstance(record, dict) or limits.text_key not in record:
    fields = field_names(record) if isinstance(record, dict) else 'no object'
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


def field_names(names):
  """Returns the first few names of fields, as a message can show them."""
  return ', '.join(''.join(c if c.isprintable() else '?' for c in str(name)[:40]) for name in list(names)[:8])


def one_line(error):
  """Returns the first line of what an error says, as a message can show it: a file may have written it."""
  line = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
  return ''.join(c if c.isprintable() else '?' for c in line)
