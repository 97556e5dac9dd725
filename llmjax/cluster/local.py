"""`llmjax launch local`: runs a command in several supervised processes on this machine.

The processes use emulated CPU devices; all else is as on a cluster: JAX's coordination service, collectives over
sockets, distributed checkpoints.  With one process it supervises a run on the machine's own devices.
"""

import contextlib
import dataclasses
import pathlib
import tempfile

from llmjax.cluster.supervise import Group, Policy, start_processes, supervise
from llmjax.config import setting
from llmjax.parallel.heartbeat import START_SECONDS


@dataclasses.dataclass(frozen=True)
class LocalOptions:
  """Flags of `llmjax launch local`."""

  processes: int = setting(2, 'number of processes', minimum=1, maximum=256)
  devices_per_process: int = setting(1, "emulated CPU devices per process; 0, with --processes=1: the machine's own "
                                     'devices', minimum=0, maximum=256)
  logs: str = setting('', "folder for the output of all processes but the first; '': shown only on failure",
                      kind='folder')
  restart: int = setting(0, 'maximum number of restarts, without a new checkpoint in between, after a process fails or '
                         'hangs', minimum=0)
  backoff: float = setting(1.0, 'seconds before the second consecutive restart; doubles with each further one',
                           minimum=0.0)
  shrink: bool = setting(False, 'restart without the failed processes, if the mesh allows it')
  hang_seconds: float = setting(0.0, 'seconds without progress after which a process is ended; must exceed the time of '
                                'train.log_every steps. 0: with --restart, 10 times the longest step so far, at least '
                                '5 minutes', minimum=0.0)
  start_seconds: float = setting(START_SECONDS, 'the same limit for start-up, compilation, evaluation and saving',
                                 minimum=1.0)

  def validate(self):
    if not self.devices_per_process and self.processes > 1:
      yield f'devices_per_process=0 needs --processes=1, not {self.processes}; write --devices-per-process=1 or more'


def run(command, options):
  """Run `llmjax <command>` in every process; return 0, or the status of the first one that failed.

  Process 0 writes to the terminal.  Signals are forwarded to all processes; if one fails, all are ended.
  """
  policy = Policy(restarts=options.restart, backoff=options.backoff, hang=options.hang_seconds,
                  start=options.start_seconds, shrink=options.shrink)
  with contextlib.ExitStack() as stack:
    folder = pathlib.Path(options.logs or stack.enter_context(tempfile.TemporaryDirectory()))

    def start(count, attempt):
      group = Group(folder, policy)
      start_processes(group, command, count, options.devices_per_process)
      return group

    return supervise(start, options.processes, policy)
