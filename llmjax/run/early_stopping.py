"""Stop training early when an evaluation metric no longer improves."""

import math

from llmjax.evaluate import metrics
from llmjax.run.callback import Callback


class EarlyStopping(Callback):
  """Count the evaluations since the best one.  The history is read from `metrics.jsonl` when a run resumes.

  limit: evaluations without improvement before stopping; 0 disables it.  metric: key of `metrics.jsonl`, lower is
  better.  step: the step that the run resumes from.
  """

  def __init__(self, limit, metric, workdir, step):
    self.limit, self.metric = limit, metric
    self._read(workdir, step)

  def _read(self, workdir, step):
    """Count the logged evaluations up to a step."""
    self.best, self.best_step, self.since = math.inf, None, 0
    if self.limit:
      for logged_step, value in zip(*metrics.curve(metrics.read_metrics(workdir), self.metric), strict=True):
        if logged_step <= step:
          self.add(logged_step, value)

  def on_evaluation(self, run, name, values):
    prefix = f'eval/{name}/'
    if self.metric.startswith(prefix) and self.metric.removeprefix(prefix) in values:
      self.add(run.step, float(values[self.metric.removeprefix(prefix)]))

  def on_rollback(self, run, rollback):
    self._read(run.workdir, run.step)

  def after_step(self, run):
    if self.is_over() and run.step < run.total and not run.is_ending:
      run.say(f'stopped at step {run.step}: {self.reason()}')
      run.event('early_stop', reason=self.reason(), best=self.best, best_step=self.best_step)
      run.stop(0)

  def add(self, step, value):
    """Record an evaluation."""
    if value < self.best:
      self.best, self.best_step, self.since = value, step, 0
    else:  # NaN is not an improvement.
      self.since += 1

  def is_over(self):
    return 0 < self.limit <= self.since

  def reason(self):
    """Return the reason for stopping, in one line."""
    best = f'{self.best:.4f} at step {self.best_step}' if self.best_step is not None else 'never finite'
    return (f'{self.metric} has not improved in {self.since} evaluations (train.patience={self.limit}); '
            f'the best was {best}')
