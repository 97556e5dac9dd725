"""A whole life in small: text, tokens, training, resuming, evaluation, samples, report."""

import json
import random
import shutil
import subprocess
import sys

import pytest

from llmjax.checkpoint import manifest
from tests.helpers import ROOT, environment_of, run_process

TINY = ['--config.model.num_layers=2', '--config.model.d_model=32', '--config.model.num_heads=2',
        '--config.model.mlp_dim=64', '--config.model.dropout=0.1', '--config.data.seq_len=32',
        '--config.train.batch_size=16', '--config.train.gradient_accumulation_steps=2', '--config.train.log_every=1',
        '--config.optimizer.warmup_steps=2', '--config.optimizer.lr=0.01',
        '--config.train.compute_dtype=float32', '--config.sample.prompts=the cat',
        '--config.sample.max_new_tokens=8', '--config.evaluate.splits=validation']


def llmjax(folder, *argv, status=0):
  """Runs a command in the folder; returns its output."""
  done = run_process(folder, *argv)
  assert done.returncode == status, done.stdout + done.stderr
  assert 'Traceback' not in done.stderr
  return done.stdout + done.stderr


def pretrain(folder, workdir, steps, *argv, **options):
  return llmjax(folder, 'pretrain', '--config=recipe.py', f'--workdir={workdir}', *TINY,
                f'--config.train.steps={steps}', *argv, **options)


def rows(workdir, key):
  lines = map(json.loads, (workdir / 'metrics.jsonl').read_text().splitlines())
  return {row['step']: row[key] for row in lines if key in row}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A folder with a prepared corpus, an empty recipe, and one finished run of 6 steps."""
  folder = tmp_path_factory.mktemp('life')
  (folder / 'recipe.py').write_text(
      'from ml_collections import config_dict\n\n\ndef get_config():\n'
      "  return config_dict.ConfigDict({'data': {'sources': {'data/text': 1.0}}})\n")
  rng = random.Random(0)
  words = 'the a cat dog bird sees hears finds small big old new house tree river'.split()
  for i in range(60):
    (folder / 'text').mkdir(exist_ok=True)
    text = '\n'.join(' '.join(rng.choices(words, k=9)) + '.' for _ in range(20))
    (folder / 'text' / f'{i}.txt').write_text(text)
  out = llmjax(folder, 'prepare', '--text-dir=text', '--config.output=data/text',
               '--config.tokenizer.vocab_size=320')
  assert 'llmjax pretrain' in out
  pretrain(folder, 'whole', 6, '--config.train.checkpoint_every=3')
  return folder


SAME_STEP = """
import sys
import jax
from llmjax import main
from llmjax.commands import mesh
from llmjax.run import loop, start

lowered = loop.lower_step
def compare(step, state, batch):
  text = lowered(step, state, batch).as_text()
  spec, _ = main.parse(main.COMMANDS['pretrain'], sys.argv[2:])
  spec = start.resolve(spec)
  planned = lowered(*mesh.abstract_pretraining(spec, loop.jax.sharding.get_mesh())).as_text()
  print('the same step' if planned == text else 'another step', len(text))
  sys.exit(0)

loop.lower_step = compare
main.main(sys.argv[1:])
"""


def test_what_is_planned_is_the_very_step_that_is_trained(folder):
  """The StableHLO of `llmjax plan` and `llmjax mesh` is that of the run, guard and all, to the letter."""
  done = subprocess.run(
      [sys.executable, '-c', SAME_STEP, 'pretrain', '--config=recipe.py', '--workdir=same', *TINY,
       '--config.guard.spike_threshold=10', '--config.train.steps=6'],
      cwd=folder, env=environment_of(), text=True, capture_output=True, check=False)
  assert 'the same step' in done.stdout, done.stdout + done.stderr
  assert int(done.stdout.split()[-1]) > 10_000


def test_the_run_folder(folder):
  run = folder / 'whole'
  losses = rows(run, 'train/loss')
  assert list(losses) == [1, 2, 3, 4, 5, 6]
  assert losses[6] < losses[1]
  # Half of the rate in the first of two steps of warm-up; a tenth in the last step.
  assert [round(lr, 7) for lr in rows(run, 'train/lr').values()][::5] == [0.005, 0.001]
  for key in ('train/grad_norm', 'train/lr', 'train/tokens_per_second', 'train/mfu',
              'train/step_seconds', 'train/data_wait_seconds'):
    assert set(rows(run, key)) == set(losses)
  for key in ('loss', 'perplexity', 'bits_per_byte'):
    assert set(rows(run, f'eval/validation/{key}')) == {6}
  assert sorted(p.name for p in (run / 'checkpoints').iterdir()) == ['3', '6']
  assert json.loads((run / 'samples.jsonl').read_text().splitlines()[0])['prompt'] == 'the cat'
  page = (run / 'report.html').read_text()
  assert '<html' in page
  assert 'Energy and cost' in page
  assert 'set cost.chip_watts' in page  # No table has the power of this CPU.
  energy = json.loads((run / 'energy.json').read_text())
  spent = json.loads((run / 'time.jsonl').read_text().splitlines()[-1])['seconds']
  assert energy['total']['seconds'] == pytest.approx(sum(spent.values()), abs=0.1)
  assert energy['total']['chip_hours'] == pytest.approx(energy['total']['seconds'] / 3600)
  assert any((run / 'tensorboard').iterdir())
  assert json.loads((run / 'config.json').read_text())['model']['vocab_size'] % 128 == 0
  assert 'is done: step 6 of 6' in pretrain(folder, 'whole', 6)


@pytest.mark.slow
def test_a_stopped_run_goes_on_to_the_bit(folder):
  pretrain(folder, 'half', 6, '--config.train.checkpoint_every=3')
  # As after a kill between steps 3 and 6, whose lines ran ahead; and what is left of step 6 is not to be had.
  (folder / 'half/checkpoints/6/params/_METADATA').write_text('')
  out = pretrain(folder, 'half', 6, '--config.train.checkpoint_every=3')
  assert 'checkpoints/6 is skipped: params/_METADATA is empty' in out
  assert 'resuming from step 3' in out
  assert manifest.find_damage(folder / 'half/checkpoints/6') == []
  for key in ('train/loss', 'train/grad_norm', 'eval/validation/loss'):
    assert rows(folder / 'half', key) == rows(folder / 'whole', key)
  before, after = ([json.loads(line)['seconds'] for line in (folder / name / 'time.jsonl').read_text().splitlines()][-1]
                   for name in ('whole', 'half'))
  assert before['lost'] == 0 < after['lost']  # Steps 4 to 6 were done twice.
  starts = [json.loads(line) for line in (folder / 'half' / 'events.jsonl').read_text().splitlines()]
  assert [(e['kind'], e['step']) for e in starts] == [
      ('start', 0), ('done', 6), ('damaged_checkpoint', 3), ('start', 3), ('done', 6)]


def test_another_model_in_the_same_folder_is_refused(folder):
  out = pretrain(folder, 'whole', 9, '--config.model.d_model=64', '--config.data.seq_len=16', status=2)
  assert 'model.d_model was 32 in whole and is 64 now' in out
  assert 'data.seq_len was 32' in out


def test_a_finished_run_keeps_its_config(folder):
  before = (folder / 'whole/config.json').read_text()
  out = pretrain(folder, 'whole', 6, '--config.optimizer.lr=9')
  assert 'whole is done: step 6 of 6' in out
  assert not (folder / 'whole/lock').exists()
  assert (folder / 'whole/config.json').read_text() == before


def test_other_data_in_the_same_folder_is_refused(folder):
  file = folder / 'data/text/manifest.json'
  before = file.read_text()
  shutil.copytree(folder / 'whole', folder / 'changed')
  manifest = json.loads(before)
  manifest['splits']['train']['tokens_sha256'] = 'of other text'
  try:
    file.write_text(json.dumps(manifest))
    out = pretrain(folder, 'changed', 9, status=2)
  finally:
    file.write_text(before)
  assert 'the data differs from what steps 1 to 6 read' in out
  assert '--config.train.init_from=changed' in out


@pytest.mark.slow
def test_starting_from_another_run(folder):
  out = pretrain(folder, 'second', 1, '--config.train.init_from=whole', '--config.model.dropout=0.0',
                 '--config.optimizer.warmup_steps=1')
  assert 'warning: optimizer.warmup_steps=1 covers all of train.steps=1' in out
  assert rows(folder / 'second', 'train/loss')[1] < rows(folder / 'whole', 'train/loss')[4]


def test_evaluate_and_generate(folder):
  out = llmjax(folder, 'evaluate', '--workdir=whole', '--splits=validation,test')
  assert 'gzip -9' in out
  found = json.loads((folder / 'whole' / 'evaluation.json').read_text())
  assert set(found) == {'validation', 'test'}
  in_loop = rows(folder / 'whole', 'eval/validation/bits_per_byte')[6]
  assert found['validation']['bits_per_byte'] == pytest.approx(in_loop, rel=1e-5)
  manifest = json.loads((folder / 'data/text/manifest.json').read_text())
  for split in found:
    assert found[split]['bytes'] == manifest['splits'][split]['bytes']
  out = llmjax(folder, 'generate', '--workdir=whole', '--prompt=the cat', '--max-new-tokens=12')
  assert 'the cat' in out
  assert '12 tokens' in out or 'ended' in out


@pytest.mark.slow
def test_a_run_keeps_its_tokenizer(folder):
  made = llmjax(folder, 'generate', '--workdir=whole', '--prompt=the cat', '--max-new-tokens=12', '--json')
  tokenizer = folder / 'data/text/tokenizer.model'
  before = tokenizer.read_bytes()
  assert (folder / 'whole/tokenizer.model').read_bytes() == before
  try:
    tokenizer.write_bytes(b'another')
    out = llmjax(folder, 'evaluate', '--workdir=whole', status=2)
  finally:
    tokenizer.write_bytes(before)
  assert 'has another tokenizer than this run' in out
  (folder / 'data').rename(folder / 'elsewhere')
  try:
    again = llmjax(folder, 'generate', '--workdir=whole', '--prompt=the cat', '--max-new-tokens=12', '--json')
  finally:
    (folder / 'elsewhere').rename(folder / 'data')
  assert [line for line in again.splitlines() if line[0] == '{'] == [
      line for line in made.splitlines() if line[0] == '{']


def test_a_profile_past_the_end_is_refused(folder):
  out = pretrain(folder, 'profiled', 5, '--config.profile.steps=10:13', status=2)
  assert 'profile.steps=10:13' in out


@pytest.mark.slow
def test_a_lost_loss_stops_the_run(folder):
  out = pretrain(folder, 'lost', 8, '--config.optimizer.lr=1e30', '--config.optimizer.clip_norm=0',
                 status=1)
  assert 'is not finite at step' in out  # The gradient's norm overflows before the loss does.
  assert not list((folder / 'lost' / 'checkpoints').glob('[0-9]*'))


def test_tensorflow_stays_out(folder):
  code = ('import sys; sys.argv = ["llmjax"]\n'
          'import llmjax.loops.pretrain, llmjax.loops.evaluate, llmjax.loops.generate\n'
          'assert "tensorflow" not in sys.modules')
  subprocess.run([sys.executable, '-c', code], check=True, cwd=ROOT)


EXTENSIONS = '''
import jax.numpy as jnp
from llmjax.run.callback import Callback
from llmjax.train import objectives


def focal(model, train):
  """Next-token prediction, twice."""
  next_token = objectives.next_token(model, z_loss=train.z_loss)

  def loss_fn(params, frozen, batch, key):
    loss, (weight, aux) = next_token(params, frozen, batch, key)
    return 2 * loss, (weight, {**aux, 'plain_loss': loss})

  return loss_fn


def parameters(spec, mesh):
  largest = lambda params: float(jnp.abs(params['embed']['table']).max())
  return lambda params, frozen: {'largest': largest(params), 'layers': spec.model.num_layers}


class Greeting(Callback):
  def on_start(self, run):
    run.say(f'hello from {type(self).__module__}')
'''


@pytest.mark.slow
def test_objective_task_and_callback_of_a_module_outside_the_package(folder):
  (folder / 'mine.py').write_text(EXTENSIONS)
  arguments = ['--config.train.objective=mine:focal', '--config.evaluate.tasks=mine:parameters',
               '--config.train.callbacks=mine:Greeting']
  out = pretrain(folder, 'extended', 2, *arguments)
  assert 'hello from mine' in out
  losses, plain = rows(folder / 'extended', 'train/loss'), rows(folder / 'extended', 'train/plain_loss')
  assert losses[1] == pytest.approx(2 * plain[1], rel=1e-6)
  assert plain[1] == pytest.approx(rows(folder / 'whole', 'train/loss')[1], rel=1e-6)
  assert rows(folder / 'extended', 'eval/parameters/layers') == {2: 2}
  out = llmjax(folder, 'evaluate', '--workdir=extended')
  assert 'parameters at step 2: largest' in out and 'bits/byte' in out
  out = pretrain(folder, 'wrong', 2, '--config.train.objective=mine:fokal', '--config.train.callbacks=mine:focal',
                 '--config.evaluate.tasks=other:task', status=2)
  for line in ('train.objective=mine:fokal: the module mine has no fokal; did you mean mine:focal',
               'train.callbacks=mine:focal: write a subclass of llmjax.run.callback.Callback',
               'evaluate.tasks=other:task: there is no module other'):
    assert line in out
