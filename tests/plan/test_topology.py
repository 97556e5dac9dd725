"""Durations of collectives against manual calculations, topology names, and the meter."""

import pytest

from llmjax.config import ConfigError
from llmjax.parallel.chips import TPUS
from llmjax.plan.meter import CostSpec, make_meter
from llmjax.plan.topology import HOP_SECONDS, Place, collective_seconds, parse_topology

MIB = 1 << 20


def places(topology):
  x, y, z = (*topology.shape, 1)[:3]
  return [Place(s, (i, j, k), c) for s in range(topology.slices) for k in range(z) for j in range(y) for i in range(x)
          for c in range(topology.chip.devices)]


def seconds(topology, kind, bytes_, groups):
  return collective_seconds(topology, kind, bytes_, groups, places(topology))


def test_gather_over_a_torus_uses_all_links():
  v5p = parse_topology('v5p:4x4x4')
  whole = [tuple(range(64))]
  found, network, sent = seconds(v5p, 'all-gather', 64 * MIB, whole)
  assert network == 'ici'
  assert sent == 63 * MIB
  assert found == pytest.approx(63 * MIB / 600e9 + 6 * HOP_SECONDS)
  assert seconds(v5p, 'all-reduce', 64 * MIB, whole)[0] == pytest.approx(2 * found)
  # Along one dimension of four chips: a ring.
  assert seconds(v5p, 'all-gather', 64 * MIB, [(0, 1, 2, 3)])[0] == pytest.approx(
      48 * MIB / 200e9 + 2 * HOP_SECONDS)


def test_line_has_half_the_bandwidth_of_a_ring():
  part, whole = parse_topology('v5e:8x8'), parse_topology('v5e:16x16')
  line, _, _ = seconds(part, 'all-gather', 8 * MIB, [tuple(range(8))])
  assert line == pytest.approx(7 * MIB / 50e9 + 7 * HOP_SECONDS)
  ring, _, _ = seconds(whole, 'all-gather', 16 * MIB, [tuple(range(16))])
  assert ring == pytest.approx(15 * MIB / 100e9 + 8 * HOP_SECONDS)


def test_across_slices_each_device_sends_its_shard():
  two = parse_topology('v6e:4x4', 2)
  found, network, sent = seconds(two, 'all-reduce', 32 * MIB, [tuple(range(32))])
  inside, _, _ = seconds(parse_topology('v6e:4x4'), 'all-reduce', 32 * MIB, [tuple(range(16))])
  assert network == 'dcn'
  assert found == pytest.approx(inside + 2 * MIB / 12.5e9)
  assert sent == 60 * MIB + 2 * MIB


def test_permute_to_a_neighbour_uses_one_link():
  v5p = parse_topology('v5p:4x4x4')
  around = [(i, (i + 1) % 4) for i in range(4)]
  assert seconds(v5p, 'collective-permute', MIB, around)[0] == pytest.approx(MIB / 100e9 + HOP_SECONDS)
  across = [(i, (i + 2) % 4) for i in range(4)]
  assert seconds(v5p, 'collective-permute', MIB, across)[0] == pytest.approx(2 * MIB / 100e9 + 2 * HOP_SECONDS)
  assert seconds(v5p, 'all-gather', MIB, [(3,)]) == (0.0, 'ici', 0)


def test_cores_of_a_chip_share_its_links():
  tpu7x = parse_topology('tpu7x:4x4x4')
  one_core = [tuple(range(0, 8, 2))]
  both = [tuple(range(8))]
  assert seconds(tpu7x, 'all-gather', 8 * MIB, one_core)[0] == pytest.approx(6 * MIB / 100e9 + 2 * HOP_SECONDS)
  assert seconds(tpu7x, 'all-gather', 8 * MIB, both)[0] == pytest.approx(7 * MIB / 200e9 + 2 * HOP_SECONDS)


@pytest.mark.parametrize(('name', 'words'), [
    ('v5x:4x4', 'did you mean v5p?'), ('v5x:4x4', 'v6e: 1x1, 2x2, 2x4, 4x4'), ('v5p:3x4x4', 'known are 2x2x1, 2x2x2'),
    ('v5e:5x5', 'known are 1x1, 2x2'), ('h100', 'as h100:8')])
def test_unknown_topology_lists_the_known_ones(name, words):
  with pytest.raises(ConfigError, match=words.replace('?', r'\?')):
    parse_topology(name)


def test_chip_table_is_consistent():
  """Peak FLOP/s = 2 x multipliers x clock; devices = chips x devices per chip."""
  multipliers = {'v4': 8 * 128**2, 'v5e': 4 * 128**2, 'v5p': 8 * 128**2, 'v6e': 4 * 256**2, 'tpu7x': 8 * 256**2}
  for chip in TPUS:
    assert chip.peak_flops == pytest.approx(2 * multipliers[chip.name] * chip.clock, rel=0.005), chip.name
  assert parse_topology('tpu7x:2x2x1').devices == 8
  assert parse_topology('v5p:16x16x24').chips == 6144
  assert parse_topology('v5p:4x4x12').chips == 192


def test_meter_reports_only_known_quantities():
  v5p = parse_topology('v5p:4x4x4')
  silent = make_meter(CostSpec(), v5p.chip, 64).charge(3600)
  assert (silent.chip_hours, silent.kwh, silent.kg_co2, silent.money) == (64, None, None, None)
  spec = CostSpec(price_per_chip_hour=4.2, chip_watts=500, pue=1.1, grid_grams_per_kwh=200)
  meter = make_meter(spec, v5p.chip, 64).charge(1800).charge(1800)
  assert meter.kwh == pytest.approx(64 * 0.5 * 1.1)
  assert meter.kg_co2 == pytest.approx(64 * 0.5 * 1.1 * 0.2)
  assert meter.money == pytest.approx(64 * 4.2)
  assert make_meter(CostSpec(), parse_topology('v4:4x4x4').chip, 2).charge(3600).kwh == pytest.approx(0.34 * 1.09)
