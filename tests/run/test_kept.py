"""What a run keeps of another model is that model's, and is made anew when it cannot be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.checkpoint import bases, manifest
from llmjax.config import ConfigError
from llmjax.run.cached_outputs import Kept

MESH = jax.make_mesh((1,), ('data',), devices=jax.devices()[:1])


def write_model(folder, value):
  """A checkpoint of one number."""
  (folder / 'params').mkdir(parents=True, exist_ok=True)
  (folder / 'params/w').write_text(str(value))
  manifest.write_manifest(folder, 1)
  return folder


def open_kept(tmp_path, model):
  (tmp_path / 'run').mkdir(exist_ok=True)
  return Kept(tmp_path / 'run/reference', 'reference', 'train.init_from', str(model), lambda: model)


def ask(kept, split='train', variant='0', fails=False):
  """Returns (table [3, 2], how often the model was loaded): each row's number, and the model's."""
  loads = []

  def make():
    loads.append(kept.checkpoint())
    value = float((loads[-1] / 'params/w').read_text())
    step = lambda params, batch: {'said': jnp.stack([batch, batch * 0 + params], -1).reshape(-1)}
    return step, value, batches()

  def batches():
    yield jnp.array([0.0, 1.0])
    if fails:
      raise OSError
    yield jnp.array([2.0, -1.0])  # The last row is padding.

  table = kept.tables(MESH, None, split, variant, {'said': 'float32'}, (3, 2), make)['said']
  assert table.shape == (3, 2) and table.dtype == np.float32
  return table[:], len(loads)


@pytest.fixture(autouse=True)
def data(monkeypatch):
  """The digest of the data, which a test may change."""
  digest = ['a' * 64]
  monkeypatch.setattr('llmjax.run.cached_outputs.stream.fingerprint', lambda data, split: digest[0])
  return digest


def expected(model):
  return [[0, model], [1, model], [2, model]]


def test_what_another_model_or_other_data_said_is_made_anew(tmp_path, data):
  """A run that was killed before its first checkpoint, and whose reference was trained on in between."""
  model = write_model(tmp_path / 'model', 5)
  for loads in (1, 0):
    table, loaded = ask(open_kept(tmp_path, model))
    np.testing.assert_array_equal(table, expected(5))
    assert loaded == loads
  write_model(model, 6)
  table, loaded = ask(open_kept(tmp_path, model))
  np.testing.assert_array_equal(table, expected(6))
  assert loaded == 1
  data[0] = 'b' * 64
  assert ask(open_kept(tmp_path, model))[1] == 1
  assert ask(open_kept(tmp_path, model), variant='1')[1] == ask(open_kept(tmp_path, model), split='test')[1] == 1
  assert ask(open_kept(tmp_path, model))[1] == 0


def test_a_run_that_has_begun_stays_with_its_model(tmp_path):
  model = write_model(tmp_path / 'model', 5)
  assert ask(open_kept(tmp_path, model))[1] == 1
  (tmp_path / 'run/checkpoints/10').mkdir(parents=True)
  newer = write_model(tmp_path / 'newer', 6)
  kept = open_kept(tmp_path, newer)
  assert kept.checkpoint() == model and kept.known == bases.identify(model)
  np.testing.assert_array_equal(ask(kept)[0], expected(5))
  table, loaded = ask(kept, split='validation')
  np.testing.assert_array_equal(table, expected(5))
  assert loaded == 1
  model.rename(tmp_path / 'moved')  # Where the setting says now is looked, too.
  assert open_kept(tmp_path, tmp_path / 'moved').checkpoint() == tmp_path / 'moved'
  kept = open_kept(tmp_path, newer)
  np.testing.assert_array_equal(ask(kept)[0], expected(5))  # What is there needs no model.
  with pytest.raises(ConfigError, match=r'train.init_from=.*newer is not the reference that this run began with'):
    ask(kept, split='test')


def test_a_table_that_was_not_finished_is_none(tmp_path):
  kept = open_kept(tmp_path, write_model(tmp_path / 'model', 5))
  with pytest.raises(OSError):
    ask(kept, fails=True)
  table, loaded = ask(kept)
  np.testing.assert_array_equal(table, expected(5))
  assert loaded == 1
  assert [f.name for f in kept.folder.glob('*.npy')] == [f'train-{"a" * 16}-{kept.known["sha256"][:16]}-0-said.npy']
