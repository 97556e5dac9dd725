"""Stop training early when an evaluation metric no longer improves."""

import math

from llmjax.evaluate import metrics


class Patience:
  """Count the evaluations since the best one.  The history is read from `metrics.jsonl` when a run resumes.

  limit: evaluations without improvement before stopping; 0 disables it.  metric: key of `metrics.jsonl`, lower is
  better.  step: the step that the run resumes from.
  """

  def __init__(self, limit, metric, workdir, step):
    self.limit, self.metric = limit, metric
    self.best, self.best_step, self.since = math.inf, None, 0
    if limit:
      for logged_step, value in zip(*metrics.curve(metrics.read_metrics(workdir), metric), strict=True):
        if logged_step <= step:
          self.add(logged_step, value)

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
