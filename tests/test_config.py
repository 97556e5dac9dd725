"""Specs are built from recipes and overrides; every wrong setting is reported, with the remedy."""

import dataclasses
import pickle

import pytest

from llmjax import config, renamed
from llmjax.config import setting
from llmjax.plan import spec as plan_spec
from llmjax.run import spec


@dataclasses.dataclass(frozen=True)
class Inner:
  steps: int = setting(10, 'steps', minimum=1)
  rate: float = setting(0.5, 'a rate', minimum=0.0, maximum=1.0)
  name: str = setting('adam', 'a name', choices=('adam', 'lion'))
  flag: bool = setting(False, 'a switch')
  names: tuple[str, ...] = setting((), 'names')
  weights: dict[str, float] = setting({'a': 1.0}, 'weights')

  def validate(self):
    if self.steps == 13:
      yield 'steps=13 is unlucky; write 12'


@dataclasses.dataclass(frozen=True)
class Outer:
  train: Inner = config.group(Inner)
  other: Inner = config.group(Inner)


def validate(recipe, overrides=()):
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
  found = validate({'train': {'stepz': 3, 'rate': 2.0, 'flag': 'maybe'}, 'optimzer': 1},
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
  [problem] = validate({}, [(name, '1')])
  assert expected in problem


def test_fields_are_checked_before_relations_between_them():
  assert validate({'train': {'steps': 13}}) == ['train.steps=13 is unlucky; write 12']
  assert len(validate({'train': {'steps': 13, 'rate': 'x'}})) == 1


@dataclasses.dataclass(frozen=True)
class Kinds:
  file: str = setting('', 'a file', kind='path')
  cache: str = setting('default', 'a folder, or a word', kind='path', choices=('default', 'none'))
  folders: tuple[str, ...] = setting((), 'folders', kind='path')
  shares: dict[str, float] = setting({}, 'shares of folders', kind='path', minimum=0.0)
  texts: tuple[str, ...] = setting((), 'texts', kind='text')
  names: tuple[str, ...] = setting((), 'names', choices=('a', 'b'))
  counts: tuple[int, ...] = setting((), 'counts', minimum=1)


@pytest.mark.parametrize('field', ['file', 'cache', 'folders', 'shares'])
@pytest.mark.parametrize('url', ['gs://b/run', 's3://b/run', 'hf://o/m', 'https://h/x', 'gs:/b/run', 'GS://b', 'abfs+x://b'])
def test_urls_are_rejected_as_paths(field, url):
  for recipe, overrides in [({}, [(field, url)]), ({field: {url: 1} if field == 'shares' else url}, [])]:
    with pytest.raises(config.ConfigError) as e:
      config.build(Kinds, recipe, overrides)
    assert len(e.value.problems) == 1
    assert 'is a URL: remote storage is not supported yet' in str(e.value)


def test_paths_that_look_like_urls():
  for path in ('runs/a:b', './gs:/b', 'C:/x', 'a b/c', 'data/x=1', 'http', '//host/share'):
    assert config.build(Kinds, {}, [('file', path), ('folders', path)]) == Kinds(file=path, folders=(path,))
  assert config.build(Kinds, {}, [('cache', 'none')]).cache == 'none'
  with pytest.raises(config.ConfigError, match=r"file='file:///tmp/a b' is a URL; write the path itself, /tmp/a b"):
    config.build(Kinds, {'file': 'file:///tmp/a b'})


@dataclasses.dataclass(frozen=True)
class Outputs:
  page: str = setting('', 'a file', kind='file')
  run: str = setting('', 'a folder', kind='folder')
  source: str = setting('', 'what is read', kind='path')


def test_outputs_can_be_written(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'file').write_text('')
  (tmp_path / 'folder').mkdir()
  (tmp_path / 'loop').symlink_to('loop')
  for fine in ({'page': 'file', 'run': 'folder'}, {'page': 'new/page', 'run': 'new/run'}, {'source': 'nowhere'}):
    assert config.build(Outputs, fine) == Outputs(**fine)
  with pytest.raises(config.ConfigError) as e:
    config.build(Outputs, {'page': 'folder', 'run': 'file'})
  assert e.value.problems == ['page=folder is a folder; write the path of a file',
                              'run=file is not a folder; write the path of a folder']
  for below in ('file/x', 'file/x/y', 'loop/x'):
    with pytest.raises(config.ConfigError) as e:
      config.build(Outputs, {'page': below, 'run': below})
    place = below.partition('/')[0]
    assert e.value.problems == [f'{name}={below} cannot be written: {place} is not a folder; write another path'
                                for name in ('page', 'run')]
  assert config.build(Outputs, {'run': 'file', 'source': 'nowhere'}, elsewhere=True)  # Another machine's files.
  monkeypatch.setattr(config.os, 'access', lambda place, mode: False)
  with pytest.raises(config.ConfigError, match=r'run=new/x .* permission to write to \.; write another path'):
    config.build(Outputs, {'run': 'new/x'})


def test_errors_can_be_pickled():
  error = pickle.loads(pickle.dumps(config.ConfigError(['one', 'two'])))
  assert (type(error), error.problems) == (config.ConfigError, ['one', 'two'])


@pytest.mark.parametrize(('field', 'text', 'value'), [
    ('texts', 'Once upon a time, there was', ('Once upon a time, there was',)),
    ('texts', '["Once upon a time, there was", "b"]', ('Once upon a time, there was', 'b')),
    ('texts', "('a,b', 'c')", ('a,b', 'c')), ('texts', '"Yes," she said', ('"Yes," she said',)), ('texts', '', ()),
    ('texts', '"quoted"', ('"quoted"',)), ('texts', '[1, 2]', ('[1, 2]',)), ('texts', '3', ('3',)),
    ('texts', 'true', ('true',)), ('texts', ',', (',',)),
    ('texts', 'a\nb', ('a\nb',)), ('texts', '[""]', ('',)), ('texts', '{"a": 1}', ('{"a": 1}',)),
    ('folders', 'x,y', ('x', 'y')), ('folders', 'x, y', ('x', 'y')), ('folders', '"x,y"', ('x,y',)),
    ('folders', '["x,y", "z"]', ('x,y', 'z')), ('folders', '1', ('1',)), ('folders', 'true', ('true',)),
    ('folders', '', ()),
    ('counts', '1,2', (1, 2)), ('counts', '[1, 2]', (1, 2)), ('counts', '3', (3,)), ('counts', '', ())])
def test_lists_on_the_command_line(field, text, value):
  assert getattr(config.build(Kinds, {}, [(field, text)]), field) == value


@pytest.mark.parametrize(('field', 'text', 'problem'), [
    ('names', 'a,c', "names=a,c has 'c', which is not one of a, b"),
    ('counts', '1,0', 'counts=(1, 0) must be at least 1'),
    ('shares', "{'x': -1}", "shares={'x': -1} must be at least 0.0"),
    ('counts', 'x,1', 'counts=x,1 must be a whole number')])
def test_choices_and_bounds_hold_for_each_item(field, text, problem):
  with pytest.raises(config.ConfigError) as e:
    config.build(Kinds, {}, [(field, text)])
  assert e.value.problems == [problem]


@pytest.mark.parametrize(('text', 'value'), [
    ('data/a,data/b', {'data/a': 1.0, 'data/b': 1.0}), ('data/a', {'data/a': 1.0}),
    ("{'data/a': 0.7, 'data/b': 0.3}", {'data/a': 0.7, 'data/b': 0.3}),
    ("{'data/a: 1}", "{'data/a: 1}"), ('', {})])
def test_mappings_on_the_command_line(text, value):
  assert config.parse_text(dict[str, float], text) == value


def test_old_names_of_fields_are_errors_that_name_the_new_ones():
  recipe = {}
  for old in renamed.FIELDS:
    group, field = old.split('.')
    recipe.setdefault(group, {})[field] = 1
  specs = (spec.PretrainSpec, spec.FinetuneSpec, spec.RlCommandSpec, spec.RewardSpec)
  known = {flag for spec_class in specs for flag, *_ in config.describe(spec_class, '')}
  assert set(renamed.FIELDS.values()) <= known and not set(renamed.FIELDS) & known
  lines = set()
  for spec_class in specs:
    with pytest.raises(config.ConfigError) as error:
      config.build(spec_class, recipe)
    lines |= set(error.value.problems)
  for old, new in renamed.FIELDS.items():
    assert f'{old} is now called {new}; write {new}' in lines
  assert {flag for flag, *_ in config.describe(plan_spec.PlanOptions, '')} >= set(renamed.FLAGS.values())


def test_migrate_renames_the_fields_and_values_of_an_old_config():
  old = {'train': {'accumulation': 2, 'steps': 3}, 'rl': {'group': 4, 'rewards': {'maths': 1.0, 'exact': 0.5}}}
  new, done = renamed.migrate(old)
  assert new == {'train': {'gradient_accumulation_steps': 2, 'steps': 3},
                 'rl': {'num_generations': 4, 'rewards': {'math': 1.0, 'exact': 0.5}}}
  assert done == {'train.accumulation': 'train.gradient_accumulation_steps', 'rl.group': 'rl.num_generations',
                  'rl.rewards.maths': 'rl.rewards.math'}
  assert renamed.migrate(new) == (new, {}) and old['train'] == {'accumulation': 2, 'steps': 3}
