"""The command line as its users meet it: quick help, and every mistake in one clear line."""

import signal
import subprocess
import sys
import threading
import time

import pytest

from llmjax import main
from tests.helpers import call_and_read


def test_overview_lists_every_command(capsys):
  status, out, _ = call_and_read(capsys)
  assert status == 0
  for name, command in main.COMMANDS.items():
    assert f'  {name}' in out
    assert command.summary in out


@pytest.mark.parametrize('name', main.COMMANDS)
def test_help_shows_flags_and_fields(capsys, name):
  status, out, _ = call_and_read(capsys, *name.split(), '--help')
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
    (['report', 'stray'], "llmjax report: 'stray' is not expected here"),
    (['pretrain', '--config', 'configs/pretrain/quikstart.py', '--workdir=x'],
     'pretrain: --config=configs/pretrain/quikstart.py: there is no such file; did you mean'),
    (['pretrain', '--config', '--workdir=x'], '--config needs a file: write --config=FILE'),
    (['pretrain', '--config=configs/quickstart.py', '--workdir=x'],
     'did you mean configs/pretrain/quickstart.py?'),
    (['pretrain', '--config=configs/pretrain', '--workdir=x'],
     'is a folder; name a recipe in it, such as configs/pretrain/gpt2_124m.py'),
    (['pretrain', '--config=README.md', '--workdir=x'], 'README.md is no recipe: a recipe is a .py file'),
    (['pretrain', '--config=configs/data/tfds.py', '--workdir=x'],
     'pretrain: --config=configs/data/tfds.py is a recipe of `llmjax prepare`; for example'),
    (['pretrain', '--config=configs/pretrain/quickstart.py', '--workdir=x', '--train.steps=3'],
     '--train.steps is not a flag; did you mean --config.train.steps?\n'),
    (['prepare', '--text-dir=tests', '--output=x'],
     '--output is not a flag; did you mean --config.output?\n'),
    (['launch', 'lokal'],
     "llmjax launch: 'lokal' is not one of its commands; did you mean `llmjax launch local`?"),
])
def test_mistakes_get_a_line(capsys, argv, expected):
  status, _, err = call_and_read(capsys, *argv)
  assert status == 2
  assert expected in err
  assert 'Traceback' not in err


def test_all_mistakes_at_once_and_at_once(capsys):
  start = time.perf_counter()
  status, _, err = call_and_read(
      capsys, 'pretrain', '--config=configs/pretrain/quickstart.py', '--config.train.stpes=3',
      '--config.model.num_heads=x', '--config.optimizer.name=adamm', '--flag=1')
  assert time.perf_counter() - start < 1
  assert status == 2
  for line in ('4 problems', 'train.stpes is not a field; did you mean train.steps?',
               "model.num_heads='x' must be a whole number", 'did you mean adamw?',
               '--flag is not a flag'):
    assert line in err


def test_a_group_of_commands_lists_its_own(capsys):
  status, _, err = call_and_read(capsys, 'checkpoint')
  assert status == 2
  assert '  checkpoint verify  read every file' in err
  assert 'pretrain' not in err
  assert call_and_read(capsys, 'launch', '--help')[0] == 0


def test_recipe_after_a_space():
  spec, _ = main.parse(main.COMMANDS['mesh'], ['--config', 'configs/pretrain/quickstart.py', '--no-compile',
                                               '--config.model.vocab_size', '512'])
  assert (spec.model.num_layers, spec.model.vocab_size) == (4, 512)


def test_a_reader_that_has_had_enough_gets_no_traceback():
  command = subprocess.Popen([sys.executable, '-m', 'llmjax', 'help'], stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True)
  command.stdout.close()
  assert 'Traceback' not in command.stderr.read()
  command.wait()


def test_ctrl_c_while_a_module_is_imported(tmp_path, monkeypatch, request):
  module = tmp_path / 'slow_module.py'
  module.write_text('import signal\nsignal.raise_signal(signal.SIGINT)\nwhole = True\n')
  monkeypatch.syspath_prepend(tmp_path)
  # A shell starts what it runs in the background without Ctrl-C, and so would these tests be.
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
  with pytest.raises(KeyboardInterrupt):
    main._import('slow_module')
  assert sys.modules.pop('slow_module').whole


def test_ctrl_c_while_the_command_line_is_read(capsys, monkeypatch):
  def interrupt(*args):
    raise KeyboardInterrupt

  timer = threading.Timer(60, print)  # As JAX starts one while it looks for devices.
  timer.start()
  monkeypatch.setattr(main, 'parse', interrupt)
  status, _, err = call_and_read(capsys, 'pretrain')
  timer.join(5)
  assert not timer.is_alive()
  assert (status, err) == (130, '\nllmjax pretrain: stopped by Ctrl-C\n')
