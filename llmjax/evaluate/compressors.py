"""What general-purpose compressors need for the same text."""

import gzip
import lzma


def compressor_bits_per_byte(text):
  """Returns {'gzip_bits_per_byte', 'xz_bits_per_byte'} of UTF-8 bytes, at `gzip -9` and `xz -9`.

  The whole text is one stream, so both see repetitions across documents, which the model does not.
  """
  size = max(len(text), 1)
  return {'gzip_bits_per_byte': 8 * len(gzip.compress(text, 9)) / size,
          'xz_bits_per_byte': 8 * len(lzma.compress(text, preset=9)) / size}
