"""`write_comparison`: one page about several runs: the stages of one model's life, or runs side by side.

Everything is read from the runs' folders: metrics, the evaluations that `llmjax evaluate --sources` makes on the same
data, and the answers that `llmjax generate --prompts` gives to the same prompts.  What a run lacks is left blank.
Evaluations are compared only where they are of the same sequences (`runs.Evaluation.identity`); the page names the
commands that make them so where they are not.
"""

import collections
import dataclasses
import hashlib
import html
import json
import math
import os
import pathlib
import shlex
import statistics

from llmjax import config as configs
from llmjax import secrets
from llmjax.evaluate import metrics, page
from llmjax.evaluate.runs import Run, count, duration, is_of_pairs, number, parameters, read_run, steps_done
from llmjax.generate.spec import ANSWERS
from llmjax.rl import maths

PROMPTS, CHARACTERS = 24, 900  # Of answers side by side, so that the page stays small.
COLORS = 8
SETTING = 60  # Characters of a setting that differs.
UNTOLD = ('logs', 'profile', 'cost', 'distributed')  # Groups of settings that change no number of a run.
SHARES = ('maths', 'exact', 'doctest', 'regex', 'format')  # Rewards that are 0 or 1.
LAST = 0.1  # Part of a noisy curve whose mean stands for its end.

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


@dataclasses.dataclass
class Stage:
  """A run on the page.  name: unique.  parent: number of the stage it began from, or None.  answers: its lines.

  compared_to: number of the stage that its figures are compared to, or None: its parent; the first run of a sweep.
  """

  run: Run
  name: str
  kind: str
  parent: int | None
  answers: list
  compared_to: int | None = None

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

  def evaluations(self, name, key):
    """Returns the Evaluations with this name on the page that measured `key`: those of evaluation.json come first."""
    own = [name, *(n for n, shown in self.curves().items() if shown == name and n != name)]
    found = [e for n in own for e in self.run.evaluations(n, key)]
    return sorted(found, key=lambda e: e.values is not self.run.evaluation.get(e.name))


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
  for i, stage in enumerate(stages):
    stage.compared_to = stage.parent if is_sequence(stages) else 0 if i else None
  return stages


def is_sequence(stages):
  """Says whether the runs are stages, one begun from another, or else runs side by side, as those of a sweep."""
  return any(stage.parent is not None for stage in stages)


def comparable(stages, name, key):
  """Returns each stage's Evaluation of a name, or None: the one that most stages have of the same sequences.

  Of two that as many have, the one of more sequences.  Where a stage lacks it, its first one.
  """
  found = [s.evaluations(name, key) for s in stages]
  votes = collections.Counter(identity for of_stage in found for identity in {e.identity for e in of_stage})
  counts = {e.identity: e.count for of_stage in found for e in of_stage}
  votes.pop(None, None)
  best = max(votes, key=lambda identity: (votes[identity], counts[identity]), default=None)
  return [next((e for e in of_stage if best and e.identity == best), next(iter(of_stage), None)) for of_stage in found]


def kind_of(run):
  """Returns what made a run, in words, by the groups of its config."""
  if isinstance(run.config.get('rl'), dict):
    return f'rl, {str(run.get("policy", "name") or "").upper()}'.rstrip(', ')
  if is_of_pairs(run) and 'reward' not in run.config:
    return f'finetune on preferences, {run.get("preference", "loss")}'
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
  rows = list(_rows(stages))
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
  return list(dict.fromkeys(name for s in stages for name in s.curves().values() if s.evaluations(name, key)))


def _is_text(stages, name):
  """Says whether an evaluation is of plain text: by the data of the runs, or for compressors stand beside it."""
  return _holds(stages, name) == 'text' or any(s.evaluations(name, 'xz_bits_per_byte') for s in stages)


def _holds(stages, name):
  """Returns what the records of an evaluation's source are, by the data of the runs, or None."""
  return next((found['records'] for s in stages for source, found in s.run.data.items() if isinstance(found, dict)
               and 'records' in found and pathlib.PurePath(source).name == name.partition(':')[2]), None)


@dataclasses.dataclass
class Row:
  """A row of the table.  values: of the stages.  better: the better direction, -1 or 1; 0: none.

  name, key: of the evaluation that the values are of, and evaluations: each stage's; '' and () of other figures.
  """

  label: str
  note: str
  values: list
  form: object
  better: int = 0
  name: str = ''
  key: str = ''
  evaluations: tuple = ()

  def equal(self, i, j):
    """Says whether the figures of two stages are of equal evaluations."""
    first, second = self.evaluations[i], self.evaluations[j]
    return first.identity is not None and first.identity == second.identity

  def is_noise(self, i, j):
    """Says whether a change of a share is within two standard errors, or one of a loss is of a sample alone."""
    shares, counts = (self.values[i], self.values[j]), [self.evaluations[k].count for k in (i, j)]
    if self.form is percent:
      error = math.sqrt(sum(v * (1 - v) / n for v, n in zip(shares, counts, strict=True)))
      return abs(shares[0] - shares[1]) < 2 * error
    return self.evaluations[i].is_sample


def percent(value):
  return f'{value:.1%}'


def _rows(stages):
  """Yields the Rows of the table."""
  if not is_sequence(stages):
    yield from _settings_that_differ(stages)
  yield Row('Parameters', '', [parameters(s.run) for s in stages], count)
  yield Row('Steps', '', [steps_done(s.run) for s in stages], '{:,}'.format)
  yield Row('Samples trained on', 'sequences of text or conversations, pairs, or completions',
            [(steps_done(s.run) or 0) * (s.run.number('train', 'batch_size') or 0) or None for s in stages],
            '{:,}'.format)
  yield Row('Tokens trained on', 'targets with weight in the loss',  # Elsewhere the weight is of pairs or completions.
            [sum(v for v in s.run.curve('train/target_tokens')[1] if math.isfinite(v)) or None
             if s.kind in ('pretrain', 'finetune') and not is_of_pairs(s.run) else None for s in stages], count)
  yield Row('Wall time', 'start, compilation and evaluation included', [_seconds(s.run) for s in stages], duration)
  yield from _likelihood_rows(stages)
  for name in _evaluations(stages, 'reward'):
    right = all(_is_share(e) for e in comparable(stages, name, 'reward') if e)
    yield _measured(stages, name, 'reward', 'Right answers' if right else 'Reward',
                    'mean reward of greedy completions of held-out prompts', percent if right else '{:.3f}'.format, 1)
    yield _measured(stages, name, 'ended', 'Completions that end', 'by the token that ends them', percent, 1)
  for name in _evaluations(stages, 'accuracy'):
    yield _measured(stages, name, 'accuracy', 'Pairs ranked right', 'the chosen completion scores higher', percent, 1)
  for when, where in (('before', 0), ('after', 1)):
    yield Row(f'Reward of sampled completions, {when}', f'{"last" if where else "first"} tenth of the iterations',
              [_ends(s.run, 'rollout/reward')[where] for s in stages], '{:.3f}'.format)
  yield Row('KL from the run it began from', 'nats a completion, last tenth of the iterations',
            [_ends(s.run, 'rollout/kl')[1] for s in stages], '{:.2f}'.format)


def _likelihood_rows(stages):
  """Yields the rows of held-out text and conversations: what `llmjax evaluate` measured, then what training did."""
  stages_of_text = [s for s in stages if not s.kind.startswith('reward') and not is_of_pairs(s.run)]
  shared = [shown for s in stages for name, shown in s.curves().items() if name in s.run.evaluation]
  for name in dict.fromkeys([*shared, *(n for s in stages for n in s.curves().values())]):
    if any(s.evaluations(name, 'loss') for s in stages_of_text):
      text = _is_text(stages, name) or not (shared or _holds(stages, name))
      key, unit = ('bits_per_byte', 'bits a byte') if text else ('loss', 'nats a token')
      row = _measured(stages, name, key, '', f'held-out text, {unit}' if text else f'held-out, {unit}',
                      '{:.3f}'.format, -1, [s in stages_of_text for s in stages])
      if any(row.evaluations):
        yield row


def _measured(stages, name, key, label, note, form, better, which=None):
  """Returns the Row of an evaluation's measure.  which: bool of each stage, whether it has the measure at all."""
  found = [e if which is None or which[i] else None for i, e in enumerate(comparable(stages, name, key))]
  label = ', '.join(filter(None, (label, _named(name))))
  return Row(label, note, [e and e.measure(key) for e in found], form, better, name, key, tuple(found))


def _is_share(evaluation):
  """Says whether a mean reward is a share of right answers: of one reward of 0 or 1 alone."""
  parts = [key.removeprefix('reward/') for key in evaluation.values if key.startswith('reward/')]
  return len(parts) == 1 and parts[0] in SHARES and evaluation.measure(f'reward/{parts[0]}') == evaluation.measure(
      'reward')


def _settings_that_differ(stages):
  """Yields a Row for each setting of runs side by side that is not the same in all of them."""
  flat = [{f'{group}.{name}': value for group, values in s.run.config.items() if isinstance(values, dict)
           for name, value in values.items()} for s in stages]
  for name in dict.fromkeys(name for values in flat for name in values):
    values = [json.dumps(v[name], ensure_ascii=False).strip('"') if name in v else None for v in flat]
    if len(set(values)) > 1 and name.partition('.')[0] not in UNTOLD:
      yield Row(name, '', [v and _cut(v, SETTING) for v in values], str)


def _named(name):
  """Returns 'docs' for 'validation:docs' and 'docs (train)' for 'train:docs'; a split by itself stays."""
  split, _, source = name.partition(':')
  return source + f' ({split})' * (split != 'validation') if source else split


def _changes(stages, row):
  """Yields (stage, the stage it is compared to) of a row with figures of both and a better direction."""
  for i, stage in enumerate(stages):
    before = stage.compared_to
    if row.better and before is not None and None not in (row.values[i], row.values[before]):
      yield i, before


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
    changes, of = dict(_changes(stages, row)), [e and e.of() for e in row.evaluations] or [None] * len(stages)
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
    unequal = [pair for pair in _changes(stages, row) if not row.equal(*pair)]
    pairs = unequal or [pair for pair in _changes(stages, row) if row.evaluations[pair[0]].is_sample]
    if not pairs or row.key == 'ended':  # Of the same evaluation as the reward.
      continue
    which = sorted({i for pair in pairs for i in pair})
    of = '; '.join(f'{stages[i].name}: {row.evaluations[i].of()}' for i in which)
    commands, reason = _commands(stages, row, which)
    verdict = f'is not compared: {reason} ({of})' if unequal else 'is compared on a sample; these compare all of it'
    if not unequal and not commands:
      continue
    commands += [shlex.join(['llmjax', 'report', f'--workdir={folders[0]}', f'--compare={",".join(folders[1:])}'])
                 ] if commands else []
    parts.append(f'<p class="note">{_e(row.label)} {_e(verdict)}.</p>' + (
        f'<div class="copy"><pre>{_e(chr(10).join(commands))}</pre><button>copy</button></div>' if commands else ''))
  return f'<div class="card">{"".join(parts)}</div>' if parts else ''


def _commands(stages, row, which):
  """Returns (the commands that evaluate stages `which` on the same sequences, why the row is not compared)."""
  if len({_tokenizer(stages[i].run) for i in which} - {None}) > 1:
    return [], 'the runs have different tokenizers'
  if row.key == 'accuracy':
    return [], 'pairs are evaluated while training alone; train the runs with the same data and evaluate.limit'
  split, _, source = row.name.partition(':')
  folders = [folder for i in which for folder in (
      *(stages[i].run.get('data', 'sources') or ()), *(row.evaluations[i].values.get('sources') or ()))]
  folder = next((str(f) for f in folders if pathlib.PurePath(str(f)).name == source), None)
  if source and folder is None:
    return [], f'no run names the prepared folder of {source}; give it to `llmjax evaluate --sources`'
  lengths = [n for i in which if (n := stages[i].run.number('data', 'seq_len'))]
  flags = [f'--sources={folder}'] * bool(source) + [f'--splits={split}']
  flags += [f'--seq-len={min(lengths)}'] if lengths else []
  if row.key == 'reward':
    rl = next((stages[i].run.config['rl'] for i in which if isinstance(stages[i].run.config.get('rl'), dict)), {})
    flags += [f'--reward={name}' for name in (rl.get('rewards') or ()) if name in ('maths', 'exact', 'doctest')][:1]
    flags += [f'--max-new-tokens={rl["max_new_tokens"]}'] if number(rl, 'max_new_tokens') else []
  return ([shlex.join(['llmjax', 'evaluate', f'--workdir={stages[i].run.folder}', *flags]) for i in which],
          'the evaluations are not of the same sequences; these commands make them so')


def _tokenizer(run):
  """Returns the hash of the tokenizer in a run's folder, or None."""
  try:
    return hashlib.sha256((run.folder / 'tokenizer.model').read_bytes()).hexdigest()
  except OSError:
    return None


def _dot(index):
  return f'<s class="dot" style="background:var(--c{index % COLORS})"></s>'


def _headline(stages, index):
  """Returns (figure, what it is, what it is of) of a stage's card: what it is for."""
  stage = stages[index]

  def figure(name, key, what, form):
    found = comparable(stages, name, key)[index]
    return (form(found.measure(key)), f'{what}, {_named(name)}', found.of()) if found else ('–', what, '')

  if stage.kind.startswith('rl'):
    for name in _evaluations([stage], 'reward'):
      right = _is_share(comparable(stages, name, 'reward')[index])
      return figure(name, 'reward', 'right answers' if right else 'mean reward', percent if right else '{:.3f}'.format)
  for name in _evaluations([stage], 'accuracy'):
    return figure(name, 'accuracy', 'pairs ranked right', percent)
  names = _evaluations([stage], 'loss')
  trained = stage.run.get('data', 'sources')
  trained = [pathlib.PurePath(str(s)).name for s in sorted(
      trained, key=lambda s: -(number(trained, s) or 0))] if isinstance(trained, dict) else []
  names = [n for source in trained for n in names if _named(n) == source] or names
  if not names:
    return '–', 'not evaluated', ''
  if _is_text(stages, names[0]) or stage.kind == 'pretrain':
    return figure(names[0], 'bits_per_byte', 'bits per byte', '{:.3f}'.format)
  return figure(names[0], 'loss', 'nats a token', '{:.3f}'.format)


def _cards(stages):
  cards = []
  for i, stage in enumerate(stages):
    figure, what, of = _headline(stages, i)
    began = '' if stage.parent is None else f' ← {stages[stage.parent].name}'
    done, seconds = steps_done(stage.run), _seconds(stage.run)
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
      charts[identity] = {'title': title.format(_named(name)), 'height': 200, 'series': series, **options}
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


def _cut(text, limit=CHARACTERS):
  return text if len(text) <= limit else f'{text[:limit]} …'


def _missing(stages):
  ignored = ('samples.jsonl', 'energy.json')
  lines = [f'{_e(s.name)}: ' + '; '.join(f'<code>{_e(name)}</code> ({_e(why)})' for name, why in s.run.missing
                                         if name not in ignored)
           for s in stages if any(name not in ignored for name, _ in s.run.missing)]
  folders = ', '.join(f'<code>{_e(s.run.folder)}</code>' for s in stages)
  missing = f' Not in these folders: {". ".join(lines)}.' if lines else ''
  return f'<footer>From {folders}. Each has a report of its own.{missing}</footer>'
