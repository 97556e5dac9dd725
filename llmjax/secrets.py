"""Mask secrets in everything that llmjax prints or writes, except in documents, tokens, prompts and samples.

`hide` replaces by `***`: the values of environment variables with secret names (TOKEN, KEY, SECRET, PASSWORD, ...),
passwords within URLs, and tokens of well-known services.  Secrets belong in the environment or in files of their own.
Does not import llmjax.
"""

import functools
import html
import json
import os
import re
import sys
import traceback
import urllib.parse

HIDDEN = '***'
_NAMES = re.compile('TOKEN|KEY|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL', re.IGNORECASE)
_NOT_SECRET = frozenset(('TOKENIZERS_PARALLELISM', 'GPG_KEY', 'KEYTIMEOUT', 'XKEYSYMDB'))
# Shorter values are switches, such as TOKENIZERS_PARALLELISM=false, and would match parts of other words.
_SHORTEST = 6
_FORMS = re.compile(
    r'hf_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{40,}|'
    r'glpat-[A-Za-z0-9_-]{20,}|xox[abprs]-[A-Za-z0-9-]{10,}|AKIA[0-9A-Z]{16}|AIza[A-Za-z0-9_-]{35}|'
    r'ya29\.[A-Za-z0-9_-]{20,}|eyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]+')
_ADDRESS = re.compile(r'(\b[a-z][a-z0-9+.-]{1,20}://[^\s/:@]{1,200}:)[^\s/@]{1,200}(@)', re.IGNORECASE)


def hide(text: str) -> str:
  """Replace the secrets in a text by `***`."""
  if pattern := _pattern(_values()):
    text = pattern.sub(HIDDEN, text)
  if '://' in text:
    text = _ADDRESS.sub(rf'\1{HIDDEN}\2', text)
  return _FORMS.sub(HIDDEN, text)


def hide_within(value):
  """Apply `hide` to all strings in nested dicts (keys included), lists and tuples."""
  if isinstance(value, str):
    return hide(value)
  if isinstance(value, dict):
    return {hide_within(k): hide_within(v) for k, v in value.items()}
  if isinstance(value, (list, tuple)):
    return type(value)(hide_within(v) for v in value)
  return value


def hide_output():
  """Mask secrets in the standard output, standard error and tracebacks of this process from now on."""
  for name in ('stdout', 'stderr'):
    stream = getattr(sys, name)
    if stream is not None and not isinstance(stream, HidingStream):
      setattr(sys, name, HidingStream(stream))
  sys.excepthook = lambda *error: sys.stderr.write(''.join(traceback.format_exception(*error)))


class HidingStream:
  """A text stream that masks secrets in what is written to it."""

  def __init__(self, stream):
    self._stream = stream

  def write(self, text):
    self._stream.write(hide(text))
    return len(text)

  def writelines(self, lines):
    self.write(''.join(lines))

  def __getattr__(self, name):
    return getattr(self._stream, name)


def _values():
  """Return the secret values in the current environment, the longest first."""
  values = {value for name, value in os.environ.items()
           if _NAMES.search(name) and name not in _NOT_SECRET and len(value) >= _SHORTEST}
  return tuple(sorted(values, key=lambda v: (-len(v), v)))


@functools.lru_cache(maxsize=8)
def _pattern(values):
  """Return a pattern that matches the values, verbatim or encoded by JSON, HTML, URLs or repr; None without values."""
  forms = []
  for value in values:
    if os.path.exists(value):
      continue  # The path of a secret is not a secret.
    forms += [value, json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1], html.escape(value),
              repr(value)[1:-1], urllib.parse.quote(value, safe=''), html.escape(json.dumps(value)[1:-1])]
  forms = sorted(dict.fromkeys(forms), key=len, reverse=True)
  return re.compile('|'.join(map(re.escape, forms))) if forms else None
