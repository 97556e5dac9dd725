"""Checkpoints every `train.checkpoint_every` steps, and at the end."""

import contextlib

from llmjax.checkpoint.recorded import absolute_paths
from llmjax.config import to_dict
from llmjax.run.callback import Callback


class Saving(Callback):
  """Save checkpoints in the background, and report when they are verified or failed."""

  def __init__(self, checkpoints):
    """checkpoints: Checkpoints of the run."""
    self._checkpoints = checkpoints

  def needs_values(self, run):
    return run.is_due(run.spec.train.checkpoint_every)

  def at_pause(self, run):
    if run.is_due(run.spec.train.checkpoint_every):
      self.save(run)

  def after_step(self, run):
    if not self.settle(run):
      run.stop(1)

  def on_end(self, run):
    run.heart.beat(run.step, 'save')
    saved = self.settle(run, wait=True)
    if run.status == 1:
      return
    if run.step > run.saved:
      self.save(run)
      saved = self.settle(run, wait=True)
    if not saved or run.saved != run.step:
      run.stop(1)
    elif not run.status:
      run.is_finished = True
      run.event('done')

  def save(self, run):
    """Begin to save the state."""
    with run.phase('checkpoint', 'save'):
      at, metrics = run.evaluated
      self._checkpoints.save(run.step, run.trainable.pack(run.state), run.data_state(),
                             absolute_paths(to_dict(run.spec)), metrics, at)
    run.call('flush')

  def settle(self, run, wait=False):
    """Report the saves that ended; returns False when one failed and the run has to stop for it.

    wait: for the one in progress as well.
    """
    with run.goodput.charge('checkpoint') if wait else contextlib.nullcontext():
      saves = self._checkpoints.finished(wait)
    continues = True
    for save in saves:
      if not save.problem:
        run.saved = save.step
        path = run.workdir / 'checkpoints' / str(save.step)  # As the user wrote it.
        run.progress.saved(save.step, path, save.seconds, save.size or None)
        if save.note:
          run.say(save.note)
        continue
      continues = run.spec.checkpoint.on_error == 'continue'
      last = f'the last good checkpoint is step {run.saved}' if run.saved else 'there is no good checkpoint'
      run.say(f'{save.problem}; {last}' + (
          '' if continues else '. Stopped; --config.checkpoint.on_error=continue would train on'))
      run.event('save_failed', reason=save.problem, checkpoint=run.saved)
    return continues
