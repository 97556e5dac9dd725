"""safetensors files are read and written as NumPy arrays, and damaged ones are refused in one line."""

import json
import sys

import ml_dtypes
import numpy as np
import pytest

from llmjax.config import ConfigError
from llmjax.interop import safetensors


@pytest.mark.parametrize('dtype', [np.float32, np.float16, ml_dtypes.bfloat16, np.float64, np.int8, np.int64, np.bool_])
def test_arrays_come_back_to_the_bit(tmp_path, dtype):
  rng = np.random.default_rng(0)
  arrays = {'scalar': np.array(2).astype(dtype), 'empty': np.zeros((0, 3), dtype),
            'turned': (100 * rng.standard_normal((4, 3))).astype(dtype).T}
  safetensors.write(tmp_path / 'x.safetensors', arrays, {'step': '3'})
  loaded = safetensors.read(tmp_path / 'x.safetensors')
  assert loaded.keys() == arrays.keys()
  for name, array in arrays.items():
    assert loaded[name].dtype == array.dtype and loaded[name].shape == array.shape
    assert loaded[name].tobytes() == array.tobytes()
  assert 'torch' not in sys.modules


def write_shards(folder):
  for k in range(2):
    safetensors.write(folder / f'model-{k}.safetensors', {f'layers.{k}.w': np.full((2, 3), k, ml_dtypes.bfloat16)})
  return {'layers.0.w': 'model-0.safetensors', 'layers.1.w': 'model-1.safetensors'}


def test_an_index_reads_all_shards(tmp_path):
  index = tmp_path / 'model.safetensors.index.json'
  index.write_text(json.dumps({'metadata': {'total_size': 24}, 'weight_map': write_shards(tmp_path)}))
  loaded = safetensors.read(index)
  assert list(loaded) == ['layers.0.w', 'layers.1.w']
  np.testing.assert_array_equal(loaded['layers.1.w'], np.ones((2, 3), ml_dtypes.bfloat16))


@pytest.mark.parametrize(('change', 'problem'), [
    ({'layers.2.w': 'model-1.safetensors'}, 'model-1.safetensors does not have the arrays .* such as layers.2.w'),
    ({'layers.2.w': 'model-2.safetensors'}, 'model-2.safetensors cannot be read: No such file'),
    ({'layers.2.w': '../model-1.safetensors'}, 'is not a file beside it'),
    ({'layers.2.w': '/etc/passwd'}, 'is not a file beside it'),
    ({'layers.2.w': 3}, 'is no safetensors index')])
def test_a_wrong_index_is_refused(tmp_path, change, problem):
  index = tmp_path / 'model.safetensors.index.json'
  index.write_text(json.dumps({'weight_map': {**write_shards(tmp_path), **change}}))
  with pytest.raises(ConfigError, match=problem) as e:
    safetensors.read(index)
  assert len(e.value.problems) == 1


def test_damaged_files_are_refused(tmp_path):
  file, index = tmp_path / 'x.safetensors', tmp_path / 'x.safetensors.index.json'
  safetensors.write(file, {'w': np.zeros((2, 3), np.float32)})
  data = file.read_bytes()
  for damaged in (b'', data[:4], data[:-4], data + b'x', b'\xff' * 64, data.replace(b'F32', b'F99')):
    file.write_bytes(damaged)
    with pytest.raises(ConfigError, match='x.safetensors is no safetensors file'):
      safetensors.read(file)
  for text in ('', '[]', '{"weight_map": 3}', '[' * 100000):
    index.write_text(text)
    with pytest.raises(ConfigError, match='is no safetensors index'):
      safetensors.read(index)
