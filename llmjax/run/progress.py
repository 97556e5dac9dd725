"""Print the progress of a run: one line per logged step, evaluation, rollout and checkpoint.

  step  200/1000  20%  loss 3.412  lr 2.9e-03  gnorm 0.81  8.9k tok/s  mfu 41%  wait 0.1%  eta 2:14
  eval  200/1000  validation  loss 3.301  ppl 27.1  1.921 bits/byte  0.9s
  save  200/1000  checkpoints/200  702 MB  0.4s

On a terminal, a live line counts the steps in between.  Lines are fitted to the terminal's width: the least important
fields are dropped, and sentences are wrapped.  On a pipe, all lines are complete.
"""

import math
import shutil
import sys
import textwrap
import time

from llmjax.evaluate.metrics import format_loss

# At most ten repaints per second, so that a terminal over SSH does not slow down short steps.
REPAINT_SECONDS = 0.1


def format_duration(seconds):
  """Format seconds as '0.4s', '42s', '2:14', '3:05:09' or '2d 4h'; unknown values as '?'."""
  if seconds is None or not math.isfinite(seconds) or seconds < 0:
    return '?'
  if seconds < 9.95:
    return f'{seconds:.1f}s'
  whole = round(seconds)
  if whole < 60:
    return f'{whole}s'
  minutes, s = divmod(whole, 60)
  hours, m = divmod(minutes, 60)
  if hours >= 24:
    return f'{hours // 24}d {hours % 24}h'
  return f'{hours}:{m:02}:{s:02}' if hours else f'{m}:{s:02}'


def format_count(value):
  """Format a number with 2 or 3 digits and a unit: 8912 -> '8.9k', 58.47e6 -> '58.5M'."""
  if value is None or not math.isfinite(value):
    return '?' if value is None else str(value)
  if abs(value) < 1e3:
    return f'{value:.0f}' if value == int(value) or abs(value) >= 100 else f'{value:.1f}'
  # The unit is chosen after rounding: 999,960 is 1.0M.
  divisor, suffix = next((d, s) for d, s in ((1e3, 'k'), (1e6, 'M'), (1e9, 'G'), (1e12, 'T'))
                         if abs(value) < d * 999.95 or s == 'T')
  scaled = value / divisor
  return f'{scaled:.0f}{suffix}' if abs(scaled) >= 99.95 else f'{scaled:.1f}{suffix}'


def format_bytes(value):
  """Format a size with decimal units: 702_000_000 -> '702 MB'."""
  text = format_count(value)
  return f'{text[:-1]} {text[-1]}B' if text[-1] in 'kMGT' else f'{text} B'


class Progress:
  """Print the progress lines of a run.

  total_steps: the last step.  start_step: the step that the run resumed from.  enabled: False on all processes but the
  first.  clock: monotonic seconds.
  """

  def __init__(self, total_steps, start_step=0, *, stream=None, enabled=True, clock=time.monotonic):
    self._total = total_steps
    self._stream = sys.stdout if stream is None else stream
    self._enabled = enabled
    self._clock = clock
    self._live = enabled and self._stream.isatty()
    self._live_length = 0
    self._painted = -math.inf
    self._last_step, self._last_time = start_step, None
    self._pace = None  # Seconds per step, including evaluations and checkpoints.
    self._loss = ''

  def log(self, step, metrics, note=''):
    """Print the line of a step, and a note below it.  metrics: such as `train/loss`; missing ones are left out."""
    now = self._clock()
    self._note_pace(step, now, metrics.get('train/step_seconds'))
    fields = [self._head('step', step), percent := f'{self._percent(step)}%']
    loss = metrics.get('train/loss')
    if loss is not None:
      self._loss = f'loss {format_loss(loss)}'
      fields.append(self._loss)
    for key, form in (('train/lr', 'lr {:.1e}'), ('train/grad_norm', 'gnorm {:.2f}')):
      if metrics.get(key) is not None:
        fields.append(form.format(metrics[key]))
    if metrics.get('train/tokens_per_second') is not None:
      fields.append(f'{format_count(metrics["train/tokens_per_second"])} tok/s')
    if metrics.get('train/mfu') is not None:
      fields.append(f'mfu {_percentage(metrics["train/mfu"])}')
    wait, seconds = metrics.get('train/data_wait_seconds'), metrics.get('train/step_seconds')
    if wait is not None and seconds:
      fields.append(f'wait {100 * wait / seconds:.1f}%')
    fields.append(f'eta {format_duration(self.seconds_left(step))}')
    self._print(self._fit(fields, ('wait', 'lr', percent, 'gnorm', 'mfu')))
    if note:
      self.say(f'      {note}')

  def tick(self, step):
    """Update the live line after a step that is not logged.  Does nothing on a pipe."""
    if not self._live:
      return
    now = self._clock()
    if now - self._painted < REPAINT_SECONDS:
      return
    self._painted = now
    fields = [self._head('step', step), f'{self._percent(step)}%', self._loss,
             f'eta {format_duration(self.seconds_left(step))}' if self._pace else '']
    text = '  '.join(p for p in fields if p)[:self._width]
    self._stream.write('\r' + text.ljust(self._live_length))
    self._stream.flush()
    self._live_length = len(text)

  def evaluated(self, step, name, metrics, seconds=None, compiling=0.0):
    """Print the line of an evaluation.  metrics: `loss` (nats), `perplexity`, `bits_per_byte`, `accuracy`, ...

    seconds: excluding compilation.  compiling: seconds of compilation.
    """
    fields = [self._head('eval', step), name]
    for key, form in (('loss', 'loss {:.3f}'), ('perplexity', 'ppl {:.4g}'),
                      ('bits_per_byte', '{:.3f} bits/byte'), ('accuracy', 'accuracy {:.1%}'),
                      ('margin', 'margin {:.3f}'), ('chosen_logprob', 'log p(chosen) {:.1f}'),
                      ('reward', 'reward {:.3f}'), ('teacher_kl', 'KL to the teacher {:.3f}')):
      value = metrics.get(key, metrics.get(f'eval/{name}/{key}'))
      if value is not None:
        fields.append(form.format(value))
    fields += _duration_fields(seconds, compiling)
    self._print(self._fit(fields, ('compiled', 'ppl', 'margin', 'log p', 'loss')))

  def rollout(self, step, metrics, seconds, compiling=0.0):
    """Print the line of a rollout.  metrics: `reward`, `tokens`, `ended` and optionally `kl` (nats per completion).

    seconds: excluding compilation.  compiling: seconds of compilation.
    """
    fields = [self._head('roll', step)] + [form.format(metrics[key]) for key, form in (
        ('reward', 'reward {:.3f}'), ('tokens', '{:.1f} tokens each'), ('ended', '{:.0%} ended'),
        ('kl', 'kl {:.3g} nats')) if key in metrics]
    self._print(self._fit(fields + _duration_fields(seconds, compiling), ('compiled',)))

  def saved(self, step, path, seconds=None, size=None):
    """Print the line of a checkpoint.  seconds: how long training waited for it.  size: bytes."""
    fields = [self._head('save', step), str(path)]
    fields += [format_bytes(size)] if size is not None else []
    fields += _duration_fields(seconds)
    over = len('  '.join(fields)) - self._width
    if over > 0:  # The end of the path is the most specific part.
      fields[1] = '…' + fields[1][over + 1:]
    self._print('  '.join(fields))

  def say(self, text):
    """Print any other text without breaking the live line.  Text of several lines, such as a table, is not wrapped."""
    if len(text) > self._width and '\n' not in text:
      text = textwrap.fill(text, int(self._width), subsequent_indent='      ', break_long_words=False,
                           break_on_hyphens=False)
    self._print(text)

  @property
  def _width(self):
    """Maximum characters per line: one less than the terminal's columns; unlimited on a pipe."""
    return max(shutil.get_terminal_size().columns - 1, 20) if self._live else math.inf

  def _fit(self, fields, optional):
    """Join fields into a line.  optional: prefixes of the fields to drop, in this order, until the line fits."""
    for prefix in optional:
      if len('  '.join(fields)) > self._width:
        fields = [field for field in fields if not field.startswith(prefix)]
    return '  '.join(fields)

  def seconds_left(self, step):
    """Return the estimated seconds to the last step, or None before the first logged step."""
    return None if self._pace is None else max(0, self._total - step) * self._pace

  def close(self):
    """Clear the live line."""
    self._clear()

  def _note_pace(self, step, now, step_seconds):
    """Update the estimate of seconds per step from the time since the last logged step."""
    steps = step - self._last_step
    if self._last_time is None:
      # The time before the first log includes compilation, so it is not used.
      self._pace = step_seconds
    elif steps > 0:
      pace = (now - self._last_time) / steps
      # An exponential average with weight 0.5: adapts within a few logs, and damps a single slow checkpoint.
      self._pace = pace if self._pace is None else 0.5 * self._pace + 0.5 * pace
    self._last_step, self._last_time = step, now

  def _head(self, kind, step):
    return f'{kind}  {step:>{len(str(self._total))}}/{self._total}'

  def _percent(self, step):
    # Rounded down, so that only the last step is 100%.
    return f'{100 * step // self._total if self._total else 100:>3}'

  def _clear(self):
    if self._live_length:
      self._stream.write('\r' + ' ' * self._live_length + '\r')
      self._stream.flush()
      self._live_length = 0

  def _print(self, text):
    if not self._enabled:
      return
    self._clear()
    self._stream.write(text + '\n')
    self._stream.flush()


def _percentage(fraction):
  """Format 0.41 as '41%' and 0.013 as '1.3%'."""
  percent = 100 * fraction
  return f'{percent:.0f}%' if percent >= 9.95 or percent == 0 else f'{percent:.1f}%'


def _duration_fields(seconds, compiling=0.0):
  """Return the fields with the duration of an operation and of its compilation."""
  return [format_duration(seconds)] * (seconds is not None) + [f'compiled in {format_duration(compiling)}'] * (
      compiling >= 0.05)


class Stages:
  """Print the stages of a job: one line per stage, updated in place on a terminal and every 10 s on a pipe.

  Call it with (stage, number done, total or None), and first with 0 done when the stage begins.
  unit: what is counted.  clock: monotonic seconds.
  """

  def __init__(self, stream=None, unit='documents', clock=time.monotonic):
    self._stream, self._unit, self._clock = stream or sys.stderr, unit, clock
    self._terminal = self._stream.isatty()
    self._stage, self._start, self._shown = None, 0.0, 0.0
    self._line = self._summary = ''  # Shown during and after the stage.

  def __call__(self, stage, done, total):
    now = self._clock()
    if stage != self._stage:
      self.finish()
      self._stage, self._start, self._shown = stage, now, now
    seconds = now - self._start
    rate = done / seconds if seconds > 0.1 else 0.0
    self._summary = f'{stage}: {done:,} {self._unit}' if done else stage
    if not done:
      self._line = f'{stage} ...'
    elif total is None:
      self._line = f'{stage}: {done:,} {self._unit}, {rate:,.0f}/s'
    else:
      left = f', {(total - done) / rate:,.0f} s left' if rate and done < total else ''
      self._line = f'{stage}: {done:,} of {total:,} {self._unit}, {rate:,.0f}/s{left}'
    if now - self._shown >= (0.2 if self._terminal else 10.0) or not done:
      self._shown = now
      self._write(self._line, final=False)

  def finish(self, note=''):
    """End the current stage and print its duration, followed by a note."""
    if self._stage is not None:
      self._write(f'{self._summary}, {self._clock() - self._start:.1f} s{note}', final=True)
      self._stage = None

  def _write(self, line, final):
    if self._terminal:
      self._stream.write(f'\r\x1b[K{line}' + ('\n' if final else ''))
    else:
      self._stream.write(line + '\n')
    self._stream.flush()
