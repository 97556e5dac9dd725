"""Rewards of answers, by hand."""

import pytest

from llmjax import config
from llmjax.post import rewards
from llmjax.post.spec import RlSpec


def answer(text, reference='', tokens=3, ended=True):
  return rewards.Answer('p', text, reference, tokens, ended)


@pytest.mark.parametrize('text, number', [
    ('so it is 12', 12), ('12.', 12), ('#### 1,234', 1234), ('3 + 4 = 7\n#### 7 apples of 9', 7), ('-3.50', -3.5),
    (r'hence \boxed{42}, not 41', 42), ('1/2', 0.5), ('half', None), ('', None), ('1/0', None), ('.25', 0.25),
    ('1e3', 1000), ('it costs $1,000,000', 1000000), ('#### none', None)])
def test_final_number(text, number):
  assert rewards.final_number(text) == number


def test_maths():
  spec = RlSpec()
  texts = {'7': 1.0, 'The answer is 7.0': 1.0, '7/1': 1.0, '8': 0.0, '': 0.0}
  found = rewards.judge(spec, [answer(t, '1 + 6\n#### 7') for t in texts])
  assert found == {'math': list(texts.values())}
  assert rewards.judge(spec, [answer('no', 'no number')]) == {'math': [0.0]}


@pytest.mark.parametrize('name, fields, text, reference, reward', [
    ('exact', {}, '  Paris\n', 'paris', 1.0), ('exact', {}, 'Paris, France', 'paris', 0.0),
    ('doctest', {}, '[1,  2]\n', '[1, 2]', 1.0), ('doctest', {}, '<object at 0x7f>', '<object at ...>', 1.0),
    ('doctest', {}, '[1, 3]', '[1, 2]', 0.0),
    ('regex', {'pattern': r'answer: {answer}\b'}, 'the answer: 1.5', '1.5', 1.0),
    ('regex', {'pattern': r'answer: {answer}\b'}, 'the answer: 1x5', '1.5', 0.0),
    ('format', {'format': r'<think>.*</think>\d+'}, '<think>a\nb</think>7', '', 1.0),
    ('format', {'format': r'<think>.*</think>\d+'}, 'x<think></think>7', '', 0.0),
    ('length', {'length': 4}, 'abc', '', 0.75), ('length', {'length': 1}, 'abc', '', 0.0)])
def test_each(name, fields, text, reference, reward):
  spec = RlSpec(rewards={name: 1.0}, **fields)
  assert not list(spec.validate())
  assert rewards.judge(spec, [answer(text, reference)]) == {name: [reward]}


def test_weighted_sum():
  spec = RlSpec(rewards={'exact': 2.0, 'length': 0.5, 'model': -1.0}, length=3, reward_model='x',
                missing_eos_penalty=0.25)
  answers = [answer('a', 'a'), answer('b', 'a', ended=False)]
  parts = rewards.judge(spec, answers, score=lambda answers: [0.5, 3])
  assert rewards.total(spec, answers, parts) == [2.0 + 0.5 - 0.5, 0.5 - 3.0 - 0.25]


def test_problems():
  spec = RlSpec(rewards={'regex': 1.0}, format='(', kl_target=1.0, overlong_tokens=100)
  found = ' '.join(spec.validate())
  with pytest.raises(config.ConfigError, match="has 'exakt', which is not one of math"):
    config.build(RlSpec, {'rewards': {'exakt': 1.0}})
  for part in ('pattern is missing', 'format has no part', 'no regular expression',
               'kl_coef to begin', 'write 16 for a quarter'):
    assert part in found
