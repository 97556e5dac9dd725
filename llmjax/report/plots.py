"""Data of the charts on a page, which its script draws as SVG, and the geometry of timelines."""

import math

POINTS = 1200  # Per curve: more than the pixels of its width.
WIDTH, HEIGHT, LEFT, GAP = 1060, 34, 64, 6  # Pixels of a timeline, of its lanes, of their labels and between lanes.


def smooth(values, span):
  """Return the two-sided exponential moving average over about `span` points.

  A one-sided average would lag behind a falling loss.  Non-finite values stay NaN and do not affect the others.
  """
  decay = max(0.0, 1.0 - 2.0 / (span + 1.0))

  def trailing(sequence):
    """Yield the decayed sum and the decayed count of the values before each one."""
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
  """Return the sorted indices of at most `limit` points: the minimum and maximum of each bucket.

  The first and last point are kept, and one non-finite value per bucket, so that a spike or NaN of a single step stays
  visible.  limit: at least 8.
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


def series(label, kind, color, x, y):
  """Return a downsampled series of a chart.  NaN becomes null, and six significant digits are kept.

  kind: line, faint, dots (connected), or rule (a horizontal line at y[0]).  color: index of the palette.
  """
  kept = downsample(y, POINTS)
  return {'label': label, 'kind': kind, 'color': color % 8, 'x': [x[i] for i in kept],
          'y': [float(f'{y[i]:.6g}') if math.isfinite(y[i]) else None for i in kept]}


def trend(label, color, x, y, noisy=True):
  """Return the series of a curve: the values, and a smoothed curve if they are noisy and at least 60."""
  if len(y) < 60 or not noisy:
    return [series(label, 'line', color, x, y)]
  return [series(label, 'faint', color, x, y), series('smoothed', 'line', color, x, smooth(y, len(y) // 60))]


def line_chart(title, lines, height=200, **options):
  """Return a chart, or None if no series has points.

  options: switches (axes with a button for a logarithmic scale), xlog and ylog (initial scales), zero (the y axis
  starts at 0), xname (default: step), bad (x positions to mark).
  """
  lines = [line for line in lines if line['x']]
  if all(line['kind'] == 'rule' for line in lines):
    return None
  return {'title': title, 'height': height, 'series': lines, **options}


def timeline(loop):
  """Return the geometry of a loop body's timeline: one lane for the core, one for the interconnect.

  loop: {'name', 'seconds', 'events': [{'name', 'category', 'begin', 'seconds', 'lane', 'op_name'}]}.
  """
  whole = loop['seconds'] or 1.0
  place = lambda seconds: LEFT + (WIDTH - LEFT) * seconds / whole
  bars = []
  for event in loop['events']:
    lane = int(event['lane'] == 'network')
    x, end = place(event['begin']), min(place(event['begin'] + event['seconds']), WIDTH)
    waits = event['category'] == 'collective' and not lane
    title = f'{event["name"]}: {event["seconds"] * 1e6:,.1f} us' + (', waiting' if waits else '')
    bars.append({'x': f'{x:.2f}', 'y': (HEIGHT + GAP) * lane, 'width': f'{max(end - x - 0.4, 0.3):.2f}',
                 'category': event['category'], 'waits': waits, 'title': f'{title} {event["op_name"][-90:]}'})
  ticks = [{'x': f'{place(whole * i / 5):.1f}', 'anchor': 'end' if i == 5 else 'middle',
            'text': f'{whole * i / 5 * 1e3:.3g} ms'} for i in range(6)]
  lanes = [{'y': lane * (HEIGHT + GAP) + HEIGHT / 2 + 4, 'name': name} for lane, name in enumerate(('core', 'links'))]
  return {'name': loop['name'], 'width': WIDTH, 'height': 2 * HEIGHT + 30, 'bar_height': HEIGHT, 'bars': bars,
          'lanes': lanes, 'ticks': ticks}
