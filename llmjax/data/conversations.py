"""Normalised records (see `records`) as documents of a token store.

A chat is one document.  A preference is two, the chosen completion at an even number and the rejected one behind it; of
unpaired preferences these are a desirable and an undesirable completion of different prompts.  A prompt is one without
a trained token.  A stepwise solution is one with step labels (see `stepwise`).
"""

import collections
import dataclasses
import json
from typing import Any

import numpy as np

from llmjax.data import splits, stepwise
from llmjax.data.packing import PREFERENCE_COLUMNS
from llmjax.text.chat import ChatFormat
from llmjax.text.templates import TemplateError

__all__ = ['COLUMNS', 'Encoder', 'TemplateError', 'Untrained', 'normalise_document', 'prompts_of', 'texts_of']

# The columns of the token store of each kind.
COLUMNS = {'text': (), 'chat': ('loss_mask',), 'preference': ('loss_mask',), 'prompts': ('loss_mask',),
           'stepwise': ('loss_mask', 'step_labels')}


class Untrained(ValueError):
  """A conversation has no trained token.  The message shows its beginning."""


@dataclasses.dataclass
class _Document:
  """ids: int32 [n].  columns: {name: float32 [n]}.  fields: what is stored with it, or None."""

  ids: np.ndarray
  columns: dict[str, np.ndarray]
  fields: dict[str, Any] | None = None


class Encoder:
  """Encodes records of one kind into a token store at a time.

  reasoning_dropped: records whose reasoning the template left out.  unpaired: unpaired preferences so far.
  """

  def __init__(self, kind, chat: ChatFormat):
    self.kind, self.chat, self.reasoning_dropped, self.unpaired = kind, chat, 0, 0
    self._waiting = {1: collections.deque(), 0: collections.deque()}

  def add(self, store, document):
    """Append a record (JSON) to a TokenStoreWriter; return (why it is rejected or None, bytes of its text).

    An unpaired preference is held back until one with the other label comes.  Raises Untrained.
    """
    record, dropped = json.loads(document), self.chat.reasoning_dropped
    try:
      documents = self._encode(record)
    except TemplateError as e:
      return str(e), 0
    self.reasoning_dropped += self.chat.reasoning_dropped > dropped
    if self.kind != 'prompts':
      for part in documents:
        if not np.any(part.columns['loss_mask'][1:]):
          text = self.chat.marked(part.ids)
          text = text if len(text) <= 300 else f'{text[:200]} ... {text[-80:]}'
          raise Untrained(f'has no trained token: {text!r}')
    if 'label' in record:
      self.unpaired += 1
      documents = self._pair(documents[0])
    for part in documents:
      if problem := store.add_encoded(part.ids, part.columns, part.fields):
        return problem, 0
    return None, sum(len(text.encode()) for text in texts_of(document))

  def flush(self, store):
    """Append the unpaired preferences that are held back, each with an empty document as the other half."""
    ids = np.array([self.chat.tokenizer.bos_id, self.chat.tokenizer.eos_id], np.int32)
    for label, waiting in self._waiting.items():
      empty = _Document(ids, {'loss_mask': np.zeros(2, np.float32)}, {'label': 1 - label})
      for document in waiting:
        for part in (document, empty) if label else (empty, document):
          store.add_encoded(part.ids, part.columns, part.fields)
      waiting.clear()

  def _pair(self, document):
    """Return [desirable, undesirable] where both are there; else hold the document back and return []."""
    label = document.fields['label']
    self._waiting[label].append(document)
    return [self._waiting[one].popleft() for one in (1, 0)] if self._waiting[1 - label] else []

  def _encode(self, record):
    """Return the _Documents of a record.  Raises TemplateError."""
    tools = record.get('tools')
    if self.kind == 'chat':
      return [self._trained(record['messages'], tools)]
    prompt = without_training(record['prompt'])
    if self.kind == 'prompts':
      ids = self.chat.prompt(prompt, tools)
      fields = {name: record[name] for name in ('answer', 'columns') if name in record}
      return [_Document(ids, {'loss_mask': np.zeros(len(ids), np.float32)}, fields)]
    if self.kind == 'stepwise':
      message = {'role': 'assistant', 'content': stepwise.join_steps(record['steps'])}
      ids, mask = self.chat.encode([*prompt, message], tools)
      return [_Document(ids, stepwise.label_columns(self.chat.tokenizer, ids, mask, record['steps']))]
    if 'label' in record:
      return [self._trained(prompt + record['completion'], tools, {'label': int(record['label'])})]
    numbers = {name: record[name] for name in PREFERENCE_COLUMNS if name in record}
    return [self._trained(prompt + record[name], tools, {'label': label, **numbers})
            for name, label in (('chosen', 1), ('rejected', 0))]

  def _trained(self, messages, tools, fields=None):
    ids, mask = self.chat.encode(messages, tools)
    return _Document(ids, {'loss_mask': mask}, fields)


def without_training(messages):
  """Return messages of which the assistant's have weight 0."""
  return [{**m, 'weight': 0} if m['role'] == 'assistant' else m for m in messages]


def texts_of(document):
  """Yield the texts of a document's messages, tool calls and tools: what a tokenizer is trained on.  document: JSON."""
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


def prompts_of(document):
  """Return the prompts whose completions a document holds, as text that is equal for equal prompts.

  A chat has one for each trained message after a user's message.  document: JSON.  See `splits.normalise`.
  """
  record = json.loads(document)
  if 'prompt' in record:
    return [_normalise(record['prompt'])]
  turns = record['messages']
  trained = [i for i, m in enumerate(turns) if m['role'] == 'assistant' and m.get('weight', 1)]
  return [_normalise(turns[:i]) for i in trained if any(m['role'] == 'user' for m in turns[:i])]


def normalise_document(document):
  """Return a document as text that is equal for duplicates (see `splits.normalise`).  document: JSON."""
  return _normalise(json.loads(document))


def _normalise(value):
  def normalise(value):
    if isinstance(value, dict):
      return {k: normalise(v) for k, v in value.items()}
    return [normalise(v) for v in value] if isinstance(value, list) else (
        splits.normalise(value) if isinstance(value, str) else value)

  if isinstance(value, list):  # Prompts that differ only in the weights of their messages are equal.
    value = [{k: v for k, v in message.items() if k != 'weight'} for message in value]
  return json.dumps(normalise(value), ensure_ascii=False, sort_keys=True)
