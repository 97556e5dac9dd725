"""Recipes are Python or JSON files, and every mistake in one is reported with the remedy."""

import pytest

from llmjax import recipes
from llmjax.config import ConfigError


def test_recipe_files(tmp_path):
  file = tmp_path / 'recipe.py'
  file.write_text('from ml_collections import config_dict\n'
                  'def get_config():\n  c = config_dict.ConfigDict()\n'
                  '  c.train = config_dict.create(steps=3)\n  return c\n')
  assert recipes.load_recipe(str(file)) == {'train': {'steps': 3}}
  for name, text, expected in [
      ('broken.py', 'def get_config(:', 'SyntaxError'), ('none.py', 'x = 1', 'must define get_config()'),
      ('list.py', 'def get_config(): return []', 'must return a ConfigDict, not list')]:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=expected.replace('(', r'\(').replace(')', r'\)')):
      recipes.load_recipe(str(tmp_path / name))
  with pytest.raises(ConfigError, match='did you mean .*recipe.py'):
    recipes.load_recipe(str(tmp_path / 'recipee.py'))


def test_variants_of_a_recipe(tmp_path):
  file = tmp_path / 'recipe.py'
  file.write_text("VARIANTS = {'wide': dict(model=dict(d_model=64), mesh=dict(fsdp=2))}\n"
                  "def get_config():\n  return {'model': {'d_model': 32, 'num_layers': 2}}\n")
  assert recipes.load_recipe(str(file)) == {'model': {'d_model': 32, 'num_layers': 2}}
  assert recipes.load_recipe(f'{file}:wide') == {'model': {'d_model': 64, 'num_layers': 2}, 'mesh': {'fsdp': 2}}
  with pytest.raises(ConfigError, match='recipe.py:wid: there is no such variant; write one of wide'):
    recipes.load_recipe(f'{file}:wid')
  file.write_text('def get_config():\n  return {}\n')
  with pytest.raises(ConfigError, match='has none'):
    recipes.load_recipe(f'{file}:wide')
  with pytest.raises(ConfigError, match='did you mean .*recipe.py'):
    recipes.load_recipe(f'{tmp_path}/recip.py:wide')


def test_a_url_is_not_a_recipe():
  with pytest.raises(ConfigError, match="--config='gs://b/recipe.py' is a URL"):
    recipes.load_recipe('gs://b/recipe.py')
