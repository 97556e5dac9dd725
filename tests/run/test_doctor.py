"""The doctor's judgement of made-up machines, and of this one."""

import dataclasses
import os
import subprocess
import sys

import pytest

from llmjax.config import ConfigError
from llmjax.evaluate.spec import DoctorOptions
from llmjax.run import doctor


def machine(**changes):
  """A healthy CPU machine, with changes; versions are added to."""
  versions = dict.fromkeys(doctor.CORE, '1.0.0') | dict.fromkeys(doctor.OPTIONAL)
  versions |= {'jaxlib': '0.12.0'} | changes.pop('versions', {})
  return doctor.Facts(**{
      'versions': versions, 'python': (3, 12), 'devices': {'cpu': ['cpu']}, 'default': 'cpu',
      'memory': (8e9, 16e9), 'disk': (50e9, 100e9),
      'cache': {'path': '/c', 'files': 0, 'bytes': 0, 'writable': True}, **changes})


GPU = {'devices': {'gpu': ['NVIDIA H100'], 'cpu': ['cpu']}, 'default': 'gpu', 'gpu_present': True,
       'versions': {'jax-cuda13-plugin': '0.12.0'}}
CUDA = {'jax-cuda13-plugin': '0.12.0'}


@pytest.mark.parametrize('facts, platform', [
    (machine(), ''), (machine(), 'cpu'), (machine(**GPU), ''), (machine(**GPU), 'gpu'),
    # libtpu without a TPU is how programs are compiled ahead of time on a laptop.
    (machine(versions={'libtpu': '0.0.42'}), ''),
    # Who chooses the CPU on a machine with a GPU gets it.
    (machine(gpu_present=True, environment={'JAX_PLATFORMS': 'cpu'}), ''),
    # TensorFlow may be installed, as long as nothing imports it.
    (machine(versions={'tensorflow': '2.20.0'}), '')])
def test_a_healthy_machine_has_no_problem(facts, platform):
  assert doctor.find_problems(facts, platform) == []


@pytest.mark.parametrize('facts, platform, what, fix', [
    (machine(), 'gpu', "JAX's GPU plugin is not installed", "pip install -U -e '.[cuda]'"),
    (machine(), 'tpu', "JAX's TPU plugin is not installed", "pip install -U -e '.[tpu]'"),
    (machine(versions={'libtpu': '0.0.42'}), 'tpu', 'this machine shows no TPU', 'Cloud TPU VM'),
    (machine(versions=CUDA), 'gpu', 'this machine shows no GPU', 'nvidia-smi'),
    (machine(versions=CUDA, gpu_present=True, complaints=['CUDA failed: bad driver']), 'gpu',
     'could not start it: CUDA failed: bad driver', 'nvidia-smi'),
    (machine(versions={'libtpu': '1'}, tpu_present=True, error='RuntimeError: busy'), 'tpu',
     'could not start it: RuntimeError: busy', 'end other processes'),
    (machine(versions=CUDA, gpu_present=True, environment={'JAX_PLATFORMS': 'cpu'}), 'gpu',
     'JAX_PLATFORMS=cpu keeps JAX from it', 'unset JAX_PLATFORMS'),
    (machine(gpu_present=True), '', 'a GPU is in this machine, but JAX fell back to the CPU',
     "pip install -U -e '.[cuda]'"),
    (machine(tpu_present=True, versions={'libtpu': '1'}, complaints=['no permission']), '',
     'a TPU is in this machine, but JAX fell back to the CPU: no permission', 'JAX_PLATFORMS=cpu'),
    (machine(**GPU), 'cpu', 'cpu was asked for, but JAX runs on gpu', 'JAX_PLATFORMS=cpu'),
    (machine(default='', devices={}, error='Unknown flag in XLA_FLAGS: --xla_x'), '',
     'JAX does not start: Unknown flag in XLA_FLAGS', 'remove the flag'),
    (machine(default='', devices={}, error='JAX did not answer within 120 s'), '',
     'did not answer', 'another process'),
    (machine(python=(3, 10)), '', 'Python 3.10 is not supported', '3.11, 3.12 or 3.13'),
    (machine(versions={'optax': None, 'grain': None}), '', 'not installed: optax, grain',
     'pip install optax grain'),
    (machine(versions={'jax': None}, import_errors={'jax': 'no'}, error='no', devices={}), '',
     'not installed: jax', 'pip install jax'),
    (machine(import_errors={'jax': 'no'}, error='jaxlib is too old', devices={}, default=''), '',
     'JAX does not start: jaxlib is too old', 'their versions must match'),
    (machine(import_errors={'orbax.checkpoint': 'ImportError: x'}), '',
     'importing orbax.checkpoint fails: ImportError: x', 'orbax-checkpoint'),
    (machine(versions={'jax-cuda13-plugin': '0.10.2', 'jaxlib': '0.12.0'}), '',
     'jax-cuda13-plugin 0.10.2 does not belong to jaxlib 0.12.0', '.[cuda]'),
    (machine(versions={'jax-cuda13-plugin': '0.12.0', 'jax-cuda12-plugin': '0.12.0'}), '',
     'two CUDA plugins', 'pip uninstall'),
    (machine(tensorflow_by='grain.python'), '', 'importing grain.python brings in TensorFlow',
     'pip uninstall tensorflow'),
    (machine(memory=(0.5e9, 8e9)), '', 'only 500 MB of memory is free', 'train.batch_size'),
    (machine(disk=(0.5e9, 8e9)), '', 'only 500 MB of disk is free', '--workdir'),
    (machine(cache={'path': '/c', 'files': 0, 'bytes': 0, 'writable': False}), '',
     'cannot be kept in /c', 'JAX_COMPILATION_CACHE_DIR')])
def test_each_fault_is_named_once_with_its_remedy(facts, platform, what, fix):
  problems = doctor.find_problems(facts, platform)
  assert len(problems) == 1, problems
  assert what in problems[0][0] and fix in problems[0][1]


def test_a_wrong_machine_ends_with_status_1_and_a_right_one_with_0(monkeypatch, capsys):
  monkeypatch.setattr(doctor, 'gather', machine)
  assert doctor.run(None, DoctorOptions()) == 0
  assert 'all is well' in capsys.readouterr().out
  assert doctor.run(None, DoctorOptions(platform='tpu')) == 1
  out = capsys.readouterr().out
  assert 'WRONG  a TPU was asked for' in out and '1 problem found' in out


def test_passwords_in_proxies_are_not_printed():
  facts = machine(environment={'https_proxy': 'http://me:secret@proxy:3128',
                               'WANDB_API_KEY': 'secret', 'XLA_FLAGS': '--xla_a=1'})
  text = '\n'.join(doctor.describe(facts))
  assert 'secret' not in text and 'http://***@proxy:3128' in text and '--xla_a=1' in text


def test_this_machine_is_described_in_a_process_of_its_own():
  facts = doctor.gather()
  assert facts.default == 'cpu' and facts.devices['cpu'] and not facts.error
  assert facts.tensorflow_by == '' and facts.cpus >= 1 and facts.memory[0] <= facts.memory[1]
  assert any('jax ' in line for line in doctor.describe(facts))


def test_a_flag_that_aborts_xla_becomes_a_sentence(monkeypatch):
  monkeypatch.setenv('XLA_FLAGS', '--xla_no_such_flag=1')
  (what, fix), = doctor.find_problems(dataclasses.replace(doctor.gather(), memory=(None, None)))
  assert 'xla_no_such_flag' in what and 'remove the flag' in fix


def test_a_run_refuses_a_platform_that_is_absent():
  assert doctor.require_platform() == doctor.require_platform('cpu') == 'cpu'
  with pytest.raises(ConfigError, match='TPU was asked for'):
    doctor.require_platform('tpu')


def test_a_run_never_falls_back_to_the_cpu_in_silence(monkeypatch):
  import jax
  monkeypatch.setattr(doctor, '_hardware', lambda: {'gpu_present': True, 'tpu_present': False})
  chosen = jax.config.jax_platforms
  monkeypatch.delenv('JAX_PLATFORMS', raising=False)
  try:
    jax.config.update('jax_platforms', None)
    with pytest.raises(ConfigError, match='GPU is in this machine, but JAX fell back to the CPU'):
      doctor.require_platform()
  finally:
    jax.config.update('jax_platforms', chosen)


def test_options_and_the_profile_group_need_no_jax():
  code = ('import sys, llmjax.evaluate.spec, llmjax.run.profiler, llmjax.run.doctor, '
          'llmjax.run.writers, llmjax.run.progress, llmjax.report.report; '
          'sys.exit("jax" in sys.modules)')
  assert subprocess.run([sys.executable, '-c', code], check=False, env=os.environ | {
      'PYTHONPATH': os.pathsep.join(sys.path)}).returncode == 0
