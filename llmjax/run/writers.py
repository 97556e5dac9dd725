"""Write the metrics, samples and events of a run, and mirror the metrics to tracking services.

`metrics.jsonl` holds one JSON object per line: `step`, `time` (Unix seconds), then the metrics.  NaN and infinities are
the strings "NaN", "Infinity" and "-Infinity", and null means "not measured"; `read_metrics` restores the floats.  A
line is on disk when `write` returns.  TensorBoard, Weights & Biases and MLflow are updated by a background thread: a
slow or failing server causes a warning and never delays a training step.

`events.jsonl` records what happened to the run, one object per line: `time`, `step`, `kind` and `details`.  It is
append-only, even when a resumed run removes metrics after its checkpoint.

Secrets are masked in the config, in metrics and in events; prompts and samples are written unchanged.
"""

import contextlib
import dataclasses
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
from llmjax.config import setting
from llmjax.evaluate.metrics import encode_number, read_lines, read_metrics

__all__ = ['MIRRORS', 'LogsSpec', 'Writer', 'open_writers', 'read_metrics', 'rewind']

# Seconds that `close` waits for the tracking services to take the queued metrics.
DRAIN_SECONDS = 30.0


class LogError(Exception):
  """A log file cannot be written.  The message is one line with the path and the reason."""


@contextlib.contextmanager
def _log_errors(path):
  """Convert an OSError inside the block, such as a full disk, to a LogError that names the path."""
  try:
    yield
  except OSError as e:
    raise LogError(f'{path} cannot be written: {e.strerror or e}') from e


def open_writers(workdir, config, names=('tensorboard',), resume_step=None):
  """Open the log files of a run.  Processes other than the first get a Writer that writes nothing.

  config: the resolved config as nested dicts, sent to the mirrors.  names: keys of MIRRORS.
  resume_step: step of the restored checkpoint; later metrics and samples are removed, so that curves do not overlap.
  None starts a new run: an existing `metrics.jsonl` is renamed to `metrics.jsonl.bak`.
  Raises ConfigError for an unknown name or a missing package, LogError if the folder cannot be written.
  """
  problems = [f'writers: {name!r} is not one of: {", ".join(MIRRORS)}'
              for name in names if name not in MIRRORS]
  if problems:
    raise configs.ConfigError(problems)
  import jax  # Imported here: reading and rewinding logs do not need JAX.
  if jax.process_index() != 0:
    return Writer(None, ())
  config = secrets.hide_within(config)
  workdir = pathlib.Path(workdir)
  with _log_errors(workdir):
    workdir.mkdir(parents=True, exist_ok=True)
  mirrors, problems = [], []
  for name in names:  # Before any file is rewound: a missing package must not cost metrics.
    try:
      mirrors.append((name, MIRRORS[name](workdir, config, resume_step)))
    except configs.ConfigError as e:
      problems += e.problems
  if problems:
    raise configs.ConfigError(problems)
  for name in ('metrics.jsonl', 'samples.jsonl'):
    with _log_errors(workdir / name):
      rewind(workdir / name, resume_step)
  return Writer(workdir, mirrors)


def rewind(path, step):
  """Remove the lines of a JSONL file whose `step` is greater than the given one, and a truncated last line.

  The file is replaced atomically.  With step=None it is renamed to `<name>.bak` instead.
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
  """A JSONL file opened for appending; a truncated last line is removed.  Raises LogError.

  The file is line buffered: a written line survives a kill of the process.
  """

  def __init__(self, path):
    self._path = pathlib.Path(path)
    with _log_errors(path):
      self._path.parent.mkdir(parents=True, exist_ok=True)
      self._file = open(path, 'a+', buffering=1, encoding='utf-8')
      content = self._path.read_bytes()
      if content and not content.endswith(b'\n'):
        self._file.truncate(content.rfind(b'\n') + 1)

  def append(self, row):
    """Append one JSON object."""
    with _log_errors(self._path):
      self._file.write(_line(row))

  def close(self):
    """Close the file.  May be called twice."""
    with contextlib.suppress(OSError):  # A line that failed with a LogError is still buffered and fails again.
      self._file.close()


def _line(row):
  return json.dumps(row, allow_nan=False, ensure_ascii=False) + '\n'


class Writer:
  """Append to `metrics.jsonl`, `samples.jsonl` and `events.jsonl`, and feed the mirrors.  Must be closed."""

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
    """Write metrics {key: int, float, None or scalar array} of a step.  Reading an array waits for its computation.

    String values, which identify the evaluated data, go to `metrics.jsonl` only.
    """
    if self._metrics is None:
      return
    now = time.time()
    texts = {key: v for key, v in values.items() if isinstance(v, str)}
    values = {key: v if v is None or isinstance(v, (int, float)) else float(v)
              for key, v in values.items() if key not in texts}
    row = {'step': int(step), 'time': round(now, 3)}
    row.update((key, encode_number(v)) for key, v in values.items())
    self._metrics.append(row | secrets.hide_within(texts))
    scalars = {key: float(v) for key, v in values.items() if v is not None}
    self._queue.put(('scalars', int(step), now, scalars))

  def write_sample(self, step, prompt, text):
    """Append {step, prompt, text} to `samples.jsonl`, where text is the completion of the prompt."""
    if self._samples is None:
      return
    self._samples.append({'step': int(step), 'prompt': prompt, 'text': text})
    self._queue.put(('sample', int(step), time.time(), (prompt, text)))

  def event(self, step, kind, **details):
    """Append an event to `events.jsonl`.  details: JSON values, non-finite floats included."""
    if self._events is not None:
      details = {k: encode_number(v) if isinstance(v, float) else secrets.hide_within(v) for k, v in details.items()}
      self._events.append({'time': round(time.time(), 3), 'step': int(step), 'kind': kind, 'details': details})

  def close(self):
    """Wait for the mirrors, at most DRAIN_SECONDS, and close the files.  May be called twice."""
    if self._thread is not None:
      self._queue.put(None)
      self._thread.join(DRAIN_SECONDS)
      if self._thread.is_alive():
        print('warning: a metrics mirror did not finish in time; metrics.jsonl is complete', file=sys.stderr)
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
    """Send queued entries to every mirror; a mirror that fails is dropped with a warning."""
    while (entry := self._queue.get()) is not None:
      kind, step, now, content = entry
      for name, mirror in list(self._mirrors):
        self._guard(name, mirror, getattr(mirror, kind), step, now, content)
    for name, mirror in list(self._mirrors):
      self._guard(name, mirror, mirror.close)

  def _guard(self, name, mirror, call, *arguments):
    try:
      call(*arguments)
    except Exception as e:  # A tracking server may fail in any way; training continues.
      self._mirrors.remove((name, mirror))
      print(f'warning: {name} stopped ({type(e).__name__}: {e}); metrics.jsonl is still written',
            file=sys.stderr)


class Mirror:
  """A tracking service: the constructor starts it with (workdir, config, resume_step)."""

  def scalars(self, step, now, values):
    """Log {key: float} of a step.  now: Unix seconds."""
    raise NotImplementedError

  def sample(self, step, now, prompt_and_text):
    """Log a sample; by default samples are in `samples.jsonl` only."""

  def close(self):
    """Flush and end the run."""
    raise NotImplementedError


class TensorBoard(Mirror):
  """TensorBoard event files under `<workdir>/tensorboard`, written without TensorFlow."""

  def __init__(self, workdir, config, resume_step):
    package = _import('tensorboardX', 'pip install tensorboardX')
    # TensorBoard ignores the events of older files from purge_step on.
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


class WeightsAndBiases(Mirror):
  """A Weights & Biases run, configured by its environment variables (WANDB_PROJECT, WANDB_MODE, …)."""

  def __init__(self, workdir, config, resume_step):
    package = _import('wandb', "pip install wandb")
    self._run = package.init(
        project=os.environ.get('WANDB_PROJECT', 'llmjax'), name=workdir.name, dir=str(workdir),
        id=_mirror_id(workdir, 'wandb', resume_step, lambda: uuid.uuid4().hex[:12]),
        config=config, resume='allow')
    # The service's own step must increase, but a resumed run goes back to its checkpoint.
    self._run.define_metric('*', step_metric='step')

  def scalars(self, step, now, values):
    del now  # The service records its own times.
    self._run.log({'step': step, **values})

  def close(self):
    self._run.finish()


class MLflow(Mirror):
  """An MLflow run on the server at MLFLOW_TRACKING_URI."""

  def __init__(self, workdir, config, resume_step):
    package = _import('mlflow', "pip install mlflow")
    self._client = package.MlflowClient()
    name = os.environ.get('MLFLOW_EXPERIMENT_NAME', 'llmjax')
    self._id = _mirror_id(workdir, 'mlflow', resume_step, lambda: self._create(name, workdir.name))
    self._entities = importlib.import_module('mlflow.entities')
    if resume_step is None:
      # 500 characters: the longest value that every MLflow store accepts.
      params = [self._entities.Param(k, str(v)[:500]) for k, v in _flatten(config)]
      for start in range(0, len(params), 100):  # 100 parameters: the limit of a request.
        self._client.log_batch(self._id, params=params[start:start + 100])

  def _create(self, experiment_name, run_name):
    experiment = self._client.get_experiment_by_name(experiment_name)
    experiment_id = (experiment.experiment_id if experiment
                     else self._client.create_experiment(experiment_name))
    return self._client.create_run(experiment_id, run_name=run_name).info.run_id

  def scalars(self, step, now, values):
    self._client.log_batch(self._id, metrics=[
        self._entities.Metric(k, v, int(now * 1000), step) for k, v in values.items()])

  def close(self):
    self._client.set_terminated(self._id)


MIRRORS = {'tensorboard': TensorBoard, 'wandb': WeightsAndBiases, 'mlflow': MLflow}


@dataclasses.dataclass(frozen=True)
class LogsSpec:
  """The `logs` group: destinations of the metrics."""

  writers: tuple[str, ...] = setting(('tensorboard',), 'services that also receive the metrics of metrics.jsonl',
                                     choices=tuple(MIRRORS))


def _import(package, command):
  try:
    return importlib.import_module(package)
  except ImportError as e:
    raise configs.ConfigError([
        f'writers: the package {package} is not installed; run: {command}']) from e


def _mirror_id(workdir, name, resume_step, create):
  """Return the service's run id.  A resumed run continues under the id stored in `mirrors.json`."""
  path = workdir / 'mirrors.json'
  ids = json.loads(path.read_text()) if path.exists() else {}
  if resume_step is None or name not in ids:
    ids[name] = create()
    path.write_text(json.dumps(ids))
  return ids[name]


def _flatten(nested, prefix=''):
  """Yield (path, value), such as ('model.num_layers', 4), for every leaf of nested dicts."""
  for key, value in nested.items():
    if isinstance(value, dict):
      yield from _flatten(value, f'{prefix}{key}.')
    else:
      yield prefix + key, value
