"""Streaming detokenization: whole characters, hidden stop texts, independence of chunks."""

import codecs
import itertools

import pytest

from llmjax.config import ConfigError, build
from llmjax.generate.spec import GenerateOptions
from llmjax.generate.stops import TextStream

END = 256


class ByteTokenizer:
  """One token for each byte."""

  def encode(self, text):
    return list(text.encode())

  def stream_decoder(self):
    return ByteDecoder()


class ByteDecoder:

  def __init__(self):
    self._decoder = codecs.getincrementaldecoder('utf-8')(errors='replace')

  def add(self, *ids):
    return self._decoder.decode(bytes(ids))

  def finish(self):
    return self._decoder.decode(b'', final=True)


def read(text, stops, size, end=False):
  """Returns (the pieces shown, the stream) of a text that comes `size` tokens at a time."""
  row = TextStream(ByteTokenizer(), stops, (END,))
  tokens = ByteTokenizer().encode(text) + [END] * end
  pieces = [row.add(tokens[i:i + size], [0.0] * len(tokens[i:i + size]))
            for i in range(0, len(tokens), size)]
  return [*pieces, row.finish()], row


@pytest.mark.parametrize('text, stops, shown, stop', [
    ('abcdef', ('cd',), 'ab', 'cd'),
    ('abcdef', ('cx', 'zz'), 'abcdef', ''),
    ('aab', ('ab',), 'a', 'ab'),
    ('abab abc', ('abc',), 'abab ', 'abc'),
    ('end', ('end',), '', 'end'),
    ('xabcd', ('abcd', 'bc'), 'xa', 'bc'),  # The one complete first wins.
    ('xbcd', ('bcd', 'cd'), 'x', 'bcd'),  # At the same end the longest wins.
    ('one\n\ntwo', ('\n\n',), 'one', '\n\n'),
    ('grün→日本', ('日本',), 'grün→', '日本'),
    ('half of a stop te', ('stop text',), 'half of a stop te', ''),
])
def test_stop_texts(text, stops, shown, stop):
  for size, end in itertools.product((1, 2, 3, 100), (False, True)):
    pieces, row = read(text, stops, size, end)
    assert ''.join(pieces) == shown
    assert (row.stop_text, row.stopped) == (stop, 'stop' if stop else 'end' if end else '')


def test_tokens_do_not_depend_on_chunks():
  counts = {len(read('abcdefghij', ('def',), size)[1].tokens) for size in range(1, 11)}
  assert counts == {6}  # Up to the one that completed the stop text.


def test_characters_stay_whole():
  pieces, _ = read('é日🎉', (), 1)
  assert [p for p in pieces if p] == ['é', '日', '🎉']
  row = TextStream(ByteTokenizer())
  assert row.add('日'.encode()[:2], [0.0, 0.0]) == ''
  assert row.finish() == '\ufffd'


def test_options_report_every_problem(tmp_path):
  (tmp_path / 'config.json').write_text('{}')
  with pytest.raises(ConfigError) as e:
    build(GenerateOptions, {'repetition_penalty': 0.0, 'top_p': 0.0, 'prompt': 'a',
                            'prompt_file': 'b', 'stop': ('',)})
  assert len(e.value.problems) == 5
  options = build(GenerateOptions, {'workdir': str(tmp_path), 'stop': (r'\n\n', 'END')})
  assert options.stop_texts == ('\n\n', 'END')
