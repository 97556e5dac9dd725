"""The only training loop: next batch, step, log, evaluate, sample, save, profile.

A loop such as pretrain.py supplies a Job; everything that is the same for all of them is here.  What goes wrong,
and what is done about it, is in recovery.py.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax

from llmjax.checkpoint.arrays import read_json
from llmjax.checkpoint.recorded import absolute_paths
from llmjax.config import ConfigError, to_dict
from llmjax.model import counts
from llmjax.parallel import distributed
from llmjax.parallel.heartbeat import Heartbeat
from llmjax.parallel.host import keep_freed_memory
from llmjax.parallel.in_flight import InFlight
from llmjax.parallel.mesh import place_batch
from llmjax.report.report import write_report
from llmjax.run.changes import Change, describe_jump
from llmjax.run.compile_time import charged
from llmjax.run.early_stopping import Patience
from llmjax.run.energy import EnergyLog
from llmjax.run.goodput import Goodput
from llmjax.run.initial import Adapting, initial_checkpoint, restore_initial
from llmjax.run.profiler import Profiler
from llmjax.run.progress import Progress
from llmjax.run.recovery import Recovery
from llmjax.run.stragglers import Stragglers
from llmjax.run.timer import Speed, StepTimer
from llmjax.run.workdir import begin_attempt
from llmjax.run.writers import LogError, open_writers
from llmjax.train.guard import watched
from llmjax.train.optimizers import make_optimizer, stop_frozen
from llmjax.train.state import abstract_state, init_state
from llmjax.train.step import lower_step, make_train_step


@dataclasses.dataclass
class Job:
  """What a loop supplies.

  spec: the command's spec, whose groups `model, train, optimizer, guard, checkpoint, profile, logs` the
  harness reads.  batches: iterator of host batches with `state` (one int), `fingerprint` (of the data),
  `restore(state)` and `close()`.  One that is made with the model has `is_due`, whether its next batch needs the
  parameters, and `refill(params)`, which is called then and returns metrics.
  loss_fn: see train/step.py.  evaluators: name -> function of (params, frozen) that returns metrics.
  sample: function of the parameters that returns [(prompt, continuation)], or None.  describe: function of
  a batch's number (from 0) that returns its rows for a person to read, as JSON holds them, or None.
  together: rows in order that belong together.  load_frozen: function that returns {name: parameters} that the
  loss reads and that do not train, beside the base of adapters, or None.
  initial: function of fresh parameters to those that a new run starts from, laid out as they are, or None.
  """

  spec: Any
  mesh: jax.sharding.Mesh
  batches: Any
  loss_fn: Callable
  evaluators: dict[str, Callable]
  sample: Callable | None
  describe: Callable | None = None
  together: int = 1
  load_frozen: Callable | None = None
  initial: Callable | None = None
  goodput: Goodput | None = None  # `start.run` supplies these.
  heart: Heartbeat | None = None


def train(job, workdir, attempt=None):
  """Runs the job to its last step; returns the exit status.

  attempt: of `workdir.claim_workdir`.
  0: done.  1: a lost run.  130: stopped by Ctrl-C.  75: stopped by SIGTERM, saved, to be started again.
  """
  total, train = job.spec.train.steps, job.spec.train
  attempt = attempt or begin_attempt(workdir, job.spec)
  checkpoints, first = attempt.checkpoints, attempt.first
  patience = Patience(train.patience, train.stop_metric, workdir, first)
  if first and (first >= total or patience.is_over()):
    checkpoints.close()
    if distributed.is_first():
      print(*checkpoints.passed_over, sep='\n', end='\n' * bool(checkpoints.passed_over))
      print(f'{workdir} is done: step {first} of {total}; raise --config.train.steps to go on' if first >= total
            else f'{workdir} is done at step {first} of {total}: {patience.reason()}')
    return 0
  try:
    return _sit(Loop(job, workdir, attempt))
  except LogError as e:
    # No checkpoint was lost by this, and none could be written now.
    raise SystemExit(f'stopped: {e}; make room, and the same command goes on from the last checkpoint') from None


def _sit(loop):
  """Trains, writes the report, and returns the exit status."""
  try:
    with distributed.agreed_stop() as stop:
      try:
        status = loop.run(stop)
      except KeyboardInterrupt:  # Before the first step; XLA may be compiling still: see main.
        loop.interrupt()
        raise KeyboardInterrupt(stop.status) from None
      if status == 130:
        status = stop.status
  except BaseException:
    with contextlib.suppress(LogError):  # What came first is told.
      loop.close(alone=jax.process_count() > 1)
    raise
  loop.close()
  if distributed.is_first():
    try:
      print(f'report: {write_report(loop.workdir)}')
    except OSError as e:
      print(f'the report is not written: {e.strerror or e}; `llmjax report --workdir={loop.workdir}` writes it')
  loop.account()  # Anew, with the time that the report took.
  loop.goodput.close()
  return status


class Loop:
  """One attempt of a run, from the step that it resumes from to the last."""

  def __init__(self, job, workdir, attempt):
    self.job, self.spec, self.goodput, self.workdir = job, job.spec, job.goodput, workdir
    checkpoints, first = attempt.checkpoints, attempt.first
    self.checkpoints, self.first, self.total = checkpoints, first, job.spec.train.steps
    self.done = self.saved = first
    self.metrics, self.metrics_step = {}, None  # Of the latest evaluation.
    self.data_change = []  # Of what the data holds, where that was allowed.
    self.finished, self.slow, self.recovery = False, {}, Recovery(self.spec.guard)
    self.energy = EnergyLog(workdir, self.spec.cost, list(job.mesh.devices.flat), jax.process_count())
    rule, self.schedule = make_optimizer(self.spec.optimizer, self.total, self.spec.train.seed)
    self.tx = watched(rule, self.spec.guard.window)
    self.heart = job.heart or distributed.start_heartbeat(self.spec.distributed, workdir)
    self.heart.begin(first)
    with self.goodput.charge('init'):
      self.state, _ = self._load_state(first)
      if job.mesh.devices.flat[0].platform == 'cpu':
        keep_freed_memory()
      self._open_logs(first or None)
    lost = self.goodput.go_back(first)
    self.progress = Progress(self.total, first, enabled=distributed.is_first())
    self.profiler = Profiler(workdir, self.spec.profile.steps,
                             say=self.progress.say if distributed.is_first() else None)
    self.heart.flush = lambda: self.writers.close()
    for line in (*self.spec.optimizer.warnings(self.total), *attempt.notes):
      self.progress.say(line)
    for line in checkpoints.passed_over:
      self.progress.say(line)
      self.writers.event(first, 'damaged_checkpoint', reason=line)
    self.writers.event(first, 'start', lost_seconds=round(lost, 3), config=attempt.config)
    if first:
      self.progress.say(f'going on from step {first} of {workdir}')
      self._tell_changes(attempt)
    elif self.spec.train.init_from:
      self.progress.say(f'starting from the parameters of {self.spec.train.init_from}')

  def _tell_changes(self, attempt):
    """Prints and records what is another setting than before step `first`."""
    found = [*attempt.changes, *self.data_change]
    for change in found:
      self.progress.say(f'changed at step {self.first}: {change}')
    if jump := describe_jump(attempt.before, self.spec, self.first):
      self.progress.say(f'warning: {jump}')
    if found:
      self.writers.event(self.first, 'config_change', changes={c.field: [c.old, c.new] for c in found},
                         **{'learning_rate': jump} if jump else {})

  def _load_state(self, step):
    """Returns (state, batches drawn) of this run's checkpoint; of init_from, or fresh, at step 0.

    The stream goes to where it was at that step.
    """
    spec, mesh = self.spec, self.job.mesh
    self.heart.beat(step, 'restore' if step else 'init')
    self.adapting = Adapting(spec, mesh, self.workdir) if spec.adapter.kind else None
    if step:
      trained = self.adapting and self.adapting.trained()
      state, stream = self.checkpoints.restore(
          step, abstract_state(spec.model, self.tx, spec.train.param_dtype, mesh, spec.mesh.zero, trained))
      drawn = self._drawn(step, stream)
      self.job.batches.restore(drawn)
      if self.adapting:
        self.adapting.base = stream['base']
      return state.replace(frozen=self._load_frozen()), drawn
    frozen = self._load_frozen()
    trained = self.adapting and self.adapting.trained(frozen)
    state, shardings = init_state(spec.model, self.tx, spec.train.seed, spec.train.param_dtype, mesh,
                                  spec.mesh.zero, trained, frozen)
    if spec.train.init_from and not self.adapting:
      source = spec.train.init_from
      abstract = jax.tree.map(lambda p, s: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=s), state.params,
                              shardings.params)
      state = state.replace(params={**state.params, **restore_initial(source, initial_checkpoint(source), abstract)})
    elif self.job.initial:
      state = state.replace(params=self.job.initial(state.params))
    self.job.batches.restore(0)
    return state, 0

  def _drawn(self, step, stream):
    """Returns how many batches of the run's data a checkpoint's steps have read; ConfigError when that is other data.

    With train.allow_changes it may be; the number of sequences that were read stays then.
    """
    before, now = stream['fingerprint'], self.job.batches.fingerprint
    if not self.spec.train.allow_changes:
      if before != now:
        raise ConfigError([f'the data is not what steps 1 to {step} read: a folder of data.sources was '
                           'prepared again, with other text or another tokenizer. Put it back, allow it with '
                           '--config.train.allow_changes=true, or start a new run from these weights: --workdir=NEW '
                           f'--config.train.init_from={self.workdir}'])
      return stream['batches']
    self.data_change = [Change('data', before, now)] if before != now else []
    size = read_json(self.checkpoints.folder / str(step), 'spec').get('train', {}).get('batch_size', 0)
    return -(-stream['batches'] * (size or self.spec.train.batch_size) // self.spec.train.batch_size)

  def go_back(self, skipped, position):
    """Takes the newest checkpoint's state and logs, and the stream on from a position, at least `skipped` batches on.

    Returns (the checkpoint's step, the stream's state that it has, the stream's state now).
    """
    with self.goodput.charge('checkpoint'):
      target = self.checkpoints.latest() or 0
      self.done = self.saved = target  # From here on there is nothing to save.
      for array in jax.tree.leaves(self.state):
        array.delete()  # Devices need not have room for two states.
      self.state, drawn = self._load_state(target)
      position = max(drawn + skipped, position)
      self.job.batches.restore(position)
      self.writers.close()
      self._open_logs(target)
    return target, drawn, position

  def _load_frozen(self):
    """Returns the trees that the loss sees and that do not change, by name."""
    parts = [load() for load in (self.adapting and self.adapting.load_frozen, self.job.load_frozen) if load]
    return {name: tree for part in parts for name, tree in part.items()}

  def _parameters(self):
    """Returns the parameters as the model takes them."""
    return self.adapting.parameters(self.state) if self.adapting else self.state.params

  def _open_logs(self, step):
    """Opens the writers with nothing after a step (None: nothing at all), and what reads their past."""
    self.writers = open_writers(self.workdir, to_dict(self.spec), self.spec.logs.writers, resume_step=step)
    train = self.spec.train
    self.patience = Patience(train.patience, train.stop_metric, self.workdir, step or 0)

  def _refill(self, step):
    """Lets a stream that is made with the model sample what comes after this step."""
    self.heart.beat(step, 'rollout')
    with charged(self.goodput, 'rollout') as watch:
      metrics = self.job.batches.refill(self._parameters())
      seconds = watch.seconds
    # They belong to the step that learns from them: a run that goes on from this one makes them again.
    self.writers.write(step + 1, {f'rollout/{name}': value for name, value in metrics.items()})
    self.progress.rollout(step + 1, metrics, seconds, watch.compiling)

  def _next_batch(self):
    """Returns a batch on the devices, and the stream's state once it is used up."""
    self.heart.beat(self.done, 'data')  # So that the others, who wait in the step, see who is late and why.
    batch = place_batch(self.job.mesh, next(self.job.batches))
    self.heart.beat(self.done)
    return batch, self.job.batches.state

  def _compile(self, batch):
    """Returns the compiled step: ahead of time, so that no timed step holds a compilation."""
    loss_fn = self.job.loss_fn
    if self.adapting:
      loss_fn = self.adapting.loss_fn(loss_fn)
    loss_fn = stop_frozen(loss_fn, self.spec.optimizer.freeze)
    step = make_train_step(loss_fn, self.tx, self.schedule, self.spec.train.gradient_accumulation_steps,
                           self.spec.guard, self.job.together)
    return lower_step(step, self.state, batch).compile()

  def run(self, stop=lambda turn: False):
    """Trains to the last step, until the run is lost, or until stop(turn) says so; returns the exit status."""
    train, goodput, progress, recovery = self.spec.train, self.goodput, self.progress, self.recovery
    if getattr(self.job.batches, 'is_due', False):
      self._refill(self.first)
    with goodput.charge('data_wait'):
      batch, position = self._next_batch()
    self.heart.beat(self.first, 'compile')
    before = goodput.seconds['compile']  # Of a rollout's programs.
    with goodput.charge('compile'):
      step_fn = self._compile(batch)
      recovery.prepare(self)
    with goodput.charge('init'):
      speed = Speed(self.spec, self.job.mesh)
      self.stragglers = Stragglers(self.spec.guard.straggler_deviations)
    self.account()
    what = self.adapting.describe(self.state) if self.adapting else ''
    progress.say(_headline(self.spec, self.job.mesh, goodput.seconds['compile'] - before, what))
    pauses = (train.eval_every, train.sample_every, train.checkpoint_every)
    window, in_flight, step, turn = StepTimer(), InFlight(), self.first, self.first
    if stop(self.first):
      return self.interrupt()
    while step < self.total:
      step, turn = step + 1, turn + 1  # Steps go back in a rollback; turns never do.
      logs, pausing = self.due(train.log_every, step), any(self.due(n, step) for n in pauses)
      with goodput.charge('step'):
        self.profiler.before(step)
        self.state, metrics = step_fn(self.state, batch)
        self.done, self.position = step, position
        window.add(step, position, metrics)
        waited = in_flight.add((metrics, recovery.add_sums(self, step))) is not None
        if step < self.total:
          if getattr(self.job.batches, 'is_due', False):
            in_flight.drain()
            with window.paused():
              self._refill(step)
          begin = time.perf_counter()
          batch, position = self._next_batch()  # While the devices work.
          spent = time.perf_counter() - begin
          window.host += spent
          if metrics['loss'].is_ready():  # Only what outlasts their work is waiting.
            window.data_wait += spent
            goodput.seconds['data_wait'] += spent
        if logs or pausing:
          in_flight.drain()
          rows = window.wait()
      with window.paused():
        self.profiler.after(step)
      verdict = recovery.inspect(self, rows) if logs or pausing else None
      if logs or verdict:
        self._log(step, window.read(), speed)
      else:
        progress.tick(step)
      if verdict and verdict.stops:
        return recovery.give_up(self, verdict)
      if verdict:
        step, window = recovery.roll_back(self, verdict), StepTimer()
        with goodput.charge('data_wait'):
          batch, position = self._next_batch()
        continue
      with window.paused():
        if self.due(train.eval_every, step):
          self._evaluate(step)
        if self.due(train.sample_every, step):
          self._sample(step)
        if self.due(train.checkpoint_every, step):
          self._save()
      if not self.settle():
        return 1
      self.heart.beat(step, waited=waited or logs or pausing, saved=self.saved)
      if self.patience.is_over() and step < self.total:
        return self._stop_early()
      if stop(turn) and step < self.total:
        return self.interrupt()
    return self._finish()

  def interrupt(self):
    """Saves what is done after Ctrl-C; returns the exit status."""
    self.progress.say(f'interrupted after step {self.done}')
    self.writers.event(self.done, 'interrupted')
    self.heart.beat(self.done, 'save')
    self.settle(wait=True)
    if self.done > self.saved:
      self._save()
    if not self.settle(wait=True) or self.done > self.saved:
      return 1
    self.progress.say(f'the same command goes on from step {self.saved}')
    return 130

  def close(self, alone=False):
    """Waits for what is being written and writes the rest.

    alone: this process has failed.  It must not wait for the others: they are in a collective that it never joins.
    """
    with contextlib.ExitStack() as stack:  # Each is closed though another one fails; the last named first.
      for close in (self.account, self.progress.close, self.heart.close, self.writers.close,
                    self.job.batches.close):
        stack.callback(close)
      self.heart.beat(self.done, 'close', saved=self.saved)
      self.profiler.close()
      if alone:
        self.checkpoints.leave()
        return
      self.settle(wait=True)  # A save that fails now, after another one that ended the run, is told in a line, too.
      with self.goodput.charge('checkpoint'):
        self.checkpoints.close()

  def due(self, every, step):
    """Returns whether what is done every so many steps (0: at the end alone) is due after this one."""
    return step == self.total or (every > 0 and step % every == 0)

  def account(self):
    """Writes where the time went so far, and what it cost."""
    if distributed.is_first():
      self.goodput.write(self.done, self.finished)
      self.energy.write(self.goodput.sitting_seconds)

  def _log(self, step, values, speed):
    """Writes the window's metrics and who was slow."""
    values['train/mfu'] = speed.mfu(values['train/tokens_per_second'])
    slow = self.stragglers.find(values.pop('host_seconds'), values['train/step_seconds'])
    self.writers.write(step, values)
    self.progress.log(step, values, self.stragglers.describe(slow))
    if slow and set(slow) != set(self.slow):
      self.writers.event(step, 'straggler', step_seconds=values['train/step_seconds'],
                         host_seconds={str(process): seconds for process, seconds in slow.items()})
    self.slow = slow
    self.account()

  def _stop_early(self):
    """Saves and says that held-out text makes no progress; returns the exit status."""
    self.progress.say(f'stopped at step {self.done}: {self.patience.reason()}')
    self.writers.event(self.done, 'early_stop', reason=self.patience.reason(), best=self.patience.best,
                       best_step=self.patience.best_step)
    if self.done > self.saved:
      self._save()
    return self._finish()

  def _finish(self):
    self.heart.beat(self.done, 'save')
    if not self.settle(wait=True) or self.saved != self.done:
      return 1
    self.finished = True
    self.writers.event(self.done, 'done')
    return 0

  def _evaluate(self, step):
    self.heart.beat(step, 'evaluate')
    for name, evaluator in self.job.evaluators.items():
      with charged(self.goodput, 'eval') as watch:
        values = evaluator(self._parameters(), self.state.frozen)
        seconds = watch.seconds
      metrics = {f'eval/{name}/{k}': v for k, v in values.items()}
      self.writers.write(step, metrics)
      numbers = {k: v for k, v in metrics.items() if not isinstance(v, str)}  # The rest says what they are of.
      self.metrics, self.metrics_step = {**self.metrics, **numbers}, step
      if self.patience.metric in metrics:
        self.patience.add(step, float(metrics[self.patience.metric]))
      self.progress.evaluated(step, name, values, seconds, watch.compiling)

  def _sample(self, step):
    self.heart.beat(step, 'sample')
    if self.job.sample is not None:
      with charged(self.goodput, 'sample'):
        for prompt, text in self.job.sample(self._parameters()):
          self.writers.write_sample(step, prompt, text)

  def _save(self):
    self.heart.beat(self.done, 'save')
    with self.goodput.charge('checkpoint'):
      stream = {'batches': self.position, 'fingerprint': self.job.batches.fingerprint}
      if self.adapting:
        stream['base'] = self.adapting.base
      self.checkpoints.save(self.done, self.state, stream, absolute_paths(to_dict(self.spec)), self.metrics,
                            self.metrics_step)
    self.recovery.saved()
    self.account()

  def settle(self, wait=False):
    """Says what became of the saves; returns False when one failed and the run is to stop for it."""
    with self.goodput.charge('checkpoint') if wait else contextlib.nullcontext():
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
      self.writers.event(self.done, 'save_failed', reason=save.problem, checkpoint=self.saved)
    return going_on


def _headline(spec, mesh, compile_seconds, trained=''):
  """Returns the line that says what is being trained, on what.  trained: which part of it."""
  total = counts.count_params(spec.model)['total']
  axes = ' x '.join(f'{a} {n}' for a, n in mesh.shape.items() if n > 1) or 'one device'
  rows = spec.train.batch_size * spec.data.seq_len
  trained = f', {trained}' if trained else ''
  return (f'{total / 1e6:.2f} M parameters{trained}, {rows} tokens a step, {mesh.devices.size} x '
          f'{mesh.devices.flat[0].device_kind} ({axes}), compiled in {compile_seconds:.1f}s')
