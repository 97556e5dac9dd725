"""How long a compiled TPU program takes: its instructions played in the order in which the compiler put them.

The compiler gives the cycles of every fusion.  Two things carry none: Pallas kernels, whose FLOPs are counted from
their shapes, and collectives, whose time follows from bytes and links.  The core works through the schedule; a
synchronous collective keeps it waiting, an asynchronous one only where its end comes before it is through.
"""

import dataclasses
import re

import numpy as np

from llmjax.plan.collectives import KINDS, Collective, _read, _walk
from llmjax.plan.hlo import Frame, Loop, Module, flatten
from llmjax.plan.topology import collective_seconds

_UNKNOWN = 2**62  # What the compiler writes for work that it hands to a SparseCore is above it.


@dataclasses.dataclass
class Event:
  """Something on the timeline of one computation.  begin, seconds: from its start.  lane: 'core' or 'network'."""

  name: str
  category: str
  begin: float
  seconds: float
  lane: str = 'core'
  op_name: str = ''


@dataclasses.dataclass(frozen=True)
class Transfer:
  """A Collective with the seconds it takes once, what of them the core waits, and its runs in the program."""

  collective: Collective
  seconds: float
  network: str
  sent: int
  asynchronous: bool
  runs: int


@dataclasses.dataclass(frozen=True)
class Kernel:
  """A Pallas call.  flops: of one run, None where its shapes do not tell.  seconds: that one run takes at least."""

  name: str
  flops: float | None
  seconds: float
  runs: int
  recomputed: bool


@dataclasses.dataclass
class Totals:
  """Of one computation, with everything it runs: cycles by category, kernels' FLOPs and seconds, seconds of waiting."""

  seconds: float = 0.0
  cycles: dict = dataclasses.field(default_factory=lambda: dict.fromkeys(('matmul', 'other'), 0))
  kernel_flops: float = 0.0
  kernel: float = 0.0
  waiting: float = 0.0
  network: float = 0.0

  def add(self, other, times):
    self.cycles = {k: self.cycles[k] + times * other.cycles[k] for k in self.cycles}
    for name in ('kernel_flops', 'kernel', 'waiting', 'network'):
      setattr(self, name, getattr(self, name) + times * getattr(other, name))


@dataclasses.dataclass
class Body:
  """A while loop's body as it was played.  runs: of the loop."""

  name: str
  trips: int
  runs: int
  totals: Totals
  events: list


class Program:
  """A scheduled TPU program, played.

  text: of the compiled module.  mesh: a Mesh whose `devices.flat[i]` is device i of the text.  places: the Place of
  each of them.  causal_part: what of the square of queries and keys attention needs.

  totals: the step's.  bodies: loops' bodies, the most expensive first.  transfers, kernels: all of them.
  unknown_loops: names of loops whose turns the text does not tell; they count once.
  """

  def __init__(self, text, mesh, topology, places, causal_part=0.5):
    self.module = Module(text)
    self.mesh, self.topology, self.places, self.causal_part = mesh, topology, places, causal_part
    self.clock, self.peak = topology.chip.clock, topology.device_peak
    self.bodies, self.transfers, self.kernels, self.unknown_loops, self.top = [], [], [], [], []
    self._priced, self._products = {}, {}
    self.totals, self.events = self._play(Frame(self.module, self.module.entry), 1, ())
    self.bodies.sort(key=lambda b: -b.totals.seconds * b.trips * b.runs)
    self.top.sort(key=lambda t: -t[0])

  def _play(self, frame, runs, path):
    """Returns (Totals, [Event]) of one run of a computation that the program runs `runs` times."""
    totals, events, flying, free, now = Totals(), [], {}, {'ici': 0.0, 'dcn': 0.0}, 0.0

    def spend(instruction, category, seconds):
      nonlocal now
      if seconds:
        events.append(Event(instruction.name, category, now, seconds, op_name=instruction.op_name))
      now += seconds

    def wait(instruction, until):
      nonlocal now
      if until > now:
        events.append(Event(instruction.name, 'collective', now, until - now, op_name=instruction.op_name))
        totals.waiting += until - now
        now = until

    def send(instruction, collective, asynchronous):
      seconds, network, sent = self._price(collective)
      begin = max(now, free[network])
      free[network] = begin + seconds
      totals.network += seconds
      events.append(Event(instruction.name, 'collective', begin, seconds, 'network', collective.kind))
      self.transfers.append(Transfer(collective, seconds, network, sent, asynchronous, runs))
      return begin + seconds

    for instruction in frame.computation.instructions.values():
      op = instruction.op
      if op == 'while':
        loop = Loop(frame, instruction)
        trips = loop.trips()
        if trips is None:
          self.unknown_loops.append(instruction.name)
          trips = 1
        body, inside = self._play(loop.body, runs * trips, (*path, instruction.name))
        self.bodies.append(Body(instruction.name, trips, runs, body, inside))
        totals.add(body, trips)
        spend(instruction, 'loop', body.seconds * trips)
      elif op == 'conditional':
        played = [self._play(branch, runs, path) for branch in frame.branches(instruction)]
        dearest, _ = max(played, key=lambda p: p[0].seconds)
        totals.add(dearest, 1)
        spend(instruction, 'other', dearest.seconds)
      elif op == 'call':
        called, inside = self._play(frame.called(instruction), runs, path)
        totals.add(called, 1)
        spend(instruction, 'other', called.seconds)
      elif op.endswith('-done') and op.removesuffix('-done') in KINDS or op in (
          'async-done', 'call-done', 'recv-done'):
        origin = _origin(frame, instruction)
        if op == 'recv-done' and origin not in flying and origin in frame.computation.instructions:
          origin = _rendezvous(frame.computation.instructions[origin])  # The recv stood before its send.
        if (until := flying.pop(origin, None)) is not None:
          wait(instruction, until)
      elif op == 'send' and (between := self._between_slices(instruction)):
        flying[_rendezvous(instruction)] = send(instruction, between, True)
      elif op == 'recv' and _rendezvous(instruction) in flying:  # The send came first; its end is what is received.
        flying[instruction.name] = flying.pop(_rendezvous(instruction))
      elif op in ('async-start', 'call-start'):  # A call runs on a SparseCore.
        found = list(_walk(self.module, self.mesh, frame.called(instruction), (), False))
        for collective, _ in found:
          flying[instruction.name] = send(instruction, collective, True)
      elif op.removesuffix('-start') in KINDS:
        kind = op.removesuffix('-start')
        collective = _read(self.module, self.mesh, frame, instruction, kind, (), False)
        until = send(instruction, collective, op != kind)
        if op == kind:
          wait(instruction, until)
        else:
          flying[instruction.name] = until
      elif op == 'fusion':
        phase, inside = self._fused(frame, instruction)
        for collective, channel in inside:
          if phase == 'done':
            wait(instruction, flying.pop(channel, now))
          elif phase == 'start':
            flying[channel] = send(instruction, collective, True)
          elif phase == 'sync':
            wait(instruction, send(instruction, collective, False))
        self._compute(frame, instruction, totals, spend, runs, path)
      elif op == 'custom-call' and '"tpu_custom_call"' in instruction.attributes:
        flops = kernel_flops(frame, instruction, self.causal_part)
        if flops is None:
          seconds = estimated_cycles(instruction) / self.clock
        else:
          seconds = flops / self.peak * array_overhead(frame, instruction, self.topology.array, self.causal_part)
        self.kernels.append(Kernel(instruction.name, flops, seconds, runs, 'rematted' in instruction.op_name))
        totals.kernel_flops += flops or 0
        totals.kernel += seconds
        self.top.append((seconds * runs, 'kernel', instruction.name, runs, instruction.op_name))
        spend(instruction, 'kernel', seconds)
      else:
        self._compute(frame, instruction, totals, spend, runs, path)
    for until in flying.values():  # Nobody waits for them here; the next computation must.
      now = max(now, until)
    totals.seconds = now
    return totals, events

  def _compute(self, frame, instruction, totals, spend, runs, path):
    cycles = estimated_cycles(instruction)
    if not cycles:
      return
    category = 'matmul' if self._has_product(instruction) else 'other'
    totals.cycles[category] += cycles
    self.top.append((cycles / self.clock * runs, category, instruction.name, runs, instruction.op_name))
    spend(instruction, category, cycles / self.clock)

  def _price(self, collective):
    key = collective.kind, collective.bytes, collective.groups[:1] if collective.kind != 'collective-permute' else (
        collective.groups)
    if key not in self._priced:
      self._priced[key] = collective_seconds(self.topology, collective.kind, collective.bytes, collective.groups,
                                             self.places)
    return self._priced[key]

  def _has_product(self, instruction):
    if instruction.op in ('convolution', 'dot'):
      return True
    name = instruction.op == 'fusion' and instruction.computation('calls')
    if not name:
      return False
    if name not in self._products:
      self._products[name] = any(map(self._has_product, self.module.computations[name].instructions.values()))
    return self._products[name]

  def _between_slices(self, send):
    """Returns the Collective between slices that a send to the host begins, or None where it is another send."""
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', send.attributes)
    kind = kind and kind[1].lower().replace('_', '-')
    if kind not in KINDS:
      return None
    part = flatten(send.type)[0]
    devices = np.array([p.slice for p in self.places]).reshape(self.mesh.devices.shape)
    axes = tuple(axis for i, axis in enumerate(self.mesh.axis_names)
                 if (devices != np.take(devices, [0], axis=i)).any())
    one_each = tuple(self._first_of_each_slice())
    return Collective(kind, axes, len(one_each), (part,), part.bytes, groups=(one_each,))

  def _first_of_each_slice(self):
    found = {}
    for number, place in enumerate(self.places):
      found.setdefault(place.slice, number)
    return found.values()

  def _fused(self, frame, fusion):
    """Returns (phase, [(Collective, channel)]) of a fusion: 'start', 'done', 'between', 'sync', or None.

    The TPU compiler writes a collective into the fusions that start it, carry it on beside a product, and end it.
    """
    name = fusion.computation('calls')
    instructions = self.module.computations[name].instructions.values()
    targets = {i.attribute('custom_call_target') for i in instructions if i.op == 'custom-call'}
    found, seen = [], set()
    for collective, instruction in _walk(self.module, self.mesh, frame.called(fusion), (), False):
      channel = instruction.attribute('channel_id') or instruction.name
      if channel not in seen:
        seen.add(channel)
        if collective.kind == 'all-reduce' and 'all-reduce-scatter' in f'{name} {fusion.name}'.replace('_', '-'):
          collective = dataclasses.replace(collective, kind='reduce-scatter')
        found.append((collective, channel))
    phase = ('start' if '"AsyncCollectiveStart"' in targets else 'done' if '"AsyncCollectiveDone"' in targets else
             'between' if any('async_collective_fusion_config' in i.attributes for i in instructions
                              if i.op in KINDS) else 'sync')
    return (phase if found else None), found


def _rendezvous(instruction):
  """Returns the name that a send and its recv share."""
  match = re.search(r'_xla_host_transfer_rendezvous="([^"]*)"', instruction.attributes)
  return f'rendezvous {match[1]}' if match else instruction.name


def _origin(frame, instruction):
  """Returns the name of the start that a done ends, through updates and tuples."""
  name = instruction.operands[0]
  while name in frame.computation.instructions:
    found = frame.computation.instructions[name]
    if found.op.endswith('-start') or found.op == 'recv' or not found.operands:
      break
    name = found.operands[0]
  return name


def estimated_cycles(instruction):
  """Returns the compiler's estimate of an instruction's cycles, 0 where it has none."""
  match = re.search(r'"estimated_cycles":"?(\d+)', instruction.attributes)
  cycles = int(match[1]) if match else 0
  return cycles if cycles < _UNKNOWN else 0


def kernel_flops(frame, instruction, causal_part=0.5):
  """Returns the FLOPs of a Pallas call: as it states them, else of attention from its shapes; None if unknown.

  Attention's products each take 2 B N T S H, of which a causal mask needs a half: 2 of them forward (queries with
  keys, weights with values); backward 5 in one kernel, or 4 and 3 in two that each compute the weights again
  (arXiv:2205.14135, algorithms 1 and 4).
  """
  if stated := _stated_flops(instruction):
    return stated
  found = _attention(frame, instruction)
  if found is None:
    return None
  products, count, length, keys, head_dim = found
  return 2.0 * products * count * length * keys * head_dim * causal_part


def _stated_flops(instruction):
  match = re.search(r'"cost_estimate":\{[^}]*"flops":"?(\d+)', instruction.attributes)
  return float(match[1]) if match else 0.0


def array_overhead(frame, instruction, array, causal_part=0.5):
  """Returns how many times longer than its FLOPs at the peak a kernel keeps the matrix unit at work, at least.

  array: rows and columns of the unit.  Every product of attention has head_dim as its inner or its last dimension,
  so that heads narrower than the unit leave the rest of it idle (How to Scale Your Model, part 2).  Blocks that a
  causal mask cuts are computed whole; their sizes are in the kernel's metadata.
  """
  found = _attention(frame, instruction)
  if found is None:
    return 1.0
  _, _, length, keys, head_dim = found
  fill = min(head_dim / array, 1.0)
  backward = '_dkv' if 'dkv' in instruction.name else '_dq' if 'dq' in instruction.name else ''
  sizes = [re.search(rf'\bblock_{of}{backward}\W+(\d+)', instruction.attributes) for of in ('q', 'kv')]
  if _stated_flops(instruction) or causal_part != 0.5 or length != keys or None in sizes:
    return 1 / fill
  rows, columns = (min(int(size[1]), length) for size in sizes)
  computed = sum(min(-(-(first + rows) // columns) * columns, keys) * rows for first in range(0, length, rows))
  return computed / (causal_part * length * keys) / fill


def _attention(frame, instruction):
  """Returns (products, rows and heads, queries, keys, head_dim) of an attention kernel, or None where it is none."""
  products = next((n for part, n in (('fwd', 2), ('dkv', 4), ('dq', 3)) if part in instruction.name), None)
  if products is None or not re.search('splash|flash', instruction.name + instruction.op_name):
    return None
  operands = [a for o in instruction.operands if o in frame.computation.instructions
              for a in flatten(frame.computation.instructions[o].type)]
  wide = [a.shape for a in operands if a.dtype in ('bf16', 'f32', 'f16') and len(a.shape) >= 3 and a.shape[-1] >= 32]
  if len(wide) < 2:
    return None
  if products == 4 and sum(len(a.shape) >= 4 and a.shape[-2:] in (wide[0][-2:], wide[1][-2:])
                           for a in flatten(instruction.type)) >= 3:
    products = 5  # One kernel makes the gradients of queries, keys and values.
  (*rows, length, head_dim), (*_, keys, _) = wide[0], wide[1]
  count = 1
  for n in rows:
    count *= n
  return products, count, length, keys, head_dim
