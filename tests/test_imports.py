"""Imports go one way, as the list in pyproject.toml says."""

import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]


def test_imports_go_one_way():
  code = 'from importlinter.cli import lint_imports; raise SystemExit(lint_imports())'
  done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True,
                        check=False)
  assert done.returncode == 0, done.stdout


def test_every_folder_is_a_package():
  """One without __init__.py would be missing from a wheel, and from the order of imports."""
  folders = {path.parent for path in (ROOT / 'llmjax').rglob('*.py')}
  assert [folder for folder in folders if not (folder / '__init__.py').exists()] == []
