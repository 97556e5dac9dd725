"""`llmjax launch local`: one command as several processes of this machine, watched and started again.

It is the real thing but for the chips: JAX's coordination service, collectives over sockets, checkpoints
written together, on emulated CPU devices.  With one process it supervises a run on the machine's own devices.
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

  processes: int = setting(2, 'processes to start', minimum=1, maximum=256)
  devices_per_process: int = setting(1, "emulated CPU devices of each; 0, with --processes=1: the machine's own "
                                     'devices', minimum=0, maximum=256)
  logs: str = setting('', "folder for what processes other than the first print; '': shown only when one fails",
                      kind='folder')
  restart: int = setting(0, 'start all again when one dies or hangs, at most so often without a new good '
                         'checkpoint in between', minimum=0)
  backoff: float = setting(1.0, 'seconds before the second restart in a row, doubled for each further one',
                           minimum=0.0)
  shrink: bool = setting(False, 'restart with the processes that are left, where the mesh allows it')
  hang_seconds: float = setting(0.0, 'a loop that stands still longer hangs, and is ended; must be more than '
                                'log_every steps take. 0: with --restart, 10 times the longest wait for steps so '
                                'far, 5 minutes at least', minimum=0.0)
  start_seconds: float = setting(START_SECONDS, 'longest start, compilation, evaluation or save', minimum=1.0)

  def validate(self):
    if not self.devices_per_process and self.processes > 1:
      yield f'devices_per_process=0 is for --processes=1, not {self.processes}; say how many to emulate for each'


def run(command, options):
  """Runs `llmjax <command>` in every process; returns 0, or the status of the one that failed first.

  Process 0 has the terminal.  Signals go to all; when one process ends badly, all end.
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
