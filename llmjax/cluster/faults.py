"""Faults that `llmjax chaos` injects into a run: signals, damaged checkpoints and a full disk.  Imports no JAX."""

import dataclasses
import os
import pathlib
import random
import resource
import signal
import time

from llmjax.checkpoint import manifest

# Twenty faults in the default proportions; the first few are of different kinds, for short runs.
ORDER = ('kill', 'damage', 'terminate', 'save', 'refuse', 'stop', 'start', 'disk', 'kill', 'save',
         'damage', 'kill', 'kill', 'terminate', 'damage', 'save', 'kill', 'start', 'kill', 'kill')
POLL_SECONDS = 0.003  # A save of a tiny model takes a few hundredths of a second.
DISK_SECONDS = 60.0  # The disk is emptied again if the run has not failed after this time.


@dataclasses.dataclass
class Fault:
  """One injected fault and its consequences.

  kind: key of `spec.FAULTS`.  rank: the affected process.  target: the step from which on it may happen.  at: monotonic
  time of the injection, None before.  step: the last step before it.  resumed: the step that the run resumed from.
  lost: steps lost.  detail: such as the damaged file.  seconds: time until the first new step; None if the next fault
  came first.  compared, bits: logged values of the next attempt that were compared, and differing bits in them.
  """

  kind: str
  rank: int = 0
  target: int = 0
  at: float | None = None
  step: int = 0
  resumed: int = 0
  lost: int = 0
  detail: str = ''
  seconds: float | None = None
  compared: int = 0
  bits: int = 0


def plan_faults(count, seed, kinds=()):
  """Return a shuffled list of `count` kinds of faults; kinds: the ones to use, empty for all."""
  order = [kind for kind in ORDER if not kinds or kind in kinds]
  if not hasattr(resource, 'prlimit'):  # Not Linux.
    order = [kind for kind in order if kind != 'disk'] or ['kill']
  plan = [order[i % len(order)] for i in range(count)]
  random.Random(seed).shuffle(plan)
  return plan


class Injector:
  """Injects a fault into a Group; `run` blocks until it has happened or the group has ended.

  checkpoints: folder of the run's checkpoints.  moment: random number in [0, 1) that determines the exact time.
  start_seconds, step_seconds: duration of the start-up and of a step.
  """

  def __init__(self, fault, group, checkpoints, moment, start_seconds, step_seconds):
    self._fault, self._group, self._checkpoints, self._moment = fault, group, checkpoints, moment
    self._start_seconds, self._step_seconds, self._begin = start_seconds, step_seconds, time.monotonic()

  def run(self):
    while not self._is_due():
      if all(child.poll() is not None for child in self._group.children):
        return
      time.sleep(POLL_SECONDS)
    kind = self._fault.kind
    if kind == 'save':  # The first save takes longest: some time within it, or just after.
      time.sleep(self._moment * min(0.3, 10 * self._step_seconds))
    elif kind in ('kill', 'damage', 'refuse'):
      time.sleep(self._moment * self._step_seconds)
    child = self._group.children[self._fault.rank]
    if child.poll() is not None:
      return
    self._fault.at = time.monotonic()
    if kind == 'disk':
      self._fill_disk()
    else:
      child.send_signal({'terminate': signal.SIGTERM, 'stop': signal.SIGSTOP}.get(kind, signal.SIGKILL))

  def _is_due(self):
    kind = self._fault.kind
    if kind == 'start':  # At the latest with the first step.
      return time.monotonic() - self._begin > self._moment * self._start_seconds or any(
          b and b.step > b.first for b in self._group.read().values())
    if self._group.maximum('step') < self._fault.target:
      return False
    if kind == 'save':
      return bool(incomplete_saves(self._checkpoints))
    return kind not in ('damage', 'refuse', 'disk') or self._group.maximum('saved') > 0

  def _fill_disk(self):
    """Limit the size of the files that the processes may write, so that their next save fails."""
    newest = self._checkpoints / str(max(self._group.maximum('saved'), 1))  # Kept until the next one is complete.
    sizes = [p.stat().st_size for p in newest.rglob('*') if p.is_file()]
    # Less than a save must write.  The logs of a tiny model may exceed it as well, and then they fail.
    self._limit_file_size(max(sizes, default=4096) // 2)
    deadline = time.monotonic() + DISK_SECONDS
    while any(child.poll() is None for child in self._group.children):
      if time.monotonic() > deadline:
        self._limit_file_size(resource.RLIM_INFINITY)
        return
      time.sleep(0.05)

  def _limit_file_size(self, limit):
    for child in self._group.children:
      if child.poll() is None:
        resource.prlimit(child.pid, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))


def newest_verified(folder):
  """Return the newest step whose checkpoint is undamaged, or 0."""
  steps = reversed(manifest.find_steps(folder))
  return next((step for step in steps if not manifest.find_damage(pathlib.Path(folder) / str(step))), 0)


def incomplete_saves(folder):
  """Return the names of temporary folders of a save, or of steps that have no manifest yet."""
  return [p.name for p in manifest.find_temporaries(folder)] or [
      str(step) for step in manifest.find_steps(folder) if not (folder / str(step) / 'manifest.json').exists()]


def damage(checkpoint, generator):
  """Delete, truncate or flip a bit of a random file of a checkpoint; return a description."""
  files = sorted(p for p in pathlib.Path(checkpoint).rglob('*') if p.is_file() and p.stat().st_size)
  file = generator.choice(files)
  *parents, last = file.relative_to(checkpoint).parts
  name = '/'.join([*parents, last if len(last) < 24 else last[:8] + '…'])
  size, kind = file.stat().st_size, generator.choice(('flip', 'truncate', 'delete'))
  if kind == 'delete':
    file.unlink()
    return f'{name} deleted'
  if kind == 'truncate':
    size = generator.randrange(size)
    os.truncate(file, size)
    return f'{name} truncated to {size} bytes'
  position, bit = generator.randrange(size), generator.randrange(8)
  with open(file, 'r+b') as f:
    f.seek(position)
    byte = f.read(1)[0]
    f.seek(position)
    f.write(bytes([byte ^ 1 << bit]))
  return f'{name}: bit {bit} of byte {position} flipped'
