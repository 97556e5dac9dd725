"""Messages in every usual format, normalised to one; docs/data_formats.md lists the fields that are read and refused.

    {"role": "system" | "developer" | "user" | "assistant" | "tool", "content": text, "weight"?: number,
     "reasoning_content"?: text, "tool_calls"?: [{"id"?, "type", "function": {"name", "arguments": {...}}}],
     "tool_call_id"?: text, "name"?: text}

Formats: OpenAI (tools, content parts), ShareGPT (from and value), Anthropic's "Human:" and "Assistant:" texts.  All
functions raise ValueError with one line that names the field.
"""

import json
import re

from llmjax.data.documents import field_names
from llmjax.text.unrendered import REASONING_NAMES

_ASSISTANT = ('assistant', 'gpt', 'chatgpt', 'bard', 'bing', 'claude', 'model', 'bot', 'ai')
_TOOL = ('tool', 'observation', 'function', 'ipython', 'tool_response', 'function_response')
_CALL = ('function_call', 'tool_call')  # ShareGPT: an assistant turn whose text is the tool call.
# The role developer is kept: only some templates have it, and ChatFormat refuses the others.
ROLES = {'system': 'system', 'developer': 'developer', 'user': 'user', 'human': 'user', 'prompter': 'user',
         **dict.fromkeys(_ASSISTANT, 'assistant'), **dict.fromkeys(_TOOL, 'tool'), **dict.fromkeys(_CALL, 'call')}
# Flags of a turn (axolotl's train, ms-swift's loss); those of _NOT_TRAINED are inverted.
_TRAINED, _NOT_TRAINED = ('train', 'training', 'trainable', 'loss'), ('masked', 'mask')
MEDIA = ('image', 'images', 'video', 'videos', 'audio', 'audios', 'attachments', 'files')
# Fields that change the text or what is trained in a way that is not supported.
_REFUSED = {'train_detail': 'trains parts of a message; split the message, or leave it out',
            'loss_scale': 'is not supported; write weight',
            'prefix': 'trains the rest of a message only; leave it out',
            'refusal': 'stands in place of content; write it as content',
            **dict.fromkeys(MEDIA, 'is not text; only text can be trained')}
_TEXT_PARTS = ('text', 'input_text', 'output_text')


def is_empty(value):
  """Return whether a field has no value."""
  return value is None or value is False or (isinstance(value, (str, list, dict)) and not value)


def read_text(value, name):
  """Return text; content parts of text are joined."""
  if isinstance(value, list) and value:
    return ''.join(_part(part, name) for part in value)
  if not isinstance(value, str):
    raise ValueError(f'{name} holds {type(value).__name__}, not text')
  if '\0' in value:
    raise ValueError('NUL byte')
  return value


def _part(part, name):
  if isinstance(part, str):
    return read_text(part, name)
  kind = part.get('type') if isinstance(part, dict) else type(part).__name__
  if kind not in _TEXT_PARTS:
    raise ValueError(f'a part of {name} is {str(kind)[:40]}; only text can be trained')
  return read_text(part.get('text'), name)


def read_objects(value):
  """Convert an object of lists (TFDS) to a list of objects; return other values unchanged."""
  if isinstance(value, dict) and value and all(isinstance(v, list) for v in value.values()):
    return [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]
  return value


def read_messages(value, role=None, ignored=None):
  """Return a list of normalised messages.  value: a list; with a role also text or one message.

  ignored: a dict to which the names of unused fields are added.
  """
  if isinstance(value, str) and role:
    return [{'content': read_text(value, 'content'), 'role': role}]
  value = read_objects(value)
  if isinstance(value, dict) and role:  # chosen and rejected of LLaMA-Factory.
    value = [value]
  if not isinstance(value, list) or not value:
    raise ValueError('messages must be a list of objects with role and content' if role is None else
                     'a prompt or a completion must be text, or a list of messages')
  return _order_results([_message(m, {} if ignored is None else ignored) for m in value])


def _message(message, ignored):
  if not isinstance(message, dict):
    raise ValueError(f'a message must be an object with role and content, not {type(message).__name__}')
  fields = {k: v for k, v in message.items() if v is not None}
  role = _role(fields)
  calls = _calls(fields)
  reasoning = _reasoning(fields, role)
  content = fields.pop('value', None) if 'content' not in fields else fields.pop('content')
  content = '' if content == [] or content is None and (calls or reasoning) else content
  if content is None:
    raise ValueError('a message has no content')
  normalised = {'content': read_text(content, 'content')}
  if role == 'call':
    calls = read_calls(_parse(normalised['content'], 'a function_call'))
    role, normalised = 'assistant', {'content': ''}
  if calls and role != 'assistant':
    raise ValueError(f'tool_calls in a message of the {role}; only the assistant calls tools')
  weight = _weight(fields, role)
  for name in ('tool_call_id', 'name'):
    if not is_empty(fields.get(name)) and fields[name] != role:
      normalised[name] = read_text(fields[name], name)
    fields.pop(name, None)
  if role == 'assistant' and weight and not (normalised['content'] or calls or reasoning):
    raise ValueError('a message of the assistant is empty; leave it out')
  refuse_fields(fields, _REFUSED)
  if 'label' in fields:
    raise ValueError('label in a message; write it in the record')
  for name, field in fields.items():
    if not is_empty(field):
      ignored[f'messages.{field_names([name])}'] = 1
  normalised |= {'role': role, **({'tool_calls': calls} if calls else {}),
                 **({'weight': weight} if weight != 1 else {}),
                 **({'reasoning_content': reasoning} if reasoning else {})}
  return dict(sorted(normalised.items()))


def refuse_fields(fields, refused):
  """Raise ValueError for a field of `refused`, {name: why}, that has a value."""
  for name, why in refused.items():
    if not is_empty(fields.get(name)):
      raise ValueError(f'{name} {why}')


def _role(fields):
  role = fields.pop('role', None)
  role = fields.pop('from', None) if role is None else role
  if role is None:
    raise ValueError('a message has no role')
  name = ROLES.get(read_text(role, 'role').strip().lower())
  if name is None:
    raise ValueError(f'the role {role[:40]!r} is unknown; write system, user, assistant or tool')
  return name


def _weight(fields, role):
  """Return the loss weight of a message: that of its flags, 1 without flags and for other roles than the assistant."""
  weights = {}
  if 'weight' in fields:
    weights['weight'] = weight = fields.pop('weight')
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight <= 1e6:
      raise ValueError(f'the weight of a message must be a number from 0 on, not {str(weight)[:40]}')
  for name in (*_TRAINED, *_NOT_TRAINED):
    if name in fields:
      flag = fields.pop(name)
      if not isinstance(flag, (bool, int)) or flag not in (0, 1):
        raise ValueError(f'{name} of a message must be true or false, not {str(flag)[:40]}')
      weights[name] = int(bool(flag) != (name in _NOT_TRAINED))
  if len({bool(weight) for weight in weights.values()}) > 1:
    raise ValueError(f'{" and ".join(weights)} of a message contradict each other')
  if role != 'assistant':
    if trained := [name for name, weight in weights.items() if weight]:
      raise ValueError(f'{trained[0]} trains a message of the {role}; only the assistant is trained')
    return 1
  return weights.get('weight', min(weights.values(), default=1))


def _reasoning(fields, role):
  values = {name: fields.pop(name) for name in REASONING_NAMES if name in fields}
  texts = {name: read_text(value, name) for name, value in values.items() if not is_empty(value)}
  if texts and role not in ('assistant', 'call'):
    raise ValueError(f'{next(iter(texts))} in a message of the {role}; only the assistant reasons')
  if len(set(texts.values())) > 1:
    raise ValueError(f'{" and ".join(texts)} of a message differ')
  return next(iter(texts.values()), '')


def _calls(fields):
  values = [fields.pop(name) for name in ('tool_calls', 'function_call') if name in fields]
  calls = [read_calls(value) for value in values if not is_empty(value)]
  return calls[0] if calls else []


def read_calls(value):
  """Return a call or a list of calls in the form of OpenAI's tool_calls, with arguments as an object."""
  value = _parse(value, 'tool_calls') if isinstance(value, str) else value
  value = [value] if isinstance(value, dict) else value
  if not isinstance(value, list) or not value:
    raise ValueError('tool_calls must be a list of {"function": {"name", "arguments"}}')
  return [_call(call) for call in value]


def _call(call):
  function = call.get('function', call) if isinstance(call, dict) else None
  if not isinstance(function, dict) or not isinstance(function.get('name'), str) or not function['name']:
    raise ValueError('tool_calls must be a list of {"function": {"name", "arguments"}}')
  if call.get('type') not in (None, 'function'):
    raise ValueError(f'tool_calls of type {str(call["type"])[:40]} are not supported, only function')
  arguments = function.get('arguments', function.get('parameters'))
  if isinstance(arguments, str):
    arguments = _parse(arguments, 'arguments') if arguments.strip() else {}
  else:
    arguments = _without_null(arguments)
  if arguments is not None and not isinstance(arguments, dict):
    raise ValueError('arguments of tool_calls must be an object, or its JSON')
  name = {'id': read_text(call['id'], 'id')} if call.get('id') else {}
  return {**name, 'type': 'function', 'function': {'name': function['name'], 'arguments': arguments or {}}}


def _parse(text, name):
  try:
    return json.loads(text)
  except (ValueError, RecursionError) as e:
    raise ValueError(f'{name} must be JSON ({str(e)[:60]})') from e


def read_tools(value):
  """Return a list of tools or bare functions, or its JSON, in the form of OpenAI's tools."""
  value = _parse(value, 'tools') if isinstance(value, str) else value
  if not isinstance(value, list):
    raise ValueError('tools must be a list of {"type": "function", "function": {...}}')
  return [_tool(tool) for tool in value]


def _tool(tool):
  tool = _parse(tool, 'tools') if isinstance(tool, str) else tool
  function = tool.get('function', tool) if isinstance(tool, dict) else None
  if not isinstance(function, dict) or not isinstance(function.get('name'), str):
    raise ValueError('tools must be a list of {"type": "function", "function": {"name", ...}}')
  tool = tool if 'function' in tool else {'type': 'function', 'function': tool}
  return _without_null(tool)


def _without_null(value):
  """Remove fields that are null: in Parquet every object has the fields of all."""
  if isinstance(value, dict):
    return {k: _without_null(v) for k, v in value.items() if v is not None}
  return [_without_null(v) for v in value] if isinstance(value, list) else value


def _order_results(messages):
  """Return the messages with the results of a turn's tool calls in the order of the calls, matched by id.

  Most templates do not render ids, so that only the order tells which result belongs to which call.
  """
  ordered, calls = [], []
  for message in messages:
    if message['role'] == 'assistant':
      calls = [call['id'] for call in message.get('tool_calls', ()) if 'id' in call]
    name = message.get('tool_call_id') if message['role'] == 'tool' else None
    if name and calls and name not in calls:
      raise ValueError(f'tool_call_id {name[:40]!r} is not the id of a call in the turn before it')
    place = len(ordered)
    while name in calls and place and ordered[place - 1]['role'] == 'tool' and (
        ordered[place - 1].get('tool_call_id') in calls[calls.index(name) + 1:]):
      place -= 1
    ordered.insert(place, message)
  return ordered


_TURN = re.compile(r'(?:^|\n\n)(Human|Assistant):')


def read_dialogue(text):
  """Return the messages of a text of "\\n\\nHuman: ...\\n\\nAssistant: ..." (HH-RLHF), or None for another text."""
  if not isinstance(text, str) or not text.lstrip('\n').startswith('Human:') or '\n\nAssistant:' not in text:
    return None
  parts = _TURN.split(text.strip('\n'))[1:]
  turns = [{'content': read_text(content.strip(), 'content'), 'role': ROLES[role.lower()]}
           for role, content in zip(parts[::2], parts[1::2], strict=True)]
  return turns if turns[-1]['content'] else turns[:-1]  # A prompt ends with an empty turn of the assistant.
