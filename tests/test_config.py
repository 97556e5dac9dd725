"""Every wrong setting is reported, all together, in words that say what to write."""

import dataclasses

import pytest

from llmjax import config
from llmjax.config import setting


@dataclasses.dataclass(frozen=True)
class Inner:
  steps: int = setting(10, 'steps', minimum=1)
  rate: float = setting(0.5, 'a rate', minimum=0.0, maximum=1.0)
  name: str = setting('adam', 'a name', choices=('adam', 'lion'))
  flag: bool = setting(False, 'a switch')
  names: tuple[str, ...] = setting((), 'names')
  weights: dict[str, float] = setting({'a': 1.0}, 'weights')

  def problems(self):
    if self.steps == 13:
      yield 'steps=13 brings bad luck; write 12'


@dataclasses.dataclass(frozen=True)
class Outer:
  train: Inner = config.group(Inner)
  other: Inner = config.group(Inner)


def problems(recipe, overrides=()):
  with pytest.raises(config.ConfigError) as e:
    config.build(Outer, recipe, overrides)
  return e.value.problems


def test_defaults_recipe_and_overrides():
  spec = config.build(Outer, {'train': {'steps': 5}}, [
      ('train.rate', '1'), ('train.flag', 'true'), ('train.names', 'x,y'), ('train.weights.b/c', '2'),
      ('other.weights', "{'z': 3}"), ('other.name', 'lion'), ('other.steps', '1e3')])
  assert spec.train == Inner(5, 1.0, 'adam', True, ('x', 'y'), {'b/c': 2.0})
  assert isinstance(spec.train.rate, float)
  assert spec.other == Inner(1000, name='lion', weights={'z': 3.0})


def test_round_trip_through_json():
  spec = config.build(Outer, {'train': {'names': ['p'], 'steps': 7}})
  assert config.build(Outer, config.to_dict(spec)) == spec


def test_all_problems_at_once():
  found = problems({'train': {'stepz': 3, 'rate': 2.0, 'flag': 'maybe'}, 'optimzer': 1},
                   [('train.steps', 'many'), ('other.name', 'lino'), ('other', '3')])
  text = '\n'.join(found)
  assert 'train.stepz is not a field; did you mean train.steps?' in text
  assert 'train.rate=2.0 must be at most 1.0' in text
  assert "train.flag='maybe' must be true or false" in text
  assert "train.steps='many' must be a whole number" in text
  assert "other.name='lino' must be one of adam, lion; did you mean lion?" in text
  assert 'other is a group; set one of its fields: flag' in text
  assert 'optimzer is not a field' in text
  assert len(found) == 7


@pytest.mark.parametrize(('name', 'expected'), [
    ('trian.steps', 'did you mean train.steps?'),
    ('steps', 'did you mean train.steps?'),
    ('train.nmae', 'did you mean train.name?'),
    ('train.zzzz', 'known here: steps, rate, name, flag, names, weights'),
    ('train.steps.more', 'train.steps.more is not a field'),
])
def test_unknown_override_names_the_nearest(name, expected):
  [problem] = problems({}, [(name, '1')])
  assert expected in problem


def test_relations_are_checked_once_fields_are_right():
  assert problems({'train': {'steps': 13}}) == ['train.steps=13 brings bad luck; write 12']
  assert len(problems({'train': {'steps': 13, 'rate': 'x'}})) == 1


def test_recipe_files(tmp_path):
  file = tmp_path / 'recipe.py'
  file.write_text('from ml_collections import config_dict\n'
                  'def get_config():\n  c = config_dict.ConfigDict()\n'
                  '  c.train = config_dict.create(steps=3)\n  return c\n')
  assert config.load_recipe(str(file)) == {'train': {'steps': 3}}
  for name, text, expected in [
      ('broken.py', 'def get_config(:', 'SyntaxError'), ('none.py', 'x = 1', 'must define get_config()'),
      ('list.py', 'def get_config(): return []', 'must return a ConfigDict, not list')]:
    (tmp_path / name).write_text(text)
    with pytest.raises(config.ConfigError, match=expected.replace('(', r'\(').replace(')', r'\)')):
      config.load_recipe(str(tmp_path / name))
  with pytest.raises(config.ConfigError, match='did you mean .*recipe.py'):
    config.load_recipe(str(tmp_path / 'recipee.py'))


def test_variants_of_a_recipe(tmp_path):
  file = tmp_path / 'recipe.py'
  file.write_text("VARIANTS = {'wide': dict(model=dict(d_model=64), mesh=dict(fsdp=2))}\n"
                  "def get_config():\n  return {'model': {'d_model': 32, 'num_layers': 2}}\n")
  assert config.load_recipe(str(file)) == {'model': {'d_model': 32, 'num_layers': 2}}
  assert config.load_recipe(f'{file}:wide') == {'model': {'d_model': 64, 'num_layers': 2}, 'mesh': {'fsdp': 2}}
  with pytest.raises(config.ConfigError, match='recipe.py:wid: there is no such variant; known: wide'):
    config.load_recipe(f'{file}:wid')
  file.write_text('def get_config():\n  return {}\n')
  with pytest.raises(config.ConfigError, match='it has none'):
    config.load_recipe(f'{file}:wide')
  with pytest.raises(config.ConfigError, match='did you mean .*recipe.py'):
    config.load_recipe(f'{tmp_path}/recip.py:wide')


@pytest.mark.parametrize(('text', 'value'), [
    ('data/a', {'data/a': 1.0}), ("{'data/a': 0.7, 'data/b': 0.3}", {'data/a': 0.7, 'data/b': 0.3}),
    ("{'data/a: 1}", "{'data/a: 1}"), ('', {})])
def test_a_mapping_may_be_one_name(text, value):
  assert config.parse_text(dict[str, float], text) == value
