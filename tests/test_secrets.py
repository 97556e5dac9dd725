"""Secrets in the environment and on the command line are masked in what a run writes and prints, except in samples."""

import html
import json
import os
import pathlib
import random
import re
import subprocess
import sys

import pytest

from llmjax import config, secrets
from llmjax.config import setting
from tests.helpers import run_process

ROOT = pathlib.Path(__file__).parents[1]
CANARIES = {
    'HF_TOKEN': 'canary-0f3a9', 'WANDB_API_KEY': 'canary1b77e', 'my_service_password': 'canary "2<c>&\\é',
    'AWS_SECRET_ACCESS_KEY': 'canary3/wJal+r', 'OPENAI_API_KEY': 'canary4'}
# Typed and in no variable; told by their form.
TYPED = {'hugging face': 'hf_' + 'CanaryFive' * 4, 'github': 'ghp_' + 'c4nAry6sEv' * 4,
         'address': 'https://me:canary7pw@example.com/x', 'jwt': 'eyJhbGciOiJIUzI1.eyJjYW5hcnk4IjoxfQ.canary8sig'}
FRAGMENTS = [*CANARIES.values(), 'canary "2', 'CanaryFive', 'c4nAry6sEv', 'canary7pw', 'canary8sig']


def test_hide():
  for text, expected in [
      ('no secret here: token, key=5, https://example.com/a:b@c', None), ('train.steps=200', None),
      *[(f'<{v}>', '<***>') for k, v in TYPED.items() if k != 'address'],
      (TYPED['address'], 'https://me:***@example.com/x')]:
    assert secrets.hide(text) == (text if expected is None else expected)


def test_values_of_the_environment_in_every_spelling(monkeypatch):
  for name, value in CANARIES.items():
    monkeypatch.setenv(name, value)
  for value in CANARIES.values():
    for text in (value, json.dumps(value), json.dumps(value, ensure_ascii=False), html.escape(value), repr(value),
                 html.escape(json.dumps(value))):
      hidden = secrets.hide(f'a {text} b')
      assert 'canary' not in hidden and '***' in hidden and hidden.startswith('a ') and hidden.endswith(' b')
  assert secrets.hide_within({'a': ['x', ('canary4',)], 'canary4': 1}) == {'a': ['x', ('***',)], '***': 1}


def test_switches_and_places_are_no_secrets(monkeypatch, tmp_path):
  monkeypatch.setenv('TOKENIZERS_PARALLELISM', 'disabled')
  monkeypatch.setenv('SOME_KEY', 'true')
  monkeypatch.setenv('EMPTY_TOKEN', '')
  monkeypatch.setenv('SSH_KEY_FILE', str(tmp_path))
  text = f'disabled true {tmp_path}'
  assert secrets.hide(text) == text


def test_configs_are_written_without_them(monkeypatch):
  import dataclasses

  @dataclasses.dataclass(frozen=True)
  class Spec:
    name: str = setting('', 'a name')
    weights: dict[str, float] = setting({}, 'weights')

  monkeypatch.setenv('HF_TOKEN', 'canary-0f3a9')
  spec = config.build(Spec, {'name': 'x canary-0f3a9', 'weights': {'canary-0f3a9': 1}})
  assert spec.name == 'x canary-0f3a9' and config.to_dict(spec) == {'name': 'x ***', 'weights': {'***': 1.0}}


def test_tracebacks_are_printed_without_them():
  code = ('import os\nfrom llmjax import secrets\nsecrets.hide_output()\n'
          'print("printed", os.environ["HF_TOKEN"])\ndef f(token):\n  raise ValueError("it was " + token)\n'
          'f(os.environ["HF_TOKEN"])\n')
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=False, cwd=ROOT,
                        env={**os.environ, **CANARIES})
  assert done.returncode == 1
  assert done.stdout == 'printed ***\n'
  assert done.stderr.startswith('Traceback') and 'ValueError: it was ***' in done.stderr
  assert 'canary' not in done.stderr


@pytest.fixture(scope='module')
def life(tmp_path_factory):
  """A folder with a prepared corpus and a run of 3 steps, and all that was printed."""
  folder = tmp_path_factory.mktemp('secrets')
  rng, printed = random.Random(0), []
  (folder / 'text').mkdir()
  for i in range(40):
    (folder / 'text' / f'{i}.txt').write_text(' '.join(rng.choices('the a cat dog sees finds tree'.split(), k=150)))
  (folder / 'recipe.py').write_text('def get_config():\n  return {"data": {"sources": {"data/text": 1.0}}}\n')

  def llmjax(*argv, status=0):
    done = run_process(folder, *argv, **CANARIES, PYTHONPATH=os.pathsep.join([str(ROOT), *sys.path]))
    assert done.returncode == status, done.stderr
    printed.append(done.stdout + done.stderr)

  llmjax('prepare', '--text-dir=text', '--config.output=data/text', '--config.tokenizer.vocab_size=300')
  prompts = json.dumps([f'the cat {c}' for c in (*CANARIES.values(), *TYPED.values())])
  llmjax('pretrain', '--config=recipe.py', '--workdir=run', '--config.model.num_layers=1', '--config.model.d_model=16',
         '--config.model.num_heads=2', '--config.model.mlp_dim=32', '--config.data.seq_len=32',
         '--config.train.steps=3', '--config.train.batch_size=8', '--config.train.log_every=1',
         '--config.sample.max_new_tokens=2', f'--config.sample.prompts={prompts}')
  llmjax('report', '--workdir=run')
  llmjax('pretrain', '--config=recipe.py', '--workdir=run', *[f'--config.train.{name}={c}' for name, c in zip(
      ('steps', 'batch_size', 'platform', 'remat', 'attention'), CANARIES.values(), strict=True)], status=2)
  llmjax('pretrain', '--config=recipe.py', f'--workdir={TYPED["hugging face"]}',
         f'--config.train.init_from={CANARIES["HF_TOKEN"]}', status=2)
  return folder, printed


@pytest.mark.slow
def test_a_whole_run_holds_no_canary_but_in_samples(life):
  folder, printed = life
  files = [p for part in ('run', 'data') for p in (folder / part).rglob('*') if p.is_file()]
  names = {p.name for p in files}
  assert {'config.json', 'environment.json', 'metrics.jsonl', 'samples.jsonl', 'report.html', 'manifest.json',
          'quarantine.jsonl'} <= names and any('tfevents' in n for n in names)
  contents = {str(p): p.read_bytes().decode('utf-8', 'replace') for p in files}
  samples = contents.pop(str(folder / 'run' / 'samples.jsonl'))
  prompts = [json.loads(line)['prompt'] for line in samples.splitlines()]
  assert prompts[:len(CANARIES) + len(TYPED)] == [f'the cat {c}' for c in (*CANARIES.values(), *TYPED.values())]
  report = contents[str(folder / 'run' / 'report.html')]
  contents['report without samples'] = re.sub(r'<pre><mark>.*?</pre>|<summary>.*?</summary>', '', report, flags=re.S)
  del contents[str(folder / 'run' / 'report.html')]
  contents = {name: text for name, text in contents.items() if 'tfevents' not in name}  # They hold the samples, too.
  contents.update({f'output {i}': text for i, text in enumerate(printed)})
  for name, text in contents.items():
    for fragment in FRAGMENTS:
      for form in (fragment, json.dumps(fragment)[1:-1], html.escape(fragment)):
        assert form not in text, (name, form)
  for name in ('config.json', 'environment.json'):
    assert '***' in contents[str(folder / 'run' / name)], name  # They were there to be found.
  assert '***' in contents['report without samples']
  assert all('***' in text for text in printed[-2:])
