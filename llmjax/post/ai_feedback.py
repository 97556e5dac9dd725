r"""AI feedback by written principles: critiques and revisions, and preferences with soft labels.

Constitutional AI (arXiv:2212.08073), sections 3 (critique, revise, fine-tune on the revisions) and 4 (a model chooses
between two completions by a principle).  RLAIF (arXiv:2309.00267), section 2.1: the choice is averaged over both orders
of the completions, because models have a position bias.

The functions take a model as callables, `generate` and `score_choices`.  A principles file is TOML:

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
  """One rule.  critique, revise, prefer: its instruction for each task, or ''."""

  name: str
  critique: str = ''
  revise: str = ''
  prefer: str = ''


@dataclasses.dataclass(frozen=True)
class _FeedbackOptions(SamplingSpec):
  """Flags of both feedback commands."""

  temperature: float = setting(0.8, 'sampling temperature of completions; 0: greedy', minimum=0.0)
  workdir: str = setting('', 'run folder of the chat model that gives the feedback', kind='path')
  step: int = setting(0, 'checkpoint step to load; 0: the latest', minimum=0)
  principles: str = setting('', 'TOML file of principles, such as configs/feedback/principles.toml', kind='path')
  prompts: str = setting('', 'JSONL file of prompts: objects with prompt, question or messages', kind='path')
  output: str = setting('', 'JSONL file to write, one record per prompt; an interrupted command resumes after its last '
                        'record', kind='file')
  max_new_tokens: int = setting(256, 'maximum number of tokens of a completion', minimum=1)
  batch_size: int = setting(16, 'prompts per batch', minimum=1)
  limit: int = setting(0, 'maximum number of prompts; 0: all', minimum=0)
  seed: int = setting(0, 'random seed of sampling and of the choice of principles', minimum=0)

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

  rounds: int = setting(1, 'rounds of critique and revision per completion', minimum=1, maximum=16)


@dataclasses.dataclass(frozen=True)
class PreferOptions(_FeedbackOptions):
  """Flags of `llmjax feedback prefer`."""

  policy: str = setting('', 'run folder of the model that samples two completions per prompt; empty: the prompts file '
                        'has them, as responses, or as chosen and rejected', kind='path')
  certainty: float = setting(1.0, 'clip the soft labels to [1 - certainty, certainty]', minimum=0.5, maximum=1.0)

  def validate(self):
    yield from super().validate()
    if self.policy:
      if refused := pickle_guard.refusal(self.policy):
        yield f'policy={refused}'
      yield from (p.replace('workdir', 'policy', 1) for p in pickle_guard.no_run(self.policy))


def read_principles(path, required):
  """Read a principles file; returns ([Principle], SHA-256 of the file), only those with every field of `required`.

  Raises ConfigError with all problems.
  """
  try:
    data = pathlib.Path(path).read_bytes()
    table = tomllib.loads(data.decode('utf-8'))
  except OSError as e:
    raise ConfigError([f'principles={path} cannot be read: {e.strerror}']) from e
  except (ValueError, RecursionError) as e:  # Invalid TOML or UTF-8.
    raise ConfigError([f'principles={path} is not TOML: {" ".join(str(e).split())[:200]}']) from e
  entries = table.get('principles')
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
  usable = [p for p in principles if all(getattr(p, field) for field in required)]
  if not usable and not problems:
    problems.append(f'{path}: no principle has {" and ".join(required)}')
  if problems:
    raise ConfigError(problems)
  return usable, hashlib.sha256(data).hexdigest()


def draw_principle(principles, seed, *position):
  """Draw a principle by a hash of the seed and the position (record, round), so that any part can be recomputed."""
  digest = hashlib.sha256('/'.join(map(str, (seed, *position))).encode()).digest()
  return principles[int.from_bytes(digest[:8], 'big') % len(principles)]


# Revisions


def critique_prompt(messages, completion, principle):
  """Return the conversation that asks the model to criticize its completion (arXiv:2212.08073, section 3.1)."""
  return [*messages, _message('assistant', completion), _message('user', principle.critique)]


def revision_prompt(messages, completion, critique, principle):
  """Return the conversation that asks the model to revise its completion after the critique."""
  return [*critique_prompt(messages, completion, principle), _message('assistant', critique),
          _message('user', principle.revise)]


def revise(prompts, generate, principles, *, rounds=1, seed=0, first=0):
  """Generate revised completions; returns one record per prompt, {'messages', 'provenance'}, for fine-tuning.

  prompts: conversations that end with a user message.  generate(conversations, stage) -> texts, stage in 'answer',
  'critique 1', 'revision 1', ...  first: index of the first prompt in the file, which the principles depend on.
  """
  completions = generate(prompts, 'answer')
  steps = [[{'answer': completion}] for completion in completions]
  for turn in range(1, rounds + 1):
    drawn = [draw_principle(principles, seed, first + i, turn) for i in range(len(prompts))]
    critiques = generate([*map(critique_prompt, prompts, completions, drawn)], f'critique {turn}')
    completions = generate([*map(revision_prompt, prompts, completions, critiques, drawn)], f'revision {turn}')
    for record, principle, critique, completion in zip(steps, drawn, critiques, completions, strict=True):
      record.append({'principle': principle.name, 'critique': critique, 'answer': completion})
  return [{'messages': [*prompt, _message('assistant', completion)],
           'provenance': {'kind': 'revision', 'steps': record}}
          for prompt, completion, record in zip(prompts, completions, steps, strict=True)]


# Preferences


def comparison_prompt(messages, first, second, principle):
  """Return the conversation that asks the model to choose between two completions (arXiv:2212.08073, section 4.1)."""
  dialogue = '\n\n'.join(f'{m["role"].capitalize()}: {m["content"]}' for m in messages)
  return [_message('user', f'Consider this conversation:\n\n{dialogue}\n\n{principle.prefer}\n\nOptions:\n'
                           f'(A) {first}\n(B) {second}\n\nThe answer is the letter A or B.')]


def soft_labels(logprobs, clip=(0.0, 1.0)):
  """Return (probability that the first completion is better, position bias towards A), each float64 [n].

  logprobs: [n, 2 orders, 2 choices], nats; the second order exchanges the completions.  The probability is normalized
  over the two choices, averaged over the orders, then clipped (arXiv:2212.08073, section 4.1, clips to 40 to 60 % after
  a chain of thought).  The bias is P(A) - 1/2, averaged over the orders.
  """
  logprobs = np.asarray(logprobs, np.float64)
  prob_a = 1.0 / (1.0 + np.exp(np.clip(logprobs[..., 1] - logprobs[..., 0], -700, 700)))
  first = (prob_a[:, 0] + 1.0 - prob_a[:, 1]) / 2
  return np.clip(first, *clip), prob_a.mean(axis=1) - 0.5


def compare(pairs, score_choices, principles, *, seed=0, first=0, clip=(0.0, 1.0)):
  """Label pairs of completions: [{'prompt', 'chosen', 'rejected', 'probability', 'provenance'}].

  pairs: [(messages, completion, other completion)].  score_choices(conversations) -> log-probabilities [n, 2] of
  CHOICES.  probability: soft label, the probability that the chosen completion is better, at least 1/2.
  """
  drawn = [draw_principle(principles, seed, first + i) for i in range(len(pairs))]
  conversations = [comparison_prompt(messages, *order, principle)
                   for (messages, a, b), principle in zip(pairs, drawn, strict=True) for order in ((a, b), (b, a))]
  logprobs = np.asarray(score_choices(conversations), np.float64).reshape(len(pairs), 2, 2)
  probabilities, biases = soft_labels(logprobs, clip)
  records = []
  for (messages, a, b), principle, p, bias, orders in zip(pairs, drawn, probabilities, biases, logprobs, strict=True):
    chosen, rejected = (a, b) if p >= 0.5 else (b, a)
    records.append({
        'prompt': messages, 'chosen': chosen, 'rejected': rejected, 'probability': round(float(max(p, 1 - p)), 6),
        'provenance': {'kind': 'preference', 'principle': principle.name, 'position_bias': round(float(bias), 6),
                       'log_probs': {'given order': orders[0].round(6).tolist(),
                                     'exchanged': orders[1].round(6).tolist()},
                       'first_was_chosen': bool(p >= 0.5)}})
  return records


def position_bias(records):
  """Summarize the position bias of `compare` records: {'mean_bias', 'mean_absolute_bias', 'inconsistent'}.

  mean_bias: mean of P(A) - 1/2.  inconsistent: share of the records in which the two orders choose different
  completions.
  """
  if not records:
    return {'mean_bias': 0.0, 'mean_absolute_bias': 0.0, 'inconsistent': 0.0}
  bias = np.array([record['provenance']['position_bias'] for record in records])
  logprobs = np.array([list(record['provenance']['log_probs'].values()) for record in records])
  prefers_a = logprobs[..., 0] > logprobs[..., 1]
  return {'mean_bias': round(float(bias.mean()), 4), 'mean_absolute_bias': round(float(abs(bias).mean()), 4),
          'inconsistent': round(float((prefers_a[:, 0] == prefers_a[:, 1]).mean()), 4)}


def _message(role, content):
  return {'role': role, 'content': content}
