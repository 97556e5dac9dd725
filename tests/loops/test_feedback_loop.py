"""`llmjax feedback` with a real, untrained model: records, resuming, messages."""

import json

import pytest

from llmjax.config import ConfigError
from llmjax.generate.prompts import load_chat
from llmjax.generate.spec import CHAT_TEMPLATE
from llmjax.text.chat import ChatFormat
from llmjax.text.tokenizer import Tokenizer
from tests.helpers import call, prepare_words


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A folder with a run of one step that has a chat template, and prompts."""
  folder = prepare_words(tmp_path_factory.mktemp('feedback'), 30)
  (folder / 'recipe.json').write_text(json.dumps({
      'model': {'num_layers': 1, 'd_model': 16, 'num_heads': 2, 'mlp_dim': 32},
      'data': {'sources': {str(folder / 'text'): 1.0}, 'seq_len': 512}, 'evaluate': {'splits': []},
      'train': {'steps': 1, 'batch_size': 8}, 'logs': {'writers': []}}))
  assert call('pretrain', f'--config={folder}/recipe.json', f'--workdir={folder}/run') == 0
  with ChatFormat('llmjax', Tokenizer(folder / 'run/tokenizer.model')) as chat:
    chat.save(folder / 'run' / CHAT_TEMPLATE)
  (folder / 'prompts.jsonl').write_text(''.join(
      json.dumps({'prompt': f'What does cat {i} see?', 'responses': [f'house {i}', 'the big house']}) + '\n'
      for i in range(5)))
  (folder / 'rules.toml').write_text(
      '[[principles]]\nname = "x"\ncritique = "Why?"\nrevise = "Again."\nprefer = "Which?"\n')
  return folder


def feedback(folder, kind, output, *more):
  return call('feedback', kind, f'--workdir={folder}/run', f'--principles={folder}/rules.toml',
              f'--prompts={folder}/prompts.jsonl', f'--output={folder}/{output}', '--max_new_tokens=6', *more)


@pytest.mark.slow
def test_records_have_provenance_and_the_same_command_resumes(folder, capsys):
  assert feedback(folder, 'revise', 'whole.jsonl', '--batch_size=5') == 0
  assert feedback(folder, 'revise', 'parts.jsonl', '--batch_size=2', '--limit=3') == 0
  assert feedback(folder, 'revise', 'parts.jsonl', '--batch_size=2') == 0
  assert (folder / 'whole.jsonl').read_text() == (folder / 'parts.jsonl').read_text()
  rows = [json.loads(line) for line in (folder / 'whole.jsonl').read_text().splitlines()]
  assert len(rows) == 5 and len({row['messages'][1]['content'] for row in rows}) > 1
  for number, row in enumerate(rows):
    assert [m['role'] for m in row['messages']] == ['user', 'assistant']
    origin = row['provenance']
    assert origin['record'] == number and origin['model']['step'] == 1 and len(origin['model']['manifest_sha256']) == 64
    assert [step.get('principle') for step in origin['steps']] == [None, 'x']
  assert feedback(folder, 'revise', 'whole.jsonl', '--seed=1') == 2
  error = capsys.readouterr().err
  assert '--output' in error and 'move it away' in error


@pytest.mark.slow
def test_preferences_between_given_and_between_sampled_completions(folder, capsys):
  assert feedback(folder, 'prefer', 'given.jsonl') == 0
  assert feedback(folder, 'prefer', 'sampled.jsonl', f'--policy={folder}/run', '--certainty=0.6') == 0
  assert 'position bias' in capsys.readouterr().out
  given, sampled = ([json.loads(line) for line in (folder / f'{name}.jsonl').read_text().splitlines()]
                    for name in ('given', 'sampled'))
  for i, row in enumerate(given):
    assert {row['chosen'], row['rejected']} == {f'house {i}', 'the big house'} and 0.5 <= row['probability'] < 0.6
  assert all(row['probability'] <= 0.6 and row['provenance']['policy']['step'] == 1 for row in sampled)
  assert any(row['chosen'] != row['rejected'] for row in sampled)


@pytest.mark.slow
def test_invalid_prompts(folder, capsys):
  (folder / 'prompts2.jsonl').write_text('{"prompt": "a"}\n{\n[]\n{"prompt": "b", "responses": ["c"]}\n')
  assert call('feedback', 'prefer', f'--workdir={folder}/run', f'--principles={folder}/rules.toml',
              f'--prompts={folder}/prompts2.jsonl', f'--output={folder}/o.jsonl') == 2
  lines = capsys.readouterr().err.splitlines()
  assert len(lines) == 5 and all(f'prompts2.jsonl:{n}: ' in line for n, line in enumerate(lines[1:], 1))


@pytest.mark.parametrize('text', [None, '{', '[]', '{}', '{"template": {"special": 1}}', '{"template": {"x": 1}}'])
def test_a_run_without_a_chat_template_is_refused_in_one_line(tmp_path, text):
  if text is not None:
    (tmp_path / CHAT_TEMPLATE).write_text(text)
  with pytest.raises(ConfigError) as e:
    load_chat(tmp_path, None, '--policy')
  problem, = e.value.problems
  said = 'was not trained on conversations' if text is None else f'{CHAT_TEMPLATE} cannot be used: '
  assert problem.startswith('--policy: ') and said in problem and '\n' not in problem
