"""Bits per byte of general-purpose compressors, as baselines for a language model."""

import gzip
import lzma


def compressor_bits_per_byte(text):
  """Return {'gzip_bits_per_byte', 'xz_bits_per_byte'} of UTF-8 text, with `gzip -9` and `xz -9`.

  The text is compressed as one stream, so repetitions across documents count, which a model does not see.
  """
  size = max(len(text), 1)
  return {'gzip_bits_per_byte': 8 * len(gzip.compress(text, 9)) / size,
          'xz_bits_per_byte': 8 * len(lzma.compress(text, preset=9)) / size}
