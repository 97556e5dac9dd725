"""The command line: help is quick and complete, and every mistake gets one clear line."""

import dataclasses
import errno
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest

from llmjax import command_table, config, main
from tests.helpers import call_and_read, environment_of, run_process


def test_overview_lists_every_command(capsys):
  status, out, _ = call_and_read(capsys)
  assert status == 0
  for name, command in main.COMMANDS.items():
    assert f'  {name}' in out
    assert command.summary in ' '.join(out.split())


@pytest.mark.parametrize('name', main.COMMANDS)
def test_help_shows_flags_and_fields(capsys, name):
  status, out, _ = call_and_read(capsys, *name.split(), '--help')
  assert status == 0
  assert 'flags:' in out
  if name == 'pretrain':
    assert '--config.train.steps (int, default: 1000)' in out


def fields_of(spec_class, prefix=''):
  for field in dataclasses.fields(spec_class):
    if dataclasses.is_dataclass(field.type):
      yield from fields_of(field.type, f'{prefix}{field.name}.')
    else:
      yield prefix + field.name, field


@pytest.mark.parametrize('name', main.COMMANDS)
def test_help_has_type_default_choices_and_description_in_80_columns(capsys, monkeypatch, name):
  monkeypatch.setenv('COLUMNS', '200')
  _, out, _ = call_and_read(capsys, *name.split(), '--help')
  assert max(map(len, out.splitlines())) <= 80
  command, text = main.COMMANDS[name], ' '.join(out.split())
  entries = [(flag.replace('_', '-'), field) for flag, field in fields_of(command_table.load(command.options), '--')]
  entries += fields_of(command_table.load(command.spec), '--config.') if command.spec else []
  for flag, field in entries:
    entry = text.partition(f' {flag} (')[2].partition(' --')[0]
    for choice in field.metadata['choices'] or ():
      assert str(choice) in entry
    assert ' '.join(field.metadata['doc'].split()) in text
  example = out.partition('example: ')[2].partition('flags:')[0].replace('\\\n', ' ')
  assert shlex.split(example) == shlex.split(command.example)


@pytest.mark.parametrize('name', main.COMMANDS)
def test_fields_that_hold_paths_have_a_kind_of_path(name):
  command = main.COMMANDS[name]
  for spec_class in filter(None, (command.options, command.spec)):
    for flag, field in fields_of(command_table.load(spec_class)):
      doc, last = field.metadata['doc'], flag.rpartition('.')[2]
      like_one = re.search('folder|file|director|JSONL|tokenizer.model', doc) or re.search(
          '(dir|path|output|init_from|sources|compare|hlo|cache|peft|teacher|policy|_model)$', last)
      if 'str' in str(field.type) and not field.metadata['choices'] and last not in (
          'suffixes', 'base_name', 'text_key'):
        assert (field.metadata['kind'] in config.PATHS) == bool(like_one), flag


def test_help_names_the_choices(capsys):
  out = ' '.join(call_and_read(capsys, 'finetune', '--help')[1].split())
  for entry in ("optimizer.schedule (str, default: 'cosine') one of cosine, linear, constant, wsd, rsqrt ",
                "optimizer.name (str, default: 'adamw') one of adamw, muon, lion, adafactor, sgd ",
                "adapter.kind (str, default: '') one of lora, rslora, dora, or empty ",
                "evaluate.splits (list[str], default: ['validation']) any of train, validation, test ",
                "logs.writers (list[str], default: ['tensorboard']) any of tensorboard, wandb, mlflow",
                "data.sources (dict[path, float], default: {'data/python_docs': 1.0})",
                "train.compilation_cache (path, default: 'default') one of default, none, or a path"):
    assert f'--config.{entry}' in out
  out = ' '.join(call_and_read(capsys, 'prepare', '--help')[1].split())
  assert "--config.template (path, default: 'llmjax') one of llmjax, chatml, qwen, llama3, gemma, plain, or a" in out


def test_help_lists_the_fields_by_group(capsys):
  lines = call_and_read(capsys, 'rl', '--help')[1].splitlines()
  heads = [i for i, line in enumerate(lines) if line.startswith(('model: ', 'data: ', 'train: ', 'policy: '))]
  assert len(heads) == 4
  for head in heads:
    name = lines[head].partition(':')[0]
    group = lines[head + 1:lines.index('', head) if '' in lines[head:] else None]
    fields = [line for line in group if line.startswith('  --')]
    assert fields and all(line.startswith(f'  --config.{name}.') for line in fields)


def test_help_fits_a_narrow_terminal(capsys, monkeypatch):
  monkeypatch.setenv('COLUMNS', '40')
  _, out, _ = call_and_read(capsys, 'pretrain', '--help')
  assert sum(len(line) > 40 for line in out.splitlines()) < 10  # Names that are longer are not broken.


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
    (['evaluate', '--config=x.py', '--workdir=x'], '--config is not a flag of this command'),
    (['doctor', '--platform=gpuu'], 'must be one of cpu, gpu, tpu, or empty; did you mean gpu?'),
    (['checkpoint', 'verfy', '--workdir=x'], 'llmjax checkpoint verify'),
    (['checkpoint', 'diff', '3', '--workdir=x'], 'such as llmjax checkpoint diff 200 400'),
    (['checkpoint', 'verify', 'newest', '--workdir=x'], "--steps=newest must be a whole number"),
    (['checkpoint', 'ls', '--workdir=nowhere'], '--workdir=nowhere has no checkpoints'),
    (['generate', '--workdir=x', '--no-stream'], '--no-stream is not a flag; did you mean --nostream?'),
    (['CHECKPOINT'], 'llmjax checkpoint: the second word is missing; write one of ls, verify'),
    (['report', 'stray'], "llmjax report: 'stray' is not expected here"),
    (['pretrain', '--config', 'configs/pretrain/quikstart.py', '--workdir=x'],
     'pretrain: --config=configs/pretrain/quikstart.py: there is no such file; did you mean'),
    (['pretrain', '--config', '--workdir=x'], '--config=FILE is missing'),
    (['pretrain', '--config=configs/quickstart.py', '--workdir=x'],
     'did you mean configs/pretrain/quickstart.py?'),
    (['pretrain', '--config=configs/pretrain', '--workdir=x'],
     '--config=configs/pretrain is a folder; write the path of a recipe, such as configs/pretrain/gpt2_124m.py'),
    (['pretrain', '--config=README.md', '--workdir=x'], '--config=README.md is not a recipe; write a .py file'),
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


def test_all_mistakes_are_reported_together_and_quickly(capsys):
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


def test_a_group_of_commands_lists_its_commands(capsys):
  status, _, err = call_and_read(capsys, 'checkpoint')
  assert status == 2
  assert '  checkpoint verify  ' in err
  assert 'pretrain' not in err
  assert call_and_read(capsys, 'launch', '--help')[0] == 0


def test_recipe_after_a_space():
  spec, _ = main.parse(main.COMMANDS['mesh'], ['--config', 'configs/pretrain/quickstart.py', '--no-compile',
                                               '--config.model.vocab_size', '512'])
  assert (spec.model.num_layers, spec.model.vocab_size) == (4, 512)


def test_unknown_flags_of_a_flagfile_are_reported(capsys, tmp_path):
  (tmp_path / 'flags').write_text('--unknown=1\n')
  status, _, err = call_and_read(capsys, 'doctor', f'--flagfile={tmp_path / "flags"}')
  assert status == 2 and '--unknown is not a flag' in err


def test_a_closed_pipe_gives_no_traceback():
  command = subprocess.Popen([sys.executable, '-m', 'llmjax', 'help'], stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True)
  command.stdout.close()
  assert 'Traceback' not in command.stderr.read()
  command.wait()


def test_output_escapes_characters_that_the_encoding_lacks(tmp_path):
  arguments = ('launch', 'slurm', '--dry-run', '--nocheck', '--', 'pretrain', '--config=\u00e9.py', '--workdir=x')
  done = run_process(tmp_path, *arguments, PYTHONIOENCODING='ascii')
  assert (done.returncode, done.stderr) == (0, '')
  assert "--config='\\xe9.py'" in done.stdout


@pytest.mark.parametrize(('number', 'expected'), [(errno.EACCES, 2), (errno.ENOTDIR, 2), (errno.EIO, 1)])
def test_a_file_error_of_a_running_command_is_one_line(capsys, monkeypatch, number, expected):
  def fail(module):
    raise OSError(number, os.strerror(number), 'runs/x/config.json')

  monkeypatch.setattr(main, '_import', fail)
  status, _, err = call_and_read(capsys, 'doctor')
  assert (status, err) == (expected, f'llmjax doctor: runs/x/config.json: {os.strerror(number)}\n')


@pytest.mark.parametrize('argv', [
    ['help', 'checkpoint', 'ls'], ['checkpoint', 'ls', '-h'], ['checkpoint', 'ls', '--helpfull']])
def test_help_before_or_after_the_command(capsys, argv):
  status, out, _ = call_and_read(capsys, *argv)
  assert status == 0 and out.startswith('llmjax checkpoint ls: ')


def test_ctrl_c_during_an_import_is_delivered_afterwards(tmp_path, monkeypatch, request):
  module = tmp_path / 'slow_module.py'
  module.write_text('import signal\nsignal.raise_signal(signal.SIGINT)\nwhole = True\n')
  monkeypatch.syspath_prepend(tmp_path)
  # Background processes of a shell ignore SIGINT; the tests may be one.
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
  with pytest.raises(KeyboardInterrupt):
    main._import('slow_module')
  assert sys.modules.pop('slow_module').whole


def test_ctrl_c_during_parsing_exits_with_130(tmp_path):
  code = ('import threading\nfrom llmjax import main\n'
          'def interrupt(*args): raise KeyboardInterrupt\n'
          'main.parse = interrupt\n'
          'threading.Timer(60, print).start()\n'  # JAX has such a thread while it looks for devices.
          'main.main()\n')
  done = subprocess.run([sys.executable, '-c', code, 'pretrain'], env=environment_of(), cwd=tmp_path, text=True,
                        capture_output=True, timeout=50, check=False)
  assert (done.returncode, done.stderr) == (130, '\nllmjax pretrain: stopped by Ctrl-C\n')
