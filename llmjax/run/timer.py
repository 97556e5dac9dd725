"""The steps between two log lines: their metrics, their time, and how much of the devices they used."""

import contextlib
import time

import jax

from llmjax.model import counts
from llmjax.parallel import chips

# What the devices say of a step that is not a metric of it.
VERDICT = ('bad', 'loss_score', 'norm_score')


class Speed:
  """Turns tokens per second into the part of the devices' peak that the model's own FLOPs use."""

  def __init__(self, spec, mesh):
    device = mesh.devices.flat[0]
    peak, self._is_measured = chips.peak_flops(device), device.platform == 'cpu'
    self._flops = counts.train_flops_per_token(spec.model, spec.data.seq_len, frozen=bool(spec.adapter.kind))
    self._peak = peak and peak * mesh.devices.size

  def mfu(self, tokens_per_second):
    """Returns the fraction, or None for a device whose peak is unknown.

    A measured peak that is exceeded was none: the machine was busy then.  It is unknown from there on.
    """
    used = self._peak and tokens_per_second * self._flops / self._peak
    if used and used > 1 and self._is_measured:
      self._peak = used = None
    return used


class StepTimer:
  """The steps since the last log line: their metrics, and their time."""

  def __init__(self):
    self.data_wait = self.host = 0.0  # Seconds: of waiting for batches; of making them, waiting or not.
    self._pending, self._rows = [], []  # On the devices, and read.
    self._begin = time.perf_counter()

  def add(self, step, position, metrics):
    """position: the stream's state behind the step's batch."""
    self._pending.append((step, position, metrics))

  def wait(self):
    """Waits for the devices to finish every step so far; returns the metrics of those not returned before."""
    found = [{'step': step, 'position': position, **metrics}
             for step, position, metrics in jax.device_get(self._pending)]
    self._pending, self._rows = [], self._rows + found
    return found

  @contextlib.contextmanager
  def paused(self):
    """Leaves the block's time out of the steps'; the devices must be idle when it begins."""
    begin = time.perf_counter()
    yield
    self._begin += time.perf_counter() - begin

  def read(self):
    """Returns the window's metrics, after `wait`, and begins the next window.

    The loss is that of the steps that counted, unless none did.
    """
    now, rows = time.perf_counter(), self._rows
    seconds, count = now - self._begin, len(rows)
    tokens = sum(float(row.get('tokens', row['target_tokens'])) for row in rows)
    counted = [row for row in rows if not row['bad']] or rows
    weight = sum(float(row['target_tokens']) for row in counted)
    hidden = ('step', 'position', 'target_tokens', 'tokens', *VERDICT)
    values = {
        **{f'train/{k}': float(v) for k, v in counted[-1].items() if k not in hidden},
        'train/loss': sum(float(r['loss']) * float(r['target_tokens']) for r in counted) / max(weight, 1),
        'train/target_tokens': sum(float(row['target_tokens']) for row in rows),
        'train/step_seconds': seconds / count,
        'train/data_wait_seconds': self.data_wait / count,
        'train/tokens_per_second': tokens / seconds,
        'host_seconds': self.host / count,
    }
    self._rows, self.data_wait, self.host, self._begin = [], 0.0, 0.0, now
    return values
