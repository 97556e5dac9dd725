"""Token ids of a split, concatenated in a flat memory-mapped file.

tokens.bin    uint16 (vocabulary up to 65,536) or uint32; a document of text is BOS, tokens, EOS.
offsets.npy   int64 [documents + 1]: where each document starts; the last one is the total.
<column>.bin  float32, one value for each id as a target: loss_mask (its weight in the loss) of all records but text,
              and step_labels (how good the step is that ends before it) of stepwise data.
fields.jsonl  one JSON object for each document: the answer of a prompt; label, margin and probability of a completion.
"""

import functools
import hashlib
import json
import os
import pathlib

import numpy as np


class TokenStoreWriter:
  """Writes a store; use it in a `with` block.  A store without meta.json is unfinished.

  columns: names of the columns of a store of conversations (`add_encoded`); none for text (`add`).
  """

  def __init__(self, folder, *, vocab_size, bos_id, eos_id, columns=()):
    self.folder = pathlib.Path(folder)
    self.folder.mkdir(parents=True, exist_ok=True)
    (self.folder / 'meta.json').unlink(missing_ok=True)
    self.vocab_size = vocab_size
    self.dtype = np.dtype('<u2' if vocab_size <= 1 << 16 else '<u4')
    self._bos, self._eos = (np.array([i], self.dtype).tobytes() for i in (bos_id, eos_id))
    self._files = {name: open(self.folder / f'{name}.bin', 'wb') for name in ('tokens', *columns)}
    self._hashes = {name: hashlib.sha256() for name in self._files}
    self._columns, self._lengths, self._trained, self._fields = tuple(columns), [], 0, []

  def add(self, ids) -> str | None:
    """Append a document of text: int [n], without BOS and EOS.

    Return None, or why the document is rejected: an id outside the vocabulary, or no ids.
    """
    ids = np.asarray(ids)
    problem = self._problem(ids)
    if not problem:
      self._write_ids(self._bos + ids.astype(self.dtype).tobytes() + self._eos)
    return problem

  def add_encoded(self, ids, columns, fields=None) -> str | None:
    """Append a rendered conversation: ids int [n], control tokens included, and {column: float [n]}.

    fields: an object to store with it.  Return value as of `add`.
    """
    ids = np.asarray(ids)
    problem = self._problem(ids)
    if not problem:
      self._write_ids(ids.astype(self.dtype).tobytes())
      for name in self._columns:
        self._write(name, np.asarray(columns[name], '<f4').tobytes())
      self._trained += int(np.count_nonzero(columns['loss_mask'][1:]))
      self._fields += [] if fields is None else [json.dumps(fields) + '\n']
    return problem

  def _problem(self, ids):
    if not ids.size:
      return 'no tokens'
    for bad in (int(ids.max()), int(ids.min())):
      if not 0 <= bad < self.vocab_size:
        return f'token id {bad} outside the vocabulary of {self.vocab_size}'
    return None

  def _write_ids(self, data):
    self._write('tokens', data)
    self._lengths.append(len(data) // self.dtype.itemsize)

  def _write(self, name, data):
    self._files[name].write(data)
    self._hashes[name].update(data)

  def __enter__(self):
    return self

  def __exit__(self, kind, error, trace):
    for file in self._files.values():
      file.flush()
      os.fsync(file.fileno())
      file.close()
    if kind is not None:
      return
    offsets = np.zeros(len(self._lengths) + 1, np.int64)
    np.cumsum(self._lengths, out=offsets[1:])
    np.save(self.folder / 'offsets.npy', offsets)
    self.meta = {'dtype': self.dtype.str, 'documents': len(self._lengths), 'tokens': int(offsets[-1]),
                 'tokens_sha256': self._hashes['tokens'].hexdigest()}
    if self._columns:
      self.meta |= {'columns_sha256': {name: self._hashes[name].hexdigest() for name in self._columns},
                    'trained': self._trained}
    if self._fields:
      data = ''.join(self._fields).encode()
      (self.folder / 'fields.jsonl').write_bytes(data)
      self.meta['fields_sha256'] = hashlib.sha256(data).hexdigest()
    (self.folder / 'meta.json').write_text(json.dumps(self.meta, indent=2) + '\n')


class TokenStore:
  """Reads a store.  Maps its files at first use; pickles as its path.  Raises ValueError where it is damaged."""

  def __init__(self, folder):
    self.folder = os.fspath(folder)
    try:
      self.meta = json.loads((pathlib.Path(folder) / 'meta.json').read_text())
      valid = (self.meta['dtype'] in ('<u2', '<u4') and isinstance(self.meta.get('columns_sha256', {}), dict)
               and all(type(self.meta[name]) is int and self.meta[name] >= 0 for name in ('documents', 'tokens')))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
      raise ValueError(f'{folder} is not a finished token store; prepare it again with --force') from e
    if not valid:
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

  @property
  def column_names(self) -> tuple[str, ...]:
    """Names of the columns; none in a store of text, all of whose targets weigh 1."""
    return tuple(self.meta.get('columns_sha256', ()))

  @functools.cached_property
  def columns(self) -> dict[str, np.ndarray]:
    """{name: float32 [num_tokens], mapped}."""
    return {name: self._map(f'{name}.bin', np.dtype('<f4')) for name in self.column_names}

  @functools.cached_property
  def fields(self) -> list[dict]:
    """The fields of each document, in order."""
    path = pathlib.Path(self.folder) / 'fields.jsonl'
    try:
      fields = [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]
    except (OSError, ValueError, RecursionError) as e:
      raise ValueError(f'{path} cannot be read; prepare the folder again with --force') from e
    if len(fields) != len(self) or not all(isinstance(item, dict) for item in fields):
      raise ValueError(f'{path} does not match meta.json; prepare the folder again with --force')
    return fields

  def _map(self, name, dtype):
    path = pathlib.Path(self.folder) / name
    try:
      size = path.stat().st_size
    except OSError as e:
      raise ValueError(f'{path} cannot be read ({e.strerror}); prepare the folder again with --force') from e
    if size != self.num_tokens * dtype.itemsize:
      raise ValueError(f'{path} has {size} bytes, not the {self.num_tokens} ids of meta.json; prepare the folder again '
                       'with --force')
    if not self.num_tokens:
      return np.zeros(0, dtype)
    # A plain ndarray over the map: indexing np.memmap itself costs several times as much.
    return np.asarray(np.memmap(path, dtype, 'r'))

  @functools.cached_property
  def offsets(self) -> np.ndarray:
    """int64 [documents + 1]."""
    path = pathlib.Path(self.folder) / 'offsets.npy'
    try:
      offsets = np.load(path, allow_pickle=False)
    except Exception as e:  # The parser of NumPy's header raises errors of many types.
      raise ValueError(f'{path} is damaged; prepare the folder again with --force') from e
    if (offsets.dtype != np.int64 or offsets.shape != (len(self) + 1,) or offsets[0] != 0
        or offsets[-1] != self.num_tokens or np.any(np.diff(offsets) < 0)):
      raise ValueError(f'{path} does not match meta.json; prepare the folder again with --force')
    return offsets

  def __getitem__(self, document) -> np.ndarray:
    """Return the stored ids of a document."""
    if not 0 <= document < len(self):
      raise IndexError(f'document {document} of {len(self)}')
    return self.tokens[self.offsets[document]:self.offsets[document + 1]]
