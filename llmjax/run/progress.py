"""What a run says while it works: one line per log step, in one voice.

  step  200/1000  20%  loss 3.412  lr 2.9e-03  gnorm 0.81  8.9k tok/s  mfu 41%  wait 0.1%  eta 2:14
  eval  200/1000  validation  loss 3.301  ppl 27.1  1.921 bits/byte  0.9s
  save  200/1000  checkpoints/200  702 MB  0.4s

On a terminal a live line counts the steps between these, and lines are kept within its width: what matters least is
left out, and sentences are wrapped between words.  On a pipe there are only whole lines.
"""

import math
import shutil
import sys
import textwrap
import time

from llmjax.evaluate.metrics import format_loss

# At most ten repaints a second: a terminal over SSH must not slow short steps down.
REPAINT_SECONDS = 0.1


def format_duration(seconds):
  """Returns '0.4s', '42s', '2:14', '3:05:09' or '2d 4h'; '?' when it is unknown."""
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
  """Returns 3 significant digits with k, M, G or T: 8912 -> '8.9k', 58.47e6 -> '58.5M'."""
  if value is None or not math.isfinite(value):
    return '?' if value is None else str(value)
  if abs(value) < 1e3:
    return f'{value:.0f}' if value == int(value) or abs(value) >= 100 else f'{value:.1f}'
  # 999,960 rounds to 1.0M: the unit is chosen after rounding.
  divisor, suffix = next((d, s) for d, s in ((1e3, 'k'), (1e6, 'M'), (1e9, 'G'), (1e12, 'T'))
                         if abs(value) < d * 999.95 or s == 'T')
  scaled = value / divisor
  return f'{scaled:.0f}{suffix}' if abs(scaled) >= 99.95 else f'{scaled:.1f}{suffix}'


def format_bytes(value):
  """Returns a size in powers of ten, as disks are sold: 702_000_000 -> '702 MB'."""
  text = format_count(value)
  return f'{text[:-1]} {text[-1]}B' if text[-1] in 'kMGT' else f'{text} B'


class Progress:
  """Prints a run's lines.  total_steps: the last step.  start_step: the step resumed from.

  enabled: False on every process but the first.  clock: seconds, monotonic.
  """

  def __init__(self, total_steps, start_step=0, *, stream=None, enabled=True,
               clock=time.monotonic):
    self._total = total_steps
    self._stream = sys.stdout if stream is None else stream
    self._enabled = enabled
    self._clock = clock
    self._live = enabled and self._stream.isatty()
    self._live_length = 0
    self._painted = -math.inf
    self._last_step, self._last_time = start_step, None
    self._pace = None  # Seconds per step, evaluations and checkpoints included.
    self._loss = ''

  def log(self, step, metrics, note=''):
    """Prints the step's line.  metrics: keys such as `train/loss`; what is missing is left out.  note: its end."""
    now = self._clock()
    self._note_pace(step, now, metrics.get('train/step_seconds'))
    parts = [self._head('step', step), percent := f'{self._percent(step)}%']
    loss = metrics.get('train/loss')
    if loss is not None:
      self._loss = f'loss {format_loss(loss)}'
      parts.append(self._loss)
    for key, form in (('train/lr', 'lr {:.1e}'), ('train/grad_norm', 'gnorm {:.2f}')):
      if metrics.get(key) is not None:
        parts.append(form.format(metrics[key]))
    if metrics.get('train/tokens_per_second') is not None:
      parts.append(f'{format_count(metrics["train/tokens_per_second"])} tok/s')
    if metrics.get('train/mfu') is not None:
      parts.append(f'mfu {_percentage(metrics["train/mfu"])}')
    wait, seconds = metrics.get('train/data_wait_seconds'), metrics.get('train/step_seconds')
    if wait is not None and seconds:
      parts.append(f'wait {100 * wait / seconds:.1f}%')
    parts.append(f'eta {format_duration(self.seconds_left(step))}')
    self._print(self._fit(parts, ('wait', 'lr', percent, 'gnorm', 'mfu')))
    if note:
      self.say(f'      {note}')

  def tick(self, step):
    """Repaints the live line after a step that is not logged; does nothing on a pipe."""
    if not self._live:
      return
    now = self._clock()
    if now - self._painted < REPAINT_SECONDS:
      return
    self._painted = now
    parts = [self._head('step', step), f'{self._percent(step)}%', self._loss,
             f'eta {format_duration(self.seconds_left(step))}' if self._pace else '']
    text = '  '.join(p for p in parts if p)[:self._width]
    self._stream.write('\r' + text.ljust(self._live_length))
    self._stream.flush()
    self._live_length = len(text)

  def evaluated(self, step, name, metrics, seconds=None, compiling=0.0):
    """Prints an evaluation's line.  metrics: `loss` (nats), `perplexity`, `bits_per_byte`, `accuracy`, ...

    seconds: without those of `compiling`.
    """
    parts = [self._head('eval', step), name]
    for key, form in (('loss', 'loss {:.3f}'), ('perplexity', 'ppl {:.4g}'),
                      ('bits_per_byte', '{:.3f} bits/byte'), ('accuracy', 'accuracy {:.1%}'),
                      ('margin', 'margin {:.3f}'), ('chosen_logprob', 'log p(chosen) {:.1f}'),
                      ('reward', 'reward {:.3f}'), ('teacher_kl', 'KL to the teacher {:.3f}')):
      value = metrics.get(key, metrics.get(f'eval/{name}/{key}'))
      if value is not None:
        parts.append(form.format(value))
    self._print(self._fit(parts + _took(seconds, compiling), ('compiled', 'ppl', 'margin', 'log p', 'loss')))

  def rollout(self, step, metrics, seconds, compiling=0.0):
    """Prints the line of a rollout.  metrics: `reward`, `tokens`, `ended` and perhaps `kl` (nats a completion).

    seconds: without those of `compiling`.
    """
    parts = [self._head('roll', step)] + [form.format(metrics[key]) for key, form in (
        ('reward', 'reward {:.3f}'), ('tokens', '{:.1f} tokens each'), ('ended', '{:.0%} ended'),
        ('kl', 'kl {:.3g} nats')) if key in metrics]
    self._print(self._fit(parts + _took(seconds, compiling), ('compiled',)))

  def saved(self, step, path, seconds=None, size=None):
    """Prints a checkpoint's line.  seconds: what the loop waited.  size: bytes."""
    parts = [self._head('save', step), str(path)]
    parts += [format_bytes(size)] if size is not None else []
    parts += _took(seconds)
    over = len('  '.join(parts)) - self._width
    if over > 0:  # The end of a path tells most of it.
      parts[1] = '…' + parts[1][over + 1:]
    self._print('  '.join(parts))

  def say(self, text):
    """Prints any other line, without tearing the live one; tables, which are several lines, as they are."""
    if len(text) > self._width and '\n' not in text:
      text = textwrap.fill(text, int(self._width), subsequent_indent='      ', break_long_words=False,
                           break_on_hyphens=False)
    self._print(text)

  @property
  def _width(self):
    """Characters of a line: one less than a terminal has, for a full line would wrap; a pipe has no end."""
    return max(shutil.get_terminal_size().columns - 1, 20) if self._live else math.inf

  def _fit(self, parts, spare):
    """Returns the parts as a line within the width.  spare: beginnings of those to leave out, the first one first."""
    for start in spare:
      if len('  '.join(parts)) > self._width:
        parts = [part for part in parts if not part.startswith(start)]
    return '  '.join(parts)

  def seconds_left(self, step):
    """Returns the seconds to the last step at the present pace, or None before the first log."""
    return None if self._pace is None else max(0, self._total - step) * self._pace

  def close(self):
    """Clears the live line, so that what follows starts on a clean one."""
    self._clear()

  def _note_pace(self, step, now, step_seconds):
    """Updates seconds per step from the time since the last log, evaluations included."""
    steps = step - self._last_step
    if self._last_time is None:
      # The first stretch holds the compilation, which does not come again.
      self._pace = step_seconds
    elif steps > 0:
      pace = (now - self._last_time) / steps
      # Half old, half new: follows a change within a few lines, yet one slow save does not jump.
      self._pace = pace if self._pace is None else 0.5 * self._pace + 0.5 * pace
    self._last_step, self._last_time = step, now

  def _head(self, word, step):
    return f'{word}  {step:>{len(str(self._total))}}/{self._total}'

  def _percent(self, step):
    # Rounded down: 100% is said of the last step only.
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
  """0.41 -> '41%', 0.013 -> '1.3%': a small MFU is still told apart from none."""
  percent = 100 * fraction
  return f'{percent:.0f}%' if percent >= 9.95 or percent == 0 else f'{percent:.1f}%'


def _took(seconds, compiling=0.0):
  """Returns the parts of a line that say how long something took, and how long its program was compiled before."""
  return [format_duration(seconds)] * (seconds is not None) + [f'compiled in {format_duration(compiling)}'] * (
      compiling >= 0.05)


class Stages:
  """Prints the stages of a job: one line each, rewritten in a terminal, at most every 10 s elsewhere.

  unit: what is counted.  clock: seconds.  Call it with the stage, how much is done, and of how much (None: unknown):
  first when it begins, with 0 done, so that its time is measured from there.
  """

  def __init__(self, stream=None, unit='documents', clock=time.monotonic):
    self._stream, self._unit, self._clock = stream or sys.stderr, unit, clock
    self._terminal = self._stream.isatty()
    self._step, self._start, self._shown = None, 0.0, 0.0
    self._line = self._summary = ''  # While a step runs, and when it is over.

  def __call__(self, step, done, total):
    now = self._clock()
    if step != self._step:
      self.finish()
      self._step, self._start, self._shown = step, now, now
    seconds = now - self._start
    rate = done / seconds if seconds > 0.1 else 0.0
    self._summary = f'{step}: {done:,} {self._unit}' if done else step
    if not done:
      self._line = f'{step} ...'
    elif total is None:
      self._line = f'{step}: {done:,} {self._unit}, {rate:,.0f}/s'
    else:
      left = f', {(total - done) / rate:,.0f} s left' if rate and done < total else ''
      self._line = f'{step}: {done:,} of {total:,} {self._unit}, {rate:,.0f}/s{left}'
    if now - self._shown >= (0.2 if self._terminal else 10.0) or not done:
      self._shown = now
      self._write(self._line, final=False)

  def finish(self, note=''):
    """Ends the line of the step with how long it took.  note: what follows."""
    if self._step is not None:
      self._write(f'{self._summary}, {self._clock() - self._start:.1f} s{note}', final=True)
      self._step = None

  def _write(self, line, final):
    if self._terminal:
      self._stream.write(f'\r\x1b[K{line}' + ('\n' if final else ''))
    else:
      self._stream.write(line + '\n')
    self._stream.flush()
