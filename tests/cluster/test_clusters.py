"""The scripts, manifests and commands of the cluster launchers, compared with the files in `golden/`.

After an intended change rewrite them: LLMJAX_WRITE_GOLDEN=1 pytest tests/cluster/test_clusters.py
"""

import os
import pathlib
import subprocess

import pytest
import yaml

from llmjax import main

GOLDEN = pathlib.Path(__file__).parent / 'golden'
TRAIN = ['--', 'pretrain', '--config=configs/pretrain/quickstart.py', '--workdir=/shared/runs/a',
         "--config.sample.prompts=it's a", '--config.train.steps=200']
CASES = {
    'tpu_vm.txt': ['tpu-vm', '--name=pod', '--zone=us-east5-b', '--project=research'],
    'tpu_vm_detached.txt': ['tpu-vm', '--name=pod', '--zone=us-east5-b', '--detach', '--worker=0', '--setup='],
    'slurm.sh': ['slurm', '--nodes=4', '--gpus-per-node=8', '--time=24:00:00', '--partition=gpu',
                 '--account=research', '--cpus-per-process=12', '--setup=source .venv/bin/activate',
                 '--sbatch=--exclusive,--qos=high'],
    'slurm_node.sh': ['slurm', '--nodes=2', '--gpus-per-node=4', '--process-per=node', '--save-seconds=0'],
    'slurm_restart.sh': ['slurm', '--time=1:00:00', '--restart=3'],
    'gke_tpu.yaml': ['gke', '--name=pod', '--image=registry/llmjax:1', '--accelerator=tpu-v6e-slice',
                     '--topology=4x4', '--slices=2', '--service-account=trainer', '--setup=cd /llmjax'],
    'gke_restart.yaml': ['gke', '--image=registry/llmjax:1', '--accelerator=tpu-v6e-slice', '--topology=4x4',
                         '--restart=10'],
    'gke_gpu.yaml': ['gke', '--image=registry/llmjax:1', '--accelerator=nvidia-h100-80gb', '--nodes=4'],
}


def launch(capsys, *argv):
  with pytest.raises(SystemExit) as e:
    main.main(['launch', *argv])
  out, err = capsys.readouterr()
  return e.value.code, out, err


@pytest.mark.parametrize('name', CASES)
def test_text(name, capsys):
  status, out, err = launch(capsys, *CASES[name], '--dry-run', *TRAIN)
  assert (status, err) == (0, '')
  if os.environ.get('LLMJAX_WRITE_GOLDEN'):
    (GOLDEN / name).write_text(out)
  assert out == (GOLDEN / name).read_text()


@pytest.mark.parametrize('cluster', ['slurm.sh', 'gke_tpu.yaml', 'tpu_vm.txt'])
def test_launched_command_is_checked_locally(capsys, cluster):
  here, there = 'configs/pretrain/quickstart.py', '/shared/recipes/mine.py'
  start = lambda *command, flag=(): launch(capsys, *CASES[cluster], '--dry-run', *flag, '--', *command)[::2]
  assert start('pretrain', f'--config={here}', '--workdir=/shared/a', '--config.data.sources=/shared/text') == (0, '')
  assert start('finetune', f'--config={here}', '--workdir=x', '--config.train.init_from=/shared/a',
               '--config.mesh.tensor=64') == (0, '')  # The number of heads is unknown here.
  assert start('evaluate', '--workdir=/shared/a') == (0, '')
  assert start('checkpoint', 'ls', '--workdir=/shared/a') == (0, '')
  assert start('pretrain', f'--config={there}', '--workdir=/shared/a', flag=['--nocheck']) == (0, '')
  for command, problem in [(('pretrain', f'--config={there}', '--workdir=x'), f'{there}: there is no such file'),
                           (('pretrain', f'--config={here}'), '--workdir is missing'),
                           (('evaluate', '--workdir=/shared/a', '--limit=-1'), '--limit=-1 must be at least 0'),
                           (('checkpoint', 'lss'), 'did you mean checkpoint ls?')]:
    status, err = start(*command)
    assert status == 2 and problem in err and err.count('\n') == 1


def test_manifest_does_not_restart_on_invalid_settings():
  jobset = yaml.safe_load((GOLDEN / 'gke_restart.yaml').read_text())
  assert jobset['spec']['failurePolicy'] == {
      'maxRestarts': 10, 'rules': [{'action': 'FailJobSet', 'onJobFailureReasons': ['PodFailurePolicy']}]}
  (job,) = jobset['spec']['replicatedJobs']
  (rule,) = job['template']['spec']['podFailurePolicy']['rules']
  assert rule == {'action': 'FailJob', 'onExitCodes': {'containerName': 'llmjax', 'operator': 'In', 'values': [2]}}


@pytest.mark.parametrize(('statuses', 'ending', 'calls'), [
    ([1, 139, 0], 0, 3), ([1, 1, 1, 7], 7, 4), ([2], 2, 1), ([130], 130, 1), ([1, 75], 0, 3)])
def test_slurm_script_restarts(tmp_path, statuses, ending, calls):
  """srun exits with these statuses in turn; a preempted job calls scontrol last."""
  (tmp_path / 'statuses').write_text('\n'.join(map(str, statuses)) + '\n')
  (tmp_path / 'srun').write_text('#!/bin/bash\necho "srun $*" >> calls\nn=$(wc -l < calls)\n'
                                 'exit "$(sed -n "${n}p" statuses)"\n')
  (tmp_path / 'scontrol').write_text('#!/bin/bash\necho "scontrol $*" >> calls\n')
  (tmp_path / 'sleep').write_text('#!/bin/bash\n')
  for tool in ('srun', 'scontrol', 'sleep'):
    (tmp_path / tool).chmod(0o755)
  done = subprocess.run(['bash', str(GOLDEN / 'slurm_restart.sh')], cwd=tmp_path, check=False,
                        env={'PATH': f'{tmp_path}:/usr/bin:/bin', 'SLURM_JOB_ID': '17'})
  assert done.returncode == ending
  made = (tmp_path / 'calls').read_text().splitlines()
  assert len(made) == calls
  assert made[-1] == ('scontrol requeue 17' if 75 in statuses else made[0])


@pytest.mark.parametrize(('name', 'nodes', 'chips'), [('gke_tpu.yaml', 4, {'google.com/tpu': 4}),
                                                      ('gke_gpu.yaml', 4, {'nvidia.com/gpu': 8})])
def test_manifests_are_valid_jobsets(name, nodes, chips):
  jobset = yaml.safe_load((GOLDEN / name).read_text())
  (job,) = jobset['spec']['replicatedJobs']
  spec = job['template']['spec']
  assert spec['parallelism'] == spec['completions'] == nodes
  (container,) = spec['template']['spec']['containers']
  assert container['resources']['limits'] == chips
  shell, flag, line = container['command']
  assert (shell, flag) == ('bash', '-c')
  assert line.endswith("""llmjax pretrain --config=configs/pretrain/quickstart.py --workdir=/shared/runs/a """
                       """--config.sample.prompts='it'"'"'s a' --config.train.steps=200""")
  for variable in container.get('env', []):
    if variable['name'] == 'LLMJAX_COORDINATOR':  # <jobset>-<job>-<job index>-<pod index>.<jobset>
      assert variable['value'] == f'{jobset["metadata"]["name"]}-{job["name"]}-0-0.{jobset["metadata"]["name"]}:8476'


def test_slurm_script_runs_the_command_as_typed(tmp_path):
  for tool in ('srun', 'llmjax'):  # A stub of srun that skips its own options.
    (tmp_path / tool).write_text('#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\nprintf "%s\\n" "$@"\n')
    (tmp_path / tool).chmod(0o755)
  done = subprocess.run(['bash', str(GOLDEN / 'slurm_node.sh')], capture_output=True, text=True, check=True,
                        env={'PATH': f'{tmp_path}:/usr/bin:/bin'})
  assert done.stdout.splitlines() == ['llmjax', *TRAIN[1:]]


@pytest.mark.parametrize(('argv', 'expected'), [
    ([], '  launch local   run a command'),
    (['tpuvm'], 'launch tpu-vm'),
    (['tpu-vm', '--name=pod', *TRAIN], '--zone is missing'),
    (['slurm'], 'write it after `--`'),
    (['slurm', '--', 'pretrian'], 'did you mean pretrain?'),
    (['slurm', '--', 'launch local'], 'write another command after `--`'),
    (['gke', '--image=i', '--accelerator=tpu-v6e-slice', *TRAIN], "must be the topology of a slice"),
    (['gke', '--image=i', '--accelerator=nvidia-l4', '--topology=2x2', *TRAIN], 'for TPUs'),
    (['slurm', '--nodes=2', *TRAIN], 'sbatch is not installed here'),
])
def test_mistakes_are_reported(capsys, monkeypatch, argv, expected):
  monkeypatch.setenv('PATH', '')
  status, _, err = launch(capsys, *argv)
  assert status == 2
  assert expected in err
