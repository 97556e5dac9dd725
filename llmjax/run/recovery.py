"""What goes wrong in a run: the judgement of its steps, and what is done about them.

Devices judge every step (train/guard.py).  The host reads the verdicts where it waits for them anyway: at log lines,
and before it evaluates, samples or saves.
"""

import dataclasses
import json
import pathlib

from llmjax.parallel import distributed
from llmjax.train.guard import explain
from llmjax.train.replicas import Replicas

DUMPS = 20  # Bad batches that a sitting writes down, at most.


@dataclasses.dataclass
class Verdict:
  """Why the run cannot simply go on after a step.  position: the stream's state behind the batch to roll back over."""

  step: int
  reason: str
  advice: str
  position: int | None = None

  @property
  def stops(self):
    return self.position is None


class Recovery:
  """Judges the steps of a harness.Loop, and goes back or gives up."""

  def __init__(self, guard):
    """guard: a GuardSpec."""
    self.guard = guard
    self.bad_in_row = self.rollbacks = self.dumps = 0
    self.replicas, self.sums = None, []  # Checksums of parameters, at their steps.

  def prepare(self, loop):
    """Compiles what compares copies of parameters, where the run wants it."""
    if self.guard.checksum_every:
      self.replicas = Replicas(loop.state.params, loop.job.mesh)

  def add_sums(self, loop, step):
    """Starts the checksums of a step's parameters, where they are due; returns them, on the devices, or None."""
    often = (self.guard.checksum_every, loop.spec.train.checkpoint_every)
    if not self.replicas or not any(loop.due(every, step) for every in often):
      return None
    self.sums.append((step, self.replicas.sums(loop.state.params)))
    return self.sums[-1][1]

  def saved(self):
    """Notes that there is a newer checkpoint to go back to."""
    self.rollbacks = 0

  def inspect(self, loop, rows):
    """Returns a Verdict on the steps since the last look, or None when the run simply goes on.

    rows: their metrics.  All processes see the same and decide the same.
    """
    guard = self.guard
    sums, self.sums = self.sums, []
    for step, found in sums:
      devices, names, sure = self.replicas.compare(found)
      if devices:
        return self._corruption(loop, step, devices, names, sure)
    for row in rows:
      self.bad_in_row = self.bad_in_row + 1 if row['bad'] else 0
      if not row['bad']:
        continue
      dump = self._dump(loop, row)
      reason, step = explain(row), row['step']
      loop.writers.event(step, 'bad_step', reason=reason, loss=float(row['loss']),
                         grad_norm=float(row['grad_norm']), batch=row['position'] - 1, policy=guard.policy,
                         **{'dump': dump} if dump else {})
      advice = 'Lower optimizer.lr, raise optimizer.warmup_steps, or look at the data'
      if dump:
        advice += f': the batch is in {dump}'
      if guard.policy == 'abort':
        return Verdict(step, f'{reason} at step {step}', advice)
      if guard.policy == 'rollback':
        if self.rollbacks < guard.max_bad_steps:
          return Verdict(step, f'{reason} at step {step}', '', row['position'])
        return Verdict(step, f'{reason} at step {step}, after {self.rollbacks} rollbacks to step {loop.saved} '
                       '(guard.max_bad_steps)', advice)
      if self.bad_in_row > guard.max_bad_steps:
        return Verdict(step, f'{reason} at step {step}, the {self.bad_in_row}th bad step in a row '
                       '(guard.max_bad_steps)', advice)
      loop.progress.say(f'step {step} is left out: {reason}' + (f'; its batch is in {dump}' if dump else ''))
    return None

  def _corruption(self, loop, step, devices, names, sure):
    """Returns the Verdict on devices whose copies of parameters differ from the others'."""
    listed = ', '.join(f'{d.id} ({d.device_kind}, process {d.process_index})' for d in devices)
    arrays = ', '.join(names[:3]) + (f' and {len(names) - 3} more' if len(names) > 3 else '')
    if sure:
      text = f'device {listed} holds other parameters than the devices that should hold the same'
    else:
      text = f'devices {listed} should hold the same parameters and do not; two copies cannot say which is wrong'
    loop.writers.event(step, 'corruption', devices=[d.id for d in devices], sure=sure, arrays=names,
                       processes=sorted({d.process_index for d in devices}))
    return Verdict(step, f'{text}, at step {step}: {arrays}',
                   'The device computes wrongly, or its memory does: replace it, and the same command goes on')

  def _dump(self, loop, row):
    """Writes a bad step's batch to `bad_steps/<step>.json`; returns the file's name, or '' where it wrote none."""
    describe = loop.job.describe
    if describe is None or self.dumps >= DUMPS or not distributed.is_first():
      return ''
    self.dumps += 1
    name = f'bad_steps/{row["step"]}.json'
    try:
      content = {'step': row['step'], 'batch': row['position'] - 1, 'reason': explain(row),
                 'rows': describe(row['position'] - 1)}
      file = pathlib.Path(loop.workdir) / name
      file.parent.mkdir(exist_ok=True)
      file.write_text(json.dumps(content, ensure_ascii=False, indent=1) + '\n', encoding='utf-8')
    except (OSError, ValueError) as e:  # It is there to help; it must not end a run that goes on.
      loop.progress.say(f'warning: {name} was not written: {e}')
      return ''
    return name

  def give_up(self, loop, verdict):
    """Says why the run stops; returns the exit status."""
    loop.heart.beat(loop.done, 'save')
    loop.settle(wait=True)
    loop.progress.say(f'stopped: {verdict.reason}; the last checkpoint is step {loop.saved}. {verdict.advice}')
    loop.writers.event(loop.done, 'stopped', reason=verdict.reason, checkpoint=loop.saved)
    return 1

  def roll_back(self, loop, verdict):
    """Goes back to the newest checkpoint, and on behind the bad batch; returns the step."""
    lost = loop.done
    loop.heart.beat(lost, 'save')
    loop.settle(wait=True)
    target, drawn, position = loop.go_back(self.guard.rollback_skip_batches, verdict.position)
    seconds = loop.goodput.go_back(target)
    self.rollbacks, self.bad_in_row, self.sums = self.rollbacks + 1, 0, []
    loop.writers.event(verdict.step, 'rollback', to=target, lost_steps=lost - target,
                       lost_seconds=round(seconds, 3), skipped_batches=position - drawn)
    loop.progress.say(f'{verdict.reason}: back to step {target}, and on with {position - drawn} batches left out')
    loop.account()
    return target
