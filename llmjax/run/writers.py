"""Where a run's numbers go: `metrics.jsonl`, which is the truth, and mirrors of it; `events.jsonl`.

Each line of `metrics.jsonl` is one JSON object: `step`, `time` (Unix seconds), then the metrics.
NaN and infinities are the strings "NaN", "Infinity" and "-Infinity"; null is "not measured";
`read_metrics` restores them.  The line is on disk when `write` returns.  Mirrors (TensorBoard,
Weights & Biases, MLflow) are fed by a thread of their own: a slow or broken server costs a warning,
never a training step.

`events.jsonl` tells what happened to the run: `time`, `step`, `kind` and `details` (an object) a line.  It is
only ever added to, also where metrics go back to a checkpoint.
"""

import contextlib
import importlib
import json
import os
import pathlib
import queue
import sys
import threading
import time
import uuid

from llmjax import config as configs
from llmjax import secrets
from llmjax.evaluate.metrics import encode_number, read_lines, read_metrics

__all__ = ['MIRRORS', 'Writer', 'open_writers', 'read_metrics', 'rewind']

# Seconds that `close` waits for a mirror to take what is still queued.
DRAIN_SECONDS = 30.0


class LogError(Exception):
  """A file of the run's folder cannot be written.  The text is one line: path and reason."""


@contextlib.contextmanager
def telling(path):
  """Turns an OSError in the block, such as that of a full disk, into a LogError that names the file."""
  try:
    yield
  except OSError as e:
    raise LogError(f'{path} cannot be written: {e.strerror or e}') from e


def open_writers(workdir, config, names=('tensorboard',), resume_step=None):
  """Returns a Writer for the run's folder; on processes other than the first it writes nothing.

  config: the resolved config as nested dicts, shown by the mirrors.  names: keys of MIRRORS.
  resume_step: the step of the restored checkpoint; everything logged after it is removed, so that
  no curve overlaps itself.  None starts afresh: an earlier `metrics.jsonl` becomes
  `metrics.jsonl.bak`.  Raises ConfigError on an unknown name or a package that is not installed,
  LogError where the folder cannot be written.
  """
  problems = [f'writers: {name!r} is not one; known: {", ".join(MIRRORS)}'
              for name in names if name not in MIRRORS]
  if problems:
    raise configs.ConfigError(problems)
  import jax  # Here, so that reading and rewinding need no JAX.
  if jax.process_index() != 0:
    return Writer(None, ())
  config = secrets.hide_within(config)
  workdir = pathlib.Path(workdir)
  with telling(workdir):
    workdir.mkdir(parents=True, exist_ok=True)
  mirrors, problems = [], []
  for name in names:  # Before anything is rewound: a missing package must not cost a curve.
    try:
      mirrors.append((name, MIRRORS[name](workdir, config, resume_step)))
    except configs.ConfigError as e:
      problems += e.problems
  if problems:
    raise configs.ConfigError(problems)
  for name in ('metrics.jsonl', 'samples.jsonl'):
    with telling(workdir / name):
      rewind(workdir / name, resume_step)
  return Writer(workdir, mirrors)


def rewind(path, step):
  """Removes the lines of a JSON-lines file with `step` above the given; None removes all of them.

  The file is replaced in one move, so a kill leaves the old file or the new one.  A last line that
  a kill cut off goes too.  With None the old file is kept beside it as `<name>.bak`.
  """
  path = pathlib.Path(path)
  if not path.exists():
    return
  if step is None:
    os.replace(path, path.with_name(path.name + '.bak'))
    return
  kept = [row for row in read_lines(path) if row.get('step', 0) <= step]
  temporary = path.with_name(path.name + '.tmp')
  with open(temporary, 'w', encoding='utf-8') as f:
    f.writelines(_line(row) for row in kept)
    f.flush()
    os.fsync(f.fileno())
  os.replace(temporary, path)


class Lines:
  """A JSON-lines file to append to; a last line that a kill cut off is removed.  Raises LogError.

  Line buffered: each line reaches the system when it is written and survives a kill.
  """

  def __init__(self, path):
    self._path = pathlib.Path(path)
    with telling(path):
      self._path.parent.mkdir(parents=True, exist_ok=True)
      self._file = open(path, 'a+', buffering=1, encoding='utf-8')
      content = self._path.read_bytes()
      if content and not content.endswith(b'\n'):
        self._file.truncate(content.rfind(b'\n') + 1)

  def append(self, row):
    """Writes an object as a line."""
    with telling(self._path):
      self._file.write(_line(row))

  def close(self):
    """Closes the file.  May be called twice."""
    with contextlib.suppress(OSError):  # All lines are out but one that a LogError told of, which fails again.
      self._file.close()


def _line(row):
  return json.dumps(row, allow_nan=False, ensure_ascii=False) + '\n'


class Writer:
  """Appends to `metrics.jsonl`, `samples.jsonl` and `events.jsonl` and feeds the mirrors.  Close it at the end."""

  def __init__(self, workdir, mirrors):
    self._metrics = self._samples = self._events = None
    self._mirrors = list(mirrors)
    self._queue = queue.SimpleQueue()
    self._thread = None
    if workdir is not None:
      self._metrics, self._samples, self._events = (
          Lines(workdir / name) for name in ('metrics.jsonl', 'samples.jsonl', 'events.jsonl'))
    if self._mirrors:
      self._thread = threading.Thread(target=self._feed, name='metric mirrors', daemon=True)
      self._thread.start()

  def write(self, step, values):
    """Writes {key: int, float or None} at a step.  Arrays are read, which waits for them.

    Texts, which say what the numbers are of, go to `metrics.jsonl` alone.
    """
    if self._metrics is None:
      return
    now = time.time()
    texts = {key: v for key, v in values.items() if isinstance(v, str)}
    values = {key: v if v is None or isinstance(v, (int, float)) else float(v)
              for key, v in values.items() if key not in texts}
    row = {'step': int(step), 'time': round(now, 3)}
    row.update((key, encode_number(v)) for key, v in values.items())
    self._metrics.append(row | texts)
    scalars = {key: float(v) for key, v in values.items() if v is not None}
    self._queue.put(('scalars', int(step), now, scalars))

  def write_sample(self, step, prompt, text):
    """Appends {step, prompt, text} to `samples.jsonl`: what the model wrote after the prompt."""
    if self._samples is None:
      return
    prompt, text = secrets.hide(prompt), secrets.hide(text)
    self._samples.append({'step': int(step), 'prompt': prompt, 'text': text})
    self._queue.put(('sample', int(step), time.time(), (prompt, text)))

  def event(self, step, kind, **details):
    """Appends what happened to `events.jsonl`.  details: what JSON holds, and floats of any kind."""
    if self._events is not None:
      details = {k: encode_number(v) if isinstance(v, float) else v for k, v in details.items()}
      self._events.append({'time': round(time.time(), 3), 'step': int(step), 'kind': kind, 'details': details})

  def close(self):
    """Waits for the mirrors (30 s at most) and closes the files.  May be called twice."""
    if self._thread is not None:
      self._queue.put(None)
      self._thread.join(DRAIN_SECONDS)
      if self._thread.is_alive():
        print('warning: a metrics mirror did not finish in time; metrics.jsonl is complete',
              file=sys.stderr)
      self._thread = None
    for file in (self._metrics, self._samples, self._events):
      if file is not None:
        file.close()
    self._metrics = self._samples = self._events = None

  def __enter__(self):
    return self

  def __exit__(self, *unused):
    self.close()

  def _feed(self):
    """Hands queued rows to every mirror; one that fails is dropped with a warning."""
    while (entry := self._queue.get()) is not None:
      kind, step, now, content = entry
      for name, mirror in list(self._mirrors):
        self._guard(name, mirror, getattr(mirror, kind), step, now, content)
    for name, mirror in list(self._mirrors):
      self._guard(name, mirror, mirror.close)

  def _guard(self, name, mirror, call, *arguments):
    try:
      call(*arguments)
    except Exception as e:  # A mirror's server may fail in any way; training goes on.
      self._mirrors.remove((name, mirror))
      print(f'warning: {name} stopped ({type(e).__name__}: {e}); metrics.jsonl goes on',
            file=sys.stderr)


class TensorBoard:
  """TensorBoard events under `<workdir>/tensorboard`, without TensorFlow."""

  def __init__(self, workdir, config, resume_step):
    package = _import('tensorboardX', 'pip install tensorboardX')
    # TensorBoard itself drops what older event files hold from purge_step on.
    self._writer = package.SummaryWriter(
        str(workdir / 'tensorboard'), purge_step=0 if resume_step is None else resume_step + 1)
    text = json.dumps(config, indent=2, default=str)
    self._writer.add_text('config', '    ' + text.replace('\n', '\n    '), 0)

  def scalars(self, step, now, values):
    for key, value in values.items():
      self._writer.add_scalar(key, value, step, walltime=now)

  def sample(self, step, now, prompt_and_text):
    text = ''.join(prompt_and_text)
    self._writer.add_text('sample', '    ' + text.replace('\n', '\n    '), step, walltime=now)

  def close(self):
    self._writer.close()


class WeightsAndBiases:
  """A Weights & Biases run; its environment variables (WANDB_PROJECT, WANDB_MODE, …) hold."""

  def __init__(self, workdir, config, resume_step):
    package = _import('wandb', "pip install wandb")
    self._run = package.init(
        project=os.environ.get('WANDB_PROJECT', 'llmjax'), name=workdir.name, dir=str(workdir),
        id=_mirror_id(workdir, 'wandb', resume_step, lambda: uuid.uuid4().hex[:12]),
        config=config, resume='allow')
    # Our own step on the axis: theirs may only grow, and a resumed run goes back.
    self._run.define_metric('*', step_metric='step')

  def scalars(self, step, now, values):
    del now  # The service stamps rows itself.
    self._run.log({'step': step, **values})

  def sample(self, step, now, prompt_and_text):
    pass  # Samples stay in samples.jsonl: tables there are expensive to append to.

  def close(self):
    self._run.finish()


class MLflow:
  """An MLflow run on the server that MLFLOW_TRACKING_URI names."""

  def __init__(self, workdir, config, resume_step):
    package = _import('mlflow', "pip install mlflow")
    self._client = package.MlflowClient()
    name = os.environ.get('MLFLOW_EXPERIMENT_NAME', 'llmjax')
    self._id = _mirror_id(workdir, 'mlflow', resume_step, lambda: self._create(name, workdir.name))
    self._entities = importlib.import_module('mlflow.entities')
    if resume_step is None:
      # 500: the longest value that every MLflow store takes.
      params = [self._entities.Param(k, str(v)[:500]) for k, v in _flatten(config)]
      for start in range(0, len(params), 100):  # 100: a request's limit.
        self._client.log_batch(self._id, params=params[start:start + 100])

  def _create(self, experiment_name, run_name):
    experiment = self._client.get_experiment_by_name(experiment_name)
    experiment_id = (experiment.experiment_id if experiment
                     else self._client.create_experiment(experiment_name))
    return self._client.create_run(experiment_id, run_name=run_name).info.run_id

  def scalars(self, step, now, values):
    self._client.log_batch(self._id, metrics=[
        self._entities.Metric(k, v, int(now * 1000), step) for k, v in values.items()])

  def sample(self, step, now, prompt_and_text):
    pass  # As with Weights & Biases: samples.jsonl holds them.

  def close(self):
    self._client.set_terminated(self._id)


MIRRORS = {'tensorboard': TensorBoard, 'wandb': WeightsAndBiases, 'mlflow': MLflow}


def _import(package, command):
  try:
    return importlib.import_module(package)
  except ImportError as e:
    raise configs.ConfigError([
        f'writers: the package {package} is not installed; run: {command}']) from e


def _mirror_id(workdir, name, resume_step, create):
  """Returns the service's run id: a resumed run goes on under the id kept in `mirrors.json`."""
  path = workdir / 'mirrors.json'
  ids = json.loads(path.read_text()) if path.exists() else {}
  if resume_step is None or name not in ids:
    ids[name] = create()
    path.write_text(json.dumps(ids))
  return ids[name]


def _flatten(nested, prefix=''):
  """Yields ('model.num_layers', 4) for every leaf of nested dicts."""
  for key, value in nested.items():
    if isinstance(value, dict):
      yield from _flatten(value, f'{prefix}{key}.')
    else:
      yield prefix + key, value
