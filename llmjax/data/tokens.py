"""The tokenizer, the token stores and the manifest of a prepared folder."""

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
  """Return the tokenizer, copied or trained on a sample of the train split.  Raises ConfigError."""
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
  """Return the control symbols of a tokenizer to train: those of the config, and the chat template's."""
  template = chat.TEMPLATES.get(spec.template) if spec.records != 'text' else None
  return (*spec.tokenizer.special, *(template.special if template else ()))


def sample_lines(folder, count, seed, records='text') -> list[str]:
  """Sample about `count` non-blank lines of the train split, the same ones for a seed.

  Documents are visited in random order until eight times as many lines were seen; so a large corpus is not read whole,
  and a small one gives lines of every document.
  """
  from llmjax.data import builders

  documents = builders.open_documents(prepared.documents_path(folder), 'train')
  rng, lines = np.random.default_rng(seed), []
  for number in rng.permutation(len(documents)).tolist():
    text = documents[number]['text'].decode()
    text = text if records == 'text' else '\n'.join(conversations.texts_of(text))
    lines += [part for line in text.split('\n') if line.strip() for part in _short(line)]
    if len(lines) >= 8 * count:
      break
  if len(lines) > count:
    lines = [lines[i] for i in np.sort(rng.choice(len(lines), count, replace=False)).tolist()]
  return lines


def _short(line, size=512):
  """Yield a line in parts of at most `size` characters, cut before a space where there is one.

  Training time grows with characters: a sample of paragraphs must not be a hundred times larger than one of code.
  """
  start = 0
  while len(line) - start > size:
    space = line.rfind(' ', start + 1, start + size + 1)
    end = space if space > start else start + size
    yield line[start:end]
    start = end
  yield line[start:]


def write_tokens(spec, folder, tokenizer, counts, request, progress):
  """Encode every split into its token store; return the manifest.

  counts: as `corpus` stores them in documents.json.  Raises ConfigError: a template that the tokenizer does not fit, a
  conversation without a trained token, a split of which every record is rejected.
  """
  shutil.rmtree(folder / 'tokens', ignore_errors=True)
  rejected, untrained, template = [], [], None
  with contextlib.ExitStack() as stack:
    encoder = None
    if spec.records != 'text':
      try:
        chat_format = stack.enter_context(chat.ChatFormat(spec.template, tokenizer, spec.reasoning == 'drop'))
        _ = chat_format.stop_ids  # Fails at once where the template does not fit the tokenizer.
      except chat.TemplateError as e:
        raise ConfigError([f'template={spec.template}: {e}']) from e
      encoder = conversations.Encoder(spec.records, chat_format)
      template = chat_format.template and dataclasses.asdict(chat_format.template)
    split_counts = {split: _write_split(folder, split, spec.records, tokenizer, encoder, rejected, untrained, progress)
                    for split in counts['splits']}
  if untrained:
    raise ConfigError(_nothing_to_train(spec, untrained))
  if problems := _empty_splits(spec, split_counts, rejected):
    raise ConfigError(problems)
  _add_to_quarantine(folder, counts['quarantine'], rejected)
  kind = {} if encoder is None else {
      'records': spec.records, 'template': template, 'reasoning_dropped': encoder.reasoning_dropped,
      'unpaired': encoder.unpaired}
  packages = ('numpy', 'sentencepiece', 'tensorflow-datasets', 'array_record')
  return {
      'format': prepared.FORMAT,
      'name': secrets.hide(pathlib.Path(spec.folder).name),
      'source': spec.source,
      **kind,
      'request': request,
      'splits': split_counts,
      'tokenizer': {'sha256': tokenizer.sha256, 'vocab_size': tokenizer.vocab_size,
                    'asked_vocab_size': 0 if spec.tokenizer.path else spec.tokenizer.vocab_size,
                    'bos_id': tokenizer.bos_id, 'eos_id': tokenizer.eos_id,
                    'pad_id': tokenizer.pad_id},
      **{k: v for k, v in counts.items() if k != 'splits'},
      'versions': {'llmjax': llmjax.__version__, 'python': platform.python_version(),
                   **{p: importlib.metadata.version(p) for p in packages}}}


def _write_split(folder, split, kind, tokenizer, encoder, rejected, untrained, progress):
  """Encode the documents of a split; return its entry of the manifest.

  encoder: of records, None for text.  rejected, untrained: lists that gain a Rejected or a line of text for a record.
  """
  from llmjax.data import builders

  documents = builders.open_documents(prepared.documents_path(folder), split)
  digest, num_bytes = hashlib.sha256(), 0
  with token_store.TokenStoreWriter(
      prepared.tokens_path(folder, split), vocab_size=tokenizer.vocab_size, bos_id=tokenizer.bos_id,
      eos_id=tokenizer.eos_id, columns=conversations.COLUMNS[kind]) as store:
    for number, item in enumerate(builders.iterate(documents)):
      name, text = item['id'].decode(), item['text'].decode()
      reason, size = None, len(item['text'])
      try:
        if encoder is None:
          reason = store.add(tokenizer.encode(text))
        else:
          reason, size = encoder.add(store, text)
      except conversations.Untrained as e:
        untrained.append(f'{name} {e}')
      if reason:
        rejected.append(Rejected(name, reason, bytes=len(item['text'])))
      else:
        num_bytes += size
      for field in (item['id'], item['text']):
        digest.update(len(field).to_bytes(8, 'big') + field)
      progress(f'tokens of {split}', number + 1, len(documents))
    if encoder is not None:
      encoder.flush(store)
  return {'documents': store.meta['documents'], 'bytes': num_bytes, 'tokens': store.meta['tokens'],
          'records_sha256': digest.hexdigest(),
          **{k: v for k, v in store.meta.items() if k.endswith('_sha256') or k == 'trained'}}


def _add_to_quarantine(folder, quarantine, rejected):
  """Write quarantine.jsonl, and add the records that could not be encoded to the counts of a manifest."""
  earlier = (folder / 'refused.jsonl').read_text(encoding='utf-8')
  prepared.quarantine_path(folder).write_text(earlier + json_lines(rejected), encoding='utf-8')
  quarantine['records'] += len(rejected)
  for reason, count in collections.Counter(kind_of(r.reason) for r in rejected).items():
    reason = 'token id outside the vocabulary' if reason.startswith('token id') else reason
    quarantine['reasons'][reason] = quarantine['reasons'].get(reason, 0) + count


def _nothing_to_train(spec, untrained):
  """Return the problem lines for conversations without a trained token."""
  advice = ('end each conversation with a message of the assistant whose weight is above 0'
            if spec.template in (*chat.TEMPLATES, chat.PLAIN) else
            f'{spec.template} must have {{% generation %}} and {{% endgeneration %}} around the assistant\'s text')
  more = [f'... and {len(untrained) - 3:,} more'] if len(untrained) > 3 else []
  return [*untrained[:3], *more, advice]


def _empty_splits(spec, split_counts, rejected):
  """Return the problem lines for splits without a document."""
  empty = [name for name, split in split_counts.items() if not split['documents']]
  if not empty or not rejected:
    return []
  reasons = collections.Counter(item.reason for item in rejected).most_common(3)
  return [f'{spec.records}: every record of {", ".join(empty)} was rejected, so nothing is prepared: '
          + '; '.join(f'{count} x {reason}' for reason, count in reasons)]


def json_lines(rejected):
  """Return one line of JSON for each Rejected, without empty fields."""
  entries = ({k: v for k, v in dataclasses.asdict(item).items() if v is not None and v is not False}
             for item in rejected)
  return ''.join(json.dumps(secrets.hide_within(entry)) + '\n' for entry in entries)


def kind_of(reason):
  """Return a reason without its details, for counting."""
  return reason.split(' (')[0].split(':')[0]
