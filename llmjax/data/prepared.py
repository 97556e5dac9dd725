"""Layout and manifest of a prepared folder.  No heavy imports.

    <folder>/manifest.json          counts, hashes, versions; written last: a folder with it is complete
    <folder>/documents/             the text, a TFDS dataset of ArrayRecord files
    <folder>/tokenizer.model        SentencePiece
    <folder>/tokens/<split>/        token ids, and loss masks and labels of conversations; see token_store
    <folder>/quarantine.jsonl       every rejected record, with its place and the reason
"""

import difflib
import hashlib
import json
import os
import pathlib

# 2: the kinds preference and stepwise; loss masks and labels as named columns of the token store.
FORMAT = 2
KINDS = ('text', 'chat', 'preference', 'prompts', 'stepwise')  # Of records.
SPLITS = ('train', 'validation', 'test')
TOKENIZER = 'tokenizer.model'  # In a prepared folder and in a run's.


def manifest_path(folder):
  return pathlib.Path(folder) / 'manifest.json'


def tokenizer_path(folder):
  return pathlib.Path(folder) / TOKENIZER


def tokens_path(folder, split):
  return pathlib.Path(folder) / 'tokens' / split


def documents_path(folder):
  return pathlib.Path(folder) / 'documents'


def quarantine_path(folder):
  return pathlib.Path(folder) / 'quarantine.jsonl'


def is_prepared(folder) -> bool:
  return os.path.isfile(manifest_path(folder))


def read_manifest(folder) -> dict:
  """Return the manifest; raise ValueError with one line where it is missing, damaged or of another version."""
  path = manifest_path(folder)
  try:
    manifest = json.loads(path.read_text(encoding='utf-8'))
  except PermissionError as e:
    raise ValueError(f'{path} cannot be read: {e.strerror}') from e
  except OSError as e:
    raise ValueError(f'{folder} is not a prepared folder: it has no manifest.json') from e
  except (ValueError, RecursionError) as e:
    raise ValueError(f'{path} is damaged ({str(e)[:200]}); prepare the folder again with --force') from e
  if not isinstance(manifest, dict) or manifest.get('format') != FORMAT:
    version = manifest.get('format') if isinstance(manifest, dict) else None
    raise ValueError(f'{path} has format {version}, and this version of llmjax reads format {FORMAT}; prepare the '
                     'folder again with --force')
  if not _is_valid(manifest):
    raise ValueError(f'{path} is damaged; prepare the folder again with --force')
  return manifest


def _has_settings(request):
  """Return whether the recorded settings of `prepare` are of the right types."""
  settings = request.get('settings', {})
  tokenizer = settings.get('tokenizer', {}) if isinstance(settings, dict) else None
  texts = (settings.get(name, '') for name in ('source', 'name', 'path')) if isinstance(settings, dict) else ()
  return isinstance(tokenizer, dict) and all(isinstance(text, str) for text in (tokenizer.get('path', ''), *texts))


def _is_valid(manifest):
  """Return whether a manifest has all fields that are read, of the right types."""
  try:
    tokenizer, quarantine = manifest['tokenizer'], manifest['quarantine']
    splits = manifest['splits'].values()
    counts = [split[name] for split in splits for name in ('documents', 'bytes', 'tokens')]
    counts += [split.get('trained', 0) for split in splits]
    counts += [tokenizer['vocab_size'], quarantine['records'], quarantine['byte_order_marks_removed'],
               *quarantine['reasons'].values(), manifest['duplicates']['repeated'],
               manifest['duplicates']['train_copies_of_held_out'],
               *manifest['ignored_files'].values()]
    texts = [tokenizer['sha256'], *(split['tokens_sha256'] for split in splits)]
    return (all(type(n) is int and n >= 0 for n in counts) and all(isinstance(t, str) for t in texts)
            and all(isinstance(split.get('columns_sha256', {}), dict) for split in splits)
            and isinstance(manifest['request'], dict) and _has_settings(manifest['request']) and kind(manifest) in KINDS
            and set(manifest['splits']) <= set(SPLITS) and isinstance(tokenizer.get('asked_vocab_size', 0), int)
            and isinstance(manifest.get('template'), (dict, type(None))))
  except (KeyError, TypeError, AttributeError):
    return False


def kind(manifest) -> str:
  """Return the kind of a folder's records: text, chat, preference, prompts or stepwise (see `records`)."""
  return manifest.get('records', 'text')


def notes(manifest):
  """Return lines on unused fields, dropped reasoning and unpaired preferences."""
  lines = []
  if unused := manifest.get('unused_fields'):
    shown = [f'{name} ({count:,})' for name, count in sorted(unused.items(), key=lambda item: -item[1])]
    more = [f'{len(shown) - 20} more'] if len(shown) > 20 else []
    lines.append(f'fields not used (number of records): {", ".join(shown[:20] + more)}')
  if unpaired := manifest.get('unpaired'):
    lines.append(f'unpaired preferences, for preference.loss=kto or apo_zero_unpaired: {unpaired:,} completions')
  if dropped := manifest.get('reasoning_dropped'):
    lines.append(f'reasoning dropped, which the template does not render: {dropped:,} records')
  return lines


def near_folders(folder):
  """Return prepared folders in the same place with similar names, nearest first."""
  folder = pathlib.Path(folder)
  try:
    siblings = [p for p in folder.parent.iterdir() if p.name != folder.name and is_prepared(p)]
  except OSError:
    return []
  names = difflib.get_close_matches(folder.name, [p.name for p in siblings], n=2, cutoff=0.6)
  return [str(folder.parent / name) for name in names]


def file_sha256(path) -> str:
  with open(path, 'rb') as f:
    return hashlib.file_digest(f, 'sha256').hexdigest()
