"""Feedback by principles with scripted models: what is asked, labels, places; and a real run's model."""

import json
import math

import numpy as np
import pytest

from llmjax.config import ConfigError
from llmjax.post import ai_feedback
from llmjax.post.ai_feedback import Principle

RULES = [Principle('short', 'Too long?', 'Make it shorter.', 'Which is shorter?'),
         Principle('no_x', 'Any x?', 'Leave every x out.', 'Which has fewer x?')]


def ask(text):
  return [{'role': 'user', 'content': text}]


def options_of(conversation):
  """Returns the two answers that a comparison shows."""
  text = conversation[0]['content'].split('Options:\n(A) ')[1].removesuffix('\n\nThe answer is the letter A or B.')
  return text.split('\n(B) ')


def judge_by(score, towards_a=0.0):
  """A judge whose log-odds are the difference of the answers' scores, and which likes place A."""
  def judge(conversations):
    rows = []
    for conversation in conversations:
      a, b = options_of(conversation)
      odds = score(a) - score(b) + towards_a
      rows.append([-math.log1p(math.exp(-odds)) - 7, -math.log1p(math.exp(odds)) - 7])  # A and B are rarely said.
    return rows
  return judge


def test_labels_are_the_normalised_probabilities_averaged_over_both_orders():
  log_probs = np.log([[[0.03, 0.01], [0.002, 0.006]], [[0.2, 0.2], [0.9, 0.1]]])
  first, bias = ai_feedback.label(log_probs)
  np.testing.assert_allclose(first, [(0.75 + 0.75) / 2, (0.5 + 0.1) / 2], rtol=1e-12)
  np.testing.assert_allclose(bias, [(0.75 + 0.25) / 2 - 0.5, (0.5 + 0.9) / 2 - 0.5], atol=1e-12)
  np.testing.assert_allclose(ai_feedback.label(log_probs, (0.4, 0.6))[0], [0.6, 0.4])
  np.testing.assert_array_equal(ai_feedback.label([[[-1e4, 0.0], [0.0, -1e4]]])[0], [0.0])


@pytest.mark.parametrize('towards_a', [0.0, 2.0, -5.0])
def test_a_preference_does_not_depend_on_the_order_that_answers_come_in(towards_a):
  answers = [('x', 'xxxx'), ('aaa', 'bx'), ('', 'xx')]
  judge = judge_by(lambda text: -text.count('x'), towards_a)
  given = ai_feedback.compare([(ask('?'), a, b) for a, b in answers], judge, RULES[1:])
  exchanged = ai_feedback.compare([(ask('?'), b, a) for a, b in answers], judge, RULES[1:])
  for one, other in zip(given, exchanged, strict=True):
    assert one['chosen'].count('x') < one['rejected'].count('x')
    assert (one['chosen'], one['rejected']) == (other['chosen'], other['rejected'])
    assert one['probability'] == pytest.approx(other['probability'], abs=1e-6) and one['probability'] > 0.5
    assert one['provenance']['first_was_chosen'] != other['provenance']['first_was_chosen']
  places = ai_feedback.describe_places(given)
  assert np.sign(places['mean_bias']) == np.sign(towards_a)
  assert (places['inconsistent'] == 1.0) == (towards_a == -5.0)
  json.dumps(given)


def test_a_judge_that_goes_by_place_alone_has_no_preference():
  made = ai_feedback.compare([(ask('?'), 'a', 'b')] * 3, judge_by(lambda text: 0.0, 3.0), RULES)
  assert [row['probability'] for row in made] == [0.5] * 3
  found = ai_feedback.describe_places(made)
  assert found == {'mean_bias': pytest.approx(1 / (1 + math.exp(-3)) - 0.5, abs=1e-4),
                   'mean_absolute_bias': found['mean_bias'], 'inconsistent': 1.0}


def test_a_revision_asks_for_the_critique_and_then_for_the_answer_anew():
  asked = []

  def speak(conversations, stage):
    asked.append((stage, conversations))
    if 'critique' in stage:
      return [f'{c[-2]["content"].count("x")} of them' for c in conversations]
    return [c[0]['content'] if stage == 'answer' else c[-4]['content'].replace('x', '', 1) for c in conversations]

  made = ai_feedback.revise([ask('xaxx'), ask('bx')], speak, RULES[1:], rounds=2)
  assert [row['messages'] for row in made] == [
      [*ask('xaxx'), {'role': 'assistant', 'content': 'ax'}], [*ask('bx'), {'role': 'assistant', 'content': 'b'}]]
  assert [stage for stage, _ in asked] == ['answer', 'critique 1', 'revision 1', 'critique 2', 'revision 2']
  assert [m['content'] for m in asked[2][1][0]] == ['xaxx', 'xaxx', 'Any x?', '3 of them', 'Leave every x out.']
  assert [m['role'] for m in asked[4][1][1]] == ['user', 'assistant', 'user', 'assistant', 'user']
  steps = made[0]['provenance']['steps']
  assert [step['answer'] for step in steps] == ['xaxx', 'axx', 'ax']
  assert steps[1] == {'principle': 'no_x', 'critique': '3 of them', 'answer': 'axx'}


def test_principles_are_drawn_by_the_place_alone():
  drawn = [ai_feedback.draw(RULES, 0, i).name for i in range(200)]
  assert drawn == [ai_feedback.draw(RULES, 0, i).name for i in range(200)] and 60 < drawn.count('short') < 140
  speak = lambda conversations, stage: ['t'] * len(conversations)
  names = lambda made: [row['provenance']['steps'][1]['principle'] for row in made]
  prompts = [ask(str(i)) for i in range(20)]
  whole = names(ai_feedback.revise(prompts, speak, RULES, seed=3))
  assert whole == names(ai_feedback.revise(prompts[:7], speak, RULES, seed=3)) + names(
      ai_feedback.revise(prompts[7:], speak, RULES, seed=3, first=7))
  assert set(whole) == {'short', 'no_x'}


@pytest.mark.parametrize('text, problem', [
    ('principles = [', 'is not TOML'), ('x = 1', r'has no \[\[principles\]\]'),
    ('[[principles]]\nname = 3', 'must be texts'),
    ('[[principles]]\nname = "a"\nprefers = "b"', 'has prefers; known are name, critique'),
    ('[[principles]]\nprefer = "b"', 'has no name'),
    ('[[principles]]\nname = "a"', 'no principle has critique and revise'),
    ('[[principles]]\nname = "a"\n[[principles]]\nname = "a"', 'two principles are called a')])
def test_wrong_principles(tmp_path, text, problem):
  (tmp_path / 'p.toml').write_text(text)
  with pytest.raises(ConfigError, match=problem):
    ai_feedback.read_principles(tmp_path / 'p.toml', ('critique', 'revise'))


def test_the_principles_that_are_shipped():
  import pathlib
  file = pathlib.Path(__file__).parents[2] / 'configs/feedback/principles.toml'
  for needs in (('critique', 'revise'), ('prefer',)):
    principles, digest = ai_feedback.read_principles(file, needs)
    assert len(principles) >= 3 and len(digest) == 64
