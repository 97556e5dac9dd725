"""Compare the metrics of runs: the stages of one model's training, or runs side by side such as a sweep.

Evaluations are compared only if they are of the same sequences (`Evaluation.identity`).
"""

import collections
import dataclasses
import json
import math
import pathlib
import shlex
import statistics

from llmjax.report.formatting import count, cut, duration, formatted, number, percent
from llmjax.report.reading import is_sequence

SETTING_CHARACTERS = 60  # Of a setting that differs between runs.
IRRELEVANT = ('logs', 'profile', 'cost', 'distributed')  # Config groups that do not affect results.
ACCURACY_REWARDS = ('math', 'exact', 'doctest', 'regex', 'format')  # Rewards that are 0 or 1.
TENTH = 0.1  # Fraction of a noisy curve that is averaged at its ends.
THREE_DIGITS = '{:.3f}'.format


@dataclasses.dataclass
class Row:
  """A row of the comparison.

  values: one per run.  better: 1 if larger values are better, -1 if smaller ones are, 0 if neither.
  name, key, evaluations: the evaluation that the values are of, its measure and its record for each run; empty for
  other rows.
  """

  label: str
  note: str
  values: list
  form: object
  better: int = 0
  name: str = ''
  key: str = ''
  evaluations: tuple = ()

  def is_comparable(self, i, j):
    """Return whether the values of two runs are of equal evaluations."""
    first, second = self.evaluations[i], self.evaluations[j]
    return first.identity is not None and first.identity == second.identity

  def is_noise(self, i, j):
    """Return whether two shares differ by less than two standard errors, or other values are of a sample."""
    if self.form is not percent:
      return self.evaluations[i].is_sample
    values, sizes = (self.values[i], self.values[j]), [self.evaluations[k].size[0] for k in (i, j)]
    error = math.sqrt(sum(v * (1 - v) / n for v, n in zip(values, sizes, strict=True)))
    return abs(values[0] - values[1]) < 2 * error

  def pairs(self, runs):
    """Yield (run, reference run) as indices, where both have a value and one direction is better."""
    for i, run in enumerate(runs):
      if self.better and run.reference is not None and None not in (self.values[i], self.values[run.reference]):
        yield i, run.reference


def make_rows(runs):
  """Yield the Rows of the comparison."""
  if not is_sequence(runs):
    yield from _differing_settings(runs)
  yield Row('Parameters', '', [run.parameters for run in runs], count)
  yield Row('Steps', '', [run.steps for run in runs], '{:,}'.format)
  yield Row('Training samples', 'sequences of text or conversations, preference pairs, or completions',
            [(run.steps or 0) * (run.number('train', 'batch_size') or 0) or None for run in runs], '{:,}'.format)
  yield Row('Training tokens', 'targets with a nonzero loss weight', [_training_tokens(run) for run in runs], count)
  yield Row('Wall time', 'including startup, compilation and evaluation', [run.wall_seconds for run in runs], duration)
  yield from _likelihood_rows(runs)
  for name in evaluation_names(runs, 'reward'):
    is_accuracy = all(is_share(e) for e in comparable(runs, name, 'reward') if e)
    yield _evaluation_row(runs, name, 'reward', 'Accuracy' if is_accuracy else 'Reward',
                          'mean reward of greedy completions of held-out prompts',
                          percent if is_accuracy else THREE_DIGITS, 1)
    yield _evaluation_row(runs, name, 'ended', 'Finished completions', 'with an end-of-sequence token', percent, 1)
  for name in evaluation_names(runs, 'accuracy'):
    yield _evaluation_row(runs, name, 'accuracy', 'Preference accuracy', 'the chosen completion scores higher', percent,
                          1)
  for tenth, index in (('first', 0), ('last', -1)):
    yield Row(f'Reward of sampled completions, {tenth} tenth', f'mean over the {tenth} tenth of the iterations',
              [_end_means(run, 'rollout/reward')[index] for run in runs], THREE_DIGITS)
  yield Row('KL from the initial policy', 'nats per completion, last tenth of the iterations',
            [_end_means(run, 'rollout/kl')[1] for run in runs], '{:.2f}'.format)


def comparable(runs, name, key):
  """Return each run's Evaluation 'split:source', or None: the one that most runs have of the same sequences.

  Ties are broken by the number of sequences.  A run without it gets its first evaluation of that name.
  """
  evaluations = [run.named_evaluations(name, key) for run in runs]
  votes = collections.Counter(identity for of_run in evaluations for identity in {e.identity for e in of_run})
  sizes = {e.identity: e.size[0] for of_run in evaluations for e in of_run}
  votes.pop(None, None)
  best = max(votes, key=lambda identity: (votes[identity], sizes[identity]), default=None)
  return [next((e for e in of_run if best and e.identity == best), next(iter(of_run), None)) for of_run in evaluations]


def evaluation_names(runs, key):
  """Return the names ('split:source') of evaluations that measured `key` in any run."""
  names = dict.fromkeys(name for run in runs for name in run.evaluation_names().values())
  return [name for name in names if any(run.named_evaluations(name, key) for run in runs)]


def is_share(evaluation):
  """Return whether a mean reward is an accuracy: the mean of a single reward of 0 or 1."""
  rewards = [key.removeprefix('reward/') for key in evaluation.values if key.startswith('reward/')]
  return (len(rewards) == 1 and rewards[0] in ACCURACY_REWARDS
          and evaluation.measure(f'reward/{rewards[0]}') == evaluation.measure('reward'))


def is_text(runs, name):
  """Return whether an evaluation is of plain text: by the data of the runs, or because compressors were measured."""
  return _record_kind(runs, name) == 'text' or any(run.named_evaluations(name, 'xz_bits_per_byte') for run in runs)


def display_name(name):
  """Return 'docs' for 'validation:docs', 'docs (train)' for 'train:docs', and a split without source unchanged."""
  split, _, source = name.partition(':')
  return source + f' ({split})' * (split != 'validation') if source else split


def describe(runs, rows):
  """Return the table as plain data: [{'label', 'note', 'cells': [{'value', 'of', 'change', 'verdict'}]}].

  change: the difference from the reference run, '' if not comparable.  verdict: up (better), down (worse) or same.
  """
  table = []
  for row in rows:
    if all(value is None for value in row.values):
      continue
    references = dict(row.pairs(runs))
    of = [e and e.describe() for e in row.evaluations] or [None] * len(runs)
    shared = next(iter(set(filter(None, of)))) if len(set(filter(None, of))) == 1 else ''
    cells = []
    for i, value in enumerate(row.values):
      change, verdict = _change(row, i, references[i]) if i in references else ('', '')
      cells.append({'value': formatted(value, row.form), 'missing': value is None, 'change': change,
                    'verdict': verdict, 'of': '' if shared else of[i] or ''})
    table.append({'label': row.label, 'note': ', '.join(filter(None, (row.note, shared))), 'cells': cells})
  return table


def not_compared(runs, rows):
  """Return [{'text', 'commands'}] for evaluations of different sequences, or of a sample, and how to compare them."""
  items, folders = [], [str(run.folder) for run in runs]
  for row in rows:
    unequal = [pair for pair in row.pairs(runs) if not row.is_comparable(*pair)]
    pairs = unequal or [pair for pair in row.pairs(runs) if row.evaluations[pair[0]].is_sample]
    if not pairs or row.key == 'ended':  # Measured by the same evaluation as the reward.
      continue
    indices = sorted({i for pair in pairs for i in pair})
    commands, reason = _commands(runs, row, indices)
    if not unequal and not commands:
      continue
    if unequal:
      of = '; '.join(f'{runs[i].name}: {row.evaluations[i].describe()}' for i in indices)
      text = f'{row.label} is not compared: {reason} ({of}).'
    else:
      text = f'{row.label} is compared on a sample. These commands compare it on the whole split:'
    if commands:
      commands.append(shlex.join(
          ['llmjax', 'report', f'--workdir={folders[0]}', f'--compare={",".join(folders[1:])}']))
    items.append({'text': text, 'commands': '\n'.join(commands)})
  return items


def _change(row, i, reference):
  if not row.is_comparable(i, reference):
    return '', ''
  change, form = row.values[i] - row.values[reference], row.form
  if form(row.values[i]) == form(row.values[reference]):
    return '±0', 'same'
  verdict = 'same' if row.is_noise(i, reference) else 'up' if change * row.better > 0 else 'down'
  return ('+' if change > 0 else '−') + form(abs(change)), verdict


def _likelihood_rows(runs):
  """Yield the rows of held-out text and conversations, those of `llmjax evaluate` first."""
  has_likelihood = [not run.kind.startswith('reward') and not run.is_preference for run in runs]
  evaluated = [full for run in runs for name, full in run.evaluation_names().items() if name in run.evaluation]
  for name in dict.fromkeys([*evaluated, *(full for run in runs for full in run.evaluation_names().values())]):
    if not any(applies and run.named_evaluations(name, 'loss')
               for run, applies in zip(runs, has_likelihood, strict=True)):
      continue
    is_bits = is_text(runs, name) or not (evaluated or _record_kind(runs, name))
    key, unit = ('bits_per_byte', 'bits per byte') if is_bits else ('loss', 'nats per token')
    row = _evaluation_row(runs, name, key, '', f'held-out text, {unit}' if is_bits else f'held-out, {unit}',
                          THREE_DIGITS, -1, has_likelihood)
    if any(row.evaluations):
      yield row


def _evaluation_row(runs, name, key, label, note, form, better, applies=None):
  """Return the Row of a measure of an evaluation.  applies: whether each run has the measure; None: all do."""
  evaluations = [e if applies is None or applies[i] else None for i, e in enumerate(comparable(runs, name, key))]
  label = ', '.join(filter(None, (label, display_name(name))))
  return Row(label, note, [e and e.measure(key) for e in evaluations], form, better, name, key, tuple(evaluations))


def _differing_settings(runs):
  """Yield a Row for each setting that differs between the runs."""
  flat = [{f'{group}.{name}': value for group, values in run.config.items() if isinstance(values, dict)
           for name, value in values.items()} for run in runs]
  for name in dict.fromkeys(name for values in flat for name in values):
    values = [json.dumps(v[name], ensure_ascii=False).strip('"') if name in v else None for v in flat]
    if len(set(values)) > 1 and name.partition('.')[0] not in IRRELEVANT:
      yield Row(name, '', [v and cut(v, SETTING_CHARACTERS) for v in values], str)


def _training_tokens(run):
  """Return the number of target tokens, or None where the loss weight counts pairs or completions."""
  if run.kind not in ('pretrain', 'finetune') or run.is_preference:
    return None
  return sum(v for v in run.curve('train/target_tokens')[1] if math.isfinite(v)) or None


def _record_kind(runs, name):
  """Return the kind of records of an evaluation's source, by the data of the runs, or None."""
  return next((source['records'] for run in runs for folder, source in run.data.items() if isinstance(source, dict)
               and 'records' in source and pathlib.PurePath(folder).name == name.partition(':')[2]), None)


def _end_means(run, key):
  """Return the means of the first and the last tenth of a noisy curve, or (None, None)."""
  values = [v for v in run.curve(key)[1] if math.isfinite(v)]
  size = max(round(TENTH * len(values)), 1)
  return (statistics.fmean(values[:size]), statistics.fmean(values[-size:])) if values else (None, None)


def _commands(runs, row, indices):
  """Return (commands that evaluate these runs on the same sequences, why the row is not compared)."""
  runs, evaluations = [runs[i] for i in indices], [row.evaluations[i] for i in indices]
  if len({run.tokenizer for run in runs} - {None}) > 1:
    return [], 'the runs have different tokenizers'
  if row.key == 'accuracy':
    return [], 'pairs are evaluated only during training; train the runs with the same data and evaluate.limit'
  split, _, source = row.name.partition(':')
  folders = [folder for run, e in zip(runs, evaluations, strict=True)
             for folder in (*run.sources, *(e.values.get('sources') or ()))]
  folder = next((str(f) for f in folders if pathlib.PurePath(str(f)).name == source), None)
  if source and folder is None:
    return [], f'no run names the prepared folder of {source}; pass it to `llmjax evaluate --sources`'
  flags = [f'--sources={folder}'] * bool(source) + [f'--splits={split}']
  lengths = [n for run in runs if (n := run.number('data', 'seq_len'))]
  flags += [f'--seq-len={min(lengths)}'] if lengths else []
  if row.key == 'reward':
    rl = next((run.config['rl'] for run in runs if isinstance(run.config.get('rl'), dict)), {})
    flags += [f'--reward={name}' for name in (rl.get('rewards') or ()) if name in ('math', 'exact', 'doctest')][:1]
    flags += [f'--max-new-tokens={rl["max_new_tokens"]}'] if number(rl, 'max_new_tokens') else []
  return ([shlex.join(['llmjax', 'evaluate', f'--workdir={run.folder}', *flags]) for run in runs],
          'the evaluations are not of the same sequences; these commands make them comparable')
