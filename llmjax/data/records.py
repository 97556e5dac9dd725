"""Records in every usual format, normalised to one form for each kind.

    chat        {"messages": [{"role", "content", "weight"?, ...}, ...], "tools"?}
    preference  {"prompt": [messages], "chosen": [messages], "rejected": [messages], "margin"?, "probability"?,
                 "tools"?}
                {"prompt": [messages], "completion": [messages], "label": bool, "tools"?}, an unpaired preference
    prompts     {"prompt": [messages], "answer": text, "columns"?: {other fields, for reward functions}, "tools"?}
    stepwise    {"prompt": [messages], "steps": [{"text", "label"}, ...], "tools"?}

A prepared folder stores that form, as JSON, in `documents/`.  For messages see `messages`, for the formats
docs/data_formats.md.

A field that changes the text or what is trained is used as its format defines it, or the record is rejected with a
reason that names the field; other fields are not used, except by reward functions, and counted by name.
"""

import functools
import itertools
import json
import os
import pathlib

import numpy as np

from llmjax import config
from llmjax.data import messages, stepwise
from llmjax.data.conversations import texts_of, without_training
from llmjax.data.documents import field_names
from llmjax.text.unrendered import REASONING_NAMES

SUFFIXES = ('.jsonl', '.ndjson', '.json', '.parquet')
FORMS = {
    'chat': 'messages; conversations; prompt and completion; or instruction, input and output',
    'preference': 'prompt (or instruction and input), chosen and rejected; or completion and label',
    'prompts': 'prompt (or question, messages, or instruction and input) and answer',
    'stepwise': stepwise.FORMS,
}
# Fields of a preference and their bounds: the margin between the scores, and the probability that the chosen
# completion is the better one (a soft label).
PREFERENCE_NUMBERS = {'margin': (0.0, 1e6), 'probability': (0.0, 1.0)}
MAX_BAD_LINES = 20  # Shown of a file.
MESSAGE_LISTS = ('messages', 'conversations', 'conversation')
PROMPTS = ('prompt', 'question', 'instruction', 'query', 'problem', 'input')
COMPLETIONS = ('completion', 'output', 'response')
REFERENCES = ('answer', 'output', 'solution', 'ground_truth')
SYSTEMS = ('system', 'system_prompt', 'system_message')
LABELS = ('label', 'kto_tag')  # Unpaired preferences of TRL and LLaMA-Factory.
MIN_REPEATED_WORDS = 3  # A prompt of at least so many words is removed where both completions begin with it.
# Fields whose text would be lost if they were not read.
_PROMPT_FIELDS = (*MESSAGE_LISTS, *PROMPTS, *SYSTEMS, 'context', 'history', 'tools', 'functions')
_COMPLETION_FIELDS = (*COMPLETIONS, *REASONING_NAMES)
_REFUSED = {'mask': 'of a record is not supported; write train at its messages',
            'weight': 'of a record is not supported; write weight at its messages',
            'train_detail': 'is not supported', 'assistant_masks': 'is not supported; write train at the messages',
            'completion_mask': 'is not supported; write train at the messages',
            'chat_template_kwargs': 'are not supported; write a template that needs none',
            **dict.fromkeys(messages.MEDIA, 'is not text; only text can be trained')}


def normaliser(kind, unused=None, train_history=False, dialogues=True):
  """Return a function from a record of a kind to its normalised JSON text; it raises ValueError with the reason.

  unused: a Counter that gains the names of fields that have a value and are not used.  train_history: also train the
  assistant's earlier turns, which a record gives as its prompt or history.  dialogues: read texts of "Human:" and
  "Assistant:" as messages.
  """
  convert = {'chat': functools.partial(_chat, train_history), 'preference': _preference, 'prompts': _prompt,
             'stepwise': _stepwise}[kind]

  def normalise(record):
    if not isinstance(record, dict):
      raise ValueError('the record is not an object')
    fields, ignored = {k: v for k, v in _to_json_types(record).items() if v is not None}, {}
    if kind in ('chat', 'prompts') or kind == 'preference' and 'chosen' in fields:
      _check_label(fields)
    if dialogues:
      _read_dialogues(fields)
    normalised = convert(fields, ignored)
    if normalised is None:
      raise ValueError(f'no {FORMS[kind]} (found: {field_names(record)})')
    rest = _check_rest(kind, fields, normalised)
    if kind == 'prompts' and (columns := {k: v for k, v in rest.items() if k not in _PROMPT_FIELDS}):
      normalised = {**normalised, 'columns': columns}
      rest = {k: v for k, v in rest.items() if k not in columns}
    try:
      text = json.dumps(normalised, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as e:
      raise ValueError(f'the messages are not plain JSON: {str(e)[:100]}') from e
    if unused is not None:
      unused.update([*ignored, *(field_names([name]) for name in rest)])
    return text

  return normalise


def _to_json_types(value):
  """Convert what TFDS and Parquet give to the types of JSON: bytes to text, arrays to lists."""
  if isinstance(value, bytes):
    return value.decode('utf-8')  # A UnicodeDecodeError is a ValueError.
  if isinstance(value, np.ndarray):
    return [_to_json_types(v) for v in value.tolist()]
  if isinstance(value, np.generic):
    return value.item()
  if isinstance(value, dict):
    return {k: _to_json_types(v) for k, v in value.items()}
  if isinstance(value, (list, tuple)):
    return [_to_json_types(v) for v in value]
  return value


def _check_rest(kind, fields, normalised):
  """Return the fields that were not read; raise ValueError for one whose text would be lost."""
  fields = {name: value for name, value in fields.items() if not messages.is_empty(value)}
  messages.refuse_fields(fields, _REFUSED)
  names = (*_PROMPT_FIELDS, *(_COMPLETION_FIELDS if kind == 'chat' else ()))
  if remaining := [name for name in names if name in fields]:
    text = '\n'.join(texts_of(json.dumps(normalised)))
    for name in remaining:
      if not all(part.strip() in text for part in _strings(fields[name])):
        raise ValueError(f'{name} has text that no other field has; leave it out, or move it into one of them')
  return fields


def _strings(value):
  """Yield the texts in the value of a field of messages or of text."""
  if isinstance(value, str):
    yield value
  elif isinstance(value, list):
    for item in value:
      yield from _strings(item)
  elif isinstance(value, dict):
    contents = [value[name] for name in ('content', 'value') if name in value]
    for item in contents or value.values():
      yield from _strings(item)


# One function for each kind.  Each takes the fields that it reads out of `fields`, and returns None for another form.


def _chat(train_history, fields, ignored):
  tools, system = _tools(fields), _system(fields)
  turns = _turns(fields, ignored)
  if turns is None:
    turns, completion = _prompt_of(fields, ignored), _pop_first(fields, COMPLETIONS)
    if turns is None or completion is None:
      return None
    turns, completion = _split_completion(turns, messages.read_messages(completion, 'assistant', ignored))
    turns = (turns if train_history else without_training(turns)) + completion
  return {'messages': _with_system(turns, system), **tools}


def _preference(fields, ignored):
  if 'preferred_output' in fields and isinstance(fields.get('input'), dict):  # OpenAI's format.
    fields.update(fields.pop('input'), chosen=fields.pop('preferred_output'),
                  rejected=fields.pop('non_preferred_output', None))
  if fields.get('chosen') is None or fields.get('rejected') is None:
    return _unpaired(fields, ignored)
  tools, system = _tools(fields), _system(fields)
  pair = [fields.pop(name) for name in ('chosen', 'rejected')]
  prompt = _prompt_of(fields, ignored)
  if prompt is None and next((fields[name] for name in MESSAGE_LISTS if name in fields), None) != pair[0]:
    prompt = _turns(fields, ignored)  # Else `messages` repeats the chosen conversation.
  if all(isinstance(text, str) for text in pair):
    prompt, pair = _split_texts(prompt, pair)
  pair = [messages.read_messages(value, 'assistant', ignored) for value in pair]
  if _unweighted(pair[0]) == _unweighted(pair[1]):
    raise ValueError('chosen and rejected are the same')
  prompt, pair = _split_conversations(prompt, pair)
  if not prompt:
    raise ValueError('no prompt before chosen and rejected')
  for name, turns in zip(('chosen', 'rejected'), pair, strict=True):
    if not any(m['role'] == 'assistant' for m in turns):
      raise ValueError(f'{name} of chosen and rejected holds no message of the assistant')
    if turns[0]['role'] != 'assistant':
      raise ValueError(f'{name} continues the prompt with a message of the {turns[0]["role"]}, not the assistant')
  numbers = {name: _number(fields.pop(name), name, *bounds) for name, bounds in PREFERENCE_NUMBERS.items()
             if name in fields}
  return {'chosen': pair[0], **numbers, 'prompt': _with_system(prompt, system), 'rejected': pair[1], **tools}


def _unpaired(fields, ignored):
  label = _label(fields)
  if label is None:
    return None
  fields.pop(next(name for name in LABELS if name in fields))
  tools, system = _tools(fields), _system(fields)
  turns = _turns(fields, ignored)
  if turns is not None:
    prompt, completion = turns[:-1], turns[-1:]
  else:
    prompt, completion = _prompt_of(fields, ignored), _pop_first(fields, COMPLETIONS)
    if prompt is None or completion is None:
      return None
    prompt, completion = _split_completion(prompt, messages.read_messages(completion, 'assistant', ignored))
  if not prompt or not completion or completion[0]['role'] != 'assistant':
    raise ValueError('an unpaired preference must be a prompt and a completion of the assistant')
  return {'completion': completion, 'label': label, 'prompt': _with_system(prompt, system), **tools}


def _prompt(fields, ignored):
  tools = _tools(fields)
  prompt, answer = _prompt_to_complete(fields, ignored), _pop_first(fields, REFERENCES)
  if prompt is None or answer is None:
    return None
  return {'answer': answer if isinstance(answer, str) else json.dumps(answer), 'prompt': prompt, **tools}


def _stepwise(fields, ignored):
  solution = stepwise.read_steps(fields)
  if solution is None:
    return None
  tools, system = _tools(fields), _system(fields)
  prompt, steps = solution
  for name in ('steps', 'completions', 'labels', 'label', *(('question', 'input') if prompt is not None else ())):
    fields.pop(name, None)
  prompt = _prompt_of(fields, ignored) if prompt is None else messages.read_messages(prompt, 'user')
  if not prompt:
    raise ValueError('no prompt before the steps')
  return {'prompt': _with_system(prompt, system), 'steps': steps, **tools}


# Prompts that completions repeat.


def _split_completion(prompt, completion):
  """Return (prompt, completion) without the messages of the prompt that the completion repeats."""
  lead = list(itertools.takewhile(lambda m: m['role'] != 'assistant', completion))
  if not lead:
    return prompt, completion
  if _unweighted(completion[:len(prompt)]) == _unweighted(prompt):
    return prompt, completion[len(prompt):]
  if _contains(lead, prompt):  # With a system message before it.
    return lead, completion[len(lead):]
  if _contains(prompt[-len(lead):], lead):
    return prompt, completion[len(lead):]
  raise ValueError('completion begins with messages that are not those of prompt; leave them out of one of the two')


def _split_texts(prompt, pair):
  """Return (prompt or None, [chosen, rejected]) of two texts, without the prompt that both repeat."""
  if prompt is None:  # TRL's implicit prompt: the words with which both texts begin.
    shared = os.path.commonprefix(pair)
    shared = shared[:max(shared.rfind(' '), shared.rfind('\n')) + 1].rstrip()
    return ([{'content': shared, 'role': 'user'}], [text[len(shared):] for text in pair]) if shared else (None, pair)
  text = prompt[-1]['content']
  # Both may begin with fewer words by chance: "Hi" and "Hi there".
  if len(text.split()) >= MIN_REPEATED_WORDS and all(completion.startswith(text) for completion in pair):
    pair = [completion[len(text):] for completion in pair]
  return prompt, pair


def _split_conversations(prompt, pair):
  """Return (prompt, [chosen, rejected]) of lists of messages; both may be whole conversations with the prompt."""
  equal = [a == b for a, b in zip(*map(_unweighted, pair), strict=False)]
  size = (*equal, False).index(False)
  shared, rest = pair[0][:size], [turns[size:] for turns in pair]
  if not prompt:
    return shared, rest
  if all(m['role'] == 'assistant' for m in shared):
    return prompt, pair
  if _contains(shared, prompt):
    return shared, rest
  if _contains(prompt[-size:], shared):
    return prompt, rest
  raise ValueError('prompt is not what chosen and rejected begin with; leave prompt out, or the messages before the '
                   "assistant's")


def _contains(turns, part):
  """Return whether messages contain others, one after another."""
  turns, part = _unweighted(turns), _unweighted(part)
  return any(turns[i:i + len(part)] == part for i in range(len(turns) - len(part) + 1))


def _unweighted(turns):
  return [{k: v for k, v in m.items() if k != 'weight'} for m in turns]


# Fields that several kinds have.


def _pop_first(fields, names):
  """Remove and return the first of the named fields, or None."""
  return next((fields.pop(name) for name in names if name in fields), None)


def _turns(fields, ignored):
  value = _pop_first(fields, MESSAGE_LISTS)
  return None if value is None else messages.read_messages(value, None, ignored)


def _prompt_of(fields, ignored):
  """Return the messages of a prompt in any format, or None."""
  if 'instruction' in fields and not any(name in fields for name in PROMPTS[:2]):
    more = 'input' if not messages.is_empty(fields.get('input')) else 'context'  # Alpaca and Dolly.
    parts = [messages.read_text(fields.pop(name, ''), name) for name in ('instruction', more)]
    prompt = [{'content': '\n\n'.join(p for p in parts if p.strip()), 'role': 'user'}]
  else:
    value = _pop_first(fields, PROMPTS)
    if value is None:
      return None
    prompt = messages.read_messages(value, 'user', ignored)
  return _history(fields) + prompt


def _prompt_to_complete(fields, ignored):
  """Return the messages to complete, or None; of a conversation those up to the last user's: the rest is the answer."""
  system, prompt = _system(fields), _turns(fields, ignored)
  if prompt is not None:
    while prompt and prompt[-1]['role'] != 'user':
      prompt.pop()
    if not prompt:
      raise ValueError('messages hold none of the user')
  else:
    prompt = _prompt_of(fields, ignored)
    if prompt and prompt[-1]['role'] == 'assistant':
      raise ValueError('prompt ends with a message of the assistant; it must end with the message to be answered')
  return prompt and _with_system(_unweighted(prompt), system)


def _history(fields):
  """Return the messages of Alpaca's earlier turns, [[user, assistant], ...]."""
  turns = fields.pop('history', [])
  if not isinstance(turns, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in turns):
    raise ValueError('history must be a list of [user text, assistant text]')
  return [{'content': messages.read_text(text, 'history'), 'role': role}
          for turn in turns for text, role in zip(turn, ('user', 'assistant'), strict=True)]


def _read_dialogues(fields):
  """Replace texts of "Human:" and "Assistant:" (HH-RLHF) by messages."""
  for name in (*PROMPTS, 'chosen', 'rejected'):
    if turns := messages.read_dialogue(fields.get(name)):
      fields[name] = turns


def _system(fields):
  texts = {messages.read_text(fields.pop(name), name) for name in SYSTEMS if not messages.is_empty(fields.get(name))}
  if len(texts) > 1:
    raise ValueError(f'{" and ".join(SYSTEMS)} differ; leave all but one out')
  return next(iter(texts), '')


def _with_system(turns, system):
  """Return messages that begin with the system message that a record has as a field of its own."""
  if not system:
    return turns
  if turns[0]['role'] in ('system', 'developer'):
    if turns[0]['content'].strip() != system.strip():
      raise ValueError('system is not the system message of the conversation; leave one of them out')
    return turns
  return [{'content': system, 'role': 'system'}, *turns]


def _tools(fields):
  """Return {'tools': ...} of a record, or {}."""
  tools = [messages.read_tools(fields.pop(name)) for name in ('tools', 'functions')
           if not messages.is_empty(fields.get(name))]
  return {'tools': tools[0]} if tools and tools[0] else {}


def _label(fields):
  """Return the label of an unpaired preference: True, False, or None where there is none."""
  value = next((fields[name] for name in LABELS if name in fields), None)
  value = value.strip().lower() if isinstance(value, str) else value
  return True if value in (True, 'true') else False if value in (False, 'false') else None


def _check_label(fields):
  """Remove a label that is true; raise ValueError where it is false."""
  name, label = next((name for name in LABELS if name in fields), ''), _label(fields)
  if label is False:
    raise ValueError(f'{name} is false: an undesirable completion is not trained as a desirable one; prepare unpaired '
                     'preferences with --config.records=preference, for preference.loss=kto, or leave the record out')
  if label:
    del fields[name]


def _number(value, name, least, most):
  if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
    raise ValueError(f'{name} must be a number from {least:g} to {most:g}, not {str(value)[:40]}')
  return value


# Files of prompts, as --prompts names them.


def read_prompt(record):
  """Return the messages to complete of a record in any format of prompts; raise ValueError."""
  if isinstance(record, dict):
    fields = {k: v for k, v in record.items() if v is not None}
    _read_dialogues(fields)
    if _tools(fields):
      raise ValueError('tools have no place in a prompt here; leave them out')
    if prompt := _prompt_to_complete(fields, {}):
      return prompt
  raise ValueError(f'no prompt: the record must be an object with {FORMS["prompts"].rsplit(" and ", 1)[0]}')


def read_answers(record):
  """Return (messages, completion, other completion) of a record with `responses`, or with `chosen` and `rejected`."""
  prompt = read_prompt(record)
  pair = record.get('responses', [record.get('chosen'), record.get('rejected')])
  if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
    raise ValueError('two completions must stand beside the prompt: "responses": [text, text], or chosen and rejected')
  return prompt, *pair


def read_records(path, read):
  """Return read(object) of every line of a JSONL file; raise ConfigError with all bad lines."""
  records, problems = [], []
  try:
    lines = pathlib.Path(path).read_bytes().splitlines()
  except OSError as e:
    raise config.ConfigError([f'--prompts={path} cannot be read: {e.strerror}']) from e
  for number, line in enumerate(lines, 1):
    if not line.strip():
      continue
    try:
      records.append(read(json.loads(line)))
    except (ValueError, RecursionError) as e:
      problems.append(f'{path}:{number}: {config.one_line(e)}')
  if len(problems) > MAX_BAD_LINES:
    problems[MAX_BAD_LINES:] = [f'and {len(problems) - MAX_BAD_LINES} more lines of {path}']
  if not records and not problems:
    problems.append(f'--prompts={path} has no lines')
  if problems:
    raise config.ConfigError(problems)
  return records
