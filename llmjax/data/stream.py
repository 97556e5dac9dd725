"""Batches for training and evaluation from prepared folders.

Grain orders the numbers of a `Dataset`: each source is shuffled anew every epoch, and the sources are mixed by weight.
Batch b of the whole job is entries b * B ... (b + 1) * B - 1 of that order, whatever the number of processes and
workers.  It is cut into equal blocks, and a process reads those that its devices hold (`parallel.mesh.batch_blocks`).
So the state of a stream is the number of batches drawn.
"""

import hashlib
import os
import sys

import numpy as np

from llmjax.config import ConfigError
from llmjax.data import prepared
from llmjax.data.dataset import Dataset
from llmjax.data.spec import DataSpec
from llmjax.text.chat import ChatFormat, template_of
from llmjax.text.tokenizer import Tokenizer


def load_tokenizer(spec: DataSpec) -> Tokenizer:
  """Return the tokenizer of the sources."""
  return Tokenizer(spec.tokenizer or prepared.tokenizer_path(next(iter(spec.sources))))


def vocab_size(spec: DataSpec) -> int:
  """Return the vocabulary size, from the manifest alone."""
  return prepared.read_manifest(next(iter(spec.sources)))['tokenizer']['vocab_size']


def split_counts(spec: DataSpec, split: str) -> dict[str, int]:
  """Return documents, bytes (UTF-8 text), tokens (BOS and EOS included) and targets, summed over the sources."""
  counts = {'documents': 0, 'bytes': 0, 'tokens': 0}
  for folder in spec.sources:
    splits = prepared.read_manifest(folder)['splits']
    for name in counts:
      counts[name] += splits.get(split, {}).get(name, 0)
  return {**counts, 'targets': counts['tokens'] - counts['documents']}


def fingerprint(spec: DataSpec, split: str = 'train') -> str:
  """Return a hash of everything that decides the batches of a stream: tokens, weights, sequence length and packing.

  The state of a stream is valid only with the same fingerprint.  Paths and workers do not count.
  """
  digest = hashlib.sha256(f'{spec.seq_len} {spec.packing}\n'.encode())
  for folder in sorted(spec.sources):
    manifest = prepared.read_manifest(folder)['splits'].get(split, {})
    digest.update(f'{spec.sources[folder]!r} {manifest.get("tokens_sha256", "")}\n'.encode())
    if 'columns_sha256' in manifest:
      digest.update(f'{spec.overflow} {_content(manifest)[1:]!r}\n'.encode())
  return digest.hexdigest()


def _content(split):
  """Return the hashes of a split's files, as its manifest has them."""
  return [split.get('tokens_sha256', ''), sorted(split.get('columns_sha256', {}).items()),
          split.get('fields_sha256', '')]


def describe_evaluation(spec: DataSpec, split: str, limit: int = 0, *more) -> dict:
  """Return what identifies an evaluation in its record: split, limit, and fingerprints of data and tokenizer.

  Two evaluations used the same examples if both fingerprints and the limit are equal; names of folders, weights and
  batches do not count.  more: whatever else decides the metrics, such as a reward.
  """
  digest = hashlib.sha256(repr((split, spec.seq_len, spec.packing, *more)).encode())
  manifests = [prepared.read_manifest(folder)['splits'].get(split, {}) for folder in spec.sources]
  for manifest in sorted(manifests, key=lambda m: m.get('tokens_sha256', '')):
    digest.update(repr(_content(manifest)).encode())
    if 'columns_sha256' in manifest:
      digest.update(spec.overflow.encode())
  return {'split': split, 'limit': limit, 'data_fingerprint': digest.hexdigest()[:16],
          'tokenizer_sha256': prepared.file_sha256(load_tokenizer(spec).path)[:16]}


def read_documents(folder, split):
  """Yield (name, text) of a prepared folder's documents, in the order of its token store."""
  from llmjax.data import builders

  yield from builders.read_documents(prepared.documents_path(folder), split)


def chat_format(spec: DataSpec):
  """Return the ChatFormat of the sources' conversations; None where all sources are text."""
  for folder in spec.sources:
    manifest = prepared.read_manifest(folder)
    if prepared.kind(manifest) != 'text':
      return ChatFormat(template_of(manifest['template']), load_tokenizer(spec))
  return None


def folder_name(folder) -> str:
  """Return a short name for a source, as in the metric eval/<name>/loss."""
  return os.path.basename(os.path.normpath(folder))


def documents_of(batch, row, columns=()):
  """Return [(ids, loss weights, *columns)] of the documents in a sequence: the inputs and the last target, [n].

  The first token of a document is never a target: its weight and columns are 0.
  """
  documents, segments = [], batch['segment_ids'][row]
  for segment in range(1, int(segments.max()) + 1):
    place = np.flatnonzero(segments == segment)
    documents.append((np.append(batch['tokens'][row][place], batch['targets'][row][place[-1]]),
                      *(np.append(np.float32(0), batch[name][row][place]) for name in ('loss_mask', *columns))))
  return documents


class _LocalBatches:
  """Grain source whose item b is this process's part of batch b of the whole job."""

  def __init__(self, dataset, order, batch_size, indices):
    self.dataset, self.order, self.batch_size, self.indices = dataset, order, batch_size, indices

  def __len__(self):
    return sys.maxsize // self.batch_size

  def __getitem__(self, batch):
    start = int(batch) * self.batch_size
    return self.dataset.batch([self.order[start + i] for i in self.indices])


def _local_indices(batch_size, blocks, block_count, field):
  """Return the indices of a batch's examples in these blocks; ConfigError where there are no equal blocks."""
  if batch_size % block_count:
    raise ConfigError([f'{field}={batch_size} is not divisible by the {block_count} data shards of the mesh; write '
                       f'{-(-batch_size // block_count) * block_count}'])
  size = batch_size // block_count
  return [i for block in blocks for i in range(block * size, (block + 1) * size)]


def _order(dataset, seed):
  """Return an endless Grain MapDataset of example numbers: shuffled, repeated, mixed."""
  import grain

  parts, start = [], 0
  for i, end in enumerate(dataset.ends):
    if end == start:
      raise ConfigError([f'data.sources: {dataset.folders[i]} has no examples in its {dataset.split} split; leave it '
                         'out'])
    # Grain adds the epoch to its seed, so neighbouring seeds would share epochs; hashes do not.
    digest = hashlib.blake2b(f'{seed}/{i}'.encode(), digest_size=4).digest()
    parts.append(grain.MapDataset.range(start, end).shuffle(seed=int.from_bytes(digest, 'big')).repeat())
    start = end
  return parts[0] if len(parts) == 1 else grain.MapDataset.mix(parts, dataset.weights)


class BatchStream:
  """An endless iterator of this process's batches (see `Dataset`)."""

  def __init__(self, spec, dataset, batch_size, seed, blocks, block_count):
    indices = _local_indices(batch_size, blocks, block_count, 'train.batch_size')
    self.workers = spec.workers
    self.fingerprint = fingerprint(spec, dataset.split)
    self._batches = _LocalBatches(dataset, _order(dataset, seed), batch_size, indices)
    self._drawn, self._iterator = 0, None

  @property
  def state(self) -> int:
    """Batches of the whole job drawn so far; the same in every process."""
    return self._drawn

  def restore(self, state: int):
    """Continue with batch number `state`, from 0."""
    if isinstance(state, bool) or int(state) != state or state < 0:
      raise ValueError(f'the state of a stream is a number of batches, not {state!r}')
    self.close()
    self._drawn = int(state)

  def __iter__(self):
    return self

  def __next__(self):
    if self._iterator is None:
      self._iterator = self._open()
    batch = next(self._iterator)
    self._drawn += 1
    return batch

  def attach(self, name, table):
    """Add a column to every batch (see `Dataset.attach`)."""
    self.close()
    self._batches.dataset.attach(name, table)

  def describe(self, number: int) -> list[dict]:
    """Return {source, row, tokens} of each example of batch `number` (from 0) of the whole job.

    row: its number within the source.  tokens: a list of int arrays, one for each of its documents.
    """
    dataset, order, size = self._batches.dataset, self._batches.order, self._batches.batch_size
    numbers = [int(order[number * size + i]) for i in range(size)]
    batch, per_example, examples = dataset.batch(numbers), dataset.sequences_per_example, []
    for i, (source, row) in enumerate(map(dataset.locate, numbers)):
      sequences = range(i * per_example, (i + 1) * per_example)
      tokens = [ids for sequence in sequences for ids, _ in documents_of(batch, sequence)]
      examples.append({'source': str(dataset.folders[source]), 'row': row, 'tokens': tokens})
    return examples

  def _open(self):
    import grain

    # The data are in memory or in the page cache: read threads only cost time.
    batches = grain.MapDataset.source(self._batches)[self._drawn:].to_iter_dataset(
        grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    if self.workers:
      _mark_flags_parsed()
      batches = batches.mp_prefetch(
          grain.MultiprocessingOptions(num_workers=self.workers, per_worker_buffer_size=2))
    return iter(batches)

  def close(self):
    """End the worker processes.  The stream can be used again and continues where it was."""
    if self._iterator is not None:
      self._iterator.close()
      self._iterator = None

  def __enter__(self):
    return self

  def __exit__(self, *error):
    self.close()


def _mark_flags_parsed():
  """Mark absl's global flags as parsed: Grain's workers read them, and a program without absl.app never parses them."""
  from absl import flags

  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()


def open_stream(spec: DataSpec, *, batch_size: int, seed: int, split: str = 'train',
                blocks=(0,), block_count: int = 1) -> BatchStream:
  """Open the endless stream of batches of a split.

  batch_size: examples of the whole job's batch; of preference data each is two sequences, the chosen completion at an
  even place and the rejected one behind it, so every block holds whole pairs.  blocks: which of its `block_count` equal
  blocks this process yields, one after the other.  The batches depend on sources, weights, seq_len, packing, batch_size
  and seed alone.  Raises ConfigError where block_count does not divide batch_size, or a split is empty.
  """
  return BatchStream(spec, Dataset(spec, split), batch_size, seed, blocks, block_count)


def eval_batches(spec: DataSpec, split: str, batch_size: int, limit: int = 0, *,
                 blocks=(0,), block_count: int = 1, columns=None):
  """Yield a process's blocks (see `open_stream`) of batches that hold every example of a split exactly once.

  Examples come in order, source after source by name; padding completes the last batch.  limit: at most this many
  examples, those of `Dataset.sample`; 0 for all.  Every process yields the same number of batches.  columns:
  {name: array or Table} to attach.
  """
  dataset = Dataset(spec, split)
  for name, table in (columns or {}).items():
    dataset.attach(name, table)
  indices = _local_indices(batch_size, blocks, block_count, 'evaluate.batch_size')
  numbers = dataset.sample(limit)
  for first in range(0, len(numbers), batch_size):
    yield dataset.batch([numbers[first + i] for i in indices if first + i < len(numbers)], len(indices))


def count_examples(spec: DataSpec, split: str) -> int:
  """Return the number of examples of a split."""
  return len(Dataset(spec, split))
