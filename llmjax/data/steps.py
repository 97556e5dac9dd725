"""Records of solutions whose steps are judged one by one, and where in the tokens each step ends.

    {"prompt": [messages], "steps": [{"text", "label"}, ...]}

A label says how good a step is, from 0 to 1.  Steps are joined by SEPARATOR to one message of the assistant.  What
tells of a step is the target that follows its last token: the separator, or what ends the message.  Its weight in
the store is 1 + label, and all other weights are 0; so a model reads a step to its last token and nothing beyond.
"""

import re

import numpy as np

from llmjax.data.messages import read_objects
from llmjax.text.templates import TemplateError

SEPARATOR = '\n'
JUDGED = 1.0  # Weight of a step's end, less its label.
FORMS = ('prompt and steps of text and label; prompt, completions and labels; question and label.steps (PRM800K); or '
         'input and label with a mark behind each step (Math-Shepherd)')
_MARK = 'ки'  # Math-Shepherd's, where its labels have + or -.
_WORDS = {'+': 1, '-': 0, 'good': 1, 'bad': 0, 'true': 1, 'false': 0}
_RATINGS = {-1: 0, 0: 1, 1: 1}  # PRM800K's bad, neutral, good; a neutral step is no error (arXiv:2305.20050).


def read_steps(record):
  """Returns (prompt in any form or None, [{'text', 'label'}]) of a record in one of FORMS, or None.

  Raises ValueError with a reason.
  """
  steps, prompt = None, None
  if 'steps' in record:
    steps = read_objects(record['steps'])
  elif 'completions' in record and 'labels' in record:
    texts, labels = record['completions'], record['labels']
    if not isinstance(texts, list) or not isinstance(labels, list) or len(texts) != len(labels):
      raise ValueError('completions and labels must be lists of one length')
    steps = [{'text': text, 'label': label} for text, label in zip(texts, labels, strict=True)]
  elif isinstance(record.get('label'), dict) and isinstance(record.get('question'), dict):
    prompt, steps = record['question'].get('problem'), _chosen(record['label'].get('steps'))
  elif isinstance(record.get('label'), str) and isinstance(record.get('input'), str):
    prompt, steps = _marked(record['input'], record['label'])
  if steps is None:
    return None
  if not isinstance(steps, list) or not steps:
    raise ValueError('steps must be a list of objects with text and label')
  return prompt, [_step(step) for step in steps]


def _step(step):
  if not isinstance(step, dict) or not isinstance(step.get('text'), str):
    raise ValueError('a step must be an object with text and label')
  text = step['text'].lstrip('\n').rstrip()
  if not text.strip():
    raise ValueError('a step is empty')
  if '\0' in text:
    raise ValueError('NUL byte')
  if 'label' not in step and 'rating' in step:
    return {'text': text, 'label': _rating(step['rating'])}
  label = step.get('label')
  label = _WORDS.get(label.strip().lower(), label) if isinstance(label, str) else label
  if not isinstance(label, (bool, int, float)) or not 0 <= label <= 1:
    raise ValueError(f'the label of a step must be true, false, + or -, or a number from 0 to 1, not {str(label)[:40]}')
  return {'text': text, 'label': float(label) if isinstance(label, float) else int(label)}


def _rating(rating):
  if isinstance(rating, bool) or rating not in _RATINGS:
    raise ValueError(f'the rating of a step must be -1, 0 or 1, not {str(rating)[:40]}')
  return _RATINGS[rating]


def _chosen(found):
  """Returns the path of steps that PRM800K's people took: up to an error, or to the end."""
  if not isinstance(found, list):
    return None
  steps = []
  for step in found:
    answers, number = step.get('completions') or [], step.get('chosen_completion')
    human = step.get('human_completion')
    if number is None and human:  # Written by a person in place of wrong ones.
      steps.append({'text': human.get('text') if isinstance(human, dict) else human, 'label': 1})
      continue
    last = number is None
    if not answers or not isinstance(number or 0, int) or not 0 <= (number or 0) < len(answers):
      break
    answer = answers[number or 0]
    if answer.get('rating') is None:
      break
    steps.append({'text': answer.get('text'), 'label': _rating(answer['rating'])})
    if last:
      break
  return steps


def _marked(text, labels):
  """Returns (prompt, steps) of Math-Shepherd's two texts: one with marks, the same with + or - in place of them."""
  parts, steps, place = text.split(_MARK), [], 0
  for part in parts[:-1]:
    place += len(part)
    sign = labels[place:place + 1]
    if sign not in ('+', '-'):
      raise ValueError(f'the label has {sign!r} where the input has a mark of a step; it must have + or -')
    steps.append({'text': part, 'label': sign})
    place += 1
  if not steps or 'Step 1:' not in steps[0]['text']:
    return None, None
  prompt, _, first = steps[0]['text'].partition('Step 1:')
  steps[0]['text'] = f'Step 1:{first}'
  return prompt.strip(), steps


def solution(steps):
  """Returns the text that the steps are together."""
  return SEPARATOR.join(step['text'] for step in steps)


def mark(tokenizer, ids, weights, steps):
  """Returns float32 [n]: 1 + the label at the target behind each step, else 0.

  ids, weights: of a conversation whose only trained message is the steps'.  Raises TemplateError where the chat
  template has changed what they say.
  """
  said, text = np.flatnonzero(weights > 0), solution(steps).encode()
  inside, end = said[:-1], said[-1]  # What ends the message is trained, too.
  parts = [tokenizer.decode_bytes(i) for i in ids[inside]]
  found = b''.join(parts)
  if found.strip() != text.strip():
    raise TemplateError('the chat template changes what the assistant says, so that the ends of steps cannot be found')
  # A template may take white space away at the beginning and the end.
  lead = len(text) - len(text.lstrip()) - (len(found) - len(found.lstrip()))
  marks, ends = np.zeros(len(ids), np.float32), np.cumsum([len(p) for p in parts]) + lead
  place = 0
  for step in steps:
    place += len(step['text'].encode())
    behind = int(np.searchsorted(ends, place, 'right'))  # The token that has the separator's byte.
    marks[inside[behind] if behind < len(inside) else end] = JUDGED + step['label']
    place += len(SEPARATOR.encode())
  return marks


def find_ends(tokenizer, ids):
  """Returns the places in an answer's ids of the tokens that follow its steps, as `mark` has them.

  ids: int [n], without what ends the message; so the last place may be n.  Steps are what line breaks divide.
  """
  parts = [tokenizer.decode_bytes(i) for i in ids]
  text, ends = b''.join(parts), np.cumsum([len(p) for p in parts], dtype=int)
  said = text.rstrip()
  breaks = [found.start() for found in re.finditer(rb'(?<=\S)\s*\n', said)]
  last = int(np.searchsorted(ends, len(said))) + 1 if said else 0
  return [int(np.searchsorted(ends, place, 'right')) for place in breaks] + [last]
