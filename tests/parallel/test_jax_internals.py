"""JAX's private interface, as far as llmjax uses it."""

import importlib.metadata
import pathlib
import re

import pytest

from llmjax.parallel import jax_internals

ROOT = pathlib.Path(__file__).parents[2]


def test_installed_jax_has_everything():
  version = importlib.metadata.version('jax')
  assert not (problems := jax_internals.check()), '\n'.join(problems)
  assert '.'.join(version.split('.')[:2]) in jax_internals.TESTED, f'add {version} to TESTED'


def test_missing_name_is_one_line(monkeypatch):
  monkeypatch.setitem(jax_internals.NEEDED, 'jax._src.distributed.nothing', 'a test')
  (problem,) = jax_internals.check()
  assert 'jax._src.distributed.nothing (a test)' in problem and 'install jax' in problem and '\n' not in problem
  monkeypatch.delattr('jax._src.xla_bridge.backends_are_initialized')
  with pytest.raises(RuntimeError, match='has no jax._src.xla_bridge.backends_are_initialized'):
    jax_internals.backends_are_initialized()


def test_no_other_file_uses_them():
  private = re.compile(r'(from|import)\s+(jax\._src|jaxlib)\b')
  users = [path.relative_to(ROOT) for path in (ROOT / 'llmjax').rglob('*.py') if private.search(path.read_text())]
  assert users == []
