"""`write_comparison`: one page about several runs: the stages of one model's life, or runs side by side.

Everything is read from the runs' folders: metrics, the evaluations that `llmjax evaluate --sources` makes on the same
data, and the answers that `llmjax generate --prompts` gives to the same prompts.  What a run lacks is left blank.
Evaluations are compared only where they are of the same sequences (`runs.Evaluation.identity`); the page names the
commands that make them so where they are not.
"""

import html
import os
import pathlib
import shlex

from llmjax import secrets
from llmjax.evaluate import metrics
from llmjax.post import maths
from llmjax.report import page
from llmjax.report.runs import duration, number, steps_done
from llmjax.report.stages import (
  commands_for,
  comparable,
  compared_pairs,
  cut,
  evaluation_names,
  is_sequence,
  is_share,
  is_text,
  percent,
  read_stages,
  shown_name,
  table_rows,
  wall_seconds,
)

PROMPTS, CHARACTERS = 24, 900  # Of answers side by side, so that the page stays small.
COLORS = 8

# Curves that runs are drawn into together: metric, title, options of the chart.
CHARTS = (
    ('train/loss', 'Loss', {'height': 260, 'switches': ['ylog', 'xlog']}),
    ('eval/{}/bits_per_byte', 'Held-out bits per byte, {}', {}),
    ('eval/{}/accuracy', 'Held-out pairs ranked right, {}', {}),
    ('rollout/reward', 'Reward of sampled completions', {}),
    ('eval/{}/reward', 'Reward of greedy completions, {}', {}),
    ('rollout/kl', 'KL from the run it began from, nats a completion', {'zero': True}),
    ('rollout/tokens', 'Tokens of a sampled completion', {'zero': True}),
    ('train/tokens_per_second', 'Tokens a second', {'zero': True}))


def write_comparison(workdirs, output) -> pathlib.Path:
  """Writes the page about the runs, in their order, in one move; returns its path."""
  output = pathlib.Path(output)
  output.parent.mkdir(parents=True, exist_ok=True)
  temporary = output.with_suffix('.html.tmp')
  temporary.write_text(secrets.hide(render(read_stages(workdirs))), encoding='utf-8')
  os.replace(temporary, output)
  return output


def render(stages):
  """Returns the page as text."""
  charts = {}
  folder = os.path.commonpath([stage.run.folder.resolve().parent for stage in stages])
  title = os.path.basename(folder) or 'runs'
  seconds = sum(wall_seconds(stage.run) or 0 for stage in stages)
  devices = dict.fromkeys(str(s.run.environment['device_kind']) for s in stages if s.run.environment.get('device_kind'))
  parts = [f'{len(stages)} runs', *([f'{duration(seconds)} in all'] if seconds else []), *devices]
  rows = list(table_rows(stages))
  sections = [
      f'<header><div><h1>{_e(title)}</h1><span class="soft">{_e(" · ".join(parts))}</span></div>'
      '<button id="theme">light / dark</button></header>',
      _cards(stages),
      page.section('What each stage changed' if is_sequence(stages) else 'The runs side by side',
                   _table(stages, rows) + _not_compared(stages, rows)),
      page.section('Curves', _curves(stages, charts)),
      page.section('The same prompts, one column a run', _answers(stages)), _missing(stages)]
  return page.render_page(f'{title} · llmjax', '\n'.join(filter(None, sections)), charts)


def _e(text):
  return html.escape(str(text))


def _delta(row, i, before):
  """Returns the HTML of a change, coloured by whether it is for the better; '' where evaluations are not equal."""
  if not row.equal(i, before):
    return ''
  change, form = row.values[i] - row.values[before], row.form
  same = form(row.values[i]) == form(row.values[before])
  kind = 'same' if same or row.is_noise(i, before) else 'up' if change * row.better > 0 else 'down'
  return f'<em class="{kind}">{"±0" if same else ("+" if change > 0 else "−") + form(abs(change))}</em>'


def _table(stages, rows):
  head = ''.join(f'<th>{_dot(i)}{_e(s.name)}</th>' for i, s in enumerate(stages))
  body = ''
  if is_sequence(stages):
    began = ''.join(f'<td class="soft">{_e("–" if s.parent is None else stages[s.parent].name)}</td>' for s in stages)
    body = f'<tr><td>Began from</td>{began}</tr>'
  for row in rows:
    if not any(v is not None for v in row.values):
      continue
    changes, of = dict(compared_pairs(stages, row)), [e and e.of() for e in row.evaluations] or [None] * len(stages)
    alike = len(set(filter(None, of))) == 1  # Then it is told once.
    note = ', '.join(filter(None, (row.note, alike and next(filter(None, of)))))
    cells = ''
    for i, value in enumerate(row.values):
      shown = '–' if value is None else row.form(value)
      told = f'<span class="soft under">{_e(of[i])}</span>' if of[i] and not alike else ''
      delta = _delta(row, i, changes[i]) if i in changes else ''
      cells += f'<td{" class=soft" if value is None else ""}>{_e(shown)}{delta}{told}</td>'
    body += f'<tr><td>{_e(row.label)}<span class="soft small under">{_e(note)}</span></td>{cells}</tr>'
  what = ('the change from the run that a stage began from' if is_sequence(stages) else
          f'the difference from {stages[0].name}')
  return (f'<div class="card"><div class="scroll"><table class="stages"><tr><th></th>{head}</tr>{body}</table></div>'
          f'</div><p class="soft small note">Small figures: {_e(what)}, <em class="up">for the better</em> or '
          '<em class="down">for the worse</em>; without a colour where it is within two standard errors, or of a '
          'sample of the split. Only evaluations of the same sequences are compared.</p>')


def _not_compared(stages, rows):
  """Returns which evaluations of the table are not equal, or of a sample, and the commands that mend it."""
  parts, folders = [], [str(s.run.folder) for s in stages]
  for row in rows:
    unequal = [pair for pair in compared_pairs(stages, row) if not row.equal(*pair)]
    pairs = unequal or [pair for pair in compared_pairs(stages, row) if row.evaluations[pair[0]].is_sample]
    if not pairs or row.key == 'ended':  # Of the same evaluation as the reward.
      continue
    which = sorted({i for pair in pairs for i in pair})
    of = '; '.join(f'{stages[i].name}: {row.evaluations[i].of()}' for i in which)
    commands, reason = commands_for(stages, row, which)
    verdict = f'is not compared: {reason} ({of})' if unequal else 'is compared on a sample; these compare all of it'
    if not unequal and not commands:
      continue
    commands += [shlex.join(['llmjax', 'report', f'--workdir={folders[0]}', f'--compare={",".join(folders[1:])}'])
                 ] if commands else []
    parts.append(f'<p class="note">{_e(row.label)} {_e(verdict)}.</p>' + (
        f'<div class="copy"><pre>{_e(chr(10).join(commands))}</pre><button>copy</button></div>' if commands else ''))
  return f'<div class="card">{"".join(parts)}</div>' if parts else ''


def _dot(index):
  return f'<s class="dot" style="background:var(--c{index % COLORS})"></s>'


def _headline(stages, index):
  """Returns (figure, what it is, what it is of) of a stage's card: what it is for."""
  stage = stages[index]

  def figure(name, key, what, form):
    found = comparable(stages, name, key)[index]
    return (form(found.measure(key)), f'{what}, {shown_name(name)}', found.of()) if found else ('–', what, '')

  if stage.kind.startswith('rl'):
    for name in evaluation_names([stage], 'reward'):
      right = is_share(comparable(stages, name, 'reward')[index])
      return figure(name, 'reward', 'right answers' if right else 'mean reward', percent if right else '{:.3f}'.format)
  for name in evaluation_names([stage], 'accuracy'):
    return figure(name, 'accuracy', 'pairs ranked right', percent)
  names = evaluation_names([stage], 'loss')
  trained = stage.run.get('data', 'sources')
  trained = [pathlib.PurePath(str(s)).name for s in sorted(
      trained, key=lambda s: -(number(trained, s) or 0))] if isinstance(trained, dict) else []
  names = [n for source in trained for n in names if shown_name(n) == source] or names
  if not names:
    return '–', 'not evaluated', ''
  if is_text(stages, names[0]) or stage.kind == 'pretrain':
    return figure(names[0], 'bits_per_byte', 'bits per byte', '{:.3f}'.format)
  return figure(names[0], 'loss', 'nats a token', '{:.3f}'.format)


def _cards(stages):
  cards = []
  for i, stage in enumerate(stages):
    figure, what, of = _headline(stages, i)
    began = '' if stage.parent is None else f' ← {stages[stage.parent].name}'
    done, seconds = steps_done(stage.run), wall_seconds(stage.run)
    note = ' · '.join(filter(None, [done is not None and f'{done:,} steps', seconds and duration(seconds)]))
    cards.append(f'<div class="card stage" style="border-top-color:var(--c{i % COLORS})"><h3>{_e(stage.name)}'
                 f'<span class="soft">{_e(began)}</span></h3><span class="soft small">{_e(stage.kind)}</span>'
                 f'<b>{_e(figure)}</b><em>{_e(what)}<span class="soft under">{_e(of)}</span></em>'
                 f'<span class="soft small">{_e(note)}</span></div>')
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
      charts[identity] = {'title': title.format(shown_name(name)), 'height': 200, 'series': series, **options}
      drawn = page.line_chart(identity, charts[identity])
      if key == 'train/loss':
        wide += drawn
      else:
        rest += drawn
  if wide:
    wide += ('<p class="soft small note">Losses of different kinds of stages are of different things: of tokens, of '
             'pairs, of policies. Curves are what each run measured while training, on batches and held-out sequences '
             'of its own, so their levels need not be comparable; the table above says what is.</p>')
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
  head = ''.join(f'<th class="left">{_dot(i)}{_e(s.name)}<span class="soft under">{_e(_way(s.answers[0]))}</span></th>'
                 for i, s, _ in spoken)
  body = ''
  for prompt in prompts[:PROMPTS]:
    found = [answers.get(prompt) for _, _, answers in spoken]
    right = next((a['right'] for a in found if a and isinstance(a.get('right'), str)), None)
    wanted = '' if right is None else f'<span class="soft small under">right: {_e(cut(right, CHARACTERS))}</span>'
    body += f'<tr><td class="left">{_e(cut(prompt, CHARACTERS))}{wanted}</td>' + ''.join(
        '<td class="left soft">–</td>' if a is None else
        f'<td class="left"><pre class="{"ok" if _is_right(a["text"], right) else "no"}">'
        f'{_e(cut(a["text"], CHARACTERS))}{_ending(a)}</pre></td>' for a in found) + '</tr>'
  more = f' {PROMPTS} of {len(prompts)} prompts.' if len(prompts) > PROMPTS else ''
  return (f'<div class="card"><div class="scroll"><table class="said"><tr><th class="left">prompt</th>{head}</tr>{body}'
          '</table></div></div><p class="soft small note">A green edge: right. … : stopped at the most tokens allowed.'
          f'{more}</p>')


def _way(answer):
  """Returns how a run's completions were made: 'step 40, greedy, as a chat'."""
  step, heat = number(answer, 'step'), number(answer, 'temperature')
  return ', '.join(filter(None, (
      step is not None and f'step {step:,}', heat is not None and (f'temperature {heat:g}' if heat else 'greedy'),
      'as a chat' if answer.get('chat') else 'as text to go on with')))


def _is_right(text, right):
  """Says whether an answer is the right one: the same final answer, or the same text."""
  if right is None:
    return False
  if '####' in right:
    return maths.equal(text, right)
  return ' '.join(text.split()).casefold() == ' '.join(right.split()).casefold()


def _ending(answer):
  return '<span class="cut"> …</span>' if answer.get('stopped') == 'length' else ''


def _missing(stages):
  ignored = ('samples.jsonl', 'energy.json')
  lines = [f'{_e(s.name)}: ' + '; '.join(f'<code>{_e(name)}</code> ({_e(why)})' for name, why in s.run.missing
                                         if name not in ignored)
           for s in stages if any(name not in ignored for name, _ in s.run.missing)]
  folders = ', '.join(f'<code>{_e(s.run.folder)}</code>' for s in stages)
  missing = f' Not in these folders: {". ".join(lines)}.' if lines else ''
  return f'<footer>From {folders}. Each has a report of its own.{missing}</footer>'
