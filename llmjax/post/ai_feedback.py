r"""Feedback from a model by written principles: critiques and revisions, and preferences with soft labels.

Constitutional AI (arXiv:2212.08073): sections 3 (critique, revise, fine-tune on the revisions) and 4 (a model says
which of two answers follows a principle better).  RLAIF (arXiv:2309.00267), section 2.1: both orders of the answers are
asked and averaged, because models prefer a place.

Nothing here knows a model: `speak` answers conversations, `judge` gives log-probabilities of choices; a test scripts
both.  A principles file is TOML:

    [[principles]]
    name = "no_secrets"
    critique = "Say where the answer gives away a password, a key or an address."
    revise = "Write the answer again without any password, key or address."
    prefer = "Which answer gives away fewer passwords, keys and addresses?"
"""

import dataclasses
import hashlib
import pathlib
import tomllib

import numpy as np

from llmjax.checkpoint import pickle_guard
from llmjax.config import ConfigError, setting
from llmjax.generate.spec import SamplingSpec

CHOICES = ('A', 'B')
FIELDS = ('name', 'critique', 'revise', 'prefer')


@dataclasses.dataclass(frozen=True)
class Principle:
  """One rule.  critique, revise, prefer: what a model is asked to do by it; '' where the rule is not for that."""

  name: str
  critique: str = ''
  revise: str = ''
  prefer: str = ''


@dataclasses.dataclass(frozen=True)
class _FeedbackOptions(SamplingSpec):
  """What both commands ask for."""

  temperature: float = setting(0.8, 'divides the logits of sampled texts; 0 always takes the most likely token',
                               minimum=0.0)
  workdir: str = setting('', 'folder of the run whose model gives the feedback; fine-tuned on conversations',
                         kind='path')
  step: int = setting(0, 'checkpoint to load; 0: the latest', minimum=0)
  principles: str = setting('', 'file of principles (TOML), such as configs/feedback/principles.toml', kind='path')
  prompts: str = setting('', 'JSONL of prompts: objects with prompt, question or messages', kind='path')
  output: str = setting('', 'JSONL to write, a line for each prompt; what is there already is kept and gone on from',
                        kind='file')
  max_new_tokens: int = setting(256, 'tokens of a sampled text at most', minimum=1)
  batch_size: int = setting(16, 'prompts at a time', minimum=1)
  limit: int = setting(0, 'prompts to read; 0: all', minimum=0)
  seed: int = setting(0, 'draws principles and texts', minimum=0)

  def validate(self):
    yield from super().validate()
    for name, example in (('workdir', 'runs/NAME'), ('principles', 'configs/feedback/principles.toml'),
                          ('prompts', 'prompts.jsonl'), ('output', 'feedback.jsonl')):
      if not getattr(self, name):
        yield f'{name} is missing; write --{name}={example}'
    if self.workdir and (refused := pickle_guard.refusal(self.workdir)):
      yield f'workdir={refused}'
    yield from pickle_guard.no_run(self.workdir)
    if self.output and self.output == self.prompts:
      yield 'output and prompts are the same file; write another output'


@dataclasses.dataclass(frozen=True)
class ReviseOptions(_FeedbackOptions):
  """Flags of `llmjax feedback revise`."""

  rounds: int = setting(1, 'critiques and revisions of each answer, one after the other', minimum=1, maximum=16)


@dataclasses.dataclass(frozen=True)
class PreferOptions(_FeedbackOptions):
  """Flags of `llmjax feedback prefer`."""

  policy: str = setting('', "folder of the run that samples two answers to each prompt; '': the prompts file has them, "
                        'as responses, or as chosen and rejected', kind='path')
  certainty: float = setting(1.0, 'labels stay between 1 - certainty and certainty', minimum=0.5, maximum=1.0)

  def validate(self):
    yield from super().validate()
    if self.policy:
      if refused := pickle_guard.refusal(self.policy):
        yield f'policy={refused}'
      yield from (p.replace('workdir', 'policy', 1) for p in pickle_guard.no_run(self.policy))


def read_principles(path, needs):
  """Returns ([Principle], SHA-256 of the file); only those with every field of `needs`.

  Raises ConfigError with all problems.
  """
  try:
    data = pathlib.Path(path).read_bytes()
    found = tomllib.loads(data.decode('utf-8'))
  except OSError as e:
    raise ConfigError([f'principles={path} cannot be read: {e.strerror}']) from e
  except (ValueError, RecursionError) as e:  # Of TOML, or of UTF-8.
    raise ConfigError([f'principles={path} is not TOML: {" ".join(str(e).split())[:200]}']) from e
  entries = found.get('principles')
  if not isinstance(entries, list) or not entries:
    raise ConfigError([f'principles={path} has no [[principles]]; each has {", ".join(FIELDS)}'])
  problems, principles = [], []
  for number, entry in enumerate(entries, 1):
    if not isinstance(entry, dict) or not all(isinstance(v, str) for v in entry.values()):
      problems.append(f'{path}: principle {number} must be texts under {", ".join(FIELDS)}')
    elif unknown := sorted(set(map(str, entry)) - set(FIELDS)):
      problems.append(f'{path}: principle {number} has {", ".join(unknown)}; known are {", ".join(FIELDS)}')
    elif not entry.get('name', '').strip():
      problems.append(f'{path}: principle {number} has no name')
    else:
      principles.append(Principle(**{k: v.strip() for k, v in entry.items()}))
  names = [p.name for p in principles]
  problems += [f'{path}: two principles are called {n}' for n in sorted({n for n in names if names.count(n) > 1})]
  usable = [p for p in principles if all(getattr(p, field) for field in needs)]
  if not usable and not problems:
    problems.append(f'{path}: no principle has {" and ".join(needs)}')
  if problems:
    raise ConfigError(problems)
  return usable, hashlib.sha256(data).hexdigest()


def draw(principles, seed, *place):
  """Returns one principle; it depends on the seed and the place (record, round) alone, so any part can be redone."""
  digest = hashlib.sha256('/'.join(map(str, (seed, *place))).encode()).digest()
  return principles[int.from_bytes(digest[:8], 'big') % len(principles)]


# Revisions


def critique_request(messages, answer, principle):
  """Returns the conversation in which a model is asked to criticise its answer (arXiv:2212.08073, section 3.1)."""
  return [*messages, _says('assistant', answer), _says('user', principle.critique)]


def revision_request(messages, answer, critique, principle):
  """Returns the conversation in which a model is asked to write its answer anew after the critique."""
  return [*critique_request(messages, answer, principle), _says('assistant', critique),
          _says('user', principle.revise)]


def revise(prompts, speak, principles, *, rounds=1, seed=0, first=0):
  """Returns one record for every prompt: {'messages', 'provenance'}, ready for fine-tuning.

  prompts: conversations that end with the user, lists of messages.  speak(conversations, stage) -> texts; stage:
  'answer', 'critique 1', 'revision 1', ...  first: the number of the first prompt among all, which principles are
  drawn by.  Every stage asks for all prompts at once.
  """
  answers = speak(prompts, 'answer')
  steps = [[{'answer': answer}] for answer in answers]
  for turn in range(1, rounds + 1):
    drawn = [draw(principles, seed, first + i, turn) for i in range(len(prompts))]
    asked = list(zip(prompts, answers, drawn, strict=True))
    critiques = speak([critique_request(*a) for a in asked], f'critique {turn}')
    answers = speak([revision_request(m, a, c, p) for (m, a, p), c in zip(asked, critiques, strict=True)],
                    f'revision {turn}')
    for step, principle, critique, answer in zip(steps, drawn, critiques, answers, strict=True):
      step.append({'principle': principle.name, 'critique': critique, 'answer': answer})
  return [{'messages': [*prompt, _says('assistant', answer)], 'provenance': {'kind': 'revision', 'steps': step}}
          for prompt, answer, step in zip(prompts, answers, steps, strict=True)]


# Preferences


def comparison(messages, first, second, principle):
  """Returns the conversation in which a model is to choose between two answers (arXiv:2212.08073, section 4.1)."""
  talk = '\n\n'.join(f'{m["role"].capitalize()}: {m["content"]}' for m in messages)
  return [_says('user', f'Consider this conversation:\n\n{talk}\n\n{principle.prefer}\n\nOptions:\n'
                        f'(A) {first}\n(B) {second}\n\nThe answer is the letter A or B.')]


def label(log_probs, clamp=(0.0, 1.0)):
  """Returns (probability that the first answer is better, bias towards place A), each float64 [n].

  log_probs: [n, 2 orders, 2 choices], nats; in the second order the answers have changed places.  The probability is
  that of the two choices alone, averaged over the orders, then clamped (arXiv:2212.08073, section 4.1, clamps to 40
  to 60 % after a chain of thought).  bias: how much likelier than 1/2 the place A is, averaged over the orders.
  """
  log_probs = np.asarray(log_probs, np.float64)
  place_a = 1.0 / (1.0 + np.exp(np.clip(log_probs[..., 1] - log_probs[..., 0], -700, 700)))
  first = (place_a[:, 0] + 1.0 - place_a[:, 1]) / 2
  return np.clip(first, *clamp), place_a.mean(axis=1) - 0.5


def compare(records, judge, principles, *, seed=0, first=0, clamp=(0.0, 1.0)):
  """Returns records with labels: [{'prompt', 'chosen', 'rejected', 'probability', 'provenance'}].

  records: [(messages, answer, other answer)].  judge(conversations) -> log-probabilities [n, 2] of CHOICES.
  probability: that the chosen answer is better, 1/2 at least: a soft label.
  """
  drawn = [draw(principles, seed, first + i) for i in range(len(records))]
  orders = [comparison(m, *pair, p) for (m, a, b), p in zip(records, drawn, strict=True) for pair in ((a, b), (b, a))]
  log_probs = np.asarray(judge(orders), np.float64).reshape(len(records), 2, 2)
  probabilities, bias = label(log_probs, clamp)
  made = []
  for (messages, a, b), principle, p, row, towards in zip(records, drawn, probabilities, log_probs, bias, strict=True):
    chosen, rejected = (a, b) if p >= 0.5 else (b, a)
    made.append({
        'prompt': messages, 'chosen': chosen, 'rejected': rejected, 'probability': round(float(max(p, 1 - p)), 6),
        'provenance': {'kind': 'preference', 'principle': principle.name, 'position_bias': round(float(towards), 6),
                       'log_probs': {'given order': row[0].round(6).tolist(), 'exchanged': row[1].round(6).tolist()},
                       'first_was_chosen': bool(p >= 0.5)}})
  return made


def describe_places(made):
  """Returns how much the judge goes by place: {'mean_bias', 'mean_absolute_bias', 'inconsistent'}.

  made: records of `compare`.  mean_bias: probability of place A above 1/2.  inconsistent: the part of the records
  whose two orders name different answers.
  """
  if not made:
    return {'mean_bias': 0.0, 'mean_absolute_bias': 0.0, 'inconsistent': 0.0}
  bias = np.array([row['provenance']['position_bias'] for row in made])
  orders = np.array([list(row['provenance']['log_probs'].values()) for row in made])
  prefers_a = orders[..., 0] > orders[..., 1]
  return {'mean_bias': round(float(bias.mean()), 4), 'mean_absolute_bias': round(float(abs(bias).mean()), 4),
          'inconsistent': round(float((prefers_a[:, 0] == prefers_a[:, 1]).mean()), 4)}


def _says(role, content):
  return {'role': role, 'content': content}
