"""Read the `metrics.jsonl` and `samples.jsonl` of a run.

JSON has no NaN or infinity, so these are encoded as the strings "NaN", "Infinity" and "-Infinity"; `read_metrics`
decodes them.  null means "not measured".
"""

import json
import math
import pathlib

from llmjax import config

NON_FINITE = {'NaN': math.nan, 'Infinity': math.inf, '-Infinity': -math.inf}


def encode_number(value):
  """Encode a number or None for JSON; non-finite floats become strings."""
  if value is None or isinstance(value, (bool, int)):
    return value
  value = float(value)
  if math.isfinite(value):
    return value
  return 'NaN' if math.isnan(value) else 'Infinity' if value > 0 else '-Infinity'


def format_loss(value):
  """Format a loss with three decimals, or as 2.4e-05 if it is small, as policy losses are."""
  return f'{value:.3f}' if abs(value) >= 0.001 or not value else f'{value:.1e}'


def read_lines(path) -> list[dict]:
  """Read a JSONL file of objects; [] if it is missing.  A truncated last line is ignored.

  Raises ConfigError if any other line is damaged.
  """
  path = pathlib.Path(path)
  if not path.exists():
    return []
  rows = []
  lines = path.read_bytes().split(b'\n')
  for number, line in enumerate(lines):
    if not line.strip(b' \0\r\t'):  # A machine crash can leave zero bytes.
      continue
    try:
      row = json.loads(line)
    except ValueError as e:
      if number == len(lines) - 1:  # It has no newline: the write was interrupted.
        break
      raise config.ConfigError([
          f'{path}: line {number + 1} is not a JSON object ({e}); remove the line']) from e
    if not isinstance(row, dict):
      raise config.ConfigError([
          f'{path}: line {number + 1} is not a JSON object; remove the line'])
    rows.append(row)
  return rows


def read_metrics(path) -> list[dict]:
  """Read the rows of a `metrics.jsonl`, oldest first, as `read_lines`; NaN and infinities become floats.

  path: the file, or the run's folder.
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
  """Return ([steps], [values]) of a key, skipping rows without a number."""
  points = [(row['step'], row[key]) for row in rows if isinstance(row.get(key), (int, float))]
  return [p[0] for p in points], [float(p[1]) for p in points]
