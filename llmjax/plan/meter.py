"""What chips cost while they work: energy, carbon, money.  No JAX here.

A plan meters predicted seconds, a run measured ones (run/energy.py).
"""

import dataclasses

from llmjax.config import setting
from llmjax.parallel.chips import GPUS, TPUS


@dataclasses.dataclass(frozen=True)
class CostSpec:
  """Prices and power; what is 0 is not known, and nothing that needs it is reported."""

  price_per_chip_hour: float = setting(0.0, 'of one chip, in `currency`; 0: not stated', minimum=0.0)
  currency: str = setting('USD', 'of the price')
  chip_watts: float = setting(0.0, 'of one chip at work, its share of the host included if you know it (on CPUs: of '
                              "one host); 0: the chip table's, where its power is published", minimum=0.0)
  pue: float = setting(1.09, "of the data center: its whole energy over the machines'; 1.09 is the mean of Google's "
                       'in 2024 (Google Environmental Report 2025)', minimum=1.0)
  grid_grams_per_kwh: float = setting(0.0, 'CO2 equivalent of the electricity, for example from '
                                      'app.electricitymaps.com; 0: not stated', minimum=0.0)


@dataclasses.dataclass
class Meter:
  """Adds up what `chips` chips use.  watts: of one chip, None where not known.  source: of the watts.

  kwh: at the data center's meter.  kg_co2: CO2 equivalent of that electricity (location-based; making the chips is
  not in it).  money: in spec.currency.  Each is None where a number it needs is not known.
  """

  spec: CostSpec
  chips: int
  watts: float | None
  source: str = ''
  seconds: float = 0.0

  def charge(self, seconds):
    """Adds seconds in which all chips work; returns the meter."""
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
    """Returns all of it as a dict, with what it was computed from."""
    return {'chips': self.chips, 'seconds': self.seconds, 'chip_hours': self.chip_hours, 'kwh': self.kwh,
            'kg_co2': self.kg_co2, 'money': self.money, 'watts_per_chip': self.watts, 'watts_source': self.source,
            **dataclasses.asdict(self.spec)}


def make_meter(spec, chip, chips):
  """Returns the Meter of so many chips of one kind, None for one of no table; `spec.chip_watts` goes before theirs."""
  if spec.chip_watts:
    return Meter(spec, chips, spec.chip_watts, 'cost.chip_watts')
  if chip is not None and chip.watts:
    return Meter(spec, chips, chip.watts, chip.sources)
  return Meter(spec, chips, None)


def find_chip(device_kind):
  """Returns the Chip of a JAX `device_kind`, or None where no table has it."""
  return next((chip for chip in (*TPUS, *GPUS) if device_kind.startswith(chip.kinds)), None)
