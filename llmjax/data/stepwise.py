"""Stepwise records: solutions with a label for every step, and the tokens at which the steps end.

    {"prompt": [messages], "steps": [{"text", "label"}, ...]}

A label is the quality of a step, from 0 to 1.  The steps are joined by SEPARATOR to one assistant message.  A step is
scored at the target behind its last token: the separator, or the token that ends the message.  There loss_mask is 1 and
step_labels is the label; elsewhere both are 0.  So a model reads a step to its last token and nothing beyond.
"""

import re

import numpy as np

from llmjax.data.messages import read_objects
from llmjax.text.templates import TemplateError

SEPARATOR = '\n'
FORMS = ('prompt and steps of text and label; prompt, completions and labels; question and label.steps (PRM800K); or '
         'input and label with a mark behind each step (Math-Shepherd)')
_MARK = 'ки'  # Math-Shepherd marks the end of a step; its labels have + or - there.
_WORDS = {'+': 1, '-': 0, 'good': 1, 'bad': 0, 'true': 1, 'false': 0}
_RATINGS = {-1: 0, 0: 1, 1: 1}  # PRM800K's bad, neutral, good; a neutral step is no error (arXiv:2305.20050).


def read_steps(record):
  """Return (prompt in any form or None, [{'text', 'label'}]) of a record in one of FORMS, or None.

  Raises ValueError with the reason.
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
    prompt, steps = record['question'].get('problem'), _prm800k_steps(record['label'].get('steps'))
  elif isinstance(record.get('label'), str) and isinstance(record.get('input'), str):
    prompt, steps = _math_shepherd_steps(record['input'], record['label'])
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


def _prm800k_steps(steps):
  """Return the steps that the annotators of PRM800K followed: up to the first error, or to the end."""
  if not isinstance(steps, list):
    return None
  path = []
  for step in steps:
    completions, chosen = step.get('completions') or [], step.get('chosen_completion')
    human = step.get('human_completion')
    if chosen is None and human:  # Written by a person where all completions were wrong.
      path.append({'text': human.get('text') if isinstance(human, dict) else human, 'label': 1})
      continue
    if not completions or not isinstance(chosen or 0, int) or not 0 <= (chosen or 0) < len(completions):
      break
    completion = completions[chosen or 0]
    if completion.get('rating') is None:
      break
    path.append({'text': completion.get('text'), 'label': _rating(completion['rating'])})
    if chosen is None:
      break
  return path


def _math_shepherd_steps(text, labels):
  """Return (prompt, steps) of Math-Shepherd's two texts: one with marks, the same with + or - in place of them."""
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


def join_steps(steps):
  """Return the text of the assistant message."""
  return SEPARATOR.join(step['text'] for step in steps)


def label_columns(tokenizer, ids, mask, steps):
  """Return {'loss_mask', 'step_labels'}, float32 [n] each: 1 and the label at the target behind each step, else 0.

  ids, mask: a rendered conversation in which only the message of the steps is trained.  Raises TemplateError where the
  chat template changes the text of that message.
  """
  trained, text = np.flatnonzero(mask > 0), join_steps(steps).encode()
  inside, end = trained[:-1], trained[-1]  # The token that ends the message is trained, too.
  parts = [tokenizer.decode_bytes(i) for i in ids[inside]]
  rendered = b''.join(parts)
  if rendered.strip() != text.strip():
    raise TemplateError("the chat template changes the assistant's text, so that the ends of steps cannot be found; "
                        'choose another template')
  # A template may strip white space at the beginning and the end.
  lead = len(text) - len(text.lstrip()) - (len(rendered) - len(rendered.lstrip()))
  ends = np.cumsum([len(p) for p in parts]) + lead
  loss_mask, labels, place = np.zeros(len(ids), np.float32), np.zeros(len(ids), np.float32), 0
  for step in steps:
    place += len(step['text'].encode())
    behind = int(np.searchsorted(ends, place, 'right'))  # The token with the separator's byte.
    target = inside[behind] if behind < len(inside) else end
    loss_mask[target], labels[target] = 1.0, step['label']
    place += len(SEPARATOR.encode())
  return {'loss_mask': loss_mask, 'step_labels': labels}


def find_ends(tokenizer, ids):
  """Return the indices of the tokens that follow the steps of a completion, as in `label_columns`.

  ids: int [n], without the token that ends the message; so the last index may be n.  Steps end at line breaks.
  """
  parts = [tokenizer.decode_bytes(i) for i in ids]
  text, ends = b''.join(parts), np.cumsum([len(p) for p in parts], dtype=int)
  stripped = text.rstrip()
  breaks = [match.start() for match in re.finditer(rb'(?<=\S)\s*\n', stripped)]
  last = int(np.searchsorted(ends, len(stripped))) + 1 if stripped else 0
  return [int(np.searchsorted(ends, place, 'right')) for place in breaks] + [last]
