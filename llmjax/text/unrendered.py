"""Finds what a chat template leaves out of a conversation: roles it does not know, and text that it does not render.

A template that ignores a field loses it without a word, in transformers as here.  So a template must mention the
fields that it is given, and the text it makes must hold them.
"""

import json
import re

REASONING = 'reasoning_content'
# What templates call it; each of them is given the names that it mentions.
REASONING_NAMES = (REASONING, 'thinking', 'reasoning')
_OPTIONAL_ROLES = ('tool', 'developer')  # Of no use to a template that writes any role between its markers.


def mentions(source, name):
  """Returns whether a Jinja program reads a field of this name, or compares with it."""
  return re.search(rf'''(["']|\.){name}\b''', source) is not None


def find_unknown(source, messages, tools):
  """Returns the first field or role that a template does not mention, such as 'tools', or ''; reasoning aside."""
  if tools and not re.search(r'\btools\b', source):
    return 'tools'
  for number, message in enumerate(messages, 1):
    if message.get('tool_calls') and not mentions(source, 'tool_calls'):
      return f'tool_calls (message {number})'
    if message['role'] in _OPTIONAL_ROLES and not mentions(source, message['role']):
      return f'the role {message["role"]} (message {number})'
  return ''


def find_lost(text, messages, tools):
  """Returns the first field that a rendered text lacks, such as 'content (message 2)', or ''.

  What the system says and tools may stand anywhere, the rest in order.
  """
  calls = sum(text.count(name) for name in _tool_names(tools)) if tools else 0
  said = sum(json.dumps(m, ensure_ascii=False).count(name) for m in messages for name in _tool_names(tools))
  if tools and (calls <= said or any(_find(part, text) < 0 for tool in tools for part in _described(tool))):
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
  """Yields what a template must tell of a tool: its name, its description and its parameters' names."""
  function = tool['function']
  yield function['name']
  if isinstance(function.get('description'), str):
    yield function['description']
  parameters = function.get('parameters')
  if isinstance(parameters, dict) and isinstance(parameters.get('properties'), dict):
    yield from parameters['properties']


def _parts(message):
  """Yields (field, its text) of a message, in the order in which templates write them."""
  for field in ('name',) if message['role'] != 'tool' else ():  # Of a tool most templates write the result alone.
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
  """Returns where a text ends in another, as it is or as JSON has it; -1: nowhere."""
  part = part.strip()
  spelled = (part, json.dumps(part, ensure_ascii=False)[1:-1], json.dumps(part)[1:-1])
  found = [at + len(s) for s in dict.fromkeys(spelled) if (at := text.find(s, begin)) >= 0]
  return min(found, default=-1)
