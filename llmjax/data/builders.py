"""TFDS datasets of documents, in ArrayRecord files.  TensorFlow is never imported."""

import contextlib
import io
import pathlib
import sys

import tensorflow_datasets as tfds
from etils import epath

import llmjax

_VERSION = tfds.core.Version('1.0.0')


class _LocalInfo(tfds.core.DatasetInfo):
  """Dataset info that is not looked up in the bucket of TFDS."""

  def initialize_from_bucket(self):
    """Do nothing.  TFDS would query its bucket, and leave an empty temporary folder."""


class _Documents(tfds.core.GeneratorBasedBuilder):
  """Records {'id', 'text'}, both str.  splits: {name: function that yields (id, text)}."""

  VERSION = _VERSION
  # Where TFDS looks for a checksum file.  Its default needs importlib_resources, which TFDS does not declare.
  code_path = epath.Path(__file__)

  def __init__(self, *, splits=None, description='', **kwargs):
    self._splits, self._description = splits or {}, description
    super().__init__(file_format='array_record', **kwargs)

  def _info(self):
    return _LocalInfo(
        builder=self, description=self._description or self.__class__.__doc__,
        features=tfds.features.FeaturesDict(
            {'id': tfds.features.Text(), 'text': tfds.features.Text()}),
        metadata=tfds.core.MetadataDict(llmjax=llmjax.__version__, python=sys.version))

  def _split_generators(self, dl_manager):
    del dl_manager  # Everything is local.
    return {name: self._generate_examples(read) for name, read in self._splits.items()}

  def _generate_examples(self, read):
    # TFDS orders records by a hash of the key: with numbers the order is always the same.
    for number, (name, text) in enumerate(read()):
      yield number, {'id': name, 'text': text}


class PythonDocs(_Documents):
  """The Python installation's own text: reference prose, sources with their docstrings."""


class LocalText(_Documents):
  """The user's own text, or that of another TFDS dataset, cleaned and split."""


def write_documents(folder, builder_class, splits, description=''):
  """Write a dataset under `folder`.  splits: {name: function that yields (id, text)}."""
  tfds.disable_progress_bar()
  builder = builder_class(splits=splits, description=description, data_dir=str(folder))
  with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints a long announcement.
    builder.download_and_prepare()


def open_documents(folder, split):
  """Return the TFDS data source of a split: items {'id': bytes, 'text': bytes}, random access.

  Raises ValueError where the folder holds no dataset or the dataset has no such split.
  """
  datasets = sorted(pathlib.Path(folder).glob('*/*/dataset_info.json'))
  if not datasets:
    raise ValueError(f'{folder} holds no documents; prepare the folder again with --force')
  builder = tfds.builder_from_directory(str(datasets[-1].parent))
  if split not in builder.info.splits:
    raise ValueError(f'{folder} has no {split} split; it has {", ".join(builder.info.splits)}')
  return builder.as_data_source(split=split)


def iterate(source, chunk=32):
  """Yield the items of a data source in order, read in chunks: twice as fast as one by one."""
  for start in range(0, len(source), chunk):
    yield from source.__getitems__(list(range(start, min(start + chunk, len(source)))))


def read_documents(folder, split):
  """Yield (id, text) of a split, as str."""
  for item in iterate(open_documents(folder, split)):
    yield item['id'].decode(), item['text'].decode()
