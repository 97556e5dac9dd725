"""What tests share: a small prepared folder, commands in this process or in one of their own, and when arrays agree."""

import os
import pathlib
import random
import subprocess
import sys

import numpy as np
import pytest

from llmjax import main
from llmjax.data import corpus
from llmjax.data.spec import PrepareSpec, TokenizerSpec

ROOT = pathlib.Path(__file__).parents[1]


def prepare_words(folder, files=40):
  """Writes text files of a few words, and prepares them in the folder's `text`; returns the folder."""
  rng = random.Random(0)
  (folder / 'files').mkdir()
  for i in range(files):
    (folder / f'files/{i}.txt').write_text(' '.join(rng.choices('a cat sees the big old house'.split(), k=90)))
  corpus.prepare(PrepareSpec(source='text_dir', path=str(folder / 'files'), output=str(folder / 'text'),
                             tokenizer=TokenizerSpec(vocab_size=300, sample_lines=500)))
  return folder


def call(*argv):
  """Runs a command here; returns its exit status."""
  with pytest.raises(SystemExit) as e:
    main.main(list(map(str, argv)))
  return e.value.code or 0


def call_and_read(capture, *argv):
  """Returns (exit status, standard output, standard error) of a command.  capture: capsys or capfd."""
  status = call(*argv)
  out, err = capture.readouterr()
  assert 'Traceback' not in err
  return status, out, err


def environment_of(**more):
  """Returns the environment of a process that imports this tree's llmjax."""
  return {**os.environ, 'PYTHONPATH': str(ROOT), **more}


def run_process(folder, *argv, timeout=None, **environment):
  """Runs a command in a process of its own, in the folder; returns the subprocess.CompletedProcess, with text."""
  return subprocess.run([sys.executable, '-m', 'llmjax', *argv], cwd=folder, env=environment_of(**environment),
                        text=True, capture_output=True, check=False, timeout=timeout)


def close(got, expected):
  """Asserts equality to 1e-5 of the values, and of the largest of them where values are near 0."""
  expected = np.asarray(expected)
  np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6 * max(np.abs(expected).max(), 1e-30))
