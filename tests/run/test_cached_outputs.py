"""Cached outputs of another model belong to that model and these data, and are recomputed otherwise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.checkpoint import bases, manifest
from llmjax.config import ConfigError
from llmjax.run.cached_outputs import CachedModel

MESH = jax.make_mesh((1,), ('data',), devices=jax.devices()[:1])


def write_model(folder, value):
  """Write a checkpoint of one number, with its manifest."""
  (folder / 'params').mkdir(parents=True, exist_ok=True)
  (folder / 'params/w').write_text(str(value))
  manifest.write_manifest(folder, 1)
  return folder


def open_cache(tmp_path, model):
  (tmp_path / 'run').mkdir(exist_ok=True)
  return CachedModel(tmp_path / 'run/reference', 'reference', 'train.init_from', str(model), lambda: model)


def outputs(cache, split='train', variant='0', fails=False):
  """Return (table [3, 2] of each row's number and the model's, how often the model was loaded)."""
  loads = []

  def make():
    loads.append(cache.checkpoint())
    value = float((loads[-1] / 'params/w').read_text())
    step = lambda params, batch: {'x': jnp.stack([batch, batch * 0 + params], -1).reshape(-1)}
    return step, value, batches()

  def batches():
    yield jnp.array([0.0, 1.0])
    if fails:
      raise OSError
    yield jnp.array([2.0, -1.0])  # The last row is padding.

  table = cache.outputs(MESH, None, split, variant, {'x': 'float32'}, (3, 2), make)['x']
  assert table.shape == (3, 2) and table.dtype == np.float32
  return table[:], len(loads)


@pytest.fixture(autouse=True)
def data(monkeypatch):
  """The digest of the data; a test may change it."""
  digest = ['a' * 64]
  monkeypatch.setattr('llmjax.run.cached_outputs.stream.fingerprint', lambda data, split: digest[0])
  return digest


def expected(model):
  return [[0, model], [1, model], [2, model]]


def test_another_model_or_other_data_are_not_taken_from_the_cache(tmp_path, data):
  """A run that was killed before its first checkpoint, and whose reference was trained on in between."""
  model = write_model(tmp_path / 'model', 5)
  for loads in (1, 0):
    table, loaded = outputs(open_cache(tmp_path, model))
    np.testing.assert_array_equal(table, expected(5))
    assert loaded == loads
  write_model(model, 6)
  table, loaded = outputs(open_cache(tmp_path, model))
  np.testing.assert_array_equal(table, expected(6))
  assert loaded == 1
  data[0] = 'b' * 64
  assert outputs(open_cache(tmp_path, model))[1] == 1
  assert outputs(open_cache(tmp_path, model), variant='1')[1] == 1
  assert outputs(open_cache(tmp_path, model), split='test')[1] == 1
  assert outputs(open_cache(tmp_path, model))[1] == 0


def test_a_resumed_run_keeps_its_model(tmp_path):
  model = write_model(tmp_path / 'model', 5)
  assert outputs(open_cache(tmp_path, model))[1] == 1
  (tmp_path / 'run/checkpoints/10').mkdir(parents=True)
  newer = write_model(tmp_path / 'newer', 6)
  cache = open_cache(tmp_path, newer)
  assert cache.checkpoint() == model and cache.identity == bases.identify(model)
  np.testing.assert_array_equal(outputs(cache)[0], expected(5))
  table, loaded = outputs(cache, split='validation')
  np.testing.assert_array_equal(table, expected(5))
  assert loaded == 1
  model.rename(tmp_path / 'moved')  # The config's path may name its new place.
  assert open_cache(tmp_path, tmp_path / 'moved').checkpoint() == tmp_path / 'moved'
  cache = open_cache(tmp_path, newer)
  np.testing.assert_array_equal(outputs(cache)[0], expected(5))  # A cached table needs no model.
  with pytest.raises(ConfigError, match=r'train.init_from=.*newer is not the reference that this run began with'):
    outputs(cache, split='test')


def test_an_incomplete_table_is_recomputed(tmp_path):
  cache = open_cache(tmp_path, write_model(tmp_path / 'model', 5))
  with pytest.raises(OSError):
    outputs(cache, fails=True)
  table, loaded = outputs(cache)
  np.testing.assert_array_equal(table, expected(5))
  assert loaded == 1
  assert [f.name for f in cache.folder.glob('*.npy')] == [f'train-{"a" * 16}-{cache.identity["sha256"][:16]}-0-x.npy']
