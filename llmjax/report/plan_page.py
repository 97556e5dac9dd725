"""plan.html: the plan as one self-contained page, with a layer's timeline as a picture.  No JAX here."""

import html

from llmjax.plan import text
from llmjax.report.page import render_page, table

COLORS = {'matmul': 'var(--c0)', 'kernel': 'var(--c2)', 'collective': 'var(--c1)', 'other': 'var(--c5)',
          'loop': 'var(--c3)'}
NAMES = {'matmul': 'matrix products', 'kernel': 'Pallas kernels', 'collective': 'collectives and waiting for them',
         'other': 'other instructions'}
WIDTH, HEIGHT, LEFT = 1060, 34, 64  # Pixels of a picture's core lane.


def render(plan):
  """Returns the HTML of a plan, the dict that plan.json holds."""
  verdict = 'fits' if plan['fits'] else 'does not fit'
  slices = f' x {plan["slices"]} slices' if plan['slices'] > 1 else ''
  title = f'{plan["model"]} on {plan["topology"]}{slices}'
  memory, budget = plan['hbm_bytes'], plan['budget']
  tiles = [
      (f'{text.gib(memory["total"])}<i>GiB of {text.gib(memory["limit"])}</i>', f'memory per device: {verdict}'),
      (f'{plan["step_seconds"]:.3f}<i>s</i>', f'a step of {text.number(plan["tokens_per_step"])} tokens'),
      (f'{plan["tokens_per_second_per_chip"]:,.0f}<i>tokens/s/chip</i>', f'MFU {plan["mfu"]:.1%}'),
      (text.duration(budget['seconds']), f'for {text.number(budget["tokens"])} tokens'),
  ]
  body = [f'<header><div><h1>{html.escape(title)}</h1>'
          + ''.join(f'<p class="soft">{html.escape(line)}</p>' for line in text.headline(plan)) + '</div></header>',
          '<div class="grid">' + ''.join(f'<div class="card tile"><b>{value}</b><span>{html.escape(what)}</span></div>'
                                         for value, what in tiles) + '</div>']
  body += _section('Memory per device', _stack(
      [(text.MEMORY[k], memory[k]) for k in text.MEMORY], memory['limit'], lambda n: f'{text.gib(n)} GiB',
      memory['total'] - memory['limit']))
  large = plan['saved_activations'] + plan['largest_state']
  if large:
    body.append(table(('GiB', 'number', 'type', 'of'), [
        (text.gib(t['bytes'] * t['count']), t['count'], t['type'], t['name'])
        for t in sorted(large, key=lambda t: -t['bytes'] * t['count'])[:12]]))
  for change in plan.get('changes', ()):
    flags = ' '.join(f'--config.{name}={value}' for name, value in change['change'].items())
    body.append(f'<p class="note">fits according to the analytical model: <code>{html.escape(flags)}</code></p>')
  body += _section('A step', _stack([(text.PARTS[k], v) for k, v in plan['parts'].items()], plan['step_seconds'],
                                    lambda s: f'{s:.4f} s'))
  for loop in plan.get('loops', ()):
    way = 'backward' if loop['backward'] else 'forward'
    body += _section(f'One turn of {loop["name"]}, {way}: {loop["seconds"] * 1e3:.3g} ms, {loop["trips"]} turns',
                     timeline(loop))
  if plan.get('loops'):
    body.append('<p class="small">' + ' '.join(
        f'<span class="key"><s style="background:{COLORS[k]}"></s>{v}</span>' for k, v in NAMES.items()) + '</p>')
  if plan['collectives']:
    body += _section('Collectives of a step', table(
        ('kind', 'over', 'links', 'asynchronous', 'runs', 'GiB sent', 'seconds'),
        [(r['kind'], ', '.join(r['axes']), r['network'], 'yes' if r['asynchronous'] else 'no', r['runs'],
          text.gib(r['sent_bytes']), f'{r["seconds"]:.4f}') for r in plan['collectives']]))
  if plan.get('top'):
    body += _section('The most expensive instructions', table(
        ('seconds a step', 'category', 'instruction', 'runs', 'of'),
        [(f'{t["seconds"]:.4f}', t['category'], t['name'], t['runs'], t['op_name'][-70:]) for t in plan['top']]))
  body += _section('Cost', ''.join(f'<p>{html.escape(line)}</p>' for line in text.cost_lines(plan)))
  return render_page(title, '\n'.join(body), [])


def _section(title, content):
  return [f'<h2>{html.escape(title)}</h2>', f'<div class="card scroll">{content}</div>']


def _stack(parts, whole, show, over=0):
  """Returns one bar of parts and its legend, with the share of `whole` of each.

  whole: what the full width stands for.  over: by how much the parts exceed it; there are no shares then.
  """
  bars, legend = [], []
  for i, (name, value) in enumerate(p for p in parts if p[1]):
    color = f'var(--c{i % 8})'
    bars.append(f'<div style="width:{100 * value / max(whole, sum(v for _, v in parts)):.2f}%;background:{color}" '
                f'title="{html.escape(name)}"></div>')
    legend.append(f'<div><s style="background:{color}"></s><span>{html.escape(name)}</span><b>{show(value)}</b>'
                  f'<span>{"" if over > 0 else f"{value / whole:.1%}"}</span></div>')
  if over > 0:
    legend.append(f'<div><s style="background:var(--bad)"></s><span>over the limit of {show(whole)}</span>'
                  f'<b>{show(over)}</b><span></span></div>')
  return f'<div class="stack">{"".join(bars)}</div><div class="legend">{"".join(legend)}</div>'


def timeline(loop):
  """Returns the SVG of a loop's body: what the core does, by category, and below it what the links carry."""
  whole = loop['seconds'] or 1.0
  place = lambda seconds: LEFT + (WIDTH - LEFT) * seconds / whole
  lines = [f'<svg viewBox="0 0 {WIDTH} {2 * HEIGHT + 30}" width="100%" role="img" '
           f'aria-label="timeline of {html.escape(loop["name"])}">']
  for lane, name in enumerate(('core', 'links')):
    lines.append(f'<text x="0" y="{lane * (HEIGHT + 6) + HEIGHT / 2 + 4}">{name}</text>')
  for event in loop['events']:
    lane = event['lane'] == 'network'
    x, end = place(event['begin']), min(place(event['begin'] + event['seconds']), WIDTH)
    y = (HEIGHT + 6) * lane
    waits = event['category'] == 'collective' and not lane
    what = f'{event["name"]}: {event["seconds"] * 1e6:,.1f} us' + (', waiting' if waits else '')
    faint = ' opacity="0.55"' if waits else ''
    lines.append(f'<rect x="{x:.2f}" y="{y}" width="{max(end - x - 0.4, 0.3):.2f}" height="{HEIGHT}" '
                 f'fill="{COLORS[event["category"]]}"{faint}><title>{html.escape(what)} '
                 f'{html.escape(event["op_name"][-90:])}</title></rect>')
  for i in range(6):
    x = place(whole * i / 5)
    anchor = 'end' if i == 5 else 'middle'
    lines.append(f'<text x="{x:.1f}" y="{2 * HEIGHT + 24}" text-anchor="{anchor}">{whole * i / 5 * 1e3:.3g} ms</text>')
  return ''.join(lines) + '</svg>'
