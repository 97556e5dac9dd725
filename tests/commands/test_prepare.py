import gzip
import io
import json
import lzma
import pathlib
import shlex

import pytest

from llmjax import config, main, recipes
from llmjax.commands import prepare
from llmjax.data import corpus, prepared, stream, token_store, tokens
from llmjax.data.spec import DataSpec, PrepareOptions, PrepareSpec, TokenizerSpec
from llmjax.run import progress
from llmjax.text.tokenizer import train_tokenizer

ROOT = pathlib.Path(__file__).resolve().parents[2]
SHARED = pathlib.Path(__file__).resolve().parents[2].parent / 'shared' / 'data'
LINES = [f'The {word} of number {i} is written here, in one line of text.' for i in range(300)
         for word in ('value', 'name', 'place', 'colour')]


def spec_for(path, output, **kwargs):
  kwargs.setdefault('tokenizer', TokenizerSpec(vocab_size=400, sample_lines=300))
  return PrepareSpec(source='text_dir', path=str(path), output=str(output), **kwargs)


@pytest.fixture
def texts(tmp_path):
  folder = tmp_path / 'texts'
  folder.mkdir()
  for i in range(30):
    (folder / f'{i:02d}.txt').write_text('\n'.join(LINES[i * 40:i * 40 + 40]) + '\n')
  return folder


def quarantine(folder):
  return [json.loads(line) for line in prepared.quarantine_path(folder).read_text().splitlines()]


def test_text_dir_flag_prints_counts_and_the_next_command(texts, tmp_path, capsys):
  output = tmp_path / 'out'
  options = config.build(PrepareOptions, {'text_dir': str(texts)})
  spec = PrepareSpec(output=str(output), tokenizer=TokenizerSpec(vocab_size=400))
  assert prepare.run(spec, options) == 0
  printed = capsys.readouterr()
  for part in ('train', 'validation', 'test', 'tokens', 'bytes/token', f'folder: {output}',
               'next: llmjax pretrain', str(output)):
    assert part in printed.out
  assert 'documents' in printed.err
  assert prepare.run(spec, options) == 0
  assert 'is prepared already; --force prepares it again' in capsys.readouterr().out
  assert not output.with_name('out.unfinished').exists()


def test_records_that_are_all_refused_fail_with_the_reason(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  pathlib.Path('tokenizer.model').write_bytes(train_tokenizer(LINES, vocab_size=320))
  turns = [{'role': 'developer', 'content': 'Be brief.'}, {'role': 'user', 'content': 'Hi'},
           {'role': 'assistant', 'content': 'Hello.', 'id': 'x'}]
  pathlib.Path('a.jsonl').write_text(json.dumps({'messages': turns, 'source': 'web'}) + '\n')
  command = ['prepare', f'--config={ROOT}/configs/data/chat.py', '--config.path=a.jsonl', '--config.output=out',
             '--config.tokenizer.path=tokenizer.model', '--config.validation_fraction=0',
             '--config.test_fraction=0']
  with pytest.raises(SystemExit) as e:
    main.main(command)
  assert e.value.code == 2 and not prepared.is_prepared('out')
  assert ('every record of train was rejected, so nothing is prepared: 1 x the chat template llmjax does not render '
          'the role developer (message 1); write the role system') in capsys.readouterr().err
  turns[0]['role'] = 'system'
  pathlib.Path('a.jsonl').write_text(json.dumps({'messages': turns, 'source': 'web'}) + '\n')
  with pytest.raises(SystemExit) as e:
    main.main(command)
  assert not e.value.code
  assert 'fields not used (number of records): messages.id (1), source (1)' in capsys.readouterr().out


RECORDS = {
    'chat': {'messages': [{'role': 'user', 'content': 'a?'}, {'role': 'assistant', 'content': 'b'}]},
    'preference': {'prompt': 'a?', 'chosen': 'b', 'rejected': 'c'}, 'prompts': {'prompt': 'a?', 'answer': 'b'},
    'stepwise': {'prompt': 'a?', 'steps': [{'text': 'b', 'label': 1}, {'text': 'c', 'label': 0}]}}


@pytest.mark.parametrize('kind, commands', [
    ('chat', ['finetune --config=configs/finetune/chat.py']),
    ('preference', ['finetune --config=configs/preference/dpo.py', 'reward --config=configs/reward/preference.py']),
    ('prompts', ['rl --config=configs/rl/grpo.py']), ('stepwise', ['reward --config=configs/reward/stepwise.py'])])
def test_the_next_commands_fit_the_records_and_can_be_pasted(kind, commands, tmp_path, monkeypatch, texts):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'configs').symlink_to(ROOT / 'configs')
  records = [json.loads(json.dumps(RECORDS[kind]).replace('a?', f'{i} and {i}?')) for i in range(60)]
  (tmp_path / 'records.jsonl').write_text('\n'.join(map(json.dumps, records)))
  corpus.prepare(spec_for(texts, 'data/text'))
  settings = {'records': kind, 'template': 'llmjax'}
  own, _ = corpus.prepare(spec_for('records.jsonl', 'data/own', tokenizer=TokenizerSpec(vocab_size=300), **settings))
  assert 'RUN/tokenizer.model' in prepare.next_steps(own, 'data/own')[0] or kind == 'chat'
  run = tmp_path / 'runs/base'  # Of which only what a command looks at before JAX is there.
  (run / 'checkpoints/3').mkdir(parents=True)
  (run / 'tokenizer.model').write_bytes((tmp_path / 'data/text/tokenizer.model').read_bytes())
  (run / 'config.json').write_text(json.dumps({
      'model': {'num_layers': 1, 'd_model': 32, 'num_heads': 2, 'mlp_dim': 64, 'vocab_size': 512},
      'data': {'seq_len': 96, 'sources': {'data/text': 1.0}}, 'train': {}}))
  tokenizer = TokenizerSpec(path='runs/base/tokenizer.model')
  manifest, _ = corpus.prepare(spec_for('records.jsonl', 'data/mine', tokenizer=tokenizer, validation_fraction=0.0,
                                        **settings))
  found = prepare.next_steps(manifest, 'data/mine')
  assert [line.split(' --workdir')[0] for line in found] == [f'llmjax {command}' for command in commands]
  for line in found:
    _, command, *arguments = shlex.split(line)
    spec, options = main.parse(main.COMMANDS[command], arguments)
    assert options.workdir == ('runs/mine' if len(found) == 1 else f'runs/mine_{command}')
    assert (spec.train.init_from, list(spec.data.sources)) == ('runs/base', ['data/mine'])
    assert spec.evaluate.splits == () and spec.data.seq_len == 96
  assert kind != 'prompts' or spec.rl.max_new_tokens == 48
  # What another tokenizer made must be prepared again, for the run that is there.
  assert kind == 'chat' or prepare.next_steps(own, 'data/own')[0].endswith(
      '--force --config.tokenizer.path=runs/base/tokenizer.model')


def test_the_next_command_of_text_names_a_workdir_that_is_free(texts, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  manifest, _ = corpus.prepare(spec_for(texts, 'data/mine'))
  command = 'llmjax pretrain --config=configs/pretrain/quickstart.py --workdir=runs/{} --config.data.sources=data/mine'
  assert prepare.next_steps(manifest, 'data/mine') == [command.format('mine')]
  (tmp_path / 'runs/mine').mkdir(parents=True)
  assert prepare.next_steps(manifest, 'data/mine') == [command.format('mine_2')]


@pytest.mark.parametrize('error', [
    OSError(28, 'No space left on device', 'x'), RuntimeError('finalize: No space left on device')])
def test_a_full_disk_is_said_in_a_line(texts, tmp_path, capsys, monkeypatch, error):
  def full(*args):
    raise error

  monkeypatch.setattr(corpus, '_write_documents', full)
  assert prepare.run(spec_for(texts, tmp_path / 'out'), PrepareOptions()) == 1
  assert f'{tmp_path / "out"} cannot be written: No space left on device; the same' in capsys.readouterr().err
  monkeypatch.undo()
  assert prepare.run(spec_for(texts, tmp_path / 'out'), PrepareOptions()) == 0


def test_a_folder_that_cannot_be_made(texts):
  with pytest.raises(config.ConfigError, match='/dev/null/out cannot be written: Not a directory; choose'):
    corpus.prepare(spec_for(texts, '/dev/null/out'))


def test_nothing_is_lost(texts, tmp_path):
  manifest, was_finished = corpus.prepare(spec_for(texts, tmp_path / 'out'))
  assert not was_finished
  found = {name: text for split in manifest['splits']
           for name, text in stream.read_documents(tmp_path / 'out', split)}
  assert found == {f.name: f.read_text() for f in texts.iterdir()}
  tokenizer = stream.load_tokenizer(DataSpec(sources={str(tmp_path / 'out'): 1.0}))
  for split, counts in manifest['splits'].items():
    store = token_store.TokenStore(prepared.tokens_path(tmp_path / 'out', split))
    pairs = list(stream.read_documents(tmp_path / 'out', split))
    assert counts['documents'] == len(store) == len(pairs)
    assert counts['tokens'] == store.num_tokens
    assert counts['bytes'] == sum(len(text.encode()) for _, text in pairs)
    for i, (_, text) in enumerate(pairs):
      ids = store[i]
      assert (ids[0], ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
      assert tokenizer.decode(ids) == text
  assert manifest['tokenizer']['sha256'] == tokenizer.sha256


def test_two_prepares_give_the_same_hashes(texts, tmp_path):
  first, _ = corpus.prepare(spec_for(texts, tmp_path / 'a'))
  second, _ = corpus.prepare(spec_for(texts, tmp_path / 'b'))
  assert {**first, 'name': ''} == {**second, 'name': ''}


def test_bad_records_are_listed_and_the_rest_is_kept(texts, tmp_path):
  (texts / 'bad.txt').write_bytes(b'fine\nbroken \xff\n')
  (texts / 'nul.txt').write_bytes(b'\0\n')
  (texts / 'bom.txt').write_bytes(b'\xef\xbb\xbfwith a mark\n')
  (texts / 'empty.txt').write_bytes(b'')
  (texts / 'long.txt').write_bytes(b'x' * 5000)
  (texts / 'records.jsonl').write_text('{"text": "a record"}\n{"text": 1}\n')
  manifest, _ = corpus.prepare(spec_for(texts, tmp_path / 'out', max_record_bytes=4096))
  assert manifest['quarantine'] == {
      'records': 5, 'byte_order_marks_removed': 1,
      'reasons': {'NUL byte': 1, 'empty': 1, "field 'text' holds int, not text": 1,
                  'invalid UTF-8': 1, 'line longer than max_record_bytes=4096': 1}}
  entries = {e['file']: e for e in quarantine(tmp_path / 'out')}
  assert entries['bad.txt']['offset'] == 12 and entries['bad.txt']['line'] == 2
  assert entries['records.jsonl']['line'] == 2 and entries['long.txt']['bytes'] == 5000
  assert entries['bom.txt']['kept'] and entries['nul.txt']['offset'] == 0
  assert manifest['splits']['train']['documents'] + manifest['splits']['validation'][
      'documents'] + manifest['splits']['test']['documents'] == 33


def test_ids_outside_the_vocabulary_are_quarantined(texts, tmp_path, monkeypatch):
  encode = tokens.tokenizers.Tokenizer.encode

  def broken(self, text):
    return encode(self, text) + (10_000 if text.startswith(LINES[0]) else 0)

  monkeypatch.setattr(tokens.tokenizers.Tokenizer, 'encode', broken)
  manifest, _ = corpus.prepare(spec_for(texts, tmp_path / 'out'))
  assert manifest['quarantine']['reasons'] == {'token id outside the vocabulary': 1}
  (entry,) = quarantine(tmp_path / 'out')
  assert entry['file'] == '00.txt' and 'outside the vocabulary' in entry['reason']
  assert sum(s['documents'] for s in manifest['splits'].values()) == 29


def test_copies_of_held_out_documents_leave_train(texts, tmp_path):
  manifest, _ = corpus.prepare(spec_for(texts, tmp_path / 'a'))
  held_out = {name for split in ('validation', 'test')
              for name, _ in stream.read_documents(tmp_path / 'a', split)}
  for i, name in enumerate(sorted(held_out)):
    text = (texts / name).read_text()
    (texts / f'copy{i}.txt').write_text(text.upper().replace(' ', '\n ') if i % 2 else text)
  manifest, _ = corpus.prepare(spec_for(texts, tmp_path / 'b'))
  splits = {s: {' '.join(t.casefold().split()) for _, t in stream.read_documents(tmp_path / 'b', s)}
            for s in manifest['splits']}
  assert not splits['train'] & (splits['validation'] | splits['test'])
  assert not splits['validation'] & splits['test']
  assert sum(manifest['duplicates'].values()) == len(held_out)
  assert manifest['duplicates']['train_copies_of_held_out'] > 0


@pytest.mark.parametrize('make, message', [
    (lambda f: None, 'there are no files at all'),
    (lambda f: (f / 'a.csv').write_text('a,b'), 'only other files: 1 .csv'),
    (lambda f: (f / 'a.txt').write_text(''), 'every record was rejected: 1 x empty'),
    (lambda f: (f / 'a.jsonl').write_text('{"body": "x"}'), 'found: body')])
def test_an_empty_corpus_says_what_was_looked_for(tmp_path, make, message):
  folder = tmp_path / 'texts'
  folder.mkdir()
  make(folder)
  with pytest.raises(config.ConfigError) as error:
    corpus.prepare(spec_for(folder, tmp_path / 'out'))
  (problem,) = error.value.problems
  assert message in problem and str(folder) in problem and '.jsonl' in problem
  assert [p.name for p in tmp_path.iterdir()] == ['texts']


def test_too_few_documents_to_hold_out(tmp_path):
  (tmp_path / 'a.txt').write_text('one line\n')
  with pytest.raises(config.ConfigError, match='_fraction=0'):
    corpus.prepare(spec_for(tmp_path / 'a.txt', tmp_path / 'out'))


def test_a_killed_prepare_goes_on(texts, tmp_path, monkeypatch):
  spec = spec_for(texts, tmp_path / 'out')
  write_tokens, write_documents = tokens.write_tokens, corpus._write_documents

  def killed(*args):
    write_tokens(*args)
    raise KeyboardInterrupt

  monkeypatch.setattr(tokens, 'write_tokens', killed)
  with pytest.raises(KeyboardInterrupt):
    corpus.prepare(spec)
  assert not (tmp_path / 'out').exists()
  monkeypatch.setattr(tokens, 'write_tokens', write_tokens)
  monkeypatch.setattr(corpus, '_scan', None)  # The documents are there: nothing is read again.
  manifest, _ = corpus.prepare(spec)
  monkeypatch.undo()
  fresh, _ = corpus.prepare(spec_for(texts, tmp_path / 'fresh'))
  assert {**manifest, 'name': ''} == {**fresh, 'name': ''}
  assert write_documents is corpus._write_documents
  left = {p.name for p in (tmp_path / 'out').iterdir()}
  assert left == {'manifest.json', 'documents', 'tokenizer.model', 'tokens', 'quarantine.jsonl'}


def test_other_settings_need_force(texts, tmp_path):
  corpus.prepare(spec_for(texts, tmp_path / 'out'))
  other = spec_for(texts, tmp_path / 'out', tokenizer=TokenizerSpec(vocab_size=350))
  with pytest.raises(config.ConfigError, match='vocab_size 400, now 350.*--force'):
    corpus.prepare(other)
  manifest, _ = corpus.prepare(other, force=True)
  assert manifest['tokenizer']['vocab_size'] <= 350
  (texts / 'new.txt').write_text('something new\n')
  with pytest.raises(config.ConfigError, match='other input files'):
    corpus.prepare(other)


def test_a_folder_of_the_users_is_left_alone(texts, tmp_path):
  (tmp_path / 'out').mkdir()
  (tmp_path / 'out' / 'thesis.txt').write_text('precious')
  with pytest.raises(config.ConfigError, match='choose another --config.output'):
    corpus.prepare(spec_for(texts, tmp_path / 'out'), force=True)
  assert (tmp_path / 'out' / 'thesis.txt').read_text() == 'precious'


def test_two_prepares_at_once_are_refused(texts, tmp_path):
  spec = spec_for(texts, tmp_path / 'out')
  unfinished = tmp_path / 'out.unfinished'
  unfinished.mkdir()
  with corpus._locked(unfinished), pytest.raises(config.ConfigError, match='another'):
    corpus.prepare(spec)


def test_the_same_tokenizer_for_another_corpus(texts, tmp_path):
  first, _ = corpus.prepare(spec_for(texts, tmp_path / 'a'))
  model = TokenizerSpec(path=str(tmp_path / 'a' / 'tokenizer.model'))
  second, _ = corpus.prepare(spec_for(texts, tmp_path / 'b', tokenizer=model))
  assert first['tokenizer']['sha256'] == second['tokenizer']['sha256']
  spec = DataSpec(sources={str(tmp_path / 'a'): 1.0, str(tmp_path / 'b'): 1.0})
  assert not list(config.find_problems(spec))


def test_progress_lines(monkeypatch):
  output = io.StringIO()
  show = progress.Stages(output)
  for i in range(1, 2001):
    show('tokens of train', i, 2000)
  show('tokenizer', 0, None)
  show.finish()
  lines = output.getvalue().splitlines()
  assert lines[0].startswith('tokens of train: 2,000 documents, ')
  assert lines[1] == 'tokenizer ...' and lines[2].startswith('tokenizer, ')


def test_python_docs_of_this_python(tmp_path):
  recipe = recipes.load_recipe(str(pathlib.Path(__file__).resolve().parents[2]
                                  / 'configs' / 'data' / 'python_docs.py'))
  spec = config.build(PrepareSpec, recipe, [('output', str(tmp_path / 'out')),
                                            ('tokenizer.sample_lines', '2000'),
                                            ('tokenizer.vocab_size', '1024')])
  manifest, _ = corpus.prepare(spec)
  total = sum(s['bytes'] for s in manifest['splits'].values())
  assert total > 8e6 and manifest['quarantine']['records'] < 5
  for split in ('validation', 'test'):
    assert 0.03 < manifest['splits'][split]['bytes'] / total < 0.1
  held_out = '\n'.join(t for _, t in stream.read_documents(tmp_path / 'out', 'validation')).encode()
  assert len(lzma.compress(held_out)) < len(gzip.compress(held_out, 9)) < len(held_out) / 3


def test_one_file_gives_three_splits(tmp_path):
  (tmp_path / 'one.txt').write_text('\n\n'.join(LINES))
  (tmp_path / 'one.jsonl').write_text('\n'.join(json.dumps({'text': line}) for line in LINES))
  for name in ('one.txt', 'one.jsonl'):
    manifest, _ = corpus.prepare(spec_for(tmp_path / name, tmp_path / f'out {name}'))
    sizes = {split: counts['bytes'] for split, counts in manifest['splits'].items()}
    for split in ('validation', 'test'):
      assert 0.02 < sizes[split] / sum(sizes.values()) < 0.09


def test_public_texts(tmp_path):
  if not (SHARED / 'tinyshakespeare').is_dir():
    pytest.skip(f'{SHARED} is not here')
  path = SHARED / 'tinyshakespeare'
  manifest, _ = corpus.prepare(spec_for(path, tmp_path / 'out'))
  total = sum(s['bytes'] for s in manifest['splits'].values())
  assert total == (path / 'input.txt').stat().st_size  # One file, cut without losing a byte.
  for split in ('validation', 'test'):
    assert 0.03 < manifest['splits'][split]['bytes'] / total < 0.08


def prepare_command(*arguments):
  """Runs `llmjax prepare` and returns its exit status."""
  with pytest.raises(SystemExit) as e:
    main.main(['prepare', *arguments])
  return e.value.code or 0


SOURCE = """
from llmjax.data.documents import Document

def my_documents(spec):
  for i in range(60):
    yield {'text': f'The value of number {i} is written here, in one line of text.'}
  yield Document('last', 'A document whose split is known.', 'a file', split='test')
  yield {'no_text': 1}

def my_preferences(spec):
  for i in range(30):
    yield {'prompt': f'{spec.name} {i}', 'chosen': f'yes {i}', 'rejected': f'no {i}'}

def wrong(spec):
  return 3

def lines(spec):
  yield 'a text'

def fails(spec):
  yield {'text': 'x'}
  raise KeyError('shard')

NUMBER = 3
"""


def test_a_function_of_the_users_module_is_a_source(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  module = f'source_{tmp_path.name}'
  (tmp_path / f'{module}.py').write_text(SOURCE)
  recipe = f'--config={ROOT}/configs/data/python_docs.py'
  arguments = [recipe, '--config.tokenizer.vocab_size=320', f'--config.source={module}:my_documents']
  assert prepare_command(*arguments) == 0
  manifest = prepared.read_manifest('data/my_documents')
  assert sum(split['documents'] for split in manifest['splits'].values()) == 61
  assert 'A document whose split is known.' in [
      text for _, text in stream.read_documents('data/my_documents', 'test')]
  (entry,) = quarantine('data/my_documents')
  assert 'no_text' in entry['reason'] and entry['line'] == 62
  assert prepare_command(*arguments) == 0  # Nothing to do.
  (tmp_path / f'{module}.py').write_text(SOURCE + '\n')
  capsys.readouterr()
  assert prepare_command(*arguments) == 2 and '--force' in capsys.readouterr().err
  assert prepare_command(recipe, f'--config.source={module}:my_preferences', '--config.records=preference',
                         '--config.name=ask', '--config.output=data/own', '--config.template=plain',
                         '--config.tokenizer.path=data/my_documents/tokenizer.model') == 0
  assert prepared.kind(prepared.read_manifest('data/own')) == 'preference'
  assert next(iter(stream.read_documents('data/own', 'train')))[1].count('ask') == 1
  assert f'--config.source={module}:my_preferences --config.name=ask' in prepare.next_steps(
      prepared.read_manifest('data/own'), 'data/own')[0]


@pytest.mark.parametrize('source, words', [
    ('absent_{m}:f', ['no module', 'install']), ('{m}:absent', ['has no absent', '{m}.py']),
    ('{m}:NUMBER', ['not callable', 'int']), ('{m}:wrong', ['returned int', 'yield records']),
    ('{m}:lines', ['item 1 is of type str', 'yield records']), ('{m}:fails', ['KeyError', 'shard', '{m}.py, line']),
    ('text_dirs', ['python_docs, text_dir, tfds, or module:name', 'did you mean text_dir?'])])
def test_a_wrong_source_is_one_line(tmp_path, monkeypatch, capsys, source, words):
  monkeypatch.chdir(tmp_path)
  module = f'wrong_{"".join(c for c in tmp_path.name if c.isalnum())}'
  (tmp_path / f'{module}.py').write_text(SOURCE)
  assert prepare_command(f'--config={ROOT}/configs/data/python_docs.py',
                         f'--config.source={source.format(m=module)}', '--config.output=out') == 2
  line = capsys.readouterr().err.strip().splitlines()[-1]
  assert 'source=' in line and all(word.format(m=module) in line for word in words), line
  assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('old, new', [('pairs', 'preference'), ('steps', 'stepwise')])
def test_an_old_kind_of_record_is_an_error_that_names_the_new_one(tmp_path, capsys, old, new):
  assert prepare_command(f'--config={ROOT}/configs/data/chat.py', f'--config.records={old}',
                         f'--config.output={tmp_path}/out') == 2
  error = capsys.readouterr().err
  assert f"records='{old}'" in error and f'write {new}' in error


def test_a_folder_of_the_earlier_format_must_be_prepared_again(texts, tmp_path, capsys):
  output = tmp_path / 'out'
  corpus.prepare(spec_for(texts, output))
  manifest = json.loads(prepared.manifest_path(output).read_text())
  prepared.manifest_path(output).write_text(json.dumps({**manifest, 'format': 1}))
  with pytest.raises(config.ConfigError, match=r'format 1, .*; prepare the folder again with --force'):
    corpus.prepare(spec_for(texts, output))
  corpus.prepare(spec_for(texts, output), force=True)
  assert prepared.read_manifest(output)['format'] == prepared.FORMAT
