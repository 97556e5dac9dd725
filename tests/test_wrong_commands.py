"""The error messages of wrong command lines, word for word as in tests/wrong_commands.txt.

An entry is a command line and its standard error.  The commands run in a folder with recipe.py (a small model on
data/text), data/text (the manifest of a prepared folder), README.md, model.pt and broken recipes.  After a change,
`python tests/test_wrong_commands.py` regenerates the file: read every line of the difference.
"""

import contextlib
import io
import json
import os
import pathlib
import pickle
import shlex
import tempfile

import pytest

from llmjax import main

FILE = pathlib.Path(__file__).with_name('wrong_commands.txt')
RECIPE = '''
def get_config():
  return {'model': {'num_layers': 2, 'd_model': 64, 'num_heads': 4, 'num_kv_heads': 2, 'mlp_dim': 128},
          'data': {'sources': {'data/text': 1.0}, 'seq_len': 64}, 'train': {'steps': 100, 'batch_size': 8}}
'''
MANIFEST = {
    'format': 2, 'request': {}, 'tokenizer': {'sha256': 'x', 'vocab_size': 512},
    'splits': {'train': {'documents': 1, 'bytes': 9, 'tokens': 9, 'tokens_sha256': 'x'}},
    'quarantine': {'records': 0, 'byte_order_marks_removed': 0, 'reasons': {}}, 'ignored_files': {},
    'duplicates': {'repeated': 0, 'train_copies_of_held_out': 0}}


def read_entries(text):
  """Return [(command line, expected standard error)]."""
  entries = []
  for block in text.strip().split('\n\n'):
    command, _, expected = block.partition('\n')
    assert command.startswith('$ llmjax'), command
    entries.append((command.removeprefix('$ llmjax').strip(), expected))
  return entries


def fill(folder):
  """Write the files that the commands refer to."""
  for name, text in {
      'recipe.py': RECIPE, 'README.md': '# Read me', 'syntax.py': 'def get_config(:\n', 'empty.py': 'x = 1\n',
      'fails.py': 'import nothing_of_this_name\n', 'exits.py': 'raise SystemExit("bye\\nbye")\n',
      'list.py': 'def get_config(): return []\n', 'broken.json': '{"train": ', 'list.json': '[1]',
      'numbers.json': '{"1": {"2": 3}}', 'nan.json': '{"optimizer": {"lr": NaN}}', 'group.json': '{"train": 3}',
      'text/a.txt': 'text\n', 'data/text/manifest.json': json.dumps(MANIFEST),
      'data/old/manifest.json': '{"format": 0}',
      'data/cut/manifest.json': '{"format": 1, "tok', 'data/less/manifest.json': '{"format": 2}',
      'data/other/manifest.json': json.dumps({**MANIFEST, 'tokenizer': {'sha256': 'y', 'vocab_size': 512}}),
      'data/prompts/manifest.json': json.dumps({**MANIFEST, 'records': 'prompts'}),
      'run/config.json': json.dumps({'model': {'num_layers': 2, 'd_model': 64, 'num_heads': 4, 'mlp_dim': 128},
                                     'data': {'seq_len': 64}}),
      'small_run/config.json': json.dumps({'model': {'num_layers': 2, 'd_model': 64, 'num_heads': 4, 'mlp_dim': 128,
                                                     'vocab_size': 384}, 'data': {'seq_len': 64}, 'reward': {}}),
      'damaged/config.json': '{"model": ', 'list/config.json': '[]',
      'data/empty/x': '', 'hub/config.json': '{}', 'hub/pytorch_model.bin': 'x'}.items():
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
  (folder / 'loop').symlink_to('loop')
  (folder / 'model.pt').write_bytes(pickle.dumps({'weight': 1}))


def call(line):
  """Run a command; return (exit status, standard output, standard error)."""
  out, err = io.StringIO(), io.StringIO()
  with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as e:
    main.main(shlex.split(line))
  return e.value.code, out.getvalue(), err.getvalue()


ENTRIES = read_entries(FILE.read_text()) if FILE.exists() else []


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('wrong')
  fill(folder)
  return folder


def test_entries_are_unique():
  assert len(ENTRIES) >= 100
  assert len(dict(ENTRIES)) == len(ENTRIES)


@pytest.mark.parametrize(('line', 'expected'), ENTRIES, ids=range(len(ENTRIES)))
def test_message(folder, monkeypatch, line, expected):
  monkeypatch.chdir(folder)
  modules, load = {c.module for c in main.COMMANDS.values() if not c.launches}, main.importlib.import_module

  def refuse(name, *arguments):
    assert name not in modules, f'{name}, which imports JAX, is imported before the mistake is found'
    return load(name, *arguments)

  monkeypatch.setattr(main.importlib, 'import_module', refuse)
  before = sorted(os.walk(folder))
  status, out, err = call(line)
  assert (status, out, err.rstrip('\n')) == (2, '', expected)
  assert sorted(os.walk(folder)) == before


@pytest.mark.parametrize('expected', [e for _, e in ENTRIES], ids=range(len(ENTRIES)))
def test_messages_are_short_and_without_tracebacks(expected):
  assert 'Traceback' not in expected and 'Error:' not in expected.replace('ModuleNotFoundError:', '').replace(
      'SyntaxError:', '').replace('JSONDecodeError:', '')
  first, *rest = expected.splitlines()
  assert first.startswith('llmjax') and all(line.startswith('  ') for line in rest)
  assert all(len(line) < 420 for line in (first, *rest))


if __name__ == '__main__':
  commands = [command for command, _ in ENTRIES]
  with tempfile.TemporaryDirectory() as name:
    fill(pathlib.Path(name))
    os.chdir(name)
    FILE.write_text('\n\n'.join(f'$ llmjax {c}'.rstrip() + '\n' + call(c)[2].strip() for c in commands) + '\n')
