"""Golden arrays that independent libraries computed; tests that need them are skipped where they are not."""

import functools
import os
import pathlib

import numpy as np
import pytest

FOLDER = pathlib.Path(os.environ.get('LLMJAX_ORACLES') or pathlib.Path(__file__).parents[3] / 'shared' / 'oracles')


@functools.cache
def read(name):
  path = FOLDER / name
  return dict(np.load(path)) if path.exists() else None


@pytest.fixture(scope='session')
def oracle():
  """Returns the function of a file's name to its arrays."""

  def load(name):
    arrays = read(name)
    if arrays is None:
      pytest.skip(f'no golden arrays: ../shared/oracles/{name} is not there; LLMJAX_ORACLES may name another folder')
    return arrays

  return load
