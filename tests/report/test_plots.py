"""Curves are smoothed and downsampled without losing what matters."""

import math

import pytest

from llmjax.report.plots import downsample, line_chart, series, smooth, trend


def test_downsampling_keeps_the_ends_spikes_and_nan():
  values = [math.sin(i / 1000) for i in range(100_000)]
  values[77_777], values[33_333], values[50_000] = 1e6, -1e6, math.nan
  kept = downsample(values, 1200)
  assert len(kept) <= 1200 and kept == sorted(set(kept))
  assert {0, 99_999, 77_777, 33_333, 50_000} <= set(kept)
  assert downsample([1.0, 2.0], 1200) == [0, 1]


def test_smoothing_of_a_constant_is_exact_and_skips_nan():
  smoothed = smooth([2.0, 2.0, math.nan, 2.0], 100)
  assert smoothed[:2] == pytest.approx([2.0, 2.0]) and math.isnan(smoothed[2])
  assert smoothed[3] == pytest.approx(2.0)
  assert smooth([1.0, 5.0, 3.0], 1) == [1.0, 5.0, 3.0]


def test_only_long_noisy_curves_are_smoothed():
  steps, values = list(range(60)), [1.0] * 60
  assert [s['label'] for s in trend('loss', 0, steps, values)] == ['loss', 'smoothed']
  assert [s['label'] for s in trend('lr', 0, steps, values, noisy=False)] == ['lr']
  assert [s['label'] for s in trend('loss', 0, steps[1:], values[1:])] == ['loss']


def test_a_chart_without_points_is_none():
  level = series('xz -9', 'rule', 5, [0], [1.9])
  assert line_chart('bits', [series('a', 'dots', 1, [], []), level]) is None
  assert len(line_chart('bits', [series('a', 'dots', 1, [1], [math.nan]), level])['series']) == 2
