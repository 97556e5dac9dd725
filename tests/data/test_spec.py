import json
import pathlib
import subprocess
import sys

import pytest

from llmjax import config, recipes
from llmjax.data.spec import DataSpec, PrepareSpec

ROOT = pathlib.Path(__file__).resolve().parents[2]


def validate(spec_class, **values):
  try:
    config.build(spec_class, values)
  except config.ConfigError as e:
    return e.problems
  return []


def test_a_prepared_folder_is_accepted(small_folder, other_folder):
  assert not validate(DataSpec, sources={small_folder: 0.5, other_folder: 2})
  assert not validate(DataSpec, sources={small_folder: 1},
                      tokenizer=f'{other_folder}/tokenizer.model')


def test_wrong_sources(small_folder, tmp_path):
  assert 'sources is empty' in validate(DataSpec, sources={})[0]
  assert 'must be above 0' in validate(DataSpec, sources={small_folder: 0})[0]
  missing = validate(DataSpec, sources={str(tmp_path / 'python_docs'): 1})[0]
  assert 'llmjax prepare --config=configs/data/python_docs.py' in missing
  missing = validate(DataSpec, sources={str(tmp_path / 'mine'): 1})[0]
  assert f'llmjax prepare --text-dir=DIR --config.output={tmp_path / "mine"}' in missing
  near = validate(DataSpec, sources={small_folder + 'x': 1})[0]
  assert f'did you mean {small_folder}?' in near
  assert len(validate(DataSpec, sources={small_folder: -1, str(tmp_path / 'a'): 1})) == 2


def test_a_damaged_manifest(tmp_path):
  (tmp_path / 'manifest.json').write_text('{')
  assert '--force' in validate(DataSpec, sources={str(tmp_path): 1})[0]
  (tmp_path / 'manifest.json').write_text('{"format": 99}')
  assert 'format 99' in validate(DataSpec, sources={str(tmp_path): 1})[0]


@pytest.mark.parametrize('settings', [-1, {'tokenizer': 'x'}, {'path': ['x']}])
def test_a_manifest_with_wrong_settings_is_damaged(small_folder, tmp_path, settings):
  manifest = json.loads(pathlib.Path(small_folder, 'manifest.json').read_text())
  manifest['request']['settings'] = settings
  (tmp_path / 'manifest.json').write_text(json.dumps(manifest))
  (problem,) = validate(DataSpec, sources={str(tmp_path): 1})
  assert 'is damaged; prepare the folder again with --force' in problem


def test_different_tokenizers(small_folder, tmp_path):
  other = tmp_path / 'other'
  other.mkdir()
  manifest = json.loads(pathlib.Path(small_folder, 'manifest.json').read_text())
  manifest['tokenizer']['sha256'] = 'another'
  (other / 'manifest.json').write_text(json.dumps(manifest))
  (problem,) = validate(DataSpec, sources={small_folder: 1, str(other): 1})
  assert 'different tokenizers' in problem
  assert f'--config.tokenizer.path={small_folder}/tokenizer.model' in problem
  (tmp_path / 'x.model').write_bytes(b'x')
  assert 'is not the tokenizer of' in validate(DataSpec, sources={small_folder: 1},
                                    tokenizer=str(tmp_path / 'x.model'))[0]


def test_wrong_prepare_settings(tmp_path):
  (tmp_path / 'texts').mkdir()
  assert '--config.path=DIR' in validate(PrepareSpec, source='text_dir')[0]
  near = validate(PrepareSpec, source='text_dir', path=str(tmp_path / 'text'))[0]
  assert f'did you mean {tmp_path / "texts"}?' in near
  assert '--config.name=lm1b' in validate(PrepareSpec, source='tfds')[0]
  assert 'text_dir' in validate(PrepareSpec, path='x')[0]
  assert 'start with a dot' in validate(PrepareSpec, suffixes=('txt',))[0]
  assert 'less than half' in validate(PrepareSpec, validation_fraction=0.4, test_fraction=0.4)[0]
  assert 'did you mean text_dir?' in validate(PrepareSpec, source='textdir')[0]


def test_output_folders(tmp_path):
  assert PrepareSpec().folder == 'data/python_docs'
  assert PrepareSpec(source='text_dir', path='/x/peps.tar.gz').folder == 'data/peps'
  assert PrepareSpec(source='tfds', name='wiki40b/en').folder == 'data/wiki40b_en'
  assert PrepareSpec(output='elsewhere').folder == 'elsewhere'


@pytest.mark.parametrize('name', ['python_docs', 'text_dir', 'tfds'])
def test_recipes(name, tmp_path):
  recipe = recipes.load_recipe(str(ROOT / 'configs' / 'data' / f'{name}.py'))
  more = {'text_dir': [('path', str(tmp_path))], 'tfds': [('name', 'lm1b')]}.get(name, [])
  assert config.build(PrepareSpec, recipe, more).source == name


def test_the_spec_imports_nothing_heavy():
  code = ('import sys, llmjax.data.spec; '
          'print([m for m in ("jax", "grain", "tensorflow_datasets", "sentencepiece", "pyarrow", '
          '"numpy", "tensorflow") if m in sys.modules])')
  done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True,
                        check=True)
  assert done.stdout.strip() == '[]'
