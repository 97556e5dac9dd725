import pickle

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from llmjax.data import packing, token_store

BOS, EOS = 3, 1


def write_store(folder, lengths, vocab_size=70_000, seed=0):
  """Writes documents of `lengths` ids between BOS and EOS; returns (store, documents)."""
  rng = np.random.default_rng(seed)
  documents = [rng.integers(4, vocab_size, n) for n in lengths]
  with token_store.TokenStoreWriter(
      folder, vocab_size=vocab_size, bos_id=BOS, eos_id=EOS) as writer:
    for ids in documents:
      assert writer.add(ids) is None
  return (token_store.TokenStore(folder),
          [np.concatenate([[BOS], ids, [EOS]]) for ids in documents])


def reference_rows(documents, seq_len, padded):
  """Rows made pair by pair, in plain Python."""
  rows, row = [], []
  for number, ids in enumerate(documents):
    for i in range(len(ids) - 1):
      row.append((number, int(ids[i]), int(ids[i + 1])))
      if len(row) == seq_len:
        rows, row = [*rows, row], []
    if padded and row:
      rows, row = [*rows, row], []
  rows += [row] if row else []
  batch = {name: np.zeros((len(rows), seq_len), dtype) for name, dtype in packing.FIELDS.items()}
  for r, row in enumerate(rows):
    segment, position, before = 0, 0, None
    for c, (number, token, target) in enumerate(row):
      segment, position = (segment, position + 1) if number == before else (segment + 1, 0)
      before = number
      for name, value in (('tokens', token), ('targets', target), ('loss_mask', 1),
                          ('segment_ids', segment), ('positions', position)):
        batch[name][r, c] = value
  return batch


@pytest.mark.parametrize('name', ['concat', 'pad'])
@hypothesis.given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30),
                  seq_len=st.integers(2, 23), small=st.booleans())
@hypothesis.settings(deadline=None, max_examples=120,
                     suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
def test_rows_equal_the_reference(tmp_path, name, lengths, seq_len, small):
  store, documents = write_store(tmp_path, lengths, vocab_size=500 if small else 70_000)
  assert store.tokens.dtype == (np.uint16 if small else np.uint32)
  rows = packing.PACKINGS[name](store, seq_len)
  expected = reference_rows(documents, seq_len, padded=name == 'pad')
  assert len(rows) == len(expected['tokens'])
  batch = rows.batch(range(len(rows)))
  assert set(batch) == set(packing.FIELDS)
  for field, value in expected.items():
    assert batch[field].dtype == packing.FIELDS[field]
    np.testing.assert_array_equal(batch[field], value, err_msg=field)
  # Every pair exactly once.
  assert batch['loss_mask'].sum() == rows.num_targets == sum(len(d) - 1 for d in documents)


@pytest.mark.parametrize('name', ['concat', 'pad'])
def test_rows_in_any_order_and_one_by_one(tmp_path, name):
  store, _ = write_store(tmp_path, [5, 1, 30, 2, 2, 17])
  rows = packing.PACKINGS[name](store, 8)
  whole = rows.batch(range(len(rows)))
  order = np.random.default_rng(0).permutation(len(rows))
  shuffled = pickle.loads(pickle.dumps(rows)).batch(order.tolist())
  for field in whole:
    np.testing.assert_array_equal(shuffled[field], whole[field][order])
    for i in range(len(rows)):
      np.testing.assert_array_equal(rows[i][field], whole[field][i])
  for bad in (-1, len(rows)):
    with pytest.raises(IndexError):
      rows[bad]


def test_segments_restart_in_every_row(tmp_path):
  store, _ = write_store(tmp_path, [20])
  batch = packing.PackedSequences(store, 8).batch([0, 1, 2])
  np.testing.assert_array_equal(batch['positions'][1], np.arange(8))
  np.testing.assert_array_equal(batch['segment_ids'][2], [1] * 5 + [0] * 3)


def test_concat_fills_all_but_the_last_row(tmp_path):
  store, _ = write_store(tmp_path, [50] * 400)
  rows = packing.PackedSequences(store, 64)
  mask = rows.batch(range(len(rows)))['loss_mask']
  assert mask[:-1].all() and mask.mean() > 0.99


def test_store_refuses_ids_outside_the_vocabulary(tmp_path):
  with token_store.TokenStoreWriter(tmp_path, vocab_size=300, bos_id=3, eos_id=1) as writer:
    assert 'token id 300' in writer.add([5, 300])
    assert 'token id -1' in writer.add([5, -1])
    assert writer.add([]) == 'no tokens'
    assert writer.add([299]) is None
  store = token_store.TokenStore(tmp_path)
  assert len(store) == 1 and store[0].tolist() == [3, 299, 1]
  with pytest.raises(IndexError):
    store[1]


def test_unfinished_and_damaged_stores_are_refused(tmp_path):
  with pytest.raises(RuntimeError), token_store.TokenStoreWriter(
      tmp_path, vocab_size=300, bos_id=3, eos_id=1) as writer:
    writer.add([5])
    raise RuntimeError
  with pytest.raises(ValueError, match='not a finished token store'):
    token_store.TokenStore(tmp_path)
  write_store(tmp_path, [5, 6])
  (tmp_path / 'tokens.bin').write_bytes(b'12345')
  with pytest.raises(ValueError, match='--force'):
    _ = token_store.TokenStore(tmp_path).tokens


def test_same_documents_same_hash(tmp_path):
  first, _ = write_store(tmp_path / 'a', [5, 6])
  second, _ = write_store(tmp_path / 'b', [5, 6])
  other, _ = write_store(tmp_path / 'c', [5, 6], seed=1)
  assert first.meta == second.meta != other.meta
