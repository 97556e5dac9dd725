"""Rewards of completions, by hand, and reward functions of user modules."""

import numpy as np
import pytest

from llmjax import config
from llmjax.post import math_reward, rewards
from llmjax.post.spec import RlSpec


def completion(text, answer='', tokens=3, ended=True, **columns):
  return rewards.Completion('p', text, answer, tokens, ended, columns=columns)


def by_name(spec, completions, score=None):
  return rewards.compute_rewards(spec, completions, score).by_name


@pytest.mark.parametrize('text, number', [
    ('so it is 12', 12), ('12.', 12), ('#### 1,234', 1234), ('3 + 4 = 7\n#### 7 apples of 9', 7), ('-3.50', -3.5),
    (r'hence \boxed{42}, not 41', 42), ('1/2', 0.5), ('half', None), ('', None), ('1/0', None), ('.25', 0.25),
    ('1e3', 1000), ('it costs $1,000,000', 1000000), ('#### none', None)])
def test_final_number(text, number):
  assert math_reward.final_number(text) == number


def test_math():
  texts = {'7': 1.0, 'The answer is 7.0': 1.0, '7/1': 1.0, '8': 0.0, '': 0.0}
  assert by_name(RlSpec(), [completion(t, '1 + 6\n#### 7') for t in texts]) == {'math': list(texts.values())}
  assert by_name(RlSpec(), [completion('no', 'no number')]) == {'math': [0.0]}


@pytest.mark.parametrize('name, fields, text, answer, reward', [
    ('exact', {}, '  Paris\n', 'paris', 1.0), ('exact', {}, 'Paris, France', 'paris', 0.0),
    ('doctest', {}, '[1,  2]\n', '[1, 2]', 1.0), ('doctest', {}, '<object at 0x7f>', '<object at ...>', 1.0),
    ('doctest', {}, '[1, 3]', '[1, 2]', 0.0),
    ('regex', {'pattern': r'answer: {answer}\b'}, 'the answer: 1.5', '1.5', 1.0),
    ('regex', {'pattern': r'answer: {answer}\b'}, 'the answer: 1x5', '1.5', 0.0),
    ('format', {'format': r'<think>.*</think>\d+'}, '<think>a\nb</think>7', '', 1.0),
    ('format', {'format': r'<think>.*</think>\d+'}, 'x<think></think>7', '', 0.0),
    ('length', {'length': 4}, 'abc', '', 0.75), ('length', {'length': 1}, 'abc', '', 0.0)])
def test_each_reward(name, fields, text, answer, reward):
  spec = RlSpec(rewards={name: 1.0}, **fields)
  assert not list(spec.validate())
  assert by_name(spec, [completion(text, answer)]) == {name: [reward]}


def test_weighted_sum():
  spec = RlSpec(rewards={'exact': 2.0, 'length': 0.5, 'model': -1.0}, length=3, reward_model='x',
                missing_eos_penalty=0.25, max_new_tokens=4, overlong_tokens=2)
  result = rewards.compute_rewards(spec, [completion('a', 'a'), completion('b', 'a', ended=False)],
                                   score=lambda completions: [0.5, 3])
  np.testing.assert_array_equal(result.raw, [2.0 + 0.5 - 0.5, 0.5 - 3.0 - 0.25])
  np.testing.assert_array_equal(result.total, result.raw - 0.5)  # One of the two overlong tokens.


def test_problems():
  spec = RlSpec(rewards={'regex': 1.0}, format='(', kl_target=1.0, overlong_tokens=100)
  problems = ' '.join(spec.validate())
  with pytest.raises(config.ConfigError, match="'maths'.*did you mean math"):
    config.build(RlSpec, {'rewards': {'maths': 1.0}})
  for problem in ('pattern is missing', 'add rewards.format=1', 'no regular expression', 'kl_coef=0.1',
                  'write 16 for a quarter'):
    assert problem in problems


@pytest.fixture
def user_module(tmp_path, monkeypatch):
  """Reward functions in a module outside the package, found from the current folder."""
  (tmp_path / 'user_rewards.py').write_text('''
def brevity(prompts, completions, **columns):
  return [1 / (1 + len(text)) for text in completions]

def difficulty(prompts, completions, level, answer, **columns):
  return [(l or 0) * (text == right) for text, right, l in zip(completions, answer, level)]

def short(prompts, completions, **columns):
  return [1.0]

def fails(prompts, completions, **columns):
  return columns['missing']
''')
  monkeypatch.chdir(tmp_path)
  monkeypatch.syspath_prepend(str(tmp_path))


def test_custom_rewards(user_module):
  spec = config.build(RlSpec, {}, [('rewards.user_rewards:difficulty', '0.5'), ('rewards.user_rewards:brevity', '2'),
                                   ('rewards.exact', '1')])
  completions = [completion('a', 'a', level=3), completion('abc', 'a')]
  result = rewards.compute_rewards(spec, completions)
  assert result.by_name == {'user_rewards:difficulty': [3.0, 0.0], 'user_rewards:brevity': [0.5, 0.25],
                            'exact': [1.0, 0.0]}
  np.testing.assert_array_equal(result.raw, [1.5 + 1.0 + 1.0, 0.5])


@pytest.mark.parametrize('name, problem', [
    ('user_rewards:brevty', 'rewards=user_rewards:brevty.*did you mean user_rewards:brevity'),
    ('no_such_module:f', 'rewards=no_such_module:f.*there is no module'), ('user_rewards:', 'rewards=user_rewards:')])
def test_custom_rewards_that_do_not_exist(user_module, name, problem):
  with pytest.raises(config.ConfigError, match=problem):
    config.build(RlSpec, {'rewards': {name: 1.0}})


@pytest.mark.parametrize('name, problem', [('short', 'must return 2 finite numbers'), ('fails', 'KeyError')])
def test_custom_rewards_that_fail(user_module, name, problem):
  spec = RlSpec(rewards={f'user_rewards:{name}': 1.0})
  with pytest.raises(config.ConfigError, match=f'rl.rewards=user_rewards:{name}.*{problem}'):
    rewards.compute_rewards(spec, [completion('a'), completion('b')])
