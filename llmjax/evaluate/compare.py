"""`write_comparison`: one page about several runs, such as the stages of one model's life.

Everything is read from the runs' folders: metrics, the evaluations that `llmjax evaluate --sources` makes on the same
data, and the answers that `llmjax generate --prompts` gives to the same prompts.  What a run lacks is left blank.
"""

import dataclasses
import html
import math
import os
import pathlib
import statistics

from llmjax import config as configs
from llmjax import secrets
from llmjax.evaluate import metrics, page
from llmjax.evaluate.runs import Run, count, duration, number, parameters, read_run, steps_done
from llmjax.generate.spec import ANSWERS
from llmjax.rl import maths

PROMPTS, CHARACTERS = 24, 900  # Of answers side by side, so that the page stays small.
COLORS = 8
LAST = 0.1  # Part of a noisy curve whose mean stands for its end.

# Curves that runs are drawn into together: metric, title, options of the chart.
CHARTS = (
    ('train/loss', 'Loss', {'height': 260, 'switches': ['ylog', 'xlog']}),
    ('eval/{}/bits_per_byte', 'Held-out bits per byte, {}', {}),
    ('eval/{}/accuracy', 'Held-out pairs whose better answer scores higher, {}', {}),
    ('rollout/reward', 'Reward of sampled answers', {}),
    ('eval/{}/reward', 'Reward of the likeliest answers, {}', {}),
    ('rollout/kl', 'KL from the run it began from, nats an answer', {'zero': True}),
    ('rollout/tokens', 'Tokens of a sampled answer', {'zero': True}),
    ('train/tokens_per_second', 'Tokens a second', {'zero': True}))


@dataclasses.dataclass
class Stage:
  """A run on the page.  name: unique.  parent: number of the stage it began from, or None.  answers: its lines."""

  run: Run
  name: str
  kind: str
  parent: int | None
  answers: list

  def curves(self):
    """Returns {name of an evaluation: its name on the page}: always with the source that it is of.

    An evaluation of several sources together is left out where each has one of its own.
    """
    names = list(dict.fromkeys((*self.run.evaluation, *self.run.eval_names())))
    sources = self.run.get('data', 'sources')
    sources = list(sources) if isinstance(sources, dict) else []
    shown = {}
    for name in names:
      if ':' not in name and len(sources) == 1:
        shown[name] = f'{name}:{pathlib.PurePath(str(sources[0])).name}'
      elif ':' in name or not any(other.startswith(f'{name}:') for other in names):
        shown[name] = name
    return shown

  def measured(self, name, key):
    """Returns a number of an evaluation, by its name on the page; None where there is none.

    Of evaluation.json, of the name itself first; else the last one made while training.
    """
    own = [name, *(n for n, shown in self.curves().items() if shown == name and n != name)]
    found = (*(number(self.run.evaluation.get(n), key) for n in own),
             *(self.run.last(f'eval/{n}/{key}')[1] for n in own))
    return next((value for value in found if value is not None), None)


def write_comparison(workdirs, output) -> pathlib.Path:
  """Writes the page about the runs, in their order, in one move; returns its path."""
  output = pathlib.Path(output)
  output.parent.mkdir(parents=True, exist_ok=True)
  temporary = output.with_suffix('.html.tmp')
  temporary.write_text(secrets.hide(render(read_stages(workdirs))), encoding='utf-8')
  os.replace(temporary, output)
  return output


def read_stages(workdirs):
  """Returns the Stages of the folders; as `read_run`, never failing on what is missing or damaged."""
  found = [read_run(folder) for folder in workdirs]
  names = [run.folder.resolve().name or 'run' for run in found]
  if len(set(names)) < len(names):  # The same name in two places: as they were given.
    names = [str(run.folder) for run in found]
  stages = []
  for run, name in zip(found, names, strict=True):
    try:
      answers = [a for a in metrics.read_lines(run.folder / ANSWERS)
                 if isinstance(a.get('prompt'), str) and isinstance(a.get('text'), str)]
    except (OSError, configs.ConfigError) as e:
      run.missing.append((ANSWERS, f'cannot be read: {e}'))
      answers = []
    stages.append(Stage(run, name, kind_of(run), _parent(run, found), answers))
  return stages


def kind_of(run):
  """Returns what made a run, in words, by the groups of its config."""
  if isinstance(run.config.get('rl'), dict):
    return f'rl, {str(run.get("policy", "name") or "").upper()}'.rstrip(', ')
  return next((command for group, command in (('reward', 'reward model'), ('preference', 'finetune'),
                                              ('train', 'pretrain')) if group in run.config), 'run')


def _parent(run, runs):
  """Returns which of the runs this one began from: by its folder, or by the folder's name where runs were moved."""
  source = run.get('train', 'init_from')
  if not isinstance(source, str) or not source:
    return None
  path = pathlib.Path(source)
  path = path.parent.parent if path.parent.name == 'checkpoints' else path
  others = [i for i, other in enumerate(runs) if other is not run]
  return next((i for i in others if runs[i].folder.resolve() == path.resolve()),
              next((i for i in others if runs[i].folder.resolve().name == path.name), None))


def render(stages):
  """Returns the page as text."""
  charts = {}
  folder = os.path.commonpath([stage.run.folder.resolve().parent for stage in stages])
  title = os.path.basename(folder) or 'runs'
  seconds = sum(_seconds(stage.run) or 0 for stage in stages)
  devices = dict.fromkeys(str(s.run.environment['device_kind']) for s in stages if s.run.environment.get('device_kind'))
  parts = [f'{len(stages)} runs', *([f'{duration(seconds)} in all'] if seconds else []), *devices]
  sections = [
      f'<header><div><h1>{_e(title)}</h1><span class="soft">{_e(" · ".join(parts))}</span></div>'
      '<button id="theme">light / dark</button></header>',
      _cards(stages), page.section('What each stage changed', _table(stages)),
      page.section('Curves', _curves(stages, charts)),
      page.section('The same prompts, one column a stage', _answers(stages)), _missing(stages)]
  return page.render_page(f'{title} · llmjax', '\n'.join(filter(None, sections)), charts)


def _e(text):
  return html.escape(str(text))


def _seconds(run):
  return sum(v for v in map(lambda k: number(run.time, k), run.time) if v) or None


def _mean(values):
  values = [v for v in values if math.isfinite(v)]
  return statistics.fmean(values) if values else None


def _ends(run, key):
  """Returns the means of a noisy curve's first and last LAST, or (None, None)."""
  values = run.curve(key)[1]
  size = max(round(LAST * len(values)), 1)
  return _mean(values[:size]), _mean(values[-size:])


def _evaluations(stages, key):
  """Returns the names of the evaluations that measured this, in any of the stages."""
  return list(dict.fromkeys(name for s in stages for name in s.curves().values() if s.measured(name, key) is not None))


def _is_text(stages, name):
  """Says whether an evaluation is of plain text: compressors stand beside it."""
  return any(s.measured(name, 'xz_bits_per_byte') is not None for s in stages)


def _rows(stages):
  """Yields (label, what it means, values of the stages, format, the better direction: -1, 0, 1)."""
  yield 'Parameters', '', [parameters(s.run) for s in stages], count, 0
  yield 'Steps', '', [steps_done(s.run) for s in stages], '{:,}'.format, 0
  yield ('Rows trained on', 'of text, conversations, pairs, or answers',
         [(steps_done(s.run) or 0) * (s.run.number('train', 'batch_size') or 0) or None for s in stages],
         '{:,}'.format, 0)
  yield ('Tokens trained on', 'targets with weight in the loss',  # Elsewhere the weight is of pairs or of answers.
         [sum(v for v in s.run.curve('train/target_tokens')[1] if math.isfinite(v)) or None
          if s.kind in ('pretrain', 'finetune') else None for s in stages], count, 0)
  yield 'Wall time', 'start, compilation and evaluation included', [_seconds(s.run) for s in stages], duration, 0
  # A comparison is of what was measured in the same way: of evaluation.json before what training itself evaluated.
  shared = [shown for s in stages for name, shown in s.curves().items() if name in s.run.evaluation]
  for name in dict.fromkeys(shared or [n for s in stages for n in s.curves().values()]):
    if any(s.measured(name, 'loss') is not None for s in stages if not s.kind.startswith('reward')):
      text = _is_text(stages, name) or not shared
      key, unit = ('bits_per_byte', 'bits a byte') if text else ('loss', 'nats a token of the answers')
      values = [None if s.kind.startswith('reward') else s.measured(name, key) for s in stages]
      if any(v is not None for v in values):
        yield _named(name), f'held-out text, {unit}' if text else f'held-out, {unit}', values, '{:.3f}'.format, -1
  for name in _evaluations(stages, 'reward'):
    yield (f'Right answers, {_named(name)}', 'mean reward of the likeliest answers to held-out prompts',
           [s.measured(name, 'reward') for s in stages], '{:.1%}'.format, 1)
    yield (f'Answers that end, {_named(name)}', 'by the token that ends them',
           [s.measured(name, 'ended') for s in stages], '{:.1%}'.format, 1)
  for name in _evaluations(stages, 'accuracy'):
    yield ('Pairs ranked right', f'{_named(name)}: the better answer scores higher',
           [s.measured(name, 'accuracy') for s in stages], '{:.1%}'.format, 1)
  for when, where in (('before', 0), ('after', 1)):
    yield (f'Reward of sampled answers, {when}', f'{"first" if not where else "last"} tenth of the iterations',
           [_ends(s.run, 'rollout/reward')[where] for s in stages], '{:.3f}'.format, 0)
  yield ('KL from the run it began from', 'nats an answer, last tenth of the iterations',
         [_ends(s.run, 'rollout/kl')[1] for s in stages], '{:.2f}'.format, 0)


def _named(name):
  """Returns 'docs' for 'validation:docs' and 'docs (train)' for 'train:docs'; a split by itself stays."""
  split, _, source = name.partition(':')
  return source + f' ({split})' * (split != 'validation') if source else split


def _delta(value, before, form, better):
  """Returns the HTML of a change, coloured by whether it is for the better."""
  if not better or value is None or before is None:
    return ''
  change = value - before
  same = form(value) == form(before)
  kind = 'same' if same else 'up' if change * better > 0 else 'down'
  return f'<em class="{kind}">{"±0" if same else ("+" if change > 0 else "−") + form(abs(change))}</em>'


def _table(stages):
  head = ''.join(f'<th>{_dot(i)}{_e(s.name)}</th>' for i, s in enumerate(stages))
  began = ''.join(f'<td class="soft">{_e("–" if s.parent is None else stages[s.parent].name)}</td>' for s in stages)
  body = f'<tr><td>Began from</td>{began}</tr>'
  for label, note, values, form, better in _rows(stages):
    if not any(v is not None for v in values):
      continue
    cells = ''
    for stage, value in zip(stages, values, strict=True):
      before = None if stage.parent is None else values[stage.parent]
      shown = '–' if value is None else form(value)
      cells += f'<td{" class=soft" if value is None else ""}>{_e(shown)}{_delta(value, before, form, better)}</td>'
    body += f'<tr><td>{_e(label)}<span class="soft small under">{_e(note)}</span></td>{cells}</tr>'
  return (f'<div class="card"><div class="scroll"><table class="stages"><tr><th></th>{head}</tr>{body}</table></div>'
          '</div><p class="soft small note">Small figures: the change from the run that a stage began from, '
          '<em class="up">for the better</em> or <em class="down">for the worse</em>.</p>')


def _dot(index):
  return f'<s class="dot" style="background:var(--c{index % COLORS})"></s>'


def _headline(stages, index):
  """Returns (figure, what it is) of a stage's card: what it is for."""
  stage = stages[index]
  if stage.kind.startswith('rl'):
    for name in _evaluations([stage], 'reward'):
      return f'{stage.measured(name, "reward"):.1%}', f'right answers, {_named(name)}'
  for name in _evaluations([stage], 'accuracy'):
    return f'{stage.measured(name, "accuracy"):.1%}', f'pairs ranked right, {_named(name)}'
  names = _evaluations([stage], 'loss')
  trained = stage.run.get('data', 'sources')
  trained = [pathlib.PurePath(str(s)).name for s in sorted(
      trained, key=lambda s: -(number(trained, s) or 0))] if isinstance(trained, dict) else []
  names = [n for source in trained for n in names if _named(n) == source] or names
  if not names:
    return '–', 'not evaluated'
  if _is_text(stages, names[0]) or stage.kind == 'pretrain':
    value = stage.measured(names[0], 'bits_per_byte')
    return ('–' if value is None else f'{value:.3f}'), f'bits per byte, {_named(names[0])}'
  return f'{stage.measured(names[0], "loss"):.3f}', f'nats a token, {_named(names[0])}'


def _cards(stages):
  cards = []
  for i, stage in enumerate(stages):
    figure, what = _headline(stages, i)
    began = '' if stage.parent is None else f' ← {stages[stage.parent].name}'
    done, seconds = steps_done(stage.run), _seconds(stage.run)
    note = ' · '.join(filter(None, [done is not None and f'{done:,} steps', seconds and duration(seconds)]))
    cards.append(f'<div class="card stage" style="border-top-color:var(--c{i % COLORS})"><h3>{_e(stage.name)}'
                 f'<span class="soft">{_e(began)}</span></h3><span class="soft small">{_e(stage.kind)}</span>'
                 f'<b>{_e(figure)}</b><em>{_e(what)}</em><span class="soft small">{_e(note)}</span></div>')
  return f'<div class="flow">{"".join(cards)}</div>'


def _curves(stages, charts):
  wide, rest = '', ''
  for pattern, title, options in CHARTS:
    names = list(dict.fromkeys(n for s in stages for n in s.curves().values())) if '{}' in pattern else ['']
    for name in names:
      key = pattern.format(name)
      series = [made for i, s in enumerate(stages) for own, shown in (s.curves() if name else {'': ''}).items()
                if shown == name for made in _lines(s, i, pattern.format(own))]
      if not series:
        continue
      identity = f'chart{len(charts)}'
      charts[identity] = {'title': title.format(_named(name)), 'height': 200, 'series': series, **options}
      drawn = page.line_chart(identity, charts[identity])
      if key == 'train/loss':
        wide += drawn
      else:
        rest += drawn
  if wide:
    wide += ('<p class="soft small note">Losses of different kinds of stages are of different things: of tokens, of '
             'pairs, of policies. Curves are what each run measured while training, on rows of its own making; the '
             'table above measures all runs alike.</p>')
  return wide + (f'<div class="grid">{rest}</div>' if rest else '')


def _lines(stage, index, key):
  """Returns the series of a stage's metric: as the page draws noisy curves, with one name for both."""
  steps, values = stage.run.curve(key)
  if not steps:
    return []
  if key.startswith('eval/'):
    return [metrics.series(stage.name, 'dots', index, steps, values)]
  *faint, line = metrics.trend(stage.name, index, steps, values)
  return [{**line, 'label': stage.name}] if faint or line else []


def _answers(stages):
  """Returns the answers to the prompts of the first stage that has some, side by side."""
  spoken = [(i, s, {a['prompt']: a for a in s.answers}) for i, s in enumerate(stages) if s.answers]
  prompts = list(dict.fromkeys(prompt for _, _, answers in spoken for prompt in answers))
  if not prompts:
    return ''
  head = ''.join(f'<th class="left">{_dot(i)}{_e(s.name)}</th>' for i, s, _ in spoken)
  body = ''
  for prompt in prompts[:PROMPTS]:
    found = [answers.get(prompt) for _, _, answers in spoken]
    right = next((a['right'] for a in found if a and isinstance(a.get('right'), str)), None)
    wanted = '' if right is None else f'<span class="soft small under">right: {_e(_cut(right))}</span>'
    body += f'<tr><td class="left">{_e(_cut(prompt))}{wanted}</td>' + ''.join(
        '<td class="left soft">–</td>' if a is None else
        f'<td class="left"><pre class="{"ok" if _is_right(a["text"], right) else "no"}">{_e(_cut(a["text"]))}'
        f'{_ending(a)}</pre></td>' for a in found) + '</tr>'
  first = spoken[0][1].answers[0]
  heat = number(first, 'temperature')
  notes = ['The likeliest answers' if heat == 0 else f'Sampled at temperature {heat:g}' if heat else 'Answers',
           *(['asked as a chat, but for those that only go on with text: '
              + ', '.join(s.name for _, s, _ in spoken if not s.answers[0].get('chat'))]
             if len({bool(s.answers[0].get('chat')) for _, s, _ in spoken}) > 1 else [])]
  more = f' {PROMPTS} of {len(prompts)} prompts.' if len(prompts) > PROMPTS else ''
  return (f'<div class="card"><div class="scroll"><table class="said"><tr><th class="left">prompt</th>{head}</tr>{body}'
          f'</table></div></div><p class="soft small note">{_e("; ".join(notes))}. A green edge: right. … : stopped at '
          f'the most tokens allowed.{more}</p>')


def _is_right(text, right):
  """Says whether an answer is the right one: the same final answer, or the same text."""
  if right is None:
    return False
  if '####' in right:
    return maths.equal(text, right)
  return ' '.join(text.split()).casefold() == ' '.join(right.split()).casefold()


def _ending(answer):
  return '<span class="cut"> …</span>' if answer.get('stopped') == 'length' else ''


def _cut(text):
  return text if len(text) <= CHARACTERS else f'{text[:CHARACTERS]} …'


def _missing(stages):
  ignored = ('samples.jsonl', 'energy.json')
  lines = [f'{_e(s.name)}: ' + '; '.join(f'<code>{_e(name)}</code> ({_e(why)})' for name, why in s.run.missing
                                         if name not in ignored)
           for s in stages if any(name not in ignored for name, _ in s.run.missing)]
  folders = ', '.join(f'<code>{_e(s.run.folder)}</code>' for s in stages)
  missing = f' Not in these folders: {". ".join(lines)}.' if lines else ''
  return f'<footer>From {folders}. Each has a report of its own.{missing}</footer>'
