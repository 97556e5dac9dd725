"""Assignment of documents to splits, and removal of duplicates.  Both depend on names, sizes and text alone."""

import hashlib

import numpy as np

TRAIN, VALIDATION, TEST, DUPLICATE, LEAK = range(5)
CODES = {'train': TRAIN, 'validation': VALIDATION, 'test': TEST}


def text_digest(text: str) -> bytes:
  """Return 16 bytes that are equal for equal texts."""
  return hashlib.blake2b(text.encode(), digest_size=16).digest()


def normalise(text: str) -> str:
  """Return the text in lower case with single spaces: texts for which this is equal are duplicates."""
  return ' '.join(text.split()).casefold()


def join_units(keys) -> np.ndarray:
  """Return uint64 [n], equal for items that share a key, directly or through other items (union-find).

  keys: for each item one key or more, uint64, each a hash of what must stay in one split.
  """
  parent = {}

  def root(key):
    while (above := parent.setdefault(key, key)) != key:
      parent[key] = key = parent[above]  # Halves the path, so that no chain becomes long.
    return key

  for first, *others in keys:
    for other in others:
      one, two = root(first), root(other)
      parent[max(one, two)] = min(one, two)
  joined = {root(key) for key, above in parent.items() if key != above}

  def unit(key):
    key = root(key)
    # The smallest of many hashes would come early in the order of units: hash it again.
    return key if key not in joined else int.from_bytes(hashlib.blake2b(key.to_bytes(8), digest_size=8).digest())

  return np.array([unit(item[0]) for item in keys], np.uint64)


def choose_held_out(units, sizes, validation_fraction, test_fraction):
  """Return an int8 code [n] for n documents: TRAIN, VALIDATION or TEST.

  units: uint64 [n], a hash of what must stay in one split (a file, a prompt, or the document itself).  sizes: int64 [n]
  bytes.  Each held-out split takes units in the order of their hashes until it has its share of the bytes, and at least
  one where there are three or more.
  """
  codes = np.full(len(units), TRAIN, np.int8)
  names, member = np.unique(units, return_inverse=True)
  totals = np.bincount(member, weights=sizes, minlength=len(names))
  free = np.ones(len(names), bool)
  for code, fraction in ((TEST, test_fraction), (VALIDATION, validation_fraction)):
    if not fraction or free.sum() < 2:
      continue
    target = fraction * totals.sum()
    # A unit much larger than the share would hold out far more than requested.
    small = np.flatnonzero(free & (totals <= max(2 * target, totals[free].min())))
    middle = np.cumsum(totals[small]) - totals[small] / 2
    # At most half: the next split needs small units too.
    taken = small[:max(1, min(int(np.searchsorted(middle, target)), len(small) // 2))]
    free[taken] = False
    codes[np.isin(member, taken)] = code
  return codes


def drop_leaks(codes, units):
  """Return the codes with LEAK for train documents that share a unit with a held-out one.

  This happens only where a source has splits of its own.
  """
  held_out = units[(codes == VALIDATION) | (codes == TEST)]
  return np.where((codes == TRAIN) & np.isin(units, held_out), LEAK, codes).astype(np.int8)


def drop_duplicates(codes, digests):
  """Return the codes with duplicates marked: one document of each text stays.

  digests: bytes [n].  A duplicate in train of a held-out text is a LEAK; any other is a DUPLICATE.  Where held-out
  splits share a text, test keeps it.
  """
  codes = codes.copy()
  # Test first, then validation, then train; within a split the first one stays.
  order = sorted(range(len(codes)), key=lambda i: (-int(codes[i]), i))
  kept = {}
  for i in order:
    first = kept.setdefault(digests[i], i)
    if first != i:
      codes[i] = LEAK if codes[i] == TRAIN and codes[first] != TRAIN else DUPLICATE
  return codes
