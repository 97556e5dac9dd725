"""What is in a run's folder, as pages show it.

Every file may be missing or damaged: `read_run` gives what there is and names what there is not.
"""

import dataclasses
import json
import math
import pathlib

from llmjax import config as configs
from llmjax.evaluate import metrics
from llmjax.model import counts
from llmjax.model.spec import ModelSpec

FILES = {
    'config.json': 'the resolved config', 'metrics.jsonl': 'the curves',
    'samples.jsonl': 'samples drawn while training; sample.prompts asks for them',
    'evaluation.json': 'the evaluation beside gzip and xz; `llmjax evaluate` writes it',
    'time.jsonl': 'where the time went', 'energy.json': 'energy, carbon and money',
    'environment.json': 'versions and devices',
    'data.json': 'what the data holds'}


@dataclasses.dataclass
class Run:
  """What was read of a run's folder; empty where there was nothing."""

  folder: pathlib.Path
  config: dict
  rows: list
  samples: list
  evaluation: dict
  time: dict
  energy: dict
  environment: dict
  data: dict
  profile: dict
  events: list
  missing: list  # Of (file, what it would have shown or what is wrong with it).
  margins: dict = dataclasses.field(default_factory=dict)  # Of held-out pairs, by split.
  _curves: dict = dataclasses.field(default_factory=dict)

  def get(self, group, name):
    """Returns a value of the config, or None."""
    values = self.config.get(group)
    return values.get(name) if isinstance(values, dict) else None

  def number(self, group, name):
    """Returns a number of the config, or None."""
    return number(self.config.get(group), name)

  def curve(self, key):
    """Returns ([steps], [values]) of a metric."""
    if key not in self._curves:
      self._curves[key] = metrics.curve(self.rows, key)
    return self._curves[key]

  def last(self, key):
    """Returns (step, value) of a metric's last finite value, or (None, None)."""
    steps, values = self.curve(key)
    return next(((s, v) for s, v in zip(reversed(steps), reversed(values), strict=True)
                 if math.isfinite(v)), (None, None))

  @property
  def last_step(self):
    """The newest checkpoint's step, or the last one logged where there is no checkpoint; None without either."""
    saved = [int(path.name) for path in self.folder.glob('checkpoints/[0-9]*') if path.name.isdigit()]
    return max(saved, default=steps_done(self))

  def evaluations(self, name, key):
    """Returns the Evaluations of a name that measured `key`: of evaluation.json, and the last one made in training."""
    prefix, found = f'eval/{name}/', [self.evaluation.get(name)]
    row = next((row for row in reversed(self.rows) if number(row, prefix + key) is not None), {})
    measured = {k.removeprefix(prefix): v for k, v in row.items() if k.startswith(prefix)}
    found.append({**measured, 'step': row.get('step')})
    return [Evaluation(name, values, self.last_step) for values in found if number(values, key) is not None]

  def eval_names(self):
    """Returns the names of the evaluations in the metrics, in the order they first appear."""
    return list(dict.fromkeys(key.split('/')[1] for row in self.rows for key in row
                              if key.startswith('eval/') and key.count('/') == 2))


# What evaluations count: field of the record, and what it is called.
COUNTED = (('sequences', 'sequences'), ('pairs', 'pairs'), ('steps', 'solution steps'), ('answers', 'prompts'))


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """The record of an evaluation: its name, its measures and what they are of.  last_step: see `Run.last_step`."""

  name: str
  values: dict
  last_step: int | None

  def measure(self, key):
    return number(self.values, key)

  @property
  def step(self):
    return number(self.values, 'step')

  @property
  def count(self):
    """How many sequences, pairs or prompts it is of, or None in records that lack it."""
    return next((n for key, _ in COUNTED if (n := number(self.values, key)) is not None), None)

  @property
  def is_sample(self):
    """Whether evaluate.limit left sequences of the split out, or may have."""
    limit = number(self.values, 'limit')
    return limit is None or 0 < limit <= (self.count or 0)

  @property
  def identity(self):
    """What must be the same for two evaluations to be compared, or None where the record lacks it.

    Split, data, sequences and tokenizer; and the step, unless both are of the last checkpoints of their runs.
    """
    found = [self.values.get(key) for key in ('split', 'data_fingerprint', 'tokenizer_sha256')]
    if None in (*found, self.count, self.step):
      return None
    last = self.last_step is None or self.step >= self.last_step
    return (*found, self.count, self.is_sample and number(self.values, 'limit'), 'last' if last else self.step)

  def of(self):
    """Returns what its figures are of: 'step 40, all 355 sequences'."""
    step = 'step not recorded' if self.step is None else f'step {self.step:,}'
    if self.step is not None and self.last_step is not None and self.step < self.last_step:
      step += f' of {self.last_step:,}'
    if self.count is None:
      return f'{step}, number of sequences not recorded'
    unit = next(unit for key, unit in COUNTED if number(self.values, key) is not None)
    return f'{step}, {"a sample of" if self.is_sample else "all"} {self.count:,} {unit}'


def read_run(workdir):
  """Returns the Run of a folder, never failing on what is missing or damaged."""
  folder = pathlib.Path(workdir)
  missing = []

  def read(name, read_file, empty):
    path = folder / name
    if not path.exists():
      if name in FILES:
        missing.append((name, FILES[name]))
      return empty
    try:
      value = read_file(path)
    except (OSError, ValueError, configs.ConfigError) as e:
      missing.append((name, f'cannot be read: {e}'))
      return empty
    if not isinstance(value, type(empty)):
      missing.append((name, f'holds {type(value).__name__}, not {type(empty).__name__}'))
      return empty
    return value

  def parse(path):
    return json.loads(path.read_text(encoding='utf-8'))

  run = Run(folder, read('config.json', parse, {}),
            read('metrics.jsonl', metrics.read_metrics, []),
            read('samples.jsonl', metrics.read_lines, []), read('evaluation.json', parse, {}),
            read('time.jsonl', _last_seconds, {}), read('energy.json', parse, {}), read('environment.json', parse, {}),
            read('data.json', parse, {}), read('profile/top_operations.json', parse, {}),
            read('events.jsonl', metrics.read_lines, []), missing, read('reward.json', parse, {}))
  run.rows = [row for row in run.rows if isinstance(row.get('step'), int)]
  return run


def _last_seconds(path):
  """Returns seconds by bucket over all sittings of a `time.jsonl`."""
  lines = [row['seconds'] for row in metrics.read_lines(path) if isinstance(row.get('seconds'), dict)]
  return lines[-1] if lines else {}


def count(value):
  """Returns '58.5 M' of 58_470_000: three digits and a unit, for headlines."""
  if value is None:
    return '–'
  for limit, unit in ((1e12, ' T'), (1e9, ' B'), (1e6, ' M'), (1e4, ' k')):
    if abs(value) >= limit * (1.0 if unit == ' k' else 0.9995):  # 999,960 is 1 M, not 1e+03 k.
      return f'{value / (1e3 if unit == " k" else limit):.3g}{unit}'
  return f'{value:,.0f}' if abs(value) >= 100 or value == int(value) else f'{value:.3g}'


def duration(seconds):
  """Returns '3 min 12 s' and the like."""
  if seconds is None:
    return '–'
  if seconds < 60:
    return f'{seconds:.3g} s'
  minutes, s = divmod(round(seconds), 60)
  hours, m = divmod(minutes, 60)
  if hours >= 24:
    return f'{hours // 24} d {hours % 24} h'
  return f'{hours} h {m} min' if hours else f'{m} min {s} s'


def number(mapping, key):
  """Returns a finite number of a mapping from a file, or None."""
  value = mapping.get(key) if isinstance(mapping, dict) else None
  is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
  return value if is_number and math.isfinite(value) else None


def is_of_pairs(run):
  """Says whether a sample of the run's batches is a pair: two sequences."""
  return any(isinstance(source, dict) and source.get('records') == 'preference' for source in run.data.values())


def steps_done(run):
  return max((row['step'] for row in run.rows), default=None)


def held_out(run, key='bits_per_byte'):
  """Returns the Evaluation whose figure stands for the run, or None: of evaluation.json before those of training."""
  names = [n for n in ('test', 'validation', *run.evaluation) if number(run.evaluation.get(n), key) is not None]
  found = (run.evaluations(name, key) for name in (*names, *run.eval_names()))
  return next((evaluations[0] for evaluations in found if evaluations), None)


def parameters(run):
  """Returns the number of parameters, counted from the config, or None."""
  known = {f.name for f in dataclasses.fields(ModelSpec)}
  model = run.config.get('model')
  if not isinstance(model, dict) or not model.get('vocab_size'):
    return number(run.environment, 'parameters')
  try:
    spec = configs.build(ModelSpec, {k: v for k, v in model.items() if k in known})
    return counts.count_params(spec)['total']
  except configs.ConfigError:
    return number(run.environment, 'parameters')
