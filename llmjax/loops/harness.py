"""The only training loop: next batch, step, log, evaluate, sample, save, profile.

A loop such as pretrain.py supplies a Job; everything that is the same for all of them is here.
"""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import time
from typing import Any, Callable

import jax

from llmjax.checkpoint.checkpoints import Checkpoints, restore_params
from llmjax.checkpoint.checkpoints import find_step
from llmjax.config import ConfigError, to_dict
from llmjax.evaluate.report import write_report
from llmjax.loops.ledger import Ledger
from llmjax.loops.profiling import Profiler
from llmjax.loops.progress import Progress
from llmjax.loops.writers import open_writers
from llmjax.model import counts
from llmjax.parallel import chips
from llmjax.parallel.mesh import place_batch
from llmjax.train.optimizers import make_optimizer
from llmjax.train.state import abstract_state, init_state
from llmjax.train.step import make_train_step


@dataclasses.dataclass
class Job:
  """What a loop supplies.

  spec: the command's spec, whose groups `model, train, optimizer, checkpoint, profile, logs` the harness
  reads.  batches: iterator of host batches with `state` (one int), `restore(state)` and `close()`.
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
  if setting == 'default':
    if os.environ.get('JAX_COMPILATION_CACHE_DIR'):
      return
    cache = os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'
    setting = pathlib.Path(cache) / 'llmjax' / 'xla'
  jax.config.update('jax_compilation_cache_dir', str(setting))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)


def claim_workdir(workdir, spec):
  """Makes the run's folder and writes config.json; refuses a folder that holds a different run.

  What defines the weights and the stream must be as it was; lengths and intervals may change.
  """
  workdir = pathlib.Path(workdir)
  file, resolved = workdir / 'config.json', to_dict(spec)
  if file.exists() and any((workdir / 'checkpoints').glob('[0-9]*')):
    before = json.loads(file.read_text())
    fixed = [('model', k) for k in resolved['model']] + [
        ('data', 'sources'), ('data', 'seq_len'), ('data', 'packing'), ('optimizer', 'name'),
        ('train', 'batch_size'), ('train', 'seed'), ('train', 'param_dtype')]
    changed = [f'{g}.{k} was {before[g][k]!r} in {workdir} and is {resolved[g][k]!r} now; keep it, or '
               'give a new --workdir' for g, k in fixed
               if k in before.get(g, {}) and before[g][k] != resolved[g][k]]
    if changed:
      raise ConfigError(changed)
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(resolved, indent=2) + '\n')
  except OSError as e:
    raise ConfigError([f'--workdir={workdir} cannot be written: {e.strerror}']) from e
  return workdir


def train(job, workdir):
  """Runs the job to its last step; returns the exit status."""
  spec, mesh, ledger = job.spec, job.mesh, job.ledger
  total = spec.train.steps
  checkpoints = Checkpoints(workdir, spec.checkpoint.keep)
  tx, schedule = make_optimizer(spec.optimizer, total)

  # ---- Where to start: this run's own checkpoint, else init_from, else scratch.
  start = checkpoints.latest()
  if start is not None and start >= total:
    checkpoints.close()
    print(f'{workdir} is done: step {start} of {total}; raise --config.train.steps to go on')
    return 0
  with ledger.charge('init'):
    if start is not None:
      state, stream_state = checkpoints.restore(
          start, abstract_state(spec.model, tx, spec.train.param_dtype, mesh))
      job.batches.restore(stream_state)
    else:
      state, shardings = init_state(spec.model, tx, spec.train.seed, spec.train.param_dtype, mesh)
      if spec.train.init_from:
        state = state.replace(params=_load_initial(spec.train.init_from, state.params, shardings.params))
  first = start or 0
  writers = open_writers(workdir, to_dict(spec), spec.logs.writers, resume_step=start)
  progress = Progress(total, first, enabled=jax.process_index() == 0)
  profiler = Profiler(workdir, spec.profile.steps, say=progress.say)
  if start is not None:
    progress.say(f'going on from step {start} of {workdir}')
  elif spec.train.init_from:
    progress.say(f'starting from the parameters of {spec.train.init_from}')

  # ---- Compile the step ahead, so that no timed step holds a compilation.
  def next_batch():
    host = next(job.batches)
    return place_batch(mesh, host), job.batches.state

  step_fn = jax.jit(make_train_step(job.loss_fn, tx, schedule, spec.train.accumulation),
                    donate_argnums=0)
  with ledger.charge('data_wait'):
    batch, stream_state = next_batch()
  with ledger.charge('compile'):
    layout = jax.tree.map(lambda x: x.sharding, state)
    compiled = step_fn.lower(state, batch).compile()
    state = jax.device_put(state, layout)
  devices = mesh.devices.size
  with ledger.charge('init'):
    peak = chips.peak_flops(mesh.devices.flat[0])
  flops = counts.train_flops_per_token(spec.model, spec.data.seq_len)
  progress.say(_headline(spec, devices, mesh, ledger.seconds['compile']))

  def evaluate(step):
    for name, evaluator in job.evaluators.items():
      with ledger.charge('eval'):
        begin = time.perf_counter()
        values = evaluator(state.params)
      writers.write(step, {f'eval/{name}/{k}': v for k, v in values.items()})
      progress.evaluated(step, name, values, time.perf_counter() - begin)

  def sample(step):
    if job.sample is None:
      return
    with ledger.charge('sample'):
      for prompt, text in job.sample(state.params):
        writers.write_sample(step, prompt, text)

  def save(step, stream_state):
    with ledger.charge('checkpoint'):
      begin = time.perf_counter()
      checkpoints.save(step, state, stream_state, to_dict(spec))
    progress.saved(step, checkpoints.folder / str(step), time.perf_counter() - begin)

  interruptions = (spec.train.eval_every, spec.train.sample_every, spec.train.checkpoint_every)
  due = lambda every, step: step == total or (every and step % every == 0)
  window = _Window()
  done, saved = first, first
  consumed = None  # The stream's state after the batch of step `done`.
  status = 0
  try:
    for step in range(first + 1, total + 1):
      # Everything in this span is the step's own time but for the wait for data.
      with ledger.charge('step'):
        profiler.before(step)
        state, metrics = compiled(state, batch)
        consumed, done = stream_state, step
        if step < total:  # While the devices work.
          begin = time.perf_counter()
          batch, stream_state = next_batch()
          waited = time.perf_counter() - begin
          # Only a wait that outlasts the devices' work is one.
          if metrics['loss'].is_ready():
            ledger.seconds['data_wait'] += waited
            window.data_wait += waited
        window.add(step, metrics)
        log = due(spec.train.log_every, step)
        if log or any(due(every, step) for every in interruptions):
          window.wait()
        if log:
          values = window.read()
        profiler.after(step)
      if log:
        loss_is_bad = [s for s, loss in values.pop('losses') if not math.isfinite(loss)]
        if flops and values['train/tokens_per_second'] and peak:
          values['train/mfu'] = values['train/tokens_per_second'] * flops / (peak * devices)
        writers.write(step, values)
        progress.log(step, values)
        if loss_is_bad:
          progress.say(f'stopped: the loss is not finite at step {loss_is_bad[0]}; the last '
                       f'checkpoint is step {saved}. Lower optimizer.lr, raise '
                       'optimizer.warmup_steps, or look at the data')
          status = 1
          break
      else:
        progress.tick(step)
      with window.paused():
        if due(spec.train.eval_every, step):
          evaluate(step)
        if due(spec.train.sample_every, step):
          sample(step)
        if due(spec.train.checkpoint_every, step):
          save(step, consumed)
          saved = step
  except KeyboardInterrupt:
    progress.say(f'interrupted after step {done}; saving it')
    if done > saved:
      save(done, consumed)
    status = 130
  finally:
    profiler.close()
    with ledger.charge('checkpoint'):
      checkpoints.close()
    job.batches.close()
    writers.close()
    progress.close()
    ledger.write()
  if status == 130:
    print(f'go on with the same command: it starts from step {done}')
  write_report(workdir)
  return status


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
  abstract = jax.tree.map(lambda p, s: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=s), params,
                          shardings)
  try:
    return restore_params(folder, abstract)
  except ValueError as e:
    raise ConfigError([f'train.init_from={source} holds another model: {str(e).splitlines()[0]}']) from e


def _headline(spec, devices, mesh, compile_seconds):
  """Returns the line that says what is being trained, on what."""
  total = counts.count_params(spec.model)['total']
  axes = ' x '.join(f'{a} {n}' for a, n in mesh.shape.items() if n > 1) or 'one device'
  rows = spec.train.batch_size * spec.data.seq_len
  kind = mesh.devices.flat[0].device_kind
  return (f'{total / 1e6:.2f} M parameters, {rows} tokens a step, {devices} x {kind} ({axes}), '
          f'compiled in {compile_seconds:.1f}s')
