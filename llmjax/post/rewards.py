"""Rewards of completions: verifiable ones, of length and format, of a reward model, and of the user's own functions.

A reward reads text and never executes it.
"""

import dataclasses
import doctest
import re
from typing import NamedTuple

import numpy as np

from llmjax import extensions
from llmjax.config import ConfigError, one_line, shown
from llmjax.parallel import distributed
from llmjax.post.advantages import overlong_penalty
from llmjax.post.math_reward import same_answer

_OUTPUT = doctest.OutputChecker()


@dataclasses.dataclass(frozen=True)
class Completion:
  """A sampled completion.  answer: the gold answer.  num_tokens: with the end token.  ended: whether it has one.

  ids: of prompt and completion, for a reward model.  columns: other fields of the prompt's record.
  """

  prompt: str
  text: str
  answer: str
  num_tokens: int
  ended: bool
  ids: tuple = ()
  columns: dict = dataclasses.field(default_factory=dict)


def _math(completion, spec):
  """1 where the final answer equals the gold answer in value."""
  return float(same_answer(completion.text, completion.answer))


def _exact(completion, spec):
  """1 where the text equals the gold answer up to white space and case."""
  plain = lambda text: ' '.join(text.split()).casefold()
  return float(plain(completion.text) == plain(completion.answer))


def _doctest(completion, spec):
  """1 where the text is the expected output by doctest's rules: white space is normalized, `...` matches anything."""
  flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
  return float(_OUTPUT.check_output(completion.answer.strip() + '\n', completion.text.strip() + '\n', flags))


def _regex(completion, spec):
  """1 where spec.pattern matches somewhere in the text."""
  pattern = spec.pattern.replace('{answer}', re.escape(completion.answer))
  return float(re.search(pattern, completion.text, re.DOTALL) is not None)


def _format(completion, spec):
  """1 where spec.format matches the whole text."""
  return float(re.fullmatch(spec.format, completion.text, re.DOTALL) is not None)


def _length(completion, spec):
  """1 at spec.length tokens, falling linearly to 0 at no tokens and at twice as many."""
  return max(0.0, 1.0 - abs(completion.num_tokens - spec.length) / spec.length)


REWARDS = {'math': _math, 'exact': _exact, 'doctest': _doctest, 'regex': _regex, 'format': _format, 'length': _length}


class Rewards(NamedTuple):
  """by_name: {name: unweighted rewards}.  raw: their weighted sum less missing_eos_penalty.  total: with the overlong
  penalty.  float64 [N]."""

  by_name: dict
  raw: np.ndarray
  total: np.ndarray


def compute_rewards(spec, completions, score=None):
  """Compute the Rewards of an RlSpec.

  score: function of completions to the scores of the reward model, for the reward `model`.  Raises ConfigError where a
  function of the user's fails or returns something else than a list of numbers.
  """
  by_name = {}
  for name in spec.rewards:
    if name in REWARDS:
      by_name[name] = [REWARDS[name](completion, spec) for completion in completions]
    else:
      by_name[name] = [float(x) for x in (
          score(completions) if name == 'model' else _call_custom(name, completions))]
  raw = np.asarray([sum(weight * by_name[name][i] for name, weight in spec.rewards.items())
                    - spec.missing_eos_penalty * (not completion.ended) for i, completion in enumerate(completions)])
  total = raw
  if spec.overlong_tokens:
    lengths = [completion.num_tokens for completion in completions]
    total = raw + np.asarray(overlong_penalty(lengths, spec.max_new_tokens, spec.overlong_tokens), np.float64)
  return Rewards(by_name, raw, total)


def _call_custom(path, completions):
  """Call a reward function `module:name` with lists as keyword arguments; returns its numbers.

  Only the first process calls it and the others receive its numbers, so that it need not be deterministic.
  """
  function = extensions.load(path, 'rl.rewards')
  rewards, problem = None, ''
  if distributed.is_first():
    names = sorted({name for completion in completions for name in completion.columns})
    columns = {name: [completion.columns.get(name) for completion in completions] for name in names}
    try:
      rewards = [float(x) for x in function(
          prompts=[c.prompt for c in completions], completions=[c.text for c in completions],
          **{'answer': [c.answer for c in completions], **columns})]
    except Exception as e:  # The user's own code may raise anything.
      problem = (f'failed with {type(e).__name__}: {one_line(e)}; write a function of prompts, completions and '
                 '**columns that returns a list of numbers')
    if not problem and (len(rewards) != len(completions) or not np.all(np.isfinite(rewards))):
      problem = f'must return {len(completions)} finite numbers, one per completion; it returned {shown(rewards)}'
  rewards, problem = distributed.gather((rewards, problem), f'computed {path}')[0]
  if problem:
    raise ConfigError([f'rl.rewards={path} {problem}'])
  return rewards
