"""Golden arrays of other implementations, if available."""

import pathlib

import numpy as np
import pytest


@pytest.fixture(scope='session')
def oracle():
  found = [p / 'shared/oracles/aux.npz' for p in pathlib.Path(__file__).resolve().parents]
  file = next((p for p in found if p.exists()), None)
  if file is None:
    pytest.skip('shared/oracles/aux.npz is nowhere above')
  return np.load(file)
