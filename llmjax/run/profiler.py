"""Traces a few steps of a run and says which operations took the time.

The trace is written under `<workdir>/profile`: `tensorboard --logdir=<workdir>/profile` opens it
(with xprof), and https://ui.perfetto.dev opens its `perfetto_trace.json.gz`.
"""

import collections
import dataclasses
import json
import pathlib
import re
import shutil
import warnings

from llmjax.config import ConfigError, setting

# What XLA calls a graph of kernels on a GPU: each kernel in it has a name of its own, and this one says nothing.
COMMAND_BUFFER = re.compile(r'command_buffer([._]\d+)*')


@dataclasses.dataclass(frozen=True)
class ProfileSpec:
  """The `profile` group of a config."""

  steps: str = setting('', "steps to trace, 'first:end' without the end: 10:13 is 10, 11 and 12")

  def validate(self):
    try:
      parse_steps(self.steps)
    except ConfigError as e:
      yield from e.problems


def parse_steps(steps):
  """Returns (first, end) of 'first:end', or None of ''.  Raises ConfigError on anything else."""
  if not steps:
    return None
  first, colon, end = (part.strip() for part in steps.partition(':'))
  if not (colon and first.isdecimal() and end.isdecimal() and int(first) < int(end)):
    raise ConfigError([f"steps={steps!r} must be 'first:end' with first < end, such as 10:13"])
  return int(first), int(end)


class Profiler:
  """Traces the steps it is asked for: call `before` and `after` around each, then `close`.

  steps: as ProfileSpec.steps.  Each process traces its own devices; say: where the table goes, None
  on all processes but the first.  A run resumed inside the range traces what is left of it.
  """

  def __init__(self, workdir, steps='', *, say=print):
    self._range = parse_steps(steps)
    self._folder = pathlib.Path(workdir) / 'profile'
    self._say = say
    self._step = None  # The step's annotation while a step is traced.
    self._is_tracing = False

  def before(self, step):
    """Starts the trace if this is the first step of the range."""
    if self._range is None or not self._range[0] <= step < self._range[1]:
      return
    import jax  # Here, so that ProfileSpec can be read before JAX starts.
    if not self._is_tracing:
      _wait_for_devices()  # Else the steps before would be counted too.
      options = jax.profiler.ProfileOptions()
      # Every Python call would be recorded, which slows the very steps that are measured.
      options.python_tracer_level = 0
      jax.profiler.start_trace(
          str(self._folder), create_perfetto_trace=True, profiler_options=options)
      self._is_tracing = True
    self._step = jax.profiler.StepTraceAnnotation('train', step_num=step)
    self._step.__enter__()

  def after(self, step):
    """Ends the step; after the last of the range, writes the trace and prints its operations."""
    if not self._is_tracing:
      return
    if self._step is not None:
      self._step.__exit__(None, None, None)
      self._step = None
    if step + 1 >= self._range[1]:
      self._finish()

  def close(self):
    """Writes the trace of a run that ends inside the range."""
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
      operations = top_operations(self._folder)
    except Exception as e:  # A trace of an unknown form must not end the run that made it.
      self._say(f'profile  the trace is in {self._folder}; its operations could not be read: '
                f'{type(e).__name__}: {e}')
      return
    path = self._folder / 'top_operations.json'
    path.write_text(json.dumps({'steps': [first, end], 'operations': operations}, indent=2) + '\n')
    columns = shutil.get_terminal_size((131, 24)).columns  # More is too wide to read.
    self._say(format_operations(operations, f'{first}:{end}', self._folder, columns))


def format_operations(operations, steps, folder, columns=131):
  """Returns the table that is printed, one line an operation.  columns: of the terminal."""
  lines = [f'profile  steps {steps}  {folder}  '
           '(open with TensorBoard and xprof, or ui.perfetto.dev)']
  if not operations:
    return lines[0] + '\nprofile  the trace names no operation of the device'
  width = min(36, columns // 3, max(len(o['name']) for o in operations))
  rest = max(min(60, columns - width - 34), 12)
  lines.append(f'  {"operation":<{width}}  {"ms":>9}  {"share":>5}  {"count":>6}  from')
  for o in operations:
    lines.append(f'  {_shorten(o["name"], width):<{width}}  {o["total_ms"]:>9.2f}  '
                 f'{o["percent"]:>4.1f}%  {o["count"]:>6}  {_shorten(o["origin"], rest)}'.rstrip())
  return '\n'.join(lines)


def top_operations(folder, limit=10):
  """Returns the operations that took longest in the newest trace under a folder, longest first.

  Each is {'name', 'module', 'origin', 'total_ms', 'percent', 'count'}: the compiled operation (in a GPU's graph of
  kernels the kernel) and program, the JAX operation that it came from ('' if unknown), its own time over all traced
  steps and devices (not that of operations inside it, as in a loop), and its share of all operations'.
  """
  from jax.profiler import ProfileData
  paths = sorted(pathlib.Path(folder).glob('plugins/profile/*/*.xplane.pb'))
  paths = [p for p in paths if p.parent == paths[-1].parent]
  total, count = collections.Counter(), collections.Counter()
  origins = {}
  for path in paths:
    data = path.read_bytes()
    origins.update(_origins(data))
    with warnings.catch_warnings():  # jaxlib's own classes lack a __module__ on newer Pythons.
      warnings.simplefilter('ignore', DeprecationWarning)
      for plane in ProfileData.from_serialized_xspace(data).planes:
        for line in _operation_lines(plane):
          for key, nanoseconds in _self_times(line):
            total[key] += nanoseconds
            count[key] += 1
  whole = sum(total.values()) or 1.0
  return [{'name': name, 'module': module, 'origin': origins.get((module, name), ''),
           'total_ms': round(ns / 1e6, 6), 'percent': round(100 * ns / whole, 3),
           'count': count[module, name]}
          for (module, name), ns in total.most_common(limit)]


def _operation_lines(plane):
  """Returns the plane's lines that can hold operations of a device."""
  lines = list(plane.lines)
  # A TPU's plane has further lines that show the same time again, by step and by program.
  named = [line for line in lines if line.name == 'XLA Ops']
  return named or lines


def _self_times(line):
  """Yields ((module, operation), ns) of a line's operations, less what is nested in each."""
  events = []
  for event in line.events:
    stats = dict(event.stats)
    if 'hlo_op' in stats or line.name == 'XLA Ops':
      name = str(stats.get('hlo_op') or event.name).split(' = ')[0].lstrip('%')
      if COMMAND_BUFFER.fullmatch(name):
        name = event.name.removeprefix('void ')
      events.append((event.start_ns, -event.duration_ns, name, str(stats.get('hlo_module', ''))))
  open_events = []  # [end, key, own time], outermost first.
  for start, negative, name, module in sorted(events):
    while open_events and open_events[-1][0] <= start:
      _, key, own = open_events.pop()
      yield key, own
    if open_events:
      open_events[-1][2] -= min(-negative, open_events[-1][0] - start)
    open_events.append([start - negative, (module, name), -negative])
  for _, key, own in open_events:
    yield key, own


def _origins(data):
  """Returns {(module, operation): JAX name} from the programs that a trace carries with it.

  ProfileData does not show them, so this walks the protocol buffers: XSpace.planes=1,
  XPlane.event_metadata=4 (map, value=2), XEventMetadata.stats=5, XStat.bytes_value=6, which holds
  HloProto.hlo_module=1: name=1, computations=3; instructions=2: name=1, metadata=7; op_name=2.
  """
  names = {}
  for plane in _messages(data, 1):
    for proto in _messages(plane, 4, 2, 5, 6, 1):
      module = _text(proto, 1)
      for instruction in _messages(proto, 3, 2):
        if origin := next((_text(m, 2) for m in _messages(instruction, 7)), ''):
          name = _text(instruction, 1)
          names[module, name] = names['', name] = origin  # Some events do not say their program.
          kernel = re.sub(r'[.-]', '_', name)  # As GPUs call it.
          names.setdefault((module, kernel), origin)
          names.setdefault(('', kernel), origin)
  return names


def _messages(data, *path):
  """Yields the bytes at a path of field numbers in a protocol buffer."""
  for number, value in _fields(data):
    if number == path[0] and isinstance(value, memoryview):
      if len(path) == 1:
        yield value
      else:
        yield from _messages(value, *path[1:])


def _text(data, number):
  return next((bytes(v).decode('utf-8', 'replace') for v in _messages(data, number)), '')


def _fields(data):
  """Yields (field number, int or memoryview) of a protocol buffer message."""
  data, at = memoryview(data), 0

  def varint():
    nonlocal at
    value = shift = 0
    while True:
      byte = data[at]
      at += 1
      value |= (byte & 127) << shift
      shift += 7
      if byte < 128:
        return value

  while at < len(data):
    tag = varint()
    kind = tag & 7
    if kind == 0:
      yield tag >> 3, varint()
      continue
    if kind not in (1, 2, 5):
      raise ValueError(f'wire type {kind} is not used by traces')
    size = varint() if kind == 2 else 8 if kind == 1 else 4
    yield tag >> 3, data[at:at + size] if kind == 2 else 0
    at += size


def _wait_for_devices():
  """Returns when every array still in use is computed, the train state and so all steps with it."""
  import jax
  jax.block_until_ready([a for a in jax.live_arrays() if not a.is_deleted()])


def _shorten(text, width):
  """Keeps the end of a long name: the start is the same for all of them."""
  return text if len(text) <= width else '…' + text[1 - width:]
