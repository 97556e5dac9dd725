"""What a run uses while it trains: `<workdir>/energy.json`, one entry for each sitting, for the report.

The meter is the one of `llmjax plan`, charged with measured seconds: all that a sitting takes, since its chips are
held, and taken to work, from its first second to its last.
"""

import contextlib
import json
import os
import pathlib

from llmjax.plan.meter import find_chip, make_meter

# What of a sitting is summed, and the field of `cost` without which it is not known.
SUMS = {'chip_hours': '', 'kwh': 'chip_watts', 'kg_co2': 'grid_grams_per_kwh', 'money': 'price_per_chip_hour'}


class EnergyLog:
  """Meters one sitting.  spec: CostSpec.  devices: of the mesh, in all processes.  hosts: number of processes.

  Where devices are CPUs, what counts as a chip is a host.
  """

  def __init__(self, workdir, spec, devices, hosts=1):
    self._path = pathlib.Path(workdir) / 'energy.json'
    kind, cpu = devices[0].device_kind, devices[0].platform == 'cpu'
    chip = None if cpu else find_chip(kind)
    self._meter = make_meter(spec, chip, hosts if cpu else len(devices) / (chip.devices if chip else 1))
    self._kind = f'host with {kind} devices' if cpu else kind
    self._before = read_sittings(self._path)

  def write(self, seconds):
    """Writes the file anew.  seconds: of this sitting so far."""
    self._meter.seconds = seconds
    sittings = [*self._before, {'kind': self._kind, **self._meter.report()}]
    part = self._path.with_suffix('.json.tmp')
    with contextlib.suppress(OSError):  # A full disk is said by what a run cannot do without.
      part.write_text(json.dumps({'total': total(sittings), 'sittings': sittings}, indent=1) + '\n')
      os.replace(part, self._path)


def read_sittings(path):
  """Returns the sittings of an energy.json; none where it is missing or damaged."""
  try:
    found = json.loads(path.read_text())['sittings']
    return [row for row in found if isinstance(row, dict) and isinstance(row.get('seconds'), (int, float))]
  except (OSError, ValueError, KeyError, TypeError):
    return []


def total(sittings):
  """Returns sums over sittings: of each quantity where it is known, and the seconds in which it is not.

  {'seconds', 'chip_hours', 'kwh', 'kg_co2', 'money', 'unknown': {quantity: {'seconds', 'field'}}}; a quantity that no
  sitting knows is None.
  """
  found = {'seconds': sum(row['seconds'] for row in sittings), 'unknown': {}}
  for name, field in SUMS.items():
    known = [row[name] for row in sittings if row.get(name) is not None]
    found[name] = sum(known) if known else None
    without = [row for row in sittings if row.get(name) is None]
    if without:
      # Carbon needs the power, too; that is asked for first.
      needs = 'chip_watts' if name == 'kg_co2' and without[-1].get('kwh') is None else field
      found['unknown'][name] = {'seconds': sum(row['seconds'] for row in without), 'field': f'cost.{needs}'}
  return found
