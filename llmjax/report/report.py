"""Write the report on a run, or on several runs side by side, as one self-contained HTML page.

The page on one run is the comparison of one run, with further sections on its details.
"""

import dataclasses
import math
import os
import pathlib

from llmjax import secrets
from llmjax.post.math_reward import same_answer
from llmjax.report import comparison, details, page, plots
from llmjax.report.formatting import cut, duration, number, percent
from llmjax.report.reading import is_sequence, read_runs

PROMPTS, CHARACTERS = 24, 900  # Limits of the table of completions.
UNMASKED = ('samples', 'rollouts', 'completions')  # Output of models, in which no secret is masked.


@dataclasses.dataclass(frozen=True)
class Curve:
  """Metrics in one chart.

  training: {metric: label}; a label of '' is drawn alone.  evaluation: measure of evaluations, '' for none.
  compared: whether the evaluation is also shown for several runs.  noisy: whether long curves are smoothed.
  """

  title: str
  training: dict
  evaluation: str = ''
  color: int = 0
  compared: bool = True
  noisy: bool = True
  options: dict = dataclasses.field(default_factory=dict)


CURVES = (
    Curve('Loss', {'train/loss': 'as logged'}, 'loss', compared=False,
          options={'height': 340, 'switches': ['ylog', 'xlog']}),
    Curve('Held-out bits per byte', {}, 'bits_per_byte'),
    Curve('Reward', {'rollout/reward': 'sampled completions'}, 'reward', 2),
    Curve('KL from the reference, nats per completion', {'rollout/kl': 'sampled completions'}, '', 3,
          options={'zero': True}),
    Curve('Tokens per completion', {'rollout/tokens': 'sampled completions'}, '', 4, options={'zero': True}),
    Curve('Preference accuracy', {'train/accuracy': 'batches'}, 'accuracy'),
    Curve('Score margin of chosen over rejected completions', {'train/margin': 'batches'}, 'margin', compared=False),
    Curve('Log-probability of completions, nats',
          {'train/chosen_logprob': 'chosen', 'train/rejected_logprob': 'rejected'}, '', 2),
    Curve('Tokens per second', {'train/tokens_per_second': 'as logged'}, '', 2, options={'zero': True}),
    Curve('Learning rate', {'train/lr': 'learning rate'}, '', 3, noisy=False, options={'zero': True}),
    Curve('Gradient norm', {'train/grad_norm': 'as logged'}, '', 4, options={'switches': ['ylog'], 'ylog': True}))


def write_report(workdir) -> pathlib.Path:
  """Write `<workdir>/report.html` atomically and return its path."""
  return write_comparison([workdir], pathlib.Path(workdir) / 'report.html')


def write_comparison(workdirs, output) -> pathlib.Path:
  """Write a page on these runs, in this order, atomically and return its path."""
  output = pathlib.Path(output)
  output.parent.mkdir(parents=True, exist_ok=True)
  temporary = output.with_suffix('.html.tmp')
  temporary.write_text(render_runs(read_runs(workdirs)), encoding='utf-8')
  os.replace(temporary, output)
  return output


def render_runs(runs):
  """Return the page on these Runs."""
  context = _overview(runs) | (_details(runs[0]) if len(runs) == 1 else {})
  return page.render('report.html', {
      key: value if key in UNMASKED else secrets.hide_within(value) for key, value in context.items()})


def _overview(runs):
  """Return the sections on any number of runs."""
  is_single = len(runs) == 1
  rows = [] if is_single else list(comparison.make_rows(runs))
  charts = _charts(runs)
  num_prompts, completions = _completions(runs)
  return {
      **_header(runs),
      'runs': [run.name for run in runs],
      'folders': [str(run.folder) for run in runs],
      'parents': ['–' if run.parent is None else runs[run.parent].name for run in runs],
      'is_sequence': is_sequence(runs),
      'cards': [] if is_single else _cards(runs),
      'table': comparison.describe(runs, rows),
      'not_compared': comparison.not_compared(runs, rows),
      'charts': charts,
      'loss_charts': [i for i, chart in enumerate(charts) if chart['title'].startswith('Loss')],
      'is_mixed': len({run.kind for run in runs}) > 1,
      'completion_columns': [{'run': i, 'note': _describe_decoding(run.completions[0])}
                             for i, run in enumerate(runs) if run.completions],
      'completions': completions, 'num_prompts': num_prompts, 'limit': PROMPTS,
      'missing': _missing(runs),
      'details': None, 'headline': None, 'warnings': [], 'samples': None, 'rollouts': None}


def _details(run):
  """Return the sections on a single run."""
  title, charts = details.margins(run)
  return {'headline': details.headline(run), 'warnings': details.warnings(run), 'details': {
      'tiles': details.tiles(run), 'time': details.time_spent(run), 'energy': details.energy(run),
      'events': details.events(run), 'margins_title': title, 'margins': charts,
      'evaluations': details.evaluations(run), 'data': details.data(run), 'profile': details.profile(run),
      'settings': details.settings(run), 'commands': details.commands(run)},
      'more_charts': charts, 'samples': details.samples(run), 'rollouts': details.rollouts(run)}


def _header(runs):
  if len(runs) == 1:
    return {'title': runs[0].folder.resolve().name or 'run', 'subtitle': details.subtitle(runs[0])}
  folder = os.path.commonpath([run.folder.resolve().parent for run in runs])
  seconds = sum(run.wall_seconds or 0 for run in runs)
  devices = dict.fromkeys(str(run.environment['device_kind']) for run in runs if run.environment.get('device_kind'))
  fields = [f'{len(runs)} runs', *([f'{duration(seconds)} in total'] if seconds else []), *devices]
  return {'title': os.path.basename(folder) or 'runs', 'subtitle': ' · '.join(fields)}


def _cards(runs):
  """Return a card with the main result of each run."""
  cards = []
  for i, run in enumerate(runs):
    value, label, of = _main_result(runs, i)
    note = ' · '.join(filter(None, [run.steps is not None and f'{run.steps:,} steps',
                                    run.wall_seconds and duration(run.wall_seconds)]))
    cards.append({'parent': '' if run.parent is None else f' ← {runs[run.parent].name}', 'kind': run.kind,
                  'value': value, 'label': label, 'of': of, 'note': note})
  return cards


def _main_result(runs, index):
  """Return (value, label, description of the evaluation) for a run's card."""
  run = runs[index]

  def result(name, key, label, form):
    evaluation = comparison.comparable(runs, name, key)[index]
    if not evaluation:
      return '–', label, ''
    return form(evaluation.measure(key)), f'{label}, {comparison.display_name(name)}', evaluation.describe()

  if run.kind.startswith('rl'):
    for name in comparison.evaluation_names([run], 'reward'):
      is_accuracy = comparison.is_share(comparison.comparable(runs, name, 'reward')[index])
      return result(name, 'reward', 'accuracy' if is_accuracy else 'mean reward',
                    percent if is_accuracy else '{:.3f}'.format)
  for name in comparison.evaluation_names([run], 'accuracy'):
    return result(name, 'accuracy', 'preference accuracy', percent)
  names = comparison.evaluation_names([run], 'loss')
  sources = [pathlib.PurePath(str(s)).name for s in sorted(run.sources, key=lambda s: -(number(run.sources, s) or 0))]
  names = [name for source in sources for name in names if comparison.display_name(name) == source] or names
  if not names:
    return '–', 'not evaluated', ''
  if comparison.is_text(runs, names[0]) or run.kind == 'pretrain':
    return result(names[0], 'bits_per_byte', 'bits per byte', '{:.3f}'.format)
  return result(names[0], 'loss', 'nats per token', '{:.3f}'.format)


def _charts(runs):
  """Return the charts of the metrics: one per Curve for a single run, else one per metric with a line for each run."""
  charts = []
  for curve in CURVES:
    if len(runs) == 1:
      charts.append(_chart(runs[0], curve))
      continue
    options = {**curve.options, 'height': 260} if 'height' in curve.options else curve.options
    suffix = len(curve.training) > 1
    for key, label in curve.training.items():
      lines = [line for i, run in enumerate(runs) for line in _line(run, i, key, curve.noisy)]
      charts.append(plots.line_chart(curve.title + f', {label}' * suffix, lines, **options))
    if curve.evaluation and curve.compared:
      for name in dict.fromkeys(full for run in runs for full in run.evaluation_names().values()):
        lines = [plots.series(run.name, 'dots', i, *run.curve(f'eval/{own}/{curve.evaluation}'))
                 for i, run in enumerate(runs) for own, full in run.evaluation_names().items() if full == name]
        charts.append(plots.line_chart(f'{curve.title}, {comparison.display_name(name)}', lines))
  return [chart for chart in charts if chart]


def _chart(run, curve):
  """Return the chart of a Curve for a single run, or None."""
  lines = [line for i, (key, label) in enumerate(curve.training.items())
           for line in plots.trend(label, curve.color + i, *run.curve(key), noisy=curve.noisy)]
  title, options = curve.title, dict(curve.options)
  if curve.evaluation:
    lines += [plots.series(name, 'dots', 1 + i, *run.curve(f'eval/{name}/{curve.evaluation}'))
              for i, name in enumerate(run.eval_names()[:6])]
  if curve.evaluation == 'loss':
    title += '' if details.headline_evaluation(run) else ', nats per token'
    options['bad'] = [s for s, v in zip(*run.curve('train/loss'), strict=True) if not math.isfinite(v)][:200]
  best = run.held_out()
  if curve.evaluation == 'bits_per_byte' and best:
    lines += [plots.series(f'{label}, all of {best.name}', 'rule', 5 + i, [0], [best.measure(key)])
              for i, (key, label) in enumerate(details.COMPRESSORS) if best.measure(key) is not None]
  return plots.line_chart(title, lines, **options)


def _line(run, index, key, noisy):
  """Return the line of a run's metric, smoothed if it is noisy."""
  *_, line = plots.trend(run.name, index, *run.curve(key), noisy=noisy)
  return [{**line, 'label': run.name}]


def _completions(runs):
  """Return (number of prompts, [{'prompt', 'gold', 'cells'}]) of the runs' completions of the same prompts."""
  by_prompt = [{c['prompt']: c for c in run.completions} for run in runs if run.completions]
  prompts = list(dict.fromkeys(prompt for completions in by_prompt for prompt in completions))
  rows = []
  for prompt in prompts[:PROMPTS]:
    same_prompt = [completions.get(prompt) for completions in by_prompt]
    gold = next((c['right'] for c in same_prompt if c and isinstance(c.get('right'), str)), None)
    cells = [c and {'text': cut(c['text'], CHARACTERS), 'is_right': _is_right(c['text'], gold),
                    'is_cut': c.get('stopped') == 'length'} for c in same_prompt]
    rows.append({'prompt': cut(prompt, CHARACTERS), 'gold': None if gold is None else cut(gold, CHARACTERS),
                 'cells': cells})
  return len(prompts), rows


def _describe_decoding(completion):
  """Return how completions were generated: 'step 40, greedy, as a chat'."""
  step, temperature = number(completion, 'step'), number(completion, 'temperature')
  return ', '.join(filter(None, (
      step is not None and f'step {step:,}',
      temperature is not None and (f'temperature {temperature:g}' if temperature else 'greedy'),
      'as a chat' if completion.get('chat') else 'as plain text')))


def _is_right(text, gold):
  """Return whether a completion has the same final answer as the gold answer, or the same text."""
  if gold is None:
    return False
  if '####' in gold:
    return same_answer(text, gold)
  return ' '.join(text.split()).casefold() == ' '.join(gold.split()).casefold()


def _missing(runs):
  """Return [(run, [(file, reason)])] of the runs that lack files; optional ones count for a single run only."""
  ignored = ('samples.jsonl', 'energy.json') if len(runs) > 1 else ()
  lacks = [(run.name, [entry for entry in run.missing if entry[0] not in ignored]) for run in runs]
  return [(name, files) for name, files in lacks if files]
