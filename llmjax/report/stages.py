"""Runs side by side, as the page of `compare` shows them: the stages of one model's life, or a sweep.

Figures of evaluations are compared only where they are of the same sequences (`runs.Evaluation.identity`).
"""

import collections
import dataclasses
import hashlib
import json
import math
import pathlib
import shlex
import statistics

from llmjax import config as configs
from llmjax.evaluate import metrics
from llmjax.generate.spec import ANSWERS
from llmjax.report.runs import Run, count, duration, is_of_pairs, number, parameters, read_run, steps_done

SETTING = 60  # Characters of a setting that differs.
UNTOLD = ('logs', 'profile', 'cost', 'distributed')  # Groups of settings that change no number of a run.
SHARES = ('math', 'exact', 'doctest', 'regex', 'format')  # Rewards that are 0 or 1.
LAST = 0.1  # Part of a noisy curve whose mean stands for its end.


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


def table_rows(stages):
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
  yield Row('Wall time', 'start, compilation and evaluation included', [wall_seconds(s.run) for s in stages], duration)
  yield from _likelihood_rows(stages)
  for name in evaluation_names(stages, 'reward'):
    right = all(is_share(e) for e in comparable(stages, name, 'reward') if e)
    yield _measured(stages, name, 'reward', 'Right answers' if right else 'Reward',
                    'mean reward of greedy completions of held-out prompts', percent if right else '{:.3f}'.format, 1)
    yield _measured(stages, name, 'ended', 'Completions that end', 'by the token that ends them', percent, 1)
  for name in evaluation_names(stages, 'accuracy'):
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
      text = is_text(stages, name) or not (shared or _holds(stages, name))
      key, unit = ('bits_per_byte', 'bits a byte') if text else ('loss', 'nats a token')
      row = _measured(stages, name, key, '', f'held-out text, {unit}' if text else f'held-out, {unit}',
                      '{:.3f}'.format, -1, [s in stages_of_text for s in stages])
      if any(row.evaluations):
        yield row


def _measured(stages, name, key, label, note, form, better, which=None):
  """Returns the Row of an evaluation's measure.  which: bool of each stage, whether it has the measure at all."""
  found = [e if which is None or which[i] else None for i, e in enumerate(comparable(stages, name, key))]
  label = ', '.join(filter(None, (label, shown_name(name))))
  return Row(label, note, [e and e.measure(key) for e in found], form, better, name, key, tuple(found))


def _settings_that_differ(stages):
  """Yields a Row for each setting of runs side by side that is not the same in all of them."""
  flat = [{f'{group}.{name}': value for group, values in s.run.config.items() if isinstance(values, dict)
           for name, value in values.items()} for s in stages]
  for name in dict.fromkeys(name for values in flat for name in values):
    values = [json.dumps(v[name], ensure_ascii=False).strip('"') if name in v else None for v in flat]
    if len(set(values)) > 1 and name.partition('.')[0] not in UNTOLD:
      yield Row(name, '', [v and cut(v, SETTING) for v in values], str)


def is_share(evaluation):
  """Says whether a mean reward is a share of right answers: of one reward of 0 or 1 alone."""
  parts = [key.removeprefix('reward/') for key in evaluation.values if key.startswith('reward/')]
  return len(parts) == 1 and parts[0] in SHARES and evaluation.measure(f'reward/{parts[0]}') == evaluation.measure(
      'reward')


def evaluation_names(stages, key):
  """Returns the names of the evaluations that measured this, in any of the stages."""
  return list(dict.fromkeys(name for s in stages for name in s.curves().values() if s.evaluations(name, key)))


def is_text(stages, name):
  """Says whether an evaluation is of plain text: by the data of the runs, or for compressors stand beside it."""
  return _holds(stages, name) == 'text' or any(s.evaluations(name, 'xz_bits_per_byte') for s in stages)


def _holds(stages, name):
  """Returns what the records of an evaluation's source are, by the data of the runs, or None."""
  return next((found['records'] for s in stages for source, found in s.run.data.items() if isinstance(found, dict)
               and 'records' in found and pathlib.PurePath(source).name == name.partition(':')[2]), None)


def shown_name(name):
  """Returns 'docs' for 'validation:docs' and 'docs (train)' for 'train:docs'; a split by itself stays."""
  split, _, source = name.partition(':')
  return source + f' ({split})' * (split != 'validation') if source else split


def wall_seconds(run):
  return sum(v for v in map(lambda k: number(run.time, k), run.time) if v) or None


def _mean(values):
  values = [v for v in values if math.isfinite(v)]
  return statistics.fmean(values) if values else None


def _ends(run, key):
  """Returns the means of a noisy curve's first and last LAST, or (None, None)."""
  values = run.curve(key)[1]
  size = max(round(LAST * len(values)), 1)
  return _mean(values[:size]), _mean(values[-size:])


def compared_pairs(stages, row):
  """Yields (stage, the stage it is compared to) of a row with figures of both and a better direction."""
  for i, stage in enumerate(stages):
    before = stage.compared_to
    if row.better and before is not None and None not in (row.values[i], row.values[before]):
      yield i, before


def commands_for(stages, row, which):
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
    flags += [f'--reward={name}' for name in (rl.get('rewards') or ()) if name in ('math', 'exact', 'doctest')][:1]
    flags += [f'--max-new-tokens={rl["max_new_tokens"]}'] if number(rl, 'max_new_tokens') else []
  return ([shlex.join(['llmjax', 'evaluate', f'--workdir={stages[i].run.folder}', *flags]) for i in which],
          'the evaluations are not of the same sequences; these commands make them so')


def _tokenizer(run):
  """Returns the hash of the tokenizer in a run's folder, or None."""
  try:
    return hashlib.sha256((run.folder / 'tokenizer.model').read_bytes()).hexdigest()
  except OSError:
    return None


def cut(text, limit):
  return text if len(text) <= limit else f'{text[:limit]} …'
