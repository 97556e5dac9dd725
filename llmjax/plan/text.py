"""Formats a plan as text for the terminal.  Imports no JAX."""

import math

WIDTH = 100  # Maximum characters per line.
PARTS = {'matmul': 'matrix products', 'other': 'other instructions', 'kernel': 'Pallas kernels (lower bound)',
         'bubble': 'pipeline bubble', 'exposed': 'waiting for collectives'}
MEMORY = {'parameters': 'parameters', 'optimizer': 'optimizer', 'batch': 'batch', 'gradients': 'gradients',
          'activations': 'saved activations', 'temporaries': 'temporaries', 'code': 'program'}


def table(rows, right=()):
  """Format rows as aligned columns of at most WIDTH characters in total; the widest column is truncated.

  right: indices of right-aligned columns.
  """
  rows = [[str(cell) for cell in row] for row in rows]
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  while sum(widths) + 2 * (len(widths) - 1) > WIDTH:
    widths[widths.index(max(widths))] -= 1
  cut = lambda cell, width: cell if len(cell) <= width else '...' + cell[len(cell) - width + 3:]
  lines = []
  for row in rows:
    cells = [f'{cut(cell, w):>{w}}' if i in right else f'{cut(cell, w):<{w}}'
             for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
    lines.append('  '.join(cells).rstrip())
  return '\n'.join(lines)


def gib(count):
  """Format bytes in GiB."""
  return f'{count / (1 << 30):,.2f}'


def duration(seconds):
  """Format seconds: '2.72 s', '31.5 days'."""
  for size, unit in ((86400, 'days'), (3600, 'h'), (60, 'min')):
    if seconds >= 2 * size:
      return f'{seconds / size:.1f} {unit}'
  return f'{seconds:.3g} s'


def number(count):
  """Format a count: '6.74 G', '32 k'."""
  for size, unit in ((1e12, 'T'), (1e9, 'G'), (1e6, 'M'), (1e3, 'k')):
    if count >= size:
      return f'{count / size:.3g} {unit}'
  return f'{count:.3g}'


def format_mesh(plan):
  return ' x '.join(f'{axis} {n}' for axis, n in plan['mesh'].items()) or 'one device'


def describe(plan):
  """Format a plan in lines of at most WIDTH characters."""
  return '\n'.join([*headline(plan), '', *memory_lines(plan), '', *time_lines(plan), '', *collective_lines(plan),
                    '', *cost_lines(plan)])


def headline(plan):
  """Yield model, chips, links, batch and source of the plan."""
  slices = f' x {plan["slices"]} slices' if plan['slices'] > 1 else ''
  yield (f'{plan["model"]}, {number(plan["parameters"])} parameters, on {plan["topology"]}{slices} '
         f'({plan["chips"]} chips): {format_mesh(plan)}')
  yield f'links: {plan["links"]}'
  yield (f'{plan["batch_size"]} sequences x {plan["seq_len"]} tokens, remat {plan["remat"]}, '
         f'gradient_accumulation_steps {plan["gradient_accumulation_steps"]}')
  yield (f'compiled in {plan["compile_seconds"]:.0f} s by libtpu {plan["versions"]["libtpu"]}'
         if 'compile_seconds' in plan else f'from {plan["source"]}')


def memory_lines(plan):
  """Yield the table of memory per device and the largest arrays."""
  memory = plan['hbm_bytes']
  rows = [('memory per device', 'GiB', '')]
  over = memory['total'] - memory['limit']
  full_bar = max(memory['limit'], memory['total'])
  rows += [(label, gib(memory[name]), _bar(memory[name] / full_bar)) for name, label in MEMORY.items()]
  rows.append(('total', gib(memory['total']), f'of {gib(memory["limit"])}: '
               + ('fits' if plan['fits'] else 'DOES NOT FIT' + (f', {gib(over)} GiB over' if over > 0 else ''))))
  yield table(rows, right=(1,))
  large = sorted(plan['saved_activations'] + plan['largest_state'], key=lambda t: -t['bytes'] * t['count'])[:6]
  if not plan['fits'] and plan.get('largest_buffers'):
    large = plan['largest_buffers'][:6]
  if large:
    yield 'largest:'
    yield table([(f'  {gib(t["bytes"] * t["count"])} GiB', f'{t["count"]} x {t["type"]}', t['name'])
                 for t in large])
  if not plan['fits']:
    changes = plan.get('changes', [])
    yield 'changes that fit according to the analytical model, the fastest first:' if changes else (
        'no change of remat, accumulation, moment dtype, mesh or batch size would fit; use more chips')
    for change in changes:
      text = ' '.join(f'--config.{name}={value}' for name, value in change['change'].items())
      yield f'  {text}  ({gib(change["total"])} GiB, {change["tokens_per_second_per_chip"]:,.0f} tokens/s/chip)'


def _bar(fraction):
  return '#' * min(math.ceil(fraction * 30 - 0.5), 40)


def time_lines(plan):
  """Yield the table of step time, throughput and the duration of the run."""
  parts, seconds = plan['parts'], plan['step_seconds']
  rows = [('step time', 'seconds', '')]
  rows += [(PARTS[name], f'{value:.4f}', f'{value / seconds:5.1%}') for name, value in parts.items()
           if value or name != 'bubble']
  rows.append(('step', f'{seconds:.4f}', ''))
  yield table(rows, right=(1, 2))
  if plan['cycles']:
    hidden = max(plan['network_seconds'] - parts['exposed'], 0)
    yield (f'{plan["cycles"]["total"]:,} cycles at {plan["clock_hz"] / 1e9:.4g} GHz; collectives take '
           f'{plan["network_seconds"]:.4f} s, of which {hidden:.4f} s are overlapped')
    if unpriced := sorted({k['name'] for k in plan['kernels'] if k['flops'] is None}):
      yield f'kernels of unknown FLOPs, not counted: {", ".join(unpriced[:4])}'
    if plan['unknown_loops']:
      yield f'loops of unknown trip count, counted once: {", ".join(plan["unknown_loops"][:4])}'
  yield (f'{plan["tokens_per_second_per_chip"]:,.0f} tokens/s/chip, MFU {plan["mfu"]:.1%}; '
         f'{number(plan["budget"]["tokens"])} tokens in {plan["budget"]["steps"]:,} steps take '
         f'{duration(plan["budget"]["seconds"])}')


def collective_lines(plan):
  """Yield the table of a step's collectives."""
  if not plan['collectives']:
    yield 'collectives per step: none'
    return
  rows = [('collective', 'over', 'links', '', 'runs/step', 'GiB sent', 'seconds')]
  for r in plan['collectives'][:12]:
    rows.append((r['kind'], ', '.join(r['axes']), r['network'], 'async' if r['asynchronous'] else '', r['runs'],
                 gib(r['sent_bytes']), f'{r["seconds"]:.4f}'))
  yield table(rows, right=(4, 5, 6))


def cost_lines(plan):
  """Yield money, energy and carbon, and the settings that are missing for them."""
  cost, missing = plan['cost'], []
  money = f'{cost["chip_hours"]:,.0f} chip-hours'
  if cost['money'] is None:
    missing.append('price_per_chip_hour')
  else:
    money += f': {cost["money"]:,.0f} {cost["currency"]} at {cost["price_per_chip_hour"]:g} a chip-hour'
  yield money
  if cost['kwh'] is None:
    missing.append('chip_watts (the power of this chip is not published)')
  else:
    energy = f'{cost["kwh"]:,.0f} kWh at {cost["watts_per_chip"]:g} W a chip and PUE {cost["pue"]:g}'
    if cost['kg_co2'] is not None:
      energy += f': {cost["kg_co2"]:,.0f} kg CO2e at {cost["grid_grams_per_kwh"]:g} g/kWh'
    yield energy
  if not cost['grid_grams_per_kwh']:
    missing.append('grid_grams_per_kwh')
  if missing:
    yield f'to complete the cost, set config.cost: {", ".join(missing)}'
