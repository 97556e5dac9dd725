"""Bits per byte of general-purpose compressors, as baselines for a language model."""

import gzip
import lzma

from llmjax.data import prepared, stream


def compressor_bits_per_byte(text):
  """Return {'gzip_bits_per_byte', 'xz_bits_per_byte'} of UTF-8 text, with `gzip -9` and `xz -9`.

  The text is compressed as one stream, so repetitions across documents count, which a model does not see.
  """
  size = max(len(text), 1)
  return {'gzip_bits_per_byte': 8 * len(gzip.compress(text, 9)) / size,
          'xz_bits_per_byte': 8 * len(lzma.compress(text, preset=9)) / size}


def compressor_baselines(split, sources):
  """Return the bits per byte of compressors on the concatenated documents of a split of all sources.

  Returns {} for conversations: a model is evaluated on the assistant's turns only, to which a compressor has no
  counterpart.
  """
  if any(prepared.kind(prepared.read_manifest(folder)) != 'text' for folder in sources):
    return {}
  text = '\n'.join(text for folder in sources
                   for _, text in stream.read_documents(folder, split))
  return compressor_bits_per_byte(text.encode())
