"""Trace a range of training steps and list the most expensive operations.

The trace is written to `<workdir>/profile`.  Open it with TensorBoard and xprof (`tensorboard
--logdir=<workdir>/profile`), or open its `perfetto_trace.json.gz` at https://ui.perfetto.dev.
"""

import collections
import dataclasses
import json
import pathlib
import re
import shutil
import warnings

from llmjax.config import ConfigError, setting
from llmjax.run.callback import Callback

# XLA's name for a CUDA graph.  All kernels of the graph carry it, so the kernel's own name is shown instead.
COMMAND_BUFFER = re.compile(r'command_buffer([._]\d+)*')
# An instruction in the text of an HLO module, and the JAX operation in its metadata.
INSTRUCTION = re.compile(r'^\s*(?:ROOT )?%?([\w.-]+) = .*op_name="([^"]*)"', re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class ProfileSpec:
  """The `profile` group: tracing of training steps."""

  steps: str = setting('', "training steps to trace, 'first:end' with end excluded: 10:13 traces steps 10, 11 and 12")

  def validate(self):
    try:
      parse_steps(self.steps)
    except ConfigError as e:
      yield from e.problems


def parse_steps(steps):
  """Return (first, end) for 'first:end', None for ''.  Raises ConfigError otherwise."""
  if not steps:
    return None
  first, colon, end = (part.strip() for part in steps.partition(':'))
  if not (colon and first.isdecimal() and end.isdecimal() and int(first) < int(end)):
    raise ConfigError([f"steps={steps!r} must be 'first:end' with first < end, such as 10:13"])
  return int(first), int(end)


class Profiler(Callback):
  """Trace a range of steps: call `before` and `after` around every step, then `close`.

  Each process traces its own devices.  A run resumed inside the range traces the rest of it.
  steps: see ProfileSpec.  say: prints the table of operations; None on all processes but the first.
  """

  def __init__(self, workdir, steps='', *, say=print):
    self._range = parse_steps(steps)
    self._folder = pathlib.Path(workdir) / 'profile'
    self._say = say
    self._annotation = None  # Of the step being traced.
    self._is_tracing = False

  def before_step(self, run):
    self.before(run.step + 1)

  def needs_values(self, run):
    return self._is_tracing and run.step + 1 >= self._range[1]

  def on_values(self, run, rows):
    self.after(run.step)

  def after_step(self, run):
    self.after(run.step)

  def before(self, step):
    """Start the trace at the first step of the range, and annotate each step in it."""
    if self._range is None or not self._range[0] <= step < self._range[1]:
      return
    import jax  # Imported here: ProfileSpec is read before JAX starts.
    if not self._is_tracing:
      _wait_for_devices()  # Otherwise the trace would include earlier steps.
      options = jax.profiler.ProfileOptions()
      options.python_tracer_level = 0  # Tracing every Python call would slow the measured steps.
      jax.profiler.start_trace(str(self._folder), create_perfetto_trace=True, profiler_options=options)
      self._is_tracing = True
    self._annotation = jax.profiler.StepTraceAnnotation('train', step_num=step)
    self._annotation.__enter__()

  def after(self, step):
    """End the step.  After the last step of the range, write the trace and print the table of operations."""
    if not self._is_tracing:
      return
    if self._annotation is not None:
      self._annotation.__exit__(None, None, None)
      self._annotation = None
    if step + 1 >= self._range[1]:
      self._finish()

  def close(self, run=None):
    """Write the trace of a run that ends inside the range.  May be called twice."""
    if self._is_tracing:
      self.after(self._range[1] - 1)

  def _finish(self):
    import jax
    _wait_for_devices()
    jax.profiler.stop_trace()
    self._is_tracing = False
    first, end = self._range
    self._range = None
    if self._say is None:
      return
    try:
      operations = top_operations(self._folder, operation_origins())
    except Exception as e:  # The trace is complete; an unreadable table must not end the run.
      self._say(f'profile  the trace is in {self._folder}; its operations could not be read: {type(e).__name__}: {e}')
      return
    path = self._folder / 'top_operations.json'
    path.write_text(json.dumps({'steps': [first, end], 'operations': operations}, indent=2) + '\n')
    columns = shutil.get_terminal_size((131, 24)).columns
    self._say(format_operations(operations, f'{first}:{end}', self._folder, columns))


def format_operations(operations, steps, folder, columns=131):
  """Format the table of operations, one line each, for a terminal of this many columns."""
  lines = [f'profile  steps {steps}  {folder}  (open with TensorBoard and xprof, or ui.perfetto.dev)']
  if not operations:
    return lines[0] + '\nprofile  the trace contains no device operations'
  width = min(36, columns // 3, max(len(o['name']) for o in operations))
  rest = max(min(60, columns - width - 34), 12)
  lines.append(f'  {"operation":<{width}}  {"ms":>9}  {"share":>5}  {"count":>6}  JAX operation')
  for o in operations:
    lines.append(f'  {_keep_end(o["name"], width):<{width}}  {o["total_ms"]:>9.2f}  '
                 f'{o["percent"]:>4.1f}%  {o["count"]:>6}  {_keep_end(o["origin"], rest)}'.rstrip())
  return '\n'.join(lines)


def top_operations(folder, origins=None, limit=10):
  """Return the operations with the most self time in the newest trace under a folder, largest first.

  Each is {'name', 'module', 'origin', 'total_ms', 'percent', 'count'}: name of the compiled operation (in a CUDA graph
  of the kernel) and its HLO module, the JAX operation ('' if unknown), self time summed over traced steps and devices
  (nested operations, as in a loop, excluded), and its share of the self time of all operations.
  origins: see `operation_origins`.
  """
  from jax.profiler import ProfileData
  origins = origins or {}
  paths = sorted(pathlib.Path(folder).glob('plugins/profile/*/*.xplane.pb'))
  paths = [p for p in paths if p.parent == paths[-1].parent]
  total, count = collections.Counter(), collections.Counter()
  with warnings.catch_warnings():  # Classes of jaxlib lack a __module__, which newer Pythons warn about.
    warnings.simplefilter('ignore', DeprecationWarning)
    for path in paths:
      for plane in ProfileData.from_file(str(path)).planes:
        for line in _operation_lines(plane):
          for key, nanoseconds in _self_times(line):
            total[key] += nanoseconds
            count[key] += 1
  whole = sum(total.values()) or 1.0
  return [{'name': name, 'module': module, 'origin': origins.get((module, name), ''),
           'total_ms': round(ns / 1e6, 6), 'percent': round(100 * ns / whole, 3),
           'count': count[module, name]}
          for (module, name), ns in total.most_common(limit)]


def operation_origins():
  """Return {(HLO module, operation): JAX operation} of the programs that are loaded on the devices of this process."""
  from jax.extend.backend import get_backend
  origins = {}
  for executable in get_backend().live_executables():
    for module in executable.hlo_modules():
      for name, origin in INSTRUCTION.findall(module.to_string()):
        kernel = re.sub(r'[.-]', '_', name)  # Name of the kernel on GPUs.
        for key in (name, kernel):
          origins[module.name, key] = origins['', key] = origin  # Some events do not name their module.
  return origins


def _operation_lines(plane):
  """Return the timelines of a plane that can hold device operations."""
  lines = list(plane.lines)
  # The plane of a TPU repeats the same time per step and per module on other timelines.
  return [line for line in lines if line.name == 'XLA Ops'] or lines


def _self_times(line):
  """Yield ((module, operation), ns) for each operation of a timeline, without the time of nested operations."""
  events = []
  for event in line.events:
    stats = dict(event.stats)
    if 'hlo_op' in stats or line.name == 'XLA Ops':
      name = str(stats.get('hlo_op') or event.name).split(' = ')[0].lstrip('%')
      if COMMAND_BUFFER.fullmatch(name):
        name = event.name.removeprefix('void ')
      events.append((event.start_ns, -event.duration_ns, name, str(stats.get('hlo_module', ''))))
  open_events = []  # [end, key, self time], outermost first.
  for start, negative, name, module in sorted(events):
    while open_events and open_events[-1][0] <= start:
      _, key, own = open_events.pop()
      yield key, own
    if open_events:
      open_events[-1][2] -= min(-negative, open_events[-1][0] - start)
    open_events.append([start - negative, (module, name), -negative])
  for _, key, own in open_events:
    yield key, own


def _wait_for_devices():
  """Block until every live array, and so every dispatched step, is computed."""
  import jax
  jax.block_until_ready([a for a in jax.live_arrays() if not a.is_deleted()])


def _keep_end(text, width):
  """Shorten a long name from the left: names share their beginning."""
  return text if len(text) <= width else '…' + text[1 - width:]
