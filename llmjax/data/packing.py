"""Examples of a split by number, laid out in sequences of a fixed length.

A document of n stored tokens has n - 1 targets.  `PackedSequences` concatenates the documents and cuts every T targets,
`PaddedSequences` starts each document in a new sequence, and `BestFitSequences` packs whole documents.  No target and
no segment reaches into another document.  Every target is in exactly one sequence, except where a conversation is
longer than a sequence (see `_WholeDocuments`).

A batch is a dict of [B, T] arrays: tokens, targets, segment_ids (1, 2, ... within the sequence, 0 is padding) and
positions (from 0 in each segment), all int32; loss_mask, float32, is the weight of each target; stepwise data also have
step_labels, float32.
"""

import functools

import numpy as np

from llmjax.config import ConfigError
from llmjax.data import token_store

FIELDS = {'tokens': np.int32, 'targets': np.int32, 'loss_mask': np.float32,
          'segment_ids': np.int32, 'positions': np.int32}
# Numbers that the documents of preference data come with, and what is assumed where a record has none.
PREFERENCE_COLUMNS = {'label': None, 'margin': 0.0, 'probability': 1.0}


class _Layout:
  """The examples of one token store.  Subclasses define `__len__`, `num_targets` and `_fill_example`."""

  sequences_per_example = 1
  columns = {}  # {name: float32 [len(self), sequences_per_example]}: one number for each sequence.

  def __init__(self, store: token_store.TokenStore, seq_len: int, overflow: str = 'error'):
    self.store, self.seq_len, self.overflow = store, seq_len, overflow

  def __getstate__(self):
    return {'store': self.store, 'seq_len': self.seq_len, 'overflow': self.overflow}

  def __getitem__(self, number) -> dict[str, np.ndarray]:
    """Return one sequence as a dict of [T] arrays."""
    return {name: value[0] for name, value in self.batch([number]).items()}

  def batch(self, numbers):
    """Return the examples with these numbers as one batch."""
    out = self.new_batch(len(numbers), token_columns=self.token_columns)
    self.fill(out, range(len(numbers)), numbers)
    return out

  def new_batch(self, num_examples, size=0, token_columns=()) -> dict[str, np.ndarray]:
    """Allocate a batch of `num_examples` to be filled, padded with zeros to `size` examples.

    token_columns: names of columns besides FIELDS.
    """
    shape = (max(size, num_examples) * self.sequences_per_example, self.seq_len)
    # Not np.zeros: clearing what is filled anyway costs as much again.
    out = {name: np.empty(shape, dtype) for name, dtype in FIELDS.items()}
    for value in out.values():
      value[num_examples * self.sequences_per_example:] = 0
    return {**out, **{name: np.zeros(shape, np.float32) for name in token_columns}}

  def fill(self, out, places, numbers):
    """Write example numbers[k] to place places[k] of a batch."""
    count = len(self)
    for place, number in zip(places, numbers, strict=True):
      if not 0 <= number < count:
        raise IndexError(f'example {number} of {count}')
      self._fill_example(out, place, number)

  @property
  def token_columns(self):
    """Names of the store's columns besides loss_mask."""
    return tuple(name for name in self.store.column_names if name != 'loss_mask')

  def overflow_counts(self) -> dict[str, int]:
    """Return how many conversations longer than a sequence are truncated, and how many are dropped."""
    return {'truncated': 0, 'dropped': 0}

  @functools.cached_property
  def _counting(self):
    return np.arange(self.seq_len, dtype=np.int32)

  @functools.cached_property
  def _columns(self):
    return list(self.store.columns.items())

  def _fill_sequence(self, out, place, start, count):
    """Write a sequence of `count` targets of one document; its first input is stored at `start`."""
    self._fill_segment(out, place, 0, 1, start, count)
    self._pad(out, place, count)

  def _fill_segment(self, out, place, offset, segment, start, count):
    """Write `count` targets of one document at `offset` of a sequence; its first input is stored at `start`."""
    ids, end = self.store.tokens[start:start + count + 1], offset + count
    out['tokens'][place, offset:end] = ids[:-1]
    out['targets'][place, offset:end] = ids[1:]
    out['segment_ids'][place, offset:end] = segment
    out['positions'][place, offset:end] = self._counting[:count]
    if not self._columns:
      out['loss_mask'][place, offset:end] = 1.0
    for name, values in self._columns:
      out[name][place, offset:end] = values[start + 1:start + count + 1]

  def _pad(self, out, place, count):
    """Set everything behind the first `count` targets to padding."""
    if count < self.seq_len:
      for value in out.values():
        value[place, count:] = 0


class PackedSequences(_Layout):
  """Concatenated documents cut every seq_len targets; only the last sequence of a split has padding."""

  @functools.cached_property
  def _starts(self):
    """int64 [documents + 1]: the number of targets before each document."""
    offsets = self.store.offsets
    return offsets - np.arange(len(offsets))

  @property
  def num_targets(self) -> int:
    return self.store.num_tokens - len(self.store)

  def __len__(self):
    return -(-self.num_targets // self.seq_len)

  def _fill_example(self, out, place, number):
    starts = self._starts
    begin = number * self.seq_len
    end = min(begin + self.seq_len, self.num_targets)
    count = end - begin
    # Documents first .. last - 1 have targets in [begin, end).
    first = int(starts.searchsorted(begin, 'right')) - 1
    if starts[first + 1] >= end:
      # The input of target p of document d is stored at p + d: each document before it has one token more.
      self._fill_sequence(out, place, begin + first, count)
      return
    last = int(starts.searchsorted(end, 'left'))
    bounds = starts[first:last + 1] - begin
    bounds[0], bounds[-1] = 0, count
    sizes = np.diff(bounds)
    segment = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    stored = slice(begin + first, end + last)
    ids = self.store.tokens[stored]
    index = self._counting[:count] + segment
    out['tokens'][place, :count] = ids[index]
    out['targets'][place, :count] = ids[index + 1]
    out['segment_ids'][place, :count] = segment + 1
    out['positions'][place, :count] = self._counting[:count] - bounds[segment]
    if not self._columns:
      out['loss_mask'][place, :count] = 1.0
    for name, values in self._columns:
      out[name][place, :count] = values[stored][index + 1]
    self._pad(out, place, count)


class _WholeDocuments(_Layout):
  """Sequences that begin with a document, or with a part of one.

  A longer document of text continues in further sequences.  The later parts of a conversation would lack their
  context, so there `overflow` decides: error raises ConfigError, truncate keeps the first seq_len targets if any of
  them has a weight, drop leaves the conversation out.
  """

  @functools.cached_property
  def _spans(self):
    """(first stored token, targets), both int64 [spans]: the parts of documents to lay out, in order."""
    starts, lengths = self.store.offsets[:-1], np.diff(self.store.offsets) - 1
    if not self.store.column_names:
      counts = -(-lengths // self.seq_len)
      first = np.repeat(np.cumsum(counts) - counts, counts)
      begin = (np.arange(len(first)) - first) * self.seq_len
      return np.repeat(starts, counts) + begin, np.minimum(np.repeat(lengths, counts) - begin, self.seq_len)
    used = self._usable(starts, lengths)
    return starts[used], np.minimum(lengths[used], self.seq_len)

  def _usable(self, starts, lengths):
    """Return bool [documents]: which conversations are used."""
    is_long = lengths > self.seq_len
    if self.overflow == 'error' and is_long.any():
      longest = int(lengths.argmax())
      raise ConfigError([
          f'{is_long.sum():,} of {len(lengths):,} conversations in {self.store.folder} are longer than data.seq_len='
          f'{self.seq_len}, document {longest} with {lengths[longest]:,} tokens; write data.seq_len='
          f'{int(lengths.max())}, or data.overflow=truncate or drop'])
    used = (lengths > 0) & ~is_long
    if self.overflow == 'truncate':
      mask = self.store.columns['loss_mask']
      for i in np.flatnonzero(is_long):
        used[i] = np.any(mask[starts[i] + 1:starts[i] + 1 + self.seq_len])
    return used

  def overflow_counts(self):
    lengths = np.diff(self.store.offsets) - 1
    is_long = lengths > self.seq_len
    if not self.store.column_names or not is_long.any():
      return {'truncated': 0, 'dropped': 0}
    truncated = int((self._usable(self.store.offsets[:-1], lengths) & is_long).sum())
    return {'truncated': truncated, 'dropped': int(is_long.sum()) - truncated}

  @property
  def num_targets(self) -> int:
    return int(self._spans[1].sum())


class PaddedSequences(_WholeDocuments):
  """One document a sequence; a longer text continues in sequences of its own."""

  def __len__(self):
    return len(self._spans[0])

  def _fill_example(self, out, place, number):
    starts, counts = self._spans
    self._fill_sequence(out, place, int(starts[number]), int(counts[number]))


class BestFitSequences(_WholeDocuments):
  """Whole documents packed by `best_fit`.

  The layout depends on the lengths alone and is computed at first use: about a second for a million documents.
  """

  @functools.cached_property
  def _bins(self):
    """(bounds int64 [sequences + 1], members int64 [spans]): sequence s holds members[bounds[s]:bounds[s + 1]]."""
    bins = best_fit(self._spans[1], self.seq_len)
    count = int(bins.max(initial=-1)) + 1
    return np.concatenate([[0], np.cumsum(np.bincount(bins, minlength=count))]), np.argsort(bins, kind='stable')

  def __len__(self):
    return len(self._bins[0]) - 1

  def _fill_example(self, out, place, number):
    bounds, members = self._bins
    starts, counts = self._spans
    offset = 0
    for segment, span in enumerate(members[bounds[number]:bounds[number + 1]].tolist(), 1):
      count = int(counts[span])
      self._fill_segment(out, place, offset, segment, int(starts[span]), count)
      offset += count
    self._pad(out, place, offset)


class PreferencePairs(_WholeDocuments):
  """Pairs of completions: the chosen one at an even place of the batch, the rejected one behind it.

  Of unpaired preferences a pair is a desirable and an undesirable completion of different prompts.
  """

  sequences_per_example = 2

  @functools.cached_property
  def _spans(self):
    """(first stored token, targets), both int64 [2 * pairs]: chosen, rejected, chosen, ..."""
    starts, lengths = self.store.offsets[:-1], np.diff(self.store.offsets) - 1
    used = np.repeat(self._used, 2)
    return starts[used], np.minimum(lengths[used], self.seq_len)

  @functools.cached_property
  def _used(self):
    """bool [pairs of the store]: a pair is used if both of its completions are."""
    return self._usable(self.store.offsets[:-1], np.diff(self.store.offsets) - 1).reshape(-1, 2).all(1)

  @functools.cached_property
  def columns(self):
    """Those of PREFERENCE_COLUMNS that any document of the store has."""
    documents = [fields for fields, used in zip(self.store.fields, np.repeat(self._used, 2), strict=True) if used]
    return {name: np.array([fields.get(name, default) for fields in documents], np.float32).reshape(-1, 2)
            for name, default in PREFERENCE_COLUMNS.items() if any(name in fields for fields in documents)}

  def __len__(self):
    return len(self._spans[0]) // 2

  def _fill_example(self, out, place, number):
    starts, counts = self._spans
    for i in (0, 1):
      self._fill_sequence(out, 2 * place + i, int(starts[2 * number + i]), int(counts[2 * number + i]))


class Prompts(_WholeDocuments):
  """Prompts for rollouts.  A batch is a list of {'ids': int32 [n], 'answer': text, 'columns'?: dict}, not padded."""

  @functools.cached_property
  def _documents(self):
    """int64: the documents that are used."""
    sizes = np.diff(self.store.offsets)
    if self.overflow == 'error':
      self._usable(self.store.offsets[:-1], sizes)
    return np.flatnonzero(sizes <= self.seq_len if self.overflow == 'drop' else sizes > 0)

  def __len__(self):
    return len(self._documents)

  def new_batch(self, num_examples, size=0, token_columns=()):
    return [None] * num_examples

  def _fill_example(self, out, place, number):
    document = int(self._documents[number])
    # Truncation keeps the end of a prompt.
    out[place] = {'ids': self.store[document][-self.seq_len:].astype(np.int32), **self.store.fields[document]}


def best_fit(sizes, capacity):
  """Pack sizes into bins of a capacity; return int64 [n], the bin of each.  sizes: int [n], from 1 to capacity.

  Each bin starts with the largest size left, then takes one after which it can still be filled exactly.  Plain best-fit
  decreasing (arXiv:2404.10830, section 3.2) looks at one size at a time and, where none is short, leaves gaps that
  nothing fits: 0.9 % of 256 tokens on short instructions, this way 0.2 %.  Two choices of that next size are tried, and
  the one with fewer bins is kept: the largest, which saves short ones for later, or one as common sizes are, so that
  what is left stays a representative sample.  Equal sizes keep their order.
  """
  sizes = np.asarray(sizes, np.int64)
  bins = _pack(sizes, capacity, largest=True)
  if bins.max(initial=-1) + 1 > -(-sizes.sum() // capacity):
    other = _pack(sizes, capacity, largest=False)
    bins = other if other.max() < bins.max() else bins
  return bins


def _pack(sizes, capacity, largest):
  bins, order = np.zeros(len(sizes), np.int64), np.argsort(-sizes, kind='stable')
  distinct, counts = np.unique(sizes, return_counts=True)
  # Equal sizes are adjacent in `order`, largest first; each list is consumed from its end.
  ends = np.cumsum(counts[::-1])[::-1]
  left = {int(s): order[end - n:end][::-1].tolist() for s, n, end in zip(distinct, counts, ends, strict=True)}
  available = sum(1 << s for s in left)  # Bit s: a size s is left.
  fillers, reachable = _subset_sums(available, capacity)
  # Multiples of the golden ratio sample all sizes evenly, whatever their number.
  common = sizes[order[(np.arange(len(sizes)) * 0.6180339887498949 % 1 * len(sizes)).astype(np.int64)]].tolist()
  current = taken = 0
  while available:
    size, gap = available.bit_length() - 1, capacity
    while size:
      bins[left[size].pop()] = current
      gap, taken = gap - size, taken + 1
      if not left[size]:
        available ^= 1 << size
        if fillers >> size & 1:
          fillers, reachable = _subset_sums(available, capacity)
      # Bit s of `fits`: a size s is left, and others can fill the rest of the gap up to `goal`.
      for goal in range(gap, 0, -1):
        fits = available & (reachable >> (capacity - goal)) & ((2 << goal) - 1)
        if fits:
          break
      else:
        break
      below = fits if largest else fits & ((2 << common[taken]) - 1)
      size = (below or fits & -fits).bit_length() - 1
    current += 1
  return bins


def _subset_sums(available, capacity, most=64):
  """Return (the `most` smallest available sizes, the sums they can make), both as bits.

  Sums up to capacity, as bit capacity - sum; each size any number of times.
  """
  fillers, sums, mask = 0, 1, (2 << capacity) - 1
  for _ in range(most):
    if not available:
      break
    size = (available & -available).bit_length() - 1
    available, fillers, step = available & (available - 1), fillers | 1 << size, size
    while step <= capacity:
      sums |= sums << step & mask
      step *= 2
  return fillers, int(f'{sums:0{capacity + 1}b}'[::-1], 2)


PACKINGS = {'concat': PackedSequences, 'best_fit': BestFitSequences, 'pad': PaddedSequences}
# How the examples of each kind of record are laid out; None: as data.packing says.
LAYOUTS = {'text': None, 'chat': None, 'stepwise': None, 'preference': PreferencePairs, 'prompts': Prompts}
