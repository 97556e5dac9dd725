"""`llmjax chaos`: a run is disturbed again and again, and compared bit for bit with one that was not.

The recipe runs once in peace, the reference.  Then it runs again, is killed, stopped, its checkpoints are
damaged and its disk is filled, and each time it is started again.  Where no checkpoint is good, the start must be
refused and nothing replaced; the checkpoints are then put back.  Every metric that either run logged,
those of steps that were lost included, and the final state must be the same to the bit.  No JAX here: the
accelerators belong to the runs.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import random
import re
import resource
import shlex
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import threading
import time

from llmjax.checkpoint import manifest
from llmjax.cluster.spec import FAULTS
from llmjax.cluster.supervise import Group, Policy, start_processes
from llmjax.config import ConfigError, to_dict
from llmjax.evaluate.metrics import read_lines
from llmjax.run.progress import format_duration

# Twenty events in the shares that the kinds have; the first few are of different kinds, for short trials.
ORDER = ('kill', 'damage', 'terminate', 'save', 'refuse', 'stop', 'start', 'disk', 'kill', 'save',
         'damage', 'kill', 'kill', 'terminate', 'damage', 'save', 'kill', 'start', 'kill', 'kill')
DAMAGES = ('flip', 'truncate', 'delete')
# Metrics that depend on the clock or the machine's other work, not on the run.
TIMED = re.compile(r'seconds|second$|mfu|memory|time')
PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')
SHOWN = 10  # Problems on the screen.
WIDTH = max(map(len, FAULTS.values()))
LOOK_SECONDS = 0.003  # A save of a tiny model takes a few hundredths of a second.
DISK_SECONDS = 60.0  # A full disk is emptied when the run has not met it so long.


@dataclasses.dataclass
class Event:
  """One disturbance.  step: the farthest one done.  resumed: where the run went on.  lost: their difference.

  target: the step from which on it may happen.  rank: whom it happens to.  at: monotonic seconds, None while
  it has not happened.  detail: such as what file was damaged and how.  seconds: until the run did its first
  new step, None where the next event came before that.  compared, bits: values of the next attempt that
  were compared with the reference's, and bits of them that differ.
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


def run(spec, options):
  """Disturbs the recipe's run; returns 0 when nothing was lost and no bit differs, else 1."""
  workdir = pathlib.Path(options.workdir)
  if workdir.exists() and any(workdir.iterdir()):
    raise ConfigError([f'--workdir={workdir} is not empty; give a new folder, or remove it'])
  workdir.mkdir(parents=True, exist_ok=True)
  recipe = make_recipe(spec, options.steps)
  (workdir / 'recipe.json').write_text(json.dumps(recipe, indent=2) + '\n')
  chaos, every = Chaos(recipe, options, Screen()), recipe['train']['checkpoint_every']
  if every != spec.train.checkpoint_every:
    chaos.screen.say(f'train.checkpoint_every={spec.train.checkpoint_every} would leave no checkpoint before the end '
                     f'of {recipe["train"]["steps"]} steps: {every} is taken')
  before = {s: signal.signal(s, _interrupted) for s in (signal.SIGTERM, signal.SIGHUP)}
  try:
    return chaos.run()
  finally:
    chaos.end()
    for signum, handler in before.items():
      signal.signal(signum, handler)


def make_recipe(spec, steps=0):
  """Returns the recipe as nested dicts: so many steps, each one logged, checkpoints as asked or 20 where none are."""
  recipe = to_dict(spec)
  steps = steps or spec.train.steps
  every = spec.train.checkpoint_every
  recipe['train'].update(steps=steps, log_every=1,
                         checkpoint_every=every if 0 < every < steps else max(steps // 20, 1))
  recipe['optimizer']['warmup_steps'] = min(spec.optimizer.warmup_steps, steps)
  recipe['logs']['writers'] = []
  return recipe


def plan_events(kills, seed, only=()):
  """Returns a shuffled list of so many kinds of events."""
  kinds = [kind for kind in ORDER if not only or kind in only]
  if not hasattr(resource, 'prlimit'):  # Not Linux.
    kinds = [kind for kind in kinds if kind != 'disk'] or ['kill']
  events = [kinds[i % len(kinds)] for i in range(kills)]
  random.Random(seed).shuffle(events)
  return events


class Chaos:
  """The two runs and what is known of them."""

  def __init__(self, recipe, options, screen):
    self.recipe, self.options, self.screen = recipe, options, screen
    self.workdir, self.steps = pathlib.Path(options.workdir), recipe['train']['steps']
    self.random = random.Random(options.seed)
    self.devices = options.devices_per_process or (1 if options.processes > 1 else 0)
    self.policy, self.group = Policy(), None
    self.events, self.problems, self.reference = [], [], {}
    self.start_seconds = self.step_seconds = 1.0  # Measured in the reference.
    self.left = options.kills

  def run(self):
    """Returns the exit status."""
    begin = time.monotonic()
    self.screen.say(f'{self.steps} steps on {self.options.processes} process'
                    f'{"es" * (self.options.processes > 1)}, a checkpoint every '
                    f'{self.recipe["train"]["checkpoint_every"]}; first once in peace, then {self.options.kills} '
                    'events')
    if not self._run_reference():
      return 1
    self.screen.say(f'reference: {self.steps} steps in {format_duration(time.monotonic() - begin)}, final state '
                    f'{self.digest[:12]}')
    self._disturb()
    compared = self._compare_all()
    table = render_table(self.events)
    self.screen.say('\n' + table)
    bits = sum(e.bits for e in self.events) + self.last_bits
    self._write(compared, bits, time.monotonic() - begin)
    for problem in self.problems[:SHOWN]:
      self.screen.say(f'PROBLEM: {problem}')
    if bits or self.problems:
      self.screen.say(f'{bits} bits differ, {len(self.problems)} problems, all in {self.workdir / "chaos.json"}')
      return 1
    self.screen.say(f'{compared} logged values of {self.steps} steps and the final state ({self.digest[:12]}) are '
                    f'those of the undisturbed run, to the bit. {format_duration(time.monotonic() - begin)}, '
                    f'{self.workdir / "chaos.json"}')
    return 0

  def end(self):
    """Ends what still runs."""
    if self.group is not None:
      self.group.kill()
    self.screen.clear()

  def _start(self, name):
    self.group = Group(self.workdir / f'{name}-logs', self.policy, quiet=True)
    command = ['pretrain', f'--config={self.workdir / "recipe.json"}', f'--workdir={self.workdir / name}']
    start_processes(self.group, command, self.options.processes, self.devices)
    return self.group

  def _run_reference(self):
    begin, seen = time.monotonic(), {}

    def watch():
      if step := self._step():
        seen.setdefault('start', (time.monotonic() - begin, step))
      self.screen.live(0, self.options.kills, step, self.steps, None)

    end = self._start('reference').wait(watch)
    self.screen.clear()
    if end.kind != 'done':
      self.screen.say(f'the recipe does not run in peace: process {end.rank} {end.text}')
      self.screen.say('\n'.join(end.tail))
      return False
    seconds, step = seen.get('start', (time.monotonic() - begin, 0))
    self.start_seconds = seconds
    self.step_seconds = max(time.monotonic() - begin - seconds, 0.01) / max(self.steps - step, 1)
    longest = max((b.longest for b in self.group.read().values() if b), default=0.0)
    self.policy = dataclasses.replace(self.policy, hang=max(20.0, 20 * longest), end=1.0)
    self.reference = _values(self.workdir / 'reference')
    self.digest = _digest(self.workdir / 'reference/checkpoints' / str(self.steps))
    # The second run must not go on with the first one's, and needs the disk.
    shutil.rmtree(self.workdir / 'reference/checkpoints')
    return True

  def _disturb(self):
    """Runs attempts until one comes to the end."""
    kinds = plan_events(self.options.kills, self.options.seed, self.options.events)
    last, begin, done = None, time.monotonic(), False
    while not done:
      expected = newest_good(self._checkpoints)
      event = Event(kinds[len(self.events)]) if len(self.events) < len(kinds) else None
      if event:
        event.rank = self.random.randrange(self.options.processes)
        # With as many steps to an event on average as are left for each, some of them lost again.
        ahead = (self.steps - expected) / (len(kinds) - len(self.events) + 1)
        event.target = min(expected + 1 + int(self.random.random() * 1.6 * ahead), self.steps - 1)
      started, moment = time.monotonic(), self.random.random()
      group = self._start('run')
      thread = threading.Thread(target=self._inject, args=(event, group, moment), daemon=True)
      if event:
        thread.start()
      began = [False]

      def watch(last=last, expected=expected, began=began, started=started):
        beats = [b for b in self.group.read().values() if b]
        if beats and not began[0] and all(b.step > b.first or b.phase == 'close' for b in beats):
          began[0] = True
          self.start_seconds = min(self.start_seconds, time.monotonic() - started)
          if last:
            last.seconds = time.monotonic() - last.at
            self._note_resumption(last, expected)
            self._say_event(last)
        count = len(self.events) + 1
        spent = (time.monotonic() - begin) / max(count, 1)
        left = (len(kinds) - count) * spent + max(self.steps - self._step(), 0) * self.step_seconds
        self.screen.live(len(self.events), len(kinds), self._step(), self.steps, left if count > 2 else None)

      end = group.wait(watch)
      if event:
        thread.join()
      if last:
        self._note_resumption(last, expected)
      firsts = {b.first for b in group.read().values() if b}
      if firsts - {expected}:
        self.problems.append(f'the run went on from step {max(firsts)}; its newest good checkpoint was {expected}')
      if last and not began[0]:
        if end.step > end.first:  # Between two looks of ours.
          last.seconds = time.monotonic() - last.at
        self._say_event(last)
      compared, bits = self._compare(end.first)
      if last:
        last.compared, last.bits = compared, bits
      elif bits:
        self.problems.append(f'{bits} bits differed before anything was done to the run')
      if event and event.at is not None:
        event.step = max(end.step, expected)
        self._finish_event(event, end)
        self.events.append(event)
        last = event
      elif end.kind != 'done':
        self.problems.append(f'process {end.rank} {end.text} at step {end.step} by itself: '
                             + (end.tail[-1] if end.tail else ''))
        self.screen.say('\n  '.join([self.problems[-1], *end.tail]))
        return
      else:
        last = None
      done = end.kind == 'done'
    if len(self.events) < len(kinds):
      self.screen.say(f'the run came to its end after {len(self.events)} of {len(kinds)} events; more --steps leave '
                      'room for all of them')

  def _inject(self, event, group, moment):
    """Waits for the event's moment and does it.  Runs in a thread.  moment: random, from 0 to 1."""
    begin = time.monotonic()
    while any(child.poll() is None for child in group.children):
      if self._is_due(event, begin, moment):
        break
      time.sleep(LOOK_SECONDS)
    else:
      return
    if event.kind == 'save':  # A first save takes longest: somewhere within it, or just after.
      time.sleep(moment * min(0.3, 10 * self.step_seconds))
    elif event.kind in ('kill', 'damage', 'refuse'):
      time.sleep(moment * self.step_seconds)
    child = group.children[event.rank]
    if child.poll() is not None:
      return
    event.at = time.monotonic()
    if event.kind == 'disk':
      self._fill_disk(event, group)
      return
    child.send_signal({'terminate': signal.SIGTERM, 'stop': signal.SIGSTOP}.get(event.kind, signal.SIGKILL))

  def _is_due(self, event, begin, moment):
    if event.kind == 'start':  # At the latest with the first step.
      return time.monotonic() - begin > moment * self.start_seconds or any(
          b and b.step > b.first for b in self.group.read().values())
    if self._step() < event.target:
      return False
    if event.kind == 'save':
      return bool(manifest.find_temporaries(self._checkpoints)) or any(
          not (self._checkpoints / str(s) / 'manifest.json').exists() for s in manifest.find_steps(self._checkpoints))
    if event.kind in ('damage', 'refuse', 'disk'):
      return self._saved() > 0
    return True

  def _fill_disk(self, event, group):
    """Lets no file of the processes grow beyond what their next save needs."""
    newest = max(self._saved(), 1)  # It stays while the next one is not there.
    sizes = [p.stat().st_size for p in (self._checkpoints / str(newest)).rglob('*') if p.is_file()]
    # Below what a save must write; also below what the logs of a tiny model hold, and then it is these that fail.
    limit = max(sizes, default=4096) // 2
    for child in group.children:
      resource.prlimit(child.pid, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    deadline = time.monotonic() + DISK_SECONDS
    while any(child.poll() is None for child in group.children):
      if time.monotonic() > deadline:
        for child in group.children:
          if child.poll() is None:
            resource.prlimit(child.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        return
      time.sleep(0.05)

  def _finish_event(self, event, end):
    """Checks that the attempt ended as the event should end it; damages the checkpoint where it is to be."""
    wanted = {'terminate': ('preempted', 'done'), 'stop': ('hung',), 'disk': ('failed', 'done')}.get(
        event.kind, ('failed', 'done'))
    if end.kind not in wanted:
      self.problems.append(f'event {len(self.events) + 1} ({FAULTS[event.kind]}) at step {event.step}: process '
                           f'{end.rank} {end.text}; expected it {" or ".join(wanted)}'
                           + f': {end.tail[-1]}' * bool(end.tail))
    if event.kind == 'disk':
      told = [found[1] for line in end.tail if (found := re.search('(?:not saved|be written): ([^;]*)', line))]
      event.detail = told[0] if told else (end.tail[-1] if end.tail else '')[:60] or 'not met'
    if event.kind == 'save':
      left = manifest.find_temporaries(self._checkpoints)
      left = [p.name for p in left] or [str(s) for s in manifest.find_steps(self._checkpoints)
                                        if not (self._checkpoints / str(s) / 'manifest.json').exists()]
      event.detail = f'left {left[-1]}' if left else 'just after it'
    good = newest_good(self._checkpoints)
    if end.kind == 'preempted' and good < end.step:
      self.problems.append(f'SIGTERM at step {end.step} lost {end.step - good} steps')
    if good < end.saved:
      self.problems.append(f'the checkpoint of step {end.saved} was said to be saved and is not good')
    if event.kind == 'damage' and good:
      event.detail = damage(self._checkpoints / str(good), self.random)
      if not manifest.find_damage(self._checkpoints / str(good)):
        self.problems.append(f'the damage is not seen: {event.detail}')
    if event.kind == 'refuse' and good:
      event.detail = self._require_refusal()

  def _require_refusal(self):
    """Damages all checkpoints, starts the run, which must refuse and keep them, and puts them back; returns words."""
    kept = self.workdir / 'kept'
    shutil.copytree(self._checkpoints, kept)
    steps = manifest.find_steps(self._checkpoints)
    for step in steps:
      damage(self._checkpoints / str(step), self.random)
    before = _contents(self._checkpoints)
    end = self._start('run').wait(lambda: None)
    told = ' '.join(end.tail)
    if end.status != 2 or 'fresh_start' not in told:
      self.problems.append(f'all checkpoints were damaged, and the run was not refused: process {end.rank} {end.text}')
    if _contents(self._checkpoints) != before:
      self.problems.append('all checkpoints were damaged, and the run changed them')
    shutil.rmtree(self._checkpoints)
    kept.rename(self._checkpoints)
    return f'{len(steps)} damaged, kept'

  def _note_resumption(self, last, expected):
    """Notes where the run went on after an event, and what that lost."""
    last.resumed = max((b.first for b in self.group.read().values() if b), default=expected)
    last.lost = max(last.step - last.resumed, 0)

  def _compare(self, first):
    """Compares what the last attempt logged, from step `first` on; returns (values, bits that differ)."""
    found = _values(self.workdir / 'run')
    compared = bits = 0
    for place, value in found.items():
      if place[0] <= first:
        continue
      if place not in self.reference:
        self.problems.append(f'step {place[0]}: {place[1]} was logged, and not in the reference')
        continue
      different = differing_bits(value, self.reference[place])
      if different:
        self.problems.append(f'step {place[0]}: {place[1]} is {value!r} instead of {self.reference[place]!r}')
      compared, bits = compared + 1, bits + different
    return compared, bits

  def _compare_all(self):
    """Compares all that the run's files hold at the end; returns the number of values."""
    self.last_bits = 0
    found = _values(self.workdir / 'run')
    if missing := sorted(self.reference.keys() - found.keys()):
      step, name = missing[0]
      self.problems.append(f'{len(missing)} values are missing, the first of them {name} of step {step}')
    lines = [(row['step'], tuple(sorted(row))) for row in read_lines(self.workdir / 'run/metrics.jsonl')]
    if len(set(lines)) < len(lines):
      self.problems.append(f'{len(lines) - len(set(lines))} lines of metrics.jsonl are there twice')
    for place in found.keys() & self.reference.keys():
      self.last_bits += differing_bits(found[place], self.reference[place])
    final = self._checkpoints / str(self.steps)
    if newest_good(self._checkpoints) != self.steps:
      self.problems.append(f'there is no good checkpoint of step {self.steps}')
    elif (digest := _digest(final)) != self.digest:
      self.problems.append(f'the final state is {digest[:12]} instead of {self.digest[:12]}')
    return len(found)

  def _say_event(self, event):
    number = next(i for i, e in enumerate(self.events, 1) if e is event)
    width = len(str(self.options.kills))
    back = format_duration(event.seconds) if event.seconds is not None else 'next event'
    text = (f'{number:>{width}}/{self.options.kills}  {FAULTS[event.kind]:<{WIDTH}}  step {event.step:>5} -> '
            f'{event.resumed:>5}  {event.lost:>3} lost  {back:>10}  {event.detail}')
    self.screen.say(text.rstrip())

  def _write(self, compared, bits, seconds):
    content = {
        'command': shlex.join(['llmjax', *sys.argv[1:]]), 'passed': not (bits or self.problems),
        'processes': self.options.processes, 'steps': self.steps,
        'checkpoint_every': self.recipe['train']['checkpoint_every'],
        'seconds': round(seconds, 1), 'values_compared': compared + sum(e.compared for e in self.events),
        'bits_differing': bits, 'problems': self.problems, 'state_sha256': self.digest,
        'machine': {'system': platform.platform(), 'processor': platform.machine(), 'cores': os.cpu_count()},
        'versions': {'python': platform.python_version(), **{p: _version(p) for p in PACKAGES}},
        'table': summarise(self.events),
        'events': [{k: v for k, v in dataclasses.asdict(e).items() if k != 'at'} for e in self.events]}
    (self.workdir / 'chaos.json').write_text(json.dumps(content, indent=1) + '\n')

  @property
  def _checkpoints(self):
    return self.workdir / 'run/checkpoints'

  def _step(self):
    return max((b.step for b in self.group.read().values() if b), default=0)

  def _saved(self):
    return max((b.saved for b in self.group.read().values() if b), default=0)


def newest_good(folder):
  """Return the newest step with an undamaged checkpoint, or 0."""
  steps = reversed(manifest.find_steps(folder))
  return next((step for step in steps if not manifest.find_damage(pathlib.Path(folder) / str(step))), 0)


def _contents(folder):
  """Returns {path: SHA-256} of the files in a folder."""
  return {str(p): manifest.hash_file(p) for p in sorted(folder.rglob('*')) if p.is_file()}


def damage(checkpoint, generator):
  """Damages one file of a checkpoint; returns words on it.  generator: of random numbers."""
  files = sorted(p for p in pathlib.Path(checkpoint).rglob('*') if p.is_file() and p.stat().st_size)
  file = generator.choice(files)
  parts = file.relative_to(checkpoint).parts
  name = '/'.join([*parts[:-1], parts[-1] if len(parts[-1]) < 24 else parts[-1][:8] + '…'])
  size, kind = file.stat().st_size, generator.choice(DAMAGES)
  if kind == 'delete':
    file.unlink()
    return f'{name} deleted'
  if kind == 'truncate':
    size = generator.randrange(size)
    os.truncate(file, size)
    return f'{name} cut to {size} bytes'
  place, bit = generator.randrange(size), generator.randrange(8)
  with open(file, 'r+b') as f:
    f.seek(place)
    byte = f.read(1)[0]
    f.seek(place)
    f.write(bytes([byte ^ 1 << bit]))
  return f'{name}: bit {bit} of byte {place} flipped'


def differing_bits(a, b):
  """Returns how many bits two numbers of a log differ in, as float64; 64 where only one is a number."""
  if isinstance(a, (int, float)) and isinstance(b, (int, float)):
    x, y = (int.from_bytes(struct.pack('>d', v), 'big') for v in (a, b))
    return (x ^ y).bit_count()
  return 0 if a == b else 64


def summarise(events):
  """Returns rows {event, count, steps_lost, bits_differing, median_seconds}, the last one of all events."""
  rows = []
  for kind, name in [*FAULTS.items(), (None, 'all')]:
    chosen = [e for e in events if kind in (None, e.kind)]
    if chosen:
      seconds = [e.seconds for e in chosen if e.seconds is not None]
      rows.append({'event': name, 'count': len(chosen), 'steps_lost': sum(e.lost for e in chosen),
                   'bits_differing': sum(e.bits for e in chosen),
                   'median_seconds': round(statistics.median(seconds), 1) if seconds else None})
  return rows


def render_table(events):
  """Returns the table of a terminal: one row for each kind of event, and one for all."""
  header = ('event', 'count', 'steps lost', 'bits differing', 'median time to recover')
  body = [(r['event'], *(str(r[k]) for k in ('count', 'steps_lost', 'bits_differing')),
           '' if r['median_seconds'] is None else f'{r["median_seconds"]:.1f} s') for r in summarise(events)]
  widths = [max(len(row[i]) for row in [header, *body]) for i in range(len(header))]

  def rule(left, middle, right):
    return left + middle.join('─' * (w + 2) for w in widths) + right

  def line(row):
    cells = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
    return '│ ' + ' │ '.join(cells) + ' │'

  return '\n'.join([rule('┌', '┬', '┐'), line(header), rule('├', '┼', '┤'), *map(line, body[:-1]),
                    *([rule('├', '┼', '┤')] if len(body) > 1 else []), *map(line, body[-1:]), rule('└', '┴', '┘')])


class Screen:
  """Lines, and on a terminal a last line that is painted over: a bar, the step, the time left."""

  def __init__(self, stream=None):
    self._stream = sys.stdout if stream is None else stream
    self._length, self._painted = 0, 0.0

  def say(self, text):
    self.clear()
    self._stream.write(text + '\n')
    self._stream.flush()

  def live(self, done, events, step, steps, seconds_left):
    now = time.monotonic()
    if not self._stream.isatty() or now - self._painted < 0.1:
      return
    self._painted = now
    bar = '█' * (20 * done // events) + '░' * (20 - 20 * done // events)
    left = f'  {format_duration(seconds_left)} left' if seconds_left is not None else ''
    text = f'{bar}  {done}/{events} events  step {step}/{steps}{left}'[:shutil.get_terminal_size().columns - 1]
    self._stream.write('\r' + text.ljust(self._length))
    self._stream.flush()
    self._length = len(text)

  def clear(self):
    if self._length:
      self._stream.write('\r' + ' ' * self._length + '\r')
      self._stream.flush()
      self._length = 0


def _values(workdir):
  """Returns {(step, metric): value} of what a run has logged, but for what depends on the clock."""
  return {(row['step'], key): value for row in read_lines(workdir / 'metrics.jsonl') for key, value in row.items()
          if key != 'step' and not TIMED.search(key)}


def hash_state(checkpoint):
  """Returns the SHA-256 of a checkpoint's arrays, with their names, dtypes and shapes, and of its stream."""
  from llmjax.checkpoint.arrays import Arrays, read_json
  checkpoint = pathlib.Path(checkpoint).absolute()  # Orbax takes no other.
  arrays, digest = Arrays(checkpoint), hashlib.sha256()
  for name in sorted(arrays.shapes):
    array = arrays.read(name)
    digest.update(f'{name} {array.dtype} {array.shape}\n'.encode())
    digest.update(array.tobytes())
  digest.update(json.dumps(read_json(checkpoint, 'stream'), sort_keys=True).encode())
  return digest.hexdigest()


def _digest(checkpoint):
  """Returns hash_state, made by a process of its own on the CPU."""
  code = f'from llmjax.cluster.chaos import hash_state; print(hash_state({str(checkpoint)!r}))'
  environment = {k: v for k, v in os.environ.items() if not k.startswith('LLMJAX_')}
  done = subprocess.run([sys.executable, '-c', code], env={**environment, 'JAX_PLATFORMS': 'cpu'}, text=True,
                        capture_output=True, check=False)
  if done.returncode:
    raise ConfigError([f'{checkpoint} cannot be read: {(done.stderr.splitlines() or [""])[-1]}'])
  return done.stdout.split()[-1]


def _version(package):
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return None


def _interrupted(signum, frame):
  raise KeyboardInterrupt
