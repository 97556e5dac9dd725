"""Read the folders of runs for the report.

Any file may be missing or damaged: `read_runs` returns what can be read and lists what cannot.
"""

import dataclasses
import hashlib
import json
import math
import pathlib

from llmjax import config as configs
from llmjax.evaluate import metrics
from llmjax.generate.spec import ANSWERS
from llmjax.model import counts
from llmjax.model.spec import ModelSpec
from llmjax.report.formatting import number

# File of a run: (attribute of Run, what the report shows of it).
FILES = {
    'config.json': ('config', 'the resolved config'),
    'metrics.jsonl': ('rows', 'the curves'),
    'samples.jsonl': ('samples', 'samples drawn during training; sample.prompts enables them'),
    'evaluation.json': ('evaluation', 'evaluations of `llmjax evaluate`, with gzip and xz for comparison'),
    'time.jsonl': ('time_rows', 'where the time went'),
    'energy.json': ('energy', 'energy, carbon and cost'),
    'environment.json': ('environment', 'versions and devices'),
    'data.json': ('data', 'the contents of the data')}
OPTIONAL = {'profile/top_operations.json': 'profile', 'events.jsonl': 'events', 'reward.json': 'margins',
            ANSWERS: 'completions'}
# Limits on rollouts: iterations, completions per iteration.
ITERATIONS, COMPLETIONS = 16, 4
# Sizes of evaluation sets: field of the record, and its unit.
SIZES = (('sequences', 'sequences'), ('pairs', 'pairs'), ('steps', 'solution steps'), ('prompts', 'prompts'))


@dataclasses.dataclass
class Run:
  """The contents of a run's folder; empty where files are missing.

  name: unique on the page.  missing: (file, what it would show or what is wrong with it).  parent: index of the run
  that this one was initialized from, or None.  reference: index of the run that its metrics are compared to: the
  parent, or the first run if none has a parent.
  """

  folder: pathlib.Path
  name: str = 'run'
  config: dict = dataclasses.field(default_factory=dict)
  rows: list = dataclasses.field(default_factory=list)
  samples: list = dataclasses.field(default_factory=list)
  evaluation: dict = dataclasses.field(default_factory=dict)
  time_rows: list = dataclasses.field(default_factory=list)
  energy: dict = dataclasses.field(default_factory=dict)
  environment: dict = dataclasses.field(default_factory=dict)
  data: dict = dataclasses.field(default_factory=dict)
  profile: dict = dataclasses.field(default_factory=dict)
  events: list = dataclasses.field(default_factory=list)
  margins: dict = dataclasses.field(default_factory=dict)  # Of held-out preference pairs or solution steps, by split.
  completions: list = dataclasses.field(default_factory=list)
  missing: list = dataclasses.field(default_factory=list)
  parent: int | None = None
  reference: int | None = None
  _curves: dict = dataclasses.field(default_factory=dict)

  def get(self, group, name):
    """Return a value of the config, or None."""
    values = self.config.get(group)
    return values.get(name) if isinstance(values, dict) else None

  def number(self, group, name):
    """Return a number of the config, or None."""
    return number(self.config.get(group), name)

  def curve(self, key):
    """Return ([steps], [values]) of a metric."""
    if key not in self._curves:
      self._curves[key] = metrics.curve(self.rows, key)
    return self._curves[key]

  def last(self, key):
    """Return (step, value) of the last finite value of a metric, or (None, None)."""
    points = zip(*map(reversed, self.curve(key)), strict=True)
    return next(((step, value) for step, value in points if math.isfinite(value)), (None, None))

  @property
  def kind(self):
    """The training stage, by the groups of the config."""
    if isinstance(self.config.get('rl'), dict):
      return f'rl, {str(self.get("policy", "name") or "").upper()}'.rstrip(', ')
    if self.is_preference and 'reward' not in self.config:
      return f'finetune on preferences, {self.get("preference", "loss")}'
    stages = (('reward', 'reward model'), ('preference', 'finetune'), ('train', 'pretrain'))
    return next((stage for group, stage in stages if group in self.config), 'run')

  @property
  def is_preference(self):
    """Whether a sample of a batch is a preference pair, which is two sequences."""
    return any(isinstance(source, dict) and source.get('records') == 'preference' for source in self.data.values())

  @property
  def steps(self):
    """The last step in the metrics, or None."""
    return max((row['step'] for row in self.rows), default=None)

  @property
  def last_step(self):
    """The step of the newest checkpoint, or the last step in the metrics, or None."""
    saved = [int(path.name) for path in self.folder.glob('checkpoints/[0-9]*') if path.name.isdigit()]
    return max(saved, default=self.steps)

  @property
  def seconds(self):
    """Wall time by bucket: {bucket: seconds}, without empty buckets."""
    totals = [row['seconds'] for row in self.time_rows if isinstance(row.get('seconds'), dict)]
    return {bucket: n for bucket in (totals[-1] if totals else {}) if (n := number(totals[-1], bucket))}

  @property
  def wall_seconds(self):
    """Wall time of all attempts, or None."""
    return sum(self.seconds.values()) or None

  @property
  def parameters(self):
    """Number of parameters, counted from the config, or None."""
    known = {f.name for f in dataclasses.fields(ModelSpec)}
    model = self.config.get('model')
    if not isinstance(model, dict) or not model.get('vocab_size'):
      return number(self.environment, 'parameters')
    try:
      return counts.count_params(configs.build(ModelSpec, {k: v for k, v in model.items() if k in known}))['total']
    except configs.ConfigError:
      return number(self.environment, 'parameters')

  @property
  def sources(self):
    """Training data as {folder: weight}, or {}."""
    sources = self.get('data', 'sources')
    return sources if isinstance(sources, dict) else {}

  @property
  def tokenizer(self):
    """SHA-256 of the tokenizer, or None."""
    try:
      return hashlib.sha256((self.folder / 'tokenizer.model').read_bytes()).hexdigest()
    except OSError:
      return None

  def eval_names(self):
    """Return the names of the evaluations during training, in the order of their first appearance."""
    return list(dict.fromkeys(key.split('/')[1] for row in self.rows for key in row
                              if key.startswith('eval/') and key.count('/') == 2))

  def evaluation_names(self):
    """Return {name: 'split:source'} of all evaluations, which includes the source even if there is only one.

    An evaluation over several sources is left out if each source has its own.
    """
    names = list(dict.fromkeys((*self.evaluation, *self.eval_names())))
    full = {}
    for name in names:
      if ':' not in name and len(self.sources) == 1:
        full[name] = f'{name}:{pathlib.PurePath(str(next(iter(self.sources)))).name}'
      elif ':' in name or not any(other.startswith(f'{name}:') for other in names):
        full[name] = name
    return full

  def evaluations(self, name, key):
    """Return the Evaluations with this name that measured `key`: evaluation.json's, then the last during training."""
    prefix = f'eval/{name}/'
    row = next((row for row in reversed(self.rows) if number(row, prefix + key) is not None), {})
    trained = {k.removeprefix(prefix): v for k, v in row.items() if k.startswith(prefix)}
    records = [self.evaluation.get(name), {**trained, 'step': row.get('step')}]
    return [Evaluation(name, values, self.last_step) for values in records if number(values, key) is not None]

  def named_evaluations(self, full_name, key):
    """Return the Evaluations of 'split:source' that measured `key`; those of evaluation.json come first."""
    names = [full_name, *(n for n, full in self.evaluation_names().items() if full == full_name and n != full_name)]
    evaluations = [e for name in names for e in self.evaluations(name, key)]
    return sorted(evaluations, key=lambda e: e.values is not self.evaluation.get(e.name))

  def held_out(self, key='bits_per_byte'):
    """Return the main Evaluation that measured `key`, or None: of evaluation.json before those during training."""
    names = [n for n in ('test', 'validation', *self.evaluation) if number(self.evaluation.get(n), key) is not None]
    evaluations = (e for name in (*names, *self.eval_names()) for e in self.evaluations(name, key))
    return next(evaluations, None)

  def rollouts(self):
    """Return [(iteration, metrics, rows)] of some iterations: the completions with the highest and lowest rewards.

    Iterations are evenly spaced over the run.  Files that cannot be read are left out.
    """
    iterations = []
    for path in spaced(sorted(self.folder.glob('rollouts/[0-9]*.jsonl')), ITERATIONS):
      try:
        header, *rows = [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]
        rows = [{'prompt': str(row['prompt']), 'text': str(row['text']), 'answer': str(row['answer']),
                 'reward': float(row['reward'])} for row in rows]
        rows.sort(key=lambda row: -row['reward'])
        if len(rows) > COMPLETIONS:
          rows = rows[:COMPLETIONS // 2] + rows[-COMPLETIONS // 2:]
        iterations.append((int(header['iteration']), dict(header['metrics']), rows))
      except (OSError, ValueError, KeyError, TypeError):
        continue
    return iterations


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """The record of an evaluation.  last_step: see Run."""

  name: str
  values: dict
  last_step: int | None

  def measure(self, key):
    """Return a measure, or None."""
    return number(self.values, key)

  @property
  def step(self):
    """The step of the evaluated checkpoint, or None."""
    return number(self.values, 'step')

  @property
  def size(self):
    """(number, unit) of the evaluated sequences, pairs, solution steps or prompts, or (None, '')."""
    return next(((n, unit) for key, unit in SIZES if (n := number(self.values, key)) is not None), (None, ''))

  @property
  def is_sample(self):
    """Whether evaluate.limit left out, or may have left out, part of the split."""
    limit = number(self.values, 'limit')
    return limit is None or 0 < limit <= (self.size[0] or 0)

  @property
  def identity(self):
    """The key that must be equal for two evaluations to be comparable, or None for an incomplete record.

    Split, data, sequences and tokenizer; and the step, unless it is the last one of the run.
    """
    keys = [self.values.get(key) for key in ('split', 'data_fingerprint', 'tokenizer_sha256')]
    if None in (*keys, self.size[0], self.step):
      return None
    is_last = self.last_step is None or self.step >= self.last_step
    return (*keys, self.size[0], self.is_sample and number(self.values, 'limit'), 'last' if is_last else self.step)

  def describe(self):
    """Return the step and the size of the evaluation: 'step 40, all 355 sequences'."""
    step = 'step not recorded' if self.step is None else f'step {self.step:,}'
    if self.step is not None and self.last_step is not None and self.step < self.last_step:
      step += f' of {self.last_step:,}'
    size, unit = self.size
    if size is None:
      return f'{step}, number of sequences not recorded'
    return f'{step}, {"a sample of" if self.is_sample else "all"} {size:,} {unit}'


def spaced(items, limit):
  """Return at most `limit` items, evenly spaced, with the first and the last."""
  if len(items) <= limit:
    return items
  return [items[round(i * (len(items) - 1) / (limit - 1))] for i in range(limit)]


def read_runs(workdirs):
  """Return the Runs of these folders, whatever is missing or damaged in them."""
  runs = [_read_run(pathlib.Path(workdir)) for workdir in workdirs]
  names = [run.folder.resolve().name or 'run' for run in runs]
  if len(set(names)) < len(names):
    names = [str(run.folder) for run in runs]
  for run, name in zip(runs, names, strict=True):
    run.name, run.parent = name, _parent(run, runs)
  for i, run in enumerate(runs):
    run.reference = run.parent if is_sequence(runs) else 0 if i else None
  return runs


def is_sequence(runs):
  """Return whether the runs are training stages, of which one was initialized from another."""
  return any(run.parent is not None for run in runs)


def _read_run(folder):
  run = Run(folder)
  for name, attribute in {**{name: attribute for name, (attribute, _) in FILES.items()}, **OPTIONAL}.items():
    path, empty = folder / name, getattr(run, attribute)
    if not path.exists():
      if name in FILES:
        run.missing.append((name, FILES[name][1]))
      continue
    try:
      value = _read_file(path)
    except (OSError, ValueError, configs.ConfigError) as e:
      run.missing.append((name, f'cannot be read: {e}'))
      continue
    if isinstance(value, type(empty)):
      setattr(run, attribute, value)
    else:
      run.missing.append((name, f'contains a {type(value).__name__} instead of a {type(empty).__name__}'))
  run.rows = [row for row in run.rows if isinstance(row.get('step'), int)]
  run.completions = [c for c in run.completions if isinstance(c.get('prompt'), str) and isinstance(c.get('text'), str)]
  return run


def _read_file(path):
  if path.name == 'metrics.jsonl':
    return metrics.read_metrics(path)
  return metrics.read_lines(path) if path.suffix == '.jsonl' else json.loads(path.read_text(encoding='utf-8'))


def _parent(run, runs):
  """Return the index of the run that this one was initialized from: by its path, or by its name if it was moved."""
  source = run.get('train', 'init_from')
  if not isinstance(source, str) or not source:
    return None
  path = pathlib.Path(source)
  path = path.parent.parent if path.parent.name == 'checkpoints' else path
  others = [i for i, other in enumerate(runs) if other is not run]
  return next((i for i in others if runs[i].folder.resolve() == path.resolve()),
              next((i for i in others if runs[i].folder.resolve().name == path.name), None))
