"""`llmjax chaos`: injects faults into a run and compares it bit for bit with an undisturbed run.

The recipe first runs undisturbed, as the reference.  Then it runs again and is killed, stopped, has its checkpoints
damaged and its disk filled, and is restarted after each fault.  If no checkpoint is undamaged, the run must refuse to
start and must not change them; they are then restored.  All metrics that the runs logged, including those of lost
steps, and the final state must be identical.  Imports no JAX, because the accelerators belong to the runs.
"""

import dataclasses
import json
import os
import pathlib
import platform
import random
import re
import shlex
import shutil
import signal
import sys
import threading
import time

from llmjax.checkpoint import manifest
from llmjax.cluster.chaos_report import (
  differing_bits,
  hash_state_in_subprocess,
  logged_values,
  render_table,
  summarize,
)
from llmjax.cluster.faults import Fault, Injector, damage, incomplete_saves, newest_verified, plan_faults
from llmjax.cluster.spec import FAULTS
from llmjax.cluster.supervise import Group, Policy, start_processes
from llmjax.config import ConfigError, to_dict
from llmjax.evaluate.metrics import read_lines
from llmjax.run.hardware import installed_versions
from llmjax.run.progress import Progress, format_duration

MAX_SHOWN = 10  # Problems printed; chaos.json has all of them.
WIDTH = max(map(len, FAULTS.values()))
# How a process may end after a fault, where it is not as after a kill.
OUTCOMES = {'terminate': ('preempted', 'done'), 'stop': ('hung',)}


def run(spec, options):
  """Test the recipe; return 0 if all values are identical and no problem was found, else 1."""
  workdir = pathlib.Path(options.workdir)
  if workdir.exists() and any(workdir.iterdir()):
    raise ConfigError([f'--workdir={workdir} is not empty; give a new folder, or remove it'])
  workdir.mkdir(parents=True, exist_ok=True)
  recipe = make_recipe(spec, options.steps)
  (workdir / 'recipe.json').write_text(json.dumps(recipe, indent=2) + '\n')
  chaos, every = Chaos(recipe, options), recipe['train']['checkpoint_every']
  if every != spec.train.checkpoint_every:
    chaos.progress.say(f'train.checkpoint_every={spec.train.checkpoint_every} would save no checkpoint before the end '
                       f'of {recipe["train"]["steps"]} steps; using {every}')
  previous = {s: signal.signal(s, _interrupt) for s in (signal.SIGTERM, signal.SIGHUP)}
  try:
    return chaos.run()
  finally:
    chaos.close()
    for signum, handler in previous.items():
      signal.signal(signum, handler)


def make_recipe(spec, steps=0):
  """Return the recipe as nested dicts, with every step logged and, if the spec saves none, 20 checkpoints."""
  recipe = to_dict(spec)
  steps = steps or spec.train.steps
  every = spec.train.checkpoint_every
  recipe['train'].update(steps=steps, log_every=1,
                         checkpoint_every=every if 0 < every < steps else max(steps // 20, 1))
  recipe['optimizer']['warmup_steps'] = min(spec.optimizer.warmup_steps, steps)
  recipe['logs']['writers'] = []
  return recipe


class Chaos:
  """The reference run, the disturbed run, and the comparison."""

  def __init__(self, recipe, options, stream=None):
    self.recipe, self.options = recipe, options
    self.workdir, self.steps = pathlib.Path(options.workdir), recipe['train']['steps']
    self.progress = Progress(self.steps, stream=stream)
    self.random = random.Random(options.seed)
    self.devices = options.devices_per_process or (1 if options.processes > 1 else 0)
    self.policy, self.group = Policy(), None
    self.faults, self.problems, self.reference, self.digest = [], [], {}, ''
    self.start_seconds = self.step_seconds = 1.0  # Measured in the reference run.
    self.final_bits = 0

  def run(self):
    """Return the exit status."""
    begin, processes = time.monotonic(), self.options.processes
    self.progress.say(f'{self.steps} steps on {processes} process{"es" * (processes > 1)}, a checkpoint every '
                      f'{self.recipe["train"]["checkpoint_every"]} steps; first undisturbed, then with '
                      f'{self.options.kills} faults')
    if not self._run_reference():
      return 1
    self.progress.say(f'reference: {self.steps} steps in {format_duration(time.monotonic() - begin)}, final state '
                      f'{self.digest[:12]}')
    self._run_disturbed()
    compared = self._compare_final()
    self.progress.say('\n' + render_table(self.faults))
    bits = sum(f.bits for f in self.faults) + self.final_bits
    self._write(compared, bits, time.monotonic() - begin)
    report = self.workdir / 'chaos.json'
    for problem in self.problems[:MAX_SHOWN]:
      self.progress.say(f'PROBLEM: {problem}')
    if bits or self.problems:
      self.progress.say(f'{bits} bits differ, {len(self.problems)} problems: {report}')
      return 1
    self.progress.say(f'{compared} logged values of {self.steps} steps and the final state ({self.digest[:12]}) equal '
                      f'those of the undisturbed run, to the bit. {format_duration(time.monotonic() - begin)}, '
                      f'{report}')
    return 0

  def close(self):
    """Kill the processes that are left."""
    if self.group is not None:
      self.group.kill()
    self.progress.close()

  def _start(self, name):
    self.group = Group(self.workdir / f'{name}-logs', self.policy, quiet=True)
    command = ['pretrain', f'--config={self.workdir / "recipe.json"}', f'--workdir={self.workdir / name}']
    start_processes(self.group, command, self.options.processes, self.devices)
    return self.group

  def _run_reference(self):
    """Run undisturbed and measure the durations; return whether it succeeded."""
    begin, first_seen = time.monotonic(), None

    def watch():
      nonlocal first_seen
      step = self.group.maximum('step')
      if step and first_seen is None:
        first_seen = time.monotonic() - begin, step
      self.progress.tick(step)

    outcome = self._start('reference').wait(watch)
    self.progress.close()
    if outcome.kind != 'done':
      self.progress.say(f'the undisturbed run failed: process {outcome.rank} {outcome.text}')
      self.progress.say('\n'.join(outcome.tail))
      return False
    self.start_seconds, step = first_seen or (time.monotonic() - begin, 0)
    self.step_seconds = max(time.monotonic() - begin - self.start_seconds, 0.01) / max(self.steps - step, 1)
    self.policy = dataclasses.replace(self.policy, hang=max(20.0, 20 * self.group.maximum('longest')), end=1.0)
    self.reference = logged_values(self.workdir / 'reference')
    self.digest = hash_state_in_subprocess(self.workdir / 'reference/checkpoints' / str(self.steps))
    # The disturbed run must not find them, and needs the disk space.
    shutil.rmtree(self.workdir / 'reference/checkpoints')
    return True

  def _run_disturbed(self):
    """Run attempts, with one fault each, until one completes."""
    kinds = plan_faults(self.options.kills, self.options.seed, self.options.events)
    previous, outcome = None, None
    while outcome is None or outcome.kind != 'done':
      expected = newest_verified(self._checkpoints)
      fault = self._next_fault(kinds, expected)
      outcome = self._run_attempt(fault, previous, expected)
      compared, bits = self._compare(outcome.first)
      if previous:
        previous.compared, previous.bits = compared, bits
      elif bits:
        self.problems.append(f'{bits} bits differed before the first fault')
      previous = None
      if fault and fault.at is not None:
        fault.step = max(outcome.step, expected)
        self._check_outcome(fault, outcome)
        self.faults.append(fault)
        previous = fault
      elif outcome.kind != 'done':
        self.problems.append(f'process {outcome.rank} {outcome.text} at step {outcome.step} without a fault: '
                             + (outcome.tail[-1] if outcome.tail else ''))
        self.progress.say('\n  '.join([self.problems[-1], *outcome.tail]))
        return
    if len(self.faults) < len(kinds):
      self.progress.say(f'the run completed after {len(self.faults)} of {len(kinds)} faults; increase --steps to fit '
                        'all of them')

  def _next_fault(self, kinds, expected):
    """Return the next Fault, or None after the last one.  expected: the step that the attempt resumes from."""
    if len(self.faults) == len(kinds):
      return None
    rank = self.random.randrange(self.options.processes)
    # On average each fault gets an equal share of the steps that are left, some of which will be lost again.
    share = (self.steps - expected) / (len(kinds) - len(self.faults) + 1)
    target = min(expected + 1 + int(self.random.random() * 1.6 * share), self.steps - 1)
    return Fault(kinds[len(self.faults)], rank, target)

  def _run_attempt(self, fault, previous, expected):
    """Run one attempt with its fault; complete and report the previous fault; return the Outcome."""
    started, moment, resumed = time.monotonic(), self.random.random(), False
    group = self._start('run')
    injector = threading.Thread(daemon=True, target=Injector(
        fault, group, self._checkpoints, moment, self.start_seconds, self.step_seconds).run)
    if fault:
      injector.start()

    def watch():
      nonlocal resumed
      beats = [b for b in group.read().values() if b]
      if beats and not resumed and all(b.step > b.first or b.phase == 'close' for b in beats):
        resumed = True
        self.start_seconds = min(self.start_seconds, time.monotonic() - started)
        if previous:
          previous.seconds = time.monotonic() - previous.at
          self._record_resumption(previous, expected)
          self._print_fault(previous)
      self.progress.tick(group.maximum('step'))

    outcome = group.wait(watch)
    if fault:
      injector.join()
    if previous:
      self._record_resumption(previous, expected)
      if not resumed:
        if outcome.step > outcome.first:  # It progressed between two polls.
          previous.seconds = time.monotonic() - previous.at
        self._print_fault(previous)
    first = {b.first for b in group.read().values() if b}
    if first - {expected}:
      self.problems.append(f'the run resumed from step {max(first)}, but its newest undamaged checkpoint was '
                           f'{expected}')
    return outcome

  def _check_outcome(self, fault, outcome):
    """Check that the attempt ended as it should after the fault; damage the checkpoints for faults of that kind."""
    expected = OUTCOMES.get(fault.kind, ('failed', 'done'))
    if outcome.kind not in expected:
      self.problems.append(f'fault {len(self.faults) + 1} ({FAULTS[fault.kind]}) at step {fault.step}: process '
                           f'{outcome.rank} {outcome.text}; expected {" or ".join(expected)}'
                           + f': {outcome.tail[-1]}' * bool(outcome.tail))
    if fault.kind == 'disk':
      messages = [m[1] for line in outcome.tail if (m := re.search('(?:not saved|be written): ([^;]*)', line))]
      fault.detail = messages[0] if messages else (outcome.tail[-1] if outcome.tail else '')[:60] or 'no effect'
    if fault.kind == 'save':
      incomplete = incomplete_saves(self._checkpoints)
      fault.detail = f'left {incomplete[-1]}' if incomplete else 'just after it'
    newest = newest_verified(self._checkpoints)
    if outcome.kind == 'preempted' and newest < outcome.step:
      self.problems.append(f'SIGTERM at step {outcome.step} lost {outcome.step - newest} steps')
    if newest < outcome.saved:
      self.problems.append(f'the checkpoint of step {outcome.saved} was reported as saved, but is damaged')
    if fault.kind == 'damage' and newest:
      fault.detail = damage(self._checkpoints / str(newest), self.random)
      if not manifest.find_damage(self._checkpoints / str(newest)):
        self.problems.append(f'damage was not detected: {fault.detail}')
    if fault.kind == 'refuse' and newest:
      fault.detail = self._require_refusal()

  def _require_refusal(self):
    """Damage all checkpoints, check that the run refuses to start and keeps them, and restore them."""
    backup = self.workdir / 'backup'
    shutil.copytree(self._checkpoints, backup)
    steps = manifest.find_steps(self._checkpoints)
    for step in steps:
      damage(self._checkpoints / str(step), self.random)
    before = _file_hashes(self._checkpoints)
    outcome = self._start('run').wait()
    if outcome.status != 2 or 'fresh_start' not in ' '.join(outcome.tail):
      self.problems.append('all checkpoints were damaged, and the run did not refuse to start: process '
                           f'{outcome.rank} {outcome.text}')
    if _file_hashes(self._checkpoints) != before:
      self.problems.append('all checkpoints were damaged, and the run changed them')
    shutil.rmtree(self._checkpoints)
    backup.rename(self._checkpoints)
    return f'{len(steps)} damaged, kept'

  def _record_resumption(self, fault, expected):
    fault.resumed = max((b.first for b in self.group.read().values() if b), default=expected)
    fault.lost = max(fault.step - fault.resumed, 0)

  def _compare(self, first):
    """Compare the values that the last attempt logged after step `first`; return (values, differing bits)."""
    compared = bits = 0
    for (step, name), value in logged_values(self.workdir / 'run').items():
      if step <= first:
        continue
      if (step, name) not in self.reference:
        self.problems.append(f'step {step}: {name} was logged, but not in the reference run')
        continue
      expected = self.reference[step, name]
      different = differing_bits(value, expected)
      if different:
        self.problems.append(f'step {step}: {name} is {value!r} instead of {expected!r}')
      compared, bits = compared + 1, bits + different
    return compared, bits

  def _compare_final(self):
    """Compare the complete log and the final state; return the number of values."""
    values = logged_values(self.workdir / 'run')
    if missing := sorted(self.reference.keys() - values.keys()):
      step, name = missing[0]
      self.problems.append(f'{len(missing)} values are missing, first {name} of step {step}')
    lines = [(row['step'], tuple(sorted(row))) for row in read_lines(self.workdir / 'run/metrics.jsonl')]
    if len(set(lines)) < len(lines):
      self.problems.append(f'{len(lines) - len(set(lines))} lines of metrics.jsonl are duplicates')
    self.final_bits = sum(differing_bits(values[key], self.reference[key])
                          for key in values.keys() & self.reference.keys())
    if newest_verified(self._checkpoints) != self.steps:
      self.problems.append(f'there is no undamaged checkpoint of step {self.steps}')
    elif (digest := hash_state_in_subprocess(self._checkpoints / str(self.steps))) != self.digest:
      self.problems.append(f'the final state is {digest[:12]} instead of {self.digest[:12]}')
    return len(values)

  def _print_fault(self, fault):
    number, width = len(self.faults), len(str(self.options.kills))
    recovery = format_duration(fault.seconds) if fault.seconds is not None else 'next fault'
    text = (f'{number:>{width}}/{self.options.kills}  {FAULTS[fault.kind]:<{WIDTH}}  step {fault.step:>5} -> '
            f'{fault.resumed:>5}  {fault.lost:>3} lost  {recovery:>10}  {fault.detail}')
    self.progress.say(text.rstrip())

  def _write(self, compared, bits, seconds):
    content = {
        'command': shlex.join(['llmjax', *sys.argv[1:]]), 'passed': not (bits or self.problems),
        'processes': self.options.processes, 'steps': self.steps,
        'checkpoint_every': self.recipe['train']['checkpoint_every'],
        'seconds': round(seconds, 1), 'values_compared': compared + sum(f.compared for f in self.faults),
        'bits_differing': bits, 'problems': self.problems, 'state_sha256': self.digest,
        'machine': {'system': platform.platform(), 'processor': platform.machine(), 'cores': os.cpu_count()},
        'versions': {'python': platform.python_version(), **installed_versions()},
        'table': summarize(self.faults),
        'events': [{k: v for k, v in dataclasses.asdict(f).items() if k != 'at'} for f in self.faults]}
    (self.workdir / 'chaos.json').write_text(json.dumps(content, indent=1) + '\n')

  @property
  def _checkpoints(self):
    return self.workdir / 'run/checkpoints'


def _file_hashes(folder):
  return {str(p): manifest.hash_file(p) for p in sorted(folder.rglob('*')) if p.is_file()}


def _interrupt(signum, frame):
  raise KeyboardInterrupt
