"""Record the energy, carbon and cost of a run in `<workdir>/energy.json`, one entry per attempt.

Uses the meter of `llmjax plan` with the measured wall time.  Chips are assumed to be busy for the whole attempt.
"""

import contextlib
import json
import os
import pathlib

from llmjax.parallel import distributed
from llmjax.plan.meter import find_chip, make_meter
from llmjax.run.callback import Callback

# Quantities that are summed over attempts, and the `cost` field that each needs.
SUMS = {'chip_hours': '', 'kwh': 'chip_watts', 'kg_co2': 'grid_grams_per_kwh', 'money': 'price_per_chip_hour'}


class EnergyLog(Callback):
  """Record one attempt.

  spec: CostSpec.  devices: all devices of the mesh.  hosts: number of processes.  On CPUs a host counts as a chip.
  """

  def __init__(self, workdir, spec, devices, hosts=1):
    self._path = pathlib.Path(workdir) / 'energy.json'
    kind, cpu = devices[0].device_kind, devices[0].platform == 'cpu'
    chip = None if cpu else find_chip(kind)
    self._meter = make_meter(spec, chip, hosts if cpu else len(devices) / (chip.devices if chip else 1))
    self._kind = f'host with {kind} devices' if cpu else kind
    self._previous = read_attempts(self._path)

  def flush(self, run):
    if distributed.is_first():
      self.write(run.goodput.attempt_seconds)

  def write(self, seconds):
    """Write the file.  seconds: wall time of this attempt so far."""
    self._meter.seconds = seconds
    attempts = [*self._previous, {'kind': self._kind, **self._meter.report()}]
    temporary = self._path.with_suffix('.json.tmp')
    with contextlib.suppress(OSError):  # A full disk is reported by the essential files.
      temporary.write_text(json.dumps({'total': total(attempts), 'attempts': attempts}, indent=1) + '\n')
      os.replace(temporary, self._path)


def read_attempts(path):
  """Return the attempts in an energy.json; [] if it is missing or damaged."""
  try:
    attempts = json.loads(path.read_text())['attempts']
    return [row for row in attempts if isinstance(row, dict) and isinstance(row.get('seconds'), (int, float))]
  except (OSError, ValueError, KeyError, TypeError):
    return []


def total(attempts):
  """Sum each quantity over the attempts in which it is known, None if there are none.

  Returns {'seconds', 'chip_hours', 'kwh', 'kg_co2', 'money', 'unknown'}, where unknown is {quantity: {'seconds':
  of the attempts without it, 'field': the config field to set}}.
  """
  sums = {'seconds': sum(row['seconds'] for row in attempts), 'unknown': {}}
  for name, field in SUMS.items():
    known = [row[name] for row in attempts if row.get(name) is not None]
    sums[name] = sum(known) if known else None
    unknown = [row for row in attempts if row.get(name) is None]
    if unknown:
      # Carbon also needs the power, which is the first field to set.
      missing = 'chip_watts' if name == 'kg_co2' and unknown[-1].get('kwh') is None else field
      sums['unknown'][name] = {'seconds': sum(row['seconds'] for row in unknown), 'field': f'cost.{missing}'}
  return sums
