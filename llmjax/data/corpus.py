"""Prepare a corpus: documents, tokenizer, tokens, manifest; every step is atomic.

The work is done in `<folder>.unfinished`, which is renamed to `<folder>` when it is complete.  An interrupted run
resumes after its last finished step.
"""

import collections
import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import itertools
import json
import os
import pathlib
import shutil

import numpy as np

from llmjax import secrets
from llmjax.config import ConfigError, to_dict
from llmjax.data import conversations, prepared, python_docs, records, splits, text_files, tokens, user_source
from llmjax.data.documents import Document, Limits, Rejected
from llmjax.data.spec import SOURCES, PrepareSpec
from llmjax.text.chat import PLAIN
from llmjax.text.template_path import split_template

# With fewer files than this, parts of files are held out.
_FEW_FILES = 20


def prepare(spec: PrepareSpec, *, force=False, progress=lambda *args: None):
  """Prepare spec.folder; return (manifest, whether it was prepared already).

  force: prepare a finished folder again.  progress(step, done, total): called often; total is None where it is unknown.
  Raises ConfigError.
  """
  folder = pathlib.Path(spec.folder)
  request = _request(spec)
  if prepared.is_prepared(folder) and not force:
    return _check_finished(folder, request), True
  if folder.exists() and not prepared.is_prepared(folder) and (
      not folder.is_dir() or any(folder.iterdir())):
    raise ConfigError([f'{folder} exists and is not a prepared folder; choose another --config.output'])
  unfinished = folder.with_name(folder.name + '.unfinished')
  try:
    unfinished.mkdir(parents=True, exist_ok=True)
  except OSError as e:
    raise ConfigError([f'{folder} cannot be written: {e.strerror}; choose another --config.output']) from e
  with _locked(unfinished):
    _start_or_resume(unfinished, request, force)
    try:
      counts = _write_documents(spec, unfinished, progress)
    except ConfigError:
      shutil.rmtree(unfinished)  # There is nothing to resume from.
      raise
    tokenizer = tokens.make_tokenizer(spec, unfinished, progress)
    manifest = tokens.write_tokens(spec, unfinished, tokenizer, counts, request, progress)
    _write_json(prepared.manifest_path(unfinished), manifest)
    for name in ('request.json', 'documents.json', 'refused.jsonl', 'lock'):
      (unfinished / name).unlink(missing_ok=True)
    _swap(unfinished, folder)
  return manifest, False


def _request(spec):
  """Return everything that decides the result: the settings, and fingerprints of the input."""
  settings = to_dict(spec)
  settings.pop('output')
  request = {'settings': settings, 'format': prepared.FORMAT}
  if spec.source == 'text_dir':
    settings['path'] = secrets.hide(os.path.abspath(spec.path))
    digest = hashlib.sha256()
    for file in text_files.list_files(spec.path):
      with contextlib.suppress(OSError):
        stat = os.stat(file)
        name = text_files.readable_name(os.path.relpath(file, spec.path))
        digest.update(f'{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n'.encode())
    request['files_sha256'] = digest.hexdigest()
  elif spec.source == 'python_docs':
    request['python'] = python_docs.version()
  elif spec.source not in SOURCES and (digest := user_source.fingerprint(spec.source)):
    request['source_sha256'] = digest
  if os.path.isfile(template := split_template(spec.template)[0]):
    request['template_sha256'] = prepared.file_sha256(template)
  if spec.tokenizer.path:
    request['tokenizer_sha256'] = prepared.file_sha256(spec.tokenizer.path)
  return request


def _check_finished(folder, request):
  """Return the manifest of a finished folder; raise ConfigError where it was prepared with another request."""
  try:
    manifest = prepared.read_manifest(folder)
  except ValueError as e:
    raise ConfigError([str(e)]) from e
  old, new = (_flat(r) for r in (manifest['request'], request))
  # A setting that only one of them has belongs to another version of the program.
  changed = [f'{k} {old[k]!r}, now {new[k]!r}' for k in sorted({*old} & {*new})
             if old[k] != new[k]]
  if changed:
    changed = ['other input files' if c.startswith('files_sha256') else c for c in changed]
    raise ConfigError([f'{folder} was prepared from something else ({"; ".join(changed)}); add '
                       '--force to prepare it again, or choose another --config.output'])
  return manifest


def _flat(request):
  flat = {}
  for key, value in request.items():
    if isinstance(value, dict):
      flat.update({(k if key == 'settings' else f'{key}.{k}'): v for k, v in _flat(value).items()})
    else:
      flat[key] = value
  return flat


@contextlib.contextmanager
def _locked(folder):
  """Lock a folder; raise ConfigError where another process holds it."""
  with open(folder / 'lock', 'w') as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
      raise ConfigError([f'another `llmjax prepare` is writing to {folder}; wait for it, or choose '
                         'another --config.output']) from e
    yield


def _start_or_resume(folder, request, force):
  """Empty an unfinished folder unless it was started with the same request."""
  path = folder / 'request.json'
  with contextlib.suppress(OSError, ValueError):
    if json.loads(path.read_text()) == request and not force:
      return
  for item in folder.iterdir():
    if item.name != 'lock':
      shutil.rmtree(item) if item.is_dir() else item.unlink()
  _write_json(path, request)


def _write_json(path, value):
  """Write a JSON file atomically."""
  partial = path.with_name(path.name + '.partial')
  with open(partial, 'w', encoding='utf-8') as f:
    f.write(json.dumps(value, indent=2, sort_keys=True) + '\n')
    f.flush()
    os.fsync(f.fileno())
  os.replace(partial, path)


def _swap(new, folder):
  """Replace the old folder, if there is one, by the new one."""
  old = folder.with_name(folder.name + '.old')
  if old.exists():
    shutil.rmtree(old)
  if folder.exists():
    os.rename(folder, old)
  os.rename(new, folder)
  if old.exists():
    shutil.rmtree(old)


# Documents


@dataclasses.dataclass
class _Scan:
  """Results of the first pass over the input; lists have one entry for each document.

  digests: of the normalised text.  units: uint64 [n], equal for what must stay in one split: the file of plain text,
  the prompt of completions, else the record.  fixed: the split that the source assigns, or ''.  unused: names of unused
  fields of records.
  """

  digests: list = dataclasses.field(default_factory=list)
  units: list | np.ndarray = dataclasses.field(default_factory=list)
  sizes: list = dataclasses.field(default_factory=list)
  fixed: list = dataclasses.field(default_factory=list)
  rejected: list = dataclasses.field(default_factory=list)
  files: set = dataclasses.field(default_factory=set)
  listing: text_files.Listing = dataclasses.field(default_factory=text_files.Listing)
  unused: collections.Counter = dataclasses.field(default_factory=collections.Counter)


def _read(spec, listing=None, unused=None):
  """Yield the Documents and the Rejected of the source."""
  is_text = spec.records == 'text'
  limits = Limits(
      suffixes=tuple(spec.suffixes) if is_text else records.SUFFIXES, text_key=spec.text_key or 'text',
      document_bytes=spec.document_bytes, max_record_bytes=spec.max_record_bytes,
      max_unpacked_bytes=spec.max_unpacked_bytes, max_unpacked_ratio=spec.max_unpacked_ratio,
      max_window_bytes=spec.max_window_bytes, follow_links=spec.follow_links,
      normalise=None if is_text else records.normaliser(spec.records, unused, spec.train_history,
                                                        dialogues=spec.template != PLAIN))
  if spec.source == 'python_docs':
    yield from python_docs.read_python_docs(include_site_packages=spec.include_site_packages)
  elif spec.source == 'text_dir':
    yield from text_files.read_files(spec.path, limits, listing)
  elif spec.source == 'tfds':
    from llmjax.data import tfds_source

    yield from tfds_source.read_tfds(spec.name, spec.text_key, limits)
  else:
    yield from user_source.read_records(spec, limits)


def _scan(spec, progress):
  """Read the input once; takes about 500 bytes of memory a document."""
  scan, keys = _Scan(), []
  for item in _read(spec, scan.listing, scan.unused):
    if isinstance(item, Rejected):
      scan.rejected.append(item)
      continue
    digest = _digest(spec, item)
    scan.digests.append(digest)
    keys.append(_keys(spec, item, digest))
    scan.sizes.append(len(item.text.encode()))
    scan.fixed.append(item.split)
    scan.files.add(item.file)
    if len(scan.digests) % 64 == 0:
      progress('reading', len(scan.digests), None)
  progress('reading', len(scan.digests), None)
  scan.units = splits.join_units(keys)
  return scan


def _digest(spec, item):
  """Return 16 bytes that are equal for duplicates."""
  normalise = splits.normalise if spec.records == 'text' else conversations.normalise_document
  return splits.text_digest(normalise(item.text))


def _keys(spec, item, digest):
  """Return one or more hashes of what must be in the same split as a document."""
  digests = [] if spec.records == 'text' else [splits.text_digest(p) for p in conversations.prompts_of(item.text)]
  return tuple(_unit(d) for d in digests or [digest if item.record else splits.text_digest(item.file)])


def _unit(digest):
  return int.from_bytes(digest[:8], 'big')


def _write_documents(spec, folder, progress):
  """Read the input, assign splits and write the TFDS dataset; return the counts for the manifest."""
  path = folder / 'documents.json'
  if path.is_file():
    return json.loads(path.read_text())
  scan = _scan(spec, progress)
  if not scan.digests:
    raise ConfigError([_nothing_found(spec, scan)])
  counts = {'files': len(scan.files), 'ignored_files': dict(sorted(scan.listing.ignored.items()))}
  if spec.source == 'text_dir' and spec.records == 'text' and len(set(scan.units.tolist())) < _FEW_FILES:
    # Whole files would be too coarse: cut them so that a few per cent are a few documents.
    size = max(1024, min(spec.document_bytes, sum(scan.sizes) // 40))
    if size != spec.document_bytes:
      spec = dataclasses.replace(spec, document_bytes=size)
      scan = _scan(spec, progress)
    scan.units = np.array([_unit(digest) for digest in scan.digests], np.uint64)
  codes = _assign(spec, scan)
  (folder / 'refused.jsonl').write_text(tokens.json_lines(scan.rejected), encoding='utf-8')
  names = [name for name, code in splits.CODES.items() if np.any(codes == code)]
  _write_dataset(spec, folder, scan, codes, names, progress)
  lost = [r for r in scan.rejected if not r.kept]
  reasons = collections.Counter(tokens.kind_of(r.reason) for r in lost)
  counts |= {
      'document_bytes': spec.document_bytes, 'unused_fields': dict(sorted(scan.unused.items())), 'splits': names,
      'duplicates': {'repeated': int(np.sum(codes == splits.DUPLICATE)),
                     'train_copies_of_held_out': int(np.sum(codes == splits.LEAK))},
      'quarantine': {'records': len(lost), 'reasons': dict(sorted(reasons.items())),
                     'byte_order_marks_removed': len(scan.rejected) - len(lost)}}
  _write_json(path, counts)
  return counts


def _write_dataset(spec, folder, scan, codes, names, progress):
  """Write the documents of the named splits as a TFDS dataset.  Raises ConfigError where the input has changed."""
  from llmjax.data import builders

  total = int(sum(np.sum(codes == splits.CODES[name]) for name in names))
  written = itertools.count(1)

  def select(name):
    documents = (item for item in _read(spec) if isinstance(item, Document))
    for number, item in enumerate(documents):
      if number >= len(codes) or _digest(spec, item) != scan.digests[number]:
        raise ConfigError([f'{item.file} changed while it was read; start again'])
      if codes[number] == splits.CODES[name]:
        progress('documents', next(written), total)
        yield item.name, item.text

  kind = builders.PythonDocs if spec.source == 'python_docs' else builders.LocalText
  shutil.rmtree(prepared.documents_path(folder), ignore_errors=True)
  builders.write_documents(prepared.documents_path(folder), kind,
                           {name: functools.partial(select, name) for name in names})


def _assign(spec, scan):
  """Return the split code of each document; raise ConfigError where none can be held out."""
  codes = np.array([splits.CODES.get(split, -1) for split in scan.fixed], np.int8)
  free = np.flatnonzero(codes < 0)
  # A split that the source provides is not extended.
  fractions = {'validation': spec.validation_fraction, 'test': spec.test_fraction}
  fractions = {name: 0.0 if np.any(codes == splits.CODES[name]) else fraction
               for name, fraction in fractions.items()}
  if free.size:
    codes[free] = splits.choose_held_out(
        scan.units[free], np.array(scan.sizes, np.int64)[free],
        fractions['validation'], fractions['test'])
  codes = splits.drop_leaks(splits.drop_duplicates(codes, scan.digests), scan.units)
  for name, fraction in fractions.items():
    if free.size and fraction and not np.any(codes == splits.CODES[name]):
      raise ConfigError([
          f'too few different {"documents" if spec.records == "text" else "prompts"} '
          f'({len(set(scan.units.tolist()))}) to hold some out for {name}; '
          f'give more text, or write --config.{name}_fraction=0'])
  return codes


def _nothing_found(spec, scan):
  """Return the message for an empty corpus: what was searched for, where, and what was there."""
  reasons = collections.Counter(r.reason for r in scan.rejected).most_common(3)
  rejected = f'every record was rejected: {"; ".join(f"{count} x {reason}" for reason, count in reasons)}'
  if spec.source != 'text_dir':
    return f'{spec.name or spec.source}: ' + (rejected if reasons else 'there is no text in it')
  suffixes = spec.suffixes if spec.records == 'text' else records.SUFFIXES
  searched = (f'no {spec.records} found in {spec.path}: searched for {", ".join(suffixes)} (also in .gz, '
              f'.zst, .bz2, .xz, .tar, .zip)')
  if reasons:
    return f'{searched}; {scan.listing.files} such files, but {rejected}'
  if scan.listing.ignored:
    return (f'{searched}; there are only other files: {scan.listing.describe_ignored()}; add their '
            'suffixes to --config.suffixes if they are text')
  return f'{searched}; there are no files at all'
