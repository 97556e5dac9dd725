"""From tokens to text as they come: whole characters, and stop texts that are never shown.

No JAX here.
"""


class TextStream:
  """The text of one row.  `stopped` says why it ended: '' while it goes on, 'end' at the
  end-of-text token, or 'stop', with the stop text in `stop_text`.

  Tokens are taken one at a time, so what is shown, and which tokens count, does not depend on how
  many come together.
  """

  def __init__(self, tokenizer, stop_texts=(), end_ids=()):
    self._decoder = tokenizer.stream_decoder()
    self._stop_texts, self._end_ids = tuple(stop_texts), frozenset(end_ids)
    self._held = ''
    self.tokens, self.logprobs = [], []
    self.stopped, self.stop_text = '', ''

  def add(self, tokens, logprobs):
    """Returns the text that these tokens make certain; tokens after the end are ignored."""
    shown = []
    for token, logprob in zip(tokens, logprobs, strict=True):
      if self.stopped:
        break
      self.tokens.append(int(token))
      self.logprobs.append(float(logprob))
      if self.tokens[-1] in self._end_ids:
        shown.append(self.finish())
        self.stopped = 'end'
      else:
        shown.append(self._show(self._decoder.add(token)))
    return ''.join(shown)

  def finish(self):
    """Returns what was held back, once no more tokens come; '' after a stop text."""
    if self.stopped:
      return ''
    shown = self._show(self._decoder.finish())
    if not self.stopped:
      shown, self._held = shown + self._held, ''
    return shown

  def _show(self, piece):
    """Returns the text up to a stop text, or up to what may be the beginning of one."""
    text = self._held + piece
    # The stop text that is complete first wins, however the text was cut into pieces.
    found = [(text.index(stop) + len(stop), -len(stop), stop)
             for stop in self._stop_texts if stop in text]
    if found:
      end, _, self.stop_text = min(found)
      self.stopped, self._held = 'stop', ''
      return text[:end - len(self.stop_text)]
    held = max((n for stop in self._stop_texts for n in range(1, min(len(stop), len(text) + 1))
                if text.endswith(stop[:n])), default=0)
    self._held = text[len(text) - held:]
    return text[:len(text) - held]
