"""`llmjax launch tpu-vm`: runs a command on every host of a Cloud TPU VM over ssh.

The hosts discover each other through the TPU's metadata (parallel/rendezvous.py).
"""

import dataclasses
import shlex

from llmjax.cluster.submit import run_tool, shell_line
from llmjax.config import setting

INSTALL = 'https://cloud.google.com/sdk/docs/install'


@dataclasses.dataclass(frozen=True)
class TpuVmOptions:
  """Flags of `llmjax launch tpu-vm`."""

  name: str = setting('', 'name of the TPU VM, as shown by `gcloud compute tpus tpu-vm list`')
  zone: str = setting('', 'zone, such as us-east5-b')
  project: str = setting('', "Google Cloud project; '': the default of gcloud")
  worker: str = setting('all', 'hosts to run on: all, or a number')
  setup: str = setting('cd ~/llmjax && source .venv/bin/activate', 'shell commands to run first on each host')
  detach: bool = setting(False, 'keep running after the connection ends, with the output in ~/llmjax.log')
  check: bool = setting(True, 'check the command before running it; --nocheck if only the TPU VM has the recipe')
  dry_run: bool = setting(False, 'print the command without running it')

  def validate(self):
    for field in ('name', 'zone'):
      if not getattr(self, field):
        yield f'{field} is missing; `gcloud compute tpus tpu-vm list --zone=-` lists the TPU VMs'


def run(command, options):
  """Run `llmjax <command>` on the hosts; return the status of gcloud."""
  return run_tool(arguments(command, options), dry_run=options.dry_run, install=INSTALL)


def arguments(command, options):
  """Return the command line of gcloud."""
  line = shell_line(command, options.setup)
  if options.detach:
    # In a shell of its own, because `a && b &` would run the `cd` in the background as well.
    line = f'nohup bash -c {shlex.quote(line)} > ~/llmjax.log 2>&1 < /dev/null &'
  project = [f'--project={options.project}'] if options.project else []
  return ['gcloud', 'compute', 'tpus', 'tpu-vm', 'ssh', options.name, f'--zone={options.zone}', *project,
          f'--worker={options.worker}', f'--command={line}']


