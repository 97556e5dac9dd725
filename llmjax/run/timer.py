"""Aggregate metrics, step time, throughput and MFU over the steps between two log lines."""

import contextlib
import time

import jax

from llmjax.model import counts
from llmjax.parallel import chips

# Outputs of the step guard, which are not metrics.
GUARD_OUTPUTS = ('bad', 'loss_score', 'norm_score')


class Speed:
  """Convert tokens per second to model FLOPs utilization (MFU, arXiv:2204.02311, appendix B)."""

  def __init__(self, spec, mesh):
    device = mesh.devices.flat[0]
    peak, self._is_measured = chips.peak_flops(device), device.platform == 'cpu'
    self._flops = counts.train_flops_per_token(spec.model, spec.data.seq_len, frozen=bool(spec.adapter.kind))
    self._peak = peak and peak * mesh.devices.size

  def mfu(self, tokens_per_second):
    """Return the MFU as a fraction, or None if the peak FLOP/s of the device is unknown.

    A measured peak that training exceeds was measured on a busy machine, so it is unknown from then on.
    """
    mfu = self._peak and tokens_per_second * self._flops / self._peak
    if mfu and mfu > 1 and self._is_measured:
      self._peak = mfu = None
    return mfu


class StepTimer:
  """Metrics and wall time of the steps since the last log line."""

  def __init__(self):
    self.data_wait = self.host = 0.0  # Seconds that steps waited for batches; that the host took to load them.
    self._pending, self._rows = [], []  # Metrics on the devices, and on the host.
    self._begin, self._paused = time.perf_counter(), None

  def add(self, step, position, metrics):
    """Add the metrics of a dispatched step.  position: state of the data stream after its batch."""
    self._pending.append((step, position, metrics))

  def wait(self):
    """Wait for all dispatched steps; return the metrics of those not returned before."""
    rows = [{'step': step, 'position': position, **metrics}
            for step, position, metrics in jax.device_get(self._pending)]
    self._pending, self._rows = [], self._rows + rows
    return rows

  @contextlib.contextmanager
  def paused(self):
    """Exclude the time of the block from the step time.  The devices must be idle when it begins."""
    self._paused = time.perf_counter()
    yield
    self._begin += time.perf_counter() - self._paused
    self._paused = None

  def read(self):
    """Return the metrics of the steps so far and start anew.  Call `wait` first.

    The loss is the mean per target token over the steps that were applied, or over all steps if none was.
    """
    now, rows = self._paused or time.perf_counter(), self._rows
    seconds, count = now - self._begin, len(rows)
    tokens = sum(float(row.get('tokens', row['target_tokens'])) for row in rows)
    applied = [row for row in rows if not row['bad']] or rows
    weight = sum(float(row['target_tokens']) for row in applied)
    hidden = ('step', 'position', 'target_tokens', 'tokens', *GUARD_OUTPUTS)
    values = {
        **{f'train/{k}': float(v) for k, v in applied[-1].items() if k not in hidden},
        'train/loss': sum(float(r['loss']) * float(r['target_tokens']) for r in applied) / max(weight, 1),
        'train/target_tokens': sum(float(row['target_tokens']) for row in rows),
        'train/step_seconds': seconds / count,
        'train/data_wait_seconds': self.data_wait / count,
        'train/tokens_per_second': tokens / seconds,
        'host_seconds': self.host / count,
    }
    self._rows, self.data_wait, self.host, self._begin = [], 0.0, 0.0, now
    return values
