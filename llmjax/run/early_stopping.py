"""When to stop for want of progress on held-out text."""

import math

from llmjax.evaluate import metrics


class Patience:
  """Counts evaluations since the best one.  Its memory is `metrics.jsonl`, so a resumed run goes on counting."""

  def __init__(self, limit, metric, workdir, step):
    """limit: evaluations without a new best, 0 for never.  metric: its key.  step: where the run goes on."""
    self.limit, self.metric = limit, metric
    self.best, self.best_step, self.since = math.inf, None, 0
    if limit:
      for at, value in zip(*metrics.curve(metrics.read_metrics(workdir), metric), strict=True):
        if at <= step:
          self.add(at, value)

  def add(self, step, value):
    """Notes an evaluation."""
    if value < self.best:
      self.best, self.best_step, self.since = value, step, 0
    else:  # NaN is no progress.
      self.since += 1

  def is_over(self):
    return 0 < self.limit <= self.since

  def reason(self):
    """Returns why the run stops, in one line."""
    best = f'{self.best:.4f} at step {self.best_step}' if self.best_step is not None else 'never finite'
    return (f'{self.metric} has no new best in {self.since} evaluations (train.patience={self.limit}); '
            f'the best was {best}')
