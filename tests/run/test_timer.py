"""Model FLOPs utilization."""

import types

import numpy as np
import pytest

from llmjax.parallel import chips
from llmjax.run import timer


def speed(platform, peak, monkeypatch):
  monkeypatch.setattr(timer.chips, 'peak_flops', lambda device: peak)
  monkeypatch.setattr(timer.counts, 'train_flops_per_token', lambda *args, **kwargs: 100.0)
  device = types.SimpleNamespace(platform=platform)
  mesh = types.SimpleNamespace(devices=np.array([device, device]))
  spec = types.SimpleNamespace(model=None, data=types.SimpleNamespace(seq_len=8),
                               adapter=types.SimpleNamespace(kind=''))
  return timer.Speed(spec, mesh)


def test_a_measured_peak_that_is_exceeded_becomes_unknown(monkeypatch):
  found = speed('cpu', 1e6, monkeypatch)  # Two devices: 2e6 FLOP/s, 20,000 tokens/s of 100 FLOPs.
  assert [found.mfu(10_000.0), found.mfu(20_001.0), found.mfu(10_000.0)] == [0.5, None, None]


def test_a_peak_from_the_data_sheet_is_kept(monkeypatch):
  found = speed('tpu', 1e6, monkeypatch)
  assert found.mfu(24_000.0) == pytest.approx(1.2)  # Wrong FLOPs must be seen.
  assert speed('gpu', None, monkeypatch).mfu(1.0) is None


def test_the_measured_peak_is_that_of_the_fastest_product():
  took = iter([1.0, 0.5, 0.125, 2.0] * 2)
  now, calls = [0.0], [0]

  def clock():  # Called for the end, then before and after each product.
    calls[0] += 1
    if calls[0] > 1 and calls[0] % 2:
      now[0] += next(took)
    return now[0]

  assert chips.measure_matmul_flops((16,), 3.0, clock) == 2 * 16**3 / 0.125
