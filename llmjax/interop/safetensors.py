"""Files of safetensors: a JSON header and plain arrays.  Nothing in them can be run."""

import json
import math
import os
import pathlib
import struct

import ml_dtypes
import numpy as np

from llmjax.config import ConfigError

DTYPES = {'F64': np.float64, 'F32': np.float32, 'F16': np.float16, 'BF16': ml_dtypes.bfloat16, 'I64': np.int64,
          'I32': np.int32, 'I16': np.int16, 'I8': np.int8, 'U8': np.uint8, 'BOOL': np.bool_}
NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
HEADER_BYTES = 100_000_000  # The format's own limit.


def read(file):
  """Returns {name: array} of a file, the arrays mapped from it; ConfigError when it is not whole."""
  file = pathlib.Path(file)
  try:
    size = os.path.getsize(file)
    with open(file, 'rb') as f:
      start = f.read(8)
      length = struct.unpack('<Q', start)[0] if len(start) == 8 else HEADER_BYTES
      if length >= min(HEADER_BYTES, size):
        raise ValueError('its header is cut off')
      header = json.loads(f.read(length))
    if not isinstance(header, dict):
      raise ValueError('its header is no object')
    header.pop('__metadata__', None)
    body, rest = 8 + length, size - 8 - length
    raw = np.memmap(file, np.uint8, 'r', body) if rest else np.zeros(0, np.uint8)
    return {str(name): _array(raw, name, entry) for name, entry in header.items()}
  except OSError as e:
    raise ConfigError([f'{file} cannot be read: {e.strerror or e}']) from e
  except (ValueError, KeyError, TypeError, RecursionError) as e:
    raise ConfigError([f'{file} is no safetensors file: {str(e)[:200]}']) from e


def _array(raw, name, entry):
  dtype, (begin, end) = np.dtype(DTYPES[entry['dtype']]), entry['data_offsets']
  shape = tuple(int(n) for n in entry['shape'])
  if min((0, *shape)) < 0 or not 0 <= begin <= end <= len(raw) or end - begin != math.prod(shape) * dtype.itemsize:
    raise ValueError(f'{name} does not fit into it')
  return raw[begin:end].view(dtype).reshape(shape)


def write(file, arrays, metadata=None):
  """Writes {name: array} to a file."""
  header, blocks, place = {'__metadata__': dict(metadata or {'format': 'pt'})}, [], 0
  for name in sorted(arrays):
    array = np.asarray(arrays[name], order='C')
    header[name] = {'dtype': NAMES[array.dtype], 'shape': list(array.shape),
                    'data_offsets': [place, place + array.nbytes]}
    blocks.append(array)
    place += array.nbytes
  text = json.dumps(header, separators=(',', ':')).encode()
  text += b' ' * (-len(text) % 8)
  with open(file, 'wb') as f:
    f.write(struct.pack('<Q', len(text)) + text)
    for array in blocks:
      f.write(array.reshape(-1).view(np.uint8).data)
