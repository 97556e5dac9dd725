"""Output of `llmjax generate`: completions on a terminal, as JSON, and the line about speed."""

import json
import os

DIM, PLAIN = '\x1b[2m', '\x1b[0m'
REASONS = {'end': 'the end-of-text token', 'stop': 'stop text {!r}', '': 'max_new_tokens'}


class Display:
  """Writes a prompt, dim on a terminal, and the completion after it."""

  def __init__(self, output, prompt):
    self._output, self._prompt = output, prompt
    self._is_terminal = output.isatty()
    self._colour = self._is_terminal and 'NO_COLOR' not in os.environ

  def prompt(self):
    self._write(self._prompt, *((DIM, PLAIN) if self._colour else ('', '')))

  def completion(self, text):
    self._write(text)

  def end(self):
    self._output.write('\n')
    self._output.flush()

  def _write(self, text, before='', after=''):
    if self._is_terminal:
      # A completion must not move the cursor or change the title of the window.
      text = ''.join(c if c.isprintable() or c in '\n\t' else '\ufffd' for c in text)
    if text:
      self._output.write(before + text + after)
      self._output.flush()


def show_rows(output, prompt, display, rows, texts, options, live):
  """Write finished completions.  rows: TextStreams.  live: the only one is already on the display."""
  for i, (row, text) in enumerate(zip(rows, texts, strict=True)):
    if options.json:
      record = {'prompt': prompt, 'text': text, 'tokens': row.tokens, 'logprobs': [round(p, 6) for p in row.logprobs],
                'stopped': row.stopped or 'length', 'stop_text': row.stop_text or None}
      print(json.dumps(record, ensure_ascii=False), file=output)
      continue
    if not live:
      if len(rows) > 1:
        print(f'--- {i + 1} of {len(rows)}', file=output)
      display.prompt()
      display.completion(text)
    display.end()
  output.flush()


def describe_end(rows):
  """Return why the completions ended, in a few words."""
  return ', '.join(dict.fromkeys(REASONS[row.stopped].format(row.stop_text) for row in rows))


def describe_speed(times, counts, compiling):
  """Return '0.05 s to the first token, then 589 tokens/s; compiled in 20.1 s'.

  times: seconds from the start to each chunk, compilation excluded.  counts: tokens of each chunk, over all rows.
  """
  parts = [f'{times[0]:.2g} s to the first token']
  if len(times) > 1:
    parts.append(f'then {sum(counts[1:]) / max(times[-1] - times[0], 1e-9):.3g} tokens/s')
  return ', '.join(parts) + (f'; compiled in {compiling:.1f} s' if compiling >= 0.05 else '')
