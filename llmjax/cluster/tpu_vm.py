"""`llmjax launch tpu-vm`: the command on every host of a Cloud TPU VM, over ssh.

The hosts find one another through the TPU's metadata (parallel/rendezvous.py).
"""

import dataclasses
import shlex

from llmjax.cluster.submit import run_tool, shell_line
from llmjax.config import setting

INSTALL = 'https://cloud.google.com/sdk/docs/install'


@dataclasses.dataclass(frozen=True)
class TpuVmOptions:
  """Flags of `llmjax launch tpu-vm`."""

  name: str = setting('', 'of the TPU VM, as `gcloud compute tpus tpu-vm list` shows it')
  zone: str = setting('', 'such as us-east5-b')
  project: str = setting('', "Google Cloud project; '': gcloud's own")
  worker: str = setting('all', 'hosts to start it on')
  setup: str = setting('cd ~/llmjax && source .venv/bin/activate', 'shell commands before it on each host')
  detach: bool = setting(False, 'let it run on when the connection ends; its output goes to ~/llmjax.log')
  check: bool = setting(True, 'check the command here first; --nocheck where only the TPU VM has the recipe')
  dry_run: bool = setting(False, 'print the command and run nothing')

  def validate(self):
    for field in ('name', 'zone'):
      if not getattr(self, field):
        yield f'{field} is missing; `gcloud compute tpus tpu-vm list --zone=-` shows what there is'


def run(command, options):
  """Runs `llmjax <command>` on the hosts; returns gcloud's status."""
  return run_tool(arguments(command, options), dry_run=options.dry_run, install=INSTALL)


def arguments(command, options):
  """Returns gcloud's argument list."""
  line = shell_line(command, options.setup)
  if options.detach:
    # In a subshell of its own, for `a && b &` would put the `cd` in the background, too.
    line = f'nohup bash -c {shlex.quote(line)} > ~/llmjax.log 2>&1 < /dev/null &'
  project = [f'--project={options.project}'] if options.project else []
  return ['gcloud', 'compute', 'tpus', 'tpu-vm', 'ssh', options.name, f'--zone={options.zone}', *project,
          f'--worker={options.worker}', f'--command={line}']


