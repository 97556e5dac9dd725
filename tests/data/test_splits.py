import hypothesis
import hypothesis.strategies as st
import numpy as np

from llmjax.data import splits


@hypothesis.given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 1000)),
                           min_size=3, max_size=200))
@hypothesis.settings(deadline=None, max_examples=200)
def test_a_unit_is_in_one_split(documents):
  hashed = np.random.default_rng(0).integers(0, 2**63, 31).astype(np.uint64)
  units = hashed[[unit for unit, _ in documents]]
  sizes = np.array([size for _, size in documents])
  codes = splits.choose_held_out(units, sizes, 0.05, 0.05)
  for unit in set(units.tolist()):
    assert len(set(codes[units == unit].tolist())) == 1
  if len(set(units.tolist())) >= 3:
    assert set(codes.tolist()) == {splits.TRAIN, splits.VALIDATION, splits.TEST}
  np.testing.assert_array_equal(codes, splits.choose_held_out(units, sizes, 0.05, 0.05))


def test_shares_of_bytes():
  rng = np.random.default_rng(0)
  units, sizes = rng.integers(0, 2**63, 5000).astype(np.uint64), rng.integers(1, 5000, 5000)
  codes = splits.choose_held_out(units, sizes, 0.05, 0.1)
  for code, share in ((splits.VALIDATION, 0.05), (splits.TEST, 0.1)):
    assert abs(sizes[codes == code].sum() / sizes.sum() - share) < 0.005
  assert not splits.choose_held_out(units, sizes, 0.0, 0.0).any()


def test_one_huge_unit_stays_in_train():
  units, sizes = np.arange(40, dtype=np.uint64), np.full(40, 10)
  sizes[:3] = 10_000  # First in the order of hashes.
  codes = splits.choose_held_out(units, sizes, 0.05, 0.05)
  assert not codes[:3].any() and set(codes.tolist()) == {0, 1, 2}


def test_copies():
  train, validation, test, duplicate, leak = range(5)
  codes = np.array([train, train, validation, train, test, validation, train], np.int8)
  digests = [b'a', b'b', b'b', b'a', b'c', b'c', b'd']
  assert splits.drop_duplicates(codes, digests).tolist() == [
      train, leak, validation, duplicate, test, duplicate, train]


def test_units_that_share_a_key_are_joined_whatever_their_order():
  keys = [(1, 2), (5,), (2, 3), (4,), (3,), (5,), (6, 4)]
  units = splits.join_units(keys)
  groups = lambda units: [[j for j, other in enumerate(units) if other == unit] for unit in units]
  assert groups(units) == [[0, 2, 4], [1, 5], [0, 2, 4], [3, 6], [0, 2, 4], [1, 5], [3, 6]]
  assert units.dtype == np.uint64 and units[1] == 5  # A key of its own stays what it is.
  np.testing.assert_array_equal(splits.join_units([k[::-1] for k in keys[::-1]])[::-1], units)
  # Units of many keys come no earlier than others, else they would be held out.
  rng = np.random.default_rng(0)
  many = [tuple(rng.integers(0, 2**64, 50, np.uint64).tolist()) for _ in range(200)]
  assert abs(splits.join_units(many).astype(float).mean() / 2**63 - 1) < 0.15


def test_what_a_source_divides_leaves_train():
  train, validation, test, duplicate, leak = range(5)
  codes = np.array([train, validation, train, test, train, duplicate], np.int8)
  units = np.array([1, 1, 2, 3, 3, 2], np.uint64)
  assert splits.drop_leaks(codes, units).tolist() == [leak, validation, train, test, leak, duplicate]
