"""What an answer is worth: verifiable rewards, of length and format, and of a reward model, as a weighted sum.

A reward sees text and never runs it.
"""

import dataclasses
import doctest
import re

from llmjax.post import maths
from llmjax.post.maths import final_number

__all__ = ['TABLE', 'Answer', 'final_number', 'judge', 'total']
_OUTPUT = doctest.OutputChecker()


@dataclasses.dataclass(frozen=True)
class Answer:
  """One sampled answer.  reference: the right one.  tokens: how many, the end included.  ended: has an end.

  ids: of prompt and answer together, for a reward model.
  """

  prompt: str
  text: str
  reference: str
  tokens: int
  ended: bool
  ids: tuple = ()


def _maths(answer, spec):
  """1 where the final answers are equal in value."""
  return float(maths.equal(answer.text, answer.reference))


def _exact(answer, spec):
  """1 where the texts are the same but for white space and case."""
  plain = lambda text: ' '.join(text.split()).casefold()
  return float(plain(answer.text) == plain(answer.reference))


def _doctest(answer, spec):
  """1 where the text is the expected output as doctest compares it: white space alike, `...` stands for anything."""
  flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
  return float(_OUTPUT.check_output(answer.reference.strip() + '\n', answer.text.strip() + '\n', flags))


def _regex(answer, spec):
  """1 where spec.pattern is found."""
  pattern = spec.pattern.replace('{answer}', re.escape(answer.reference))
  return float(re.search(pattern, answer.text, re.DOTALL) is not None)


def _format(answer, spec):
  """1 where the whole text matches spec.format."""
  return float(re.fullmatch(spec.format, answer.text, re.DOTALL) is not None)


def _length(answer, spec):
  """1 at spec.length tokens, 0 at none and from twice as many on, straight in between."""
  return max(0.0, 1.0 - abs(answer.tokens - spec.length) / spec.length)


TABLE = {'math': _maths, 'exact': _exact, 'doctest': _doctest, 'regex': _regex, 'format': _format,
         'length': _length}


def judge(spec, answers, score=None):
  """Returns {name: [reward of each answer]}, unweighted.  spec: RlSpec.

  score: function of the answers to the numbers of a reward model, for the reward `model`.
  """
  found = {}
  for name in spec.rewards:
    if name == 'model':
      found[name] = [float(x) for x in score(answers)]
    else:
      found[name] = [TABLE[name](answer, spec) for answer in answers]
  return found


def total(spec, answers, parts):
  """Returns the reward of each answer: the weighted sum, less what is taken for a missing end."""
  sums = [sum(weight * parts[name][i] for name, weight in spec.rewards.items()) for i in range(len(answers))]
  return [s - spec.missing_eos_penalty * (not a.ended) for s, a in zip(sums, answers, strict=True)]
