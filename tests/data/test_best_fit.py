"""Best-fit packing: nothing is cut, nothing lost, rows come out full, and long samples go as asked."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from llmjax.config import ConfigError
from llmjax.data import packing
from tests.data.test_conversations import write_weighted
from tests.data.test_packing import write_store


@hypothesis.given(sizes=st.lists(st.integers(1, 40), max_size=60), extra=st.integers(0, 30))
@hypothesis.settings(deadline=None, max_examples=300)
def test_no_row_overflows_and_every_piece_is_in_one(sizes, extra):
  capacity = max(sizes, default=1) + extra
  rows = packing.best_fit(np.array(sizes, np.int64), capacity)
  np.testing.assert_array_equal(rows, packing.best_fit(np.array(sizes, np.int64), capacity))
  loads = np.bincount(rows, weights=sizes, minlength=0) if sizes else np.zeros(0)
  assert len(rows) == len(sizes) and (loads > 0).all() and (loads <= capacity).all()
  # A row is left only when no piece that was there still fitted.
  for row, load in enumerate(loads):
    assert all(load + size > capacity for size, other in zip(sizes, rows, strict=True) if other > row)


@hypothesis.given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=40), seq_len=st.integers(2, 30),
                  weighted=st.booleans())
@hypothesis.settings(deadline=None, max_examples=80,
                     suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
def test_every_document_is_in_the_rows(tmp_path, lengths, seq_len, weighted):
  """Text is cut every seq_len pairs; conversations are whole, or left out when they are longer."""
  if weighted:
    store = write_weighted(tmp_path, [n + 1 for n in lengths])
    documents = [store[i] for i in range(len(store))]
    expected = [d for d in documents if 1 < len(d) <= seq_len + 1]
  else:
    store, documents = write_store(tmp_path, lengths, vocab_size=500)
    expected = [d[i:i + seq_len + 1] for d in documents for i in range(0, len(d) - 1, seq_len)]
  rows = packing.BestFitSequences(store, seq_len, 'drop')
  batch = rows.batch(range(len(rows)))
  found = []
  for row in range(len(rows)):
    segments = batch['segment_ids'][row]
    used = int((segments > 0).sum())
    assert (segments[:used] > 0).all() and not segments[used:].any() and (np.diff(segments[:used]) >= 0).all()
    for value in batch.values():
      assert not value[row, used:].any()
    for segment in range(1, int(segments.max()) + 1):
      place = np.flatnonzero(segments == segment)
      np.testing.assert_array_equal(batch['positions'][row, place], np.arange(len(place)))
      np.testing.assert_array_equal(batch['tokens'][row, place][1:], batch['targets'][row, place][:-1])
      found.append([*batch['tokens'][row, place].tolist(), int(batch['targets'][row, place[-1]])])
  assert sorted(found) == sorted(d.tolist() for d in expected)
  assert rows.num_targets == sum(len(d) - 1 for d in expected)
  if weighted:
    assert rows.overflow_counts() == {'truncated': 0, 'dropped': sum(n > seq_len for n in lengths)}


@pytest.mark.parametrize(('draw', 'least'), [
    (lambda rng: np.clip(rng.lognormal(4, 0.8, 20_000).astype(int), 8, 512), 0.9995),
    (lambda rng: rng.integers(20, 120, 20_000), 0.999),  # None is short: nothing to fill a small gap with.
    (lambda rng: rng.integers(60, 256, 20_000), 0.98)])
def test_rows_come_out_full(draw, least):
  sizes = draw(np.random.default_rng(0))
  rows = packing.best_fit(sizes, 512)
  assert sizes.sum() / (512 * (rows.max() + 1)) >= least


def test_long_conversations(tmp_path):
  store = write_weighted(tmp_path, [5, 30, 9])
  with pytest.raises(ConfigError, match=r'1 of 3 conversations in .* longer than data.seq_len=20, document 1 with 29 '
                                        r'tokens; write data.seq_len=29, or data.overflow=truncate or drop'):
    len(packing.BestFitSequences(store, 20))
  rows = packing.BestFitSequences(store, 20, 'truncate')
  assert rows.num_targets == 4 + 20 + 8 and rows.overflow_counts() == {'truncated': 1, 'dropped': 0}
  # Cut before anything that is trained: there is nothing to learn from the rest.
  weights = np.array(store.columns['loss_mask'])
  weights[5:5 + 21] = 0
  weights.tofile(tmp_path / 'loss_mask.bin')
  rows = packing.BestFitSequences(type(store)(tmp_path), 20, 'truncate')
  assert rows.num_targets == 4 + 8 and rows.overflow_counts() == {'truncated': 0, 'dropped': 1}
