"""`llmjax doctor` on simulated machines and on this one, and the platform check of a run."""

import dataclasses
import os
import subprocess
import sys

import pytest

from llmjax.cluster import doctor
from llmjax.cluster.spec import DoctorOptions
from llmjax.config import ConfigError
from llmjax.run import hardware


def machine(**changes):
  """A healthy CPU machine, with changes; versions are merged."""
  versions = dict.fromkeys(hardware.CORE, '1.0.0') | dict.fromkeys(hardware.OPTIONAL)
  versions |= {'jaxlib': '0.12.0'} | changes.pop('versions', {})
  return doctor.Machine(**{
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
    # The CPU may be chosen explicitly on a machine with a GPU.
    (machine(gpu_present=True, environment={'JAX_PLATFORMS': 'cpu'}), ''),
    # TensorFlow may be installed, as long as nothing imports it.
    (machine(versions={'tensorflow': '2.20.0'}), '')])
def test_healthy_machine_has_no_problems(facts, platform):
  assert doctor.find_problems(facts, platform) == []


@pytest.mark.parametrize('facts, platform, what, fix', [
    (machine(), 'gpu', "JAX's GPU plugin is not installed", "pip install -U -e '.[cuda]'"),
    (machine(), 'tpu', "JAX's TPU plugin is not installed", "pip install -U -e '.[tpu]'"),
    (machine(versions={'libtpu': '0.0.42'}), 'tpu', 'this machine shows no TPU', 'Cloud TPU VM'),
    (machine(versions=CUDA), 'gpu', 'this machine shows no GPU', 'nvidia-smi'),
    (machine(versions=CUDA, gpu_present=True, warnings=['CUDA failed: bad driver']), 'gpu',
     'could not start it: CUDA failed: bad driver', 'nvidia-smi'),
    (machine(versions={'libtpu': '1'}, tpu_present=True, error='RuntimeError: busy'), 'tpu',
     'could not start it: RuntimeError: busy', 'end other processes'),
    (machine(versions=CUDA, gpu_present=True, environment={'JAX_PLATFORMS': 'cpu'}), 'gpu',
     'JAX_PLATFORMS=cpu excludes it', 'unset JAX_PLATFORMS'),
    (machine(gpu_present=True), '', 'this machine has a GPU, but JAX fell back to the CPU',
     "pip install -U -e '.[cuda]'"),
    (machine(tpu_present=True, versions={'libtpu': '1'}, warnings=['no permission']), '',
     'this machine has a TPU, but JAX fell back to the CPU: no permission', 'JAX_PLATFORMS=cpu'),
    (machine(**GPU), 'cpu', 'cpu was requested, but JAX runs on gpu', 'JAX_PLATFORMS=cpu'),
    (machine(default='', devices={}, error='Unknown flag in XLA_FLAGS: --xla_x'), '',
     'JAX does not start: Unknown flag in XLA_FLAGS', 'remove the flag'),
    (machine(default='', devices={}, error='JAX did not respond within 120 s'), '',
     'did not respond', 'another process'),
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
     'jax-cuda13-plugin 0.10.2 does not match jaxlib 0.12.0', '.[cuda]'),
    (machine(versions={'jax-cuda13-plugin': '0.12.0', 'jax-cuda12-plugin': '0.12.0'}), '',
     'two CUDA plugins', 'pip uninstall'),
    (machine(tensorflow_by='grain.python'), '', 'importing grain.python imports TensorFlow',
     'pip uninstall tensorflow'),
    (machine(memory=(0.5e9, 8e9)), '', 'only 500 MB of memory is free', 'train.batch_size'),
    (machine(disk=(0.5e9, 8e9)), '', 'only 500 MB of disk is free', '--workdir'),
    (machine(cache={'path': '/c', 'files': 0, 'bytes': 0, 'writable': False}), '',
     '/c is not writable', 'JAX_COMPILATION_CACHE_DIR')])
def test_each_problem_is_reported_once_with_its_fix(facts, platform, what, fix):
  problems = doctor.find_problems(facts, platform)
  assert len(problems) == 1, problems
  assert what in problems[0][0] and fix in problems[0][1]


def test_exit_status(monkeypatch, capsys):
  monkeypatch.setattr(doctor, 'inspect_machine', machine)
  assert doctor.run(None, DoctorOptions()) == 0
  assert 'no problems found' in capsys.readouterr().out
  assert doctor.run(None, DoctorOptions(platform='tpu')) == 1
  out = capsys.readouterr().out
  assert 'PROBLEM  a TPU was requested' in out and '1 problem found' in out


def test_proxy_passwords_are_masked():
  facts = machine(environment={'https_proxy': 'http://me:secret@proxy:3128',
                               'WANDB_API_KEY': 'secret', 'XLA_FLAGS': '--xla_a=1'})
  text = '\n'.join(doctor.describe(facts))
  assert 'secret' not in text and 'http://***@proxy:3128' in text and '--xla_a=1' in text


def test_this_machine_is_probed_in_a_subprocess():
  facts = doctor.inspect_machine()
  assert facts.default == 'cpu' and facts.devices['cpu'] and not facts.error
  assert facts.tensorflow_by == '' and facts.cpus >= 1 and facts.memory[0] <= facts.memory[1]
  assert any('jax ' in line for line in doctor.describe(facts))


def test_invalid_xla_flag_is_reported(monkeypatch):
  monkeypatch.setenv('XLA_FLAGS', '--xla_no_such_flag=1')
  (what, fix), = doctor.find_problems(dataclasses.replace(doctor.inspect_machine(), memory=(None, None)))
  assert 'xla_no_such_flag' in what and 'remove the flag' in fix


def test_require_platform_rejects_an_absent_platform():
  assert hardware.require_platform() == hardware.require_platform('cpu') == 'cpu'
  with pytest.raises(ConfigError, match='TPU was requested'):
    hardware.require_platform('tpu')


def test_require_platform_rejects_a_silent_fallback_to_the_cpu(monkeypatch):
  import jax
  monkeypatch.setattr(hardware, 'detect_accelerators', lambda: {'gpu_present': True, 'tpu_present': False})
  chosen = jax.config.jax_platforms
  monkeypatch.delenv('JAX_PLATFORMS', raising=False)
  try:
    jax.config.update('jax_platforms', None)
    with pytest.raises(ConfigError, match='machine has a GPU, but JAX fell back to the CPU'):
      hardware.require_platform()
  finally:
    jax.config.update('jax_platforms', chosen)


def test_options_import_no_jax():
  code = ('import sys, llmjax.evaluate.spec, llmjax.run.profiler, llmjax.cluster.doctor, '
          'llmjax.run.writers, llmjax.run.progress, llmjax.report.report; '
          'sys.exit("jax" in sys.modules)')
  assert subprocess.run([sys.executable, '-c', code], check=False, env=os.environ | {
      'PYTHONPATH': os.pathsep.join(sys.path)}).returncode == 0
