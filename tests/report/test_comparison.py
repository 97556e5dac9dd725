"""The page on several runs shows what their files hold, each run in its own column."""

import html.parser
import json
import re

import pytest

from llmjax import main
from llmjax.report import reading, report

MODEL = {'num_layers': 2, 'd_model': 64, 'num_heads': 2, 'mlp_dim': 128, 'vocab_size': 512}
EVIL = '<script>alert(1)</script>&'


def write(folder, name, value):
  folder.mkdir(parents=True, exist_ok=True)
  rows = isinstance(value, list)
  (folder / name).write_text('\n'.join(map(json.dumps, value)) + '\n' if rows else json.dumps(value))


def rows(**metrics):
  """Returns the lines of a metrics.jsonl: a list of values for each metric, a step for each value."""
  count = max(map(len, metrics.values()))
  return [{'step': s + 1, **{k.replace('__', '/'): v[s] for k, v in metrics.items() if s < len(v)}}
          for s in range(count)]


def of(data, step=3, limit=0, sequences=100, **measures):
  """Returns the record of an evaluation on all of some data at the last step."""
  return {**measures, **({} if 'prompts' in measures else {'sequences': sequences}), 'step': step, 'limit': limit,
          'split': 'validation', 'data_fingerprint': data, 'tokenizer_sha256': 'one'}


def answers(*texts, chat=True):
  asked = [('2 and 3?', '2 + 3 = 5\n#### 5'), ('What does f do?', 'Return it.')]
  return [{'prompt': p, 'right': r, 'text': t, 'stopped': 'end', 'temperature': 0.0, 'chat': chat}
          for (p, r), t in zip(asked, texts, strict=True)]


@pytest.fixture
def life(tmp_path):
  """Four runs: a base, a fine-tuned one, a reward model and RL, in a folder called life."""
  life = tmp_path / 'life'

  def run(name, groups, metrics, evaluation=None, said=None, source=None):
    write(life / name, 'config.json', {
        'model': MODEL, 'data': {'sources': {'data/docs': 1.0}},
        'train': {'steps': 3, 'batch_size': 8, 'init_from': source or ''}, **groups})
    write(life / name, 'metrics.jsonl', metrics)
    write(life / name, 'time.jsonl', [{'seconds': {'step': 61.0, 'init': 1.0}}])
    write(life / name, 'environment.json', {'device_kind': 'cpu'})
    if evaluation:
      write(life / name, 'evaluation.json', evaluation)
    if said:
      write(life / name, 'answers.jsonl', said)

  text = lambda bits: of('docs', loss=3.0, bits_per_byte=bits, xz_bits_per_byte=1.9)
  chats = lambda loss, bits: of('chats', loss=loss, bits_per_byte=bits)
  right = lambda reward: {**of('sums', reward=reward, ended=0.5, prompts=80, tokens=9.0), 'reward/math': reward}
  run('base', {}, rows(train__loss=[5.0, 4.0, 3.5], train__target_tokens=[1000, 1000, 1000]),
      {'validation:docs': text(2.0), 'validation:chats': chats(4.5, 3.0),
       'validation:sums': right(0.0)}, answers('of 2 and 3', EVIL, chat=False))
  run('sft', {'preference': {}}, rows(train__loss=[4.0, 2.0, 1.5], train__target_tokens=[500, 500, 500]),
      {'validation:docs': text(2.25), 'validation:chats': chats(1.25, 1.0),
       'validation:sums': right(0.25)}, answers('2 + 3 = 6\n#### 6', 'return  it.'), str(life / 'base'))
  run('judge', {'preference': {}, 'reward': {}}, rows(train__loss=[0.7, 0.6, 0.5], eval__validation__accuracy=[
      0.5, 0.6, 0.875]), source=str(life / 'sft' / 'checkpoints' / '3'))
  run('tuned', {'rl': {}, 'policy': {'name': 'grpo'}},
      rows(rollout__reward=[0.25, 0.5, 0.75], rollout__kl=[0.0, 0.5, 1.5]),
      {'validation:docs': text(2.25), 'validation:sums': right(0.75)},
      answers('I say\n#### 5', 'Nothing.'), 'elsewhere/sft')  # Where sft was before it was moved.
  return life


class Table(html.parser.HTMLParser):
  """The tables of a page: {first cell of a row: its other cells}; `classes`: of every tag; `tags`."""

  def __init__(self, text):
    super().__init__()
    self.rows, self.cells, self.classes, self.tags, self.text = {}, None, [], [], ''
    self.feed(text)

  def handle_starttag(self, tag, attributes):
    self.tags.append(tag)
    self.classes += [v for k, v in attributes if k == 'class']
    if tag == 'tr':
      self.cells = []
    elif tag in ('td', 'th') and self.cells is not None:
      self.cells.append('')
    elif tag in ('span', 'em') and self.cells:
      self.cells[-1] += '|'

  def handle_endtag(self, tag):
    if tag == 'tr' and self.cells:
      self.rows[self.cells[0].split('|')[0].strip()] = [c.strip() for c in self.cells[1:]]
      self.cells = None

  def handle_data(self, data):
    self.text += data
    if self.cells:
      self.cells[-1] += data


def read(life, *names):
  """Returns (HTML, its tables, {title of a chart: {label: values}})."""
  page = report.write_comparison([life / n for n in names], life / 'report.html').read_text()
  charts = json.loads(re.search(r'id="charts">(.*?)</script>', page, re.S)[1])
  return page, Table(page), {c['title']: {s['label']: s['y'] for s in c['series']} for c in charts}


def test_each_stage_shows_its_metrics_and_their_change(life):
  _, page, _ = read(life, 'base', 'sft', 'judge', 'tuned')
  assert page.rows['Initialized from'] == ['–', 'base', 'sft', 'sft']
  assert page.rows['Steps'] == ['3', '3', '3', '3']
  assert page.rows['Wall time'] == ['1 min 2 s'] * 4
  assert page.rows['Training samples'] == ['24'] * 4
  assert page.rows['Training tokens'] == ['3,000', '1,500', '–', '–']
  assert page.rows['docs'] == ['2.000', '2.250|+0.250', '–', '2.250|±0']
  assert page.rows['chats'] == ['4.500', '1.250|−3.250', '–', '–']
  assert page.rows['Accuracy, sums'] == ['0.0%', '25.0%|+25.0%', '–', '75.0%|+50.0%']
  assert page.rows['Preference accuracy, docs'] == ['–', '–', '87.5%', '–']
  assert page.rows['Reward of sampled completions, first tenth'][3] == '0.250'
  assert page.rows['Reward of sampled completions, last tenth'][3] == '0.750'
  assert page.rows['KL from the initial policy'][3] == '1.50'
  # More bits are worse; fewer nats and more accuracy are better.
  assert [c for c in page.classes if c in ('up', 'down', 'same')][:5] == ['down', 'same', 'up', 'up', 'up']
  for shown in ('4 runs · 4 min 8 s in total · cpu', 'rl, GRPO', 'reward model',
                '75.0%accuracy, sumsstep 3, all 80 prompts',
                '2.000bits per byte, docsstep 3, all 100 sequences',
                'reward of greedy completions of held-out prompts, step 3, all 80 prompts',
                '87.5%preference accuracy, docsstep 3, number of sequences not recorded'):
    assert shown in page.text, shown


@pytest.fixture
def sweep(tmp_path):
  """A function that writes two runs that began from nothing: {name: (evaluation.json, last one in training)}."""
  def make(runs, rewards=None):
    for i, (name, (evaluation, trained)) in enumerate(runs.items()):
      folder = tmp_path / 'sweep' / name
      write(folder, 'config.json', {
          'model': MODEL, 'data': {'sources': {'data/docs': 1.0}, 'seq_len': 64},
          'optimizer': {'lr': 0.1 * (i + 1)}, 'train': {'steps': 400, 'batch_size': 8}})
      trained = {f'eval/validation/{k}': v for k, v in (trained or {}).items() if k != 'step'}
      write(folder, 'metrics.jsonl', [{'step': 400, 'train/loss': 2.0}, {'step': 400, **trained}])
      write(folder, 'evaluation.json', evaluation or {})
      write(folder, 'data.json', {'data/docs': {'records': 'text'}})
    return tmp_path / 'sweep'

  return make


def test_an_evaluation_of_the_whole_split_is_not_compared_to_one_of_a_sample(sweep):
  whole = of('docs', 400, sequences=355, loss=2.1, bits_per_byte=2.073)
  sample = of('docs', 400, 64, 64, loss=2.0, bits_per_byte=2.054)
  folder = sweep({'a': ({'validation': whole}, None), 'b': (None, sample)})
  text, page, _ = read(folder, 'a', 'b')
  assert page.rows['docs'] == ['2.073|step 400, all 355 sequences', '2.054|step 400, a sample of 64 sequences']
  assert page.classes.count('up') == page.classes.count('down') == 1  # The legend's.
  flags = '--sources=data/docs --splits=validation --seq-len=64'
  commands = re.search('<pre>(llmjax evaluate.*?)</pre>', text, re.S)[1].splitlines()
  assert commands == [f'llmjax evaluate --workdir={folder}/a {flags}', f'llmjax evaluate --workdir={folder}/b {flags}',
                      f'llmjax report --workdir={folder}/a --compare={folder}/b']
  # If all runs measured the same sequences, those are compared: here the sign is different.
  folder = sweep({'a': ({'validation': whole}, {**sample, 'bits_per_byte': 2.05}), 'b': (None, sample)})
  _, page, _ = read(folder, 'a', 'b')
  assert page.rows['docs'] == ['2.050', '2.054|+0.004'] and 'is not compared' not in page.text
  assert 'docs is compared on a sample. These commands compare it on the whole split' in page.text
  assert page.classes.count('down') == 1  # A difference on a sample is uncolored; the other one is the legend's.
  worse = {**whole, 'bits_per_byte': 2.086}
  folder = sweep({'a': ({'validation': whole}, sample), 'b': ({'validation': worse}, sample)})
  _, page, _ = read(folder, 'a', 'b')
  assert page.rows['docs'] == ['2.073', '2.086|+0.013'] and page.classes.count('down') == 2


@pytest.mark.parametrize('other', [
    {'split': 'test'}, {'data_fingerprint': 'others'}, {'tokenizer_sha256': 'two'}, {'sequences': 354}, {'step': 200},
    {'data_fingerprint': None}])
def test_only_evaluations_of_the_same_sequences_are_compared(sweep, other):
  first = of('docs', 400, loss=2.0, bits_per_byte=2.0)
  second = {k: v for k, v in {**first, 'bits_per_byte': 1.5, **other}.items() if v is not None}
  folder = sweep({'a': ({'validation:docs': first}, None), 'b': ({'validation:docs': second}, None)})
  _, page, _ = read(folder, 'a', 'b')
  assert page.classes.count('up') == 1 and 'docs is not compared: ' in page.text
  if 'step' in other:
    assert 'b: step 200 of 400, all 100 sequences' in page.text


def test_an_accuracy_is_better_only_beyond_two_standard_errors(sweep):
  right = lambda reward, n: {**of('sums', 400, prompts=n, reward=reward), 'reward/math': reward}
  for n, classes in ((50, 1), (5000, 2)):  # sqrt(0.24 / n + 0.25 / n) is 0.099 and 0.0099.
    folder = sweep({'a': ({'validation:sums': right(0.4, n)}, None), 'b': ({'validation:sums': right(0.5, n)}, None)})
    _, page, _ = read(folder, 'a', 'b')
    assert page.rows['Accuracy, sums'] == ['40.0%', '50.0%|+10.0%'] and page.classes.count('up') == classes


def test_other_rewards_are_not_percentages(sweep):
  score = lambda reward: {**of('sums', 400, prompts=9, reward=reward), 'reward/model': reward}
  folder = sweep({'a': ({'validation:sums': score(-1.5)}, None), 'b': ({'validation:sums': score(2.5)}, None)})
  assert read(folder, 'a', 'b')[1].rows['Reward, sums'] == ['-1.500', '2.500|+4.000']


def test_runs_side_by_side_are_not_stages(sweep, life):
  folder = sweep({name: ({}, None) for name in 'abc'})
  _, page, _ = read(folder, 'a', 'b', 'c')
  assert 'Comparison' in page.text and 'Training stages' not in page.text
  assert 'Initialized from' not in page.rows and page.rows['optimizer.lr'] == ['0.1', '0.2', '0.30000000000000004']
  assert 'the difference from a' in page.text
  _, page, _ = read(life, 'base', 'sft')
  assert 'Training stages' in page.text and 'train.init_from' not in page.rows


def test_curves_of_one_metric_are_one_chart(life):
  _, _, charts = read(life, 'base', 'sft', 'judge', 'tuned')
  assert charts['Loss'] == {'base': [5.0, 4.0, 3.5], 'sft': [4.0, 2.0, 1.5], 'judge': [0.7, 0.6, 0.5]}
  assert charts['Reward'] == {'tuned': [0.25, 0.5, 0.75]}
  assert charts['Preference accuracy, docs'] == {'judge': [0.5, 0.6, 0.875]}


def test_completions_of_the_same_prompt_are_side_by_side(life):
  text, page, _ = read(life, 'base', 'sft', 'judge', 'tuned')
  assert page.rows['prompt'] == [  # The reward model has none.
      'base|greedy, as plain text', 'sft|greedy, as a chat', 'tuned|greedy, as a chat']
  assert page.rows['2 and 3?'] == ['of 2 and 3', '2 + 3 = 6\n#### 6', 'I say\n#### 5']
  assert page.rows['What does f do?'] == [EVIL, 'return  it.', 'Nothing.']
  assert [c for c in page.classes if c in ('ok', 'no')] == ['no', 'no', 'ok', 'no', 'ok', 'no']
  assert EVIL not in text and page.tags.count('script') == 2  # The page's own.


def test_missing_and_damaged_files_are_listed(life):
  (life / 'sft' / 'answers.jsonl').write_text('{"prompt": \n{}\n')
  (life / 'sft' / 'evaluation.json').write_text('[]')
  write(life / 'new', 'config.json', {})
  _, page, _ = read(life, 'base', 'sft', 'new')
  assert page.rows['docs'] == ['2.000', '–', '–']
  assert 'evaluation.json (contains a list instead of a dict)' in page.text
  assert 'answers.jsonl (cannot be read' in page.text
  assert 'new: Missing files: metrics.jsonl (the curves)' in ' '.join(page.text.split())


def test_equal_folder_names_are_shown_as_paths(life, tmp_path):
  write(tmp_path / 'other' / 'base', 'config.json', {'train': {}})
  found = reading.read_runs([life / 'base', tmp_path / 'other' / 'base'])
  assert [s.name for s in found] == [str(life / 'base'), str(tmp_path / 'other' / 'base')]


@pytest.mark.parametrize('flags, line', [
    ('--workdir=base --compare=nowhere', '--compare=nowhere is not a run\'s folder (no config.json)'),
    ('--workdir=base --compare=sft,base/', '--compare: base, base/ is listed twice'),
    ('--workdir=base --output=a.html', '--output requires --compare=RUN,RUN'),
    ('--workdir=base --compare=sft --output=pages', '--output=pages must be an HTML file; write pages/report.html'),
    ('--workdir=base --compare=sft --output=base/config.json/a.html', 'cannot be written: '),
])
def test_wrong_input_is_one_line(life, flags, line, monkeypatch, capsys):
  monkeypatch.chdir(life)
  with pytest.raises(SystemExit) as stopped:
    main.main(['report', *flags.split()])
  error = capsys.readouterr().err
  assert stopped.value.code == 2 and error.count('\n') == 1 and line in error, error


def test_the_command_writes_the_page(life, monkeypatch, capsys):
  monkeypatch.chdir(life)
  with pytest.raises(SystemExit) as stopped:
    main.main(['report', '--workdir=base', '--compare=sft,tuned'])
  assert not stopped.value.code and capsys.readouterr().out == 'report  base/compare.html\n'
  assert '75.0%' in (life / 'base/compare.html').read_text()
