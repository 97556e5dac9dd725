"""The report shows what a run's files hold, escapes all of it, and is self-contained."""

import html
import html.parser
import json
import math
import pathlib
import re

import pytest

from llmjax.commands import report as report_loop
from llmjax.config import ConfigError
from llmjax.evaluate import margins
from llmjax.evaluate.spec import ReportOptions
from llmjax.report import details, formatting, reading, report

EVIL = '<script>alert("x")</script>&amp;</script><!--'


def _write(folder, name, value):
  folder.mkdir(parents=True, exist_ok=True)
  rows = isinstance(value, list)
  text = '\n'.join(map(json.dumps, value)) + '\n' if rows else json.dumps(value)
  (folder / name).write_text(text)


def _charts(text):
  """Returns {title: chart}."""
  return {chart['title']: chart for chart in json.loads(re.search(r'id="charts">(.*?)</script>', text, re.S)[1])}


class _Reader(html.parser.HTMLParser):
  """Collects the text, the tags, and what each open tag of interest holds; checks the nesting."""

  VOID = {'meta', 'link', 'br', 'img'}

  def __init__(self, text):
    super().__init__()
    self.open, self.tags, self.attributes, self.text = [], [], [], []
    self.feed(text)
    assert not self.open, f'left open: {self.open}'
    self.text = ' '.join(' '.join(self.text).split())

  def handle_starttag(self, tag, attributes):
    self.tags.append(tag)
    self.attributes += [(tag, *a) for a in attributes]
    if tag not in self.VOID:
      self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    if not self.open or self.open[-1] not in ('script', 'style'):
      self.text.append(data)


@pytest.fixture
def run_folder(tmp_path):
  """A small finished run with every file."""
  folder = tmp_path / 'small'
  _write(folder, 'config.json', {
      'model': {'num_layers': 2, 'd_model': 64, 'num_heads': 2, 'mlp_dim': 128, 'vocab_size': 512},
      'data': {'sources': {'data/docs': 1.0}, 'seq_len': 128},
      'train': {'steps': 40, 'batch_size': 8}, 'optimizer': {'lr': 0.003}})
  rows = [{'step': s, 'time': 1e9 + s, 'train/loss': 7.0 - s / 10, 'train/lr': 1e-3 * s,
           'train/grad_norm': 1.0 + s, 'train/tokens_per_second': 1000.0 + s, 'train/mfu': 0.25,
           'train/step_seconds': 0.5} for s in range(1, 41)]
  rows += [{'step': s, 'time': 1e9 + s, 'eval/validation/loss': 4.0 + 1 / s,
            'eval/validation/bits_per_byte': 2.0 + 1 / s} for s in (20, 40)]
  _write(folder, 'metrics.jsonl', sorted(rows, key=lambda r: r['step']))
  _write(folder, 'samples.jsonl', [
      {'step': 20, 'prompt': 'def ', 'text': 'early words'},
      {'step': 40, 'prompt': 'def ', 'text': 'def late words'}])
  _write(folder, 'evaluation.json', {'validation': {
      'loss': 2.9912, 'perplexity': 19.91, 'bits_per_byte': 1.632, 'tokens': 412331,
      'bytes': 1091234, 'gzip_bits_per_byte': 2.291, 'xz_bits_per_byte': 1.972, 'step': 40},
      'validation:sums': {'reward': 0.625, 'ended': 0.875, 'prompts': 320, 'tokens': 12.25, 'step': 40}})
  _write(folder, 'time.jsonl', [{'time': 1e9, 'step': s, 'seconds': {
      'init': 3.0, 'compile': 7.0, 'step': 2.0 * s, 'other': 10.0, 'eval': 0.0}} for s in (20, 40)])
  row = {'kind': 'TPU v5p', 'chips': 64, 'seconds': 7200.0, 'chip_hours': 128.0, 'kwh': 52.5, 'kg_co2': None,
         'money': 537.6, 'watts_per_chip': 376.0, 'watts_source': 'cost.chip_watts', 'pue': 1.09, 'currency': 'USD',
         'grid_grams_per_kwh': 0.0, 'price_per_chip_hour': 4.2}
  _write(folder, 'energy.json', {'attempts': [row, row], 'total': {
      'seconds': 14400.0, 'chip_hours': 256.0, 'kwh': 105.0, 'kg_co2': None, 'money': 1075.2,
      'unknown': {'kg_co2': {'seconds': 14400.0, 'field': 'cost.grid_grams_per_kwh'}}}})
  _write(folder, 'environment.json', {
      'device_kind': 'cpu', 'device_count': 1, 'git': 'abc1234',
      'command': 'llmjax pretrain --workdir=small', 'versions': {'jax': '0.12.0'}})
  _write(folder, 'data.json', {'data/docs': {
      'documents': 1834, 'tokens': 8412331, 'bytes': 22091234,
      'quarantined': {'empty': 12, 'invalid_utf8': 3}}})
  _write(folder / 'profile', 'top_operations.json', {'steps': [10, 13], 'operations': [
      {'name': 'dot.7', 'origin': 'jit(step)/dot_general', 'total_ms': 12.5, 'percent': 62.5,
       'count': 3}]})
  return folder


def test_the_page_shows_the_numbers_of_the_files(run_folder):
  page = _Reader(report.write_report(run_folder).read_text())
  for shown in (
      '1.632', '17% fewer than xz -9, 29% fewer than gzip -9',  # 1.632 / 1.972, 1.632 / 2.291
      '41 k', '1,024 per step',  # 40 steps x 8 rows x 128 tokens.
      '1,020', '25 %', '1 min 40 s', '3.000',  # Median speed; MFU; sum of time.jsonl's last line; last loss.
      '80.0 %', 'Goodput 80.0 %', '19.910', '2.9912', '412,331', '1,834', '15 (12 empty, 3 invalid utf8)', '2.63',
      'dot.7', '62.5 %', 'jit(step)/dot_general', 'abc1234', '0.12.0', 'optimizer', '0.003',
      'llmjax pretrain --workdir=small', '1 × cpu',
      '256 chip-hours', '105 kWh 376 W per chip (cost.chip_watts), PUE 1.09', '1,075 USD',
      'validation:sums 40 320 0.625 87.5% 12.2', '2 attempts, 4 h 0 min in total',
      'Carbon unknown set cost.grid_grams_per_kwh'):
    assert shown in page.text, shown
  assert 'Missing files' not in page.text


def test_parameters_are_those_of_the_model_in_the_config(run_folder):
  # Embedding and head 2 * 512 * 64; a block: 4 * 64^2 attention, 3 * 64 * 128 MLP, 2 * 64 norms.
  total = 2 * 512 * 64 + 2 * (4 * 64 * 64 + 3 * 64 * 128 + 2 * 64) + 64
  assert formatting.count(total) in _Reader(report.write_report(run_folder).read_text()).text


def test_curves_are_the_metrics(run_folder):
  charts = _charts(report.write_report(run_folder).read_text())
  logged, evaluated = charts['Loss, nats per token']['series']
  assert logged['x'] == list(range(1, 41))
  assert logged['y'] == pytest.approx([7.0 - s / 10 for s in range(1, 41)])
  assert (evaluated['x'], evaluated['y']) == ([20, 40], pytest.approx([4.05, 4.025]))
  levels = {s['label']: s['y'] for s in charts['Held-out bits per byte']['series'] if s['kind'] == 'rule'}
  assert levels == {'xz -9, all of validation': [1.972], 'gzip -9, all of validation': [2.291]}
  assert charts['Loss, nats per token']['switches'] == ['ylog', 'xlog'] and charts['Gradient norm']['ylog']
  assert charts['Learning rate']['series'][0]['y'][:2] == pytest.approx([1e-3, 2e-3])


def test_later_samples_come_first_and_prompts_are_marked(run_folder):
  text = report.write_report(run_folder).read_text()
  assert text.index('late words') < text.index('early words')
  assert '<mark>def </mark>late words' in text  # A text that repeats its prompt shows it once.
  assert text.count('<details open>') == 1


def test_the_page_is_self_contained(run_folder):
  text = report.write_report(run_folder).read_text()
  page = _Reader(text)
  assert not [a for a in page.attributes if a[1] in ('src', 'href')]
  assert not {'link', 'img', 'iframe'} & set(page.tags)
  assert '://' not in text and 'url(' not in text.replace('url(#', '') and '@import' not in text
  assert "default-src 'none'" in text


def test_everything_is_escaped(tmp_path):
  folder = tmp_path / 'a<b>&'
  _write(folder, 'config.json', {
      'model': {EVIL: EVIL, 'preset': EVIL}, 'data': {'sources': {EVIL: 1}}, EVIL: {EVIL: [EVIL]},
      'x': EVIL})
  _write(folder, 'metrics.jsonl', [{'step': 1, 'train/loss': 1.0, f'eval/{EVIL[:8]}/loss': 2.0,
                                    f'eval/{EVIL[:8]}/bits_per_byte': 2.0}])
  _write(folder, 'samples.jsonl', [{'step': 1, 'prompt': EVIL, 'text': EVIL}])
  _write(folder, 'evaluation.json', {EVIL: {'bits_per_byte': 1.0}})
  _write(folder, 'environment.json', {'device_kind': EVIL, 'command': EVIL, 'v': {EVIL: EVIL}})
  _write(folder, 'data.json', {EVIL: {'documents': 1, 'quarantined': {EVIL: 2}}})
  _write(folder, 'time.jsonl', [{'seconds': {EVIL: 2.0}}])
  _write(folder, 'events.jsonl', [{'step': 1, 'kind': kind, 'time': EVIL, 'details': {
      k: EVIL for k in ('reason', 'dump', 'policy', 'to', 'lost_seconds', 'devices', 'host_seconds', EVIL)}}
      for kind in (*details.EVENT_NAMES, EVIL)] + [{'step': 1, 'kind': 'bad_step', 'details': [EVIL]}])
  _write(folder / 'profile', 'top_operations.json', {'steps': [EVIL, EVIL], 'operations': [
      {'name': EVIL, 'origin': EVIL, 'count': EVIL}]})
  page = _Reader(report.write_report(folder).read_text())
  assert page.tags.count('script') == 2 and EVIL in page.text
  assert _charts((folder / 'report.html').read_text())['Loss, nats per token']['series'][1]['label'] == EVIL[:8]


def test_events_are_described(run_folder):
  event = lambda time, step, kind, **details: {'time': 1e9 + time, 'step': step, 'kind': kind, 'details': details}
  _write(run_folder, 'events.jsonl', [event(0, 0, 'start', lost_seconds=0.0), event(9, 40, 'done')])
  assert 'Events' not in _Reader(report.write_report(run_folder).read_text()).text
  _write(run_folder, 'events.jsonl', [
      event(0, 0, 'start', lost_seconds=0.0),
      event(5, 7, 'bad_step', reason='the loss is not finite', policy='rollback', dump='bad_steps/7.json'),
      event(6, 7, 'rollback', to=4, skipped_batches=3, lost_steps=3, lost_seconds=1.5),
      event(7, 9, 'straggler', step_seconds=0.5, host_seconds={'2': 0.25}),
      event(65, 20, 'corruption', devices=[5], sure=True, arrays=['final_norm/scale'], processes=[0])])
  text = _Reader(report.write_report(run_folder).read_text()).text
  for shown in ('+ 5 s bad step the loss is not finite; rolled back; batch in bad_steps/7.json',
                'to step 4, 3 batches skipped; 3 steps (1.5 s) repeated',
                'host time of process 2: 0.25 s, for steps of 0.5 s', '+ 1 min 5 s corruption device 5 differs',
                'Devices held different copies of the same parameters'):
    assert shown in text, shown


def test_a_non_finite_loss_is_reported_and_drawn_as_a_gap(run_folder):
  with open(run_folder / 'metrics.jsonl', 'a') as f:
    f.write('{"step": 41, "train/loss": "NaN"}\n{"step": 42, "train/loss": "Infinity"}\n')
  text = report.write_report(run_folder).read_text()
  assert 'not finite at 2 logged steps, first at step 41' in _Reader(text).text
  chart = _charts(text)['Loss, nats per token']
  assert chart['bad'] == [41, 42] and chart['series'][0]['y'][-2:] == [None, None]


def test_the_page_of_an_empty_folder_lists_the_missing_files(tmp_path):
  page = _Reader(report.write_report(tmp_path).read_text())
  for name in reading.FILES:
    assert name in page.text
  assert 'Not measured yet' in page.text


@pytest.mark.parametrize('name', sorted(reading.FILES))
def test_any_file_may_be_absent_damaged_or_of_another_form(run_folder, name):
  for content in (None, '{"a": ', '[1, 2]', '{"x": null}', '{"model": 3, "validation": []}',
                  '{"step": 1, "train/loss": "a", "train/lr": [], "text": 1, "data": {}}',
                  '{"train": {"steps": "x", "batch_size": []}, "data": {"sources": 3},'
                  ' "model": {"vocab_size": "z"}, "device_kind": 7, "command": {}, "step": -1}'):
    if content is None:
      (run_folder / name).unlink()
    else:
      (run_folder / name).write_text(content + '\n{}\n' if name.endswith('l') else content)
    _Reader(report.write_report(run_folder).read_text())


def test_a_hundred_thousand_lines_stay_small_and_keep_the_spike(tmp_path):
  rows = [{'step': s, 'train/loss': 3 + math.exp(-s / 9000), 'train/grad_norm': 1 + s % 7 / 10}
          for s in range(1, 100_001)]
  rows[70_000]['train/loss'] = 55.5
  _write(tmp_path, 'metrics.jsonl', rows)
  _write(tmp_path, 'samples.jsonl', [
      {'step': s, 'prompt': 'a', 'text': 'word ' * 2000} for s in range(100)])
  path = report.write_report(tmp_path)
  assert path.stat().st_size < 1_000_000
  logged = _charts(path.read_text())['Loss, nats per token']['series'][0]
  assert logged['y'][logged['x'].index(70_001)] == 55.5
  assert (logged['x'][0], logged['x'][-1]) == (1, 100_000)
  text = _Reader(path.read_text()).text
  assert f'{details.SAMPLE_STEPS} of the 100 steps' in text
  assert 'step 99' in text and 'step 0' in text


def test_the_command_writes_the_page_or_reports_an_error(run_folder, capsys):
  report_loop.run(None, ReportOptions(workdir=str(run_folder)))
  assert str(run_folder / 'report.html') in capsys.readouterr().out
  with pytest.raises(ConfigError, match='there is no such folder'):
    report_loop.run(None, ReportOptions(workdir=str(run_folder / 'absent')))


@pytest.mark.parametrize('value, text', [
    (None, '–'), (0, '0'), (512, '512'), (1024, '1,024'), (9999, '9,999'), (40_960, '41 k'),
    (999_960, '1 M'), (58_470_000, '58.5 M'), (7e9, '7 B'), (1.5e13, '15 T'), (8.25, '8.25')])
def test_counts(value, text):
  assert formatting.count(value) == text


@pytest.mark.parametrize('seconds, text', [
    (None, '–'), (0.25, '0.25 s'), (100, '1 min 40 s'), (3700, '1 h 1 min'), (90_000, '1 d 1 h')])
def test_durations(seconds, text):
  assert formatting.duration(seconds) == text


def test_without_evaluation_json_the_last_evaluation_during_training_is_shown(run_folder):
  (run_folder / 'evaluation.json').unlink()
  text = _Reader(report.write_report(run_folder).read_text()).text
  assert '2.025 validation' in text  # 2 + 1 / 40.
  assert 'validation, during training 40 4.0250 – 2.0250' in text
  assert 'evaluation.json' in text


def test_rollouts_show_the_best_and_worst_completions(run_folder):
  rows = [{'prompt': '2+3=', 'text': f'try {i}', 'answer': '5', 'reward': i / 10} for i in range(9)]
  for iteration in range(40):
    _write(run_folder / 'rollouts', f'{iteration}.jsonl', [
        {'iteration': iteration, 'metrics': {'reward': 0.4, 'kl': 0.25, 'tokens': 3.0, 'ended': 1.0}}, *rows])
  (run_folder / 'rollouts/40.jsonl').write_text('{"damaged\n')
  text = _Reader(report.write_report(run_folder).read_text()).text
  assert 'mean reward 0.4, KL 0.25 nats, 3.0 tokens each, 100% finished' in text
  assert text.count('iteration ') == reading.ITERATIONS - 1  # The damaged one is left out.
  assert 'reward 0.8 · gold answer: 5' in text and '2+3= try 8' in text and '2+3= try 0' in text
  assert 'try 4' not in text


def test_the_calibration_of_a_reward_model_is_drawn(run_folder):
  _write(run_folder, 'reward.json', {
      'validation': margins.describe_margins([2.0, -1.0, 0.5, 3.0]), 'damaged': {'pairs': 3}})
  text = report.write_report(run_folder).read_text()
  charts = _charts(text)
  (title,) = [title for title in charts if title.startswith('validation: calibration, expected error')]
  assert 'over 4 pairs' in title and len(charts[title]['series'][0]['x']) == 4
  assert sum(charts['validation: pairs by score margin']['series'][0]['y']) == 4
  figures = re.findall(r'data-chart="(\d+)"', text)
  assert sorted(map(int, figures)) == list(range(len(charts)))  # Each chart has its figure.


def test_the_templates_are_part_of_the_package():
  setup = (pathlib.Path(report.__file__).parents[2] / 'setup.py').read_text()
  assert "package_data={'llmjax.report': ['templates/*']}" in setup
  files = {path.name for path in (pathlib.Path(report.__file__).parent / 'templates').iterdir() if path.is_file()}
  assert {'base.html', 'report.html', 'plan.html', 'style.css', 'charts.js'} <= files


def test_a_single_run_shows_its_completions(run_folder):
  _write(run_folder, 'answers.jsonl', [{'prompt': '1+1?', 'text': 'It is 2', 'right': '#### 2', 'temperature': 0.0}])
  text = _Reader(report.write_report(run_folder).read_text()).text
  assert 'Completions' in text and '1+1? gold answer: #### 2 It is 2' in text


def test_secrets_are_masked_except_in_the_output_of_models(run_folder, monkeypatch):
  secret = 'canary "0f<3a9'
  monkeypatch.setenv('HF_TOKEN', secret)
  _write(run_folder, 'environment.json', {'command': f'llmjax pretrain --a={secret}', 'device_kind': secret})
  _write(run_folder, 'data.json', {secret: {'documents': 1}})
  _write(run_folder, 'events.jsonl', [{'step': 1, 'kind': 'stopped', 'details': {'reason': secret}}])
  page = lambda: html.unescape(report.write_report(run_folder).read_text())
  assert secret not in page() and '***' in page()
  _write(run_folder, 'samples.jsonl', [{'step': 1, 'prompt': secret, 'text': f'a {secret}'}])
  _write(run_folder, 'answers.jsonl', [{'prompt': secret, 'text': secret, 'right': secret}])
  _write(run_folder / 'rollouts', '1.jsonl', [{'iteration': 1, 'metrics': {}}, {
      'prompt': secret, 'text': secret, 'answer': secret, 'reward': 1.0}])
  assert page().count(secret) == 4 + 3 + 3  # The preview of a sample repeats prompt and text.
  assert page().count(f'<mark>{secret}</mark>') == 2
