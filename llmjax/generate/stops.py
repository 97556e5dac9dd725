"""Streaming detokenization: whole characters, and stop texts that are never shown.  No JAX here."""


class TextStream:
  """Text of one completion.

  stopped: '' while it continues, 'end' after the end-of-text token, 'stop' after a stop text, which is `stop_text`.
  Tokens are processed one at a time, so the text and the tokens that count do not depend on the chunks they come in.
  """

  def __init__(self, tokenizer, stop_texts=(), end_ids=()):
    self._decoder = tokenizer.stream_decoder()
    self._stop_texts, self._end_ids = tuple(stop_texts), frozenset(end_ids)
    self._held = ''
    self.tokens, self.logprobs = [], []
    self.stopped, self.stop_text = '', ''

  def add(self, tokens, logprobs):
    """Return the text that no later token can change; tokens after the end are ignored."""
    pieces = []
    for token, logprob in zip(tokens, logprobs, strict=True):
      if self.stopped:
        break
      self.tokens.append(int(token))
      self.logprobs.append(float(logprob))
      if self.tokens[-1] in self._end_ids:
        pieces.append(self.finish())
        self.stopped = 'end'
      else:
        pieces.append(self._release(self._decoder.add(token)))
    return ''.join(pieces)

  def finish(self):
    """Return the text held back, once no more tokens come; '' after a stop text."""
    if self.stopped:
      return ''
    text = self._release(self._decoder.finish())
    if not self.stopped:
      text, self._held = text + self._held, ''
    return text

  def _release(self, piece):
    """Return the text up to a stop text, or up to what may be the beginning of one."""
    text = self._held + piece
    # The stop text that is complete first wins, however the text was split into pieces.
    matches = [(text.index(stop) + len(stop), -len(stop), stop) for stop in self._stop_texts if stop in text]
    if matches:
      end, _, self.stop_text = min(matches)
      self.stopped, self._held = 'stop', ''
      return text[:end - len(self.stop_text)]
    held = max((n for stop in self._stop_texts for n in range(1, min(len(stop), len(text) + 1))
                if text.endswith(stop[:n])), default=0)
    self._held = text[len(text) - held:]
    return text[:len(text) - held]
