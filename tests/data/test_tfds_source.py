import pathlib
import tempfile

import pytest

from llmjax import config
from llmjax.data import corpus, prepared, stream, tfds_source
from llmjax.data.documents import Document, Limits, Rejected
from llmjax.data.spec import PrepareSpec, TokenizerSpec

tfds = pytest.importorskip('tensorflow_datasets')
epath = pytest.importorskip('etils.epath')


class TinyTexts(tfds.core.GeneratorBasedBuilder):
  """Forty texts with a test split of their own, and some bad ones."""

  VERSION = tfds.core.Version('1.0.0')
  code_path = epath.Path(__file__)

  def _info(self):
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(
        {'text': tfds.features.Text(), 'title': tfds.features.Text()}))

  def _split_generators(self, dl_manager):
    return {'train': self._generate_examples(0, 40), 'test': self._generate_examples(100, 110)}

  def _generate_examples(self, start, stop):
    for i in range(start, stop):
      text = {3: '', 5: 'a\0b', 7: b'\xff'}.get(i, f'The text of record {i}, and some more of it.')
      yield i, {'text': text, 'title': f'title {i}'}


@pytest.fixture
def data_dir(tmp_path, monkeypatch):
  from tensorflow_datasets.core import constants
  monkeypatch.setattr(constants, 'DATA_DIR', str(tmp_path / 'tfds'))
  return tmp_path / 'tfds'


def test_a_dataset_by_name(data_dir):
  items = list(tfds_source.read_tfds('tiny_texts', '', Limits(())))
  documents = [i for i in items if isinstance(i, Document)]
  assert len(documents) == 47
  assert sorted(i.reason.split(' (')[0] for i in items if isinstance(i, Rejected)) == [
      'NUL byte', 'empty', 'invalid UTF-8']
  assert {d.split for d in documents} == {'', 'test'}  # Validation is still to be held out.
  titles = list(tfds_source.read_tfds('tiny_texts', 'title', Limits(())))
  assert titles[0].text.startswith('title')


def test_prepare_a_dataset(data_dir, tmp_path):
  spec = PrepareSpec(source='tfds', name='tiny_texts', output=str(tmp_path / 'out'),
                     tokenizer=TokenizerSpec(vocab_size=320))
  manifest, _ = corpus.prepare(spec)
  assert manifest['splits']['test']['documents'] == 10
  assert manifest['splits']['validation']['documents'] >= 1
  assert sum(s['documents'] for s in manifest['splits'].values()) == 47
  assert manifest['quarantine']['records'] == 3
  assert all('record 10' in t for _, t in stream.read_documents(tmp_path / 'out', 'test'))
  assert prepared.is_prepared(tmp_path / 'out')


@pytest.mark.parametrize('name, key, message', [
    ('tiny_text', '', 'did you mean tiny_texts'), ('lm1bb', '', 'did you mean lm1b'),
    ('tiny_texts', 'titel', 'did you mean title?'), ('mnist', '', 'no'),
    ('qqqqqqqqqqqq', '', 'catalog')])
def test_wrong_names_are_one_line(data_dir, name, key, message):
  with pytest.raises(config.ConfigError) as error:
    list(tfds_source.read_tfds(name, key, Limits(())))
  (problem,) = error.value.problems
  assert message in problem and '\n' not in problem


def test_no_network_is_one_line(data_dir, monkeypatch):
  def fail(*args, **kwargs):
    raise ConnectionError('no route\nto host')

  monkeypatch.setattr(TinyTexts, 'download_and_prepare', fail)
  with pytest.raises(config.ConfigError) as error:
    list(tfds_source.read_tfds('tiny_texts', '', Limits(())))
  (problem,) = error.value.problems
  assert 'could not download' in problem and 'no route to host' in problem and '\n' not in problem
  assert '--text-dir' in problem and pathlib.Path(data_dir).name == 'tfds'


def test_nothing_is_left_in_the_temporary_folder(data_dir, tmp_path, monkeypatch):
  monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path / 'temporary'))
  (tmp_path / 'temporary').mkdir()
  output = tmp_path / 'prepared'
  corpus.prepare(PrepareSpec(source='tfds', name='tiny_texts', output=str(output), test_fraction=0.2,
                             tokenizer=TokenizerSpec(vocab_size=300, sample_lines=100)))
  assert tempfile.tempdir == str(tmp_path / 'temporary')
  assert list((tmp_path / 'temporary').iterdir()) == []
