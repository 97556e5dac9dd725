"""`llmjax launch slurm`: the command as one Slurm job, one process a GPU or a node.

The processes find one another through the variables that srun sets (parallel/rendezvous.py).
"""

import dataclasses

from llmjax.cluster.submit import run_tool, shell_line
from llmjax.cluster.supervise import INTERRUPTED, REFUSED
from llmjax.config import setting
from llmjax.parallel.heartbeat import PREEMPTED


@dataclasses.dataclass(frozen=True)
class SlurmOptions:
  """Flags of `llmjax launch slurm`."""

  nodes: int = setting(1, 'nodes', minimum=1)
  gpus_per_node: int = setting(0, 'GPUs of each node; 0: none', minimum=0)
  process_per: str = setting('gpu', 'one process for each GPU, or one for each node', choices=('gpu', 'node'))
  cpus_per_process: int = setting(0, "CPUs of each process; 0: the cluster's default", minimum=0)
  time: str = setting('', "longest run, such as 24:00:00; '': the partition's")
  partition: str = setting('', "partition; '': the default one")
  account: str = setting('', "account to charge; '': yours")
  name: str = setting('llmjax', "the job's name")
  log: str = setting('llmjax-%j.log', 'file for its output; %j is the job', kind='path')
  save_seconds: int = setting(180, 'the job is told so long before its time is up, and saves; 0: never',
                              minimum=0)
  restart: int = setting(0, 'start it again after a failure, at most so often; and back into the queue when it has '
                         'saved because its time is up', minimum=0)
  setup: str = setting('', "shell commands before it, such as 'source .venv/bin/activate'")
  sbatch: tuple[str, ...] = setting((), 'more options of sbatch, such as --qos=high,--exclusive')
  check: bool = setting(True, 'check the command here first; --nocheck where only the cluster has the recipe')
  dry_run: bool = setting(False, 'print the script and submit nothing')


def run(command, options):
  """Submits the job; returns sbatch's status."""
  return run_tool(['sbatch'], script(command, options), dry_run=options.dry_run,
                  install="it comes with Slurm: run this on the cluster's login node")


def script(command, options):
  """Returns the text that sbatch reads."""
  per_node = max(options.gpus_per_node, 1) if options.process_per == 'gpu' else 1
  settings = [
      ('job-name', options.name), ('nodes', options.nodes), ('ntasks-per-node', per_node),
      ('gpus-per-node', options.gpus_per_node), ('cpus-per-task', options.cpus_per_process),
      ('time', options.time), ('partition', options.partition), ('account', options.account),
      ('output', options.log), ('open-mode', options.restart and 'append'),
      # JAX takes SIGTERM as the notice to save a checkpoint together.
      ('signal', options.save_seconds and f'TERM@{options.save_seconds}')]
  lines = ['#!/usr/bin/env bash', *(f'#SBATCH --{name}={value}' for name, value in settings if value),
           *['#SBATCH --requeue'] * bool(options.restart),
           *(f'#SBATCH {option}' for option in options.sbatch), 'set -euo pipefail']
  lines += [options.setup] if options.setup else []
  # srun takes cpus-per-task from no script since Slurm 22.05.
  cpus = f'--cpus-per-task={options.cpus_per_process} ' if options.cpus_per_process else ''
  srun = f'srun {cpus}--kill-on-bad-exit=1 {shell_line(command)}'
  if not options.restart:
    return '\n'.join([*lines, srun]) + '\n'
  # A wrong setting and Ctrl-C are final; what has saved after SIGTERM waits in the queue for more time.
  lines += ['for ((attempt = 0; ; attempt++)); do', '  status=0', f'  {srun} || status=$?',
            f'  if ((status == {PREEMPTED})); then exec scontrol requeue "$SLURM_JOB_ID"; fi',
            f'  if ((status == 0 || status == {REFUSED} || status == {INTERRUPTED} || attempt >= {options.restart})); '
            'then exit "$status"; fi', '  sleep $((2 ** attempt))', 'done']
  return '\n'.join(lines) + '\n'
