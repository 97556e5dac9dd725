"""Records of conversations: every usual form of them as one form, and that form as tokens with loss weights.

    chat     {"messages": [{"role", "content", "weight"?}, ...]}
    pairs    {"prompt": [messages], "chosen": [messages], "rejected": [messages], "margin"?, "probability"?}
    prompts  {"prompt": [messages], "answer": text}
    steps    {"prompt": [messages], "steps": [{"text", "label"}, ...]}

A prepared folder keeps that form, as JSON, in `documents/`.  Tokens: a chat is one document of the store; a pair
is two, the chosen one at an even number and the rejected one behind it; a prompt is one without a trained token; a
solution of steps is one whose weights are labels (see `steps`).
"""

import json
import pathlib

import numpy as np

from llmjax import config
from llmjax.data import splits, steps
from llmjax.text.chat import ChatFormat
from llmjax.text.templates import TemplateError

# What a pair may say of itself: how far its scores are to be apart, and how sure it is that the chosen answer is the
# better one (a soft label); the least, the most, and what is meant where nothing is said.
PAIR_NUMBERS = {'margin': (0.0, 1e6, 0.0), 'probability': (0.0, 1.0, 1.0)}
SUFFIXES = ('.jsonl', '.ndjson', '.json', '.parquet')
FORMS = {
    'chat': 'messages; conversations; prompt and completion; or instruction, input and output',
    'pairs': 'prompt (or instruction and input), chosen and rejected',
    'prompts': 'prompt (or question, messages, or instruction and input) and answer',
    'steps': steps.FORMS,
}
BAD_LINES = 20  # Shown of a file at most.
_ROLES = {'human': 'user', 'gpt': 'assistant'}  # As ShareGPT calls them.


def normaliser(kind):
  """Returns a function of a record to its text in the form above; it raises ValueError with a reason."""
  make = {'chat': _chat, 'pairs': _pair, 'prompts': _prompt, 'steps': _steps}[kind]

  def normal(record):
    if not isinstance(record, dict):
      raise ValueError('the record is no object')
    made = make({k: v for k, v in _plain(record).items() if v is not None})
    if made is None:
      raise ValueError(f'no {FORMS[kind]} (found: {", ".join(str(k)[:40] for k in list(record)[:8])})')
    try:
      return json.dumps(made, ensure_ascii=False, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as e:
      raise ValueError(f'the messages are not plain JSON: {str(e)[:100]}') from e

  return normal


def read_prompt(record):
  """Returns the messages that a record asks with, in any of its forms; raises ValueError."""
  made = None
  if isinstance(record, dict):
    made = _messages(record['messages']) if 'messages' in record else _prompt_of(record)
  if made is None:
    raise ValueError(f'no prompt: the record must be an object with {FORMS["prompts"].rsplit(" and ", 1)[0]}')
  return made


def read_answers(record):
  """Returns (messages, answer, other answer) of a record with `responses`, or with `chosen` and `rejected`."""
  prompt = read_prompt(record)
  both = record.get('responses', [record.get('chosen'), record.get('rejected')])
  if not isinstance(both, list) or len(both) != 2 or not all(isinstance(answer, str) for answer in both):
    raise ValueError('two answers must stand beside the prompt: "responses": [text, text], or chosen and rejected')
  return prompt, *both


def read_records(path, read):
  """Returns what `read` makes of each line's object in a file of --prompts; ConfigError with all bad lines."""
  made, problems = [], []
  try:
    lines = pathlib.Path(path).read_bytes().splitlines()
  except OSError as e:
    raise config.ConfigError([f'--prompts={path} cannot be read: {e.strerror}']) from e
  for number, line in enumerate(lines, 1):
    if not line.strip():
      continue
    try:
      made.append(read(json.loads(line)))
    except (ValueError, RecursionError) as e:
      problems.append(f'{path}:{number}: {config.one_line(e)}')
  if len(problems) > BAD_LINES:
    problems[BAD_LINES:] = [f'and {len(problems) - BAD_LINES} more lines of {path}']
  if not made and not problems:
    problems.append(f'--prompts={path} has no lines')
  if problems:
    raise config.ConfigError(problems)
  return made


def _plain(value):
  """Returns what TFDS and Parquet give as what JSON gives: text for bytes, lists for arrays."""
  if isinstance(value, bytes):
    return value.decode('utf-8')  # A UnicodeDecodeError is a ValueError.
  if isinstance(value, np.ndarray):
    return [_plain(v) for v in value.tolist()]
  if isinstance(value, np.generic):
    return value.item()
  if isinstance(value, dict):
    return {k: _plain(v) for k, v in value.items()}
  if isinstance(value, (list, tuple)):
    return [_plain(v) for v in value]
  return value


def _chat(record):
  for name in ('messages', 'conversations'):
    if name in record:
      return {'messages': _messages(record[name])}
  prompt = _prompt_of(record)
  for name in ('completion', 'output', 'response'):
    if prompt is not None and name in record:
      return {'messages': prompt + _messages(record[name], 'assistant')}
  return None


def _pair(record):
  if 'chosen' not in record or 'rejected' not in record:
    return None
  both = [_messages(record[name], 'assistant') for name in ('chosen', 'rejected')]
  prompt = _prompt_of(record)
  whole = isinstance(record['chosen'], list) and isinstance(record['rejected'], list)
  if prompt is None and whole:  # Two whole conversations: what they share is the prompt.
    same = 0
    while same < min(map(len, both)) and both[0][same] == both[1][same]:
      same += 1
    prompt, both = both[0][:same], [messages[same:] for messages in both]
  elif prompt is not None and whole and all(messages[:len(prompt)] == prompt for messages in both):
    both = [messages[len(prompt):] for messages in both]
  if both[0] == both[1]:
    raise ValueError('chosen and rejected are the same')
  if not prompt:
    raise ValueError('no prompt before chosen and rejected')
  if not all(any(m['role'] == 'assistant' for m in messages) for messages in both):
    raise ValueError('chosen or rejected holds no message of the assistant')
  numbers = {name: _number(record[name], name, *limits[:2]) for name, limits in PAIR_NUMBERS.items() if name in record}
  return {'prompt': prompt, 'chosen': both[0], 'rejected': both[1], **numbers}


def _number(value, name, least, most):
  if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
    raise ValueError(f'{name} must be a number from {least:g} to {most:g}, not {str(value)[:40]}')
  return value


def _prompt(record):
  prompt = _messages(record['messages']) if 'messages' in record else _prompt_of(record)
  answer = record.get('answer', record.get('output'))
  if prompt is None or answer is None:
    return None
  return {'prompt': prompt, 'answer': answer if isinstance(answer, str) else json.dumps(answer)}


def _steps(record):
  found = steps.read_steps(record)
  if found is None:
    return None
  prompt, judged = found
  prompt = _prompt_of(record) if prompt is None else _messages(prompt, 'user')
  if not prompt:
    raise ValueError('no prompt before the steps')
  return {'prompt': prompt, 'steps': judged}


def _prompt_of(record):
  """Returns the messages of a prompt in any of its forms, or None."""
  for name in ('prompt', 'question'):
    if name in record:
      return _messages(record[name], 'user')
  if 'instruction' not in record:
    return None
  parts = [_text(record['instruction'], 'instruction'), _text(record.get('input', ''), 'input')]
  return [{'role': 'user', 'content': '\n\n'.join(p for p in parts if p.strip())}]


def _messages(value, role=None):
  """Returns a list of messages; text is one message of `role`."""
  if isinstance(value, str) and role:
    return [{'role': role, 'content': _text(value, 'content')}]
  if isinstance(value, dict) and value and all(isinstance(v, list) for v in value.values()):
    # TFDS gives a sequence of objects as an object of sequences.
    value = [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]
  if not isinstance(value, list) or not value:
    raise ValueError('messages must be a list of objects with role and content' if role is None else
                     'a prompt or an answer must be text, or a list of messages')
  return [_message(m) for m in value]


def _message(message):
  if not isinstance(message, dict):
    raise ValueError(f'a message must be an object with role and content, not {type(message).__name__}')
  message = {k: v for k, v in message.items() if v is not None}
  if 'from' in message and 'value' in message:
    speaker, text = message.pop('from'), message.pop('value')
    message = {**message, 'role': _ROLES.get(speaker, speaker), 'content': text}
  for name in ('role', 'content'):
    if name not in message:
      raise ValueError(f'a message has no {name}')
    _text(message[name], name)
  if 'weight' in message:
    weight = message['weight']
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight <= 1e6:
      raise ValueError(f'the weight of a message must be a number from 0 on, not {str(weight)[:40]}')
    if message['role'] != 'assistant' and weight:
      raise ValueError(f'a weight stands at a message of the {message["role"][:40]}; only the assistant is trained')
  return message


def _text(value, name):
  if not isinstance(value, str):
    raise ValueError(f'{name} holds {type(value).__name__}, not text')
  if '\0' in value:
    raise ValueError('NUL byte')
  return value


def texts(document):
  """Yields the text of a document's messages: what a tokenizer is trained on.  document: JSON, as above."""
  for name, value in json.loads(document).items():
    if isinstance(value, str):
      yield value
    elif isinstance(value, list):
      yield from (part['text' if name == 'steps' else 'content'] for part in value)


def prompts(document):
  """Returns the prompts whose completions a document holds, as text: equal for equal prompts (see `splits.normal`).

  Of a chat one for each trained message, unless no user asked for it.  document: JSON, as above.
  """
  record = json.loads(document)
  if 'prompt' in record:
    return [_normal(record['prompt'])]
  messages = record['messages']
  trained = [i for i, m in enumerate(messages) if m['role'] == 'assistant' and m.get('weight', 1)]
  return [_normal(messages[:i]) for i in trained if any(m['role'] == 'user' for m in messages[:i])]


def normal(document):
  """Returns a document as text that is equal for copies (see `splits.normal`)."""
  return _normal(json.loads(document))


def _normal(value):
  def even(value):
    if isinstance(value, dict):
      return {k: even(v) for k, v in value.items()}
    return [even(v) for v in value] if isinstance(value, list) else (
        splits.normal(value) if isinstance(value, str) else value)

  if isinstance(value, list):  # Which messages of a prompt are trained makes no other prompt of it.
    value = [{k: v for k, v in message.items() if k != 'weight'} for message in value]
  return json.dumps(even(value), ensure_ascii=False, sort_keys=True)


def note_of(kind, document):
  """Returns what a store keeps beside a document's tokens: a prompt's answer, a pair's numbers; None of a chat."""
  record = json.loads(document)
  return record['answer'] if kind == 'prompts' else (
      {name: record[name] for name in PAIR_NUMBERS if name in record} if kind == 'pairs' else None)


class Encoder:
  """Documents of one kind to the stored documents [(ids, weights), ...] of each."""

  def __init__(self, kind, chat: ChatFormat):
    self.kind, self.chat = kind, chat

  def __call__(self, document):
    """Returns ([(ids int32 [n], weights float32 [n])], bytes of its text).  Raises TemplateError."""
    record = json.loads(document)
    size = sum(len(text.encode()) for text in texts(document))
    if self.kind == 'chat':
      return [self.chat.encode(record['messages'])], size
    prompt = [{**m, 'weight': 0} if m['role'] == 'assistant' else m for m in record['prompt']]
    if self.kind == 'pairs':
      return [self.chat.encode(prompt + record[name]) for name in ('chosen', 'rejected')], size
    if self.kind == 'steps':
      said = {'role': 'assistant', 'content': steps.solution(record['steps'])}
      ids, weights = self.chat.encode([*prompt, said])
      return [(ids, steps.mark(self.chat.tokenizer, ids, weights, record['steps']))], size
    ids = self.chat.prompt(prompt)
    return [(ids, np.zeros(len(ids), np.float32))], size


def untrained(name, chat, ids):
  """Returns the line for a conversation without a trained token.  name: its file and line."""
  text = chat.marked(ids)
  text = text if len(text) <= 300 else f'{text[:200]} ... {text[-80:]}'
  return f'{name} has no trained token: {text!r}'


__all__ = ['FORMS', 'PAIR_NUMBERS', 'SUFFIXES', 'Encoder', 'TemplateError', 'normaliser', 'note_of',
           'read_answers', 'read_prompt', 'read_records', 'texts', 'untrained']
