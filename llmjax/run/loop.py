"""The training loop: next batch, step, callbacks.

A stage such as loops/pretrain.py supplies a Job.  Everything else that happens around the steps (logging, evaluation,
checkpoints, recovery, ...) is a Callback, see callback.py.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax

from llmjax import extensions
from llmjax.checkpoint.arrays import read_json
from llmjax.config import ConfigError, to_dict
from llmjax.parallel import distributed
from llmjax.parallel.heartbeat import Heartbeat
from llmjax.parallel.host import keep_freed_memory
from llmjax.parallel.in_flight import InFlight
from llmjax.parallel.mesh import place_batch
from llmjax.report.report import write_report
from llmjax.run.changes import Change
from llmjax.run.compile_time import charged
from llmjax.run.early_stopping import EarlyStopping
from llmjax.run.energy import EnergyLog
from llmjax.run.evaluation import Evaluation
from llmjax.run.goodput import Goodput
from llmjax.run.heartbeats import Heartbeats
from llmjax.run.initial import AdapterBase, initial_checkpoint, restore_initial
from llmjax.run.logs import Logging
from llmjax.run.profiler import Profiler
from llmjax.run.progress import Progress
from llmjax.run.recovery import Recovery
from llmjax.run.sampling import Sampling
from llmjax.run.saving import Saving
from llmjax.run.stragglers import Stragglers
from llmjax.run.timer import StepTimer
from llmjax.run.workdir import begin_attempt
from llmjax.run.writers import LogError, open_writers
from llmjax.train.guard import watched
from llmjax.train.optimizers import make_optimizer
from llmjax.train.state import abstract_state, init_state
from llmjax.train.step import lower_step, make_train_step
from llmjax.train.trainable import make_trainable


@dataclasses.dataclass
class Job:
  """What a stage supplies to the loop.

  spec: the command's spec, with the groups of PretrainSpec.
  batches: iterator of host batches with `state` (one int), `fingerprint` (of the data), `restore(state)` and `close()`.
  Batches that are sampled from the model also have `is_due`, whether the next batch needs the current parameters, and
  `refill(params)`, which then samples and returns metrics.
  loss_fn: function (the model's parameters, frozen, batch, key) -> (sum, (weight, aux)), see train/step.py.
  evaluators: {name: function (params, frozen) -> metrics}.
  sample: function (params) -> [(prompt, continuation)], or None.
  describe: function from a batch's number (from 0) to its sequences as readable JSON, or None.
  together: number of consecutive sequences that stay in one microbatch, 2 for pairs.
  frozen: {name: function that loads a tree of parameters} that the loss reads and that do not train.
  initialize: function from random parameters to the initial ones of a new run, with the same shardings, or None.
  """

  spec: Any
  mesh: jax.sharding.Mesh
  batches: Any
  loss_fn: Callable
  evaluators: dict[str, Callable]
  sample: Callable | None
  describe: Callable | None = None
  together: int = 1
  frozen: dict[str, Callable] = dataclasses.field(default_factory=dict)
  initialize: Callable | None = None
  goodput: Goodput | None = None  # Set by `start.run`.
  heart: Heartbeat | None = None


@dataclasses.dataclass(frozen=True)
class Rollback:
  """A return to the state of an earlier step.  Before it, only position and reason are known.

  position: data position after which training continues.  lost_steps, skipped_batches: between the two states.
  """

  position: int
  reason: str
  at: int
  lost_steps: int = 0
  skipped_batches: int = 0


def make_callbacks(run):
  """Return the callbacks of a run, in the order in which they are called."""
  spec, workdir = run.spec, run.workdir
  return [
      Profiler(workdir, spec.profile.steps, say=run.say if distributed.is_first() else None),
      Recovery(spec.guard),
      Logging(),
      Stragglers(spec.guard.straggler_deviations),
      Evaluation(run.job.evaluators),
      run.early_stopping,
      Sampling(run.job.sample),
      Saving(run.checkpoints),
      Heartbeats(),
      run.goodput,
      EnergyLog(workdir, spec.cost, list(run.mesh.devices.flat), jax.process_count()),
      *(extensions.load(path, 'train.callbacks')() for path in spec.train.callbacks),
  ]


def train(job, workdir, attempt=None):
  """Train to the last step and return the exit status.

  attempt: of `workdir.claim_workdir`.
  0: done.  1: failed.  130: stopped by Ctrl-C.  75: stopped by SIGTERM after saving, to be restarted.
  """
  attempt = attempt or begin_attempt(workdir, job.spec)
  total, first, checkpoints = job.spec.train.steps, attempt.first, attempt.checkpoints
  early_stopping = EarlyStopping(job.spec.train.patience, job.spec.train.stop_metric, workdir, first)
  if first and (first >= total or early_stopping.is_over()):
    checkpoints.close()
    if distributed.is_first():
      print(*checkpoints.passed_over, sep='\n', end='\n' * bool(checkpoints.passed_over))
      print(f'{workdir} is done: step {first} of {total}; raise --config.train.steps to continue' if first >= total
            else f'{workdir} is done at step {first} of {total}: {early_stopping.reason()}')
    return 0
  try:
    return _run_to_end(Run(job, workdir, attempt, early_stopping))
  except LogError as e:
    raise SystemExit(f'stopped: {e}; free some space, and the same command resumes from the last checkpoint') from None


def _run_to_end(run):
  """Train, write the report, and return the exit status."""
  try:
    with distributed.agreed_stop() as stop:
      try:
        status = run.train(stop)
      except KeyboardInterrupt:  # Before the first step, perhaps while XLA compiles: see main.
        run.interrupt()
        raise KeyboardInterrupt(stop.status) from None
      if status == 130:
        status = stop.status
  except BaseException:
    with contextlib.suppress(LogError):  # The first error is reported.
      run.close(alone=jax.process_count() > 1)
    raise
  run.close()
  if distributed.is_first():
    try:
      print(f'report: {write_report(run.workdir)}')
    except OSError as e:
      print(f'the report is not written: {e.strerror or e}; `llmjax report --workdir={run.workdir}` writes it')
  run.call('flush')  # Again, to include the time of the report.
  run.goodput.close()
  return status


class Run:
  """One attempt of a run, from the step that it resumes from to the last; what callbacks see.

  job, spec, mesh, workdir: what is trained, where.  attempt: workdir.Attempt.
  first, step, total: the step that this attempt resumes from, the last one done, and the last of the run.
  position: state of the data after the step.  saved: step of the newest verified checkpoint.
  state: TrainState; a callback may replace it by one with the same shapes and shardings.
  has_waited: whether the devices are known to have finished a program during this step.
  evaluated: (step, metrics) of the latest evaluations.  is_finished: whether the run is done.
  data_change: allowed changes of the data.  writers, progress, goodput, heart, timer: see their classes.
  """

  def __init__(self, job, workdir, attempt, early_stopping):
    self.job, self.spec, self.mesh, self.goodput, self.workdir = job, job.spec, job.mesh, job.goodput, workdir
    self.attempt, self.checkpoints, self.early_stopping = attempt, attempt.checkpoints, early_stopping
    self.first = self.step = self.saved = attempt.first
    self.total, self.position = self.spec.train.steps, None
    self.evaluated, self.data_change, self.is_finished = (None, {}), [], False
    self.status = self._rollback = None
    self.timer, self._in_flight, self.has_waited = StepTimer(), InFlight(), False
    rule, self._schedule = make_optimizer(self.spec.optimizer, self.total, self.spec.train.seed)
    self._tx, self.trainable = watched(rule, self.spec.guard.window), make_trainable(self.spec)
    self._base = AdapterBase(self.spec, self.mesh, workdir) if self.spec.adapter.kind else None
    self.heart = job.heart or distributed.start_heartbeat(self.spec.distributed, workdir)
    self.heart.begin(self.first)
    with self.goodput.charge('init'):
      self._load_state(self.first)
      if self.mesh.devices.flat[0].platform == 'cpu':
        keep_freed_memory()
      self._open_writers(self.first or None)
    self.progress = Progress(self.total, self.first, enabled=distributed.is_first())
    self.heart.flush = lambda: self.writers.close()
    self.callbacks = make_callbacks(self)
    self.call('on_init')

  # What callbacks call.

  def params(self):
    """Return the model's parameters: with adapters and frozen parameters in their places."""
    return self.trainable.merge(self.state.params, self.state.frozen)

  def is_due(self, every):
    """Return whether something done every so many steps (0: only at the end) is due after this step."""
    return self.step == self.total or (every > 0 and self.step % every == 0)

  def log(self, metrics, step=None):
    """Write {name: value} to metrics.jsonl and its mirrors, at this step."""
    self.writers.write(self.step if step is None else step, metrics)

  def event(self, kind, step=None, **details):
    """Write an event to events.jsonl, at this step."""
    self.writers.event(self.step if step is None else step, kind, **details)

  def say(self, line):
    """Print a line on the first process."""
    self.progress.say(line)

  def stop(self, status=0):
    """End the run after this step.  status: exit status; 0 marks the run as done, after a checkpoint."""
    self.status = status

  def roll_back(self, position, reason, at):
    """Return to the newest checkpoint after this step, and continue with the data after `position`."""
    self._rollback = Rollback(position, reason, at)

  def settle(self):
    """Wait for the checkpoint that is being written, so that `saved` is final."""
    next(c for c in self.callbacks if isinstance(c, Saving)).settle(self, wait=True)

  @property
  def is_ending(self):
    """Whether the run ends or rolls back after this step."""
    return self.status is not None or self._rollback is not None

  @contextlib.contextmanager
  def phase(self, bucket, name=None):
    """Charge the block's time to a bucket of goodput, and its progress to a phase of the heartbeat, bucket by default.

    Yields a Stopwatch that leaves out compilation.
    """
    self.heart.beat(self.step, name or bucket)
    with charged(self.goodput, bucket) as watch:
      yield watch

  def call(self, hook, *arguments):
    """Call a hook of all callbacks; returns their results that are not None."""
    results = [getattr(callback, hook)(self, *arguments) for callback in self.callbacks]
    return [r for r in results if r is not None]

  # The loop.

  def train(self, stop=lambda turn: False):
    """Train to the last step, or until a callback or stop(turn) ends the run; returns the exit status."""
    step_fn, batch, position = self._prepare()
    turn = self.first  # Never goes back, unlike the step.
    if stop(turn):
      return self.interrupt()
    while self.step < self.total:
      with self.goodput.charge('step'):
        self.call('before_step')
        self.state, metrics = step_fn(self.state, batch)
        self.step, self.position, turn = self.step + 1, position, turn + 1
        self.timer.add(self.step, self.position, metrics)
        self.has_waited = self._in_flight.add(metrics) is not None
        if self.step < self.total:
          batch, position = self._next_batch(metrics['loss'])  # While the devices work.
        rows = self._wait() if any(self.call('needs_values')) else None
        self.has_waited |= rows is not None
      if rows is not None:
        with self.timer.paused():
          self.call('on_values', rows)
          if not self.is_ending:
            self.call('at_pause')
      if self._rollback:
        batch, position = self._restore()
        continue
      self.call('after_step')
      if self.status is not None:
        break
      if stop(turn) and self.step < self.total:
        return self.interrupt()
    self.call('on_end')
    return self.status or 0

  def interrupt(self):
    """Save after Ctrl-C or SIGTERM; returns the exit status."""
    self.say(f'interrupted after step {self.step}')
    self.event('interrupted')
    self.status = 130
    self.call('on_end')
    if self.status == 130:
      self.say(f'the same command resumes from step {self.saved}')
    return self.status

  def close(self, alone=False):
    """Release everything.  alone: this process failed, and must not wait for others that are in a collective."""
    with contextlib.ExitStack() as stack:  # All are closed even if one fails; the last named first.
      for close in (lambda: self.call('flush'), self.progress.close, self.heart.close, self.writers.close,
                    self.job.batches.close):
        stack.callback(close)
      self.heart.beat(self.step, 'close', saved=self.saved)
      for callback in self.callbacks:
        stack.callback(callback.close, self)
      if alone:
        self.checkpoints.leave()
        return
      self.settle()
      with self.goodput.charge('checkpoint'):
        self.checkpoints.close()

  def _prepare(self):
    """Compile; returns (compiled step, first batch, position of the data after it)."""
    if getattr(self.job.batches, 'is_due', False):
      self._refill()
    with self.goodput.charge('data_wait'):
      batch, position = self._read_batch()
    before = self.goodput.seconds['compile']  # Spent on the programs of rollouts.
    self.heart.beat(self.step, 'compile')
    with self.goodput.charge('compile'):
      step_fn = self.compile_step(batch)
    self.compile_seconds = self.goodput.seconds['compile'] - before
    self.call('on_start')
    self.call('flush')
    self.timer = StepTimer()
    return step_fn, batch, position

  def compile_step(self, batch):
    """Return the step, compiled ahead of time, so that no timed step includes a compilation."""
    step = make_train_step(self.trainable.wrap(self.job.loss_fn), self._tx, self._schedule,
                           self.spec.train.gradient_accumulation_steps, self.spec.guard, self.job.together)
    return lower_step(step, self.state, batch).compile()

  def _next_batch(self, loss):
    """Return (batch, position of the data after it); loss: of the step that the devices work on."""
    if getattr(self.job.batches, 'is_due', False):
      self._in_flight.drain()
      with self.timer.paused():
        self._refill()
    begin = time.perf_counter()
    batch, position = self._read_batch()
    seconds = time.perf_counter() - begin
    self.timer.host += seconds
    if loss.is_ready():  # Only time after the devices finished is spent waiting.
      self.timer.data_wait += seconds
      self.goodput.seconds['data_wait'] += seconds
    return batch, position

  def _read_batch(self):
    self.heart.beat(self.step, 'data')
    batch = place_batch(self.mesh, next(self.job.batches))
    self.heart.beat(self.step)
    return batch, self.job.batches.state

  def _refill(self):
    """Sample the next batches from the current parameters."""
    with self.phase('rollout') as watch:
      metrics = self.job.batches.refill(self.params())
      seconds = watch.seconds
    # They belong to the step that trains on them: an attempt that resumes from this step samples them again.
    self.log({f'rollout/{name}': value for name, value in metrics.items()}, self.step + 1)
    self.progress.rollout(self.step + 1, metrics, seconds, watch.compiling)

  def _wait(self):
    """Wait for the devices; returns the metrics of the steps since the last time."""
    self._in_flight.drain()
    return self.timer.wait()

  def _restore(self):
    """Carry out a rollback; returns the next batch and the position of the data after it."""
    lost, skip = self.step, self.spec.guard.rollback_skip_batches
    self.settle()
    with self.goodput.charge('checkpoint'):
      self.step = self.saved = self.checkpoints.latest() or 0
      for array in jax.tree.leaves(self.state):
        array.delete()  # The devices may not have memory for two states.
      drawn = self._load_state(self.step)
      position = max(drawn + skip, self._rollback.position)
      self.job.batches.restore(position)
      self.writers.close()
      self._open_writers(self.step)
    rollback = dataclasses.replace(self._rollback, lost_steps=lost - self.step, skipped_batches=position - drawn)
    self._rollback, self.timer = None, StepTimer()
    self.call('on_rollback', rollback)
    self.call('flush')
    with self.goodput.charge('data_wait'):
      return self._read_batch()

  def _open_writers(self, step):
    """Open the writers without what was written after a step; None: with nothing."""
    self.writers = open_writers(self.workdir, to_dict(self.spec), self.spec.logs.writers, resume_step=step)

  # The state.

  def _load_state(self, step):
    """Set the state to that of a checkpoint of this run; at step 0 to that of train.init_from, or a new one.

    Sets the data to the position at that step, and returns the number of batches read until there.
    """
    spec, batches = self.spec, self.job.batches
    self.heart.beat(step, 'restore' if step else 'init')
    if not step:
      frozen = self._load_frozen()
      self.state = init_state(self.trainable, self._tx, spec.train.seed, self.mesh, spec.mesh.zero, frozen,
                              self._initialize)
      batches.restore(0)
      return 0
    abstract = self.trainable.pack(abstract_state(self.trainable, self._tx, self.mesh, spec.mesh.zero))
    state, data = self.checkpoints.restore(step, abstract)
    drawn = self._batches_read(step, data)
    batches.restore(drawn)
    self.state = self.trainable.unpack(state, self._load_frozen(data.get('base')))
    return drawn

  def _load_frozen(self, base=None):
    """Load the frozen parameters.  base: identity of the base of adapters, of a checkpoint."""
    frozen = {'base': self._base.load(base)} if self._base else {}
    return frozen | {name: load() for name, load in self.job.frozen.items()}

  def _initialize(self, params):
    source = self.spec.train.init_from
    if source and not self._base:
      abstract = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=p.sharding), params)
      return {**params, **restore_initial(source, initial_checkpoint(source), abstract)}
    return self.job.initialize(params) if self.job.initialize else params

  def data_state(self):
    """Return what a checkpoint records of the data, and of the base of adapters."""
    data = {'batches': self.position, 'fingerprint': self.job.batches.fingerprint}
    return {**data, 'base': self._base.identity} if self._base else data

  def _batches_read(self, step, data):
    """Return how many batches of the run's data the steps of a checkpoint have read.

    Raises ConfigError when the data changed, unless train.allow_changes is set.  The number of sequences that were read
    then stays the same.
    """
    before, now = data['fingerprint'], self.job.batches.fingerprint
    if not self.spec.train.allow_changes:
      if before != now:
        raise ConfigError([f'the data differs from what steps 1 to {step} read: a folder of data.sources was prepared '
                           'again, with other text or another tokenizer. Restore it, allow the change with '
                           '--config.train.allow_changes=true, or start a new run from these weights: --workdir=NEW '
                           f'--config.train.init_from={self.workdir}'])
      return data['batches']
    self.data_change = [Change('data', before, now)] if before != now else []
    size = read_json(self.checkpoints.folder / str(step), 'spec').get('train', {}).get('batch_size', 0)
    return -(-data['batches'] * (size or self.spec.train.batch_size) // self.spec.train.batch_size)
