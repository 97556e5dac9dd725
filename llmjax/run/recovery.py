"""What a run does about bad steps and about devices that compute wrongly.

Devices find bad steps while they train (train/guard.py).  The host reads the verdicts where it waits for the devices
anyway: before it logs, evaluates, samples or saves.
"""

import json
import pathlib

from llmjax.parallel import distributed
from llmjax.run.callback import Callback
from llmjax.train.guard import explain
from llmjax.train.replicas import Replicas

DUMPS = 20  # Largest number of bad batches that an attempt writes to files.
WRONG_DEVICE = 'The device, or its memory, computes wrongly: replace it; the same command resumes'


class Recovery(Callback):
  """Skip bad steps, roll back, or stop, as the guard group says.  All processes decide the same."""

  def __init__(self, guard):
    """guard: GuardSpec."""
    self._guard, self._replicas = guard, None
    self._bad_in_row = self._dumps = 0
    self._rollbacks, self._target = 0, None  # Rollbacks to the same step.
    self._failure = None  # (reason, advice) of the stop.

  def on_start(self, run):
    if self._guard.checksum_every:
      with run.goodput.charge('compile'):
        self._replicas = Replicas(run.state.params, run.mesh)

  def needs_values(self, run):
    return self._replicas is not None and run.is_due(self._guard.checksum_every)

  def on_values(self, run, rows):
    every = (self._guard.checksum_every, run.spec.train.checkpoint_every)
    if self._replicas and any(run.is_due(n) for n in every):
      devices, names, sure = self._replicas.compare(self._replicas.sums(run.state.params))
      if devices:
        self._report_corruption(run, devices, names, sure)
        return
    for row in rows:
      self._bad_in_row = self._bad_in_row + 1 if row['bad'] else 0
      if row['bad']:
        self._handle(run, row)
        if run.is_ending:
          return

  def after_step(self, run):
    if self._failure is None:
      return
    reason, advice = self._failure
    run.heart.beat(run.step, 'save')
    run.settle()
    run.say(f'stopped: {reason}; the last checkpoint is step {run.saved}. {advice}')
    run.event('stopped', reason=reason, checkpoint=run.saved)

  def on_rollback(self, run, rollback):
    seconds = run.goodput.go_back(run.step)
    self._rollbacks = self._rollbacks + 1 if run.step == self._target else 1
    self._target, self._bad_in_row = run.step, 0
    run.event('rollback', rollback.at, to=run.step, lost_steps=rollback.lost_steps, lost_seconds=round(seconds, 3),
              skipped_batches=rollback.skipped_batches)
    run.say(f'{rollback.reason}: rolled back to step {run.step}; {rollback.skipped_batches} batches are skipped')

  def _handle(self, run, row):
    """Apply the policy of the guard to one bad step.  row: its metrics."""
    guard, step, reason, dump = self._guard, row['step'], explain(row), self._dump(run, row)
    run.event('bad_step', step, reason=reason, loss=float(row['loss']), grad_norm=float(row['grad_norm']),
              batch=row['position'] - 1, policy=guard.policy, **{'dump': dump} if dump else {})
    advice = 'Lower optimizer.lr, raise optimizer.warmup_steps, or look at the data'
    advice += f': the batch is in {dump}' if dump else ''
    rollbacks = self._rollbacks if run.saved == self._target else 0
    if guard.policy == 'abort':
      self._stop(run, f'{reason} at step {step}', advice)
    elif guard.policy == 'rollback' and rollbacks < guard.max_bad_steps:
      run.roll_back(row['position'], f'{reason} at step {step}', step)
    elif guard.policy == 'rollback':
      self._stop(run, f'{reason} at step {step}, after {rollbacks} rollbacks to step {run.saved} '
                 '(guard.max_bad_steps)', advice)
    elif self._bad_in_row > guard.max_bad_steps:
      self._stop(run, f'{reason} at step {step}, the {self._bad_in_row}th bad step in a row (guard.max_bad_steps)',
                 advice)
    else:
      run.say(f'step {step} is skipped: {reason}' + (f'; its batch is in {dump}' if dump else ''))

  def _stop(self, run, reason, advice):
    self._failure = reason, advice
    run.stop(1)

  def _report_corruption(self, run, devices, names, sure):
    """Stop because copies of the same parameters differ between devices."""
    listed = ', '.join(f'{d.id} ({d.device_kind}, process {d.process_index})' for d in devices)
    arrays = ', '.join(names[:3]) + (f' and {len(names) - 3} more' if len(names) > 3 else '')
    if sure:
      text = f'the parameters on device {listed} differ from their copies on all other devices'
    else:
      text = f'copies of the same parameters differ between devices {listed}; with two copies, either may be wrong'
    run.event('corruption', devices=[d.id for d in devices], sure=sure, arrays=names,
              processes=sorted({d.process_index for d in devices}))
    self._stop(run, f'{text}, at step {run.step}: {arrays}', WRONG_DEVICE)

  def _dump(self, run, row):
    """Write the batch of a bad step to `bad_steps/<step>.json`; returns the file's name, or '' if none was written."""
    describe = run.job.describe
    if describe is None or self._dumps >= DUMPS or not distributed.is_first():
      return ''
    self._dumps += 1
    name = f'bad_steps/{row["step"]}.json'
    try:
      content = {'step': row['step'], 'batch': row['position'] - 1, 'reason': explain(row),
                 'rows': describe(row['position'] - 1)}
      file = pathlib.Path(run.workdir) / name
      file.parent.mkdir(exist_ok=True)
      file.write_text(json.dumps(content, ensure_ascii=False, indent=1) + '\n', encoding='utf-8')
    except (OSError, ValueError) as e:  # A missing dump must not end a run that could continue.
      run.say(f'warning: {name} was not written: {e}')
      return ''
    return name
