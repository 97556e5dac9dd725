"""Documents from any text dataset of TensorFlow Datasets, by name, without TensorFlow."""

import contextlib
import dataclasses
import difflib
import logging
import tempfile

from llmjax.config import ConfigError, one_line
from llmjax.data.documents import Limits, Rejected, check_record, check_text

_SPLITS = {'train': '', 'validation': 'validation', 'valid': 'validation', 'dev': 'validation',
           'test': 'test'}


def read_tfds(name, text_key, limits: Limits):
  """Yield the Documents and Rejected of a dataset, which is downloaded and prepared at first use.

  The validation and test splits of a dataset are used as they are; a missing one is held out of train.  Raises
  ConfigError: unknown name, no network, no text field.
  """
  builder = _find(name)
  key = None if limits.normalise else _text_field(name, builder.info.features, text_key)
  try:
    with _few_retries():
      builder.download_and_prepare(file_format='array_record')
  except ModuleNotFoundError as e:
    raise ConfigError([f'name={name}: TFDS needs the package {e.name} to prepare it; '
                       f'pip install {e.name}']) from e
  except Exception as e:  # The dataset's own script or the network may raise anything.
    raise ConfigError([f'name={name}: TFDS could not download and prepare it '
                       f'({type(e).__name__}: {one_line(e)}); check the network, or use '
                       '--text-dir=DIR with files of your own']) from e
  from llmjax.data import builders

  own = {split: _SPLITS[split] for split in builder.info.splits if split in _SPLITS}
  has_held_out = {'validation', 'test'} <= set(own.values())
  for split, target in own.items():
    for number, record in enumerate(builders.iterate(builder.as_data_source(split=split))):
      place = f'{name}/{split}'
      item = (check_record(record, f'{place}#{number}', place, limits, None, number + 1) if limits.normalise else
              check_text(record[key], f'{place}#{number}', place, limits, None, number + 1))
      if isinstance(item, Rejected):
        yield item
      else:
        target = target or ('train' if has_held_out else '')
        yield dataclasses.replace(item, split=target)


@contextlib.contextmanager
def _few_retries():
  """Limit retries: without a network TFDS would try for minutes, with a warning each time."""
  from tensorflow_datasets.core.download import downloader

  logger = logging.getLogger('urllib3')
  before = downloader.MAX_RETRIES, logger.level
  downloader.MAX_RETRIES = 3
  logger.setLevel(logging.ERROR)
  try:
    yield
  finally:
    downloader.MAX_RETRIES = before[0]
    logger.setLevel(before[1])


@contextlib.contextmanager
def _own_temporary_folder():
  """Remove the empty temporary folder that TFDS leaves for each builder."""
  before = tempfile.tempdir
  with tempfile.TemporaryDirectory() as folder:
    tempfile.tempdir = folder
    try:
      yield
    finally:
      tempfile.tempdir = before


def _find(name):
  """Return the builder of a name; raise ConfigError with the nearest known ones."""
  import tensorflow_datasets as tfds
  import tensorflow_datasets.text
  from tensorflow_datasets.core import registered

  try:
    with _own_temporary_folder():
      return tfds.builder(name)
  except registered.DatasetNotFoundError as e:
    known = tfds.list_builders(with_community_datasets=False)
    near = difflib.get_close_matches(name.split('/')[0], known, n=3, cutoff=0.5)
    hint = f'did you mean {" or ".join(near)}?' if near else 'see tensorflow.org/datasets/catalog'
    raise ConfigError([f'name={name}: TFDS has no such dataset; {hint}']) from e
  except Exception as e:
    raise ConfigError([f'name={name}: TFDS cannot open it without TensorFlow '
                       f'({type(e).__name__}: {one_line(e)})']) from e


def _text_field(name, features, text_key):
  """Return the field to read; raise ConfigError where it does not exist or is ambiguous."""
  import tensorflow_datasets as tfds

  fields = [k for k, v in features.items() if isinstance(v, tfds.features.Text)] if hasattr(
      features, 'items') else []
  if text_key:
    if text_key not in fields:
      near = difflib.get_close_matches(text_key, fields, n=1)
      hint = f'did you mean {near[0]}?' if near else f'it has {", ".join(fields) or "none"}'
      raise ConfigError([f'text_key={text_key}: {name} has no such text field; {hint}'])
    return text_key
  if 'text' in fields:
    return 'text'
  if len(fields) == 1:
    return fields[0]
  raise ConfigError([f'text_key is missing: {name} has the text fields '
                     f'{", ".join(fields) or "none"}; choose one with --config.text_key=FIELD'])
