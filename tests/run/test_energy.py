"""Energy, carbon and cost of a run are summed over its attempts; unknown quantities name the field to set."""

import dataclasses
import json

import pytest

from llmjax.plan.meter import CostSpec, find_chip
from llmjax.run.energy import EnergyLog, read_attempts


@dataclasses.dataclass
class Device:
  device_kind: str
  platform: str = 'tpu'


def read(folder):
  return json.loads((folder / 'energy.json').read_text())


def test_quantities_are_summed_over_attempts_with_their_own_chips_and_prices(tmp_path):
  spec = CostSpec(chip_watts=500, pue=1.2, grid_grams_per_kwh=100, price_per_chip_hour=2.0)
  first = EnergyLog(tmp_path, spec, [Device('TPU v5p')] * 8)
  first.write(60.0)
  first.write(1800.0)  # The same attempt, later.
  total = read(tmp_path)['total']
  assert total['chip_hours'] == pytest.approx(8 * 0.5)
  assert total['kwh'] == pytest.approx(8 * 0.5 * 0.5 * 1.2)
  assert total['kg_co2'] == pytest.approx(total['kwh'] * 0.1)
  assert total['money'] == pytest.approx(8.0)
  assert total['unknown'] == {}
  second = EnergyLog(tmp_path, dataclasses.replace(spec, price_per_chip_hour=0.0), [Device('TPU v5p')] * 4)
  second.write(3600.0)
  found = read(tmp_path)
  assert [row['chips'] for row in found['attempts']] == [8, 4]
  assert found['total']['seconds'] == 5400.0
  assert found['total']['kwh'] == pytest.approx(2.4 + 4 * 0.5 * 1.2)
  assert found['total']['money'] == pytest.approx(8.0)  # Of the attempt whose price is known.
  assert found['total']['unknown'] == {'money': {'seconds': 3600.0, 'field': 'cost.price_per_chip_hour'}}


@pytest.mark.parametrize(('device', 'watts', 'field'), [
    (Device('NVIDIA H100 80GB HBM3', 'gpu'), 700, None), (Device('TPU v4'), 170, None),
    (Device('TPU v5 lite'), None, 'cost.chip_watts'), (Device('cpu', 'cpu'), None, 'cost.chip_watts'),
    (Device('NVIDIA GeForce 9', 'gpu'), None, 'cost.chip_watts')])
def test_power_comes_from_the_table_or_is_unknown(tmp_path, device, watts, field):
  EnergyLog(tmp_path, CostSpec(pue=1.0), [device] * 2).write(3600.0)
  found = read(tmp_path)
  (row,) = found['attempts']
  assert row['watts_per_chip'] == watts
  assert found['total']['unknown'].get('kwh', {}).get('field') == field
  assert found['total']['unknown']['kg_co2']['field'] == (field or 'cost.grid_grams_per_kwh')
  if watts:
    assert found['total']['kwh'] == pytest.approx(2 * watts / 1000)
    assert row['watts_source']


def test_cpu_hosts_and_tpu_cores_are_counted_as_chips(tmp_path):
  EnergyLog(tmp_path / '.', CostSpec(chip_watts=200, pue=1.0), [Device('cpu', 'cpu')] * 8, hosts=2).write(3600.0)
  assert read(tmp_path)['total']['kwh'] == pytest.approx(0.4)
  (tmp_path / 'energy.json').write_text('{"attempts": [3, {"seconds": "x"}]')
  assert read_attempts(tmp_path / 'energy.json') == []
  EnergyLog(tmp_path, CostSpec(), [Device('TPU7x')] * 8).write(3600.0)  # Two devices are a chip.
  assert read(tmp_path)['total']['chip_hours'] == 4


def test_device_kinds_are_found():
  names = {'TPU v5 lite': 'v5e', 'TPU v5': 'v5p', 'TPU v5p': 'v5p', 'TPU v6 lite': 'v6e', 'NVIDIA H200': 'h200'}
  assert {kind: find_chip(kind).name for kind in names} == names
  assert find_chip('cpu') is None
