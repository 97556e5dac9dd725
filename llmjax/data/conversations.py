"""Records of conversations: every usual form of them as one form, and that form as tokens with loss weights.

    chat     {"messages": [{"role", "content", "weight"?, ...}, ...], "tools"?}
    pairs    {"prompt": [messages], "chosen": [messages], "rejected": [messages], "margin"?, "probability"?, "tools"?}
             {"prompt": [messages], "completion": [messages], "label": bool, "tools"?}, an unpaired preference
    prompts  {"prompt": [messages], "answer": text, "tools"?}
    steps    {"prompt": [messages], "steps": [{"text", "label"}, ...], "tools"?}

A prepared folder keeps that form, as JSON, in `documents/`.  Tokens: a chat is one document of the store; a pair
is two, the chosen one at an even number and the rejected one behind it (of unpaired ones a good completion and a bad
one, to different prompts); a prompt is one without a trained token; a solution of steps is one whose weights are
labels (see `steps`).  For messages see `messages`.

A field that changes what is said or what is trained is used as its source format means it, or the record is refused
with a line that names the field; other fields are not used, and counted by name.
"""

import functools
import itertools
import json
import os
import pathlib

import numpy as np

from llmjax import config
from llmjax.data import messages, splits, steps
from llmjax.data.documents import field_names
from llmjax.text.chat import ChatFormat
from llmjax.text.templates import TemplateError
from llmjax.text.unrendered import REASONING_NAMES

# What a pair may say of itself: how far its scores are to be apart, and how sure it is that the chosen answer is the
# better one (a soft label); the least, the most, and what is meant where nothing is said.
PAIR_NUMBERS = {'margin': (0.0, 1e6, 0.0), 'probability': (0.0, 1.0, 1.0)}
SUFFIXES = ('.jsonl', '.ndjson', '.json', '.parquet')
FORMS = {
    'chat': 'messages; conversations; prompt and completion; or instruction, input and output',
    'pairs': 'prompt (or instruction and input), chosen and rejected; or completion and label',
    'prompts': 'prompt (or question, messages, or instruction and input) and answer',
    'steps': steps.FORMS,
}
BAD_LINES = 20  # Shown of a file at most.
MESSAGE_LISTS = ('messages', 'conversations', 'conversation')
PROMPTS = ('prompt', 'question', 'instruction', 'query', 'problem', 'input')
COMPLETIONS = ('completion', 'output', 'response')
REFERENCES = ('answer', 'output', 'solution', 'ground_truth')
SYSTEMS = ('system', 'system_prompt', 'system_message')
LABELS = ('label', 'kto_tag')  # Of TRL's and LLaMA-Factory's unpaired preferences.
REPEATED_WORDS = 3  # From so many words on, two answers that begin with the prompt repeat it.
# Text that would be lost if it were left over.
_PROMPT_FIELDS = (*MESSAGE_LISTS, *PROMPTS, *SYSTEMS, 'context', 'history', 'tools', 'functions')
_ANSWER_FIELDS = (*COMPLETIONS, *REASONING_NAMES)
_REFUSED = {'mask': 'of a record is not supported; write train at its messages',
            'weight': 'of a record is not supported; write weight at its messages',
            'train_detail': 'is not supported', 'assistant_masks': 'is not supported; write train at the messages',
            'completion_mask': 'is not supported; write train at the messages',
            'chat_template_kwargs': 'are not supported; write a template that needs none',
            **dict.fromkeys(messages.MEDIA, 'is not text; only text can be trained')}


def normaliser(kind, ignored=None, train_history=False, dialogues=True):
  """Returns a function of a record to its text in the form above; it raises ValueError with a reason.

  ignored: a Counter that gains the names of a record's fields that hold something and change nothing.  train_history:
  the assistant's earlier turns, which a record gives as its prompt or history, are trained, too.  dialogues: texts of
  "Human:" and "Assistant:" are read as messages.
  """
  make = {'chat': functools.partial(_chat, train_history), 'pairs': _pair, 'prompts': _prompt, 'steps': _steps}[kind]

  def normal(record):
    if not isinstance(record, dict):
      raise ValueError('the record is no object')
    fields, unused = {k: v for k, v in _plain(record).items() if v is not None}, {}
    if kind in ('chat', 'prompts') or kind == 'pairs' and 'chosen' in fields:
      _check_label(fields)
    if dialogues:
      _read_dialogues(fields)
    made = make(fields, unused)
    if made is None:
      raise ValueError(f'no {FORMS[kind]} (found: {field_names(record)})')
    names = [*unused, *_check_rest(kind, fields, made)]
    try:
      text = json.dumps(made, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as e:
      raise ValueError(f'the messages are not plain JSON: {str(e)[:100]}') from e
    if ignored is not None:
      ignored.update(names)
    return text

  return normal


def _check_rest(kind, fields, made):
  """Returns the names of the fields that were not read; raises ValueError for one that has a meaning."""
  fields = {name: value for name, value in fields.items() if not messages.is_empty(value)}
  messages.refuse_fields(fields, _REFUSED)
  if kept := [name for name in (*_PROMPT_FIELDS, *(_ANSWER_FIELDS if kind == 'chat' else ())) if name in fields]:
    said = '\n'.join(texts(json.dumps(made)))
    for name in kept:
      if not all(text.strip() in said for text in _strings(fields[name])):
        raise ValueError(f'{name} is no part of what the other fields say; leave it out, or put it into them')
  return [field_names([name]) for name in fields]


def read_prompt(record):
  """Returns the messages that a record asks with, in any of its forms; raises ValueError."""
  if isinstance(record, dict):
    fields = {k: v for k, v in record.items() if v is not None}
    _read_dialogues(fields)
    if _tools(fields):
      raise ValueError('tools have no place in a prompt here; leave them out')
    if made := _asked(fields, {}):
      return made
  raise ValueError(f'no prompt: the record must be an object with {FORMS["prompts"].rsplit(" and ", 1)[0]}')


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


def _chat(train_history, fields, ignored):
  tools, system = _tools(fields), _system(fields)
  turns = _turns(fields, ignored)
  if turns is None:
    turns, completion = _prompt_of(fields, ignored), _first(fields, COMPLETIONS)
    if turns is None or completion is None:
      return None
    turns, completion = _join(turns, messages.read_messages(completion, 'assistant', ignored))
    turns = (turns if train_history else _untrained(turns)) + completion
  return {'messages': _with_system(turns, system), **tools}


def _join(prompt, completion):
  """Returns (prompt, completion), of which the completion has nothing that it repeats of the prompt."""
  lead = list(itertools.takewhile(lambda m: m['role'] != 'assistant', completion))
  if not lead:
    return prompt, completion
  if _said(completion[:len(prompt)]) == _said(prompt):
    return prompt, completion[len(prompt):]
  if _holds(lead, prompt):  # With a system message before it.
    return lead, completion[len(lead):]
  if _holds(prompt[-len(lead):], lead):
    return prompt, completion[len(lead):]
  raise ValueError('completion begins with messages that are not those of prompt; leave them out of one of the two')


def _labelled(fields, ignored):
  """Returns an unpaired preference, TRL's or LLaMA-Factory's, or None."""
  label = _label(fields)
  if label is None:
    return None
  fields.pop(next(name for name in LABELS if name in fields))
  tools, system = _tools(fields), _system(fields)
  turns = _turns(fields, ignored)
  if turns is not None:
    prompt, completion = turns[:-1], turns[-1:]
  else:
    prompt, completion = _prompt_of(fields, ignored), _first(fields, COMPLETIONS)
    if prompt is None or completion is None:
      return None
    prompt, completion = _join(prompt, messages.read_messages(completion, 'assistant', ignored))
  if not prompt or not completion or completion[0]['role'] != 'assistant':
    raise ValueError('an unpaired preference must be a prompt and a completion of the assistant')
  return {'completion': completion, 'label': label, 'prompt': _with_system(prompt, system), **tools}


def _pair(fields, ignored):
  if 'preferred_output' in fields and isinstance(fields.get('input'), dict):  # OpenAI's.
    fields.update(fields.pop('input'), chosen=fields.pop('preferred_output'),
                  rejected=fields.pop('non_preferred_output', None))
  if fields.get('chosen') is None or fields.get('rejected') is None:
    return _labelled(fields, ignored)
  tools, system = _tools(fields), _system(fields)
  both = [fields.pop(name) for name in ('chosen', 'rejected')]
  prompt = _prompt_of(fields, ignored)
  if prompt is None and _said_of(fields) != _said_of({'messages': both[0]}):  # Else `messages` is the chosen one.
    prompt = _turns(fields, ignored)
  if all(isinstance(text, str) for text in both):
    prompt, both = _split_texts(prompt, both)
  both = [messages.read_messages(value, 'assistant', ignored) for value in both]
  if _said(both[0]) == _said(both[1]):
    raise ValueError('chosen and rejected are the same')
  prompt, both = _split_prompt(prompt, both)
  if not prompt:
    raise ValueError('no prompt before chosen and rejected')
  for name, turns in zip(('chosen', 'rejected'), both, strict=True):
    if not any(m['role'] == 'assistant' for m in turns):
      raise ValueError(f'{name} of chosen and rejected holds no message of the assistant')
    if turns[0]['role'] != 'assistant':
      raise ValueError(f'{name} goes on after the prompt with a message of the {turns[0]["role"]}, not the assistant')
  numbers = {name: _number(fields.pop(name), name, *limits[:2]) for name, limits in PAIR_NUMBERS.items()
             if name in fields}
  return {'chosen': both[0], **numbers, 'prompt': _with_system(prompt, system), 'rejected': both[1], **tools}


def _split_texts(prompt, both):
  """Returns (prompt or None, [chosen, rejected]) of two texts, without what both repeat of the prompt."""
  if prompt is None:  # TRL's implicit prompt: the words that both begin with.
    shared = os.path.commonprefix(both)
    shared = shared[:max(shared.rfind(' '), shared.rfind('\n')) + 1].rstrip()
    return ([{'content': shared, 'role': 'user'}], [text[len(shared):] for text in both]) if shared else (None, both)
  text = prompt[-1]['content']
  # Of fewer words both may begin by chance: "Hi" and "Hi there".
  if len(text.split()) >= REPEATED_WORDS and all(answer.startswith(text) for answer in both):
    both = [answer[len(text):] for answer in both]
  return prompt, both


def _split_prompt(prompt, both):
  """Returns (prompt, [chosen, rejected]) of lists of messages; both may be whole conversations that hold the prompt."""
  alike = [a == b for a, b in zip(*map(_said, both), strict=False)]
  same = (*alike, False).index(False)
  shared, rest = both[0][:same], [turns[same:] for turns in both]
  if not prompt:
    return shared, rest
  if all(m['role'] == 'assistant' for m in shared):
    return prompt, both
  if _holds(shared, prompt):
    return shared, rest
  if _holds(prompt[-same:], shared):
    return prompt, rest
  raise ValueError('prompt is not what chosen and rejected begin with; leave prompt out, or the messages before the '
                   "assistant's")


def _holds(turns, part):
  """Returns whether messages hold others, one after another."""
  turns, part = _said(turns), _said(part)
  return any(turns[i:i + len(part)] == part for i in range(len(turns) - len(part) + 1))


def _said(turns):
  """Returns messages without their weights."""
  return [{k: v for k, v in m.items() if k != 'weight'} for m in turns]


def _said_of(fields):
  return next((fields[name] for name in MESSAGE_LISTS if name in fields), None)


def _number(value, name, least, most):
  if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
    raise ValueError(f'{name} must be a number from {least:g} to {most:g}, not {str(value)[:40]}')
  return value


def _prompt(fields, ignored):
  tools = _tools(fields)
  prompt, answer = _asked(fields, ignored), _first(fields, REFERENCES)
  if prompt is None or answer is None:
    return None
  return {'answer': answer if isinstance(answer, str) else json.dumps(answer), 'prompt': prompt, **tools}


def _asked(fields, ignored):
  """Returns the messages to answer, or None: of a conversation those up to the last user's, whose answer would leak."""
  system, prompt = _system(fields), _turns(fields, ignored)
  if prompt is not None:
    while prompt and prompt[-1]['role'] != 'user':
      prompt.pop()
    if not prompt:
      raise ValueError('messages hold none of the user')
  else:
    prompt = _prompt_of(fields, ignored)
    if prompt and prompt[-1]['role'] == 'assistant':
      raise ValueError('prompt ends with a message of the assistant; it must end with what is to be answered')
  return prompt and _with_system(_said(prompt), system)


def _steps(fields, ignored):
  found = steps.read_steps(fields)
  if found is None:
    return None
  tools, system = _tools(fields), _system(fields)
  prompt, judged = found
  for name in ('steps', 'completions', 'labels', 'label', *(('question', 'input') if prompt is not None else ())):
    fields.pop(name, None)
  prompt = _prompt_of(fields, ignored) if prompt is None else messages.read_messages(prompt, 'user')
  if not prompt:
    raise ValueError('no prompt before the steps')
  return {'prompt': _with_system(prompt, system), 'steps': judged, **tools}


# Fields that the kinds share.  Whoever reads a field takes it out of `fields`; what is left over is looked at last.


def _first(fields, names):
  """Returns the first of the named fields, which it takes out, or None."""
  return next((fields.pop(name) for name in names if name in fields), None)


def _turns(fields, ignored):
  value = _first(fields, MESSAGE_LISTS)
  return None if value is None else messages.read_messages(value, None, ignored)


def _prompt_of(fields, ignored):
  """Returns the messages of a prompt in any of its forms, or None."""
  if 'instruction' in fields and not any(name in fields for name in PROMPTS[:2]):
    more = 'input' if not messages.is_empty(fields.get('input')) else 'context'  # Alpaca's, Dolly's.
    parts = [messages.read_text(fields.pop(name, ''), name) for name in ('instruction', more)]
    prompt = [{'content': '\n\n'.join(p for p in parts if p.strip()), 'role': 'user'}]
  else:
    value = _first(fields, PROMPTS)
    if value is None:
      return None
    prompt = messages.read_messages(value, 'user', ignored)
  return _history(fields) + prompt


def _history(fields):
  """Returns the messages of Alpaca's earlier turns, [[asked, answered], ...]."""
  turns = fields.pop('history', [])
  if not isinstance(turns, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in turns):
    raise ValueError('history must be a list of [asked, answered]')
  return [{'content': messages.read_text(text, 'history'), 'role': role}
          for turn in turns for text, role in zip(turn, ('user', 'assistant'), strict=True)]


def _read_dialogues(fields):
  """Puts messages in the place of texts of "Human:" and "Assistant:" (HH-RLHF)."""
  for name in (*PROMPTS, 'chosen', 'rejected'):
    if turns := messages.read_dialogue(fields.get(name)):
      fields[name] = turns


def _untrained(turns):
  return [{**m, 'weight': 0} if m['role'] == 'assistant' else m for m in turns]


def _system(fields):
  found = {messages.read_text(fields.pop(name), name) for name in SYSTEMS if not messages.is_empty(fields.get(name))}
  if len(found) > 1:
    raise ValueError(f'{" and ".join(SYSTEMS)} differ; leave all but one out')
  return next(iter(found), '')


def _with_system(turns, system):
  """Returns messages that begin with the system message which a record gives beside them."""
  if not system:
    return turns
  if turns[0]['role'] in ('system', 'developer'):
    if turns[0]['content'].strip() != system.strip():
      raise ValueError('system is not the system message of the conversation; leave one of them out')
    return turns
  return [{'content': system, 'role': 'system'}, *turns]


def _tools(fields):
  """Returns {'tools': ...} of a record, or {}."""
  found = [messages.read_tools(fields.pop(name)) for name in ('tools', 'functions')
           if not messages.is_empty(fields.get(name))]
  return {'tools': found[0]} if found and found[0] else {}


def _label(fields):
  """Returns what an unpaired preference (KTO) says of its completion: True, False, or None where there is no label."""
  value = next((fields[name] for name in LABELS if name in fields), None)
  value = value.strip().lower() if isinstance(value, str) else value
  return True if value in (True, 'true') else False if value in (False, 'false') else None


def _check_label(fields):
  """Takes out a label that a completion is good; raises ValueError where it says that it is bad."""
  name, label = next((name for name in LABELS if name in fields), ''), _label(fields)
  if label is False:
    raise ValueError(f'{name} is false: a bad completion is not trained as a good one; prepare unpaired preferences '
                     'with --config.records=pairs, for preference.loss=kto, or leave the record out')
  if label:
    del fields[name]


def _strings(value):
  """Yields the texts in the value of a field of messages or of text."""
  if isinstance(value, str):
    yield value
  elif isinstance(value, list):
    for item in value:
      yield from _strings(item)
  elif isinstance(value, dict):
    said = [value[name] for name in ('content', 'value') if name in value]
    for item in said or value.values():
      yield from _strings(item)


def texts(document):
  """Yields the text of a document's messages, calls and tools: what a tokenizer is trained on.  document: JSON."""
  for name, value in json.loads(document).items():
    if isinstance(value, str):
      yield value
    elif name == 'tools':
      yield from (json.dumps(tool, ensure_ascii=False) for tool in value)
    elif isinstance(value, list):
      for part in value:
        yield from (part[name] for name in ('text', 'reasoning_content', 'content') if part.get(name))
        for call in part.get('tool_calls', ()):
          yield from (call['function']['name'], json.dumps(call['function']['arguments'], ensure_ascii=False))


def prompts(document):
  """Returns the prompts whose completions a document holds, as text: equal for equal prompts (see `splits.normal`).

  Of a chat one for each trained message, unless no user asked for it.  document: JSON, as above.
  """
  record = json.loads(document)
  if 'prompt' in record:
    return [_normal(record['prompt'])]
  turns = record['messages']
  trained = [i for i, m in enumerate(turns) if m['role'] == 'assistant' and m.get('weight', 1)]
  return [_normal(turns[:i]) for i in trained if any(m['role'] == 'user' for m in turns[:i])]


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
  """Documents of one kind to the stored documents [(ids, weights), ...] of each.

  reasoning_dropped: documents of which the template left reasoning out.
  """

  def __init__(self, kind, chat: ChatFormat):
    self.kind, self.chat, self.reasoning_dropped = kind, chat, 0

  def __call__(self, document):
    """Returns ([(ids int32 [n], weights float32 [n])], bytes of its text).  Raises TemplateError."""
    record, before = json.loads(document), self.chat.reasoning_dropped
    made = self._encode(record)
    self.reasoning_dropped += self.chat.reasoning_dropped > before
    return made, sum(len(text.encode()) for text in texts(document))

  def _encode(self, record):
    tools = record.get('tools')
    if self.kind == 'chat':
      return [self.chat.encode(record['messages'], tools)]
    prompt = _untrained(record['prompt'])
    if 'label' in record:
      return [self.chat.encode(prompt + record['completion'], tools)]
    if self.kind == 'pairs':
      return [self.chat.encode(prompt + record[name], tools) for name in ('chosen', 'rejected')]
    if self.kind == 'steps':
      said = {'role': 'assistant', 'content': steps.solution(record['steps'])}
      ids, weights = self.chat.encode([*prompt, said], tools)
      return [(ids, steps.mark(self.chat.tokenizer, ids, weights, record['steps']))]
    ids = self.chat.prompt(prompt, tools)
    return [(ids, np.zeros(len(ids), np.float32))]


def label_of(kind, document):
  """Returns the label of an unpaired preference, None of everything else."""
  return json.loads(document).get('label') if kind == 'pairs' else None


def untrained(name, chat, ids):
  """Returns the line for a conversation without a trained token.  name: its file and line."""
  text = chat.marked(ids)
  text = text if len(text) <= 300 else f'{text[:200]} ... {text[-80:]}'
  return f'{name} has no trained token: {text!r}'


__all__ = ['FORMS', 'PAIR_NUMBERS', 'SUFFIXES', 'Encoder', 'TemplateError', 'label_of', 'normaliser',
           'note_of', 'read_answers', 'read_prompt', 'read_records', 'texts', 'untrained']
