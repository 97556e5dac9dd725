"""safetensors files as NumPy arrays, one file or an index of shards. bfloat16 arrays have ml_dtypes' type; no torch."""

import json
import pathlib

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from llmjax.config import ConfigError


def read(file):
  """Read {name: array} of a .safetensors file, or of all shards of a .safetensors.index.json.

  Raises ConfigError if a file is damaged or missing, or a shard does not have the arrays that the index lists.
  """
  file = pathlib.Path(file)
  return _read_shards(file) if file.name.endswith('.index.json') else _read_file(file)


def _read_file(file):
  try:
    return load_file(file)
  except OSError as e:
    raise ConfigError([f'{file} cannot be read: {e.strerror or e}']) from e
  except (SafetensorError, KeyError, TypeError, ValueError) as e:  # KeyError: a dtype that NumPy does not have.
    raise ConfigError([f'{file} is no safetensors file that can be read: {str(e)[:200]}']) from e


def _read_shards(index):
  try:
    weight_map = json.loads(index.read_bytes())['weight_map']
    shards = sorted(set(weight_map.values()))
  except OSError as e:
    raise ConfigError([f'{index} cannot be read: {e.strerror or e}']) from e
  except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
    raise ConfigError([f'{index} is no safetensors index: it has no weight_map of names to files']) from e
  if outside := [shard for shard in shards if pathlib.PurePath(shard).name != shard or '\\' in shard]:
    raise ConfigError([f'{index}: the shard {outside[0]!r} is not a file beside it'])
  arrays = {}
  for shard in shards:
    loaded = _read_file(index.parent / shard)
    listed = {name for name, file in weight_map.items() if file == shard}
    if loaded.keys() != listed:
      raise ConfigError([f'{index.parent / shard} does not have the arrays that {index.name} lists, such as '
                         f'{min(loaded.keys() ^ listed)}'])
    arrays |= loaded
  return arrays


def write(file, arrays, metadata=None):
  """Write {name: array} to a file. metadata: {str: str} of its header."""
  save_file({name: np.asarray(array, order='C') for name, array in arrays.items()}, file,
            metadata=metadata or {'format': 'pt'})
