"""The only training loop: next batch, step, log, evaluate, sample, save, profile.

A loop such as pretrain.py supplies a Job; everything that is the same for all of them is here.
"""

import contextlib
import dataclasses
import fcntl
import json
import math
import os
import pathlib
import socket
import time
from collections.abc import Callable
from typing import Any

import jax

from llmjax.checkpoint.checkpoints import Checkpoints, find_step, require_good, restore_params
from llmjax.config import ConfigError, to_dict
from llmjax.evaluate.report import write_report
from llmjax.loops import doctor
from llmjax.loops.ledger import Ledger
from llmjax.loops.profiling import Profiler
from llmjax.loops.progress import Progress
from llmjax.loops.writers import open_writers
from llmjax.model import counts
from llmjax.parallel import chips, distributed
from llmjax.parallel.mesh import place_batch
from llmjax.train.optimizers import make_optimizer
from llmjax.train.state import abstract_state, init_state
from llmjax.train.step import lower_step, make_train_step


@dataclasses.dataclass
class Job:
  """What a loop supplies.

  spec: the command's spec, whose groups `model, train, optimizer, checkpoint, profile, logs` the harness
  reads.  batches: iterator of host batches with `state` (one int), `fingerprint` (of the data),
  `restore(state)` and `close()`.
  loss_fn: see train/step.py.  evaluators: name -> function of the parameters that returns metrics.
  sample: function of the parameters that returns [(prompt, continuation)], or None.
  """

  spec: Any
  mesh: jax.sharding.Mesh
  batches: Any
  loss_fn: Callable
  evaluators: dict[str, Callable]
  sample: Callable | None
  ledger: Ledger


def enable_compilation_cache(setting):
  """Keeps compiled programs between runs, by default in the user's cache directory."""
  if setting == 'none':
    return
  folder = doctor.cache_folder() if setting == 'default' else setting
  jax.config.update('jax_compilation_cache_dir', str(folder))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)


@contextlib.contextmanager
def hold_workdir(workdir):
  """Makes the run's folder and keeps every other run out of it until the block ends.

  The first process locks `<workdir>/lock`; the system lets go of it when the process ends, however it ends.
  """
  if not distributed.is_first():
    yield
    return
  path = pathlib.Path(workdir) / 'lock'
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = open(path, 'ab+', buffering=0)
  except OSError as e:
    raise ConfigError([f'--workdir={workdir} cannot be written: {e.strerror}']) from e
  with lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
      lock.seek(0)
      holder = lock.read().decode(errors='replace') or 'another process'
      raise ConfigError([f'--workdir={workdir} is in use: {holder} trains there; wait for it, stop it, or '
                         'give another --workdir']) from e
    except OSError:
      pass  # A filesystem without locks.
    with contextlib.suppress(OSError):  # A full disk is said by what needs the space.
      lock.truncate(0)
      lock.write(f'process {os.getpid()} on {socket.gethostname()}'.encode())
    try:
      yield
    finally:
      with contextlib.suppress(OSError):
        path.unlink()


def claim_workdir(workdir, spec):
  """Makes the run's folder and writes config.json; refuses a folder that holds a different run.

  What defines the weights and the stream must be as it was; lengths and intervals may change.  All
  processes call it, and the first one writes.
  """
  workdir = pathlib.Path(workdir)
  file, resolved = workdir / 'config.json', to_dict(spec)
  if file.exists() and any((workdir / 'checkpoints').glob('[0-9]*')):
    before = json.loads(file.read_text())
    fixed = [('model', k) for k in resolved['model']] + [
        ('data', 'sources'), ('data', 'seq_len'), ('data', 'packing'), ('optimizer', 'name'),
        ('optimizer', 'moment_dtype'), ('train', 'batch_size'), ('train', 'seed'), ('train', 'param_dtype')]
    changed = [f'{g}.{k} was {before[g][k]!r} in {workdir} and is {resolved[g][k]!r} now; keep it, or '
               'give a new --workdir' for g, k in fixed
               if k in before.get(g, {}) and before[g][k] != resolved[g][k]]
    if changed:
      raise ConfigError(changed)
  saved = [int(p.name) for p in (workdir / 'checkpoints').glob('[0-9]*') if p.name.isdecimal()]
  done = file.exists() and max(saved, default=0) >= spec.train.steps  # What would be written never ran.
  distributed.wait_for_all('looked at the workdir')
  try:
    if distributed.is_first() and not done:
      workdir.mkdir(parents=True, exist_ok=True)
      file.write_text(json.dumps(resolved, indent=2) + '\n')
  except OSError as e:
    raise ConfigError([f'--workdir={workdir} cannot be written: {e.strerror}']) from e
  distributed.wait_for_all('made the workdir')
  if not file.exists():
    raise ConfigError([f'--workdir={workdir} is not the same folder for process {jax.process_index()} as for '
                       'process 0; give one that all machines share'])
  return workdir


def train(job, workdir):
  """Runs the job to its last step; returns the exit status: 0, 1 for a lost run, 130 after Ctrl-C."""
  total = job.spec.train.steps
  checkpoints = Checkpoints(workdir, job.spec.checkpoint)
  first = checkpoints.latest() or 0
  if first and first >= total:
    checkpoints.close()
    if distributed.is_first():
      print(*checkpoints.passed_over, sep='\n', end='\n' * bool(checkpoints.passed_over))
      print(f'{workdir} is done: step {first} of {total}; raise --config.train.steps to go on')
    return 0
  loop = Loop(job, workdir, checkpoints, first)
  try:
    with distributed.agreed_stop() as stop:
      status = loop.run(stop)
  except KeyboardInterrupt:
    status = loop.interrupt()
  finally:
    loop.close()
  if distributed.is_first():
    print(f'report: {write_report(workdir)}')
  return status


class Loop:
  """One sitting of a run, from step `first` to the last."""

  def __init__(self, job, workdir, checkpoints, first):
    self.job, self.spec, self.ledger, self.workdir = job, job.spec, job.ledger, workdir
    self.checkpoints, self.first, self.total = checkpoints, first, job.spec.train.steps
    self.done = self.saved = first
    self.metrics, self.metrics_step = {}, None  # Of the latest evaluation.
    self.tx, self.schedule = make_optimizer(self.spec.optimizer, self.total,
                                                 self.spec.train.seed)
    with self.ledger.charge('init'):
      self.state = self._initial_state()
      self.writers = open_writers(workdir, to_dict(self.spec), self.spec.logs.writers,
                                  resume_step=first or None)
    self.progress = Progress(self.total, first, enabled=distributed.is_first())
    self.profiler = Profiler(workdir, self.spec.profile.steps,
                             say=self.progress.say if distributed.is_first() else None)
    for line in checkpoints.passed_over:
      self.progress.say(line)
    if first:
      self.progress.say(f'going on from step {first} of {workdir}')
    elif self.spec.train.init_from:
      self.progress.say(f'starting from the parameters of {self.spec.train.init_from}')

  def _initial_state(self):
    """Returns the state of this run's own checkpoint, else of init_from, else fresh."""
    spec, mesh = self.spec, self.job.mesh
    if self.first:
      state, stream = self.checkpoints.restore(
          self.first, abstract_state(spec.model, self.tx, spec.train.param_dtype, mesh, spec.mesh.zero1))
      if stream['fingerprint'] != self.job.batches.fingerprint:
        raise ConfigError([f'the data is not what steps 1 to {self.first} read: a folder of data.sources was '
                           'prepared again, with other text or another tokenizer. Put it back, or start a new '
                           f'run from these weights: --workdir=NEW --config.train.init_from={self.workdir}'])
      self.job.batches.restore(stream['batches'])
      return state
    state, shardings = init_state(spec.model, self.tx, spec.train.seed, spec.train.param_dtype, mesh,
                                  spec.mesh.zero1)
    if spec.train.init_from:
      params = _load_initial(spec.train.init_from, state.params, shardings.params)
      state = state.replace(params=params)
    return state

  def _next_batch(self):
    """Returns a batch on the devices, and the stream's state once it is used up."""
    return place_batch(self.job.mesh, next(self.job.batches)), self.job.batches.state

  def _compile(self, batch):
    """Returns the compiled step: ahead of time, so that no timed step holds a compilation."""
    step = make_train_step(self.job.loss_fn, self.tx, self.schedule, self.spec.train.accumulation)
    return lower_step(step, self.state, batch).compile()

  def run(self, stop=lambda step: False):
    """Trains to the last step, until the loss is lost, or until stop(step) says so; returns the exit status."""
    train, ledger, progress = self.spec.train, self.ledger, self.progress
    with ledger.charge('data_wait'):
      batch, position = self._next_batch()
    with ledger.charge('compile'):
      step_fn = self._compile(batch)
    with ledger.charge('init'):
      speed = _Speed(self.spec, self.job.mesh)
    progress.say(_headline(self.spec, self.job.mesh, ledger.seconds['compile']))
    pauses = (train.eval_every, train.sample_every, train.checkpoint_every)
    window = _Window()
    for step in range(self.first + 1, self.total + 1):
      logs, pausing = self._due(train.log_every, step), any(self._due(n, step) for n in pauses)
      with ledger.charge('step'):
        self.profiler.before(step)
        self.state, metrics = step_fn(self.state, batch)
        self.done, self.position = step, position
        window.add(step, metrics)
        if step < self.total:
          begin = time.perf_counter()
          batch, position = self._next_batch()  # While the devices work.
          if metrics['loss'].is_ready():  # Only what outlasts their work is waiting.
            window.data_wait += time.perf_counter() - begin
            ledger.seconds['data_wait'] += time.perf_counter() - begin
        if logs or pausing:
          window.wait()
      with window.paused():
        self.profiler.after(step)
      if not logs:
        progress.tick(step)
      elif bad := self._log(step, window.read(), speed):
        self._settle(wait=True)
        last = f'the last checkpoint is step {self.saved}' if self.saved else 'there is no checkpoint'
        progress.say(f'stopped: the loss is not finite at step {bad}; {last}. Lower optimizer.lr, raise '
                     'optimizer.warmup_steps, or look at the data')
        return 1
      with window.paused():
        if self._due(train.eval_every, step):
          self._evaluate(step)
        if self._due(train.sample_every, step):
          self._sample(step)
        if self._due(train.checkpoint_every, step):
          self._save()
      if not self._settle():
        return 1
      if stop(step) and step < self.total:
        return self.interrupt()
    settled = self._settle(wait=True)
    return 0 if settled and self.saved == self.done else 1

  def interrupt(self):
    """Saves what is done after Ctrl-C; returns the exit status."""
    self.progress.say(f'interrupted after step {self.done}')
    self._settle(wait=True)
    if self.done > self.saved:
      self._save()
    self._settle(wait=True)
    self.progress.say(f'the same command goes on from step {self.saved}')
    return 130

  def close(self):
    """Waits for what is being written and writes the rest."""
    self.profiler.close()
    with self.ledger.charge('checkpoint'):
      self.checkpoints.close()
    self.job.batches.close()
    self.writers.close()
    self.progress.close()
    if distributed.is_first():
      self.ledger.write()

  def _due(self, every, step):
    return step == self.total or (every > 0 and step % every == 0)

  def _log(self, step, values, speed):
    """Writes the window's metrics; returns the first step whose loss is not finite, or None."""
    losses = values.pop('losses')
    values['train/mfu'] = speed.mfu(values['train/tokens_per_second'])
    self.writers.write(step, values)
    self.progress.log(step, values)
    return next((s for s, loss in losses if not math.isfinite(loss)), None)

  def _evaluate(self, step):
    for name, evaluator in self.job.evaluators.items():
      begin = time.perf_counter()
      with self.ledger.charge('eval'):
        values = evaluator(self.state.params)
      metrics = {f'eval/{name}/{k}': v for k, v in values.items()}
      self.metrics, self.metrics_step = {**self.metrics, **metrics}, step
      self.writers.write(step, metrics)
      self.progress.evaluated(step, name, values, time.perf_counter() - begin)

  def _sample(self, step):
    if self.job.sample is not None:
      with self.ledger.charge('sample'):
        for prompt, text in self.job.sample(self.state.params):
          self.writers.write_sample(step, prompt, text)

  def _save(self):
    with self.ledger.charge('checkpoint'):
      stream = {'batches': self.position, 'fingerprint': self.job.batches.fingerprint}
      self.checkpoints.save(self.done, self.state, stream, to_dict(self.spec), self.metrics, self.metrics_step)

  def _settle(self, wait=False):
    """Says what became of the saves; returns False when one failed and the run is to stop for it."""
    with self.ledger.charge('checkpoint') if wait else contextlib.nullcontext():
      saves = self.checkpoints.finished(wait)
    going_on = True
    for save in saves:
      if not save.problem:
        self.saved = save.step
        path = self.workdir / 'checkpoints' / str(save.step)  # As the user wrote it.
        self.progress.saved(save.step, path, save.seconds, save.size or None)
        if save.note:
          self.progress.say(save.note)
        continue
      going_on = self.spec.checkpoint.on_error == 'continue'
      last = f'the last good checkpoint is step {self.saved}' if self.saved else 'there is no good checkpoint'
      self.progress.say(f'{save.problem}; {last}' + (
          '' if going_on else '. Stopped; --config.checkpoint.on_error=continue would train on'))
    return going_on


class _Speed:
  """Turns tokens per second into the part of the devices' peak that the model's own FLOPs use."""

  def __init__(self, spec, mesh):
    peak = chips.peak_flops(mesh.devices.flat[0])
    self._flops = counts.train_flops_per_token(spec.model, spec.data.seq_len)
    self._peak = peak and peak * mesh.devices.size

  def mfu(self, tokens_per_second):
    """Returns the fraction, or None for a device whose peak is unknown."""
    return self._peak and tokens_per_second * self._flops / self._peak


class _Window:
  """The steps since the last log line: their metrics, still on the devices, and their time."""

  def __init__(self):
    self.data_wait = 0.0
    self._steps = []
    self._begin = time.perf_counter()

  def add(self, step, metrics):
    self._steps.append((step, metrics))

  def wait(self):
    """Returns when the devices have done every step so far."""
    jax.block_until_ready([metrics for _, metrics in self._steps])

  @contextlib.contextmanager
  def paused(self):
    """Leaves the block's time out of the steps'; the devices must be idle when it begins."""
    begin = time.perf_counter()
    yield
    self._begin += time.perf_counter() - begin

  def read(self):
    """Returns the window's metrics, after `wait`, and begins the next window."""
    now = time.perf_counter()
    rows = jax.device_get([metrics for _, metrics in self._steps])
    seconds, count = now - self._begin, len(rows)
    tokens = sum(float(row['target_tokens']) for row in rows)
    last = {f'train/{k}': float(v) for k, v in rows[-1].items() if k != 'target_tokens'}
    values = {
        **last,
        'train/loss': sum(float(r['loss']) * float(r['target_tokens']) for r in rows) / max(tokens, 1),
        'train/target_tokens': tokens,
        'train/step_seconds': seconds / count,
        'train/data_wait_seconds': self.data_wait / count,
        'train/tokens_per_second': tokens / seconds,
        'losses': [(step, float(row['loss'])) for (step, _), row in zip(self._steps, rows, strict=True)],
    }
    self._steps, self.data_wait, self._begin = [], 0.0, now
    return values


def _load_initial(source, params, shardings):
  """Returns the parameters of another run or checkpoint, laid out as this run's are."""
  folder = pathlib.Path(source)
  if (folder / 'checkpoints').exists():
    folder = folder / 'checkpoints' / str(find_step(folder))
  if not (folder / 'params').exists():
    raise ConfigError([f"train.init_from={source} is neither a run's folder nor one of its "
                       'checkpoints'])
  require_good(folder)
  abstract = jax.tree.map(lambda p, s: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=s), params,
                          shardings)
  try:
    return restore_params(folder, abstract)
  except ValueError as e:
    raise ConfigError([f'train.init_from={source} holds another model: {str(e).splitlines()[0]}']) from e


def _headline(spec, mesh, compile_seconds):
  """Returns the line that says what is being trained, on what."""
  total = counts.count_params(spec.model)['total']
  axes = ' x '.join(f'{a} {n}' for a, n in mesh.shape.items() if n > 1) or 'one device'
  rows = spec.train.batch_size * spec.data.seq_len
  return (f'{total / 1e6:.2f} M parameters, {rows} tokens a step, {mesh.devices.size} x '
          f'{mesh.devices.flat[0].device_kind} ({axes}), compiled in {compile_seconds:.1f}s')
