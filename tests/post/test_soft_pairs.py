"""Batches of pairs: soft labels, answers to other prompts, numbers that pairs carry."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.data import corpus, records, stream
from llmjax.data.spec import DataSpec, PrepareSpec, TokenizerSpec
from llmjax.post import objective, preference, reward_model
from llmjax.post.spec import PreferenceSpec


def make_pairs(seed=0, count=6):
  rng = np.random.default_rng(seed)
  values = [jnp.asarray(-10 * rng.random(count), jnp.float32) for _ in range(4)]
  return preference.Pairs(*values, *(jnp.asarray(rng.integers(3, 9, count), jnp.float32) for _ in range(2)))


@pytest.mark.parametrize('loss', ['sigmoid', 'ipo', 'hinge', 'simpo', 'apo_zero'])
def test_a_soft_label_is_the_expected_loss(loss):
  spec, pairs = PreferenceSpec(loss=loss), make_pairs()
  p = jnp.linspace(0.5, 1.0, 6)
  one = lambda pairs, i: jax.tree.map(lambda a: a[i:i + 1] if jnp.ndim(a) else a, pairs)
  alone = lambda pairs, i: preference.pair_loss(spec, one(pairs, i))[0]
  each = lambda pairs: np.array([alone(pairs, i) for i in range(6)])
  expected = float(np.sum(p * each(pairs) + (1 - p) * each(preference.exchange(pairs))))
  assert float(preference.pair_loss(spec, pairs, probability=p)[0]) == pytest.approx(expected, rel=1e-5)
  if loss == 'sigmoid':  # That is what label smoothing says of all pairs alike.
    smooth = preference.pair_loss(PreferenceSpec(label_smoothing=0.2), pairs)[0]
    soft = preference.pair_loss(spec, pairs, probability=jnp.full(6, 0.8))[0]
    assert float(soft) == pytest.approx(float(smooth), rel=1e-5)
  half = preference.pair_loss(spec, pairs, probability=jnp.full(6, 0.5))[0]
  other = preference.pair_loss(spec, preference.exchange(pairs), probability=jnp.full(6, 0.5))[0]
  assert float(half) == pytest.approx(float(other), rel=1e-5)


def test_a_soft_label_of_a_reward_model():
  chosen, rejected, p = jnp.array([1.0, -2.0]), jnp.array([0.5, 1.0]), jnp.array([0.9, 0.6])
  log_sigmoid = lambda x: -np.log1p(np.exp(-np.asarray(x, np.float64)))
  gap = chosen - rejected
  expected = -float(np.sum(p * log_sigmoid(gap - 0.3) + (1 - p) * log_sigmoid(-gap - 0.3)))
  assert float(reward_model.bradley_terry(chosen, rejected, 0.3, probability=p)[0]) == pytest.approx(expected, rel=1e-5)


def row(prompt, answer, length=10):
  """A row with the ids `prompt` and then `answer`, whose tokens are the targets that count."""
  ids = np.array(prompt + answer)
  fill = lambda values: np.pad(values, (0, length - len(values)))
  size = len(ids) - 1
  mask = np.arange(size) >= len(prompt) - 1
  return {'tokens': fill(ids[:-1]), 'targets': fill(ids[1:]), 'segment_ids': fill(np.ones(size, int)),
          'positions': fill(np.arange(size)), 'loss_mask': fill(mask.astype(np.float32))}


def test_mismatched_rows_are_prompts_with_the_answers_of_the_next_pair():
  prompts = [[1, 2, 3], [1, 2, 3], [4, 5], [4, 5], [6, 7, 8, 9], [6, 7, 8, 9]]
  answers = [[11, 12], [13, 14, 15], [21, 22, 23, 24], [25], [31, 32], [33, 34, 35, 36, 37, 38]]
  stack = lambda rows: {k: jnp.asarray(np.stack([r[k] for r in rows])) for k in rows[0]}
  found = objective.mismatch_completions(stack([row(p, a) for p, a in zip(prompts, answers, strict=True)]))
  expected = stack([row(p, answers[(i + 2) % 6]) for i, p in enumerate(prompts)])
  for name, value in expected.items():
    np.testing.assert_array_equal(found[name], value, err_msg=name)
  # What does not fit is cut off at the end of the row.
  long = stack([row([1] * 8, [2]), row([1] * 8, [2]), row([3], [4, 5, 6, 7, 8]), row([3], [4])])
  cut = objective.mismatch_completions(long)
  np.testing.assert_array_equal(cut['targets'][0], [1] * 7 + [4, 5, 6])
  np.testing.assert_array_equal(cut['loss_mask'][0], [0] * 7 + [1] * 3)


def test_numbers_of_pairs_come_with_their_batches(tmp_path):
  file = tmp_path / 'pairs.jsonl'
  lines = [{'prompt': f'say {i}', 'chosen': f'yes {i}', 'rejected': 'no', **more} for i, more in enumerate(
      [{'margin': 2.0}, {'probability': 0.75}, {}, {'margin': 1, 'probability': 0.5}] * 20)]
  file.write_text(''.join(json.dumps(r) + '\n' for r in lines))
  corpus.prepare(PrepareSpec(source='text_dir', path=str(file), records='preference', template='plain',
                             output=str(tmp_path / 'pairs'), tokenizer=TokenizerSpec(vocab_size=300)))
  spec = DataSpec(sources={str(tmp_path / 'pairs'): 1.0}, seq_len=32)
  count = stream.count_examples(spec, 'train')
  table = np.arange(2.0 * count).reshape(count, 2)
  tokenizer = stream.load_tokenizer(spec)
  with stream.open_stream(spec, batch_size=4, seed=0) as batches:
    batches.attach('reference', table)
    seen = set()
    for _ in range(30):
      batch = next(batches)
      assert batch['margin'].shape == batch['reference'].shape == (8,)
      for i in range(4):
        number = int(tokenizer.decode(batch['tokens'][2 * i][batch['segment_ids'][2 * i] > 0]).split()[1].split('y')[0])
        record = lines[number]
        assert batch['margin'][2 * i] == record.get('margin', 0.0)
        assert batch['probability'][2 * i] == np.float32(record.get('probability', 1.0))
        first, second = batch['reference'][2 * i:2 * i + 2]
        assert second == first + 1 and first % 2 == 0
        seen.add(int(first) // 2)
    assert len(seen) > 40
  *_, last = stream.eval_batches(spec, 'train', 7, columns={'reference': table})
  assert last['reference'].shape == (14,)
  np.testing.assert_array_equal(last['reference'][:2 * (count % 7)], table[-(count % 7):].reshape(-1))
  with pytest.raises(ValueError, match='must begin with the shape'):
    batches.attach('reference', table[1:])


@pytest.mark.parametrize('more', [{'margin': -1}, {'probability': 1.5}, {'margin': 'x'}, {'probability': True}])
def test_wrong_numbers_of_pairs(more):
  with pytest.raises(ValueError, match='must be a number from 0 to'):
    records.normaliser('preference')({'prompt': 'a', 'chosen': 'b', 'rejected': 'c', **more})
