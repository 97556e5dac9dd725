"""`llmjax launch slurm`: submits a command as a Slurm job, with one process per GPU or per node.

The processes discover each other through the variables that srun sets (parallel/rendezvous.py).
"""

import dataclasses

from llmjax.cluster.submit import run_tool, shell_line
from llmjax.cluster.supervise import INTERRUPTED, REFUSED
from llmjax.config import setting
from llmjax.parallel.heartbeat import PREEMPTED


@dataclasses.dataclass(frozen=True)
class SlurmOptions:
  """Flags of `llmjax launch slurm`."""

  nodes: int = setting(1, 'number of nodes', minimum=1)
  gpus_per_node: int = setting(0, 'GPUs per node', minimum=0)
  process_per: str = setting('gpu', 'start one process per GPU, or one per node', choices=('gpu', 'node'))
  cpus_per_process: int = setting(0, "CPUs per process; 0: the cluster's default", minimum=0)
  time: str = setting('', "time limit, such as 24:00:00; '': the default of the partition")
  partition: str = setting('', "partition; '': the default partition")
  account: str = setting('', "account to charge; '': the user's default account")
  name: str = setting('llmjax', 'name of the job')
  log: str = setting('llmjax-%j.log', 'output file; %j is the job ID', kind='path')
  save_seconds: int = setting(180, 'seconds before the time limit at which the job saves a checkpoint; 0: never',
                              minimum=0)
  restart: int = setting(0, 'maximum number of restarts after a failure; with it, a job that reaches its time limit is '
                         'queued again', minimum=0)
  setup: str = setting('', "shell commands to run first, such as 'source .venv/bin/activate'")
  sbatch: tuple[str, ...] = setting((), 'further options of sbatch, such as --qos=high,--exclusive')
  check: bool = setting(True, 'check the command before submitting it; --nocheck if only the cluster has the recipe')
  dry_run: bool = setting(False, 'print the script without submitting it')


def run(command, options):
  """Submit the job; return the status of sbatch."""
  return run_tool(['sbatch'], script(command, options), dry_run=options.dry_run,
                  install="it is part of Slurm: run this on the cluster's login node")


def script(command, options):
  """Return the batch script."""
  per_node = max(options.gpus_per_node, 1) if options.process_per == 'gpu' else 1
  settings = [
      ('job-name', options.name), ('nodes', options.nodes), ('ntasks-per-node', per_node),
      ('gpus-per-node', options.gpus_per_node), ('cpus-per-task', options.cpus_per_process),
      ('time', options.time), ('partition', options.partition), ('account', options.account),
      ('output', options.log), ('open-mode', options.restart and 'append'),
      # JAX treats SIGTERM as a preemption notice, and all processes save the same step.
      ('signal', options.save_seconds and f'TERM@{options.save_seconds}')]
  lines = ['#!/usr/bin/env bash', *(f'#SBATCH --{name}={value}' for name, value in settings if value),
           *['#SBATCH --requeue'] * bool(options.restart),
           *(f'#SBATCH {option}' for option in options.sbatch), 'set -euo pipefail']
  lines += [options.setup] if options.setup else []
  # Since Slurm 22.05 srun ignores the script's cpus-per-task.
  cpus = f'--cpus-per-task={options.cpus_per_process} ' if options.cpus_per_process else ''
  srun = f'srun {cpus}--kill-on-bad-exit=1 {shell_line(command)}'
  if not options.restart:
    return '\n'.join([*lines, srun]) + '\n'
  # Invalid settings and Ctrl-C are final; a job that has saved after SIGTERM returns to the queue.
  lines += ['for ((attempt = 0; ; attempt++)); do', '  status=0', f'  {srun} || status=$?',
            f'  if ((status == {PREEMPTED})); then exec scontrol requeue "$SLURM_JOB_ID"; fi',
            f'  if ((status == 0 || status == {REFUSED} || status == {INTERRUPTED} || attempt >= {options.restart})); '
            'then exit "$status"; fi', '  sleep $((2 ** attempt))', 'done']
  return '\n'.join(lines) + '\n'
