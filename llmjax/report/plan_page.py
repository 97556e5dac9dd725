"""The page of a training plan, plan.html, with timelines of its loops.  Does not import JAX."""

from llmjax.plan import text
from llmjax.report import page, plots

COLORS = {'matmul': 'var(--c0)', 'kernel': 'var(--c2)', 'collective': 'var(--c1)', 'other': 'var(--c5)',
          'loop': 'var(--c3)'}
NAMES = {'matmul': 'matrix products', 'kernel': 'Pallas kernels', 'collective': 'collectives and waiting for them',
         'other': 'other instructions'}
TENSORS = 12  # The largest ones that are listed.


def render(plan):
  """Return the HTML of a plan: the dict in plan.json."""
  slices = f' x {plan["slices"]} slices' if plan['slices'] > 1 else ''
  memory, parts = plan['hbm_bytes'], plan['parts']
  over = memory['total'] - memory['limit']
  gib = lambda size: f'{text.gib(size)} GiB'
  return page.render('plan.html', {
      'title': f'{plan["model"]} on {plan["topology"]}{slices}', 'subtitle': list(text.headline(plan)), 'charts': [],
      'tiles': _tiles(plan),
      'memory': _stack({text.MEMORY[k]: memory[k] for k in text.MEMORY}, memory['limit'], gib),
      'over': {'limit': gib(memory['limit']), 'value': gib(over)} if over > 0 else None,
      'tensors': [[text.gib(t['bytes'] * t['count']), t['count'], t['type'], t['name']] for t in sorted(
          plan['saved_activations'] + plan['largest_state'], key=lambda t: -t['bytes'] * t['count'])[:TENSORS]],
      'changes': [' '.join(f'--config.{name}={value}' for name, value in change['change'].items())
                  for change in plan.get('changes', ())],
      'step': _stack({text.PARTS[k]: v for k, v in parts.items()}, plan['step_seconds'], lambda s: f'{s:.4f} s'),
      'loops': [(_loop_title(loop), plots.timeline(loop)) for loop in plan.get('loops', ())],
      'colors': COLORS, 'categories': NAMES,
      'collectives': [
          [r['kind'], ', '.join(r['axes']), r['network'], 'yes' if r['asynchronous'] else 'no', r['runs'],
           text.gib(r['sent_bytes']), f'{r["seconds"]:.4f}'] for r in plan['collectives']],
      'top': [[f'{t["seconds"]:.4f}', t['category'], t['name'], t['runs'], t['op_name'][-70:]]
              for t in plan.get('top', ())],
      'cost': list(text.cost_lines(plan))})


def timeline(loop):
  """Return the SVG of a loop body: the operations of the core by category, and the transfers on the links."""
  return page.render_macro('timeline', plots.timeline(loop), COLORS)


def _tiles(plan):
  """Return [(value, unit, label)] of the headline figures."""
  memory, budget = plan['hbm_bytes'], plan['budget']
  return [
      (text.gib(memory['total']), f'GiB of {text.gib(memory["limit"])}',
       f'memory per device: {"fits" if plan["fits"] else "does not fit"}'),
      (f'{plan["step_seconds"]:.3f}', 's', f'per step of {text.number(plan["tokens_per_step"])} tokens'),
      (f'{plan["tokens_per_second_per_chip"]:,.0f}', 'tokens/s/chip', f'MFU {plan["mfu"]:.1%}'),
      (text.duration(budget['seconds']), '', f'for {text.number(budget["tokens"])} tokens')]


def _loop_title(loop):
  direction = 'backward' if loop['backward'] else 'forward'
  return f'One iteration of {loop["name"]}, {direction}: {loop["seconds"] * 1e3:.3g} ms, {loop["trips"]} iterations'


def _stack(sizes, whole, form):
  """Return the parts of a bar, {name: size}, whose full width is `whole`; no percentages if the sizes exceed it."""
  total = sum(sizes.values())
  used = [(name, size) for name, size in sizes.items() if size]
  return [{'name': name, 'color': f'c{i % 8}', 'share': f'{100 * size / max(whole, total):.2f}', 'value': form(size),
           'percent': f'{size / whole:.1%}' if total <= whole * 1.0001 else ''} for i, (name, size) in enumerate(used)]
