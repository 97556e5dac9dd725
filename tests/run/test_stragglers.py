"""Processes with slow hosts are reported."""

import json

import pytest

from llmjax.config import ConfigError
from llmjax.run import determinism
from llmjax.run.stragglers import slow_processes
from tests.helpers import prepare_words, run_process


def test_outliers_are_slow():
  assert slow_processes([0.01, 0.012, 0.011, 0.2], 0.5, 5.0) == [3]
  assert slow_processes([0.2, 0.01], 0.5, 5.0) == [0]  # Of two, the faster one is the measure.
  assert slow_processes([0.01, 0.012, 0.011, 0.05], 0.5, 5.0) == []  # 40 ms of half a second.
  assert slow_processes([0.1, 0.2, 0.3, 0.4, 0.5], 0.5, 5.0) == []  # All differ as much.
  assert slow_processes([0.1] * 50 + [0.9, 0.8], 1.0, 5.0) == [50, 51]


@pytest.mark.slow
def test_a_sleeping_process_is_named_within_twenty_steps(tmp_path):
  prepare_words(tmp_path, 20)
  (tmp_path / 'recipe.py').write_text('''
import os, time
from llmjax.data import stream

def get_config():
  draw = stream.BatchStream.__next__

  def slow(self):
    if os.environ['LLMJAX_PROCESS_ID'] == '1':
      time.sleep(0.1)
    return draw(self)

  stream.BatchStream.__next__ = slow
  return {'data': {'sources': {'text': 1.0}, 'seq_len': 16}, 'logs': {'writers': ()},
          'evaluate': {'splits': ()}, 'train': {'steps': 10, 'batch_size': 8, 'log_every': 5},
          'model': {'num_layers': 1, 'd_model': 16, 'num_heads': 2, 'mlp_dim': 32}}
''')
  done = run_process(tmp_path, 'launch', 'local', '--processes=2', '--', 'pretrain', '--config=recipe.py',
                     '--workdir=run', timeout=120)
  assert done.returncode == 0, done.stdout + done.stderr
  rows = map(json.loads, (tmp_path / 'run/events.jsonl').read_text().splitlines())
  (event,) = [row for row in rows if row['kind'] == 'straggler']
  assert event['step'] == 5 and list(event['details']['host_seconds']) == ['1']
  assert event['details']['host_seconds']['1'] == pytest.approx(0.1, rel=0.3)
  assert done.stdout.count('slow: process 1 (') == 2  # At each log line.


def test_the_xla_flag_of_determinism():
  for before, after in (('', '--xla_gpu_deterministic_ops=true'), ('--a=1', '--a=1 --xla_gpu_deterministic_ops=true'),
                        ('--xla_gpu_deterministic_ops', '--xla_gpu_deterministic_ops')):
    environment = {'XLA_FLAGS': before}
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr('jax._src.xla_bridge.backends_are_initialized', lambda: False)
      determinism.require(environment)
    assert environment['XLA_FLAGS'] == after
  with pytest.raises(ConfigError, match='XLA_FLAGS'):
    determinism.require({'XLA_FLAGS': '--xla_gpu_deterministic_ops=false'})
