"""Fine-tuning from a run: data, rows, replay, resuming to the bit, answers that end, messages."""

import dataclasses
import itertools
import json
import pathlib
import random
import shlex
import shutil

import numpy as np
import pytest

from llmjax import config, main
from llmjax.checkpoint.load import load_params
from llmjax.data import stream
from llmjax.run.sources import reward_problems
from llmjax.run.spec import FinetuneSpec
from tests import helpers

TINY = ('--config.model.num_layers=2 --config.model.d_model=32 --config.model.num_heads=2 --config.model.mlp_dim=64 '
        '--config.data.seq_len=48 --config.train.batch_size=8 --config.train.log_every=1 --config.sample.prompts= '
        '--config.train.compute_dtype=float32 --config.train.compilation_cache=none --config.logs.writers=')
TUNE = ('finetune --config=chat.py --config.data.sources="{\'chat\': 0.75, \'text\': 0.25}" '
        '--config.train.init_from=base --config.train.log_every=1 --config.train.compute_dtype=float32 '
        '--config.train.compilation_cache=none '
        '--config.optimizer.lr=0.02 --config.train.neftune_alpha=2 --config.optimizer.freeze=final_norm '
        '--config.sample.prompts=cat --config.sample.max_new_tokens=8 --config.evaluate.per_source=true '
        '--config.logs.writers= ')
RECIPE = '''
def get_config():
  return {'data': {'packing': 'best_fit'}, 'train': {'batch_size': 8},
          'optimizer': {'schedule': 'constant', 'weight_decay': 0.0}}
'''
ANSWERS = {'cat': 'a small animal', 'river': 'water that moves', 'house': 'a place to be'}


def call(line, status=0):
  """Runs a command here; asserts its exit status."""
  assert helpers.call(*shlex.split(line)) == status


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A folder with a small base run and conversations that name what a word is; commands run in it."""
  folder, patch = tmp_path_factory.mktemp('finetune'), pytest.MonkeyPatch()
  patch.chdir(folder)
  rng = random.Random(0)
  words = 'the a cat dog sees hears small big house tree river water moves animal place to be that'.split()
  pathlib.Path('raw').mkdir()
  for i in range(40):
    pathlib.Path(f'raw/{i}.txt').write_text('\n'.join(' '.join(rng.choices(words, k=9)) for _ in range(10)))
  with open('chat.jsonl', 'w') as f:
    for i in range(240):
      word = rng.choice(list(ANSWERS))
      f.write(json.dumps({'messages': [{'role': 'user', 'content': f'{word}' + '?' * (i % 7)},
                                       {'role': 'assistant', 'content': ANSWERS[word]}], 'id': i}) + '\n')
      f.write(json.dumps({'prompt': f'{word} {i}', 'completion': ANSWERS[word]}) + '\n')
  pathlib.Path('chat.py').write_text(RECIPE)
  pathlib.Path('base.py').write_text("def get_config():\n  return {'data': {'sources': {'text': 1.0}}}\n")
  call('prepare --text-dir=raw --config.output=text --config.tokenizer.vocab_size=320')
  call(f'pretrain --config=base.py --workdir=base --config.train.steps=10 --config.optimizer.lr=0.01 {TINY}')
  pathlib.Path('data.py').write_text(
      "def get_config():\n  return {'source': 'text_dir', 'path': 'chat.jsonl', 'records': 'chat',\n"
      "          'tokenizer': {'path': 'base/tokenizer.model'}}\n")
  call('prepare --config=data.py --config.output=chat')
  yield folder
  patch.undo()


@pytest.fixture(scope='module')
def tuned(folder):
  call(f'{TUNE} --workdir=tuned --config.train.steps=100 --config.train.checkpoint_every=50')
  return folder / 'tuned'


def rows(workdir, key):
  lines = map(json.loads, (workdir / 'metrics.jsonl').read_text().splitlines())
  return {row['step']: row[key] for row in lines if key in row}


@pytest.mark.slow
def test_it_learns_to_answer_and_to_stop(tuned, capsys):
  losses = rows(tuned, 'train/loss')
  assert losses[100] < 0.6 * losses[1]
  names = {k for k in json.loads((tuned / 'metrics.jsonl').read_text().splitlines()[-1]) if k.startswith('eval/')}
  for name in ('validation', 'validation:chat', 'validation:text'):
    assert set(rows(tuned, f'eval/{name}/loss')) == {100}, names
  config = json.loads((tuned / 'config.json').read_text())
  base = json.loads((tuned.parent / 'base/config.json').read_text())
  assert config['model'] == base['model'] and config['data']['seq_len'] == 48
  capsys.readouterr()
  right = 0
  for word, said in ANSWERS.items():
    call(f'generate --chat --workdir=tuned --prompt={word} --temperature=0 --max-new-tokens=30 --json')
    found = json.loads(capsys.readouterr().out)
    assert found['stopped'] == 'end'
    right += found['text'] == said
  assert right >= 2
  sample = json.loads((tuned / 'samples.jsonl').read_text().splitlines()[-1])
  assert sample['prompt'] == 'cat' and len(sample['text']) > 2


@pytest.mark.slow
def test_what_is_frozen_is_the_base(tuned):
  base, after = (load_params(str(tuned.parent / name), 0)[0] for name in ('base', 'tuned'))
  np.testing.assert_array_equal(base['final_norm']['scale'], after['final_norm']['scale'])
  assert not np.array_equal(base['embed']['table'], after['embed']['table'])


@pytest.mark.slow
def test_a_stopped_run_goes_on_to_the_bit(tuned):
  again = tuned.parent / 'again'
  call(f'{TUNE} --workdir=again --config.train.steps=50 --config.train.checkpoint_every=50')
  call(f'{TUNE} --workdir=again --config.train.steps=100 --config.train.checkpoint_every=50')
  assert {k: v for k, v in rows(again, 'train/loss').items() if k > 50} == {
      k: v for k, v in rows(tuned, 'train/loss').items() if k > 50}


def test_preview_shows_what_is_trained(folder, capsys):
  call('preview --config=chat.py --rows=2 --config.data.sources="{\'chat\': 0.75, \'text\': 0.25}" '
       '--config.data.seq_len=48')
  out = capsys.readouterr().out
  assert '[[a small animal<|end|>]]' in out or '[[water that moves<|end|>]]' in out or '[[a place' in out
  table = {line.split()[0]: line.split() for line in out.splitlines()[2:4]}
  assert table['chat'][1] == 'chat' and float(table['chat'][-1].rstrip('%')) > 97
  assert 'of 48 tokens' in out


@pytest.mark.parametrize('more', ['', "'preference': {'beta': 0.2}", "'rl': {'num_generations': 4}, 'policy': {}"])
def test_preview_has_the_sequences_of_the_command_that_trains(folder, capsys, more):
  pathlib.Path('from_base.py').write_text(
      RECIPE.replace("'train': {'batch_size': 8}", "'train': {'batch_size': 8, 'init_from': 'base'}").replace(
          "}}\n", f"}}, {more}}}\n"))
  call("preview --config=from_base.py --rows=1 --config.data.sources=chat")
  out = capsys.readouterr().out
  assert 'of 48 tokens' in out and 'sequences of 48 tokens, data.packing=best_fit' in out
  spec = config.build(FinetuneSpec, {'data': {'sources': {'chat': 1.0}, 'packing': 'best_fit'},
                                     'train': {'init_from': 'base'}})
  with stream.open_stream(spec.data, batch_size=1, seed=spec.train.seed) as batches:
    (batch,) = itertools.islice(batches, 1)
  assert f'{int((batch["segment_ids"] > 0).sum())} of {spec.data.seq_len} tokens' in out
  call("preview --config=from_base.py --config.data.sources=chat --config.train.init_from=nowhere", status=2)
  assert '--config.data.seq_len=NUMBER' in capsys.readouterr().err


@pytest.mark.parametrize(('arguments', 'message'), [
    ('--config.train.init_from=', 'train.init_from is missing'),
    ('--config.train.init_from=nowhere', 'train.init_from=nowhere'),
    ('--config.data.packing=concat', 'write packing=best_fit'),
    ('--config.data.sources=other', 'other has another tokenizer than base; prepare it again with --force '
     '--config.tokenizer.path=base/tokenizer.model'),
    ('--config.evaluate.extra_sources=nowhere',
     'evaluate.extra_sources: nowhere is not a prepared folder; did you mean other'),
    ('--config.model.d_model=64', 'train.init_from=base holds another model')])
def test_mistakes_get_a_line(folder, capsys, arguments, message):
  if not (folder / 'other').exists():
    call('prepare --config=data.py --config.output=other --config.tokenizer.path= --config.tokenizer.vocab_size=300')
  capsys.readouterr()
  call(f'{TUNE} --workdir=wrong --config.train.steps=1 {arguments}', status=2)
  err = capsys.readouterr().err
  assert message in err and 'Traceback' not in err


def write_chain(name, seed, words=16):
  """Writes and prepares text of a random chain in which each word is followed by one of three."""
  rng = random.Random(seed)
  names = [''.join(rng.choices('bdfgklmnprst', k=1) + rng.choices('aeiou', k=1) + rng.choices('kmnrst', k=1))
           for _ in range(words)]
  after = {w: rng.sample(names, 3) for w in set(names)}
  pathlib.Path(f'raw_{name}').mkdir()
  for i in range(60):
    word, text = rng.choice(names), []
    for _ in range(120):
      word = rng.choice(after[word])
      text.append(word)
    pathlib.Path(f'raw_{name}/{i}.txt').write_text(' '.join(text))


@pytest.mark.slow
def test_replay_keeps_the_old_domain(folder):
  """With a quarter of old rows the old domain's perplexity stays under half of what it is without.

  Measured: 3.0 before, 116,000 without replay, 3.1 with it, and 3.1 and 3.2 on the new domain.
  """
  for name, seed in (('old', 1), ('new', 2)):
    write_chain(name, seed)
  pathlib.Path('raw_both').mkdir()
  for name in ('old', 'new'):
    for file in pathlib.Path(f'raw_{name}').iterdir():
      pathlib.Path(f'raw_both/{name}_{file.name}').write_bytes(file.read_bytes())
  call('prepare --text-dir=raw_both --config.output=both --config.tokenizer.vocab_size=330')
  for name in ('old', 'new'):
    call(f'prepare --text-dir=raw_{name} --config.output={name} --config.tokenizer.path=both/tokenizer.model')
  call(f'pretrain --config=base.py --workdir=before --config.data.sources=old --config.train.steps=250 '
       f'--config.optimizer.lr=0.01 {TINY} --config.train.log_every=50')
  found = {}
  for name, sources in (('without', {'new': 1.0}), ('with', {'new': 0.75, 'old': 0.25})):
    call(f'finetune --config=chat.py --workdir={name} --config.train.init_from=before --config.train.steps=250 '
         f'--config.data.sources="{sources}" --config.optimizer.lr=0.005 --config.logs.writers= '
         '--config.train.compute_dtype=float32 --config.train.compilation_cache=none --config.train.log_every=50 '
         f'--config.evaluate.per_source=true --config.evaluate.extra_sources={"old" if name == "without" else ""}')
    last = [json.loads(line) for line in (folder / name / 'metrics.jsonl').read_text().splitlines()]
    found[name] = {k: v for row in last for k, v in row.items() if k.endswith('/perplexity')}
  before = rows(folder / 'before', 'eval/validation/perplexity')[250]
  old = {name: values['eval/validation:old/perplexity'] for name, values in found.items()}
  assert old['with'] < old['without'] / 2 and old['with'] < 1.5 * before
  assert found['with']['eval/validation:new/perplexity'] < 1.5 * found['without']['eval/validation/perplexity']


def test_chat_needs_conversations(folder, capsys):
  call('generate --chat --workdir=base --prompt=x', status=2)
  assert 'base was not trained on conversations (no chat_template.json)' in capsys.readouterr().err


@pytest.fixture
def small(folder):
  """A fine-tuned run of two steps and an adapter of two, on `base`."""
  if not (folder / 'small').exists():
    call(f'{TUNE} --workdir=small --config.train.steps=2')
    call(f'{TUNE} --workdir=adapted --config.train.steps=2 --config.adapter.kind=lora --config.optimizer.freeze=')
  return folder


def test_a_finished_run_is_used_from_anywhere_without_its_past(small, tmp_path, monkeypatch, capsys):
  """Its base and the settings of its training do not matter once it is trained, nor does the working directory."""
  shutil.copytree(small / 'small', tmp_path / 'moved')
  (small / 'base').rename(small / 'gone')
  monkeypatch.chdir(tmp_path)
  try:
    capsys.readouterr()
    for line in ('generate --chat --workdir=moved --prompt=cat --max-new-tokens=3',
                 'evaluate --workdir=moved --limit=4 --batch-size=8',  # On its own data, by absolute paths.
                 f'evaluate --workdir=moved --sources={small}/chat --limit=4 --batch-size=8',
                 'report --workdir=moved', 'checkpoint ls --workdir=moved', 'checkpoint show --workdir=moved'):
      call(line)
    assert 'validation' in capsys.readouterr().out
  finally:
    (small / 'gone').rename(small / 'base')


def test_an_adapter_finds_its_base_or_says_how_to_link_it(small, tmp_path, monkeypatch, capsys):
  ask = 'generate --chat --workdir=runs/adapted --prompt=cat --max-new-tokens=3 --temperature=0'
  (tmp_path / 'runs').mkdir()
  shutil.copytree(small / 'adapted', tmp_path / 'runs/adapted')
  monkeypatch.chdir(tmp_path)
  call(ask)  # The base is where it was.
  (small / 'base').rename(tmp_path / 'runs/renamed')
  try:
    call(ask)  # Beside the run, under another name.
    (tmp_path / 'runs/renamed').rename(tmp_path / 'away')
    capsys.readouterr()
    call(ask, status=2)
    err = capsys.readouterr().err
    assert f'is gone; put it back, or link to where it is now: ln -s FOLDER {tmp_path}/runs/adapted/base' in err
    assert err.count('\n') == 1
    pathlib.Path('runs/adapted/base').symlink_to(tmp_path / 'away')
    for line in (ask, 'adapter merge --workdir=runs/adapted --output=merged',
                 'adapter export --workdir=runs/adapted --output=peft',
                 'generate --chat --workdir=merged --prompt=cat --max-new-tokens=3'):
      call(line)
  finally:
    next(p for p in (tmp_path / 'away', tmp_path / 'runs/renamed') if p.exists()).rename(small / 'base')


def test_a_moved_tree_finds_its_data(small, tmp_path, monkeypatch):
  """Run and data, moved together, keep their places relative to one another."""
  for name in ('small', 'text', 'chat'):
    (small / name).rename(tmp_path / name)
  monkeypatch.chdir('/')
  try:
    call(f'evaluate --workdir={tmp_path}/small --limit=4 --batch-size=8')
  finally:
    for name in ('small', 'text', 'chat'):
      (tmp_path / name).rename(small / name)


@pytest.mark.parametrize(('arguments', 'message'), [
    ('--config.train.init_from=small', 'data.sources: marked was prepared with the chat template plain, and small was '
     'trained with llmjax; prepare it again with --force --config.template=llmjax, or allow it with '
     '--config.data.allow_mismatch=true'),
    ('--config.distill.teacher=small', 'and small was trained with llmjax; prepare it again'),
    ('--config.train.init_from=base', '')])
def test_another_chat_template_than_the_run_s_is_refused_unless_asked_for(small, capsys, arguments, message):
  if not (small / 'marked').exists():
    call('prepare --config=data.py --config.output=marked --config.template=plain')
  sources = TUNE[TUNE.index('--config.data.sources='):TUNE.index('--config.train.init_from')]
  line = f'{TUNE.replace(sources, "")} --config.data.sources=marked {arguments} --config.train.steps=1 --workdir=unused'
  capsys.readouterr()
  if message:
    call(line, status=2)
    err = capsys.readouterr().err
    assert message in err and err.count('\n') == 1
    line += ' --config.data.allow_mismatch=true'
  spec, _ = main.parse(main.COMMANDS['finetune'], shlex.split(line)[1:])
  assert spec.data.sources == {'marked': 1.0}
  if 'teacher' in arguments:
    call('evaluate --workdir=small --sources=marked', status=2)
    assert '--sources: marked was prepared with the chat template plain, and small was' in capsys.readouterr().err
  # A reward model reads the policy's own tokens, so it must know them.
  judge = pathlib.Path('judge')
  shutil.copytree('small', judge, dirs_exist_ok=True)
  settings = json.loads((judge / 'config.json').read_text())
  (judge / 'config.json').write_text(json.dumps({**settings, 'reward': {}}))
  problem, = reward_problems('rl.reward_model', 'judge', dataclasses.replace(spec.data, allow_mismatch=False))
  assert 'rl.reward_model=judge: ' in problem and 'template plain, and judge was trained with llmjax' in problem
  assert not list(reward_problems('rl.reward_model', 'judge', dataclasses.replace(spec.data, allow_mismatch=True)))
