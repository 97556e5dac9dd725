"""Preference optimisation and reward models on a planted preference: that they learn it, and from what reference."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from llmjax import config, main
from llmjax.checkpoint.load import load_params, read_config
from llmjax.data import prepared
from llmjax.data.spec import DataSpec
from llmjax.evaluate import margins
from llmjax.generate.decode import Generator
from llmjax.generate.spec import SamplingSpec
from llmjax.loops import preference as pairs
from llmjax.loops import reward
from llmjax.parallel.mesh import make_mesh
from llmjax.post import ai_feedback, objective
from llmjax.post.spec import PreferenceSpec
from llmjax.run.spec import FinetuneSpec, RewardSpec
from llmjax.text.tokenizer import Tokenizer
from llmjax.train import objectives

ROOT = pathlib.Path(__file__).parents[2]


def load(path):
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


words = load(ROOT / 'experiments/preference/make_words.py')


def run(*arguments):
  with pytest.raises(SystemExit) as e:
    main.main(list(map(str, arguments)))
  return e.value.code


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A folder with the data of the recipes, clean and with a fifth of the labels flipped, and the base model's run."""
  folder = tmp_path_factory.mktemp('words')
  patch = pytest.MonkeyPatch()
  patch.chdir(folder)
  for name, flipped in (('words', 0.0), ('flipped', 0.2)):
    patch.setattr('sys.argv', ['make_words', f'data/{name}', f'--flipped={flipped}'])
    words.main()
  prepare = ('prepare', f'--config={ROOT}/configs/data/chat.py', '--config.template=plain')
  assert run(*prepare, '--config.path=data/words/chat.jsonl', '--config.output=data/words_chat',
             '--config.tokenizer.vocab_size=320') == 0
  for name in ('words', 'flipped'):
    assert run(*prepare, f'--config.path=data/{name}/pairs.jsonl', '--config.records=preference',
               f'--config.output=data/{name}_pairs', '--config.tokenizer.path=data/words_chat/tokenizer.model') == 0
  assert run(*prepare, '--config.path=data/words/pairs_test.jsonl', '--config.records=preference',
             '--config.output=data/clean_pairs', '--config.validation_fraction=0.4',
             '--config.tokenizer.path=data/words_chat/tokenizer.model') == 0
  assert run(*prepare, '--config.path=data/words/steps.jsonl', '--config.records=stepwise',
             '--config.output=data/words_steps', '--config.tokenizer.path=data/words_chat/tokenizer.model') == 0
  assert run(*prepare, '--config.path=data/words/prompts.jsonl', '--config.records=prompts',
             '--config.output=data/words_prompts', '--config.tokenizer.path=data/words_chat/tokenizer.model') == 0
  assert train('pretrain', 'words_base', 'runs/words', '--config.evaluate.splits=') == 0
  yield folder
  patch.undo()


def train(command, recipe, workdir, *more):
  return run(command, f'--config={ROOT}/configs/preference/{recipe}.py', f'--workdir={workdir}',
             '--config.logs.writers=', *more)


def last(workdir):
  rows = [json.loads(line) for line in pathlib.Path(workdir, 'metrics.jsonl').read_text().splitlines()]
  return {k: v for row in rows for k, v in row.items()}


def preferred_rate(workdir):
  """Returns which part of the words that a model says is preferred."""
  said = ' '.join(speak(workdir)).split()
  return sum(word in words.PREFERRED for word in said) / len(said)


def speak(workdir, answers=64, seed=0):
  """Returns answers that a model samples."""
  params, model, _, _ = load_params(workdir)
  tokenizer = Tokenizer(pathlib.Path(workdir) / 'tokenizer.model')
  generator = Generator(model, params, vocab_size=tokenizer.vocab_size)
  prompts = [np.array([tokenizer.bos_id, *tokenizer.encode(f'list {i}:')]) for i in range(answers)]
  made = generator.generate(prompts, 40, SamplingSpec(), jax.random.key(seed), (tokenizer.eos_id,))
  return [tokenizer.decode([i for i in t[:n] if i != tokenizer.eos_id])
          for t, n in zip(made.tokens, made.lengths, strict=True)]


@pytest.mark.slow
def test_dpo_learns_a_planted_preference_and_the_model_says_what_is_preferred(folder):
  assert train('finetune', 'words_dpo', 'runs/dpo') == 0
  found = last('runs/dpo')
  # Measured: 0.995, 0.25 before, 0.77 after.
  assert found['eval/validation/accuracy'] >= 0.85
  assert abs(preferred_rate('runs/words') - 0.25) < 0.04
  assert preferred_rate('runs/dpo') >= 2 * preferred_rate('runs/words')
  assert {'train/chosen_logprob', 'train/rejected_logprob', 'train/margin', 'train/accuracy'} <= set(found)


@pytest.mark.slow
def test_every_way_to_have_the_reference_gives_the_same_losses(folder):
  short = ('--config.train.steps=6', '--config.train.log_every=1', '--config.train.eval_every=3',
           '--config.optimizer.warmup_steps=1', '--config.evaluate.limit=64')

  def losses(name, *more):
    assert train('finetune', 'words_dpo', f'runs/{name}', *short, *more) == 0
    rows = [json.loads(line) for line in (folder / f'runs/{name}/metrics.jsonl').read_text().splitlines()]
    return [row[k] for row in rows for k in ('train/loss', 'eval/validation/loss') if k in row]

  first = losses('precomputed')
  assert first[0] == pytest.approx(np.log(2), rel=1e-5) and len(first) == 8 and first[-1] < first[0]
  np.testing.assert_allclose(losses('copy', '--config.preference.reference=copy'), first, rtol=1e-6)
  np.testing.assert_allclose(losses('parts', '--config.train.gradient_accumulation_steps=4'), first, rtol=1e-5)
  # A resumed run reads the reference that the first sitting has kept.
  lora = ('--config.adapter.kind=lora', '--config.adapter.rank=4')
  np.testing.assert_allclose(losses('off', '--config.preference.reference=disable_adapter', *lora),
                             losses('lora', *lora), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('loss, better', [('ipo', 0.85), ('simpo', 0.85), ('orpo', 0.75), ('kto', 0.0)])
def test_other_losses_go_the_same_way(folder, loss, better):
  options = [f'--config.preference.loss={loss}', '--config.preference.reference=copy', '--config.train.steps=80',
             '--config.train.eval_every=0']
  options += ['--config.preference.beta=2.0'] if loss == 'simpo' else []
  assert train('finetune', 'words_dpo', f'runs/{loss}', *options) == 0
  assert last(f'runs/{loss}')['eval/validation/accuracy'] >= better
  assert preferred_rate(f'runs/{loss}') > 1.2 * preferred_rate('runs/words')


@pytest.mark.slow
@pytest.mark.parametrize('data, accuracy', [('words', 0.9), ('flipped', 0.75)])
def test_a_reward_model_finds_the_better_answer_also_where_labels_are_wrong(folder, data, accuracy):
  workdir = f'runs/reward_{data}'
  assert train('reward', 'words_reward', workdir, '--config.train.steps=200',
               f'--config.data.sources=data/{data}_pairs', '--config.evaluate.splits=') == 0
  assert run('reward', f'--config={workdir}/config.json', f'--workdir={workdir}', '--config.train.steps=201',
             '--config.evaluate.splits=validation') == 0
  found = json.loads((folder / workdir / 'reward.json').read_text())['validation']
  assert sum(found['histogram']['counts']) == found['pairs'] == sum(p['pairs'] for p in found['calibration'])
  assert found['accuracy'] == pytest.approx(last(workdir)['eval/validation/accuracy'], abs=1e-6)
  assert abs(last(workdir)['eval/validation/mean_score']) < 0.5
  if data == 'words':
    assert found['accuracy'] >= accuracy
  else:  # On the true labels: those of this validation split are flipped, too.
    assert true_accuracy(workdir) >= accuracy


def true_accuracy(workdir):
  """Returns how often the model scores the better answer of clean pairs higher."""
  spec = config.build(RewardSpec, read_config(workdir))
  params, model, _, _ = load_params(workdir)
  spec = dataclasses.replace(spec, model=model, data=dataclasses.replace(spec.data, sources={'data/clean_pairs': 1.0}))
  mesh = make_mesh(spec.mesh, jax.devices()[:1])
  model = objectives.make_model(model, spec.train, 'cpu')
  score = jax.jit(lambda params, batch: objective.score_sequences(model, params, objective.with_last_target(batch))[0])
  with jax.set_mesh(mesh):
    scores = np.concatenate([np.asarray(score(params, batch)) for batch in pairs.read_split(spec, mesh, 'validation')])
  real = scores[:2 * 150]
  return margins.describe_margins(real[0::2] - real[1::2])['accuracy']


@pytest.fixture(scope='module')
def judging_steps(folder):
  """The folder with a reward model of steps in runs/steps."""
  assert train('reward', 'words_steps', 'runs/steps') == 0
  return folder


@pytest.mark.slow
def test_a_process_reward_model_finds_which_steps_are_good(judging_steps):
  folder = judging_steps
  metrics, found = last('runs/steps'), json.loads((folder / 'runs/steps/reward.json').read_text())['validation']
  assert found['steps'] == prepared.read_manifest('data/words_steps')['splits']['validation']['trained']
  assert found['accuracy'] == pytest.approx(metrics['eval/validation/accuracy'], abs=1e-6)
  assert metrics['eval/validation/base_accuracy'] == found['base'] < 0.6
  assert found['accuracy'] > 0.88 and min(found['good'], found['bad']) > 0.8  # Measured: 0.944 to 1.0, base 0.55.
  places = found['by_position']
  assert [p['position'] for p in places] == [1, 2, 3, 4, 5] and sum(p['steps'] for p in places) == found['steps']
  assert min(p['accuracy'] for p in places) > 0.75
  assert 'steps by score margin' in (folder / 'runs/steps/report.html').read_text()
  # The same with other rows together, in rows of another length, each solution in a row of its own.
  spec = config.build(RewardSpec, read_config('runs/steps'), [
      ('evaluate.batch_size', '7'), ('data.packing', 'pad'), ('data.seq_len', '90')])
  params, model, _, _ = load_params('runs/steps')
  mesh = make_mesh(spec.mesh, jax.devices()[:1])
  judge = objective.make_step_scorer(objectives.make_model(model, spec.train, 'cpu'))
  with jax.set_mesh(mesh):
    again = reward.make_evaluator(spec, mesh, judge, 'validation', folder)(params)
  for name, value in again.items():
    assert value == pytest.approx(metrics[f'eval/validation/{name}'], rel=1e-4, abs=1e-5), name


@pytest.fixture(scope='module')
def judged(folder):
  """The folder with a reward model in runs/reward."""
  assert train('reward', 'words_reward', 'runs/reward', '--config.evaluate.splits=') == 0
  return folder


@pytest.mark.slow
def test_grpo_on_a_trained_reward_model_says_what_is_preferred(judged):
  assert train('rl', 'words_grpo', 'runs/grpo') == 0
  found = [json.loads(line) for line in (judged / 'runs/grpo/metrics.jsonl').read_text().splitlines()]
  rewards, kl = ([row[f'rollout/{name}'] for row in found if f'rollout/{name}' in row] for name in ('reward', 'kl'))
  # Measured: the score from 0.0 to 2.2, preferred words from 0.26 to 0.64 of all, at a KL of 4.1 nats an answer.
  assert abs(rewards[0]) < 0.5 and np.mean(rewards[-5:]) > rewards[0] + 1
  assert preferred_rate('runs/grpo') > 1.7 * preferred_rate('runs/words')
  assert kl[0] == pytest.approx(0, abs=1e-4) and 1 < np.mean(kl[-5:]) < 10


@pytest.mark.slow
def test_grpo_on_a_model_that_judges_steps(judging_steps):
  assert train('rl', 'words_grpo', 'runs/grpo_steps', '--config.rl.reward_model=runs/steps',
               '--config.train.steps=20') == 0
  rows = [json.loads(line) for line in (judging_steps / 'runs/grpo_steps/metrics.jsonl').read_text().splitlines()]
  rewards = [row['rollout/reward'] for row in rows if 'rollout/reward' in row]
  assert all(0 < r < 1 for r in rewards) and np.mean(rewards[-3:]) > rewards[0] + 0.1


@pytest.mark.slow
def test_a_wrong_reward_model_is_one_line(judged, capsys):
  said = {'nowhere': "is not a run's folder", 'words': 'is not a reward model; give the --workdir',
          'foreign': 'has another tokenizer than data/words_',
          'empty': "is neither a run's folder nor one of its checkpoints"}
  for name in ('foreign', 'empty'):
    shutil.copytree(judged / 'runs/reward', judged / 'runs' / name)
  assert read_config('runs/reward')['reward']['scores'] == 'completions'
  with open('runs/foreign/tokenizer.model', 'ab') as f:
    f.write(b'x')
  shutil.rmtree('runs/empty/checkpoints')
  capsys.readouterr()
  for name, line in said.items():
    assert train('rl', 'words_grpo', 'runs/never', f'--config.rl.reward_model=runs/{name}') == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert line in told and f'rl.reward_model=runs/{name} ' in told, told


@pytest.mark.slow
@pytest.mark.parametrize('policy', ['grpo', 'ppo'])
def test_two_processes_learn_from_a_reward_model_as_one_does(judged, policy):
  def launch(processes):
    workdir = f'runs/{policy}_of_{processes}'
    subprocess.run(
        [sys.executable, '-m', 'llmjax', 'launch', 'local', f'--processes={processes}',
         f'--devices-per-process={2 // processes}', '--', 'rl', f'--config={ROOT}/configs/preference/words_grpo.py',
         f'--workdir={workdir}', '--config.logs.writers=', '--config.train.steps=4', '--config.train.log_every=1',
         '--config.rl.prompts_per_iteration=4', '--config.rl.num_generations=4', '--config.train.batch_size=8',
         '--config.evaluate.limit=4',
         '--config.mesh.data=2', f'--config.policy.name={policy}'],
        env={**os.environ, 'PYTHONPATH': str(ROOT)}, check=True, timeout=500)
    rows = [json.loads(line) for line in (judged / workdir / 'metrics.jsonl').read_text().splitlines()]
    timed = ('seconds', 'per_second', 'mfu')
    found = {(row['step'], k): v for row in rows for k, v in row.items()
             if k.startswith(('train/', 'rollout/', 'eval/')) and not k.endswith(timed)}
    return found, [file.read_text() for file in sorted((judged / workdir / 'rollouts').iterdir())]

  one, two = launch(1), launch(2)
  assert one == two  # To the bit.
  assert len({v for (_, k), v in one[0].items() if k == 'train/loss'}) == 4 and len(one[1]) == 2


@pytest.mark.slow
def test_a_critic_with_a_rule_lowers_what_it_forbids(folder):
  """Feedback on the model's own answers by a rule against one word, from a critic that likes the first place."""
  rule = ai_feedback.Principle('no_cats', prefer='Which list has fewer cats?')
  cats = lambda text: text.split().count('cat')

  def judge(conversations):
    rows = []
    for conversation in conversations:
      a, b = conversation[0]['content'].split('Options:\n(A) ')[1].split('\n\nThe answer')[0].split('\n(B) ')
      odds = 3.0 * (cats(b) - cats(a)) + 1.0
      rows.append([-np.log1p(np.exp(-odds)), -np.log1p(np.exp(odds))])
    return rows

  first, second = speak('runs/words', 1500, seed=1), speak('runs/words', 1500, seed=2)
  records = [([{'role': 'user', 'content': f'list {i}:'}], a, b)
             for i, (a, b) in enumerate(zip(first, second, strict=True)) if a != b]
  made = [row for row in ai_feedback.compare(records, judge, [rule]) if row['probability'] > 0.5]
  assert ai_feedback.describe_places(made)['mean_bias'] > 0.02
  pathlib.Path('data/cats.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in made))
  assert run('prepare', f'--config={ROOT}/configs/data/chat.py', '--config.template=plain',
             '--config.records=preference',
             '--config.path=data/cats.jsonl', '--config.output=data/cats_pairs',
             '--config.tokenizer.path=data/words_chat/tokenizer.model') == 0
  assert train('finetune', 'words_dpo', 'runs/cats', '--config.data.sources=data/cats_pairs',
               '--config.train.steps=60', '--config.evaluate.splits=') == 0
  rate = lambda answers: sum(map(cats, answers)) / len(' '.join(answers).split())
  assert 0.04 < rate(first) < 0.09
  assert rate(speak('runs/cats', 256)) < rate(first) / 2


@pytest.mark.slow
def test_wrong_settings(folder):
  def validate(spec, **groups):
    base = {'data': {'sources': {'data/words_pairs': 1.0}, 'seq_len': 64}, 'train': {'init_from': 'runs/words'}}
    with pytest.raises(config.ConfigError) as e:
      config.build(spec, {k: {**base.get(k, {}), **groups.get(k, {})} for k in {**base, **groups}})
    return ' '.join(e.value.problems)

  assert 'write adapter.kind=lora, or preference.reference=precomputed' in validate(
      FinetuneSpec, preference={'reference': 'disable_adapter'})
  assert 'write preference.reference=copy' in validate(FinetuneSpec, preference={'loss': 'kto'})
  assert 'write train.gradient_accumulation_steps=1' in validate(FinetuneSpec, preference={'loss': 'aot'},
                                                  train={'gradient_accumulation_steps': 2, 'batch_size': 8})
  assert 'preference.sft_weight' in validate(
      FinetuneSpec, data={'sources': {'data/words_pairs': 1.0, 'data/words_chat': 1.0}})
  assert 'holds chat' in validate(RewardSpec, data={'sources': {'data/words_chat': 1.0}})
  assert 'remove the other' in validate(
      RewardSpec, data={'sources': {'data/words_pairs': 1.0, 'data/words_steps': 1.0}, 'packing': 'best_fit'})
  assert 'write packing=best_fit' in validate(RewardSpec, data={'sources': {'data/words_steps': 1.0}})


def test_kto_needs_completions_of_other_prompts(monkeypatch):
  monkeypatch.setattr(FinetuneSpec, 'is_preference', True)

  def validate(**groups):
    spec = FinetuneSpec(preference=PreferenceSpec(loss='kto', reference='copy'))
    spec = dataclasses.replace(spec, **{k: dataclasses.replace(getattr(spec, k), **v) for k, v in groups.items()})
    return ' '.join(spec.validate())

  assert 'write train.batch_size=2 or more' in validate(train={'batch_size': 1})
  assert 'write evaluate.batch_size=2 or more' in validate(evaluate={'batch_size': 1})
  assert 'write train.gradient_accumulation_steps=1' in validate(train={'batch_size': 8,
                                                                        'gradient_accumulation_steps': 4})
  assert 'kto' not in validate(train={'batch_size': 2})
  assert 'kto' not in validate(train={'batch_size': 1}, preference={'loss': 'sigmoid'})


def test_unpaired_preferences_need_a_loss_of_single_completions(monkeypatch):
  monkeypatch.setattr(FinetuneSpec, 'is_preference', True)
  monkeypatch.setattr(DataSpec, 'unpaired', lambda self: ['data/kto'])

  def validate(**preference):
    return ' '.join(FinetuneSpec(preference=PreferenceSpec(reference='copy', **preference)).validate())

  assert 'write preference.loss=kto or apo_zero_unpaired' in validate()
  assert 'unpaired' not in validate(loss='kto') + validate(loss='apo_zero_unpaired')
  assert 'write preference.ld_alpha=1' in validate(loss='kto', ld_alpha=0.5)
  assert 'prepare records with prompt, chosen and rejected' in ' '.join(RewardSpec().data.validate())
