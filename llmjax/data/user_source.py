"""Documents from a function of the user's own module, `module:name`."""

import sys

from llmjax import extensions
from llmjax.config import ConfigError
from llmjax.data import prepared
from llmjax.data.documents import Document, Limits, Rejected, check_record


def read_records(spec, limits: Limits):
  """Yield the Documents and the Rejected of `spec.source`, a function of the PrepareSpec.

  The function yields records: {'text': ...}, or of another kind as `--config.records` says; or Documents, to name a
  document or assign its split.  Raises ConfigError where the function is missing, fails, or yields something else.
  """
  function = extensions.load(spec.source, 'source')
  wrong = lambda text: ConfigError([f"source={spec.source}: {text}; yield records such as {{'text': ...}}"])
  with extensions.errors_of(spec.source, 'source'):
    items = function(spec)
    if not hasattr(items, '__iter__'):
      raise wrong(f'it returned {type(items).__name__}')
    for number, item in enumerate(items, 1):
      if isinstance(item, dict):
        item = check_record(item, f'{spec.source}#{number}', spec.source, limits, line=number)
      elif not isinstance(item, (Document, Rejected)):
        raise wrong(f'item {number} is of type {type(item).__name__}')
      yield item


def fingerprint(source) -> str:
  """Return the SHA-256 of the module's file, or '' where it has none.  Raises ConfigError as `extensions.load`."""
  extensions.load(source, 'source')
  file = getattr(sys.modules[source.partition(':')[0]], '__file__', None)
  return prepared.file_sha256(file) if file else ''
