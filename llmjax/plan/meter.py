"""Energy, carbon and money that chips use.  Imports no JAX.

A plan charges predicted seconds; a run charges measured seconds (run/energy.py).
"""

import dataclasses

from llmjax.config import setting
from llmjax.parallel.chips import GPUS, TPUS


@dataclasses.dataclass(frozen=True)
class CostSpec:
  """Prices and power.  Quantities that depend on an unset value (0) are not reported."""

  price_per_chip_hour: float = setting(0.0, 'price of one chip for one hour, in cost.currency; 0: unknown', minimum=0.0)
  currency: str = setting('USD', 'currency of cost.price_per_chip_hour')
  chip_watts: float = setting(0.0, 'power of one chip under load in watts, including its share of the host if known '
                              '(CPU: power of one host); 0: the published value, if there is one', minimum=0.0)
  pue: float = setting(1.09, 'power usage effectiveness of the data center; 1.09 is the fleet average of Google in '
                       '2024 (Google Environmental Report 2025)', minimum=1.0)
  grid_grams_per_kwh: float = setting(0.0, 'carbon intensity of the electricity in g CO2e/kWh, for example from '
                                      'app.electricitymaps.com; 0: unknown', minimum=0.0)


@dataclasses.dataclass
class Meter:
  """Accumulates the usage of `chips` chips.  watts: per chip, None if unknown.  source: where the watts come from.

  kwh: energy including the data center's overhead.  kg_co2: operational, location-based CO2 equivalent, without the
  manufacturing of the chips.  money: in spec.currency.  Each is None if a value that it needs is unknown.
  """

  spec: CostSpec
  chips: int
  watts: float | None
  source: str = ''
  seconds: float = 0.0

  def charge(self, seconds):
    """Add seconds during which all chips are in use; return the meter."""
    self.seconds += seconds
    return self

  @property
  def chip_hours(self):
    return self.chips * self.seconds / 3600

  @property
  def kwh(self):
    return None if not self.watts else self.chip_hours * self.watts * self.spec.pue / 1000

  @property
  def kg_co2(self):
    grams = self.spec.grid_grams_per_kwh
    return None if not grams or self.kwh is None else self.kwh * grams / 1000

  @property
  def money(self):
    return self.chip_hours * self.spec.price_per_chip_hour if self.spec.price_per_chip_hour else None

  def report(self):
    """Return all quantities and the settings that they depend on, as a dict."""
    return {'chips': self.chips, 'seconds': self.seconds, 'chip_hours': self.chip_hours, 'kwh': self.kwh,
            'kg_co2': self.kg_co2, 'money': self.money, 'watts_per_chip': self.watts, 'watts_source': self.source,
            **dataclasses.asdict(self.spec)}


def make_meter(spec, chip, chips):
  """Return a Meter.  chip: its table entry, or None for an unknown device.  `spec.chip_watts` takes precedence."""
  if spec.chip_watts:
    return Meter(spec, chips, spec.chip_watts, 'cost.chip_watts')
  if chip is not None and chip.watts:
    return Meter(spec, chips, chip.watts, chip.sources)
  return Meter(spec, chips, None)


def find_chip(device_kind):
  """Return the Chip of a JAX `device_kind`, or None for an unknown one."""
  return next((chip for chip in (*TPUS, *GPUS) if device_kind.startswith(chip.kinds)), None)
