"""The examples of a split of all sources: one numbering, batches by number, and samples for evaluation."""

import itertools

import numpy as np

from llmjax.config import ConfigError
from llmjax.data import packing, prepared, token_store
from llmjax.data.spec import DataSpec


class Table:
  """An array in a .npy file of which only the requested rows are read.  Pickles as its path, for data workers."""

  def __init__(self, path):
    self.path = path
    self._array = np.load(path, mmap_mode='r', allow_pickle=False)

  shape = property(lambda self: self._array.shape)
  dtype = property(lambda self: self._array.dtype)

  def __getitem__(self, rows):
    return np.asarray(self._array[rows])

  def __reduce__(self):
    return Table, (self.path,)


class Dataset:
  """The examples of a split of every source, numbered source after source.  Pickles as paths, for data workers.

  The sources' kind of record decides what an example and a batch are (`packing.LAYOUTS`): a sequence of text, chat or
  stepwise data; a pair of sequences of preference data; a prompt, of which a batch is a list.  Raises ConfigError where
  a source has no such split, or sources of different kinds cannot be mixed.
  """

  def __init__(self, spec: DataSpec, split: str):
    # By name, so that the order in a config does not matter.
    self.folders = sorted(spec.sources)
    self.weights = [spec.sources[f] for f in self.folders]
    self.split = split
    layout = _layout(spec, self.folders)
    self.layouts = [layout(_open_store(f, split), spec.seq_len, spec.overflow) for f in self.folders]
    self.sequences_per_example = layout.sequences_per_example
    self.ends = list(itertools.accumulate(map(len, self.layouts)))
    self._token_columns = tuple(dict.fromkeys(name for part in self.layouts for name in part.token_columns))
    self._columns = {}
    for name in sorted({name for part in self.layouts for name in part.columns}):
      shape = lambda part: (len(part), self.sequences_per_example)
      self.attach(name, np.concatenate([
          part.columns.get(name, np.full(shape(part), packing.PREFERENCE_COLUMNS[name], np.float32))
          for part in self.layouts]))

  def __len__(self):
    return self.ends[-1]

  @property
  def num_targets(self) -> int:
    return sum(part.num_targets for part in self.layouts)

  def overflow_counts(self) -> dict[str, int]:
    """Return how many conversations longer than a sequence are truncated, and how many are dropped."""
    counts = [part.overflow_counts() for part in self.layouts]
    return {name: sum(c[name] for c in counts) for name in counts[0]}

  def locate(self, number) -> tuple[int, int]:
    """Return (index of the source, number of the example within it)."""
    source = int(np.searchsorted(self.ends, number, 'right'))
    return source, int(number) - (self.ends[source - 1] if source else 0)

  def batch(self, numbers, size=0):
    """Return the examples with these numbers as a batch, padded to `size` examples.

    A dict of arrays [sequences, T] and, for attached columns, [sequences, ...]; of prompts a list without padding.
    """
    out = self.layouts[0].new_batch(len(numbers), size, self._token_columns)
    if len(self.layouts) == 1:
      self.layouts[0].fill(out, range(len(numbers)), numbers)
    else:
      for place, (source, number) in enumerate(map(self.locate, numbers)):
        self.layouts[source].fill(out, [place], [number])
    for name, table in self._columns.items():
      out[name] = np.zeros((len(out['tokens']), *table.shape[2:]), table.dtype)
      rows = table[np.asarray(numbers, int)]
      out[name][:len(numbers) * self.sequences_per_example] = rows.reshape(-1, *table.shape[2:])
    return out

  def attach(self, name, table):
    """Add a column to every batch.  table: an array or a Table, [len(self), sequences_per_example, ...]."""
    table = table if isinstance(table, Table) else np.asarray(table, np.float32)
    if table.shape[:2] != (len(self), self.sequences_per_example):
      raise ValueError(f'{name} must begin with the shape {(len(self), self.sequences_per_example)}, not {table.shape}')
    self._columns[name] = table

  def sample(self, limit=0) -> list[int]:
    """Return the numbers of the examples to evaluate: all in order, or a fixed random sample of `limit`.

    Each source gives examples in proportion to its size, and at least one where the limit allows.  The sample depends
    on the tokens alone: not on names, weights, training seed, mesh or process.  A source's sample for a smaller limit
    is part of that for a larger one.
    """
    import grain

    if not limit or limit >= len(self):
      return list(range(len(self)))
    sizes = np.diff([0, *self.ends])
    digests = [prepared.read_manifest(folder)['splits'][self.split]['tokens_sha256'] for folder in self.folders]
    counts, numbers = proportional_counts(sizes, limit, digests), []
    for i in sorted(range(len(sizes)), key=lambda i: digests[i]):
      order = grain.MapDataset.range(int(self.ends[i] - sizes[i]), int(self.ends[i])).shuffle(
          seed=int(digests[i][:8], 16))
      numbers += sorted(int(order[k]) for k in range(counts[i]))
    return numbers


def _layout(spec, folders):
  """Return the class that lays out the examples of the sources."""
  kinds = {folder: prepared.kind(prepared.read_manifest(folder)) for folder in folders}
  layouts = {packing.LAYOUTS[kind] or packing.PACKINGS[spec.packing] for kind in kinds.values()}
  if len(layouts) > 1:
    held = ', '.join(f'{folder} holds {kind}' for folder, kind in kinds.items())
    raise ConfigError([f'data.sources: {held}; these cannot be mixed: leave all but one kind out'])
  return layouts.pop()


def _open_store(folder, split):
  splits = prepared.read_manifest(folder)['splits']
  if split not in splits:
    remedy = (f'prepare it again with --force --config.{split}_fraction=0.05' if split in prepared.SPLITS
              else f'it has {", ".join(splits)}')
    raise ConfigError([f'data.sources: {folder} has no {split} split; {remedy}'])
  return token_store.TokenStore(prepared.tokens_path(folder, split))


def proportional_counts(sizes, limit, names):
  """Return how many of each source make `limit` in total: in proportion to sizes, by the largest remainder.

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
