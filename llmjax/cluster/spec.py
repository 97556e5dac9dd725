"""Options of `llmjax chaos` and `llmjax doctor`.  Imports no JAX, so that `--help` is quick."""

import dataclasses

from llmjax.config import setting

# Faults that `llmjax chaos` injects into a run, with their names in its table.
FAULTS = {
    'kill': 'kill -9 at any moment',
    'save': 'kill -9 during a save',
    'start': 'kill -9 during start-up',
    'terminate': 'SIGTERM (preemption)',
    'stop': 'SIGSTOP (hang)',
    'damage': 'kill -9, newest checkpoint damaged',
    'refuse': 'kill -9, all checkpoints damaged: refused',
    'disk': 'disk full',
}


@dataclasses.dataclass(frozen=True)
class ChaosOptions:
  """Flags of `llmjax chaos`."""

  workdir: str = setting('runs/chaos', 'new folder for both runs and the report chaos.json', kind='folder')
  kills: int = setting(20, 'number of faults to inject', minimum=1, maximum=10_000)
  processes: int = setting(1, 'number of processes of the run', minimum=1, maximum=64)
  devices_per_process: int = setting(0, "emulated CPU devices per process; 0: the machine's own devices, or 1 with "
                                     'several processes', minimum=0, maximum=256)
  steps: int = setting(0, "training steps; 0: the recipe's train.steps", minimum=0)
  seed: int = setting(0, 'seed of the kinds and times of the faults', minimum=0)
  events: tuple[str, ...] = setting((), 'kinds of faults to inject; empty: all', choices=tuple(FAULTS))


@dataclasses.dataclass(frozen=True)
class DoctorOptions:
  """Flags of `llmjax doctor`."""

  platform: str = setting('', 'platform that must be usable; empty: whichever JAX selects',
                          choices=('', 'cpu', 'gpu', 'tpu'))
