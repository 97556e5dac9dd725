"""Objects of the user's own modules, named as module:name."""

import sys

import pytest

from llmjax import extensions
from llmjax.config import ConfigError


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """A current folder that is not on the search path, as of the installed command."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, 'path', [p for p in sys.path if p])
  before = set(sys.modules)
  yield tmp_path
  for name in set(sys.modules) - before:
    if str(getattr(sys.modules[name], '__file__', None) or '').startswith(str(tmp_path)):
      del sys.modules[name]


def test_a_function_of_a_module_in_the_current_folder(folder):
  (folder / 'my_own.py').write_text('def f():\n  return 3\n\nclass C:\n  def g():\n    return 4\n')
  assert extensions.load('my_own:f', 'source')() == 3
  assert extensions.load('my_own:C.g', 'source')() == 4


def test_a_function_of_an_installed_package():
  assert extensions.load('os.path:join', 'source')('a', 'b') == 'a/b'


@pytest.mark.parametrize('text, path, words', [
    ('', 'no_colon', ['my_module:my_function']),
    ('', 'my own:f', ['my_module:my_function']),
    ('', 'absent_one:f', ['no module absent_one', 'install']),
    ('', 'my_bad.within:f', ['my_bad']),
    ('import absent_two', 'my_bad:f', ['absent_two', 'install']),
    ('def g(): pass', 'my_bad:absent', ['has no absent', 'my_bad.py']),
    ('def documents(): pass', 'my_bad:document', ['did you mean my_bad:documents?']),
    ('f = 3', 'my_bad:f', ['not callable', 'int']),
    ('\n1 / 0', 'my_bad:f', ['ZeroDivisionError', 'my_bad.py, line 2']),
    ('def f(:', 'my_bad:f', ['SyntaxError', 'my_bad.py, line 1']),
    ('raise SystemExit(2)', 'my_bad:f', ['SystemExit', 'my_bad.py, line 1']),
])
def test_every_mistake_is_one_line_with_the_field_and_a_remedy(folder, text, path, words):
  (folder / 'my_bad.py').write_text(text)
  with pytest.raises(ConfigError) as caught:
    extensions.load(path, 'rl.rewards')
  line, = caught.value.problems
  assert line.startswith(f'rl.rewards={path}: ') and all(word in line for word in words), line
