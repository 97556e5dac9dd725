"""A lossless SentencePiece tokenizer: train it, load it, encode, decode, stream.

Every text that UTF-8 can write comes back from its ids exactly: no normalisation, no whitespace
rules, bytes for what the vocabulary lacks.  Chat markers are control symbols, which no text encodes
to, so a user's text can never contain one.
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
# SentencePiece writes spaces as U+2581 inside, and would give a U+2581 of the text back as a space.
SPACE_MARK = '\u2581'
_MAX_LINE_BYTES = 4096


def train_tokenizer(lines, *, vocab_size, model_type='unigram', num_threads=2, special=()) -> bytes:
  """Returns a SentencePiece model file trained on an iterable of str.

  special: control symbols besides CHAT_MARKERS.  A unigram model depends on num_threads: keep it and record
  it.  Raises ValueError with one line when the lines do not support the vocabulary.
  """
  import sentencepiece

  model = io.BytesIO()
  # A mark in the sample would be taken for a space; longer lines would be skipped by the trainer.
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
  """Yields the line in pieces that the trainer does not skip for their length."""
  for start in range(0, len(line), _MAX_LINE_BYTES):
    yield line[start:start + _MAX_LINE_BYTES]


class TokenizerError(ConfigError, ValueError):
  """A file that is no tokenizer of ours."""


class Tokenizer:
  """Text to ids and back.  The model file is read at first use, so instances pickle small."""

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
    found = {name: getattr(processor, f'{name}_id')() for name in expected}
    if found != expected:
      raise TokenizerError([f'{self.path} has the special ids {found}, not {expected}: it was not made '
                            'by `llmjax prepare`'])
    return processor

  @functools.cached_property
  def sha256(self) -> str:
    """Hash of the model file: two tokenizers with one hash give the same ids."""
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
    """Returns int32 ids [n], without BOS and EOS.  Raises UnicodeEncodeError on lone surrogates."""
    if SPACE_MARK in text:  # Written as its three UTF-8 bytes, the mark stays itself.
      parts = []
      for i, part in enumerate(text.split(SPACE_MARK)):
        parts += [self._mark_ids] if i else []
        parts += [self._encode(part)]
      return np.concatenate(parts)
    try:
      return self._encode(text)
    except RuntimeError:
      text.encode()  # Says which character it was.
      raise

  def decode(self, ids) -> str:
    """Returns the text of ids; special ids give nothing, bytes that are not UTF-8 give U+FFFD."""
    return self.decode_bytes(ids).decode('utf-8', errors='replace')

  def decode_bytes(self, ids) -> bytes:
    """Returns the UTF-8 bytes of ids; raises IndexError on an id outside the vocabulary."""
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
    """Returns int32 [vocab_size]: the UTF-8 bytes that each id stands for, 0 for special ids."""
    return np.array([len(b) for b in self._bytes_of_ids], np.int32)


class StreamDecoder:
  """Turns ids into text as they come, holding back bytes until they make whole characters."""

  def __init__(self, tokenizer):
    self._table = tokenizer._bytes_of_ids
    self._decoder = codecs.getincrementaldecoder('utf-8')(errors='replace')

  def add(self, *ids) -> str:
    """Returns the text that these ids complete, often one token's, sometimes ''."""
    return self._decoder.decode(b''.join([self._table[int(i)] for i in ids]))

  def finish(self) -> str:
    """Returns what is left: '' or U+FFFD for bytes that made no character."""
    return self._decoder.decode(b'', final=True)
