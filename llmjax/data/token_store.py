"""Token ids of a split, one after another in a flat memory-mapped file.

tokens.bin: uint16 (vocabulary up to 65,536) or uint32, every document as BOS, tokens, EOS.
offsets.npy: int64 [documents + 1], where each document starts; the last one is the total.
weights.bin: float32, one for each id: its weight in the loss as a target.  Only stores of conversations have it;
their documents are as the chat template makes them.
notes.jsonl: one JSON value for each document; stores of prompts have it, for the right answers, and
those of pairs, for what a pair says of itself.
"""

import functools
import hashlib
import json
import os
import pathlib

import numpy as np


class TokenStoreWriter:
  """Writes a store; use it in a `with` block.  A store without meta.json was not finished.

  weighted: documents come with the weight of every id (`add_weighted`), else as text (`add`).
  """

  def __init__(self, folder, *, vocab_size, bos_id, eos_id, weighted=False):
    self.folder = pathlib.Path(folder)
    self.folder.mkdir(parents=True, exist_ok=True)
    (self.folder / 'meta.json').unlink(missing_ok=True)
    self.vocab_size = vocab_size
    self.dtype = np.dtype('<u2' if vocab_size <= 1 << 16 else '<u4')
    self._bos, self._eos = (np.array([i], self.dtype).tobytes() for i in (bos_id, eos_id))
    self._file = open(self.folder / 'tokens.bin', 'wb')
    self._hash = hashlib.sha256()
    self._lengths = []
    (self.folder / 'weights.bin').unlink(missing_ok=True)
    self._weights = open(self.folder / 'weights.bin', 'wb') if weighted else None
    self._weights_hash, self._trained, self._notes = hashlib.sha256(), 0, []

  def add(self, ids) -> str | None:
    """Appends a document's ids (int [n], BOS and EOS not among them).

    Returns None, or why the document was refused: an id outside the vocabulary, or no ids.
    """
    ids = np.asarray(ids)
    refused = self._refusal(ids)
    if not refused:
      self._write(self._bos + ids.astype(self.dtype).tobytes() + self._eos)
    return refused

  def add_weighted(self, ids, weights, note=None) -> str | None:
    """Appends a document's ids (int [n], whatever begins and ends it among them) and weights (float [n]).

    note: a JSON value to keep with it.
    """
    ids, data = np.asarray(ids), np.asarray(weights, '<f4')
    refused = self._refusal(ids)
    if not refused:
      self._write(ids.astype(self.dtype).tobytes())
      self._weights.write(data.tobytes())
      self._weights_hash.update(data.tobytes())
      self._trained += int(np.count_nonzero(data[1:]))
      self._notes += [] if note is None else [json.dumps(note) + '\n']
    return refused

  def _refusal(self, ids):
    if not ids.size:
      return 'no tokens'
    if int(ids.max()) >= self.vocab_size or int(ids.min()) < 0:
      bad = int(ids.max()) if int(ids.max()) >= self.vocab_size else int(ids.min())
      return f'token id {bad} outside the vocabulary of {self.vocab_size}'
    return None

  def _write(self, data):
    self._file.write(data)
    self._hash.update(data)
    self._lengths.append(len(data) // self.dtype.itemsize)

  def __enter__(self):
    return self

  def __exit__(self, kind, error, trace):
    for file in filter(None, (self._file, self._weights)):
      file.flush()
      os.fsync(file.fileno())
      file.close()
    if kind is not None:
      return
    offsets = np.zeros(len(self._lengths) + 1, np.int64)
    np.cumsum(self._lengths, out=offsets[1:])
    np.save(self.folder / 'offsets.npy', offsets)
    meta = {'dtype': self.dtype.str, 'documents': len(self._lengths), 'tokens': int(offsets[-1]),
            'tokens_sha256': self._hash.hexdigest()}
    if self._weights:
      meta |= {'weights_sha256': self._weights_hash.hexdigest(), 'trained': self._trained}
    if self._notes:
      notes = ''.join(self._notes).encode()
      (self.folder / 'notes.jsonl').write_bytes(notes)
      meta['notes_sha256'] = hashlib.sha256(notes).hexdigest()
    (self.folder / 'meta.json').write_text(json.dumps(meta, indent=2) + '\n')
    self.meta = meta


class TokenStore:
  """Reads a store.  Maps its files at first use; pickles as its path."""

  def __init__(self, folder):
    self.folder = os.fspath(folder)
    try:
      self.meta = json.loads((pathlib.Path(folder) / 'meta.json').read_text())
      good = (self.meta['dtype'] in ('<u2', '<u4')
              and all(type(self.meta[name]) is int and self.meta[name] >= 0 for name in ('documents', 'tokens')))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
      raise ValueError(f'{folder} is not a finished token store; prepare it again with '
                       '--force') from e
    if not good:
      raise ValueError(f'{folder}/meta.json is damaged; prepare the folder again with --force')

  def __getstate__(self):
    return {'folder': self.folder, 'meta': self.meta}

  def __len__(self):
    return self.meta['documents']

  @property
  def num_tokens(self) -> int:
    """Stored ids, BOS and EOS included."""
    return self.meta['tokens']

  @functools.cached_property
  def tokens(self) -> np.ndarray:
    """uint16 or uint32 [num_tokens], mapped."""
    return self._map('tokens.bin', np.dtype(self.meta['dtype']))

  @functools.cached_property
  def weights(self) -> np.ndarray | None:
    """float32 [num_tokens], mapped: the weight of each id as a target.  None: all weigh 1."""
    return self._map('weights.bin', np.dtype('<f4')) if self.is_weighted else None

  @functools.cached_property
  def notes(self) -> list:
    """The notes of the documents, in order."""
    path = pathlib.Path(self.folder) / 'notes.jsonl'
    try:
      found = [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]
    except (OSError, ValueError, RecursionError) as e:
      raise ValueError(f'{path} cannot be read; prepare the folder again with --force') from e
    if len(found) != len(self):
      raise ValueError(f'{path} does not fit meta.json beside it; prepare the folder again with --force')
    return found

  @property
  def is_weighted(self) -> bool:
    return 'weights_sha256' in self.meta

  def _map(self, name, dtype):
    path = pathlib.Path(self.folder) / name
    try:
      size = path.stat().st_size
    except OSError as e:
      raise ValueError(f'{path} cannot be read ({e.strerror}); prepare the folder again with --force') from e
    if size != self.num_tokens * dtype.itemsize:
      raise ValueError(f'{path} has {size} bytes, not the {self.num_tokens} ids of '
                       'its meta.json; prepare the folder again with --force')
    if not self.num_tokens:
      return np.zeros(0, dtype)
    # A plain ndarray over the map: indexing np.memmap itself costs several times as much.
    return np.asarray(np.memmap(path, dtype, 'r'))

  @functools.cached_property
  def offsets(self) -> np.ndarray:
    """int64 [documents + 1]."""
    path = pathlib.Path(self.folder) / 'offsets.npy'
    try:
      found = np.load(path, allow_pickle=False)
    except Exception as e:  # NumPy lets pass what its header's parser raises.
      raise ValueError(f'{path} is damaged or of another kind; prepare the folder again with --force') from e
    if (found.dtype != np.int64 or found.shape != (len(self) + 1,) or found[0] != 0
        or found[-1] != self.num_tokens or np.any(np.diff(found) < 0)):
      raise ValueError(f'{path} does not fit meta.json beside it; prepare the folder again with --force')
    return found

  def __getitem__(self, document) -> np.ndarray:
    """Returns the stored ids of a document: BOS, tokens, EOS."""
    if not 0 <= document < len(self):
      raise IndexError(f'document {document} of {len(self)}')
    return self.tokens[self.offsets[document]:self.offsets[document + 1]]
