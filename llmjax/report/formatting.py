"""Format numbers for the report, and read numbers from files that may be damaged."""

import math

NONE = '–'


def number(mapping, key):
  """Return a finite number of a mapping that was read from a file, or None."""
  value = mapping.get(key) if isinstance(mapping, dict) else None
  is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
  return value if is_number and math.isfinite(value) else None


def formatted(value, form):
  """Format a value with a format string or function; None as a dash."""
  if value is None:
    return NONE
  return form.format(value) if isinstance(form, str) else form(value)


def count(value):
  """Format a count with three digits and a unit: 58_470_000 -> '58.5 M'."""
  if value is None:
    return NONE
  for limit, unit in ((1e12, ' T'), (1e9, ' B'), (1e6, ' M'), (1e4, ' k')):
    if abs(value) >= limit * (1.0 if unit == ' k' else 0.9995):  # 999,960 is 1 M, not 1e+03 k.
      return f'{value / (1e3 if unit == " k" else limit):.3g}{unit}'
  return f'{value:,.0f}' if abs(value) >= 100 or value == int(value) else f'{value:.3g}'


def duration(seconds):
  """Format seconds: '0.25 s', '3 min 12 s', '1 h 1 min' or '1 d 1 h'."""
  if seconds is None:
    return NONE
  if seconds < 60:
    return f'{seconds:.3g} s'
  minutes, s = divmod(round(seconds), 60)
  hours, m = divmod(minutes, 60)
  if hours >= 24:
    return f'{hours // 24} d {hours % 24} h'
  return f'{hours} h {m} min' if hours else f'{m} min {s} s'


def percent(value):
  """Format a fraction as a percentage with one decimal."""
  return f'{value:.1%}'


def cut(text, limit):
  """Truncate a text to a number of characters."""
  return text if len(text) <= limit else f'{text[:limit]} …'
