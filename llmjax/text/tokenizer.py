"""A lossless SentencePiece tokenizer: train, load, encode, decode, stream.

Decoding returns the encoded text exactly: no normalisation, no whitespace rules, byte fallback.  Chat markers are
control symbols, to which no text encodes, so a user's text can never contain one.
"""

import codecs
import functools
import hashlib
import io
import os
import pathlib

import numpy as np

from llmjax.config import ConfigError

PAD_ID, EOS_ID, UNK_ID, BOS_ID = 0, 1, 2, 3
CHAT_MARKERS = ('<|system|>', '<|user|>', '<|assistant|>', '<|tool|>', '<|end|>')
# SentencePiece represents spaces as U+2581, and would decode a U+2581 of the text to a space.
SPACE_MARK = '\u2581'
_MAX_LINE_BYTES = 4096


def train_tokenizer(lines, *, vocab_size, model_type='unigram', num_threads=2, special=()) -> bytes:
  """Train a tokenizer on an iterable of str; return the bytes of the SentencePiece model file.

  special: control symbols besides CHAT_MARKERS.  A unigram model depends on num_threads.  Raises ValueError where the
  text is too small for the vocabulary.
  """
  import sentencepiece

  model = io.BytesIO()
  # The trainer would take U+2581 for a space, and skip long lines.
  sample = (piece.replace(SPACE_MARK, ' ') for line in lines for piece in _pieces(line))
  try:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(s for s in sample if s), model_writer=model, vocab_size=vocab_size,
        model_type=model_type, num_threads=num_threads, max_sentence_length=4 * _MAX_LINE_BYTES,
        byte_fallback=True, normalization_rule_name='identity', remove_extra_whitespaces=False,
        add_dummy_prefix=False, allow_whitespace_only_pieces=True, split_digits=True,
        user_defined_symbols=['\n'], control_symbols=list(dict.fromkeys((*CHAT_MARKERS, *special))), pad_id=PAD_ID,
        eos_id=EOS_ID, unk_id=UNK_ID, bos_id=BOS_ID, hard_vocab_limit=False, minloglevel=2)
  except (RuntimeError, OSError) as e:
    reason = str(e).strip().splitlines()[-1] if str(e).strip() else type(e).__name__
    raise ValueError(f'no tokenizer of {vocab_size} ids could be trained on this text; write a '
                     f'smaller tokenizer.vocab_size, or give more text ({reason})') from e
  return model.getvalue()


def _pieces(line):
  """Yield the line in pieces that are short enough for the trainer."""
  for start in range(0, len(line), _MAX_LINE_BYTES):
    yield line[start:start + _MAX_LINE_BYTES]


class TokenizerError(ConfigError, ValueError):
  """A file is not a tokenizer of `llmjax prepare`."""


class Tokenizer:
  """Encodes text to ids and decodes ids.  The model file is read at first use; instances pickle as its path."""

  bos_id, eos_id, pad_id, unk_id = BOS_ID, EOS_ID, PAD_ID, UNK_ID

  def __init__(self, path: str | os.PathLike):
    self.path = os.fspath(path)

  def __getstate__(self):
    return {'path': self.path}

  def __repr__(self):
    return f'Tokenizer({self.path!r})'

  @functools.cached_property
  def _model(self) -> bytes:
    return pathlib.Path(self.path).read_bytes()

  @functools.cached_property
  def _processor(self):
    import sentencepiece

    try:
      processor = sentencepiece.SentencePieceProcessor(model_proto=self._model)
    except RuntimeError as e:
      raise TokenizerError([f'{self.path} is not a SentencePiece model']) from e
    expected = {'pad': PAD_ID, 'eos': EOS_ID, 'unk': UNK_ID, 'bos': BOS_ID}
    ids = {name: getattr(processor, f'{name}_id')() for name in expected}
    if ids != expected:
      raise TokenizerError([f'{self.path} has the special ids {ids}, not {expected}: it is not a tokenizer of '
                            '`llmjax prepare`'])
    return processor

  @functools.cached_property
  def sha256(self) -> str:
    """SHA-256 of the model file: tokenizers with the same hash give the same ids."""
    return hashlib.sha256(self._model).hexdigest()

  @functools.cached_property
  def vocab_size(self) -> int:
    return self._processor.get_piece_size()

  @functools.cached_property
  def special_ids(self) -> dict[str, int]:
    """Control symbols and their ids: <pad>, </s>, <s>, and the chat markers."""
    p = self._processor
    return {p.id_to_piece(i): i for i in range(p.get_piece_size()) if p.is_control(i)}

  @functools.cached_property
  def _mark_ids(self):
    pieces = [f'<0x{byte:02X}>' for byte in SPACE_MARK.encode()]
    return np.array([self._processor.piece_to_id(p) for p in pieces], np.int32)

  @functools.cached_property
  def _encode(self):
    return self._processor.encode_as_numpy

  def encode(self, text: str) -> np.ndarray:
    """Encode text as int32 ids [n], without BOS and EOS.  Raises UnicodeEncodeError for lone surrogates."""
    if SPACE_MARK in text:  # Encoded as its three UTF-8 bytes, the mark is kept.
      parts = []
      for i, part in enumerate(text.split(SPACE_MARK)):
        parts += [self._mark_ids] if i else []
        parts += [self._encode(part)]
      return np.concatenate(parts)
    try:
      return self._encode(text)
    except RuntimeError:
      text.encode()  # Raises an error that names the character.
      raise

  def decode(self, ids) -> str:
    """Decode ids; special ids give no text, invalid UTF-8 gives U+FFFD."""
    return self.decode_bytes(ids).decode('utf-8', errors='replace')

  def decode_bytes(self, ids) -> bytes:
    """Decode ids to UTF-8 bytes.  Raises IndexError for an id outside the vocabulary."""
    ids = np.asarray(ids, np.int64).ravel()
    if ids.size and ids.min() < 0:
      raise IndexError(f'token id {ids.min()} is negative')
    table = self._bytes_of_ids
    return b''.join([table[i] for i in ids.tolist()])

  def stream_decoder(self) -> 'StreamDecoder':
    return StreamDecoder(self)

  @functools.cached_property
  def _bytes_of_ids(self) -> list[bytes]:
    p = self._processor
    table = []
    for i in range(p.get_piece_size()):
      if p.is_byte(i):
        table.append(bytes([int(p.id_to_piece(i)[3:5], 16)]))
      elif p.is_control(i) or p.is_unknown(i):
        table.append(b'')
      else:
        table.append(p.id_to_piece(i).replace(SPACE_MARK, ' ').encode())
    return table

  def token_bytes(self) -> np.ndarray:
    """Return int32 [vocab_size]: the number of UTF-8 bytes of each id, 0 for special ids."""
    return np.array([len(b) for b in self._bytes_of_ids], np.int32)


class StreamDecoder:
  """Decodes ids one by one, and holds bytes back until they form whole characters."""

  def __init__(self, tokenizer):
    self._table = tokenizer._bytes_of_ids
    self._decoder = codecs.getincrementaldecoder('utf-8')(errors='replace')

  def add(self, *ids) -> str:
    """Add ids; return the text that is complete, or ''."""
    return self._decoder.decode(b''.join([self._table[int(i)] for i in ids]))

  def finish(self) -> str:
    """Return the remaining text: '', or U+FFFD for an incomplete character."""
    return self._decoder.decode(b'', final=True)
