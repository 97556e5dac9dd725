"""Malformed input of every kind, seeded: each ends with a clear line, nothing else is lost, nothing hangs.

Times of the quick suite are few; the marker `slow` runs the same with other seeds and many more.
"""

import bz2
import contextlib
import gzip
import io
import json
import lzma
import os
import random
import shutil
import signal
import tarfile
import types
import zipfile

import pytest

from llmjax import config, main, recipes
from llmjax.checkpoint import manifest, pickle_guard
from llmjax.data import prepared, text_files, token_store
from llmjax.data.documents import Document, Limits, Rejected
from llmjax.data.spec import DataSpec
from llmjax.text import tokenizer as tokenizers

SECONDS = 5
GOOD = 'This record is good.\n'
ODD = [b'', b'\0', b'\xff', b'\xef\xbb\xbf', b'{', b'}', b'[', b'"', b'-1', b'1e999', b'NaN', b'null', b'true', b'\n',
       b'9' * 400, b'{}', b'[]', b'\\ud800', b'\xf0\x9f', b'\x80\x04', b'a' * 5000, b'[' * 3000,
       b'../', b'/', b'=', b'-']


def times(quick, slow):
  return pytest.mark.parametrize('count', [quick, pytest.param(slow, marks=pytest.mark.slow)])


@contextlib.contextmanager
def at_most(seconds):
  """Fails what takes longer than so much CPU time."""
  def stop(*unused):
    raise AssertionError(f'more than {seconds} s of CPU time')

  before = signal.signal(signal.SIGPROF, stop)
  signal.setitimer(signal.ITIMER_PROF, seconds)
  try:
    yield
  finally:
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.signal(signal.SIGPROF, before)


def mutate(rng, data):
  """Returns bytes with up to three places changed, cut out, doubled, overwritten or cut off."""
  data = bytearray(data)
  for _ in range(rng.choice((1, 1, 1, 2, 3))):
    at = rng.randrange(len(data) + 1)
    end = min(len(data), at + rng.choice((1, 1, 2, 4, 8, 64)))
    kind = rng.randrange(7)
    if kind == 0 and at < len(data):
      data[at] ^= 1 << rng.randrange(8)
    elif kind == 1:
      del data[at:end]
    elif kind == 2:
      data[at:at] = rng.choice(ODD)
    elif kind == 3:
      data[at:end] = bytes(rng.randrange(256) for _ in range(end - at))
    elif kind == 4:
      data[at:end] = b'\xff' * (end - at)
    elif kind == 5:
      data[at:at] = data[at:end] * rng.choice((1, 3))
    else:
      del data[at:]
  return bytes(data)


def assert_plain(lines):
  for line in lines:
    assert line and len(line) < 1500 and '\n' not in line and 'Traceback' not in line, line
    assert line.isprintable(), line


# The command line and recipes


def wrong_arguments(rng, fields, values):
  """Returns a command line that is wrong in a random way, or right by chance."""
  name = rng.choice([*main.COMMANDS, 'pretrain', 'pretrain', 'prepare'])
  arguments = name.split()
  for _ in range(rng.randrange(5)):
    field = ''.join(rng.choice((c, c, c, c, c, c, c, c, rng.choice('._-=x'), '')) for c in rng.choice(fields))
    field = field if rng.random() < 0.5 else rng.choice(fields)
    prefix = rng.choice(('--config.', '--config.', '--config.', '--', '-', '', '--no'))
    arguments.append(prefix + field + rng.choice(('=', '=', '=', ' ', '')) + rng.choice(values))
  for extra in ('--workdir=x', '--config=recipe.json', '--config', '--', '--workdir'):
    if rng.random() < 0.3:
      arguments.insert(rng.randrange(1, len(arguments) + 1), extra)
  return arguments


@times(300, 3000)
def test_command_lines(count, tmp_path, monkeypatch):
  rng, ends = random.Random(count), []
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'recipe.json').write_text('{}')
  load = main.importlib.import_module
  modules = {c.module for c in main.COMMANDS.values() if not c.launches}
  ran = types.SimpleNamespace(run=lambda spec, options: 0)
  monkeypatch.setattr(main.importlib, 'import_module', lambda name: ran if name in modules else load(name))
  from llmjax.run.spec import PretrainSpec
  fields = [flag for flag, *_ in config.describe(PretrainSpec, '')] + ['workdir', 'step', 'text_dir', 'path', 'steps']
  values = [v.decode('utf-8', 'surrogateescape') for v in ODD if b'\0' not in v] + [
      '1', '0', '-5', '0.5', 'true', 'none', 'x', '1,2', '(1,', '{"a": 1}', "{'a': 'b'}", '{[]: 1}', '1:2', '∞', '--',
      '1_0', '0x1f', '1e3', 'data/text', '-' * 3000 + '1', '(' * 300, '\x1b[2J', 'a\nb', '10**9', '1j', 'b"x"',
      '...', 'tpu', 'é']
  for _ in range(count):
    arguments = wrong_arguments(rng, fields, values)
    if arguments[0] == 'launch':
      continue
    out, err = io.StringIO(), io.StringIO()
    with (at_most(SECONDS), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err),
          pytest.raises(SystemExit) as e):
      main.main(arguments)
    ends.append(e.value.code)
    assert e.value.code in (0, 2), arguments
    assert_plain(err.getvalue().splitlines())
    assert (e.value.code == 2) == bool(err.getvalue())
  assert ends.count(2) > count / 2


@times(150, 2000)
def test_recipes(count, tmp_path):
  from llmjax.commands.spec import LayoutSpec
  rng, wrong = random.Random(count), 0
  good = json.dumps(config.to_dict(LayoutSpec())).encode()
  for number in range(count):
    path = tmp_path / f'{number}.json'
    path.write_bytes(mutate(rng, good))
    with at_most(SECONDS):
      try:
        config.build(LayoutSpec, recipes.load_recipe(str(path)))
      except config.ConfigError as e:
        wrong += 1
        assert_plain(e.problems)
  assert wrong > count / 2


# Data


def data_files():
  """Returns {suffix: bytes} of files that hold good text."""
  import pyarrow
  import pyarrow.parquet
  import zstandard

  text = ''.join(f'Line {i} of a file.\n' for i in range(60)).encode()
  records = b''.join(json.dumps({'text': f'Record {i}', 'more': [i, None, {'a': 'é'}]}).encode() + b'\n'
                     for i in range(40))
  tar, archive, table = io.BytesIO(), io.BytesIO(), io.BytesIO()
  with tarfile.open(fileobj=tar, mode='w', format=tarfile.PAX_FORMAT) as t:
    for name in ('a.txt', 'é' * 80 + '.txt', 'b.jsonl'):
      info = tarfile.TarInfo(name)
      info.size = len(text)
      t.addfile(info, io.BytesIO(text))
  with zipfile.ZipFile(archive, 'w', zipfile.ZIP_DEFLATED) as z:
    z.writestr('a.txt', text)
    z.writestr('b.jsonl', records)
  pyarrow.parquet.write_table(pyarrow.table({'text': [f'row {i}' for i in range(30)]}), table)
  return {'.txt': text, '.jsonl': records, '.txt.gz': gzip.compress(text, mtime=0),
          '.jsonl.zst': zstandard.compress(records), '.txt.bz2': bz2.compress(text), '.txt.xz': lzma.compress(text),
          '.tar': tar.getvalue(), '.tar.gz': gzip.compress(tar.getvalue(), mtime=0), '.zip': archive.getvalue(),
          '.parquet': table.getvalue()}


@times(300, 4000)
def test_data_files(count, tmp_path):
  rng, files = random.Random(count), data_files()
  suffixes, refused = list(files), 0
  (tmp_path / 'a-good.txt').write_text(GOOD)
  (tmp_path / 'z-good.txt').write_text(GOOD)
  for number in range(count):
    suffix = suffixes[number % len(suffixes)]
    path = tmp_path / f'm{suffix}'
    path.write_bytes(mutate(rng, files[suffix]))
    with at_most(SECONDS):
      found = list(text_files.read_files(tmp_path, Limits(('.txt', '.jsonl', '.parquet'), max_record_bytes=1 << 16)))
    path.unlink()
    texts = {i.name: i.text for i in found if isinstance(i, Document)}
    assert texts['a-good.txt'] == texts['z-good.txt'] == GOOD
    for text in texts.values():
      assert '\0' not in text and text.encode().decode() == text
    rejected = [i for i in found if isinstance(i, Rejected)]
    refused += bool(rejected)
    assert_plain([i.reason for i in rejected])
    json.dumps([[i.file, i.reason, i.offset, i.line, i.bytes] for i in rejected])
  assert refused > count / 3


@pytest.fixture(scope='module')
def model():
  return tokenizers.train_tokenizer([f'line {i} of text' for i in range(300)], vocab_size=300)


@times(60, 1000)
def test_tokenizer_models(count, tmp_path, model):
  rng, refused = random.Random(count), 0
  path = tmp_path / 'tokenizer.model'
  for _ in range(count):
    path.write_bytes(mutate(rng, model))
    tokenizer = tokenizers.Tokenizer(path)
    with at_most(SECONDS):
      try:
        assert tokenizer.vocab_size > 0
        tokenizer.decode(tokenizer.encode('some text <|user|> é'))
        assert len(tokenizer.special_ids) < 1000
      except ValueError as e:
        refused += 1
        assert_plain([str(e)])
  assert refused


MANIFEST = {
    'format': 2, 'request': {'settings': {'path': 'x'}}, 'tokenizer': {'sha256': 'x', 'vocab_size': 512},
    'splits': {'train': {'documents': 3, 'bytes': 9, 'tokens': 9, 'tokens_sha256': 'x'}},
    'quarantine': {'records': 0, 'byte_order_marks_removed': 0, 'reasons': {'empty': 1}},
    'duplicates': {'repeated': 1, 'train_copies_of_held_out': 0}, 'ignored_files': {'.csv': 1}}


def mutate_json(rng, value):
  """Returns the value with one thing in it replaced or left out."""
  odd = (None, -1, 1.5, float('nan'), 'x', '', [], {}, True, 10 ** 30, ['x'], {'x': {}})
  if isinstance(value, dict) and value and rng.random() < 0.85:
    key = rng.choice(list(value))
    if rng.random() < 0.2:
      return {k: v for k, v in value.items() if k != key}
    return {**value, key: mutate_json(rng, value[key])}
  return rng.choice(odd)


@times(150, 3000)
def test_manifests(count, tmp_path):
  rng, refused = random.Random(count), 0
  from llmjax.commands.prepare import describe
  from llmjax.data import stream
  good = json.dumps(MANIFEST).encode()
  for number in range(count):
    data = mutate(rng, good) if number % 2 else json.dumps(mutate_json(rng, MANIFEST)).encode()
    prepared.manifest_path(tmp_path).write_bytes(data)
    with at_most(SECONDS):
      try:
        spec = config.build(DataSpec, {'sources': {str(tmp_path): 1.0}})
        # What a manifest that is taken for whole is used for.
        stream.split_counts(spec, 'train')
        stream.fingerprint(spec)
        assert stream.vocab_size(spec) >= 0
        describe(prepared.read_manifest(tmp_path), str(tmp_path))
      except config.ConfigError as e:
        refused += 1
        assert_plain(e.problems)
  assert refused > count / 4


@times(120, 2000)
def test_token_stores(count, tmp_path):
  rng, refused = random.Random(count), 0
  good = tmp_path / 'good'
  with token_store.TokenStoreWriter(good, vocab_size=300, bos_id=3, eos_id=1) as store:
    for length in (5, 1, 40):
      store.add(list(range(10, 10 + length)))
  for number in range(count):
    bad = tmp_path / 'bad'
    shutil.copytree(good, bad)
    path = bad / ('meta.json', 'offsets.npy', 'tokens.bin')[number % 3]
    if number % 7 == 0:
      path.unlink()
    else:
      path.write_bytes(mutate(rng, path.read_bytes()))
    with at_most(SECONDS):
      try:
        store = token_store.TokenStore(bad)
        assert sum(len(store[i]) for i in range(min(len(store), 1000))) <= store.num_tokens
      except ValueError as e:
        refused += 1
        assert_plain([str(e)])
    shutil.rmtree(bad)
  assert refused > count / 3


# Checkpoints


@times(120, 600)
def test_checkpoint_folders(count, tmp_path):
  rng = random.Random(count)
  good = tmp_path / 'good' / '7'
  (good / 'params' / 'd').mkdir(parents=True)
  for name in ('params/_METADATA', 'params/d/0', 'params/d/1', 'config'):
    (good / name).write_bytes(rng.randbytes(200))
  manifest.write_manifest(good, 7, {'eval/validation/loss': 2.5}, 7)
  assert manifest.find_damage(good) == []
  names = [p.relative_to(good) for p in sorted(good.rglob('*')) if p.is_file()]
  for number in range(count):
    bad = tmp_path / 'bad' / '7'
    shutil.copytree(good, bad)
    path = bad / names[number % len(names)]
    before = path.read_bytes()
    after = mutate(rng, before)
    path.write_bytes(after)
    if number % 11 == 0:
      path.unlink()
    elif number % 13 == 0:
      path.unlink()
      path.mkdir()
    with at_most(SECONDS):
      damage = manifest.find_damage(bad)
      try:
        manifest.read_manifest(bad)
      except manifest.ManifestError as e:
        assert_plain([str(e)])
    if after != before:
      assert damage, path
    assert_plain(damage)
    assert manifest.find_damage(good) == []
    shutil.rmtree(tmp_path / 'bad')


@times(100, 2000)
def test_configs_of_runs_and_files_of_weights(count, tmp_path):
  from llmjax.checkpoint.load import read_config
  from llmjax.commands.spec import LayoutSpec
  rng, refused = random.Random(count), 0
  good = json.dumps(config.to_dict(LayoutSpec())).encode()
  for number in range(count):
    workdir = tmp_path / str(number)
    workdir.mkdir()
    (workdir / 'config.json').write_bytes(
        mutate(rng, good) if number % 2 else json.dumps(mutate_json(rng, json.loads(good))).encode())
    file = tmp_path / f'weights{rng.choice(pickle_guard.PICKLED + (".npy", ".safetensors", ""))}'
    file.write_bytes(mutate(rng, b'\x80\x04\x95' + bytes(100)))
    with at_most(SECONDS):
      assert_plain([pickle_guard.refusal(file)])
      try:
        config.build(LayoutSpec, read_config(workdir))
      except config.ConfigError as e:
        refused += 1
        assert_plain(e.problems)
  assert refused > count / 4


def test_paths_that_are_none(tmp_path):
  """Names too long, without rights, with odd bytes: a line each, through every field that takes a path."""
  from llmjax.commands.spec import LayoutSpec
  from llmjax.data.spec import PrepareOptions, PrepareSpec
  from llmjax.generate.spec import GenerateOptions
  from llmjax.run.spec import PretrainOptions
  closed = tmp_path / 'closed'
  closed.mkdir()
  closed.chmod(0)
  try:
    for path in ('a' * 5000, '/'.join('a' * 3000), str(closed / 'x'), '\udcff.txt', 'a\nb', '~', '//', '/dev/null/x',
                 '\x1b', 'a\0b'):
      with contextlib.suppress(config.ConfigError):
        recipes.load_recipe(path)
      for spec, values in ((DataSpec, {'sources': {path: 1}}), (PrepareSpec, {'tokenizer': {'path': path}}),
                           (LayoutSpec, {'model': {'vocab_size': 64}, 'train': {'init_from': path}}),
                           (PrepareSpec, {'source': 'text_dir', 'path': path}), (PretrainOptions, {'workdir': path}),
                           (PrepareOptions, {'text_dir': path}), (GenerateOptions, {'workdir': path})):
        try:
          config.build(spec, values)
        except config.ConfigError as e:
          assert_plain(e.problems)
  finally:
    os.chmod(closed, 0o700)
