"""Detection of parts of a conversation that a chat template does not render.

A template drops unknown fields silently, in transformers as here.  So a template must mention the fields that it is
given, and the rendered text must contain their values.
"""

import json
import re

REASONING = 'reasoning_content'
# Names of it in templates; a template gets those that it mentions.
REASONING_NAMES = (REASONING, 'thinking', 'reasoning')
_OPTIONAL_ROLES = ('tool', 'developer')  # Must be mentioned, also by a template that renders any role.


def mentions(source, name):
  """Return whether the source of a template reads a field of this name, or compares with it."""
  return re.search(rf'''(["']|\.){name}\b''', source) is not None


def find_unknown(source, messages, tools):
  """Return the first field or role, except reasoning, that a template does not mention, such as 'tools', or ''."""
  if tools and not re.search(r'\btools\b', source):
    return 'tools'
  for number, message in enumerate(messages, 1):
    if message.get('tool_calls') and not mentions(source, 'tool_calls'):
      return f'tool_calls (message {number})'
    if message['role'] in _OPTIONAL_ROLES and not mentions(source, message['role']):
      return f'the role {message["role"]} (message {number})'
  return ''


def find_lost(text, messages, tools):
  """Return the first field that a rendered text lacks, such as 'content (message 2)', or ''.

  System messages and tools may be anywhere in the text, the rest must be in order.
  """
  rendered = sum(text.count(name) for name in _tool_names(tools)) if tools else 0
  in_messages = sum(json.dumps(m, ensure_ascii=False).count(name) for m in messages for name in _tool_names(tools))
  if tools and (rendered <= in_messages or any(_find(part, text) < 0 for tool in tools for part in _described(tool))):
    return 'tools'
  at = 0
  for number, message in enumerate(messages, 1):
    anywhere = message['role'] in ('system', 'developer')
    for field, part in _parts(message):
      end = _find(part, text, 0 if anywhere or field == 'arguments' else at)
      if end < 0:
        field = 'tool_calls' if field == 'arguments' else field
        return f'{field} (message {number})'
      at = at if anywhere else max(at, end)
  return ''


def _tool_names(tools):
  return [tool['function']['name'] for tool in tools or ()]


def _described(tool):
  """Yield what a template must render of a tool: name, description and names of parameters."""
  function = tool['function']
  yield function['name']
  if isinstance(function.get('description'), str):
    yield function['description']
  parameters = function.get('parameters')
  if isinstance(parameters, dict) and isinstance(parameters.get('properties'), dict):
    yield from parameters['properties']


def _parts(message):
  """Yield (field, text) of a message, in the order in which templates render them."""
  for field in ('name',) if message['role'] != 'tool' else ():  # Most templates do not render the name of a tool.
    if message.get(field):
      yield field, message[field]
  if message.get(REASONING):
    yield REASONING, message[REASONING]
  yield 'content', message['content']
  for call in message.get('tool_calls', ()):
    yield 'tool_calls', call['function']['name']
    for name, value in call['function']['arguments'].items():
      yield from (('arguments', part) for part in (name, value) if isinstance(part, str))


def _find(part, text, begin=0):
  """Return the end of the first occurrence of a text in another, plain or JSON-escaped, or -1."""
  part = part.strip()
  variants = (part, json.dumps(part, ensure_ascii=False)[1:-1], json.dumps(part)[1:-1])
  ends = [at + len(s) for s in dict.fromkeys(variants) if (at := text.find(s, begin)) >= 0]
  return min(ends, default=-1)
