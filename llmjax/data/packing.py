"""Rows of a fixed length, by number, from documents of any length.

A document of n stored ids gives n - 1 pairs (input, target).  `PackedRows` lays the pairs of all
documents end to end and cuts every T of them; `PaddedRows` starts each document in a row of its
own; `BestFitRows` puts whole documents together.  Either way a pair is in exactly one row, and no target or
segment reaches into another document.  What the last two do with a document longer than T is said at
`_Pieces`: only there may a pair be in no row.

A batch is a dict of [B, T] arrays: tokens, targets, segment_ids (1, 2, ... within the row, 0 is
padding), positions (from 0 in each segment), all int32; loss_mask float32: the weight of each target.
"""

import functools

import numpy as np

from llmjax.config import ConfigError
from llmjax.data import token_store
from llmjax.data.conversations import PAIR_NUMBERS

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

  each = 1  # Rows of a batch that belong together under one number.
  numbers = {}  # {name: float32 [len(self)]}: what is told of each of them.

  def __init__(self, store: token_store.TokenStore, seq_len: int, long: str = 'error'):
    self.store, self.seq_len, self.overflow = store, seq_len, long

  def __getstate__(self):
    return {'store': self.store, 'seq_len': self.seq_len, 'overflow': self.overflow}

  def __getitem__(self, row) -> dict[str, np.ndarray]:
    """Returns one row as a dict of [T] arrays."""
    return {name: value[0] for name, value in self.batch([row]).items()}

  def batch(self, rows) -> dict[str, np.ndarray]:
    """Returns the rows with these numbers as a dict of [len(rows), T] arrays."""
    out = new_batch(len(rows) * self.each, self.seq_len)
    self.fill(out, range(len(rows)), rows)
    return out

  def fill(self, out, places, rows):
    """Writes row rows[k] to place places[k] of a batch."""
    count = len(self)
    for place, row in zip(places, rows, strict=True):
      if not 0 <= row < count:
        raise IndexError(f'row {row} of {count}')
      self._fill_row(out, place, row)

  def left_out(self) -> dict[str, int]:
    """Returns how many conversations were cut, and how many left out, for being longer than a row."""
    return {'truncated': 0, 'dropped': 0}

  @functools.cached_property
  def _counting(self):
    return np.arange(self.seq_len, dtype=np.int32)

  def _fill_one_document(self, out, place, start, count):
    """Makes a row of `count` pairs of one document, whose first input is stored at `start`."""
    self._fill_pairs(out, place, 0, 1, start, count)
    self._pad_row(out, place, count)

  def _fill_pairs(self, out, place, column, segment, start, count):
    """Writes `count` pairs of one document, whose first input is stored at `start`, from `column` on."""
    ids, end = self.store.tokens[start:start + count + 1], column + count
    out['tokens'][place, column:end] = ids[:-1]
    out['targets'][place, column:end] = ids[1:]
    out['segment_ids'][place, column:end] = segment
    out['positions'][place, column:end] = self._counting[:count]
    weights = self.store.weights
    out['loss_mask'][place, column:end] = 1.0 if weights is None else weights[start + 1:start + count + 1]

  def _pad_row(self, out, place, count):
    """Makes what is behind the first `count` targets padding."""
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
    weights = self.store.weights
    out['loss_mask'][place, :count] = 1.0 if weights is None else weights[begin + first:end + last][where + 1]
    self._pad_row(out, place, count)


class _Pieces(_Rows):
  """Rows of documents that fit into one, or of parts of them that do.

  A longer document of text goes on in further parts.  A conversation's later parts would lack what was said
  before, so there `long` decides: error refuses the store, truncate keeps the first T pairs if any of them is
  trained, drop leaves the document out.
  """

  @functools.cached_property
  def _pieces(self):
    """(first stored id, pairs), both int64 [pieces]: what is to be laid into rows, in order."""
    starts, pairs = self.store.offsets[:-1], np.diff(self.store.offsets) - 1
    if not self.store.is_weighted:
      counts = -(-pairs // self.seq_len)
      first = np.repeat(np.cumsum(counts) - counts, counts)
      begin = (np.arange(len(first)) - first) * self.seq_len
      return np.repeat(starts, counts) + begin, np.minimum(np.repeat(pairs, counts) - begin, self.seq_len)
    fits = self._keeps(starts, pairs)
    return starts[fits], np.minimum(pairs[fits], self.seq_len)

  def _keeps(self, starts, pairs):
    """Returns bool [documents]: which conversations are used."""
    is_long = pairs > self.seq_len
    if self.overflow == 'error' and is_long.any():
      worst = int(pairs.argmax())
      raise ConfigError([
          f'{is_long.sum():,} of {len(pairs):,} conversations in {self.store.folder} are longer than data.seq_len='
          f'{self.seq_len}, document {worst} with {pairs[worst]:,} tokens; write data.seq_len={int(pairs.max())}, or '
          'data.overflow=truncate or drop'])
    keeps = (pairs > 0) & ~is_long
    if self.overflow == 'truncate':
      for i in np.flatnonzero(is_long):
        keeps[i] = np.any(self.store.weights[starts[i] + 1:starts[i] + 1 + self.seq_len])
    return keeps

  def left_out(self):
    pairs = np.diff(self.store.offsets) - 1
    is_long = pairs > self.seq_len
    if not self.store.is_weighted or not is_long.any():
      return {'truncated': 0, 'dropped': 0}
    kept = int((self._keeps(self.store.offsets[:-1], pairs) & is_long).sum())
    return {'truncated': kept, 'dropped': int(is_long.sum()) - kept}

  @property
  def num_pairs(self) -> int:
    return int(self._pieces[1].sum())


class PaddedRows(_Pieces):
  """Each document starts a row; what a row cannot hold goes on in rows of its own."""

  def __len__(self):
    return len(self._pieces[0])

  def _fill_row(self, out, place, row):
    starts, counts = self._pieces
    self._fill_one_document(out, place, int(starts[row]), int(counts[row]))


class BestFitRows(_Pieces):
  """Whole documents, longest first, each laid into the fullest row that still has room (arXiv:2404.10830, 3.2).

  The rows depend on the lengths alone, and are made at first use: about a second for a million documents.
  """

  @functools.cached_property
  def _layout(self):
    """(bounds int64 [rows + 1], members int64 [pieces]): row r has pieces members[bounds[r]:bounds[r + 1]]."""
    rows = best_fit(self._pieces[1], self.seq_len)
    order = np.argsort(rows, kind='stable')
    count = int(rows.max(initial=-1)) + 1
    return np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=count))]), order

  def __len__(self):
    return len(self._layout[0]) - 1

  def _fill_row(self, out, place, row):
    bounds, members = self._layout
    starts, counts = self._pieces
    column = 0
    for segment, piece in enumerate(members[bounds[row]:bounds[row + 1]].tolist(), 1):
      count = int(counts[piece])
      self._fill_pairs(out, place, column, segment, int(starts[piece]), count)
      column += count
    self._pad_row(out, place, column)


class PairRows(_Pieces):
  """Pairs, each of two rows under one number: the chosen answer's at an even place, the rejected one's behind it."""

  each = 2

  @functools.cached_property
  def _pieces(self):
    """(first stored id, pairs), both int64 [2 * pairs]: chosen, rejected, chosen, ..."""
    starts, pairs = self.store.offsets[:-1], np.diff(self.store.offsets) - 1
    fits = np.repeat(self._kept, 2)
    return starts[fits], np.minimum(pairs[fits], self.seq_len)

  @functools.cached_property
  def _kept(self):
    """bool [pairs of the store]: a half is of no use."""
    starts, pairs = self.store.offsets[:-1], np.diff(self.store.offsets) - 1
    return self._keeps(starts, pairs).reshape(-1, 2).all(1)

  @functools.cached_property
  def numbers(self):
    """{name: float32 [len(self)]} of `conversations.PAIR_NUMBERS`, those that any pair has."""
    notes = [note for note, kept in zip(self.store.notes[::2], self._kept, strict=True) if kept]
    return {name: np.array([note.get(name, default) for note in notes], np.float32)
            for name, (_, _, default) in PAIR_NUMBERS.items() if any(name in note for note in notes)}

  def __len__(self):
    return len(self._pieces[0]) // 2

  def _fill_row(self, out, place, row):
    starts, counts = self._pieces
    for i in (0, 1):
      self._fill_one_document(out, 2 * place + i, int(starts[2 * row + i]), int(counts[2 * row + i]))


class PromptRows(_Pieces):
  """Prompts by number; they are no rows, as their completions are yet to come."""

  @functools.cached_property
  def _kept(self):
    """int64: the documents that are used."""
    sizes = np.diff(self.store.offsets)
    if self.overflow == 'error':
      self._keeps(self.store.offsets[:-1], sizes)
    return np.flatnonzero(sizes <= self.seq_len if self.overflow == 'drop' else sizes > 0)

  def __len__(self):
    return len(self._kept)

  def prompt(self, number) -> dict:
    """Returns {'ids': int32 [n], 'answer': text}; of a longer one the last seq_len ids."""
    document = int(self._kept[number])
    return {'ids': self.store[document][-self.seq_len:].astype(np.int32), 'answer': self.store.notes[document]}


def best_fit(sizes, capacity):
  """Returns int64 [n]: the row of each size, none of them cut.  sizes: int [n], from 1 to capacity.

  Row after row takes the largest piece that is left and then, again and again, one with which the row can still come
  out full.  Plain best-fit decreasing (arXiv:2404.10830, section 3.2) looks at one piece at a time, and where none is
  short leaves gaps that nothing fits: 0.9 % of 256 places on short instructions, this way 0.2 %.  Which one is tried
  in two ways, and the fewer rows count: the largest, which keeps short pieces for later, or one of a size as common
  pieces have, so that what is left stays a fair sample.  Equal sizes keep their order.
  """
  sizes = np.asarray(sizes, np.int64)
  rows = _lay_out(sizes, capacity, largest=True)
  if rows.max(initial=-1) + 1 > -(-sizes.sum() // capacity):
    other = _lay_out(sizes, capacity, largest=False)
    rows = other if other.max() < rows.max() else rows
  return rows


def _lay_out(sizes, capacity, largest):
  rows, order = np.zeros(len(sizes), np.int64), np.argsort(-sizes, kind='stable')
  distinct, counts = np.unique(sizes, return_counts=True)
  # Pieces of a size lie together in `order`, largest sizes first; each list is taken from its end.
  ends = np.cumsum(counts[::-1])[::-1]
  left = {int(s): order[end - n:end][::-1].tolist() for s, n, end in zip(distinct, counts, ends, strict=True)}
  there = sum(1 << s for s in left)  # Sizes that are left, as bits.
  fillers, full = _fillers(there, capacity)
  # Steps of the golden ratio go evenly over all pieces, whatever their number.
  common = sizes[order[(np.arange(len(sizes)) * 0.6180339887498949 % 1 * len(sizes)).astype(np.int64)]].tolist()
  row = taken = 0
  while there:
    size, gap = there.bit_length() - 1, capacity
    while size:
      rows[left[size].pop()] = row
      gap, taken = gap - size, taken + 1
      if not left[size]:
        there ^= 1 << size
        if fillers >> size & 1:
          fillers, full = _fillers(there, capacity)
      # Bit s says: a piece of s is there, and pieces that are can fill what it leaves, or most of it.
      for goal in range(gap, 0, -1):
        fits = there & (full >> (capacity - goal)) & ((2 << goal) - 1)
        if fits:
          break
      else:
        break
      below = fits if largest else fits & ((2 << common[taken]) - 1)
      size = (below or fits & -fits).bit_length() - 1
    row += 1
  return rows


def _fillers(there, capacity, most=64):
  """Returns (the `most` smallest sizes that are there, which sums of them there are); both as bits.

  Sums up to capacity, as bit capacity - sum; each size any number of times.
  """
  fillers, sums, mask = 0, 1, (2 << capacity) - 1
  for _ in range(most):
    if not there:
      break
    size = (there & -there).bit_length() - 1
    there, fillers, step = there & (there - 1), fillers | 1 << size, size
    while step <= capacity:
      sums |= sums << step & mask
      step *= 2
  return fillers, int(f'{sums:0{capacity + 1}b}'[::-1], 2)


PACKINGS = {'concat': PackedRows, 'best_fit': BestFitRows, 'pad': PaddedRows}
