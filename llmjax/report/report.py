"""`write_report`: one page a researcher wants to look at, made from what is in a run's folder.

Every file may be missing or damaged: the page shows what there is and names what there is not.
"""

import html
import math
import os
import pathlib
import statistics

from llmjax import secrets
from llmjax.evaluate import metrics, rollouts
from llmjax.report import page
from llmjax.report.runs import count, duration, held_out, is_of_pairs, number, parameters, read_run, steps_done

SAMPLE_STEPS, SAMPLE_CHARACTERS = 24, 3000  # So that long runs stay below a megabyte.
EVENTS = 100  # Of the newest, so that a run in trouble does not fill the page.
EVENT_NAMES = {'start': 'start', 'bad_step': 'bad step', 'rollback': 'rollback', 'corruption': 'corruption',
               'straggler': 'slow process', 'early_stop': 'no more progress', 'stopped': 'stopped',
               'interrupted': 'interrupted', 'config_change': 'settings changed', 'done': 'done'}
# Tables of evaluations: title, the measure that tells them (None: no other one does), columns (measure, head, format).
EVALUATIONS = (
    ('held-out text', None, (
        ('step', 'step', '{:,}'), ('loss', 'loss, nats a token', '{:.4f}'), ('perplexity', 'perplexity', '{:.3f}'),
        ('bits_per_byte', 'bits/byte', '{:.4f}'), ('xz_bits_per_byte', 'xz -9', '{:.4f}'),
        ('gzip_bits_per_byte', 'gzip -9', '{:.4f}'), ('sequences', 'sequences', '{:,}'), ('tokens', 'tokens', '{:,}'),
        ('bytes', 'bytes', '{:,}'))),
    ('answers to prompts', 'reward', (
        ('step', 'step', '{:,}'), ('answers', 'prompts', '{:,}'), ('reward', 'mean reward', '{:.3f}'),
        ('ended', 'ended', '{:.1%}'), ('tokens', 'tokens each', '{:.1f}'))),
    ('held-out pairs or steps', 'accuracy', (
        ('step', 'step', '{:,}'), ('pairs', 'pairs', '{:,}'), ('steps', 'steps', '{:,}'),
        ('accuracy', 'ranked right', '{:.1%}'), ('margin', 'margin', '{:.3f}'), ('loss', 'loss', '{:.4f}'))))
# What prepared folders hold, and what a document is there.
KINDS = {'text': 'text', 'chat': 'conversations', 'preference': 'pairs, a document for each completion',
         'prompts': 'prompts', 'stepwise': 'solutions in steps'}
COMPRESSORS = (('xz_bits_per_byte', 'xz -9'), ('gzip_bits_per_byte', 'gzip -9'))


def write_report(workdir) -> pathlib.Path:
  """Writes `<workdir>/report.html` in one move and returns its path."""
  run = read_run(workdir)
  path = run.folder / 'report.html'
  temporary = path.with_suffix('.html.tmp')
  temporary.write_text(secrets.hide(render(run)), encoding='utf-8')
  os.replace(temporary, path)
  return path


def render(run):
  """Returns the page as text."""
  charts = {}
  sections = [_header(run), _warnings(run), _headline(run), _curves(run, charts), _time(run),
              _energy(run), _events(run), _samples(run), _rollouts(run), _margins(run, charts), _evaluation(run),
              _data(run), _profile(run),
              _settings(run), _command(run), _missing(run)]
  return page.render_page(f'{_name(run)} · llmjax', '\n'.join(filter(None, sections)), charts)


def _e(text):
  return html.escape(str(text))


def _name(run):
  return run.folder.resolve().name or 'run'


def _header(run):
  done, total = steps_done(run), run.number('train', 'steps')
  model = run.config.get('model')
  parts = []
  if isinstance(model, dict):
    width, layers = model.get('d_model'), model.get('num_layers')
    parts.append(' '.join(filter(None, [
        model.get('preset') or 'decoder', layers and f'{layers} layers', width and f'× {width}'])))
  sources = run.get('data', 'sources')
  if isinstance(sources, dict) and sources:
    parts.append(', '.join(pathlib.PurePath(s).name for s in sources))
  if done is not None:
    parts.append(f'{done:,} steps' if not total or done >= total else
                 f'{done:,} of {total:,} steps')
  device = run.environment.get('device_kind')
  if device:
    number = run.environment.get('device_count')
    parts.append(f'{number} × {device}' if number else str(device))
  return (f'<header><div><h1>{_e(_name(run))}</h1><span class="soft">{_e(" · ".join(parts))}</span>'
          '</div><button id="theme">light / dark</button></header>')


def _warnings(run):
  """Says what must not be overlooked: losses that are not finite, devices that compute wrongly."""
  steps, values = run.curve('train/loss')
  bad = [s for s, v in zip(steps, values, strict=True) if not math.isfinite(v)]
  lines = []
  if bad:
    lines.append(f'The training loss was not finite at {len(bad)} logged '
                 f'step{"s" if len(bad) > 1 else ""}, first at step {bad[0]:,}.')
  corrupt = [event for event in run.events if event.get('kind') == 'corruption']
  if corrupt:
    lines.append('Devices held different copies of the same parameters: see What happened, below.')
  return ''.join(f'<p class="warn">{_e(line)}</p>' for line in lines)


# What a run that is not about likelihood is measured by: metric, title, how it is written.
HEADLINES = (('reward', 'Reward of held-out answers', '{:.3f}'),
             ('accuracy', 'Held-out pairs whose better answer scores higher', '{:.1%}'))


def _headline(run):
  found = held_out(run)
  own, values = (found.measure('bits_per_byte'), found.values) if found else (None, {})
  other = next(((form.format(e.measure(key)), title, e) for key, title, form in HEADLINES for name in run.eval_names()
                for e in run.evaluations(name, key)[:1]), None)
  if other:
    figure, title, found = other
    card = (f'<div class="card alone"><h3>{title}</h3><div class="big">{figure}<i>{_e(found.name)}</i></div>'
            f'<p class="soft small">{_e(found.of())}.</p></div>')
  elif own is None:
    card = ('<div class="card alone"><h3>Held-out bits per byte</h3><p class="soft">Not measured '
            'yet: <code>llmjax evaluate</code> does, beside gzip and xz.</p></div>')
  else:
    bars = [('this model', own, 'own')]
    bars += [(label, number(values, key), '') for key, label in COMPRESSORS
             if number(values, key)]
    longest = max(v for _, v, _ in bars) or 1.0
    rows = ''.join(
        f'<span>{_e(label)}</span><div class="{kind}" style="width:{100 * v / longest:.1f}%"></div>'
        f'<b>{v:.3f}</b>' for label, v, kind in bars)
    if len(bars) == 1:
      rows = ''
    compared = ', '.join(
        f'{abs(1 - own / v):.0%} {"fewer" if own < v else "more"} than {label}'
        for label, v, kind in bars if not kind) or (
            'Less is better. <code>llmjax evaluate</code> sets gzip and xz beside it.')
    card = (f'<div class="card{"" if rows else " alone"}"><h3>Held-out bits per byte</h3>'
            f'<div class="big">{own:.3f}<i>{_e(found.name)}</i></div>'
            f'<p class="soft small">{_e(found.of())}. {compared}</p>'
            f'{rows and f"<div class=bars>{rows}</div>"}</div>')
  tiles = ''.join(
      f'<div class="card tile"><span>{_e(label)}</span><b>{_valued(value)}</b>'
      f'<em>{_e(note)}</em></div>'
      for label, value, note in _tiles(run))
  return f'<div class="head">{card}<div class="tiles">{tiles}</div></div>'


def _valued(text):
  """Returns '58.5 M' with its unit set smaller."""
  number, space, unit = text.partition(' ')
  if space and ' ' not in unit:
    return f'{_e(number)}<i>{_e(unit)}</i>'
  return _e(text)


def _tiles(run):
  """Yields (label, value, note) of the small headline figures."""
  done = steps_done(run)
  yield 'Parameters', count(parameters(run)), _layers_note(run)
  tokens = None
  rows, length = run.number('train', 'batch_size'), run.number('data', 'seq_len')
  if done is not None and rows and length:
    rows *= 2 if is_of_pairs(run) else 1
    tokens = done * rows * length
  padded = run.get('data', 'packing') in ('best_fit', 'pad') or 'rl' in run.config or is_of_pairs(run)
  yield ('Tokens seen', count(tokens),
         f'{count(rows * length)} a step{", padding included" * padded}' if tokens else '')
  speed = _median(run, 'train/tokens_per_second')
  yield 'Tokens a second', count(speed), 'median of the log' if speed else ''
  # A peak that was exceeded was measured on a busy machine: no part of it means anything.
  exceeded = any(value > 1 for value in run.curve('train/mfu')[1])
  mfu = None if exceeded else _median(run, 'train/mfu')
  yield ('Model FLOPs used', '–' if mfu is None else f'{100 * mfu:.3g} %',
         'the measured peak was too low' if exceeded else '' if mfu is None else 'of the peak (MFU)')
  seconds = sum(v for v in map(lambda k: number(run.time, k), run.time) if v)
  yield 'Wall time', duration(seconds or None), 'all of it, start to end' if seconds else ''
  step, loss = run.last('train/loss')
  before = [s for s in run.curve('train/loss')[0] if step is not None and s < step]
  steps = step and step - (before[-1] if before else 0)
  yield ('Training loss', '–' if loss is None else metrics.format_loss(loss),
         '' if step is None else f'step {step:,}' + f', mean of {steps:,} steps' * (steps > 1))


def _layers_note(run):
  layers, width = run.get('model', 'num_layers'), run.get('model', 'd_model')
  return f'{layers} layers, width {width}' if layers and width else ''


def _median(run, key):
  values = [v for v in run.curve(key)[1] if math.isfinite(v)]
  return statistics.median(values) if values else None


def _curves(run, charts):
  """Returns the charts' HTML and adds their data to `charts`."""
  parts = []

  def add(name, title, series, height=200, **options):
    series = [s for s in series if s is not None and s['x']]
    if not any(s['kind'] != 'rule' for s in series):
      return
    charts[name] = {'title': title, 'height': height, 'series': series, **options}
    parts.append((name, page.line_chart(name, charts[name])))

  steps, losses = run.curve('train/loss')
  names = run.eval_names()
  measured = any(run.curve(f'eval/{name}/{key}')[0] for key, *_ in HEADLINES for name in names)
  add('loss', 'Loss' if measured else 'Loss, nats a token', metrics.trend('as logged', 0, steps, losses) + [
      metrics.series(name, 'dots', 1 + i, *run.curve(f'eval/{name}/loss'))
      for i, name in enumerate(names[:6])],
      height=340, switches=['ylog', 'xlog'],
      bad=[s for s, v in zip(steps, losses, strict=True) if not math.isfinite(v)][:200])
  best = held_out(run)
  rules = [metrics.series(f'{label}, all of {best.name}', 'rule', 5 + i, [0], [best.measure(key)])
           for i, (key, label) in enumerate(COMPRESSORS) if best and best.measure(key) is not None]
  add('bits', 'Held-out bits per byte', [
      metrics.series(name, 'dots', 1 + i, *run.curve(f'eval/{name}/bits_per_byte'))
      for i, name in enumerate(names[:4])] + rules)
  add('reward', 'Reward of sampled answers, and of the likeliest ones', metrics.trend('sampled', 2, *run.curve(
      'rollout/reward')) + [metrics.series(name, 'dots', 1 + i, *run.curve(f'eval/{name}/reward'))
                            for i, name in enumerate(names[:4])])
  add('kl', 'KL from the reference, nats an answer', metrics.trend('sampled', 3, *run.curve('rollout/kl')), zero=True)
  add('answer_tokens', 'Tokens of an answer', metrics.trend('sampled', 4, *run.curve('rollout/tokens')), zero=True)
  pairs = [(name, 1 + i) for i, name in enumerate(names[:4]) if run.curve(f'eval/{name}/accuracy')[0]]
  if pairs:
    add('accuracy', 'Pairs whose better answer scores higher', metrics.trend(
        'batches', 0, *run.curve('train/accuracy')) + [
        metrics.series(name, 'dots', color, *run.curve(f'eval/{name}/accuracy')) for name, color in pairs])
    add('margin', 'Margin between the two answers', metrics.trend('batches', 0, *run.curve('train/margin')) + [
        metrics.series(name, 'dots', color, *run.curve(f'eval/{name}/margin')) for name, color in pairs])
    add('chosen', 'Log-probability of whole answers, nats', metrics.trend('better', 2, *run.curve(
        'train/chosen_logprob')) + metrics.trend('worse', 3, *run.curve('train/rejected_logprob')))
  add('speed', 'Tokens a second',
      metrics.trend('as logged', 2, *run.curve('train/tokens_per_second')), zero=True)
  add('lr', 'Learning rate', [metrics.series('learning rate', 'line', 3, *run.curve('train/lr'))],
      zero=True)
  add('grad_norm', 'Gradient norm',
      metrics.trend('as logged', 4, *run.curve('train/grad_norm')), switches=['ylog'], ylog=True)
  if not parts:
    return ''
  first = parts[0][1] if parts[0][0] == 'loss' else ''
  rest = ''.join(chart for name, chart in parts if name != 'loss')
  return page.section('Curves', first + (f'<div class="grid">{rest}</div>' if rest else ''))


def _time(run):
  spent = [(k, number(run.time, k)) for k in run.time]
  spent = [(k, v) for k, v in spent if v]
  whole = sum(v for _, v in spent)
  if not whole:
    return ''
  # The steps are what a run is for: they come first and in the first colour.
  spent.sort(key=lambda kv: (kv[0] != 'step', kv[0] in ('other', 'lost', 'restart'), -kv[1]))
  names = {'init': 'start', 'compile': 'compilation', 'data_wait': 'waiting for data', 'rollout': 'rollouts',
           'step': 'training steps', 'eval': 'evaluation', 'sample': 'sampling',
           'checkpoint': 'checkpoints', 'lost': 'steps done again', 'restart': 'between sittings',
           'other': 'other'}
  bar = ''.join(f'<div style="flex:{v / whole:.5f};background:var(--{_color(i, k)})" '
                f'title="{_e(names.get(k, k))}: {_e(duration(v))}"></div>'
                for i, (k, v) in enumerate(spent))
  legend = ''.join(
      f'<div><s style="background:var(--{_color(i, k)})"></s><span>{_e(names.get(k, k))}</span>'
      f'<b>{_e(duration(v))}</b><span>{100 * v / whole:.1f} %</span></div>'
      for i, (k, v) in enumerate(spent))
  note = (f'<p class="soft small note">Goodput {100 * (number(run.time, "step") or 0) / whole:.1f} %: training '
          'steps that counted, of the wall time from the first start on.</p>')
  return page.section('Where the time went', f'<div class="card"><div class="stack">{bar}</div>'
                  f'<div class="legend">{legend}</div>{note}</div>')


def _energy(run):
  """Returns the ledger of energy, carbon and money, with what each was computed from or the field it lacks."""
  total, sittings = run.energy.get('total'), run.energy.get('attempts')
  if not isinstance(total, dict) or not isinstance(sittings, list) or not sittings:
    return ''
  last = sittings[-1] if isinstance(sittings[-1], dict) else {}
  unknown = total.get('unknown') if isinstance(total.get('unknown'), dict) else {}
  chips, kind = number(last, 'chips'), last.get('kind')
  watts, pue = number(last, 'watts_per_chip'), number(last, 'pue')
  grams, price = number(last, 'grid_grams_per_kwh'), number(last, 'price_per_chip_hour')
  rows = []
  for name, label, unit, basis in (
      ('chip_hours', 'Held', 'chip-hours', f'{chips or 0:g} × {kind}, for all of the wall time'),
      ('kwh', 'Energy', 'kWh', f'{watts or 0:g} W a chip ({last.get("watts_source")}), PUE {pue or 0:g} (cost.pue)'),
      ('kg_co2', 'Carbon', 'kg CO2e', f'{grams or 0:g} g/kWh (cost.grid_grams_per_kwh), location-based'),
      ('money', 'Money', str(last.get('currency')), f'{price or 0:g} a chip-hour (cost.price_per_chip_hour)')):
    value, lacks = number(total, name), unknown.get(name)
    if isinstance(lacks, dict):
      field = f'set {lacks.get("field")}'
      basis = field if value is None else f'{basis}; not known for {duration(number(lacks, "seconds"))} of it: {field}'
    amount = 'not known' if value is None else f'{value:,.4g} {unit}'
    rows.append(f'<tr><td class="left">{label}</td><td>{_e(amount)}</td><td class="left soft">{_e(basis)}</td></tr>')
  sat = f'{len(sittings)} sittings, {duration(number(total, "seconds"))} in all. ' if len(sittings) > 1 else ''
  return page.section('Energy and cost', (
      '<div class="card"><div class="scroll"><table><tr><th class="left">quantity</th><th>so far</th>'
      f'<th class="left">from</th></tr>{"".join(rows)}</table></div></div><p class="soft small note">{_e(sat)}'
      'Chips count as at work for as long as a sitting holds them. Making them is not in it.</p>'))


def _events(run):
  """Returns the table of what happened to the run, newest last; starts and ends alone are not worth one."""
  events = [e for e in run.events if isinstance(e.get('kind'), str) and isinstance(e.get('step'), int)]
  if not any(e['kind'] not in ('start', 'done') for e in events):
    return ''
  first = next((t for e in events if (t := number(e, 'time')) is not None), 0.0)
  rows = []
  for event in events[-EVENTS:]:
    details, at = event.get('details'), number(event, 'time')
    shown = _detailed(event['kind'], details if isinstance(details, dict) else {})
    rows.append(f'<tr><td>{event["step"]:,}</td><td class="left soft">'
                f'{_e("–" if at is None else "+ " + duration(at - first))}</td>'
                f'<td class="left">{_e(EVENT_NAMES.get(event["kind"], event["kind"]))}</td>'
                f'<td class="left soft">{_e(shown)}</td></tr>')
  note = ('' if len(events) <= EVENTS else f'<p class="soft small note">The last {EVENTS} of {len(events):,} events; '
          'events.jsonl has them all.</p>')
  return page.section('What happened', (
      '<div class="card"><div class="scroll"><table><tr><th>step</th><th class="left">time</th>'
      f'<th class="left">event</th><th class="left">details</th></tr>{"".join(rows)}</table></div></div>{note}'))


def _detailed(kind, details):
  """Returns an event's details in words; those of an unknown kind as they are."""
  get = details.get
  if kind == 'bad_step':
    words = {'abort': '', 'skip': 'left out', 'rollback': 'rolled back'}.get(get('policy'), '')
    return '; '.join(filter(None, [str(get('reason') or ''), words, get('dump') and f'batch in {get("dump")}']))
  if kind == 'rollback':
    return (f'to step {get("to")}, {get("skipped_batches")} batches left out; {get("lost_steps")} steps '
            f'({duration(number(details, "lost_seconds"))}) done again')
  if kind == 'start':
    lost = number(details, 'lost_seconds')
    return f'{duration(lost)} of steps done again' if lost else ''
  if kind == 'straggler' and isinstance(get('host_seconds'), dict):
    return (', '.join(f'process {p} took {duration(number(get("host_seconds"), p))} on its host'
                      for p in get('host_seconds')) + f', of steps of {duration(number(details, "step_seconds"))}')
  if kind == 'corruption' and isinstance(get('devices'), list):
    who = 'differs from its copies' if get('sure') else 'differ; two copies cannot say which is wrong'
    return f'device {", ".join(map(str, get("devices")))} {who}'
  return str(get('reason') or '; '.join(f'{k} {v}' for k, v in details.items()))


def _color(index, name):
  """Returns the end of a colour's name: red for what was lost, next to nothing for when nothing ran."""
  fixed = {'other': 'c5', 'lost': 'bad', 'restart': 'line'}
  return fixed.get(name) or f'c{(0, 1, 2, 3, 4, 6, 7)[index % 7]}'


def _samples(run):
  by_step = {}
  for row in run.samples:
    if isinstance(row.get('step'), int) and isinstance(row.get('text'), str):
      by_step.setdefault(row['step'], []).append((str(row.get('prompt') or ''), row['text']))
  if not by_step:
    return ''
  steps = sorted(by_step, reverse=True)
  if len(steps) > SAMPLE_STEPS:  # Evenly over the run, the first and the last among them.
    chosen = {round(i * (len(steps) - 1) / (SAMPLE_STEPS - 1)) for i in range(SAMPLE_STEPS)}
    steps = [s for i, s in enumerate(steps) if i in chosen]
  parts = []
  for i, step in enumerate(steps):
    texts = [(p, t.removeprefix(p) if p else t) for p, t in by_step[step]]
    begin = ' '.join((texts[0][0] + texts[0][1])[:160].split())
    body = ''.join(f'<pre><mark>{_e(prompt)}</mark>{_clipped(text)}</pre>'
                   for prompt, text in texts)
    parts.append(f'<details{" open" if i == 0 else ""}><summary><b>step {step:,}</b>'
                 f'<code>{_e(begin)}</code></summary>{body}</details>')
  note = ('' if len(steps) == len(by_step) else
          f'<p class="soft small note">{len(steps)} of the {len(by_step)} steps with samples.</p>')
  return page.section('Samples', f'<div class="card">{"".join(parts)}</div>{note}')


def _margins(run, charts):
  """Returns the plots of a reward model's held-out pairs or steps: how sure it is and how right, and by how much."""
  parts = []
  for split, found in run.margins.items():
    try:
      points, bars, unit = found['calibration'], found['histogram'], 'steps' if 'steps' in found else 'pairs'
      said, right = ([float(p[key]) for p in points] for key in ('said', 'right'))
      middles = [(a + b) / 2 for a, b in zip(bars['edges'], bars['edges'][1:], strict=False)]
      counts = [float(n) for n in bars['counts']]
      title = (f'{split}: right as often as it says? {float(found["error"]):.1%} off on average over '
               f'{int(found[unit]):,} {unit}')
    except (KeyError, TypeError, ValueError):
      continue
    charts[f'calibration_{split}'] = {
        'title': title, 'height': 220, 'xname': 'says',
        'series': [metrics.series('right', 'dots', 1, said, right),
                   metrics.series('if it were', 'faint', 0, [0.5, 1.0], [0.5, 1.0])]}
    charts[f'margins_{split}'] = {
        'title': f'{split}: {unit} by the margin of their scores', 'height': 220, 'xname': 'margin', 'zero': True,
        'series': [metrics.series(unit, 'line', 2, middles, counts)]}
    parts += [page.line_chart(name, charts[name]) for name in (f'calibration_{split}', f'margins_{split}')]
  return page.section(f'Scores of held-out {unit}', f'<div class="grid">{"".join(parts)}</div>') if parts else ''


def _rollouts(run):
  shown = rollouts.render(rollouts.read(run.folder))
  return page.section('Rollouts', shown) if shown else ''


def _clipped(text):
  if len(text) <= SAMPLE_CHARACTERS:
    return _e(text)
  return (f'{_e(text[:SAMPLE_CHARACTERS])}<span class="cut"> … {len(text) - SAMPLE_CHARACTERS:,} '
          'more characters in samples.jsonl</span>')


def _evaluation(run):
  """Returns the tables of the evaluations: those of evaluation.json, and the last ones of training that it lacks."""
  records = {name: values for name, values in run.evaluation.items() if isinstance(values, dict)}
  for name in run.eval_names():
    for key in ('reward', 'accuracy', 'loss'):
      for found in run.evaluations(name, key)[:0 if name in records else 1]:
        records.setdefault(f'{name}, in training', found.values)
  tables = []
  for title, of, columns in EVALUATIONS:
    shown = {name: values for name, values in records.items()
             if (of in values if of else not {'reward', 'accuracy'} & set(values))}
    cells = {name: tuple('–' if (v := number(values, key)) is None else form.format(v) for key, _, form in columns)
             for name, values in shown.items()}
    names = {row: [n for n in cells if cells[n] == row] for row in cells.values()}  # One row where all is the same.
    shown = {same[0]: shown[same[0]] for same in names.values()}
    rows = [[', '.join(same), *row] for row, same in names.items()]
    bits = [c for c, (key, *_) in enumerate(columns) if key.endswith('bits_per_byte')]
    best = []
    for r, values in enumerate(shown.values()):
      found = {c + 1: v for c in bits if (v := number(values, columns[c][0])) is not None}
      best += [(r, min(found, key=found.get))] if len(found) > 1 else []  # One alone is the best of nothing.
    if rows:
      tables.append(f'<div class="card">{page.table([title, *(head for _, head, _ in columns)], rows, best)}</div>')
  return page.section('Evaluation', ''.join(tables))


def _data(run):
  rows = []
  for source, values in run.data.items():
    if not isinstance(values, dict):
      continue
    quarantined = values.get('quarantined')
    reasons = quarantined if isinstance(quarantined, dict) else {}
    total = sum(n for n in reasons.values() if isinstance(n, int))
    listed = ', '.join(f'{n:,} {reason.replace("_", " ")}' for reason, n in sorted(
        reasons.items(), key=lambda kv: -kv[1] if isinstance(kv[1], int) else 0) if n)
    tokens, size = number(values, 'tokens'), number(values, 'bytes')
    rows.append([source, KINDS.get(values.get('records'), '–'), *(f'{v:,}' if v is not None else '–' for v in (
        number(values, 'documents'), tokens, size)),
        f'{size / tokens:.2f}' if tokens and size else '–',
        f'{total:,} ({listed})' if total else '0'])
  if not rows:
    return ''
  header = ['source', 'holds', 'documents', 'tokens', 'bytes', 'bytes a token', 'records set aside']
  return page.section('Data', f'<div class="card">{page.table(header, rows)}</div>')


def _profile(run):
  operations = run.profile.get('operations')
  if not isinstance(operations, list) or not operations:
    return ''
  largest = max((number(o, 'percent') or 0.0 for o in operations), default=0.0) or 1.0
  rows = ''.join(
      f'<tr><td><code>{_e(o.get("name"))}</code></td><td class="left share"><span class="meter" '
      f'style="width:{90 * (number(o, "percent") or 0) / largest:.0f}px"></span>'
      f'{number(o, "percent") or 0:.1f} %</td><td>{number(o, "total_ms") or 0:,.2f}</td>'
      f'<td>{_e(o.get("count"))}</td>'
      f'<td class="left soft small">{_e(o.get("origin", ""))}</td></tr>'
      for o in operations if isinstance(o, dict))
  steps = run.profile.get('steps')
  first, end = steps if isinstance(steps, list) and len(steps) == 2 else ('?', '?')
  return page.section('Most expensive operations', (
      '<div class="card"><div class="scroll"><table><tr><th>operation</th>'
      '<th class="left">share</th><th>ms</th><th>count</th><th class="left">from</th></tr>'
      f'{rows}</table></div></div><p class="soft small note">'
      f'Own time over steps {_e(first)} to {_e(end)}, the end not included.</p>'))


def _settings(run):
  parts = []
  for title, values in (('Environment', run.environment), ('Config', run.config)):
    shown = {k: v for k, v in values.items() if k != 'command'}
    if shown:
      parts.append(f'<details><summary><b>{title}</b></summary>{page.settings(shown)}</details>')
  return page.section('Environment and config', parts and f'<div class="card">{"".join(parts)}</div>')


def _command(run):
  command = run.environment.get('command')
  if isinstance(command, list):
    command = ' '.join(map(str, command))
  again = f'llmjax pretrain --config={run.folder / "config.json"} --workdir=NEW_FOLDER'
  blocks = ([('The command of this run', command)] if command else []) + (
      [('The same run from its resolved config', again)] if run.config else [])
  body = ''.join(f'<p class="soft small">{_e(title)}</p><div class="copy"><pre>{_e(text)}</pre>'
                 '<button>copy</button></div>' for title, text in blocks)
  return page.section('Run it again', body and f'<div class="card">{body}</div>')


def _missing(run):
  if not run.missing:
    return ''
  items = '; '.join(f'<code>{_e(name)}</code> ({_e(why)})' for name, why in run.missing)
  return f'<footer>Not in this folder: {items}.</footer>'
