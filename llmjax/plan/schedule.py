"""Predicts the step time of a compiled TPU program by replaying its instruction schedule.

The compiler estimates the cycles of every fusion.  Two kinds of instructions carry no estimate: Pallas kernels, whose
FLOPs are derived from their shapes, and collectives, whose time follows from their bytes and the links.  The core
executes the schedule in order.  A synchronous collective blocks it; an asynchronous one blocks it only if it has not
finished when its result is needed.
"""

import dataclasses
import math
import re

import numpy as np

from llmjax.plan.collectives import KINDS, Collective, fused_collectives, read_collective, walk_collectives
from llmjax.plan.hlo import Frame, Loop, Module, flatten
from llmjax.plan.topology import collective_seconds

DONE = (*(f'{kind}-done' for kind in KINDS), 'async-done', 'call-done', 'recv-done')
_MAX_CYCLES = 2**62  # The compiler writes larger values for work that it offloads to a SparseCore.


@dataclasses.dataclass
class Event:
  """An event on the timeline of a computation.  begin, seconds: relative to its start.  lane: 'core' or 'network'."""

  name: str
  category: str
  begin: float
  seconds: float
  lane: str = 'core'
  op_name: str = ''


@dataclasses.dataclass(frozen=True)
class Transfer:
  """A Collective with its duration, the bytes that a device sends, and the number of executions in the program."""

  collective: Collective
  seconds: float
  network: str
  sent: int
  asynchronous: bool
  runs: int


@dataclasses.dataclass(frozen=True)
class Kernel:
  """A Pallas call.  flops: of one execution, None if unknown.  seconds: lower bound of one execution."""

  name: str
  flops: float | None
  seconds: float
  runs: int
  recomputed: bool


@dataclasses.dataclass
class Totals:
  """Costs of a computation and everything it calls.

  cycles: by category.  kernel, waiting, network: seconds of Pallas kernels, of waiting for collectives, and of
  collectives, hidden ones included.
  """

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
  """The replayed body of a while loop.  trips: iterations.  runs: executions of the body in the program."""

  name: str
  trips: int
  runs: int
  totals: Totals
  events: list


class _Timeline:
  """The timeline of one execution of a computation: one core, and links that carry one collective at a time."""

  def __init__(self):
    self.totals, self.events, self.now = Totals(), [], 0.0
    self.in_flight = {}  # End time of each asynchronous collective, by the name or channel that its done refers to.
    self._free = {'ici': 0.0, 'dcn': 0.0}

  def execute(self, instruction, category, seconds):
    """Occupy the core."""
    if seconds:
      self.events.append(Event(instruction.name, category, self.now, seconds, op_name=instruction.op_name))
    self.now += seconds

  def wait(self, instruction, until):
    """Block the core until a time, if that is in the future; None: do nothing."""
    if until is not None and until > self.now:
      self.totals.waiting += until - self.now
      self.execute(instruction, 'collective', until - self.now)

  def send(self, instruction, kind, seconds, network):
    """Occupy the links; return when the collective ends."""
    begin = max(self.now, self._free[network])
    self._free[network] = begin + seconds
    self.totals.network += seconds
    self.events.append(Event(instruction.name, 'collective', begin, seconds, 'network', kind))
    return begin + seconds

  def finish(self):
    """Return (Totals, [Event]); collectives that nothing here waits for end with the computation."""
    self.totals.seconds = max([self.now, *self.in_flight.values()])
    return self.totals, self.events


class Program:
  """A replayed TPU program.

  text: the compiled module.  mesh: a Mesh whose `devices.flat[i]` is device i of the text.  places: the Place of each.
  attention_fraction: the fraction of all query-key pairs that the attention mask allows.

  totals: costs of a step.  bodies: loop bodies, the most expensive first.  transfers, kernels: all of them.
  top: (seconds, category, name, runs, op_name) of instructions, the most expensive first.  unknown_loops: names of
  loops without a static trip count, which count once.
  """

  def __init__(self, text, mesh, topology, places, attention_fraction=0.5):
    self.module = Module(text)
    self.mesh, self.topology, self.places, self.attention_fraction = mesh, topology, places, attention_fraction
    self.clock, self.peak = topology.chip.clock, topology.device_peak
    self.bodies, self.transfers, self.kernels, self.unknown_loops, self.top = [], [], [], [], []
    self._durations, self._has_product_cache = {}, {}
    self.totals, self.events = self._replay(Frame(self.module, self.module.entry), 1)
    self.bodies.sort(key=lambda b: -b.totals.seconds * b.trips * b.runs)
    self.top.sort(key=lambda t: -t[0])

  def _replay(self, frame, runs):
    """Return (Totals, [Event]) of one execution of a computation that the program executes `runs` times."""
    timeline = _Timeline()
    for instruction in frame.computation.instructions.values():
      op = instruction.op
      if op in ('while', 'conditional', 'call'):
        self._replay_nested(frame, instruction, timeline, runs)
      elif op in DONE:
        timeline.wait(instruction, timeline.in_flight.pop(_start_of(frame, instruction, timeline.in_flight), None))
      elif op == 'send' and (collective := self._dcn_collective(instruction)):
        timeline.in_flight[_rendezvous(instruction)] = self._send(instruction, collective, timeline, runs)
      elif op == 'recv' and _rendezvous(instruction) in timeline.in_flight:  # Its send was issued first.
        timeline.in_flight[instruction.name] = timeline.in_flight.pop(_rendezvous(instruction))
      elif op in ('async-start', 'call-start'):  # The call runs on a SparseCore.
        for collective, _ in walk_collectives(self.module, self.mesh, frame.called(instruction)):
          timeline.in_flight[instruction.name] = self._send(instruction, collective, timeline, runs)
      elif (kind := op.removesuffix('-start')) in KINDS:
        collective = read_collective(self.module, self.mesh, frame, instruction, kind)
        if op == kind:
          timeline.wait(instruction, self._send(instruction, collective, timeline, runs, asynchronous=False))
        else:
          timeline.in_flight[instruction.name] = self._send(instruction, collective, timeline, runs)
      elif op == 'fusion':
        self._replay_fusion(frame, instruction, timeline, runs)
      elif op == 'custom-call' and '"tpu_custom_call"' in instruction.attributes:
        self._replay_kernel(frame, instruction, timeline, runs)
      else:
        self._compute(instruction, timeline, runs)
    return timeline.finish()

  def _replay_nested(self, frame, instruction, timeline, runs):
    """Replay a loop, the most expensive branch of a conditional, or a call."""
    trips = 1
    if instruction.op == 'while':
      loop = Loop(frame, instruction)
      trips = loop.trips()
      if trips is None:
        self.unknown_loops.append(instruction.name)
        trips = 1
      totals, events = self._replay(loop.body, runs * trips)
      self.bodies.append(Body(instruction.name, trips, runs, totals, events))
    else:
      frames = frame.branches(instruction) if instruction.op == 'conditional' else [frame.called(instruction)]
      totals = max((self._replay(called, runs)[0] for called in frames), key=lambda t: t.seconds)
    timeline.totals.add(totals, trips)
    timeline.execute(instruction, 'loop' if instruction.op == 'while' else 'other', totals.seconds * trips)

  def _replay_fusion(self, frame, instruction, timeline, runs):
    phase, collectives = fused_collectives(self.module, self.mesh, frame, instruction)
    for collective, channel in collectives:
      if phase == 'done':
        timeline.wait(instruction, timeline.in_flight.pop(channel, None))
      elif phase == 'start':
        timeline.in_flight[channel] = self._send(instruction, collective, timeline, runs)
      elif phase == 'synchronous':
        timeline.wait(instruction, self._send(instruction, collective, timeline, runs, asynchronous=False))
    self._compute(instruction, timeline, runs)

  def _replay_kernel(self, frame, instruction, timeline, runs):
    flops = kernel_flops(frame, instruction, self.attention_fraction)
    if flops is None:
      seconds = estimated_cycles(instruction) / self.clock
    else:
      seconds = flops / self.peak * array_overhead(frame, instruction, self.topology.array, self.attention_fraction)
    self.kernels.append(Kernel(instruction.name, flops, seconds, runs, 'rematted' in instruction.op_name))
    timeline.totals.kernel_flops += flops or 0
    timeline.totals.kernel += seconds
    self.top.append((seconds * runs, 'kernel', instruction.name, runs, instruction.op_name))
    timeline.execute(instruction, 'kernel', seconds)

  def _compute(self, instruction, timeline, runs):
    if cycles := estimated_cycles(instruction):
      category, seconds = 'matmul' if self._has_product(instruction) else 'other', cycles / self.clock
      timeline.totals.cycles[category] += cycles
      self.top.append((seconds * runs, category, instruction.name, runs, instruction.op_name))
      timeline.execute(instruction, category, seconds)

  def _send(self, instruction, collective, timeline, runs, asynchronous=True):
    """Start a collective and record it; return when it ends."""
    groups = collective.groups if collective.kind == 'collective-permute' else collective.groups[:1]
    key = collective.kind, collective.bytes, groups
    if key not in self._durations:
      self._durations[key] = collective_seconds(self.topology, collective.kind, collective.bytes, collective.groups,
                                                self.places)
    seconds, network, sent = self._durations[key]
    self.transfers.append(Transfer(collective, seconds, network, sent, asynchronous, runs))
    return timeline.send(instruction, collective.kind, seconds, network)

  def _has_product(self, instruction):
    if instruction.op in ('convolution', 'dot'):
      return True
    name = instruction.op == 'fusion' and instruction.computation('calls')
    if not name:
      return False
    if name not in self._has_product_cache:
      self._has_product_cache[name] = any(map(self._has_product, self.module.computations[name].instructions.values()))
    return self._has_product_cache[name]

  def _dcn_collective(self, send):
    """Return the Collective between slices that a send to the host starts, or None for another send."""
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', send.attributes)
    kind = kind and kind[1].lower().replace('_', '-')
    if kind not in KINDS:
      return None
    array = flatten(send.type)[0]
    slices = np.array([p.slice for p in self.places]).reshape(self.mesh.devices.shape)
    axes = tuple(axis for i, axis in enumerate(self.mesh.axis_names) if (slices != np.take(slices, [0], axis=i)).any())
    first_of_slice = {}
    for number, place in enumerate(self.places):
      first_of_slice.setdefault(place.slice, number)
    group = tuple(first_of_slice.values())
    return Collective(kind, axes, len(group), (array,), array.bytes, groups=(group,))


def _rendezvous(instruction):
  """Return the name that a send shares with its recv."""
  match = re.search(r'_xla_host_transfer_rendezvous="([^"]*)"', instruction.attributes)
  return f'rendezvous {match[1]}' if match else instruction.name


def _start_of(frame, done, in_flight):
  """Return the key of the start that a done belongs to, looking through updates and tuples."""
  instructions, name = frame.computation.instructions, done.operands[0]
  while name in instructions:
    start = instructions[name]
    if start.op.endswith('-start') or start.op == 'recv' or not start.operands:
      break
    name = start.operands[0]
  if done.op == 'recv-done' and name not in in_flight and name in instructions:
    return _rendezvous(instructions[name])  # The recv was issued before its send.
  return name


def estimated_cycles(instruction):
  """Return the compiler's cycle estimate of an instruction, 0 if it has none."""
  match = re.search(r'"estimated_cycles":"?(\d+)', instruction.attributes)
  cycles = int(match[1]) if match else 0
  return cycles if cycles < _MAX_CYCLES else 0


def kernel_flops(frame, instruction, attention_fraction=0.5):
  """Return the FLOPs of a Pallas call: its stated cost, else those of attention by its shapes; None if unknown.

  Each product of attention takes 2 B N T S H FLOPs, half of them under a causal mask.  The forward pass has 2 products;
  the backward pass has 5 in one kernel, or 4 and 3 in two kernels that both recompute the attention weights
  (arXiv:2205.14135, algorithms 1 and 4).
  """
  if stated := _stated_flops(instruction):
    return stated
  shape = _attention_shape(frame, instruction)
  if shape is None:
    return None
  products, count, length, keys, head_dim = shape
  return 2.0 * products * count * length * keys * head_dim * attention_fraction


def _stated_flops(instruction):
  match = re.search(r'"cost_estimate":\{[^}]*"flops":"?(\d+)', instruction.attributes)
  return float(match[1]) if match else 0.0


def array_overhead(frame, instruction, array, attention_fraction=0.5):
  """Return the ratio of a kernel's time on the matrix unit to its FLOPs at peak, as a lower bound.

  array: rows and columns of the matrix unit.  head_dim is the inner or last dimension of every product of attention, so
  a head_dim below the size of the unit leaves part of it idle (How to Scale Your Model, part 2).  Blocks that a causal
  mask crosses are computed in full; the block sizes are in the kernel's metadata.
  """
  shape = _attention_shape(frame, instruction)
  if shape is None:
    return 1.0
  _, _, length, keys, head_dim = shape
  utilization = min(head_dim / array, 1.0)
  backward = '_dkv' if 'dkv' in instruction.name else '_dq' if 'dq' in instruction.name else ''
  sizes = [re.search(rf'\bblock_{operand}{backward}\W+(\d+)', instruction.attributes) for operand in ('q', 'kv')]
  if _stated_flops(instruction) or attention_fraction != 0.5 or length != keys or None in sizes:
    return 1 / utilization
  rows, columns = (min(int(size[1]), length) for size in sizes)
  computed = sum(min(-(-(first + rows) // columns) * columns, keys) * rows for first in range(0, length, rows))
  return computed / (attention_fraction * length * keys) / utilization


def _attention_shape(frame, instruction):
  """Return (products, sequences x heads, queries, keys, head_dim) of an attention kernel, or None for another one."""
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
    products = 5  # One kernel computes the gradients of queries, keys and values.
  (*leading, length, head_dim), (*_, keys, _) = wide[0], wide[1]
  return products, math.prod(leading), length, keys, head_dim
