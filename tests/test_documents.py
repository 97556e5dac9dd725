"""The commands that documents and `--help` print: each parses, and reads what a command before it has made.

Nothing is trained: a command is checked as `llmjax launch slurm` checks one for another machine, and then its paths.
"""

import json
import pathlib
import re
import shlex

import pytest

from llmjax import config, main
from llmjax.commands.spec import LayoutSpec
from tests.helpers import ROOT, call_and_read
from tests.test_wrong_commands import MANIFEST

DOCUMENTS = ['README.md', *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob('experiments/*/README.md'))]
MAKES = {'tools/quickstart.sh': ('data/python_docs', 'runs/quickstart'), 'tools/lifecycle.sh': ('runs/lifecycle',)}


def shell_blocks(text):
  """Returns the lines of every fenced block of a document, those that end in a backslash joined with the next."""
  blocks = re.findall(r'^```\w*\n(.*?)^```$', text, re.MULTILINE | re.DOTALL)
  return [block.replace('\\\n', ' ').splitlines() for block in blocks]


def shown_mistake(block):
  """Returns (words of a command line, the lines it ends with) of a block that shows a mistake, else None."""
  if len(block) > 1 and block[1].startswith(' '.join(block[0].removeprefix('$ ').split()[:2]) + ':'):
    return shlex.split(block[0])[2:], block[1:]
  return None


def typed_lines(text):
  """Returns the command lines of a document as lists of words, without those that show a mistake."""
  return [shlex.split(line.removeprefix('$ '), comments=True)
          for block in shell_blocks(text) if not shown_mistake(block)
          for line in block if re.match(r'(\$ )?(llmjax|python|bash) ', line)]


def parse(words):
  """Returns (spec or None, options) of what stands behind `llmjax`; raises ConfigError."""
  name, arguments = main.split_command(words)
  assert name in main.COMMANDS, words
  command = main.COMMANDS[name]
  if command.launches:
    launched, _ = main.parse(command, arguments)
    return parse(launched)
  return main.parse(command, arguments, elsewhere=True)


def paths_of(spec, options):
  """Returns (paths that a command reads, paths that it writes)."""
  read, written = [], []
  for group in filter(None, (spec, options)):
    for name, kind, path in config.paths(group):
      if not (name == 'data.sources' and isinstance(spec, LayoutSpec)):  # Only shapes matter there.
        (read if kind == 'path' else written).append(path)
  return read, written + ([spec.folder] if hasattr(spec, 'folder') else [])


@pytest.mark.parametrize('document', DOCUMENTS)
def test_commands_are_right_and_read_what_was_made_before(document, monkeypatch):
  monkeypatch.chdir(ROOT)
  made = []
  for words in typed_lines((ROOT / document).read_text(encoding='utf-8')):
    if words[0] != 'llmjax':
      assert (ROOT / words[1]).is_file(), words
      made += [*MAKES.get(words[1], ()), *(word for word in words[2:] if not word.startswith('-'))]
      continue
    spec, options = parse(words[1:])
    read, written = paths_of(spec, options)
    for path in read:
      there = any(pathlib.Path(path).is_relative_to(folder) for folder in made)
      stands_for_yours = re.fullmatch(r'[A-Z]+(\..*)?', pathlib.Path(path).name)
      is_kept = path.startswith(('configs/', 'experiments/')) and (ROOT / path).exists()
      assert there or stands_for_yours or is_kept, f'{path}, of {" ".join(words)}, is made by no command before it'
    made += written


def test_the_readme_has_its_commands():
  lines = typed_lines((ROOT / 'README.md').read_text(encoding='utf-8'))
  assert len([words for words in lines if words[0] == 'llmjax']) > 35
  named = {main.split_command(words[1:])[0] for words in lines}
  assert {'prepare', 'pretrain', 'finetune', 'reward', 'rl', 'evaluate', 'generate', 'plan', 'mesh', 'chaos'} <= named


@pytest.mark.parametrize('name', main.COMMANDS)
def test_the_example_of_help_parses(name, monkeypatch):
  monkeypatch.chdir(ROOT)
  words = [{'--config=FILE': '--config=configs/pretrain/quickstart.py'}.get(word, word)
           for word in shlex.split(main.COMMANDS[name].example)]
  parse(words[1:])


@pytest.mark.parametrize('recipe', sorted(str(p.relative_to(ROOT)) for p in ROOT.glob('configs/**/*.py')))
def test_the_commands_of_a_recipe_parse(recipe, monkeypatch):
  monkeypatch.chdir(ROOT)
  text = (ROOT / recipe).read_text(encoding='utf-8').replace('\\\n', ' ')
  for line in re.findall(r'(?:^ *|: )(llmjax [a-z]+ .*--.*)$', text, re.MULTILINE):
    parse(shlex.split(line.rstrip('.'))[1:])


def test_mistakes_that_the_readme_shows_read_so(tmp_path, monkeypatch, capsys):
  (tmp_path / 'configs').symlink_to(ROOT / 'configs')
  (tmp_path / 'data/python_docs').mkdir(parents=True)
  (tmp_path / 'data/python_docs/manifest.json').write_text(json.dumps(MANIFEST))
  monkeypatch.chdir(tmp_path)
  blocks = shell_blocks((ROOT / 'README.md').read_text(encoding='utf-8'))
  mistakes = list(filter(None, map(shown_mistake, blocks)))
  assert len(mistakes) >= 2
  for words, lines in mistakes:
    status, _, err = call_and_read(capsys, *words)
    assert (status, err.splitlines()) == (2, lines)
