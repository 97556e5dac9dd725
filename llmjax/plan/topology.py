"""TPU slices by name, and how long a collective takes on their links.  No JAX here."""

import dataclasses
import difflib
import math
import re

from llmjax.config import ConfigError
from llmjax.parallel.chips import GPUS, TPUS

# Shapes of slices that Google Cloud offers (docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}); of the larger
# three-dimensional ones any multiple of 4 along each dimension is possible.
_FLAT = ('1x1', '2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16')
_CUBES = ('2x2x1', '2x2x2', '2x2x4', '2x4x4', '4x4x4', '4x4x8', '4x8x8', '8x8x8', '8x8x16', '8x16x16', '16x16x16')
SHAPES = {'v4': _CUBES, 'v5e': _FLAT, 'v5p': (*_CUBES, '16x16x24'), 'v6e': _FLAT,
          'tpu7x': ('1x1x1', *_CUBES, '16x16x24')}

HOP_SECONDS = 1e-6  # Latency of one link (How to Scale Your Model, jax-ml.github.io/scaling-book, part 2).


@dataclasses.dataclass(frozen=True)
class Topology:
  """Slices of one generation.  shape: chips along each dimension of one slice."""

  chip: object
  shape: tuple[int, ...]
  slices: int = 1

  @property
  def name(self):
    return f'{self.chip.name}:{"x".join(map(str, self.shape))}'

  @property
  def full_name(self):
    """The name with the number of slices: 'v5p:4x4x4 x 2 slices'."""
    return self.name + (f' x {self.slices} slices' if self.slices > 1 else '')

  @property
  def chips(self):
    return math.prod(self.shape) * self.slices

  @property
  def devices(self):
    return self.chips * self.chip.devices

  @property
  def device_hbm(self):
    """Bytes of memory of one JAX device."""
    return self.chip.hbm // self.chip.devices

  @property
  def array(self):
    """Rows and columns of its matrix units (docs.cloud.google.com/tpu/docs/system-architecture-tpu-vm)."""
    return 256 if self.chip.name in ('v6e', 'tpu7x') else 128

  @property
  def device_peak(self):
    return self.chip.peak_flops / self.chip.devices

  def is_ring(self, dim):
    return self.shape[dim] % self.chip.wrap == 0

  def links(self):
    """Returns a line that says what joins the chips."""
    dims = [f'{n}{" (ring)" if self.is_ring(i) else " (line)" if n > 1 else ""}' for i, n in enumerate(self.shape)]
    return (f'{" x ".join(dims)}, {self.chip.links} links of {self.chip.link_rate / 1e9:.0f} GB/s each way'
            + (f'; {self.slices} slices, {self.chip.dcn_rate / 1e9:.4g} GB/s a chip between them'
               if self.slices > 1 else ''))


def parse_topology(text, slices=1):
  """Returns the Topology of a text such as `v5p:4x4x4`; raises ConfigError with the list of them."""
  name, _, shape = text.lower().partition(':')
  chips = {chip.name: chip for chip in (*TPUS, *GPUS)}
  listed = [f'{n}: {", ".join(shapes)}' for n, shapes in SHAPES.items()]
  listed.append(f'with --fast, GPUs of one node: {", ".join(f"{chip.name}:8" for chip in GPUS)}')
  if name not in chips:
    near = difflib.get_close_matches(name, chips, n=1, cutoff=0.4)
    hint = f'did you mean {near[0]}? ' if near else ''
    raise ConfigError([f'--topology={text}: there is no TPU {name!r}; {hint}known are '
                       + '; '.join(listed)])
  chip = chips[name]
  if not chip.tpu:
    if not re.fullmatch('[1-9][0-9]?', shape):
      raise ConfigError([f'--topology={text}: write how many GPUs a node has, as {name}:8, and --slices for nodes'])
    return Topology(chip, (int(shape),), slices)
  if not re.fullmatch(r'\d+(x\d+)*', shape) or not _exists(chip, tuple(map(int, shape.split('x')))):
    raise ConfigError([f'--topology={text}: {name} has no slices of shape {shape!r}; known are '
                       f'{", ".join(SHAPES[name])}'
                       + ('; larger ones with multiples of 4' if chip.dims == 3 else '')])
  return Topology(chip, tuple(map(int, shape.split('x'))), slices)


def _exists(chip, shape):
  return 'x'.join(map(str, shape)) in SHAPES[chip.name] or (
      chip.dims == 3 == len(shape) and all(n > 0 and n % 4 == 0 for n in shape) and list(shape) == sorted(shape))


@dataclasses.dataclass(frozen=True)
class Place:
  """Where a device sits: its slice, its chip's coordinates, and which of the chip's devices it is."""

  slice: int
  coords: tuple[int, ...]
  core: int


def place_of(device):
  """Returns the Place of a JAX TPU device."""
  return Place(getattr(device, 'slice_index', 0) or 0, tuple(device.coords), getattr(device, 'core_on_chip', 0) or 0)


def collective_seconds(topology, kind, bytes_, groups, places):
  """Returns (seconds, network: 'ici' or 'dcn', bytes that one device sends) of a collective.

  bytes_: of the whole buffer at one device.  groups: numbers of the devices, of which the first group stands for
  all; of a permute all pairs count.  places: the Place of each number.  A ring sends both ways, a line one way at
  its middle; dimensions work side by side (How to Scale Your Model, part 3).  No other collective is assumed to be
  on the same links.  Over slices: within each slice first, then each device's part between them.
  """
  if not groups or max(map(len, groups)) < 2:
    return 0.0, 'ici', 0
  if kind == 'collective-permute':
    return _permute(topology, bytes_, groups, places)
  group = [places[i] for i in groups[0]]
  slices = len({p.slice for p in group})
  inside = len(group) // slices
  twice = 2 if kind == 'all-reduce' else 1
  seconds, sent = 0.0, 0.0
  if inside > 1:
    home = [p for p in group if p.slice == group[0].slice]
    rate, hops, longest = _rate(topology, home)
    sent = twice * bytes_ * (inside - 1) / inside
    if kind in ('all-to-all', 'ragged-all-to-all'):
      # Each byte goes a quarter of a ring, or a third of a line, on average, along each dimension in turn.
      seconds = bytes_ * longest / topology.chip.link_rate * _sharing(topology, home)
    else:
      seconds = sent / rate + twice * hops * HOP_SECONDS
  if slices == 1:
    return seconds, 'ici', int(sent)
  across = twice * bytes_ / inside * (slices - 1) / slices
  dcn = topology.chip.dcn_rate / topology.chip.devices
  return seconds + across / dcn, 'dcn', int(sent + across)


def _sharing(topology, group):
  """Returns how many devices of a chip want its links at once for groups of their own."""
  return topology.chip.devices / len({p.core for p in group})


def _rate(topology, group):
  """Returns (bytes/s that one device of a group can send, hops round it, link loads of an exchange)."""
  rate, hops, longest = 0.0, 0, 0.0
  for dim, size in enumerate(topology.shape):
    used = len({p.coords[dim] for p in group})
    if used < 2:
      continue
    ring = used == size and topology.is_ring(dim) and size > 2
    rate += topology.chip.link_rate * (2 if ring else 1)
    hops += used // 2 if ring else used - 1
    longest = max(longest, used / 8 if ring else used / 4)
  if not rate:  # Between the devices of one chip, which share its memory's links.
    return topology.chip.links * topology.chip.link_rate, 1, 0.5
  return rate / _sharing(topology, group), hops, longest


def _permute(topology, bytes_, pairs, places):
  load, dcn = 0, False
  for source, target in pairs:
    a, b = places[source], places[target]
    dcn = dcn or a.slice != b.slice
    hops = 0
    for dim, size in enumerate(topology.shape):
      far = abs(a.coords[dim] - b.coords[dim])
      hops += min(far, size - far) if topology.is_ring(dim) else far
    load = max(load, hops)
  if dcn:
    return bytes_ / (topology.chip.dcn_rate / topology.chip.devices), 'dcn', bytes_
  rate = topology.chip.link_rate / topology.chip.devices
  # Where all send `load` places on, each link carries that many messages.
  return bytes_ * max(load, 0.5) / rate + load * HOP_SECONDS, 'ici', bytes_
