"""Reading a run's `metrics.jsonl` and `samples.jsonl`, and thinning curves for a page.

A JSON number cannot be NaN or infinite, so these are written as the strings "NaN", "Infinity" and
"-Infinity" (`encode_number`); `read_metrics` turns them back.  A null means: not measured.
"""

import json
import math
import pathlib

from llmjax import config

POINTS = 1200  # Of one curve on a page: more than a screen has columns to show them in.
NON_FINITE = {'NaN': math.nan, 'Infinity': math.inf, '-Infinity': -math.inf}


def encode_number(value):
  """Returns what JSON may hold for a number or None: an int, a finite float, None, or a string."""
  if value is None or isinstance(value, (bool, int)):
    return value
  value = float(value)
  if math.isfinite(value):
    return value
  return 'NaN' if math.isnan(value) else 'Infinity' if value > 0 else '-Infinity'


def format_loss(value):
  """Returns a loss with three decimals, or as 2.4e-05 where these would be zeros, as of policies."""
  return f'{value:.3f}' if abs(value) >= 0.001 or not value else f'{value:.1e}'


def read_lines(path) -> list[dict]:
  """Returns the JSON objects of a file, one a line; a last line cut off by a kill is left out.

  A missing file is an empty list.  Raises ConfigError when any other line is damaged.
  """
  path = pathlib.Path(path)
  if not path.exists():
    return []
  rows = []
  lines = path.read_bytes().split(b'\n')
  for number, line in enumerate(lines):
    if not line.strip(b' \0\r\t'):  # A crash of the machine can leave zeros where data should be.
      continue
    try:
      row = json.loads(line)
    except ValueError as e:
      if number == len(lines) - 1:  # No newline after it: the write never ended.
        break
      raise config.ConfigError([
          f'{path}: line {number + 1} is not a JSON object ({e}); remove the line to go on']) from e
    if not isinstance(row, dict):
      raise config.ConfigError([
          f'{path}: line {number + 1} is not a JSON object; remove the line to go on'])
    rows.append(row)
  return rows


def read_metrics(path) -> list[dict]:
  """Returns the rows of a `metrics.jsonl`, oldest first, with NaN and infinities as floats.

  path: the file or the run's folder.  Tolerates a truncated last line, as `read_lines` does.
  """
  path = pathlib.Path(path)
  if path.is_dir():
    path = path / 'metrics.jsonl'
  rows = read_lines(path)
  for row in rows:
    for key, value in row.items():
      if value.__class__ is str:
        row[key] = NON_FINITE.get(value, value)
  return rows


def curve(rows, key):
  """Returns ([steps], [values]) of a key, leaving out rows where it is missing or no number."""
  points = [(row['step'], row[key]) for row in rows if isinstance(row.get(key), (int, float))]
  return [p[0] for p in points], [float(p[1]) for p in points]


def smooth(values, span):
  """Returns the moving average over about `span` points, exponentially weighted to both sides.

  Two-sided, for a trailing average lags behind a loss that falls.  Non-finite values are passed
  over: they leave a NaN at their place and do not spoil the rest.
  """
  decay = max(0.0, 1.0 - 2.0 / (span + 1.0))

  def trailing(sequence):
    """Yields the decayed sum and the decayed count of what came before each value."""
    total = weight = 0.0
    for value in sequence:
      total, weight = decay * total, decay * weight
      yield total, weight
      if math.isfinite(value):
        total, weight = total + value, weight + 1.0

  before, after = list(trailing(values)), list(trailing(reversed(values)))[::-1]
  return [(v + b[0] + a[0]) / (1.0 + b[1] + a[1]) if math.isfinite(v) else math.nan
          for v, b, a in zip(values, before, after, strict=True)]


def downsample(values, limit):
  """Returns the sorted indices of at most `limit` points: each bucket's lowest and highest.

  The first and the last point are always kept, and of each bucket any non-finite value, so that a
  spike or a NaN that lasted one step is still on the page.  limit: at least 8.
  """
  count = len(values)
  if count <= limit:
    return list(range(count))
  buckets = (limit - 2) // 3
  keep = {0, count - 1}
  for b in range(buckets):
    indices = range(b * count // buckets, (b + 1) * count // buckets)
    finite = [i for i in indices if math.isfinite(values[i])]
    if finite:
      keep.add(min(finite, key=values.__getitem__))
      keep.add(max(finite, key=values.__getitem__))
    if len(finite) < len(indices):
      keep.add(next(i for i in indices if not math.isfinite(values[i])))
  return sorted(keep)


def trend(label, color, steps, values):
  """Returns the series of a noisy curve: as measured, light, and smoothed over it, strong."""
  if len(values) < 60:  # Few enough to see the trend without help.
    return [series(label, 'line', color, steps, values)]
  return [series(label, 'faint', color, steps, values),
          series('smoothed', 'line', color, steps, smooth(values, len(values) // 60))]


def series(label, kind, color, steps, values):
  """Returns a thinned series for the page: NaN is null, six significant digits are kept."""
  kept = downsample(values, POINTS)
  return {'label': label, 'kind': kind, 'color': color % 8, 'x': [steps[i] for i in kept],
          'y': [float(f'{values[i]:.6g}') if math.isfinite(values[i]) else None for i in kept]}
