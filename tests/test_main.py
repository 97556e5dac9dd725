"""The command line as its users meet it: quick help, and every mistake in one clear line."""

import subprocess
import sys
import time

import pytest

from llmjax import main


def call(capsys, *argv):
  """Returns (exit status, standard output, standard error) of a command line."""
  with pytest.raises(SystemExit) as e:
    main.main(list(argv))
  out, err = capsys.readouterr()
  return e.value.code, out, err


def test_overview_lists_every_command(capsys):
  status, out, _ = call(capsys)
  assert status == 0
  for name, command in main.COMMANDS.items():
    assert f'  {name}' in out
    assert command.summary in out


@pytest.mark.parametrize('name', main.COMMANDS)
def test_help_shows_flags_and_fields(capsys, name):
  status, out, _ = call(capsys, *name.split(), '--help')
  assert status == 0
  assert 'flags:' in out
  if name == 'pretrain':
    assert '--config.train.steps (int, 1000)' in out


def test_help_needs_no_jax():
  code = ('import sys, time; start = time.time()\n'
          'from llmjax.main import main\n'
          'try: main(["pretrain", "--help"])\n'
          'except SystemExit: pass\n'
          'heavy = {"jax", "flax", "tensorflow", "grain", "tensorflow_datasets"} & set(sys.modules)\n'
          'assert not heavy, heavy\n')
  subprocess.run([sys.executable, '-c', code], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(('argv', 'expected'), [
    (['pretrian'], "there is no command 'pretrian'; did you mean `llmjax pretrain`?"),
    (['pretrain', '--workdir=x'], '--config=FILE is missing; for example llmjax pretrain --config='),
    (['pretrain', '--config=configs/pretrain/quikstart.py', '--workdir=x'],
     'there is no such file; did you mean configs/pretrain/quickstart.py?'),
    (['generate', '--workdir=x', '--temprature=1'],
     '--temprature is not a flag; did you mean --temperature?'),
    (['evaluate', '--workdir=nowhere'], "is not a run's folder (no config.json)"),
    (['evaluate', '--config=x.py', '--workdir=x'], '--config is not for this command'),
    (['doctor', '--platform=gpuu'], 'must be one of cpu, gpu, tpu, or empty; did you mean gpu?'),
    (['checkpoint', 'verfy', '--workdir=x'], 'llmjax checkpoint verify'),
    (['checkpoint', 'diff', '3', '--workdir=x'], 'two are wanted, such as llmjax checkpoint diff 200 400'),
    (['checkpoint', 'verify', 'newest', '--workdir=x'], "--steps=newest must be a whole number"),
    (['checkpoint', 'ls', '--workdir=nowhere'], '--workdir=nowhere has no checkpoints'),
    (['report', 'stray'], "'stray' is not expected here"),
])
def test_mistakes_get_a_line(capsys, argv, expected):
  status, _, err = call(capsys, *argv)
  assert status == 2
  assert expected in err
  assert 'Traceback' not in err


def test_all_mistakes_at_once_and_at_once(capsys):
  start = time.perf_counter()
  status, _, err = call(
      capsys, 'pretrain', '--config=configs/pretrain/quickstart.py', '--config.train.stpes=3',
      '--config.model.num_heads=x', '--config.optimizer.name=adamm', '--flag=1')
  assert time.perf_counter() - start < 1
  assert status == 2
  for line in ('4 problems', 'train.stpes is not a field; did you mean train.steps?',
               "model.num_heads='x' must be a whole number", 'did you mean adamw?',
               '--flag is not a flag'):
    assert line in err
