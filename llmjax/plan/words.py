"""A plan as text for the terminal.  No JAX here."""

import math

WIDTH = 100  # Characters of a line, at most.
PARTS = {'matmul': 'matrix products', 'other': 'other instructions', 'kernel': 'Pallas kernels, at their best',
         'bubble': 'pipeline bubble', 'exposed': 'waiting for collectives'}
MEMORY = {'parameters': 'parameters', 'optimizer': 'optimizer', 'batch': 'batch', 'gradients': 'gradients',
          'activations': 'activations kept', 'temporaries': 'temporaries', 'code': 'program'}


def table(rows, right=()):
  """Returns rows of cells as aligned columns of at most WIDTH characters; the widest column gives way."""
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
  return f'{count / (1 << 30):,.2f}'


def duration(seconds):
  """Returns seconds in words: '2.72 s', '31.5 days'."""
  for size, unit in ((86400, 'days'), (3600, 'h'), (60, 'min')):
    if seconds >= 2 * size:
      return f'{seconds / size:.1f} {unit}'
  return f'{seconds:.3g} s'


def number(count):
  """Returns a count in short: '6.74 G', '32 k'."""
  for size, unit in ((1e12, 'T'), (1e9, 'G'), (1e6, 'M'), (1e3, 'k')):
    if count >= size:
      return f'{count / size:.3g} {unit}'
  return f'{count:.3g}'


def mesh_words(plan):
  return ' x '.join(f'{axis} {n}' for axis, n in plan['mesh'].items()) or 'one device'


def describe(plan):
  """Returns the plan as lines of at most WIDTH characters."""
  return '\n'.join([*headline(plan), '', *memory_lines(plan), '', *time_lines(plan), '', *collective_lines(plan),
                    '', *cost_lines(plan)])


def headline(plan):
  slices = f' x {plan["slices"]} slices' if plan['slices'] > 1 else ''
  yield (f'{plan["model"]}, {number(plan["parameters"])} parameters, on {plan["topology"]}{slices} '
         f'({plan["chips"]} chips): {mesh_words(plan)}')
  yield f'links: {plan["links"]}'
  yield (f'{plan["batch_size"]} rows x {plan["seq_len"]} tokens, remat {plan["remat"]}, accumulation '
         f'{plan["accumulation"]}; from {plan["source"]}'
         + (f' in {plan["compile_seconds"]:.0f} s by libtpu {plan["versions"]["libtpu"]}'
            if 'compile_seconds' in plan else ''))


def memory_lines(plan):
  """Yields the table of one device's memory and its largest tensors."""
  memory = plan['hbm_bytes']
  rows = [('memory of one device', 'GiB', '')]
  over = memory['total'] - memory['limit']
  whole = max(memory['limit'], memory['total'])  # Of what does not fit the bars are of all that is asked for.
  rows += [(words, gib(memory[name]), _bar(memory[name] / whole)) for name, words in MEMORY.items()]
  rows.append(('total', gib(memory['total']), f'of {gib(memory["limit"])}: '
               + ('fits' if plan['fits'] else 'DOES NOT FIT' + (f', {gib(over)} GiB over' if over > 0 else ''))))
  yield table(rows, right=(1,))
  large = sorted(plan['kept'] + plan['largest'], key=lambda t: -t['bytes'] * t['count'])[:6]
  if not plan['fits'] and plan.get('arrays'):
    large = plan['arrays'][:6]
  if large:
    yield 'largest:'
    yield table([(f'  {gib(t["bytes"] * t["count"])} GiB', f'{t["count"]} x {t["type"]}', t['what'])
                 for t in large])
  if not plan['fits']:
    changes = plan.get('changes', [])
    yield 'what would fit, by closed forms, the fastest first:' if changes else (
        'no change of remat, accumulation, moments, mesh or batch would fit by closed forms; more chips would')
    for change in changes:
      text = ' '.join(f'--config.{name}={value}' for name, value in change['change'].items())
      yield f'  {text}  ({gib(change["total"])} GiB, {change["tokens_per_second_per_chip"]:,.0f} tokens/s/chip)'


def _bar(part):
  return '#' * min(math.ceil(part * 30 - 0.5), 40)


def time_lines(plan):
  """Yields where a step's time goes, and what follows from it."""
  parts, seconds = plan['parts'], plan['step_seconds']
  rows = [('time of a step', 'seconds', '')]
  rows += [(PARTS[name], f'{value:.4f}', f'{value / seconds:5.1%}') for name, value in parts.items()
           if value or name != 'bubble']
  rows.append(('step', f'{seconds:.4f}', ''))
  yield table(rows, right=(1, 2))
  if plan['cycles']:
    yield (f'{plan["cycles"]["total"]:,} cycles at {plan["clock_hz"] / 1e9:.4g} GHz; collectives take '
           f'{plan["network_seconds"]:.4f} s, {max(plan["network_seconds"] - parts["exposed"], 0):.4f} s of it hidden')
    if unpriced := sorted({k['name'] for k in plan['kernels'] if k['flops'] is None}):
      yield f'kernels of unknown FLOPs, which count nothing: {", ".join(unpriced[:4])}'
    if plan['unknown_loops']:
      yield f'loops of unknown length, which count once: {", ".join(plan["unknown_loops"][:4])}'
  yield (f'{plan["tokens_per_second_per_chip"]:,.0f} tokens/s/chip, MFU {plan["mfu"]:.1%}; '
         f'{number(plan["budget"]["tokens"])} tokens in {plan["budget"]["steps"]:,} steps take '
         f'{duration(plan["budget"]["seconds"])}')


def collective_lines(plan):
  """Yields the table of what a step sends."""
  if not plan['collectives']:
    yield 'collectives of a step: none'
    return
  rows = [('collective', 'over', 'links', '', 'runs/step', 'GiB sent', 'seconds')]
  for r in plan['collectives'][:12]:
    rows.append((r['kind'], ', '.join(r['axes']), r['network'], 'async' if r['asynchronous'] else '', r['runs'],
                 gib(r['sent_bytes']), f'{r["seconds"]:.4f}'))
  yield table(rows, right=(4, 5, 6))


def cost_lines(plan):
  """Yields money, energy and carbon, and which settings are missing for them."""
  cost, missing = plan['cost'], []
  money = f'{cost["chip_hours"]:,.0f} chip-hours'
  if cost['money'] is None:
    missing.append('price_per_chip_hour')
  else:
    money += f': {cost["money"]:,.0f} {cost["currency"]} at {cost["price_per_chip_hour"]:g} a chip-hour'
  yield money
  if cost['kwh'] is None:
    missing.append('chip_watts (no power of this chip is published)')
  else:
    energy = f'{cost["kwh"]:,.0f} kWh at {cost["watts_per_chip"]:g} W a chip and PUE {cost["pue"]:g}'
    if cost['kg_co2'] is not None:
      energy += f': {cost["kg_co2"]:,.0f} kg CO2e at {cost["grid_grams_per_kwh"]:g} g/kWh'
    yield energy
  if not cost['grid_grams_per_kwh']:
    missing.append('grid_grams_per_kwh')
  if missing:
    yield f'not stated; set config.cost: {", ".join(missing)}'
