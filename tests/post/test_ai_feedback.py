"""AI feedback with scripted models: prompts, soft labels, position bias, principles files."""

import json
import math

import numpy as np
import pytest

from llmjax.config import ConfigError
from llmjax.post import ai_feedback
from llmjax.post.ai_feedback import Principle

RULES = [Principle('short', 'Too long?', 'Make it shorter.', 'Which is shorter?'),
         Principle('no_x', 'Any x?', 'Leave every x out.', 'Which has fewer x?')]


def user(text):
  return [{'role': 'user', 'content': text}]


def options_of(conversation):
  """Return the two completions of a comparison prompt."""
  text = conversation[0]['content'].split('Options:\n(A) ')[1].removesuffix('\n\nThe answer is the letter A or B.')
  return text.split('\n(B) ')


def score_by(score, bias=0.0):
  """Return a model whose log-odds are the difference of the completions' scores plus a bias towards A."""
  def score_choices(conversations):
    rows = []
    for conversation in conversations:
      a, b = options_of(conversation)
      odds = score(a) - score(b) + bias
      # The other tokens take most of the probability.
      rows.append([-math.log1p(math.exp(-odds)) - 7, -math.log1p(math.exp(odds)) - 7])
    return rows
  return score_choices


def test_soft_labels_are_averaged_over_both_orders():
  log_probs = np.log([[[0.03, 0.01], [0.002, 0.006]], [[0.2, 0.2], [0.9, 0.1]]])
  first, bias = ai_feedback.soft_labels(log_probs)
  np.testing.assert_allclose(first, [(0.75 + 0.75) / 2, (0.5 + 0.1) / 2], rtol=1e-12)
  np.testing.assert_allclose(bias, [(0.75 + 0.25) / 2 - 0.5, (0.5 + 0.9) / 2 - 0.5], atol=1e-12)
  np.testing.assert_allclose(ai_feedback.soft_labels(log_probs, (0.4, 0.6))[0], [0.6, 0.4])
  np.testing.assert_array_equal(ai_feedback.soft_labels([[[-1e4, 0.0], [0.0, -1e4]]])[0], [0.0])


@pytest.mark.parametrize('bias', [0.0, 2.0, -5.0])
def test_preferences_do_not_depend_on_the_order_of_completions(bias):
  completions = [('x', 'xxxx'), ('aaa', 'bx'), ('', 'xx')]
  score_choices = score_by(lambda text: -text.count('x'), bias)
  given = ai_feedback.compare([(user('?'), a, b) for a, b in completions], score_choices, RULES[1:])
  exchanged = ai_feedback.compare([(user('?'), b, a) for a, b in completions], score_choices, RULES[1:])
  for one, other in zip(given, exchanged, strict=True):
    assert one['chosen'].count('x') < one['rejected'].count('x')
    assert (one['chosen'], one['rejected']) == (other['chosen'], other['rejected'])
    assert one['probability'] == pytest.approx(other['probability'], abs=1e-6) and one['probability'] > 0.5
    assert one['provenance']['first_was_chosen'] != other['provenance']['first_was_chosen']
  summary = ai_feedback.position_bias(given)
  assert np.sign(summary['mean_bias']) == np.sign(bias)
  assert (summary['inconsistent'] == 1.0) == (bias == -5.0)
  json.dumps(given)


def test_position_bias_alone_gives_no_preference():
  records = ai_feedback.compare([(user('?'), 'a', 'b')] * 3, score_by(lambda text: 0.0, 3.0), RULES)
  assert [row['probability'] for row in records] == [0.5] * 3
  summary = ai_feedback.position_bias(records)
  assert summary == {'mean_bias': pytest.approx(1 / (1 + math.exp(-3)) - 0.5, abs=1e-4),
                   'mean_absolute_bias': summary['mean_bias'], 'inconsistent': 1.0}


def test_revisions_alternate_critique_and_revision():
  calls = []

  def generate(conversations, stage):
    calls.append((stage, conversations))
    if 'critique' in stage:
      return [f'{c[-2]["content"].count("x")} of them' for c in conversations]
    return [c[0]['content'] if stage == 'answer' else c[-4]['content'].replace('x', '', 1) for c in conversations]

  records = ai_feedback.revise([user('xaxx'), user('bx')], generate, RULES[1:], rounds=2)
  assert [row['messages'] for row in records] == [
      [*user('xaxx'), {'role': 'assistant', 'content': 'ax'}], [*user('bx'), {'role': 'assistant', 'content': 'b'}]]
  assert [stage for stage, _ in calls] == ['answer', 'critique 1', 'revision 1', 'critique 2', 'revision 2']
  assert [m['content'] for m in calls[2][1][0]] == ['xaxx', 'xaxx', 'Any x?', '3 of them', 'Leave every x out.']
  assert [m['role'] for m in calls[4][1][1]] == ['user', 'assistant', 'user', 'assistant', 'user']
  steps = records[0]['provenance']['steps']
  assert [step['answer'] for step in steps] == ['xaxx', 'axx', 'ax']
  assert steps[1] == {'principle': 'no_x', 'critique': '3 of them', 'answer': 'axx'}


def test_principles_depend_on_the_seed_and_the_position():
  drawn = [ai_feedback.draw_principle(RULES, 0, i).name for i in range(200)]
  assert drawn == [ai_feedback.draw_principle(RULES, 0, i).name for i in range(200)] and 60 < drawn.count('short') < 140
  generate = lambda conversations, stage: ['t'] * len(conversations)
  names = lambda records: [row['provenance']['steps'][1]['principle'] for row in records]
  prompts = [user(str(i)) for i in range(20)]
  whole = names(ai_feedback.revise(prompts, generate, RULES, seed=3))
  assert whole == names(ai_feedback.revise(prompts[:7], generate, RULES, seed=3)) + names(
      ai_feedback.revise(prompts[7:], generate, RULES, seed=3, first=7))
  assert set(whole) == {'short', 'no_x'}


@pytest.mark.parametrize('text, problem', [
    ('principles = [', 'is not TOML'), ('x = 1', r'has no \[\[principles\]\]'),
    ('[[principles]]\nname = 3', 'must be texts'),
    ('[[principles]]\nname = "a"\nprefers = "b"', 'has prefers; known are name, critique'),
    ('[[principles]]\nprefer = "b"', 'has no name'),
    ('[[principles]]\nname = "a"', 'no principle has critique and revise'),
    ('[[principles]]\nname = "a"\n[[principles]]\nname = "a"', 'two principles are called a')])
def test_invalid_principles(tmp_path, text, problem):
  (tmp_path / 'p.toml').write_text(text)
  with pytest.raises(ConfigError, match=problem):
    ai_feedback.read_principles(tmp_path / 'p.toml', ('critique', 'revise'))


def test_shipped_principles():
  import pathlib
  file = pathlib.Path(__file__).parents[2] / 'configs/feedback/principles.toml'
  for required in (('critique', 'revise'), ('prefer',)):
    principles, digest = ai_feedback.read_principles(file, required)
    assert len(principles) >= 3 and len(digest) == 64
