"""Preparing a corpus: documents, tokenizer, tokens, manifest; each step once, each step atomic.

The work is done in `<folder>.unfinished`, which becomes `<folder>` in one rename when everything is
there.  A run that was killed goes on after its last finished step.
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
from llmjax.data import conversations, prepared, python_docs, splits, text_files, tokens
from llmjax.data.documents import Document, Limits, Rejected
from llmjax.data.spec import PrepareSpec
from llmjax.text.chat import PLAIN
from llmjax.text.template_path import split_template

# With fewer files (or records) than this, held-out text is drawn from parts of files.
_FEW_FILES = 20


def prepare(spec: PrepareSpec, *, force=False, progress=lambda *args: None):
  """Prepares spec.folder; returns (manifest, True if there was nothing to do).

  progress(step, done, total): called often; total is None where it is unknown.  Raises ConfigError.
  """
  folder = pathlib.Path(spec.folder)
  request = _request(spec)
  if prepared.is_prepared(folder) and not force:
    return _check_finished(folder, request), True
  if folder.exists() and not prepared.is_prepared(folder) and (
      not folder.is_dir() or any(folder.iterdir())):
    raise ConfigError([f'{folder} exists and is not a prepared folder; it is left as it is: choose '
                       'another --config.output'])
  unfinished = folder.with_name(folder.name + '.unfinished')
  try:
    unfinished.mkdir(parents=True, exist_ok=True)
  except OSError as e:
    raise ConfigError([f'{folder} cannot be written: {e.strerror}; choose another --config.output']) from e
  with _locked(unfinished):
    _start_or_resume(unfinished, request, force)
    try:
      found = _write_documents(spec, unfinished, progress)
    except ConfigError:
      shutil.rmtree(unfinished)  # There is nothing to go on from.
      raise
    tokenizer = tokens.make_tokenizer(spec, unfinished, progress)
    manifest = tokens.write_tokens(spec, unfinished, tokenizer, found, request, progress)
    _write_json(prepared.manifest_path(unfinished), manifest)
    for name in ('request.json', 'documents.json', 'refused.jsonl', 'lock'):
      (unfinished / name).unlink(missing_ok=True)
    _swap(unfinished, folder)
  return manifest, False


def _request(spec):
  """Returns what decides the outcome: the settings, and the state of the input."""
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
  if os.path.isfile(template := split_template(spec.template)[0]):
    request['template_sha256'] = prepared.file_sha256(template)
  if spec.tokenizer.path:
    request['tokenizer_sha256'] = prepared.file_sha256(spec.tokenizer.path)
  return request


def _check_finished(folder, request):
  """Returns the manifest of a finished folder; raises ConfigError if it holds something else."""
  try:
    manifest = prepared.read_manifest(folder)
  except ValueError as e:
    raise ConfigError([str(e)]) from e
  old, new = (_flat(r) for r in (manifest['request'], request))
  # A setting that only one of them knows came with another version of the program.
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
  """Holds a folder for this process; raises ConfigError when another one has it."""
  with open(folder / 'lock', 'w') as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
      raise ConfigError([f'another `llmjax prepare` is at work in {folder}; wait for it, or choose '
                         'another --config.output']) from e
    yield


def _start_or_resume(folder, request, force):
  """Empties an unfinished folder unless it was begun with this very request."""
  path = folder / 'request.json'
  with contextlib.suppress(OSError, ValueError):
    if json.loads(path.read_text()) == request and not force:
      return
  for item in folder.iterdir():
    if item.name != 'lock':
      shutil.rmtree(item) if item.is_dir() else item.unlink()
  _write_json(path, request)


def _write_json(path, value):
  """Writes a file that is either whole or absent."""
  partial = path.with_name(path.name + '.partial')
  with open(partial, 'w', encoding='utf-8') as f:
    f.write(json.dumps(value, indent=2, sort_keys=True) + '\n')
    f.flush()
    os.fsync(f.fileno())
  os.replace(partial, path)


def _swap(new, folder):
  """Puts the new folder in the place of the old one, if there is one."""
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
  """What a first reading of the input found; lists have one entry a document.

  digests: of the text without white space and case that differ.  units: uint64 [n], equal for what must not be divided
  between splits: the file of plain text, the prompt of completions, else the record.
  """

  digests: list = dataclasses.field(default_factory=list)
  units: list | np.ndarray = dataclasses.field(default_factory=list)
  sizes: list = dataclasses.field(default_factory=list)
  fixed: list = dataclasses.field(default_factory=list)
  rejected: list = dataclasses.field(default_factory=list)
  files: set = dataclasses.field(default_factory=set)
  found: text_files.Found = dataclasses.field(default_factory=text_files.Found)
  unused: collections.Counter = dataclasses.field(default_factory=collections.Counter)  # Names of records' fields.


def _read(spec, found=None, unused=None):
  """Yields the Documents and the Rejected of the source that the spec names."""
  is_text = spec.records == 'text'
  limits = Limits(
      tuple(spec.suffixes) if is_text else conversations.SUFFIXES, spec.text_key or 'text', spec.document_bytes,
      spec.max_record_bytes, spec.max_unpacked_bytes, spec.max_unpacked_ratio, spec.follow_links,
      None if is_text else conversations.normaliser(spec.records, unused, spec.train_history,
                                                    dialogues=spec.template != PLAIN), spec.max_window_bytes)
  if spec.source == 'python_docs':
    yield from python_docs.read_python_docs(include_site_packages=spec.include_site_packages)
  elif spec.source == 'text_dir':
    yield from text_files.read_files(spec.path, limits, found)
  else:
    from llmjax.data import tfds_source

    yield from tfds_source.read_tfds(spec.name, spec.text_key, limits)


def _scan(spec, progress):
  """Reads the input once; keeps about 500 bytes of memory a document."""
  scan, keys = _Scan(), []
  for item in _read(spec, scan.found, scan.unused):
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
  """Returns 16 bytes that are equal for documents that count as copies."""
  return splits.text_digest(splits.normal(item.text) if spec.records == 'text' else conversations.normal(item.text))


def _keys(spec, item, digest):
  """Returns the hashes of what a document must not be divided from, one or more."""
  digests = [] if spec.records == 'text' else [splits.text_digest(p) for p in conversations.prompts(item.text)]
  return tuple(_unit(d) for d in digests or [digest if item.record else splits.text_digest(item.file)])


def _unit(digest):
  return int.from_bytes(digest[:8], 'big')


def _write_documents(spec, folder, progress):
  """Reads the input, splits it, writes the TFDS dataset; returns the counts for the manifest."""
  path = folder / 'documents.json'
  if path.is_file():
    return json.loads(path.read_text())
  scan = _scan(spec, progress)
  if not scan.digests:
    raise ConfigError([_nothing_found(spec, scan)])
  counts = {'files': len(scan.files), 'ignored_files': dict(sorted(scan.found.ignored.items()))}
  if spec.source == 'text_dir' and spec.records == 'text' and len(set(scan.units.tolist())) < _FEW_FILES:
    # Whole files would be too coarse: cut them so that a few per cent are a few documents.
    size = max(1024, min(spec.document_bytes, sum(scan.sizes) // 40))
    if size != spec.document_bytes:
      spec = dataclasses.replace(spec, document_bytes=size)
      scan = _scan(spec, progress)
    scan.units = np.array([_unit(digest) for digest in scan.digests], np.uint64)
  counts |= {'document_bytes': spec.document_bytes, 'unused_fields': dict(sorted(scan.unused.items()))}
  codes = _assign(spec, scan)
  (folder / 'refused.jsonl').write_text(tokens.json_lines(scan.rejected), encoding='utf-8')
  wanted = [name for name, code in splits.CODES.items() if np.any(codes == code)]
  total = int(sum(np.sum(codes == splits.CODES[name]) for name in wanted))
  written = itertools.count(1)

  def select(name):
    documents = (item for item in _read(spec) if isinstance(item, Document))
    for number, item in enumerate(documents):
      if number >= len(codes) or _digest(spec, item) != scan.digests[number]:
        raise ConfigError([f'{item.file} changed while it was read; start again'])
      if codes[number] == splits.CODES[name]:
        progress('documents', next(written), total)
        yield item.name, item.text

  from llmjax.data import builders

  kind = builders.PythonDocs if spec.source == 'python_docs' else builders.LocalText
  shutil.rmtree(prepared.documents_path(folder), ignore_errors=True)
  builders.write_documents(prepared.documents_path(folder), kind,
                           {name: functools.partial(select, name) for name in wanted})
  lost = [r for r in scan.rejected if not r.kept]
  reasons = collections.Counter(tokens.kind_of(r.reason) for r in lost)
  counts |= {
      'splits': wanted,
      'duplicates': {'repeated': int(np.sum(codes == splits.DUPLICATE)),
                     'train_copies_of_held_out': int(np.sum(codes == splits.LEAK))},
      'quarantine': {'records': len(lost), 'reasons': dict(sorted(reasons.items())),
                     'byte_order_marks_removed': len(scan.rejected) - len(lost)}}
  _write_json(path, counts)
  return counts


def _assign(spec, scan):
  """Returns the split code of each document; raises ConfigError when none can be held out."""
  codes = np.array([splits.CODES.get(split, -1) for split in scan.fixed], np.int8)
  free = np.flatnonzero(codes < 0)
  # A split that the source itself provides is not added to.
  fractions = {'validation': spec.validation_fraction, 'test': spec.test_fraction}
  fractions = {name: 0.0 if np.any(codes == splits.CODES[name]) else fraction
               for name, fraction in fractions.items()}
  if free.size:
    codes[free] = splits.choose_held_out(
        scan.units[free], np.array(scan.sizes, np.int64)[free],
        fractions['validation'], fractions['test'])
  codes = splits.drop_divided(splits.drop_duplicates(codes, scan.digests), scan.units)
  for name, fraction in fractions.items():
    if free.size and fraction and not np.any(codes == splits.CODES[name]):
      raise ConfigError([
          f'too few different {"documents" if spec.records == "text" else "prompts"} '
          f'({len(set(scan.units.tolist()))}) to hold some out for {name}; '
          f'give more text, or write --config.{name}_fraction=0'])
  return codes


def _nothing_found(spec, scan):
  """Returns the message for an empty corpus: what was looked for, where, and what was there."""
  if spec.source != 'text_dir':
    return f'{spec.name or spec.source}: there is no text in it'
  suffixes = spec.suffixes if spec.records == 'text' else conversations.SUFFIXES
  looked = (f'no {spec.records} found in {spec.path}: looked for {", ".join(suffixes)} (also in .gz, '
            f'.zst, .bz2, .xz, .tar, .zip)')
  if scan.rejected:
    reasons = collections.Counter(r.reason for r in scan.rejected).most_common(3)
    return (f'{looked}; {scan.found.files} such files, but every record was refused: '
            + '; '.join(f'{count} x {reason}' for reason, count in reasons))
  if scan.found.ignored:
    return (f'{looked}; there are only other files: {scan.found.describe_ignored()}; add their '
            "suffixes to --config.suffixes if they are text")
  return f'{looked}; there are no files at all'
