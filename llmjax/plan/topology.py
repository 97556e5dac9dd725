"""TPU slices by name, and the duration of collectives on their links.  Imports no JAX."""

import dataclasses
import difflib
import math
import re

from llmjax.config import ConfigError
from llmjax.parallel.chips import GPUS, TPUS

# Slice shapes that Google Cloud offers (docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}); larger 3D slices may
# have any multiple of 4 along each dimension.
_FLAT = ('1x1', '2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16')
_CUBES = ('2x2x1', '2x2x2', '2x2x4', '2x4x4', '4x4x4', '4x4x8', '4x8x8', '8x8x8', '8x8x16', '8x16x16', '16x16x16')
SHAPES = {'v4': _CUBES, 'v5e': _FLAT, 'v5p': (*_CUBES, '16x16x24'), 'v6e': _FLAT,
          'tpu7x': ('1x1x1', *_CUBES, '16x16x24')}

HOP_SECONDS = 1e-6  # Latency of one link (How to Scale Your Model, jax-ml.github.io/scaling-book, part 2).


@dataclasses.dataclass(frozen=True)
class Topology:
  """One or more slices of a TPU generation.  shape: chips along each dimension of a slice."""

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
    """HBM bytes of one JAX device."""
    return self.chip.hbm // self.chip.devices

  @property
  def array(self):
    """Rows and columns of a matrix unit (docs.cloud.google.com/tpu/docs/system-architecture-tpu-vm)."""
    return 256 if self.chip.name in ('v6e', 'tpu7x') else 128

  @property
  def device_peak(self):
    return self.chip.peak_flops / self.chip.devices

  def is_ring(self, dim):
    return self.shape[dim] % self.chip.wrap == 0

  def links(self):
    """Return a description of the links between the chips."""
    dims = [f'{n}{" (ring)" if self.is_ring(i) else " (line)" if n > 1 else ""}' for i, n in enumerate(self.shape)]
    return (f'{" x ".join(dims)}, {self.chip.links} links of {self.chip.link_rate / 1e9:.0f} GB/s each way'
            + (f'; {self.slices} slices, {self.chip.dcn_rate / 1e9:.4g} GB/s a chip between them'
               if self.slices > 1 else ''))


def parse_topology(text, slices=1):
  """Parse a topology such as `v5p:4x4x4`; raise ConfigError, with the known ones, if there is none such."""
  name, _, shape = text.lower().partition(':')
  chips = {chip.name: chip for chip in (*TPUS, *GPUS)}
  listed = [f'{n}: {", ".join(shapes)}' for n, shapes in SHAPES.items()]
  listed.append(f'with --fast, GPUs of one node: {", ".join(f"{chip.name}:8" for chip in GPUS)}')
  if name not in chips:
    near = difflib.get_close_matches(name, chips, n=1, cutoff=0.4)
    hint = f'did you mean {near[0]}? ' if near else ''
    raise ConfigError([f'--topology={text}: unknown chip {name!r}; {hint}known are '
                       + '; '.join(listed)])
  chip = chips[name]
  if not chip.tpu:
    if not re.fullmatch('[1-9][0-9]?', shape):
      raise ConfigError([f'--topology={text}: give the number of GPUs per node, such as {name}:8, and the number '
                         'of nodes as --slices'])
    return Topology(chip, (int(shape),), slices)
  if not re.fullmatch(r'\d+(x\d+)*', shape) or not _exists(chip, tuple(map(int, shape.split('x')))):
    raise ConfigError([f'--topology={text}: {name} has no slice of shape {shape!r}; known are '
                       f'{", ".join(SHAPES[name])}'
                       + ('; larger ones have multiples of 4' if chip.dims == 3 else '')])
  return Topology(chip, tuple(map(int, shape.split('x'))), slices)


def _exists(chip, shape):
  return 'x'.join(map(str, shape)) in SHAPES[chip.name] or (
      chip.dims == 3 == len(shape) and all(n > 0 and n % 4 == 0 for n in shape) and list(shape) == sorted(shape))


@dataclasses.dataclass(frozen=True)
class Place:
  """The location of a device: slice, coordinates of the chip, and core within the chip."""

  slice: int
  coords: tuple[int, ...]
  core: int


def place_of(device):
  """Return the Place of a JAX TPU device."""
  return Place(getattr(device, 'slice_index', 0) or 0, tuple(device.coords), getattr(device, 'core_on_chip', 0) or 0)


def collective_seconds(topology, kind, bytes_, groups, places):
  """Return (seconds, network: 'ici' or 'dcn', bytes sent by one device) of a collective.

  bytes_: buffer of one device.  groups: device numbers; the first group represents all, but all pairs of a permute
  count.  places: the Place of each device.  A ring sends in both directions, a line in one; the dimensions work in
  parallel (How to Scale Your Model, part 3).  Contention with other collectives is ignored.  Across slices, the
  collective runs within each slice first, then on each device's shard between the slices.
  """
  if not groups or max(map(len, groups)) < 2:
    return 0.0, 'ici', 0
  if kind == 'collective-permute':
    return _permute(topology, bytes_, groups, places)
  group = [places[i] for i in groups[0]]
  slices = len({p.slice for p in group})
  inside = len(group) // slices
  passes = 2 if kind == 'all-reduce' else 1
  seconds, sent = 0.0, 0.0
  if inside > 1:
    members = [p for p in group if p.slice == group[0].slice]
    rate, hops, load = _rate(topology, members)
    sent = passes * bytes_ * (inside - 1) / inside
    if kind in ('all-to-all', 'ragged-all-to-all'):
      # A byte travels a quarter of a ring, or a third of a line, on average, along each dimension.
      seconds = bytes_ * load / topology.chip.link_rate * _groups_per_chip(topology, members)
    else:
      seconds = sent / rate + passes * hops * HOP_SECONDS
  if slices == 1:
    return seconds, 'ici', int(sent)
  across = passes * bytes_ / inside * (slices - 1) / slices
  dcn = topology.chip.dcn_rate / topology.chip.devices
  return seconds + across / dcn, 'dcn', int(sent + across)


def _groups_per_chip(topology, group):
  """Return how many groups share the links of a chip, because its devices belong to different ones."""
  return topology.chip.devices / len({p.core for p in group})


def _rate(topology, group):
  """Return (bytes/s that one device of a group can send, hops around the group, link load of an all-to-all)."""
  rate, hops, load = 0.0, 0, 0.0
  for dim, size in enumerate(topology.shape):
    used = len({p.coords[dim] for p in group})
    if used < 2:
      continue
    ring = used == size and topology.is_ring(dim) and size > 2
    rate += topology.chip.link_rate * (2 if ring else 1)
    hops += used // 2 if ring else used - 1
    load = max(load, used / 8 if ring else used / 4)
  if not rate:  # Between the devices of one chip.
    return topology.chip.links * topology.chip.link_rate, 1, 0.5
  return rate / _groups_per_chip(topology, group), hops, load


def _permute(topology, bytes_, pairs, places):
  load, dcn = 0, False
  for source, target in pairs:
    a, b = places[source], places[target]
    dcn = dcn or a.slice != b.slice
    hops = 0
    for dim, size in enumerate(topology.shape):
      distance = abs(a.coords[dim] - b.coords[dim])
      hops += min(distance, size - distance) if topology.is_ring(dim) else distance
    load = max(load, hops)
  if dcn:
    return bytes_ / (topology.chip.dcn_rate / topology.chip.devices), 'dcn', bytes_
  rate = topology.chip.link_rate / topology.chip.devices
  # If all devices send `load` hops away, each link carries that many messages.
  return bytes_ * max(load, 0.5) / rate + load * HOP_SECONDS, 'ici', bytes_
