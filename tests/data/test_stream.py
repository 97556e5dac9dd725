import collections
import dataclasses
import itertools
import json
import random
import shutil

import numpy as np
import pytest

from llmjax.config import ConfigError
from llmjax.data import corpus, dataset, packing, prepared, stream, token_store
from llmjax.data.spec import DataSpec, PrepareSpec, TokenizerSpec
from tests.data.conftest import WORDS


def draw(spec, count, **kwargs):
  """Returns `count` batches of a new stream."""
  with stream.open_stream(spec, **{'batch_size': 8, 'seed': 0, **kwargs}) as batches:
    return list(itertools.islice(batches, count))


def assert_equal(first, second):
  assert len(first) == len(second)
  for one, two in zip(first, second, strict=True):
    assert one.keys() == two.keys()
    for field in one:
      assert one[field].dtype == two[field].dtype
      np.testing.assert_array_equal(one[field], two[field])


@pytest.fixture
def spec(small_folder, other_folder):
  return DataSpec(sources={small_folder: 1.0, other_folder: 3.0}, seq_len=32)


def test_shapes_and_types(spec):
  (batch,) = draw(spec, 1)
  assert {k: v.dtype for k, v in batch.items()} == packing.FIELDS
  assert all(v.shape == (8, 32) for v in batch.values())


def test_every_row_once_an_epoch_in_a_new_order(small_folder):
  spec = DataSpec(sources={small_folder: 1.0}, seq_len=16)
  rows = packing.PackedSequences(token_store.TokenStore(prepared.tokens_path(small_folder, 'train')), 16)
  expected = collections.Counter(row.tobytes() for row in rows.batch(range(len(rows)))['tokens'])
  drawn = [batch['tokens'][0].tobytes() for batch in draw(spec, 2 * len(rows), batch_size=1)]
  first, second = drawn[:len(rows)], drawn[len(rows):]
  assert collections.Counter(first) == collections.Counter(second) == expected
  assert first != second
  assert stream.count_examples(spec, 'train') == len(rows)


def test_seeds_differ(spec):
  assert any((a['tokens'] != b['tokens']).any()
             for a, b in zip(draw(spec, 3), draw(spec, 3, seed=1), strict=True))


@pytest.mark.parametrize('packed', ['concat', 'pad'])
@pytest.mark.parametrize('hosts', [2, 4])
def test_hosts_hold_blocks_of_the_same_global_batch(spec, hosts, packed):
  spec = DataSpec(sources=spec.sources, seq_len=32, packing=packed)
  whole = draw(spec, 5)
  parts = [draw(spec, 5, blocks=(h,), block_count=hosts) for h in range(hosts)]
  joined = [{k: np.concatenate([p[i][k] for p in parts]) for k in whole[0]} for i in range(5)]
  assert_equal(joined, whole)
  (some,) = draw(spec, 1, blocks=(0, 2), block_count=4)
  np.testing.assert_array_equal(some['tokens'], whole[0]['tokens'][[0, 1, 4, 5]])


@pytest.mark.slow
def test_workers_change_nothing(spec):
  whole = draw(spec, 6)
  for workers, start in ((2, 0), (4, 3)):
    with_workers = DataSpec(sources=spec.sources, seq_len=32, workers=workers)
    with stream.open_stream(with_workers, batch_size=8, seed=0) as batches:
      batches.restore(start)
      assert_equal(list(itertools.islice(batches, 6 - start)), whole[start:])


def test_state_is_the_number_of_batches(spec):
  whole = draw(spec, 9)
  with stream.open_stream(spec, batch_size=8, seed=0) as batches:
    assert batches.state == 0
    assert_equal([next(batches) for _ in range(4)], whole[:4])
    assert batches.state == 4 and isinstance(batches.state, int)
    next(batches)
    batches.restore(4)
    assert_equal([next(batches) for _ in range(5)], whole[4:])
    batches.close()  # Goes on where it was.
    assert batches.state == 9
    batches.restore(0)
    assert_equal([next(batches)], whole[:1])
    for bad in (-1, 1.5, True):
      with pytest.raises(ValueError):
        batches.restore(bad)
  with stream.open_stream(spec, batch_size=8, seed=0, blocks=(1,), block_count=2) as batches:
    batches.restore(7)
    np.testing.assert_array_equal(next(batches)['tokens'], whole[7]['tokens'][4:])


def test_a_state_far_on_costs_nothing(spec):
  with stream.open_stream(spec, batch_size=8, seed=0) as batches:
    batches.restore(10**9)
    next(batches)
    assert batches.state == 10**9 + 1


def test_weights(small_folder, other_folder, spec):
  documents = {}
  for folder in (small_folder, other_folder):
    store = token_store.TokenStore(prepared.tokens_path(folder, 'train'))
    rows = packing.PackedSequences(store, 32)
    documents[folder] = {r.tobytes() for r in rows.batch(range(len(rows)))['tokens']}
  assert not documents[small_folder] & documents[other_folder]
  drawn = [r.tobytes() for batch in draw(spec, 100) for r in batch['tokens']]
  share = sum(r in documents[other_folder] for r in drawn) / len(drawn)
  assert abs(share - 0.75) < 0.01
  turned = DataSpec(sources=dict(reversed(spec.sources.items())), seq_len=32)
  assert_equal(draw(turned, 3), draw(spec, 3))


@pytest.mark.parametrize('packed', ['concat', 'pad'])
@pytest.mark.parametrize('hosts', [1, 2])
def test_eval_batches_hold_every_pair_once(spec, hosts, packed):
  spec = DataSpec(sources=spec.sources, seq_len=24, packing=packed)
  parts = [list(stream.eval_batches(spec, 'validation', 6, blocks=(h,), block_count=hosts))
           for h in range(hosts)]
  assert len({len(part) for part in parts}) == 1
  batches = [batch for step in zip(*parts, strict=True) for batch in step]
  assert all(v.shape == (6 // hosts, 24) for b in batches for v in b.values())
  found = np.concatenate([np.stack([b['tokens'], b['targets']], -1)[b['loss_mask'] > 0]
                          for b in batches])
  expected = []
  for folder in sorted(spec.sources):
    store = token_store.TokenStore(prepared.tokens_path(folder, 'validation'))
    for d in range(len(store)):
      expected += list(itertools.pairwise(store[d].tolist()))
  assert [tuple(pair) for pair in found.tolist()] == expected
  assert len(expected) == stream.split_counts(spec, 'validation')['targets']
  padding = np.concatenate([b['segment_ids'] for b in batches]) == 0
  assert not np.concatenate([b['loss_mask'] for b in batches])[padding].any()


@pytest.mark.parametrize('size', [2, 6, 32])
def test_a_limit_is_of_sequences_whatever_their_number_in_a_batch(spec, size):
  joined = lambda batches, name: np.concatenate([b[name] for b in batches])
  one = list(stream.eval_batches(spec, 'validation', 1, limit=7))
  cut = list(stream.eval_batches(spec, 'validation', size, limit=7))
  assert len(cut) == -(-7 // size) and len(one) == 7
  np.testing.assert_array_equal(joined(cut, 'tokens')[:7], joined(one, 'tokens'))
  assert joined(cut, 'loss_mask')[:7].any(axis=1).all() and not joined(cut, 'loss_mask')[7:].any()
  if not size % 2:
    halves = [list(stream.eval_batches(spec, 'validation', size, limit=7, blocks=(h,), block_count=2)) for h in (0, 1)]
    both = [np.concatenate([a['tokens'], b['tokens']]) for a, b in zip(*halves, strict=True)]
    np.testing.assert_array_equal(np.concatenate(both), joined(cut, 'tokens'))


@pytest.fixture(scope='module')
def unequal(tmp_path_factory, small_folder):
  """Prepared folders {name: path} with validation splits of very different sizes: `aa` and `zz`, and zz as `a0`."""
  root, folders = tmp_path_factory.mktemp('unequal'), {}
  for name, count in (('aa', 6), ('zz', 300)):
    rng = random.Random(name)
    (root / f'{name}.jsonl').write_text(''.join(
        json.dumps({'text': ' '.join(rng.choices(WORDS, k=rng.randint(4, 60))) + f' {name}{i}'}) + '\n'
        for i in range(count)))
    folders[name] = str(root / name)
    corpus.prepare(PrepareSpec(source='text_dir', path=str(root / f'{name}.jsonl'), output=folders[name],
                               validation_fraction=0.5, test_fraction=0.0,
                               tokenizer=TokenizerSpec(path=f'{small_folder}/tokenizer.model')))
  folders['a0'] = str(root / 'a0')
  shutil.copytree(folders['zz'], folders['a0'])
  return folders


def rows_of(spec, limit, **kwargs):
  (batch,) = stream.eval_batches(spec, 'validation', 512, limit, **kwargs)
  return [r.tobytes() for r, mask in zip(batch['tokens'], batch['loss_mask'], strict=True) if mask.any()]


@pytest.mark.parametrize('packing', ['concat', 'best_fit', 'pad'])
def test_a_limit_is_a_fair_sample_of_every_source(unequal, packing):
  both = DataSpec(sources={unequal['zz']: 0.99, unequal['aa']: 0.01}, seq_len=64, packing=packing)
  alone = {name: rows_of(dataclasses.replace(both, sources={unequal[name]: 1.0}), 0) for name in ('aa', 'zz')}
  whole, found = sum(map(len, alone.values())), rows_of(both, 16)
  assert len(found) == len(set(found)) == 16 and rows_of(both, 16) == found
  of_aa = sum(row in alone['aa'] for row in found)
  assert 1 <= of_aa <= 16 * len(alone['aa']) / whole + 1
  # Another order of names and other weights of training change nothing.
  turned = dataclasses.replace(both, sources={unequal['a0']: 0.5, unequal['aa']: 0.5})
  assert rows_of(turned, 16) == found
  # A source by itself has a sample of its own, of which the one of all sources is a part.
  assert {row for row in found if row in alone['zz']} <= set(
      rows_of(dataclasses.replace(both, sources={unequal['zz']: 1.0}), 16))
  # Packing sorts by length, files are in order: the sample is of all places and of all lengths.
  one = dataclasses.replace(both, sources={unequal['zz']: 1.0})
  places = np.sort([alone['zz'].index(row) for row in rows_of(one, 24)]) / len(alone['zz'])
  assert np.abs(places - (np.arange(24) + 0.5) / 24).max() < 0.25
  assert rows_of(one, 10_000) == alone['zz']


@pytest.mark.parametrize('sizes, limit, counts', [
    ([1, 99], 10, [1, 9]), ([99, 1], 10, [9, 1]), ([50, 50], 5, [2, 3]), ([1, 1, 1], 2, [0, 1, 1]),
    ([0, 10, 10], 3, [0, 1, 2]), ([1, 1, 98], 3, [1, 1, 1]), ([10, 20, 30], 6, [1, 2, 3]), ([2, 1000], 1, [0, 1]),
    ([1, 1, 1, 1, 96], 50, [1, 1, 1, 1, 46])])
def test_shares_of_a_limit(sizes, limit, counts):
  assert dataset.proportional_counts(sizes, limit, [str(i) for i in range(len(sizes))]) == counts


def test_decoded_rows_are_the_documents(small_folder):
  spec = DataSpec(sources={small_folder: 1.0}, seq_len=4096, packing='pad')
  tokenizer = stream.load_tokenizer(spec)
  assert stream.vocab_size(spec) == tokenizer.vocab_size
  (batch,) = stream.eval_batches(spec, 'test', 16)
  rows = [tokenizer.decode(targets[mask > 0])
          for targets, mask in zip(batch['targets'], batch['loss_mask'], strict=True)]
  texts = [text for _, text in stream.read_documents(small_folder, 'test')]
  assert rows[:len(texts)] == texts and not any(rows[len(texts):])
  counts = stream.split_counts(spec, 'test')
  assert counts['documents'] == len(texts)
  assert counts['bytes'] == sum(len(t.encode()) for t in texts)
  sizes = tokenizer.token_bytes()[batch['targets']] * batch['loss_mask']
  assert sizes.sum() == counts['bytes']  # Bits per byte may be summed over targets.


def test_fingerprint(spec, small_folder):
  same = DataSpec(sources=dict(reversed(spec.sources.items())), seq_len=32, workers=2)
  assert stream.fingerprint(spec) == stream.fingerprint(same)
  others = [DataSpec(sources=spec.sources, seq_len=16), DataSpec(sources={small_folder: 1.0}),
            DataSpec(sources=spec.sources, seq_len=32, packing='pad')]
  assert len({stream.fingerprint(s) for s in [spec, *others]}) == 4


def test_wrong_requests(spec, small_folder):
  with pytest.raises(ConfigError, match='write 9'):
    draw(spec, 1, batch_size=8, block_count=3)
  with pytest.raises(ConfigError, match='has no other split'):
    draw(spec, 1, split='other')
  with pytest.raises(ConfigError, match='write 9'):
    next(stream.eval_batches(spec, 'test', 7, block_count=3))
