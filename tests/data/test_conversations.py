"""Conversations, pairs and prompts from their records to batches."""

import collections
import json
import pickle
import random
import re
import shutil

import numpy as np
import pytest

from llmjax import config
from llmjax.config import ConfigError
from llmjax.data import conversations, corpus, packing, prepared, records, stepwise, stream, token_store
from llmjax.data.spec import DataSpec, PrepareSpec, TokenizerSpec

USER, SAID = {'role': 'user', 'content': 'q'}, {'role': 'assistant', 'content': 'a'}
SAID2 = {'role': 'assistant', 'content': 'b'}


def normal(kind, record):
  return json.loads(records.normaliser(kind)(record))


@pytest.mark.parametrize('record', [
    {'messages': [USER, SAID]}, {'messages': {'role': ['user', 'assistant'], 'content': ['q', 'a']}},
    {'conversations': [{'from': 'human', 'value': 'q'}, {'from': 'gpt', 'value': 'a'}]},
    {'prompt': 'q', 'completion': 'a'}, {'prompt': [USER], 'completion': [SAID]}, {'prompt': b'q', 'response': b'a'},
    {'instruction': 'q', 'input': '', 'output': 'a'}, {'instruction': 'q', 'output': 'a', 'input': None}])
def test_every_form_of_a_chat(record):
  assert normal('chat', record) == {'messages': [USER, SAID]}


def test_an_instruction_and_its_input_are_one_message():
  made = normal('chat', {'instruction': 'Sort', 'input': '3 1', 'output': '1 3'})
  assert made['messages'][0]['content'] == 'Sort\n\n3 1'


@pytest.mark.parametrize('record', [
    {'prompt': 'q', 'chosen': 'a', 'rejected': 'b'},
    {'instruction': 'q', 'chosen': 'a', 'rejected': 'b', 'output': 'x'},
    {'prompt': [USER], 'chosen': [SAID], 'rejected': [SAID2]},
    {'chosen': [USER, SAID], 'rejected': [USER, SAID2]},
    {'prompt': [USER], 'chosen': [USER, SAID], 'rejected': [USER, SAID2]}])
def test_every_form_of_a_pair(record):
  assert normal('preference', record) == {'prompt': [USER], 'chosen': [SAID], 'rejected': [SAID2]}


@pytest.mark.parametrize('record', [
    {'prompt': 'q', 'answer': '4'}, {'question': 'q', 'answer': 4}, {'messages': [USER], 'answer': '4'}])
def test_every_form_of_a_prompt(record):
  assert normal('prompts', record) == {'prompt': [USER], 'answer': '4'}


STEPS = [{'text': 'Step 1: 2', 'label': 1}, {'text': 'Step 2: 5', 'label': 0}]


@pytest.mark.parametrize('record', [
    {'prompt': 'q', 'steps': [{'text': 'Step 1: 2\n', 'label': True}, {'text': '\nStep 2: 5 ', 'label': '-'}]},
    {'prompt': 'q', 'steps': {'text': ['Step 1: 2', 'Step 2: 5'], 'label': [1, 0]}},
    {'prompt': [USER], 'completions': ['Step 1: 2', 'Step 2: 5'], 'labels': [True, False]},
    {'input': 'q Step 1: 2 ки\nStep 2: 5 ки', 'label': 'q Step 1: 2 +\nStep 2: 5 -', 'task': 'GSM8K'},
    {'question': {'problem': 'q'}, 'label': {'finish_reason': 'found_error', 'steps': [
        {'completions': [{'text': 'no', 'rating': -1}, {'text': 'Step 1: 2', 'rating': 0}], 'chosen_completion': 1},
        {'completions': [{'text': 'Step 2: 5', 'rating': -1}], 'human_completion': None, 'chosen_completion': None},
        {'completions': [{'text': 'not reached', 'rating': 1}], 'chosen_completion': 0}]}},
    {'question': {'problem': 'q'}, 'label': {'steps': [
        {'completions': [{'text': 'no', 'rating': -1}], 'human_completion': {'text': 'Step 1: 2', 'rating': None},
         'chosen_completion': None},
        {'completions': [{'text': 'Step 2: 5', 'rating': -1}], 'chosen_completion': 0}]}}])
def test_every_form_of_steps(record):
  assert normal('stepwise', record) == {'prompt': [USER], 'steps': STEPS}


@pytest.mark.parametrize(('kind', 'record', 'reason'), [
    ('stepwise', {'prompt': 'q', 'answer': 'a'}, 'no prompt and steps of text and label;'),
    ('stepwise', {'steps': [{'text': 'a', 'label': 1}]}, 'no prompt before the steps'),
    ('stepwise', {'prompt': 'q', 'steps': []}, 'steps must be a list'),
    ('stepwise', {'prompt': 'q', 'steps': {'text': 1}}, 'steps must be a list'),
    ('stepwise', {'prompt': 'q', 'steps': [{'text': 'a'}]}, 'the label of a step must be true, false, + or -'),
    ('stepwise', {'prompt': 'q', 'steps': [{'text': 'a', 'label': 1.5}]}, 'or a number from 0 to 1, not 1.5'),
    ('stepwise', {'prompt': 'q', 'steps': [{'text': 'a', 'rating': 2}]}, 'must be -1, 0 or 1, not 2'),
    ('stepwise', {'prompt': 'q', 'steps': [{'text': ' ', 'label': 1}]}, 'a step is empty'),
    ('stepwise', {'prompt': 'q', 'completions': ['a'], 'labels': []}, 'lists of one length'),
    ('stepwise', {'input': 'q Step 1: 2 ки', 'label': 'q Step 1: 2 ?'}, 'it must have + or -'),
    ('chat', {'text': 'x'}, 'completion; or instruction, input and output (found: text)'),
    ('chat', [1], 'not an object'),
    ('chat', {'messages': []}, 'messages must be a list'),
    ('chat', {'messages': 'x'}, 'messages must be a list'),
    ('chat', {'messages': [{'role': 'user'}]}, 'a message has no content'),
    ('chat', {'messages': [{'role': 'user', 'content': 3}]}, 'content holds int, not text'),
    ('chat', {'messages': [{**USER, 'weight': 1}]}, 'only the assistant is trained'),
    ('chat', {'messages': [{**SAID, 'weight': -1}]}, 'must be a number from 0 on'),
    ('chat', {'messages': [{**SAID, 'weight': True}]}, 'must be a number from 0 on'),
    ('chat', {'prompt': 'a\0', 'completion': 'x'}, 'NUL byte'),
    ('preference', {'prompt': 'q', 'chosen': 'a', 'rejected': 'a'}, 'chosen and rejected are the same'),
    ('preference', {'chosen': 'a', 'rejected': 'b'}, 'no prompt before'),
    ('preference', {'prompt': 'q', 'chosen': [USER], 'rejected': 'b'}, 'holds no message of the assistant'),
    ('prompts', {'prompt': 'q'}, 'and answer')])
def test_bad_records_get_a_reason(kind, record, reason):
  with pytest.raises(ValueError) as e:
    records.normaliser(kind)(record)
  assert reason in str(e.value)


SYSTEM, OFF = {'role': 'system', 'content': 's'}, {**SAID, 'weight': 0}
CALL = {'type': 'function', 'function': {'name': 'f', 'arguments': {'x': 1}}}
CALLS = {'role': 'assistant', 'content': '', 'tool_calls': [CALL]}
RESULT = {'role': 'tool', 'content': '2'}
TOOL = {'type': 'function', 'function': {'name': 'f', 'parameters': {'z': 1, 'a': 2}}}


def turn(speaker, value, **more):
  return {'from': speaker, 'value': value, **more}


@pytest.mark.parametrize(('record', 'made'), [
    # A system message beside the conversation.
    ({'system': 's', 'conversations': [turn('human', 'q'), turn('gpt', 'a')]}, [SYSTEM, USER, SAID]),
    ({'system': 's', 'messages': [SYSTEM, USER, SAID]}, [SYSTEM, USER, SAID]),
    ({'system_prompt': 's', 'question': 'q', 'response': 'a'}, [SYSTEM, USER, SAID]),
    ({'system': 's', 'prompt': 'q', 'completion': 'a'}, [SYSTEM, USER, SAID]),
    # Alpaca's history, Dolly's context.
    ({'instruction': 'q', 'input': '', 'output': 'a', 'system': 's', 'history': [['q', 'a']]},
     [SYSTEM, USER, OFF, USER, SAID]),
    ({'instruction': 'q', 'context': 'c', 'response': 'a'}, [{**USER, 'content': 'q\n\nc'}, SAID]),
    # Names of roles.
    ({'conversations': [turn('System', 's'), turn('user', 'q'), turn('chatgpt', 'a')]}, [SYSTEM, USER, SAID]),
    ({'conversation': [turn('prompter', 'q'), turn('bard', 'a')]}, [USER, SAID]),
    ({'messages': [USER, {'role': 'model', 'content': 'a'}]}, [USER, SAID]),
    # Flags of turns.
    *(({'messages': [USER, {**SAID, **flag}, USER, {**SAID, **other}]}, [USER, OFF, USER, SAID]) for flag, other in (
        ({'train': False}, {'train': True}), ({'loss': False}, {}), ({'masked': True}, {'masked': False}),
        ({'weight': 0}, {'weight': 1}), ({'training': 0}, {'training': 1}), ({'mask': True, 'weight': 0.0}, {}))),
    ({'messages': [{**USER, 'train': False, 'masked': True, 'weight': 0}, SAID]}, [USER, SAID]),
    # What prompt and completion share; a prompt's turns are not trained.
    ({'prompt': [USER], 'completion': [USER, SAID]}, [USER, SAID]),
    ({'prompt': [USER], 'completion': [SYSTEM, USER, SAID]}, [SYSTEM, USER, SAID]),
    ({'prompt': [SYSTEM, USER], 'completion': [USER, SAID]}, [SYSTEM, USER, SAID]),
    ({'prompt': [USER, SAID, USER], 'completion': [USER, SAID, USER, SAID2]}, [USER, OFF, USER, SAID2]),
    ({'prompt': [USER, SAID, USER], 'completion': SAID2}, [USER, OFF, USER, SAID2]),
    ({'input': [USER], 'output': 'a'}, [USER, SAID]),
    # Parts of text, reasoning.
    ({'messages': [{'role': 'user', 'content': [{'type': 'text', 'text': 'q'}]}, SAID]}, [USER, SAID]),
    *(({'messages': [USER, {**SAID, name: 'r'}]}, [USER, {**SAID, 'reasoning_content': 'r'}])
      for name in ('reasoning_content', 'thinking', 'reasoning')),
    # TRL's unpaired preferences: the good ones.
    ({'prompt': 'q', 'completion': 'a', 'label': True}, [USER, SAID]),
    ({'messages': [USER, SAID], 'prompt': 'q', 'id': 3}, [USER, SAID])])
def test_what_every_field_of_a_chat_means(record, made):
  assert normal('chat', record) == {'messages': made}


@pytest.mark.parametrize('record', [
    {'messages': [USER, {'role': 'assistant', 'content': None, 'tool_calls': [
        {'function': {'name': 'f', 'arguments': '{"x": 1}'}}]}, RESULT, SAID], 'tools': [TOOL]},
    {'messages': [USER, {'role': 'assistant', 'function_call': {'name': 'f', 'arguments': '{"x": 1}'}},
                  {**RESULT, 'role': 'function'}, SAID], 'functions': [TOOL['function']]},
    {'conversations': [turn('human', 'q'), turn('function_call', '{"name": "f", "arguments": {"x": 1}}'),
                       turn('observation', '2'), turn('gpt', 'a')], 'tools': json.dumps([TOOL['function']])}])
def test_every_form_of_tools(record):
  made = normal('chat', record)
  assert made == {'messages': [USER, CALLS, RESULT, SAID], 'tools': [TOOL]}
  assert list(made['tools'][0]['function']['parameters']) == ['z', 'a']  # A template writes them in this order.
  assert {'f', '{"x": 1}'} <= set(conversations.texts_of(json.dumps(made)))


def test_results_of_tools_come_in_the_order_of_the_calls():
  calls = {**CALLS, 'tool_calls': [{'id': name, **CALL} for name in 'ab']}
  results = [{'role': 'tool', 'content': name, 'tool_call_id': name} for name in 'ab']
  assert normal('chat', {'messages': [USER, calls, *results[::-1], SAID]})['messages'] == [
      USER, calls, *results, SAID]


def test_train_history_trains_it():
  record = {'instruction': 'q', 'output': 'a', 'history': [['q', 'b']]}
  made = json.loads(records.normaliser('chat', train_history=True)(record))
  assert made == {'messages': [USER, SAID2, USER, SAID]}


def test_dialogues_stay_text_for_a_template_that_writes_no_roles():
  text = '\n\nHuman: q\n\nAssistant:'
  make = records.normaliser('chat', dialogues=False)
  assert json.loads(make({'prompt': text, 'completion': 'a'})) == {'messages': [{**USER, 'content': text}, SAID]}
  assert normal('chat', {'prompt': text, 'completion': 'a'}) == {'messages': [USER, SAID]}


def test_fields_without_a_meaning_are_counted():
  unused = collections.Counter()
  make = records.normaliser('chat', unused)
  for number in range(3):
    make({'messages': [USER, {**SAID, 'id': 'x'}], 'source': 'web', 'tags': [], 'score\x1b': number})
  assert unused == {'messages.id': 3, 'source': 3, 'score?': 3}


@pytest.mark.parametrize(('record', 'made'), [
    ({'prompt': 'Hi?', 'chosen': [SYSTEM, {**USER, 'content': 'Hi?'}, SAID],
      'rejected': [SYSTEM, {**USER, 'content': 'Hi?'}, SAID2]}, ([SYSTEM, {**USER, 'content': 'Hi?'}], 'a', 'b')),
    ({'system': 's', 'question': 'q', 'chosen': 'a', 'rejected': 'b'}, ([SYSTEM, USER], 'a', 'b')),
    ({'prompt': 'Q: red?\nA:', 'chosen': 'Q: red?\nA: a', 'rejected': 'Q: red?\nA: b'},
     ([{**USER, 'content': 'Q: red?\nA:'}], ' a', ' b')),
    ({'prompt': 'a', 'chosen': 'ab', 'rejected': 'ac'}, ([{**USER, 'content': 'a'}], 'ab', 'ac')),
    ({'chosen': 'The sky is blue.', 'rejected': 'The sky is black.'},
     ([{**USER, 'content': 'The sky is'}], ' blue.', ' black.')),
    ({'chosen': '\n\nHuman: q\n\nAssistant: b\n\nHuman: q\n\nAssistant: a',
      'rejected': '\n\nHuman: q\n\nAssistant: b\n\nHuman: q\n\nAssistant: b'}, ([USER, SAID2, USER], 'a', 'b')),
    ({'prompt': '\n\nHuman: q\n\nAssistant:', 'chosen': 'a', 'rejected': 'b'}, ([USER], 'a', 'b')),
    ({'prompt': 'q', 'chosen': [USER, SAID], 'rejected': [USER, SAID2], 'messages': [USER, SAID]}, ([USER], 'a', 'b')),
    ({'prompt': [SYSTEM, USER], 'chosen': [USER, SAID], 'rejected': [USER, SAID2]}, ([SYSTEM, USER], 'a', 'b')),
    ({'conversations': [turn('human', 'q')], 'chosen': turn('gpt', 'a'), 'rejected': turn('gpt', 'b')},
     ([USER], 'a', 'b')),
    ({'instruction': 'q', 'chosen': 'a', 'rejected': 'b', 'history': [['q', 'a']]}, ([USER, SAID, USER], 'a', 'b')),
    ({'input': {'messages': [USER]}, 'preferred_output': [SAID], 'non_preferred_output': [SAID2]}, ([USER], 'a', 'b'))])
def test_what_every_field_of_a_pair_means(record, made):
  prompt, chosen, rejected = made
  assert normal('preference', record) == {'prompt': prompt, 'chosen': [{**SAID, 'content': chosen}],
                                     'rejected': [{**SAID, 'content': rejected}]}


@pytest.mark.parametrize(('record', 'prompt'), [
    ({'messages': [USER, SAID], 'answer': '4'}, [USER]),
    ({'messages': [USER, CALLS, RESULT, SAID], 'answer': '4', 'tools': [TOOL]}, [USER]),
    ({'conversations': [turn('human', 'q'), turn('gpt', 'a'), turn('human', 'q')], 'answer': '4'}, [USER, SAID, USER]),
    ({'system': 's', 'problem': 'q', 'solution': '4'}, [SYSTEM, USER])])
def test_an_answer_never_stands_in_its_prompt(record, prompt):
  made = normal('prompts', record)
  assert made.pop('answer') == '4' and made.pop('prompt') == prompt and made == (
      {'tools': [TOOL]} if 'tools' in record else {})
  if 'tools' in record:
    with pytest.raises(ValueError, match='tools have no place'):
      records.read_prompt(record)
  else:
    assert records.read_prompt(record) == prompt


FLAGGED = {'messages': [USER, SAID]}


@pytest.mark.parametrize(('kind', 'record', 'reason'), [
    ('chat', {'prompt': 'q', 'completion': 'a', 'label': False}, 'label is false'),
    ('chat', {'instruction': 'q', 'output': 'a', 'kto_tag': 'false'}, 'kto_tag is false.*records=preference'),
    ('preference', {'prompt': 'q', 'chosen': 'a', 'rejected': 'b', 'label': 0}, 'label is false'),
    ('chat', {**FLAGGED, 'system': 's', 'system_prompt': 't'}, 'system and system_prompt and .* differ'),
    ('chat', {'messages': [SYSTEM, USER, SAID], 'system': 't'}, 'system is not the system message'),
    ('chat', {**FLAGGED, 'completion': 'other'}, 'completion has text that no other field has'),
    ('chat', {'prompt': 'q', 'completion': 'a', 'context': 'c'}, 'context has text that no other'),
    ('chat', {'prompt': 'q', 'completion': 'a', 'thinking': 'c'}, 'thinking has text that no other'),
    ('chat', {**FLAGGED, 'history': [['a', 'b']]}, 'history has text that no other'),
    ('chat', {**FLAGGED, 'images': ['x.png']}, 'images is not text'),
    ('chat', {**FLAGGED, 'mask': 'User'}, 'mask of a record'),
    ('chat', {**FLAGGED, 'tools': '[{'}, 'tools must be JSON'),
    ('chat', {**FLAGGED, 'tools': ['x']}, 'tools must be'),
    ('chat', {'instruction': 'q', 'output': 'a', 'history': ['a']}, 'history must be a list of'),
    ('chat', {'prompt': [USER], 'completion': [{**USER, 'content': 'x'}, SAID]}, 'completion begins with messages'),
    ('chat', {'messages': [USER, {**SAID, 'train_detail': [{'begin_offset': 0}]}]}, 'train_detail trains parts'),
    ('chat', {'messages': [USER, {**SAID, 'train': 'no'}]}, 'train of a message must be true or false, not no'),
    ('chat', {'messages': [USER, {**SAID, 'train': True, 'weight': 0}]}, 'weight and train of a message contradict'),
    ('chat', {'messages': [{**USER, 'train': True}, SAID]}, 'train trains a message of the user'),
    ('chat', {'messages': [USER, {**SAID, 'label': False}]}, 'label in a message'),
    ('chat', {'messages': [USER, {**SAID, 'content': ''}]}, 'message of the assistant is empty'),
    ('chat', {'messages': [{'role': 'narrator', 'content': 'q'}, SAID]}, "the role 'narrator' is unknown"),
    ('chat', {'messages': [{'role': 'user', 'content': [{'type': 'image_url'}]}, SAID]}, 'a part of content is image'),
    ('chat', {'messages': [{**USER, 'thinking': 'x'}, SAID]}, 'thinking in a message of the user'),
    ('chat', {'messages': [USER, {**SAID, 'thinking': 'x', 'reasoning': 'y'}]}, 'thinking and reasoning .* differ'),
    ('chat', {'messages': [{**USER, 'tool_calls': [CALL]}, SAID]}, 'only the assistant calls tools'),
    ('chat', {'messages': [USER, {**SAID, 'tool_calls': [{'name': 3}]}]}, 'tool_calls must be a list of'),
    ('chat', {'messages': [USER, {**SAID, 'tool_calls': [{**CALL, 'type': 'custom'}]}]}, 'of type custom'),
    ('chat', {'messages': [USER, {**SAID, 'tool_calls': [{'name': 'f', 'arguments': '[1]'}]}]}, 'must be an object'),
    ('chat', {'conversations': [turn('human', 'q'), turn('function_call', 'f(1)')]}, 'a function_call must be JSON'),
    ('chat', {'messages': [USER, {**CALLS, 'tool_calls': [{'id': 'a', **CALL}]}, {**RESULT, 'tool_call_id': 'b'}]},
     "tool_call_id 'b' is not the id"),
    ('preference', {'prompt': 'x', 'chosen': [USER, SAID], 'rejected': [USER, SAID2]}, 'prompt is not what chosen'),
    ('preference', {'prompt': 'q', 'chosen': [SYSTEM, SAID], 'rejected': [SAID2]}, 'a message of the system, not'),
    ('prompts', {'prompt': [USER, SAID], 'answer': '4'}, 'prompt ends with a message of the assistant'),
    ('prompts', {'messages': [SYSTEM, SAID], 'answer': '4'}, 'messages hold none of the user'),
    ('prompts', {'question': 'q', 'context': 'c', 'answer': '4'}, 'context has text that no other')])
def test_a_field_that_cannot_be_used_is_named(kind, record, reason):
  with pytest.raises(ValueError, match=reason):
    records.normaliser(kind)(record)


def write_chats(path, count, seed=0):
  rng = np.random.default_rng(seed)
  words = 'the model reads a row of tokens and learns what comes next from every document'.split()
  say = lambda: ' '.join(rng.choice(words, rng.integers(2, 12)))
  path.write_text(''.join(json.dumps(
      {'messages': [m for _ in range(rng.integers(1, 3)) for m in (
          {'role': 'user', 'content': say()}, {'role': 'assistant', 'content': f'{say()} {i}'})]}) + '\n'
      for i in range(count)))
  return path


@pytest.fixture(scope='module')
def chats(tmp_path_factory, small_folder):
  """A prepared folder of 80 conversations with the tokenizer of small_folder; some records are bad."""
  root, output = tmp_path_factory.mktemp('chats'), tmp_path_factory.mktemp('prepared') / 'out'
  file = write_chats(root / 'chats.jsonl', 80)
  with open(file, 'a') as f:
    f.write('{"messages": 3}\nno JSON\n' + json.dumps({'text': 'x'}) + '\n')
  (root / 'README.md').write_text('No records here.')
  spec = PrepareSpec(source='text_dir', path=str(root), records='chat', output=str(output),
                     tokenizer=TokenizerSpec(path=f'{small_folder}/tokenizer.model'))
  corpus.prepare(spec)
  return str(output)


def test_a_prepared_folder_of_chats(chats):
  manifest = prepared.read_manifest(chats)
  assert prepared.kind(manifest) == 'chat' and manifest['template']['special']
  assert manifest['quarantine'] == {'byte_order_marks_removed': 0, 'records': 3, 'reasons': {
      'messages must be a list of objects with role and content': 1, 'not JSON': 1,
      'no messages; conversations; prompt and completion; or instruction, input and output': 1}}
  places = [(r['file'], r['line']) for r in map(json.loads, open(prepared.quarantine_path(chats)))]
  assert places == [('chats.jsonl', 81), ('chats.jsonl', 82), ('chats.jsonl', 83)]
  assert sum(s['documents'] for s in manifest['splits'].values()) == 80
  assert set(manifest['splits']) == set(prepared.SPLITS)
  tokenizer = stream.load_tokenizer(DataSpec(sources={chats: 1.0}))
  for split, counts in manifest['splits'].items():
    store = token_store.TokenStore(prepared.tokens_path(chats, split))
    chat = stream.chat_format(DataSpec(sources={chats: 1.0}))
    documents = list(stream.read_documents(chats, split))
    assert counts['trained'] == int((store.columns['loss_mask'] > 0).sum())
    with chat:
      for number, (_, text) in enumerate(documents):
        ids, weights = chat.encode(json.loads(text)['messages'])
        np.testing.assert_array_equal(store[number], ids)
        part = slice(store.offsets[number], store.offsets[number + 1])
        np.testing.assert_array_equal(store.columns['loss_mask'][part], weights)
        said = ''.join(m['content'] for m in json.loads(text)['messages'] if m['role'] == 'assistant')
        assert tokenizer.decode(ids[weights > 0]) == said


def test_splits_do_not_depend_on_order_or_file(chats, tmp_path, small_folder):
  lines = write_chats(tmp_path / 'all.jsonl', 80).read_text().splitlines()
  (tmp_path / 'x').mkdir()
  (tmp_path / 'x' / 'b.json').write_text('[' + ',\n'.join(lines[40:][::-1]) + ']')  # As an array, the other way round.
  (tmp_path / 'x' / 'a.ndjson').write_text('\n'.join(lines[:40]))
  spec = PrepareSpec(source='text_dir', path=str(tmp_path / 'x'), records='chat', output=str(tmp_path / 'out'),
                     tokenizer=TokenizerSpec(path=f'{small_folder}/tokenizer.model'))
  corpus.prepare(spec)
  for split in prepared.SPLITS:
    assert ({t for _, t in stream.read_documents(tmp_path / 'out', split)}
            == {t for _, t in stream.read_documents(chats, split)})


@pytest.mark.parametrize(('record', 'template', 'shown'), [
    ({'messages': [USER]}, 'llmjax', "data.jsonl#30 has no trained token: '<s><|user|>q<|end|>'"),
    ({'messages': [USER, {**SAID, 'weight': 0}]}, 'llmjax',
     "data.jsonl#30 has no trained token: '<s><|user|>q<|end|><|assistant|>a<|end|>'"),
    ({'messages': [USER, SAID]}, 'own.jinja', '{% generation %} and {% endgeneration %}')])
def test_a_sample_without_a_trained_token_is_an_error(tmp_path, monkeypatch, small_folder, record, template, shown):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'own.jinja').write_text('{% for m in messages %}{{ m.content }}{% endfor %}')
  write_chats(tmp_path / 'data.jsonl', 29)
  with open(tmp_path / 'data.jsonl', 'a') as f:
    f.write(json.dumps(record) + '\n')
  spec = PrepareSpec(source='text_dir', path='data.jsonl', records='chat', output='out', template=template,
                     tokenizer=TokenizerSpec(path=f'{small_folder}/tokenizer.model'))
  with pytest.raises(ConfigError) as e:
    corpus.prepare(spec)
  assert shown in '\n'.join(e.value.problems)
  assert not prepared.is_prepared('out')


def test_a_tokenizer_of_its_own_knows_the_template(tmp_path):
  write_chats(tmp_path / 'data.jsonl', 60)
  spec = PrepareSpec(source='text_dir', path=str(tmp_path / 'data.jsonl'), records='chat', template='chatml',
                     output=str(tmp_path / 'out'), tokenizer=TokenizerSpec(vocab_size=340, sample_lines=500))
  corpus.prepare(spec)
  tokenizer = stream.load_tokenizer(DataSpec(sources={str(tmp_path / 'out'): 1.0}))
  assert '<|im_end|>' in tokenizer.special_ids
  assert len(tokenizer.encode('{"messages"')) > 6  # It saw what is said, not the JSON around it.


def write_pairs(path, count=40):
  path.write_text(''.join(json.dumps({'prompt': f'q {i}', 'chosen': f'good {i}', 'rejected': f'bad row {i}'}) + '\n'
                          for i in range(count)))


def prepare_records(tmp_path, small_folder, records, **kwargs):
  spec = PrepareSpec(source='text_dir', path=str(tmp_path / 'data.jsonl'), records=records,
                     output=str(tmp_path / 'out'),
                     tokenizer=TokenizerSpec(path=f'{small_folder}/tokenizer.model'), **kwargs)
  corpus.prepare(spec)
  return str(tmp_path / 'out')


def of_prompts(kind):
  """Yields (record, number of its prompt): each prompt with several completions, written in several ways."""
  for i in range(60):
    for k in range(4):
      text = f'How much is {i} + 1?'
      text = (text, text.upper(), f' {text}\n', text.replace(' ', '\t'))[k]
      said, other = f'It is {i + 1}, {k}', f'No idea {k}'
      messages = [{'role': 'user', 'content': text}, {'role': 'assistant', 'content': said}]
      more = [{'role': 'user', 'content': f'And {k}?'}, {'role': 'assistant', 'content': 'Yes'}]
      yield i, {
          'chat': {'messages': messages + more * (k % 2)},
          'preference': {'prompt': text, 'chosen': said, 'rejected': other},
          'prompts': {'question': text, 'answer': f'{i + 1}' + '.0' * k},
          'stepwise': {'prompt': text, 'steps': [{'text': said, 'label': 1}, {'text': other, 'label': 0}]}}[kind]


@pytest.mark.parametrize('kind', ['chat', 'preference', 'prompts', 'stepwise'])
def test_completions_of_a_prompt_are_in_one_split(tmp_path, small_folder, kind):
  numbered = list(of_prompts(kind))
  random.Random(0).shuffle(numbered)
  (tmp_path / 'data.jsonl').write_text(''.join(json.dumps(record) + '\n' for _, record in numbered))
  folder = prepare_records(tmp_path, small_folder, kind, validation_fraction=0.2, test_fraction=0.1)
  found = {split: {int(re.search(r'how much is (\d+)', conversations.normalise_document(text))[1])
                   for _, text in stream.read_documents(folder, split)} for split in prepared.SPLITS}
  assert sum(map(len, found.values())) == 60 and set().union(*found.values()) == set(range(60))
  assert 6 <= len(found['validation']) <= 18 and 2 <= len(found['test']) <= 12
  counts = prepared.read_manifest(folder)['splits']
  assert sum(split['documents'] for split in counts.values()) == 240 * (2 if kind == 'preference' else 1)


def test_a_turn_that_is_not_trained_is_no_prompt_of_its_own(tmp_path, small_folder):
  """Examples that begin every conversation must not join them all."""
  shots = [{'role': 'user', 'content': 'Hello'}, {'role': 'assistant', 'content': 'Hi', 'weight': 0}]
  chats = [[*shots, {'role': 'user', 'content': f'{i}?'}, {'role': 'assistant', 'content': f'{i}!'}] for i in range(40)]
  document = records.normaliser('chat')({'messages': chats[0]})
  assert len(conversations.prompts_of(document)) == 1
  alone = records.normaliser('chat')({'messages': [{'role': 'assistant', 'content': 'Welcome'}]})
  assert conversations.prompts_of(alone) == []
  (tmp_path / 'data.jsonl').write_text(''.join(json.dumps({'messages': c}) + '\n' for c in chats))
  manifest = prepared.read_manifest(prepare_records(tmp_path, small_folder, 'chat', validation_fraction=0.1))
  assert manifest['splits']['validation']['documents'] >= 2
  (tmp_path / 'one').mkdir()
  (tmp_path / 'one' / 'data.jsonl').write_text(''.join(
      json.dumps({'prompt': 'Hello', 'completion': f'{i}'}) + '\n' for i in range(40)))
  with pytest.raises(ConfigError, match=r'too few different prompts \(1\)'):
    prepare_records(tmp_path / 'one', small_folder, 'chat', validation_fraction=0.1)


def test_copies_differ_in_white_space_and_case(tmp_path, small_folder):
  chats = [[{'role': 'user', 'content': f'Say {i}'}, {'role': 'assistant', 'content': f'It is\n{i} A'}]
           for i in range(30)]
  even = [[{**m, 'content': m['content'].replace('\n', ' ').lower()} for m in chat] for chat in chats]
  (tmp_path / 'data.jsonl').write_text(''.join(json.dumps({'messages': c}) + '\n' for c in chats + even))
  manifest = prepared.read_manifest(prepare_records(tmp_path, small_folder, 'chat'))
  assert manifest['duplicates'] == {'repeated': 30, 'train_copies_of_held_out': 0}


def test_pairs_stay_together(tmp_path, small_folder):
  write_pairs(tmp_path / 'data.jsonl')
  folder = prepare_records(tmp_path, small_folder, 'preference')
  spec = DataSpec(sources={folder: 1.0}, seq_len=32)
  tokenizer = stream.load_tokenizer(spec)
  batches = stream.open_stream(spec, batch_size=4, seed=1)
  batch = next(batches)
  assert {name: v.shape for name, v in batch.items()} == {**dict.fromkeys(packing.FIELDS, (8, 32)), 'label': (8,)}
  np.testing.assert_array_equal(batch['label'], [1, 0] * 4)
  for i in range(4):
    (chosen, w1), = stream.documents_of(batch, 2 * i)
    (rejected, w2), = stream.documents_of(batch, 2 * i + 1)
    good, bad = tokenizer.decode(chosen[w1 > 0]), tokenizer.decode(rejected[w2 > 0])
    assert good.startswith('good ') and bad == good.replace('good', 'bad row')
    assert tokenizer.decode(chosen[w1 == 0]) == tokenizer.decode(rejected[w2 == 0]) == f'q {good.split()[1]}'
  # Two processes with two blocks each get whole pairs, and together the same batch.
  parts = [next(stream.open_stream(spec, batch_size=4, seed=1, blocks=b, block_count=2)) for b in ((0,), (1,))]
  for name, value in batch.items():
    np.testing.assert_array_equal(np.concatenate([p[name] for p in parts]), value)
  held_out = list(stream.eval_batches(spec, 'validation', 4))
  assert sum(int((b['loss_mask'].sum(1) > 0).sum()) for b in held_out) == prepared.read_manifest(
      folder)['splits']['validation']['documents']
  with pytest.raises(ConfigError, match='holds preference records, and this command reads text or chat'):
    config.build(DataSpec, {'sources': {folder: 1.0}})


@pytest.mark.parametrize('record', [
    {'prompt': 'q', 'completion': 'a', 'label': False},
    {'prompt': [USER], 'completion': [USER, SAID], 'label': 'False'},
    {'messages': [USER, SAID], 'label': False}, {'instruction': 'q', 'output': 'a', 'kto_tag': False},
    {'conversations': [turn('human', 'q'), turn('gpt', 'a')], 'kto_tag': 'false'}])
def test_every_form_of_an_unpaired_preference(record):
  assert normal('preference', record) == {'prompt': [USER], 'completion': [SAID], 'label': False}
  with pytest.raises(ValueError, match='is false'):
    normal('chat', record)


@pytest.mark.parametrize(('good', 'bad'), [(30, 10), (12, 20)])
def test_unpaired_completions_are_halves_of_pairs(tmp_path, small_folder, good, bad):
  (tmp_path / 'data.jsonl').write_text(''.join(
      json.dumps({'prompt': f'q {i}', 'completion': f'{"good" if i < good else "bad"} {i}', 'label': i < good}) + '\n'
      for i in range(good + bad)))
  folder = prepare_records(tmp_path, small_folder, 'preference')
  assert prepared.read_manifest(folder)['unpaired'] == good + bad
  spec, found = DataSpec(sources={folder: 1.0}, seq_len=32), []
  tokenizer = stream.load_tokenizer(spec)
  for split in prepared.SPLITS:
    for batch in stream.eval_batches(spec, split, 4):
      for row, weights in enumerate(batch['loss_mask']):
        said = tokenizer.decode(batch['targets'][row][weights > 0])
        assert said.startswith(('good', 'bad')[row % 2]) or not said  # Good ones at even places, bad ones at odd ones.
        assert batch['label'][row] == (row % 2 == 0) or not said and not weights.any()
        found += [said] * bool(said)
  assert sorted(int(said.split()[1]) for said in found) == list(range(good + bad))


@pytest.mark.parametrize('template', ['llmjax', 'chatml', 'llama3', 'gemma', 'plain'])
def test_what_follows_a_step_has_its_label(tmp_path, template):
  lines = [{'prompt': f'q {i}', 'steps': [{'text': f'  one é ▁ {i}', 'label': 1},
                                          {'text': f'two\nlines {i}', 'label': 0}, {'text': 'three', 'label': 0.25}]}
           for i in range(40)]
  (tmp_path / 'data.jsonl').write_text('\n'.join(map(json.dumps, lines)))
  spec = PrepareSpec(source='text_dir', path=str(tmp_path / 'data.jsonl'), records='stepwise', template=template,
                     output=str(tmp_path / 'out'), tokenizer=TokenizerSpec(vocab_size=340, sample_lines=100))
  manifest, _ = corpus.prepare(spec)
  assert sum(s['trained'] for s in manifest['splits'].values()) == 120 and not manifest['quarantine']['records']
  data = DataSpec(sources={str(tmp_path / 'out'): 1.0}, seq_len=256, packing='best_fit')
  tokenizer = stream.load_tokenizer(data)
  (batch,) = stream.eval_batches(data, 'validation', stream.count_examples(data, 'validation'))
  documents = [d for row in range(len(batch['tokens'])) for d in stream.documents_of(batch, row, ('step_labels',))]
  assert len(documents) == manifest['splits']['validation']['documents'] > 1
  for ids, weights, labels in documents:
    (ends,) = np.nonzero(weights)
    np.testing.assert_array_equal(weights[ends], 1.0)
    np.testing.assert_array_equal(labels[ends], [1.0, 0.0, 0.25])
    assert labels.sum() == 1.25
    number = int(tokenizer.decode(ids[:ends[0]]).split()[-1])
    begins = np.append(0, ends[:-1])
    said = [tokenizer.decode(ids[a:b]) for a, b in zip(begins, ends, strict=True)]
    first = 1 + max(i for i in range(ends[0]) if tokenizer.decode(ids[i:ends[0]]).strip().startswith('one'))
    found = first - 1 + np.asarray(stepwise.find_ends(tokenizer, ids[first - 1:ends[-1]]))
    assert set(ends) < set(found) and len(found) == 4  # A line in a step divides it.
    assert said[0].endswith(f'one é ▁ {number}') and f'q {number}' in said[0]
    assert said[1:] == [f'\ntwo\nlines {number}', '\nthree']
    assert ids[ends[-1]] in tokenizer.special_ids.values()  # What ends the message.


@pytest.mark.parametrize('text, said', [
    ('one 1\ntwo', ['one 1', 'one 1\ntwo']), ('\n one é \n\n two\n', ['one é', 'one é \n\n two']), ('one', ['one']),
    ('a\nb\nc', ['a', 'a\nb', 'a\nb\nc']), ('', ['']), (' \n', [''])])
def test_steps_of_an_answer(small_folder, text, said):
  tokenizer = stream.load_tokenizer(DataSpec(sources={small_folder: 1.0}))
  ids = tokenizer.encode(text)
  places = stepwise.find_ends(tokenizer, ids)
  assert [tokenizer.decode(ids[:place]).strip() for place in places] == said
  assert all(tokenizer.decode(ids[place - 1:place]).strip() for place in places if place)  # Read at a word.


def test_a_template_that_changes_what_is_said_has_no_ends_of_steps(tmp_path, small_folder):
  (tmp_path / 'own.jinja').write_text('{% for m in messages %}{% generation %}{{ m.content|upper }}{% endgeneration %}'
                                      '{% endfor %}')
  lines = [{'prompt': f'q {i}', 'completions': ['a'], 'labels': [1]} for i in range(40)]
  (tmp_path / 'data.jsonl').write_text('\n'.join(map(json.dumps, lines)))
  spec = PrepareSpec(source='text_dir', path=str(tmp_path / 'data.jsonl'), records='stepwise',
                     output=str(tmp_path / 'out'), template=str(tmp_path / 'own.jinja'),
                     tokenizer=TokenizerSpec(path=f'{small_folder}/tokenizer.model'))
  with pytest.raises(ConfigError, match='every record of .* was rejected.* 40 x .* changes or leaves out content'):
    corpus.prepare(spec)
  assert not prepared.is_prepared(tmp_path / 'out')


def test_prompts_come_with_their_answers_and_columns(tmp_path, small_folder):
  (tmp_path / 'data.jsonl').write_text(''.join(
      json.dumps({'question': f'How much is {i} + 1?', 'answer': str(i + 1), 'level': i % 3}) + '\n'
      for i in range(40)))
  folder = prepare_records(tmp_path, small_folder, 'prompts')
  spec = DataSpec(sources={folder: 1.0}, seq_len=64)
  tokenizer = stream.load_tokenizer(spec)
  with stream.open_stream(spec, batch_size=6, seed=0) as prompts:
    first, second = next(prompts), next(prompts)
    prompts.restore(1)
    assert [p['answer'] for p in next(prompts)] == [p['answer'] for p in second]
  assert len({p['answer'] for p in first + second}) == 12
  for item in first:
    number = int(item['answer']) - 1
    assert tokenizer.decode(item['ids']) == f'How much is {number} + 1?' and item['columns'] == {'level': number % 3}
    assert item['ids'][-1] == tokenizer.special_ids['<|assistant|>']
  # Held out: each prompt once, whatever the weights; a limit is a sample of every source.
  shutil.copytree(folder, f'{folder}2')
  both = DataSpec(sources={folder: 0.9, f'{folder}2': 0.1}, seq_len=64)
  answers = lambda spec, split, limit=0: sorted(
      p['answer'] for batch in stream.eval_batches(spec, split, 3, limit) for p in batch)
  assert answers(both, 'validation') == sorted(2 * answers(spec, 'validation'))
  assert len(answers(spec, 'train')) > 30 and answers(both, 'train', 4) == sorted(2 * answers(spec, 'train', 2))


def test_replay_mixes_rows_of_both_kinds(chats, small_folder):
  spec = DataSpec(sources={chats: 0.75, small_folder: 0.25}, seq_len=96, packing='best_fit', overflow='drop')
  config.build(DataSpec, {'sources': spec.sources, 'seq_len': 96, 'packing': 'best_fit'})
  with stream.open_stream(spec, batch_size=8, seed=0) as batches:
    drawn = [next(batches) for _ in range(50)]
    rows = [place['source'] for b in range(50) for place in batches.describe(b)]
  assert rows.count(chats) == 300
  weights = np.concatenate([b['loss_mask'] for b in drawn])
  for source, mask in zip(rows, weights, strict=True):
    assert 0 < mask.sum() < 80 if source == chats else mask.sum() > 0
  with pytest.raises(ConfigError, match='write packing=best_fit'):
    config.build(DataSpec, {'sources': spec.sources})


def write_weighted(folder, lengths, seed=0):
  rng = np.random.default_rng(seed)
  with token_store.TokenStoreWriter(folder, vocab_size=500, bos_id=3, eos_id=1, columns=('loss_mask',)) as writer:
    for n in lengths:
      ids, mask = rng.integers(4, 500, n), rng.choice([0, 0.5, 1], n).astype(np.float32)
      assert writer.add_encoded(ids, {'loss_mask': mask}) is None
  return token_store.TokenStore(folder)


def test_weights_follow_their_targets_in_every_packing(tmp_path):
  store = write_weighted(tmp_path, [7, 20, 3, 12, 5])
  for name, rows_class in packing.PACKINGS.items():
    rows = pickle.loads(pickle.dumps(rows_class(store, 19)))
    batch = rows.batch(range(len(rows)))
    found = sorted((int(t), float(w)) for t, w, s in zip(
        batch['targets'].ravel(), batch['loss_mask'].ravel(), batch['segment_ids'].ravel(), strict=True) if s)
    first = np.isin(np.arange(store.num_tokens), store.offsets[:-1])
    mask = store.columns['loss_mask']
    assert found == sorted(zip(store.tokens[~first].tolist(), mask[~first].tolist(), strict=True)), name


def test_damaged_weights_are_refused(tmp_path):
  write_weighted(tmp_path, [7, 20])
  (tmp_path / 'loss_mask.bin').write_bytes(b'123')
  with pytest.raises(ValueError, match='--force'):
    _ = token_store.TokenStore(tmp_path).columns
