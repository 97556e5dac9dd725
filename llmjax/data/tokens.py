"""From a prepared folder's documents to its tokenizer, its token stores and its manifest."""

import collections
import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import shutil

import numpy as np

import llmjax
from llmjax import secrets
from llmjax.config import ConfigError
from llmjax.data import conversations, prepared, token_store
from llmjax.data.documents import Rejected
from llmjax.text import chat
from llmjax.text import tokenizer as tokenizers


def make_tokenizer(spec, folder, progress):
  """Returns the tokenizer, copied or trained on a sample of the train split."""
  path = prepared.tokenizer_path(folder)
  if not path.is_file():
    if spec.tokenizer.path:
      model = pathlib.Path(spec.tokenizer.path).read_bytes()
    else:
      progress('tokenizer', 0, None)
      lines = sample_lines(folder, spec.tokenizer.sample_lines, spec.tokenizer.seed, spec.records)
      try:
        model = tokenizers.train_tokenizer(
            lines, vocab_size=spec.tokenizer.vocab_size, model_type=spec.tokenizer.model_type,
            num_threads=spec.tokenizer.num_threads, special=_special(spec))
      except ValueError as e:
        raise ConfigError([str(e)]) from e
    partial = path.with_name(path.name + '.partial')
    partial.write_bytes(model)
    os.replace(partial, path)
  tokenizer = tokenizers.Tokenizer(path)
  try:
    _ = tokenizer.vocab_size
  except ValueError as e:
    path.unlink()
    raise ConfigError([str(e)]) from e
  return tokenizer


def _special(spec):
  """Returns the control symbols of a tokenizer to train: those asked for, and the template's."""
  template = chat.TEMPLATES.get(spec.template) if spec.records != 'text' else None
  return (*spec.tokenizer.special, *(template.special if template else ()))


def sample_lines(folder, count, seed, records='text') -> list[str]:
  """Returns about `count` lines of the train split, the same ones each time, blank ones left out.

  Documents are visited in a random order until eight times as many lines were seen; so a large
  corpus is not read whole, and a small one gives lines of every document.
  """
  from llmjax.data import builders

  documents = builders.open_documents(prepared.documents_path(folder), 'train')
  rng, lines = np.random.default_rng(seed), []
  for number in rng.permutation(len(documents)).tolist():
    text = documents[number]['text'].decode()
    text = text if records == 'text' else '\n'.join(conversations.texts(text))
    lines += [part for line in text.split('\n') if line.strip() for part in _short(line)]
    if len(lines) >= 8 * count:
      break
  if len(lines) > count:
    lines = [lines[i] for i in np.sort(rng.choice(len(lines), count, replace=False)).tolist()]
  return lines


def _short(line, size=512):
  """Yields a line in parts of at most `size` characters, cut before a space where there is one.

  Training time goes with characters: paragraphs must not make a sample of lines a hundred times
  larger than code does.
  """
  start = 0
  while len(line) - start > size:
    space = line.rfind(' ', start + 1, start + size + 1)
    end = space if space > start else start + size
    yield line[start:end]
    start = end
  yield line[start:]


def write_tokens(spec, folder, tokenizer, found, request, progress):
  """Encodes every split; returns the manifest."""
  from llmjax.data import builders

  shutil.rmtree(folder / 'tokens', ignore_errors=True)
  splits_found, refused, untrained, template, unpaired = {}, [], [], None, 0
  is_text = spec.records == 'text'
  with contextlib.ExitStack() as stack:
    if not is_text:
      try:
        shape = stack.enter_context(chat.ChatFormat(spec.template, tokenizer, spec.reasoning == 'drop'))
        _ = shape.stop_ids  # Finds out at once whether the template suits the tokenizer.
      except chat.TemplateError as e:
        raise ConfigError([f'template={spec.template}: {e}']) from e
      encode = conversations.Encoder(spec.records, shape)
      template = shape.template and dataclasses.asdict(shape.template)
    for split in found['splits']:
      documents = builders.open_documents(prepared.documents_path(folder), split)
      records, size = hashlib.sha256(), 0
      with token_store.TokenStoreWriter(
          prepared.tokens_path(folder, split), vocab_size=tokenizer.vocab_size, bos_id=tokenizer.bos_id,
          eos_id=tokenizer.eos_id, weighted=not is_text) as store:
        halves = _Halves(store, tokenizer)
        for number, item in enumerate(builders.iterate(documents)):
          name, text = item['id'].decode(), item['text'].decode()
          if is_text:
            reason, count = store.add(tokenizer.encode(text)), len(item['text'])
          else:
            reason, count = _add_conversation(store, encode, name, text, untrained, halves)
          if reason:
            refused.append(Rejected(name, reason, bytes=len(item['text'])))
          else:
            size += count
          for field in (item['id'], item['text']):
            records.update(len(field).to_bytes(8, 'big') + field)
          progress(f'tokens of {split}', number + 1, len(documents))
        unpaired += halves.finish()
      splits_found[split] = {
          'documents': store.meta['documents'], 'bytes': size, 'tokens': store.meta['tokens'],
          'records_sha256': records.hexdigest(),
          **{k: v for k, v in store.meta.items() if k.endswith('_sha256') or k == 'trained'}}
  if untrained:
    raise ConfigError(_nothing_to_train(spec, untrained))
  if problems := _empty_splits(spec, splits_found, refused):
    raise ConfigError(problems)
  before = (folder / 'refused.jsonl').read_text(encoding='utf-8')
  prepared.quarantine_path(folder).write_text(before + json_lines(refused), encoding='utf-8')
  if refused:
    found['quarantine']['records'] += len(refused)
    for reason, count in collections.Counter(kind_of(r.reason) for r in refused).items():
      reason = 'token id outside the vocabulary' if reason.startswith('token id') else reason
      reasons = found['quarantine']['reasons']
      reasons[reason] = reasons.get(reason, 0) + count
  packages = ('numpy', 'sentencepiece', 'tensorflow-datasets', 'array_record')
  return {
      'format': prepared.FORMAT,
      'name': secrets.hide(pathlib.Path(spec.folder).name),
      'source': spec.source,
      **({} if is_text else {'records': spec.records, 'template': template,
                             'reasoning_dropped': encode.reasoning_dropped, 'unpaired': unpaired}),
      'request': request,
      'splits': splits_found,
      'tokenizer': {'sha256': tokenizer.sha256, 'vocab_size': tokenizer.vocab_size,
                    'asked_vocab_size': 0 if spec.tokenizer.path else spec.tokenizer.vocab_size,
                    'bos_id': tokenizer.bos_id, 'eos_id': tokenizer.eos_id,
                    'pad_id': tokenizer.pad_id},
      **{k: v for k, v in found.items() if k != 'splits'},
      'versions': {'llmjax': llmjax.__version__, 'python': platform.python_version(),
                   **{p: importlib.metadata.version(p) for p in packages}}}


def _add_conversation(store, encode, name, text, untrained, halves):
  """Appends a conversation's documents; returns (why it was refused or None, bytes of its text).

  untrained: a list that gains a line where there is nothing to train.  halves: where unpaired preferences go.
  """
  try:
    made, size = encode(text)
  except chat.TemplateError as e:
    return str(e), 0
  if encode.kind != 'prompts':
    for ids, weights in made:
      if not np.any(weights[1:]):
        untrained.append(conversations.untrained(name, encode.chat, ids))
        return None, size
  label = conversations.label_of(encode.kind, text)
  if label is not None:
    return halves.add(label, made[0]), size
  note = conversations.note_of(encode.kind, text)
  for ids, weights in made:
    if reason := store.add_weighted(ids, weights, note):
      return reason, 0
  return None, size


class _Halves:
  """Stores unpaired preferences as pairs: a good completion beside a bad one, to different prompts.

  Each counts by itself in the losses that take them.  What has no other half at the end gets one without a trained
  token.  Holds the tokens of those that wait for another half: of all, where a file has all good ones first.
  """

  def __init__(self, store, tokenizer):
    self._store, self._waiting, self._count = store, {True: collections.deque(), False: collections.deque()}, 0
    self._nothing = np.array([tokenizer.bos_id, tokenizer.eos_id], np.int32), np.zeros(2, np.float32)

  def add(self, good, document):
    """Stores a completion's (ids, weights), at once or later; returns why one is refused, or None."""
    self._count += 1
    self._waiting[good].append(document)
    if not self._waiting[not good]:
      return None
    return self._store_pair(*(self._waiting[half].popleft() for half in (True, False)))

  def finish(self):
    """Stores what waits; returns how many completions there were."""
    for good, waiting in self._waiting.items():
      for document in waiting:
        self._store_pair(*((document, self._nothing) if good else (self._nothing, document)))
    return self._count

  def _store_pair(self, *halves):
    reasons = [self._store.add_weighted(*half, {}) for half in halves]
    return next(filter(None, reasons), None)


def _nothing_to_train(spec, untrained):
  """Returns the problem lines for conversations without a trained token."""
  advice = ('end each conversation with a message of the assistant whose weight is above 0'
            if spec.template in (*chat.TEMPLATES, chat.PLAIN) else
            f'{spec.template} must have {{% generation %}} and {{% endgeneration %}} around what the assistant says')
  more = [f'... and {len(untrained) - 3:,} more'] if len(untrained) > 3 else []
  return [*untrained[:3], *more, advice]


def _empty_splits(spec, splits_found, refused):
  """Returns the problem lines for splits of which no document was left."""
  empty = [name for name, split in splits_found.items() if not split['documents']]
  if not empty or not refused:
    return []
  reasons = collections.Counter(item.reason for item in refused).most_common(3)
  return [f'{spec.records}: every record of {", ".join(empty)} was refused, so nothing is prepared: '
          + '; '.join(f'{count} x {reason}' for reason, count in reasons)]


def json_lines(rejected):
  """Returns a JSON object a line for each Rejected, without the fields that say nothing."""
  entries = ({k: v for k, v in dataclasses.asdict(item).items() if v is not None and v is not False}
             for item in rejected)
  return ''.join(json.dumps(secrets.hide_within(entry)) + '\n' for entry in entries)


def kind_of(reason):
  """Returns a reason without its particulars, to count by."""
  return reason.split(' (')[0].split(':')[0]
