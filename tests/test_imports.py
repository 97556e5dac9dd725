"""Imports go one way, as the list in pyproject.toml says."""

import pathlib
import subprocess
import sys


def test_imports_go_one_way():
  root = pathlib.Path(__file__).parents[1]
  code = 'from importlinter.cli import lint_imports; raise SystemExit(lint_imports())'
  done = subprocess.run([sys.executable, '-c', code], cwd=root, capture_output=True, text=True,
                        check=False)
  assert done.returncode == 0, done.stdout
