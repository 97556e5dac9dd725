"""Rows of a fixed length, by number, from documents of any length.

A document of n stored ids gives n - 1 pairs (input, target).  `PackedRows` lays the pairs of all
documents end to end and cuts every T of them; `PaddedRows` starts each document in a row of its
own.  Either way a pair is in exactly one row, and no target or segment reaches into another
document.

A batch is a dict of [B, T] arrays: tokens, targets, segment_ids (1, 2, ... within the row, 0 is
padding), positions (from 0 in each segment), all int32; loss_mask float32.
"""

import functools

import numpy as np

from llmjax.data import token_store

FIELDS = {'tokens': np.int32, 'targets': np.int32, 'loss_mask': np.float32,
          'segment_ids': np.int32, 'positions': np.int32}


def new_batch(batch_size, seq_len) -> dict[str, np.ndarray]:
  """Returns arrays for rows that are yet to be filled: clearing them first costs as much again."""
  return {name: np.empty((batch_size, seq_len), dtype) for name, dtype in FIELDS.items()}


def pad_rows(batch, start):
  """Makes rows `start` and after padding: zeros in every field."""
  for value in batch.values():
    value[start:] = 0


class _Rows:
  """What both ways of cutting share.  Subclasses set the plan and fill a row."""

  def __init__(self, store: token_store.TokenStore, seq_len: int):
    self.store, self.seq_len = store, seq_len

  def __getstate__(self):
    return {'store': self.store, 'seq_len': self.seq_len}

  def __getitem__(self, row) -> dict[str, np.ndarray]:
    """Returns one row as a dict of [T] arrays."""
    return {name: value[0] for name, value in self.batch([row]).items()}

  def batch(self, rows) -> dict[str, np.ndarray]:
    """Returns the rows with these numbers as a dict of [len(rows), T] arrays."""
    out = new_batch(len(rows), self.seq_len)
    self.fill(out, range(len(rows)), rows)
    return out

  def fill(self, out, places, rows):
    """Writes row rows[k] to place places[k] of a batch."""
    count = len(self)
    for place, row in zip(places, rows, strict=True):
      if not 0 <= row < count:
        raise IndexError(f'row {row} of {count}')
      self._fill_row(out, place, row)

  @functools.cached_property
  def _counting(self):
    return np.arange(self.seq_len, dtype=np.int32)

  def _fill_one_document(self, out, place, start, count):
    """Writes `count` pairs of one document, whose first input is stored at `start`."""
    ids = self.store.tokens[start:start + count + 1]
    out['tokens'][place, :count] = ids[:-1]
    out['targets'][place, :count] = ids[1:]
    out['segment_ids'][place, :count] = 1
    out['positions'][place, :count] = self._counting[:count]
    self._finish_row(out, place, count)

  def _finish_row(self, out, place, count):
    """Weighs the first `count` targets 1 and makes the rest of the row padding."""
    out['loss_mask'][place, :count] = 1.0
    if count < self.seq_len:
      for value in out.values():
        value[place, count:] = 0


class PackedRows(_Rows):
  """Rows filled from consecutive documents; only the last row of a split has padding."""

  @functools.cached_property
  def _starts(self):
    """int64 [documents + 1]: the number of pairs before each document."""
    offsets = self.store.offsets
    return offsets - np.arange(len(offsets))

  @property
  def num_pairs(self) -> int:
    return self.store.num_tokens - len(self.store)

  def __len__(self):
    return -(-self.num_pairs // self.seq_len)

  def _fill_row(self, out, place, row):
    starts = self._starts
    begin = row * self.seq_len
    end = min(begin + self.seq_len, self.num_pairs)
    count = end - begin
    # Documents first .. last - 1 have pairs in [begin, end).
    first = int(starts.searchsorted(begin, 'right')) - 1
    if starts[first + 1] >= end:
      # Pair p of document d has its input at p + d: each document before it stored one id more.
      self._fill_one_document(out, place, begin + first, count)
      return
    last = int(starts.searchsorted(end, 'left'))
    bounds = starts[first:last + 1] - begin
    bounds[0], bounds[-1] = 0, count
    sizes = np.diff(bounds)
    segment = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    ids = self.store.tokens[begin + first:end + last]
    where = self._counting[:count] + segment
    out['tokens'][place, :count] = ids[where]
    out['targets'][place, :count] = ids[where + 1]
    out['segment_ids'][place, :count] = segment + 1
    out['positions'][place, :count] = self._counting[:count] - bounds[segment]
    self._finish_row(out, place, count)


class PaddedRows(_Rows):
  """Each document starts a row; what a row cannot hold goes on in rows of its own."""

  @functools.cached_property
  def _first_rows(self):
    """int64 [documents + 1]: the number of rows before each document."""
    pairs = np.diff(self.store.offsets) - 1
    return np.concatenate([[0], np.cumsum(-(-pairs // self.seq_len))])

  @property
  def num_pairs(self) -> int:
    return self.store.num_tokens - len(self.store)

  def __len__(self):
    return int(self._first_rows[-1])

  def _fill_row(self, out, place, row):
    document = int(self._first_rows.searchsorted(row, 'right')) - 1
    start, end = self.store.offsets[document:document + 2].tolist()
    start += (row - int(self._first_rows[document])) * self.seq_len
    self._fill_one_document(out, place, start, min(self.seq_len, end - 1 - start))


PACKINGS = {'concat': PackedRows, 'pad': PaddedRows}
