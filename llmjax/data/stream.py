"""Batches for training and evaluation, out of prepared folders.

Grain orders row numbers: each source's rows are shuffled anew every epoch, and the sources are
mixed by weight.  Batch b of the whole job is entries b * B ... (b + 1) * B - 1 of that order,
whatever the number of processes and workers.  It is cut into equal blocks of rows, and a process reads
those that its devices hold (`parallel.mesh.batch_blocks`).  So the state of a stream is the number of
batches drawn.
"""

import hashlib
import itertools
import os
import sys

import numpy as np

from llmjax.config import ConfigError
from llmjax.data import packing, prepared, token_store
from llmjax.data.conversations import PAIR_NUMBERS
from llmjax.data.spec import DataSpec
from llmjax.text.chat import ChatFormat, template_of
from llmjax.text.tokenizer import Tokenizer


def load_tokenizer(spec: DataSpec) -> Tokenizer:
  """Returns the tokenizer that made the sources' tokens."""
  return Tokenizer(spec.tokenizer or prepared.tokenizer_path(next(iter(spec.sources))))


def vocab_size(spec: DataSpec) -> int:
  """Returns the number of ids, from the manifest alone."""
  return prepared.read_manifest(next(iter(spec.sources)))['tokenizer']['vocab_size']


def split_counts(spec: DataSpec, split: str) -> dict[str, int]:
  """Returns documents, bytes (UTF-8, of text), tokens (stored ids, BOS and EOS included) and pairs
  (targets: one fewer than stored ids for each document), summed over the sources."""
  counts = {'documents': 0, 'bytes': 0, 'tokens': 0}
  for folder in spec.sources:
    splits = prepared.read_manifest(folder)['splits']
    for name in counts:
      counts[name] += splits.get(split, {}).get(name, 0)
  return {**counts, 'pairs': counts['tokens'] - counts['documents']}


def fingerprint(spec: DataSpec, split: str = 'train') -> str:
  """Returns a hash of all that decides a stream's rows: tokens, weights, row length and packing.

  A stream's state means the same only where this is the same; paths and workers do not count.
  """
  digest = hashlib.sha256(f'{spec.seq_len} {spec.packing}\n'.encode())
  for folder in sorted(spec.sources):
    found = prepared.read_manifest(folder)['splits'].get(split, {})
    digest.update(f'{spec.sources[folder]!r} {found.get("tokens_sha256", "")}\n'.encode())
    if 'weights_sha256' in found:
      digest.update(f'{spec.overflow} {found["weights_sha256"]} {found.get("notes_sha256", "")}\n'.encode())
  return digest.hexdigest()


def describe_evaluation(spec: DataSpec, split: str, limit: int = 0, *more) -> dict:
  """Returns what an evaluation is of, as its record holds it: split, limit, and fingerprints of data and tokenizer.

  Two evaluations of as many sequences are of the same ones where both fingerprints and the limit are equal: names of
  folders, weights and batches do not count.  more: whatever else decides the numbers, such as a reward.
  """
  digest = hashlib.sha256(repr((split, spec.seq_len, spec.packing, *more)).encode())
  manifests = [prepared.read_manifest(folder) for folder in spec.sources]
  for found in sorted((m['splits'].get(split, {}) for m in manifests), key=lambda s: s.get('tokens_sha256', '')):
    digest.update(repr([found.get(f'{part}_sha256', '') for part in ('tokens', 'weights', 'notes')]).encode())
    if 'weights_sha256' in found:
      digest.update(spec.overflow.encode())
  return {'split': split, 'limit': limit, 'data_fingerprint': digest.hexdigest()[:16],
          'tokenizer_sha256': prepared.file_sha256(load_tokenizer(spec).path)[:16]}


def read_documents(folder, split):
  """Yields (name, text) of a prepared folder's documents, in the order of its token store."""
  from llmjax.data import builders

  yield from builders.read_documents(prepared.documents_path(folder), split)


class Table:
  """An array in a .npy file, of which only the rows asked for are read.  Pickles as its path, for workers."""

  def __init__(self, path):
    self.path = path
    self._array = np.load(path, mmap_mode='r', allow_pickle=False)

  shape = property(lambda self: self._array.shape)
  dtype = property(lambda self: self._array.dtype)

  def __getitem__(self, rows):
    return np.asarray(self._array[rows])

  def __reduce__(self):
    return Table, (self.path,)


class _Mixture:
  """The rows of one or more sources under one numbering.  Pickles as paths, for workers."""

  def __init__(self, spec: DataSpec, split: str, rows_class=None):
    rows_class = rows_class or packing.PACKINGS[spec.packing]
    # By name, so that the order of writing in a config does not matter.
    self.folders = sorted(spec.sources)
    self.weights = [spec.sources[f] for f in self.folders]
    self.seq_len, self.each = spec.seq_len, rows_class.each
    self.rows = [rows_class(_open_store(f, split), spec.seq_len, spec.overflow) for f in self.folders]
    self.ends = list(itertools.accumulate(len(rows) for rows in self.rows))
    self.columns = {}
    for name in sorted({name for rows in self.rows for name in rows.numbers}):
      parts = [rows.numbers.get(name, np.full(len(rows), PAIR_NUMBERS[name][2], np.float32)) for rows in self.rows]
      self.attach(name, np.repeat(np.concatenate(parts)[:, None], self.each, 1))

  def __len__(self):
    return self.ends[-1]

  def batch(self, numbers, size=None) -> dict[str, np.ndarray]:
    """Returns rows [size, T] with these numbers, twice as many of pairs; rows of padding fill up to `size`."""
    out = packing.new_batch((size or len(numbers)) * self.each, self.seq_len)
    packing.pad_rows(out, len(numbers) * self.each)
    if len(self.rows) == 1:
      self.rows[0].fill(out, range(len(numbers)), numbers)
    else:
      sources = np.searchsorted(self.ends, numbers, 'right')
      for place, (source, number) in enumerate(zip(sources.tolist(), numbers, strict=True)):
        start = self.ends[source - 1] if source else 0
        self.rows[source].fill(out, [place], [number - start])
    for name, table in self.columns.items():
      out[name] = np.zeros((len(out['tokens']), *table.shape[2:]), table.dtype)
      found = table[np.asarray(numbers, int)]
      out[name][:len(numbers) * self.each] = found.reshape(-1, *table.shape[2:])
    return out

  def attach(self, name, table):
    """Lets every batch have a field `name`, [size, ...].

    table: numbers or a Table, [len(self), rows of a number, ...].
    """
    table = table if isinstance(table, Table) else np.asarray(table, np.float32)
    if table.shape[:2] != (len(self), self.each):
      raise ValueError(f'{name} must begin with the shape {(len(self), self.each)}, not {table.shape}')
    self.columns[name] = table


def rows_of(spec: DataSpec, split: str):
  """Returns the rows (see `packing`) of a spec with one source; each `.each` of them are one sample."""
  kind = prepared.kind(prepared.read_manifest(next(iter(spec.sources))))
  return _Mixture(spec, split, packing.PairRows if kind == 'pairs' else None).rows[0]


def chat_format(spec: DataSpec):
  """Returns the ChatFormat that the sources' conversations were made with; None where all are text."""
  for folder in spec.sources:
    manifest = prepared.read_manifest(folder)
    if prepared.kind(manifest) != 'text':
      return ChatFormat(template_of(manifest['template']), load_tokenizer(spec))
  return None


class _Prompts(_Mixture):
  """The same of prompts, which are no rows: a batch is a list of {'ids': int32 [n], 'answer': text}."""

  def __init__(self, spec, split):
    super().__init__(spec, split, packing.PromptRows)

  def batch(self, numbers, size=None):
    found = []
    for number in numbers:
      source = int(np.searchsorted(self.ends, number, 'right'))
      found.append(self.rows[source].prompt(int(number) - (self.ends[source - 1] if source else 0)))
    return found


def _open_store(folder, split):
  found = prepared.read_manifest(folder)['splits']
  if split not in found:
    remedy = (f'prepare it again with --force --config.{split}_fraction=0.05' if split in prepared.SPLITS
              else f'it has {", ".join(found)}')
    raise ConfigError([f'data.sources: {folder} has no {split} split; {remedy}'])
  return token_store.TokenStore(prepared.tokens_path(folder, split))


class _LocalBatches:
  """Grain source: item b is this process's rows of batch b of the whole job."""

  def __init__(self, mixture, order, batch_size, rows):
    self.mixture, self.order, self.batch_size, self.rows = mixture, order, batch_size, rows

  def __len__(self):
    return sys.maxsize // self.batch_size

  def __getitem__(self, batch):
    start, order = int(batch) * self.batch_size, self.order
    return self.mixture.batch([order[start + row] for row in self.rows])


def _local_rows(batch_size, blocks, block_count, name):
  """Returns the numbers of a batch's rows in these blocks; ConfigError when there are no equal blocks."""
  if batch_size % block_count:
    raise ConfigError([f'{name}={batch_size} is not divisible by the {block_count} blocks of rows that the '
                       f'mesh makes of it; write {-(-batch_size // block_count) * block_count}'])
  size = batch_size // block_count
  return [row for block in blocks for row in range(block * size, (block + 1) * size)]


def _order(mixture, seed):
  """Returns an endless Grain MapDataset of row numbers: shuffled, repeated, mixed."""
  import grain

  parts, start = [], 0
  for i, end in enumerate(mixture.ends):
    if end == start:
      raise ConfigError([f'data.sources: {mixture.folders[i]} has no rows in this split; '
                         'leave it out'])
    # Grain adds the epoch to its seed, so neighbouring seeds would share epochs; hashes do not.
    digest = hashlib.blake2b(f'{seed}/{i}'.encode(), digest_size=4).digest()
    part = grain.MapDataset.range(start, end).shuffle(seed=int.from_bytes(digest, 'big'))
    parts.append(part.repeat())
    start = end
  return parts[0] if len(parts) == 1 else grain.MapDataset.mix(parts, mixture.weights)


class BatchStream:
  """An endless iterator of this process's batches: dicts of [rows of its blocks, T] arrays."""

  def __init__(self, spec, mixture, batch_size, seed, split, blocks, block_count):
    rows = _local_rows(batch_size, blocks, block_count, 'train.batch_size')
    self.rows_per_epoch = len(mixture)
    self.workers = spec.workers
    self.fingerprint = fingerprint(spec, split)
    self._batches = _LocalBatches(mixture, _order(mixture, seed), batch_size, rows)
    self._drawn, self._iterator = 0, None

  @property
  def state(self) -> int:
    """Batches of the whole job drawn so far; the same in every process."""
    return self._drawn

  def restore(self, state: int):
    """Goes to where a stream with this state was: the next batch is number `state`, from 0."""
    if isinstance(state, bool) or int(state) != state or state < 0:
      raise ValueError(f'the state of a stream is a number of batches, not {state!r}')
    self.close()
    self._drawn = int(state)

  def __iter__(self):
    return self

  def __next__(self) -> dict[str, np.ndarray]:
    if self._iterator is None:
      self._iterator = self._open()
    batch = next(self._iterator)
    self._drawn += 1
    return batch

  def attach(self, name: str, table: np.ndarray):
    """Lets every batch have a field `name`, [rows, ...].  table: numbers or a Table, for each sample and its rows."""
    self.close()
    self._batches.mixture.attach(name, table)

  def describe(self, number: int) -> list[dict]:
    """Returns all rows of batch `number` (from 0) of the whole job, each one {source, row, tokens}.

    row: its number among the source's rows.  tokens: a list of int arrays, one for each of its documents.
    """
    mixture, order = self._batches.mixture, self._batches.order
    each = mixture.each
    start = number * self._batches.batch_size
    numbers = [int(order[start + i]) for i in range(self._batches.batch_size)]
    batch, rows = mixture.batch(numbers), []
    for i, n in enumerate(numbers):
      source = int(np.searchsorted(mixture.ends, n, 'right'))
      tokens = [ids for row in range(i * each, (i + 1) * each) for ids, _ in documents_of(batch, row)]
      rows.append({'source': str(mixture.folders[source]), 'row': n - (mixture.ends[source - 1] if source else 0),
                   'tokens': tokens})
    return rows

  def _open(self):
    import grain

    # The rows are in memory or in the page cache: read threads only cost time.
    batches = grain.MapDataset.source(self._batches)[self._drawn:].to_iter_dataset(
        grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    if self.workers:
      _mark_flags_parsed()
      batches = batches.mp_prefetch(
          grain.MultiprocessingOptions(num_workers=self.workers, per_worker_buffer_size=2))
    return iter(batches)

  def close(self):
    """Ends the workers.  The stream can be used again: it goes on where it was."""
    if self._iterator is not None:
      self._iterator.close()
      self._iterator = None

  def __enter__(self):
    return self

  def __exit__(self, *error):
    self.close()


def documents_of(batch, row):
  """Returns [(ids, weights)] of the documents in a row: their inputs and the last target, each id's weight as one."""
  found, segments = [], batch['segment_ids'][row]
  for segment in range(1, int(segments.max()) + 1):
    place = np.flatnonzero(segments == segment)
    found.append((np.append(batch['tokens'][row][place], batch['targets'][row][place[-1]]),
                  np.append(np.float32(0), batch['loss_mask'][row][place])))
  return found


def _mark_flags_parsed():
  """Grain's workers read absl's global flags, which a program without absl.app never parsed."""
  from absl import flags

  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()


def open_stream(spec: DataSpec, *, batch_size: int, seed: int, split: str = 'train',
                blocks=(0,), block_count: int = 1) -> BatchStream:
  """Returns the stream of batches of a split.

  batch_size: rows of the whole job's batch.  blocks: which of its `block_count` equal blocks of rows
  this process yields, one after the other.  The batches depend on sources, weights, seq_len, packing,
  batch_size and seed alone.  Raises ConfigError when block_count does not divide batch_size, or a split
  is empty.
  """
  return BatchStream(spec, _Mixture(spec, split), batch_size, seed, split, blocks, block_count)


def open_pairs(spec: DataSpec, *, batch_size: int, seed: int, split: str = 'train',
               blocks=(0,), block_count: int = 1) -> BatchStream:
  """Returns the stream of batches of pairs: `batch_size` pairs are 2 * batch_size rows with the usual fields.

  Rows 2 i and 2 i + 1 are the chosen and the rejected answer to one prompt, which starts both; loss_mask marks the
  answer.  So each of the equal blocks of a mesh holds whole pairs, and `make_train_step(..., together=2)` keeps them
  in one microbatch.  Arguments as for `open_stream`, sources prepared with records=pairs; `data.packing` does
  not matter.  A pair with an answer that is longer than a row goes as `data.overflow` says, as a whole.
  """
  _require_kind(spec, 'pairs')
  return BatchStream(spec, _Mixture(spec, split, packing.PairRows), batch_size, seed, split, blocks, block_count)


def open_prompts(spec: DataSpec, *, batch_size: int, seed: int, split: str = 'train',
                 blocks=(0,), block_count: int = 1) -> BatchStream:
  """Returns the stream of batches of prompts: lists of {'ids': int32 [n], 'answer': text}, in the order of the job.

  Each of `ids` ends where the assistant is to speak.  Arguments as for `open_stream`, sources prepared with
  records=prompts; prompts of more than seq_len tokens go as `data.overflow` says, and truncate keeps their end.
  """
  _require_kind(spec, 'prompts')
  return BatchStream(spec, _Prompts(spec, split), batch_size, seed, split, blocks, block_count)


def eval_pairs(spec: DataSpec, split: str, batch_size: int, limit: int = 0, *,
               blocks=(0,), block_count: int = 1, columns=None):
  """Yields batches with every pair of a split exactly once, rows as of `open_pairs`; else as `eval_batches`.

  columns: {name: float32 [pairs, 2]}, fields that batches are to have as well.
  """
  _require_kind(spec, 'pairs')
  mixture = _Mixture(spec, split, packing.PairRows)
  yield from _batches_of(mixture, split, batch_size, limit, blocks, block_count, columns)


def count_pairs(spec: DataSpec, split: str) -> int:
  """Returns how many pairs of a split are used."""
  return len(_Mixture(spec, split, packing.PairRows))


def _require_kind(spec, kind):
  for folder in spec.sources:
    found = prepared.kind(prepared.read_manifest(folder))
    if found != kind:
      raise ConfigError([f'data.sources: {folder} holds {found}, not {kind}; prepare it with --config.records={kind}'])


def eval_batches(spec: DataSpec, split: str, batch_size: int, limit: int = 0, *,
                 blocks=(0,), block_count: int = 1, columns=None):
  """Yields a process's blocks (see `open_stream`) of batches that hold every pair of a split exactly once.

  Sequences come in order, source after source by name; padding completes the last batch.  limit: at most this many
  sequences, those of `sample_numbers`, where it is not 0.  Every process yields the same number of batches.  columns:
  {name: numbers or a Table}, fields that batches are to have as well.
  """
  yield from _batches_of(_Mixture(spec, split), split, batch_size, limit, blocks, block_count, columns)


def eval_prompts(spec: DataSpec, split: str, limit: int = 0) -> list[dict]:
  """Returns every prompt of a split once, items as of `open_prompts`, or the sample of them that `limit` leaves."""
  _require_kind(spec, 'prompts')
  prompts = _Prompts(spec, split)
  if not len(prompts):
    raise ConfigError([f'data.sources: {", ".join(prompts.folders)} has no prompts in its {split} split'])
  return prompts.batch(sample_numbers(prompts, split, limit))


def count_rows(spec: DataSpec, split: str) -> int:
  """Returns how many rows a split has."""
  return len(_Mixture(spec, split))


def _batches_of(mixture, split, batch_size, limit, blocks, block_count, columns):
  for name, table in (columns or {}).items():
    mixture.attach(name, table)
  rows = _local_rows(batch_size, blocks, block_count, 'evaluate.batch_size')
  numbers = sample_numbers(mixture, split, limit)
  for first in range(0, len(numbers), batch_size):
    yield mixture.batch([numbers[first + row] for row in rows if first + row < len(numbers)], len(rows))


def sample_numbers(mixture, split, limit):
  """Returns the numbers of the sequences to evaluate: all in order, or a fixed random sample of `limit` of them.

  Each source gives as many as is its share of all sequences, and at least one where the limit allows.  Which ones
  depends on the tokens alone: not on names, weights, training seed, mesh or process.  A source's sample of a smaller
  limit is the beginning of that of a larger one.
  """
  import grain

  sizes = np.diff([0, *mixture.ends])
  if not limit or limit >= len(mixture):
    return list(range(len(mixture)))
  digests = [prepared.read_manifest(folder)['splits'][split]['tokens_sha256'] for folder in mixture.folders]
  counts, numbers = _shares(sizes, limit, digests), []
  for i in sorted(range(len(sizes)), key=lambda i: digests[i]):
    order = grain.MapDataset.range(int(mixture.ends[i] - sizes[i]), int(mixture.ends[i])).shuffle(
        seed=int(digests[i][:8], 16))
    numbers += sorted(int(order[k]) for k in range(counts[i]))
  return numbers


def _shares(sizes, limit, names):
  """Returns how many of each source make `limit` together: in proportion to sizes, by the largest remainder.

  limit: below sum(sizes).  names: decide between equal remainders.
  """
  ideal = np.asarray(sizes) * (limit / sum(sizes))
  least = np.minimum(sizes, 1 if limit >= np.count_nonzero(sizes) else 0)
  counts = np.maximum(np.floor(ideal).astype(int), least)
  while (gap := limit - counts.sum()):
    step = 1 if gap > 0 else -1
    free = [i for i in range(len(sizes)) if (counts[i] < sizes[i] if step > 0 else counts[i] > least[i])]
    counts[max(free, key=lambda i: (step * (ideal[i] - counts[i]), names[i]))] += step
  return counts.tolist()


def folder_name(folder) -> str:
  """Returns a short name for a source, as in the metric eval/<name>/loss."""
  return os.path.basename(os.path.normpath(folder))
