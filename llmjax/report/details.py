"""The sections on a single run, as plain data for the template."""

import math
import pathlib
import statistics

from llmjax.evaluate.metrics import format_loss
from llmjax.report import plots
from llmjax.report.formatting import NONE, count, duration, formatted, number, percent
from llmjax.report.reading import spaced

SAMPLE_STEPS, SAMPLE_CHARACTERS, ROLLOUT_CHARACTERS = 24, 3000, 1500  # Limits, so that long runs stay below 1 MB.
EVENTS = 100  # The newest ones.
EVENT_NAMES = {'start': 'start', 'bad_step': 'bad step', 'rollback': 'rollback', 'corruption': 'corruption',
               'straggler': 'slow process', 'early_stop': 'early stopping', 'stopped': 'stopped',
               'interrupted': 'interrupted', 'config_change': 'settings changed', 'done': 'done'}
COMPRESSORS = (('xz_bits_per_byte', 'xz -9'), ('gzip_bits_per_byte', 'gzip -9'))
# Headline measures of runs that are not evaluated by likelihood: measure, title, format.
HEADLINES = (('reward', 'Reward of held-out prompts', '{:.3f}'),
             ('accuracy', 'Accuracy on held-out preference pairs', percent))
# Tables of evaluations: title, the measure that identifies them (None: none of the others), columns.
EVALUATIONS = (
    ('held-out text', None, (
        ('step', 'step', '{:,}'), ('loss', 'loss, nats/token', '{:.4f}'), ('perplexity', 'perplexity', '{:.3f}'),
        ('bits_per_byte', 'bits/byte', '{:.4f}'), ('xz_bits_per_byte', 'xz -9', '{:.4f}'),
        ('gzip_bits_per_byte', 'gzip -9', '{:.4f}'), ('sequences', 'sequences', '{:,}'), ('tokens', 'tokens', '{:,}'),
        ('bytes', 'bytes', '{:,}'))),
    ('completions of held-out prompts', 'reward', (
        ('step', 'step', '{:,}'), ('prompts', 'prompts', '{:,}'), ('reward', 'mean reward', '{:.3f}'),
        ('ended', 'finished', '{:.1%}'), ('tokens', 'mean tokens', '{:.1f}'))),
    ('held-out preference pairs or solution steps', 'accuracy', (
        ('step', 'step', '{:,}'), ('pairs', 'pairs', '{:,}'), ('steps', 'steps', '{:,}'),
        ('accuracy', 'accuracy', '{:.1%}'), ('margin', 'margin', '{:.3f}'), ('loss', 'loss', '{:.4f}'))))
RECORD_KINDS = {'text': 'text', 'chat': 'conversations', 'preference': 'preference pairs', 'prompts': 'prompts',
                'stepwise': 'labelled solution steps'}
BUCKET_NAMES = {'init': 'startup', 'compile': 'compilation', 'data_wait': 'waiting for data', 'rollout': 'rollouts',
                'step': 'training steps', 'eval': 'evaluation', 'sample': 'sampling', 'checkpoint': 'checkpoints',
                'lost': 'repeated steps', 'restart': 'between attempts', 'other': 'other'}
BUCKET_COLORS = {'other': 'c5', 'lost': 'bad', 'restart': 'line'}
ROLLOUT_METRICS = (('reward', 'mean reward {:.3g}'), ('kl', 'KL {:.3g} nats'), ('tokens', '{:.1f} tokens each'),
                   ('ended', '{:.0%} finished'))


def subtitle(run):
  """Return the model, data, steps and devices in one line."""
  model, done, total = run.config.get('model'), run.steps, run.number('train', 'steps')
  fields = []
  if isinstance(model, dict):
    width, layers = model.get('d_model'), model.get('num_layers')
    fields.append(' '.join(filter(None, [
        model.get('preset') or 'decoder', layers and f'{layers} layers', width and f'× {width}'])))
  fields.append(', '.join(pathlib.PurePath(s).name for s in run.sources))
  if done is not None:
    fields.append(f'{done:,} steps' if not total or done >= total else f'{done:,} of {total:,} steps')
  if device := run.environment.get('device_kind'):
    devices = run.environment.get('device_count')
    fields.append(f'{devices} × {device}' if devices else str(device))
  return ' · '.join(filter(None, fields))


def headline(run):
  """Return the main result of a run: {'title', 'value', 'name', 'note', 'bars'}; without value if not evaluated."""
  if headlined := headline_evaluation(run):
    e, key, title, form = headlined
    return {'title': title, 'value': formatted(e.measure(key), form), 'name': e.name, 'note': f'{e.describe()}.',
            'bars': []}
  evaluation = run.held_out()
  if evaluation is None:
    return {'title': 'Held-out bits per byte', 'bars': []}
  own = evaluation.measure('bits_per_byte')
  others = [(label, value) for key, label in COMPRESSORS if (value := evaluation.measure(key))]
  longest = max([own, *(value for _, value in others)]) or 1.0
  bars = [{'label': label, 'own': not i, 'width': f'{100 * value / longest:.1f}', 'value': f'{value:.3f}'}
          for i, (label, value) in enumerate([('this model', own), *others])]
  compared = ', '.join(f'{abs(1 - own / value):.0%} {"fewer" if own < value else "more"} than {label}'
                       for label, value in others) or 'Lower is better. llmjax evaluate compares with gzip and xz'
  return {'title': 'Held-out bits per byte', 'value': f'{own:.3f}', 'name': evaluation.name,
          'note': f'{evaluation.describe()}. {compared}.', 'bars': bars if others else []}


def headline_evaluation(run):
  """Return (Evaluation, measure, title, format) of the first of HEADLINES that was measured, or None."""
  return next(((e, key, title, form) for key, title, form in HEADLINES for name in run.eval_names()
               for e in run.evaluations(name, key)), None)


def tiles(run):
  """Return the small headline figures: [{'label', 'value', 'unit', 'note'}]."""
  layers, width = run.get('model', 'num_layers'), run.get('model', 'd_model')
  figures = [('Parameters', count(run.parameters), f'{layers} layers, width {width}' if layers and width else '')]
  sequences, length = run.number('train', 'batch_size'), run.number('data', 'seq_len')
  per_step = sequences * length * (2 if run.is_preference else 1) if sequences and length else None
  is_padded = run.get('data', 'packing') in ('best_fit', 'pad') or 'rl' in run.config or run.is_preference
  if run.steps is not None and per_step:
    figures.append(('Tokens seen', count(run.steps * per_step),
                    f'{count(per_step)} per step{", including padding" * is_padded}'))
  else:
    figures.append(('Tokens seen', NONE, ''))
  speed = _median(run, 'train/tokens_per_second')
  figures.append(('Tokens per second', count(speed), 'median' if speed else ''))
  # A measured peak that is exceeded was measured on a busy machine.
  is_wrong = any(value > 1 for value in run.curve('train/mfu')[1])
  mfu = None if is_wrong else _median(run, 'train/mfu')
  figures.append(('Model FLOPs utilization', NONE if mfu is None else f'{100 * mfu:.3g} %',
                  'the measured peak was too low' if is_wrong else '' if mfu is None else 'of the peak (MFU)'))
  figures.append(('Wall time', duration(run.wall_seconds), 'all attempts' if run.wall_seconds else ''))
  step, loss = run.last('train/loss')
  before = [s for s in run.curve('train/loss')[0] if step is not None and s < step]
  steps = step and step - (before[-1] if before else 0)
  figures.append(('Training loss', NONE if loss is None else format_loss(loss),
                  '' if step is None else f'step {step:,}' + f', mean of {steps:,} steps' * (steps > 1)))
  return [_tile(*figure) for figure in figures]


def _tile(label, value, note):
  digits, _, unit = value.partition(' ')
  is_number = unit and ' ' not in unit
  return {'label': label, 'value': digits if is_number else value, 'unit': unit if is_number else '', 'note': note}


def _median(run, key):
  values = [v for v in run.curve(key)[1] if math.isfinite(v)]
  return statistics.median(values) if values else None


def warnings(run):
  """Return lines on non-finite losses and silent data corruption."""
  steps, values = run.curve('train/loss')
  bad = [s for s, v in zip(steps, values, strict=True) if not math.isfinite(v)]
  lines = []
  if bad:
    lines.append(f'The training loss was not finite at {len(bad)} logged step{"s" * (len(bad) > 1)}, first at step '
                 f'{bad[0]:,}.')
  if any(event.get('kind') == 'corruption' for event in run.events):
    lines.append('Devices held different copies of the same parameters: see Events.')
  return lines


def time_spent(run):
  """Return the wall time by bucket and the goodput, or None.  Training steps come first."""
  whole = run.wall_seconds
  if not whole:
    return None
  buckets = sorted(run.seconds.items(), key=lambda kv: (kv[0] != 'step', kv[0] in BUCKET_COLORS, -kv[1]))
  colors = [BUCKET_COLORS.get(name) or f'c{(0, 1, 2, 3, 4, 6, 7)[i % 7]}' for i, (name, _) in enumerate(buckets)]
  parts = [{'name': BUCKET_NAMES.get(name, name), 'color': color, 'share': f'{100 * seconds / whole:.3f}',
            'value': duration(seconds), 'percent': f'{100 * seconds / whole:.1f} %'}
           for (name, seconds), color in zip(buckets, colors, strict=True)]
  return {'parts': parts, 'goodput': f'{100 * run.seconds.get("step", 0) / whole:.1f} %'}


def energy(run):
  """Return the rows on energy, carbon and cost, each with its basis or the config field to set, or None."""
  total, attempts = run.energy.get('total'), run.energy.get('attempts')
  if not isinstance(total, dict) or not isinstance(attempts, list) or not attempts:
    return None
  last = attempts[-1] if isinstance(attempts[-1], dict) else {}
  unknown = total.get('unknown') if isinstance(total.get('unknown'), dict) else {}
  value = lambda key: number(last, key) or 0
  rows = []
  for name, label, unit, basis in (
      ('chip_hours', 'Chip time', 'chip-hours', f'{value("chips"):g} × {last.get("kind")}, for the whole wall time'),
      ('kwh', 'Energy', 'kWh', f'{value("watts_per_chip"):g} W per chip ({last.get("watts_source")}), '
                               f'PUE {value("pue"):g} (cost.pue)'),
      ('kg_co2', 'Carbon', 'kg CO2e', f'{value("grid_grams_per_kwh"):g} g/kWh (cost.grid_grams_per_kwh), '
                                      'location-based'),
      ('money', 'Cost', str(last.get('currency')), f'{value("price_per_chip_hour"):g} per chip-hour '
                                                   '(cost.price_per_chip_hour)')):
    amount, gap = number(total, name), unknown.get(name)
    if isinstance(gap, dict):
      field = f'set {gap.get("field")}'
      basis = field if amount is None else f'{basis}; unknown for {duration(number(gap, "seconds"))} of it: {field}'
    rows.append({'label': label, 'amount': 'unknown' if amount is None else f'{amount:,.4g} {unit}', 'basis': basis})
  note = f'{len(attempts)} attempts, {duration(number(total, "seconds"))} in total. ' if len(attempts) > 1 else ''
  return {'rows': rows, 'note': note}


def events(run):
  """Return the newest events, or None if the run only started and ended."""
  rows = [e for e in run.events if isinstance(e.get('kind'), str) and isinstance(e.get('step'), int)]
  if all(e['kind'] in ('start', 'done') for e in rows):
    return None
  first = next((t for e in rows if (t := number(e, 'time')) is not None), 0.0)
  table = []
  for event in rows[-EVENTS:]:
    details, at = event.get('details'), number(event, 'time')
    table.append({'step': f'{event["step"]:,}', 'time': NONE if at is None else f'+ {duration(at - first)}',
                  'kind': EVENT_NAMES.get(event['kind'], event['kind']),
                  'details': _describe_event(event['kind'], details if isinstance(details, dict) else {})})
  note = f'The last {EVENTS} of {len(rows):,} events; all of them are in events.jsonl.' if len(rows) > EVENTS else ''
  return {'rows': table, 'note': note}


def _describe_event(kind, details):
  """Return the details of an event as text."""
  get = details.get
  if kind == 'bad_step':
    action = {'skip': 'skipped', 'rollback': 'rolled back'}.get(get('policy'), '')
    return '; '.join(filter(None, [str(get('reason') or ''), action, get('dump') and f'batch in {get("dump")}']))
  if kind == 'rollback':
    return (f'to step {get("to")}, {get("skipped_batches")} batches skipped; {get("lost_steps")} steps '
            f'({duration(number(details, "lost_seconds"))}) repeated')
  if kind == 'start':
    lost = number(details, 'lost_seconds')
    return f'{duration(lost)} of repeated steps' if lost else ''
  if kind == 'straggler' and isinstance(get('host_seconds'), dict):
    hosts = ', '.join(f'process {p}: {duration(number(get("host_seconds"), p))}' for p in get('host_seconds'))
    return f'host time of {hosts}, for steps of {duration(number(details, "step_seconds"))}'
  if kind == 'corruption' and isinstance(get('devices'), list):
    devices = ', '.join(map(str, get('devices')))
    return f'device {devices} {"differs from its copies" if get("sure") else "differ; two copies cannot tell which"}'
  return str(get('reason') or '; '.join(f'{k} {v}' for k, v in details.items()))


def samples(run):
  """Return the samples by step, newest first, evenly spaced over the run, or None."""
  by_step = {}
  for row in run.samples:
    if isinstance(row.get('step'), int) and isinstance(row.get('text'), str):
      prompt, text = str(row.get('prompt') or ''), row['text']
      by_step.setdefault(row['step'], []).append(
          {'note': '', 'prompt': prompt, **_clip(text.removeprefix(prompt) if prompt else text, SAMPLE_CHARACTERS)})
  if not by_step:
    return None
  steps = spaced(sorted(by_step, reverse=True), SAMPLE_STEPS)
  items = [{'title': f'step {step:,}', 'texts': by_step[step], 'preview': _preview(by_step[step][0])} for step in steps]
  note = f'{len(steps)} of the {len(by_step)} steps with samples.' if len(steps) < len(by_step) else ''
  return {'entries': items, 'note': note}


def rollouts(run):
  """Return the completions with the highest and lowest rewards of some iterations, newest first, or None."""
  items = []
  for iteration, values, rows in reversed(run.rollouts()):
    preview = ', '.join(form.format(values[name]) for name, form in ROLLOUT_METRICS if number(values, name) is not None)
    texts = [{'note': f'reward {row["reward"]:.3g} · gold answer: {row["answer"][:200]}',
              'prompt': row['prompt'][-ROLLOUT_CHARACTERS:], 'text': row['text'][:ROLLOUT_CHARACTERS],
              'more': ''} for row in rows]
    items.append({'title': f'iteration {iteration:,}', 'preview': preview, 'texts': texts})
  return {'entries': items, 'note': ''} if items else None


def _clip(text, limit):
  more = len(text) - limit
  return {'text': text[:limit], 'more': f' … {more:,} more characters in samples.jsonl' if more > 0 else ''}


def _preview(sample):
  return ' '.join((sample['prompt'] + sample['text'])[:160].split())


def margins(run):
  """Return (title, charts) of a reward model's calibration and margins on held-out pairs or steps."""
  charts, unit = [], 'pairs'
  for split, values in run.margins.items():
    try:
      points, bars, unit = values['calibration'], values['histogram'], 'steps' if 'steps' in values else 'pairs'
      confidence, accuracy = ([float(p[key]) for p in points] for key in ('confidence', 'accuracy'))
      centers = [(a + b) / 2 for a, b in zip(bars['edges'], bars['edges'][1:], strict=False)]
      sizes = [float(n) for n in bars['counts']]
      title = (f'{split}: calibration, expected error {float(values["error"]):.1%} over '
               f'{int(values[unit]):,} {unit}')
    except (KeyError, TypeError, ValueError):
      continue
    charts += [
        plots.line_chart(title, [plots.series('accuracy', 'dots', 1, confidence, accuracy),
                                 plots.series('calibrated', 'faint', 0, [0.5, 1.0], [0.5, 1.0])],
                         220, xname='confidence'),
        plots.line_chart(f'{split}: {unit} by score margin', [plots.series(unit, 'line', 2, centers, sizes)], 220,
                         xname='margin', zero=True)]
  return f'Scores of held-out {unit}', list(filter(None, charts))


def evaluations(run):
  """Return tables {'header', 'rows', 'best'} of evaluation.json, and of evaluations during training that it lacks."""
  records = {name: values for name, values in run.evaluation.items() if isinstance(values, dict)}
  for name in run.eval_names():
    for key in ('reward', 'accuracy', 'loss'):
      for e in run.evaluations(name, key)[:0 if name in records else 1]:
        records.setdefault(f'{name}, during training', e.values)
  tables = []
  for title, measure, columns in EVALUATIONS:
    selected = {name: values for name, values in records.items()
                if (measure in values if measure else not {'reward', 'accuracy'} & set(values))}
    names = {}  # Equal rows are merged.
    for name, values in selected.items():
      names.setdefault(tuple(formatted(number(values, key), form) for key, _, form in columns), []).append(name)
    rows = [[', '.join(same), *cells] for cells, same in names.items()]
    best = []
    for row, same in enumerate(names.values()):
      bits = {c + 1: v for c, (key, *_) in enumerate(columns)
              if key.endswith('bits_per_byte') and (v := number(selected[same[0]], key)) is not None}
      best += [[row, min(bits, key=bits.get)]] if len(bits) > 1 else []
    if rows:
      tables.append({'header': [title, *(head for _, head, _ in columns)], 'rows': rows, 'best': best})
  return tables


def data(run):
  """Return the table of the training data, or None."""
  rows = []
  for source, values in run.data.items():
    if not isinstance(values, dict):
      continue
    reasons = values.get('quarantined') if isinstance(values.get('quarantined'), dict) else {}
    reasons = {reason: n for reason, n in reasons.items() if number(reasons, reason)}
    listed = ', '.join(f'{reasons[reason]:,} {reason.replace("_", " ")}'
                       for reason in sorted(reasons, key=lambda reason: -reasons[reason]))
    tokens, size = number(values, 'tokens'), number(values, 'bytes')
    rows.append([source, RECORD_KINDS.get(values.get('records'), NONE),
                 *(formatted(n, '{:,}') for n in (number(values, 'documents'), tokens, size)),
                 f'{size / tokens:.2f}' if tokens and size else NONE,
                 f'{sum(reasons.values()):,} ({listed})' if reasons else '0'])
  header = ['source', 'records', 'documents', 'tokens', 'bytes', 'bytes/token', 'quarantined records']
  return {'header': header, 'rows': rows, 'best': []} if rows else None


def profile(run):
  """Return the most expensive operations of the trace, or None."""
  operations = run.profile.get('operations')
  operations = [o for o in operations if isinstance(o, dict)] if isinstance(operations, list) else []
  if not operations:
    return None
  shares = [number(o, 'percent') or 0.0 for o in operations]
  rows = [{'name': str(o.get('name')), 'count': str(o.get('count')), 'origin': str(o.get('origin', '')),
           'width': f'{90 * share / (max(shares) or 1):.0f}', 'percent': f'{share:.1f} %',
           'ms': f'{number(o, "total_ms") or 0:,.2f}'} for o, share in zip(operations, shares, strict=True)]
  steps = run.profile.get('steps')
  first, end = steps if isinstance(steps, list) and len(steps) == 2 else ('?', '?')
  return {'rows': rows, 'note': f'Self time in steps {first} to {end}, the end excluded.'}


def settings(run):
  """Return [(title, [(group, {name: value})])] of the environment and the config; single values form a group."""
  sections = []
  for title, values in (('Environment', run.environment), ('Config', run.config)):
    single = {k: v for k, v in values.items() if not isinstance(v, dict) and k != 'command'}
    groups = [('run', single), *((k, v) for k, v in values.items() if isinstance(v, dict))]
    groups = [(group, fields) for group, fields in groups if fields]
    if groups:
      sections.append((title, groups))
  return sections


def commands(run):
  """Return [(title, command)] that reproduce the run."""
  command = run.environment.get('command')
  stage = next((name for name, group in (('rl', 'rl'), ('reward', 'reward'), ('finetune', 'preference'))
                if group in run.config), 'pretrain')
  again = f'llmjax {stage} --config={run.folder / "config.json"} --workdir=NEW_FOLDER'
  items = [('Command of this run', command if isinstance(command, str) else '')] + [
      ('From the resolved config', again if run.config else '')]
  return [item for item in items if item[1]]
