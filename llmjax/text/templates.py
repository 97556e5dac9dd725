r"""Chat templates: render messages as text, with the special tokens and the text that the assistant generates.

A template is a Jinja program that may come from anyone.  It is rendered in Jinja's immutable sandbox, in a process
without environment variables that cannot write files and is limited to a second of CPU time and a gigabyte of memory.

    rendered = Renderer('chatml').render([{'role': 'user', 'content': 'Hello'}, ...])
    pieces = rendered.tokens(tokenizer)

The text of a message never becomes a control token.  The special tokens in the template are replaced by random marks
before rendering, and found by them afterwards; a message with the same characters is encoded as plain text.
"""

import contextlib
import dataclasses
import importlib.util
import json
import os
import pathlib
import re
import secrets
import select
import signal
import subprocess
import sys
import time

import numpy as np

SECONDS = 1.0  # CPU time for one conversation.
CHARACTERS = 1_000_000  # Of one conversation.
TEMPLATE_CHARACTERS = 200_000  # Published templates have up to 15,000.
# A process that is blocked or gets no CPU time is ended after this many times SECONDS of wall time.
PATIENCE = 30.0


class TemplateError(ValueError):
  """A template cannot be used, or rejects the messages.  The message is one line."""


@dataclasses.dataclass(frozen=True)
class Template:
  """source: Jinja.  special: control tokens that occur in it.  bos, eos: its variables bos_token and eos_token."""

  source: str
  special: tuple[str, ...]
  bos: str = ''
  eos: str = ''


# Tools in the system message, calls in the assistant's, in the format of Hermes and Qwen.
_TOOLS = """\
{{- '# Tools\\n\\nYou may call one or more functions to assist with the user query.\\n\\n' }}
{{- 'You are provided with function signatures within <tools></tools> XML tags:\\n<tools>' }}
{%- for tool in tools %}{{ '\\n' + tool | tojson }}{% endfor %}
{{- '\\n</tools>\\n\\nFor each function call, return a json object with function name and arguments within ' }}
{{- '<tool_call></tool_call> XML tags:\\n<tool_call>\\n' }}
{{- '{"name": <function-name>, "arguments": <args-json-object>}\\n</tool_call>' }}
"""
_CALLS = """\
{%- for call in message.tool_calls or [] %}
{{- '' if loop.first and not message['content'] else '\\n' }}
{{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments | tojson + '}\\n</tool_call>' }}
{%- endfor %}
"""
_REASONING = """\
{%- if message.reasoning_content %}{{ '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' }}{% endif %}
"""

# Splits messages into the system message and the rest.
_SYSTEM = """\
{%- set system = none %}
{%- set turns = messages %}
{%- if messages and messages[0]['role'] == 'system' %}
{%- set system = messages[0]['content'] %}
{%- set turns = messages[1:] %}
{%- endif %}
"""


def _im(before, reasoning):
  """Return a ChatML template: every message is <|im_start|>role\ncontent<|im_end|>\n.

  before: Jinja that changes `system`.  reasoning: Jinja that renders reasoning.  Results of tools are user messages, as
  in Qwen.
  """
  return _SYSTEM + before + """\
{%- if tools %}
{{- '<|im_start|>system\\n' + (system + '\\n\\n' if system else '') }}
""" + _TOOLS + """\
{{- '<|im_end|>\\n' }}
{%- elif system is not none %}
{{- '<|im_start|>system\\n' + system + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in turns %}
{%- if message['role'] == 'assistant' %}
{{- '<|im_start|>assistant\\n' }}
{%- generation %}
""" + reasoning + "{{- message['content'] }}\n" + _CALLS + """\
{{- '<|im_end|>' }}
{%- endgeneration %}
{{- '\\n' }}
{%- elif message['role'] == 'tool' %}
{%- if loop.first or loop.previtem['role'] != 'tool' %}{{ '<|im_start|>user' }}{% endif %}
{{- '\\n<tool_response>\\n' + message['content'] + '\\n</tool_response>' }}
{%- if loop.last or loop.nextitem['role'] != 'tool' %}{{ '<|im_end|>\\n' }}{% endif %}
{%- elif message['role'] in ('user', 'system') %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- else %}
{{- raise_exception('the role must be system, user, assistant or tool') }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""


# Qwen2.5: a default system message, and no reasoning.
_QWEN = """\
{%- if messages and system is none %}
{%- set system = 'You are Qwen, created by Alibaba Cloud. You are a helpful assistant.' %}
{%- endif %}
"""

# Llama 3 has no tools; Llama 3.1 does.
_LLAMA3 = """\
{{- bos_token }}
{%- for message in messages %}
{%- if message['role'] not in ('system', 'user', 'assistant') %}
{{- raise_exception('the role must be system, user or assistant') }}
{%- endif %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
{%- if message['role'] == 'assistant' %}
{%- generation %}{{ message['content'] | trim + '<|eot_id|>' }}{% endgeneration %}
{%- else %}
{{- message['content'] | trim + '<|eot_id|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}
"""

# Gemma has no system turn and no tools; Gemma 3 puts the system message before the first user message.
_GEMMA = """\
{{- bos_token }}
{%- set system = '' %}
{%- set turns = messages %}
{%- if messages and messages[0]['role'] == 'system' %}
{%- set system = messages[0]['content'] | trim + '\\n\\n' %}
{%- set turns = messages[1:] %}
{%- endif %}
{%- for message in turns %}
{%- if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') %}
{{- raise_exception('user and assistant must take turns, the user first') }}
{%- endif %}
{%- if message['role'] == 'assistant' %}
{{- '<start_of_turn>model\\n' }}
{%- generation %}{{ message['content'] | trim + '<end_of_turn>' }}{% endgeneration %}
{%- else %}
{{- '<start_of_turn>user\\n' + (system if loop.first else '') + message['content'] | trim + '<end_of_turn>' }}
{%- endif %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}
"""

# Uses the markers that every tokenizer of `llmjax prepare` has.
_OWN = _SYSTEM + """\
{%- if tools %}
{{- '<|system|>' + (system + '\\n\\n' if system else '') }}
""" + _TOOLS + """\
{{- '<|end|>' }}
{%- elif system is not none %}
{{- '<|system|>' + system + '<|end|>' }}
{%- endif %}
{%- for message in turns %}
{%- if message['role'] not in ('system', 'user', 'assistant', 'tool') %}
{{- raise_exception('the role must be system, user, assistant or tool') }}
{%- endif %}
{%- if message['role'] == 'assistant' %}
{{- '<|assistant|>' }}
{%- generation %}
""" + _REASONING + "{{- message['content'] }}\n" + _CALLS + """\
{{- '<|end|>' }}
{%- endgeneration %}
{%- else %}
{{- {'system': '<|system|>', 'user': '<|user|>', 'tool': '<|tool|>'}[message['role']] }}
{{- message['content'] + '<|end|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}
"""

TEMPLATES = {
    'llmjax': Template(_OWN, ('<|system|>', '<|user|>', '<|assistant|>', '<|tool|>', '<|end|>'), '<s>', '<|end|>'),
    'chatml': Template(_im('', _REASONING), ('<|im_start|>', '<|im_end|>'), '', '<|im_end|>'),
    'qwen': Template(_im(_QWEN, ''), ('<|im_start|>', '<|im_end|>'), '', '<|im_end|>'),
    'llama3': Template(_LLAMA3, ('<|begin_of_text|>', '<|start_header_id|>', '<|end_header_id|>', '<|eot_id|>'),
                       '<|begin_of_text|>', '<|eot_id|>'),
    'gemma': Template(_GEMMA, ('<bos>', '<eos>', '<start_of_turn>', '<end_of_turn>'), '<bos>', '<eos>'),
}


@dataclasses.dataclass(frozen=True)
class Piece:
  """A part of a rendered conversation.  control: it is one special token.  generated: by the assistant."""

  text: str
  control: bool
  generated: bool


@dataclasses.dataclass(frozen=True)
class Rendered:
  """A rendered conversation as pieces, in order."""

  pieces: tuple[Piece, ...]

  @property
  def text(self) -> str:
    """The output of transformers' apply_chat_template, where special tokens and their spelling look the same."""
    return ''.join(piece.text for piece in self.pieces)

  def tokens(self, tokenizer):
    """Return [(Piece, ids int32 [n])], in order.  BOS is included only where the template has it.

    Raises TemplateError where the tokenizer lacks one of the special tokens.
    """
    special = tokenizer.special_ids
    if missing := sorted({p.text for p in self.pieces if p.control} - set(special)):
      raise TemplateError(f'the tokenizer has no special token {", ".join(missing)}; it has '
                          f'{", ".join(special)}: use the template llmjax, or a tokenizer that was '
                          f'trained with --config.tokenizer.special={",".join(missing)}')
    return [(piece, np.asarray([special[piece.text]] if piece.control else tokenizer.encode(piece.text), np.int32))
            for piece in self.pieces]


class Renderer:
  """Renders conversations with one template.  Its process starts at first use; `close` or `with` ends it.

  template: a name of TEMPLATES, or a Template.  Raises TemplateError.
  """

  _process = None

  def __init__(self, template, *, seconds=SECONDS, characters=CHARACTERS):
    if not isinstance(template, Template):
      if template not in TEMPLATES:
        raise TemplateError(f'there is no chat template {template!r}; write one of {", ".join(TEMPLATES)}')
      template = TEMPLATES[template]
    if len(template.source) > TEMPLATE_CHARACTERS:
      raise TemplateError(f'the chat template has more than {TEMPLATE_CHARACTERS} characters')
    self.template, self.seconds, self.characters = template, seconds, characters
    self._process, self._read = None, b''
    # Random for each renderer, so that no message can contain the marks.
    nonce = secrets.token_hex(16)
    self._special = tuple(dict.fromkeys((*template.special, *filter(None, (template.bos, template.eos)))))
    self._marks = {token: f'\x02{nonce}:{i}\x03' for i, token in enumerate(self._special)}
    self._generation = (f'\x02{nonce}:begin\x03', f'\x02{nonce}:end\x03')
    self._pattern = re.compile(f'\x02{nonce}:([0-9]+|begin|end)\x03')
    longest_first = sorted(self._special, key=len, reverse=True)
    pattern = '|'.join(map(re.escape, longest_first)) or '(?!)'
    self._source = re.sub(pattern, lambda m: self._marks[m[0]], template.source)

  def render(self, messages, tools=None, *, add_generation_prompt=False, **values) -> Rendered:
    """Render a conversation.

    messages: [{'role': str, 'content': str, ...}].  tools: OpenAI's list.  values: further variables of the template.
    """
    if problem := _message_problem(messages):
      raise TemplateError(problem)
    values = {'documents': None, **values, 'messages': messages, 'tools': tools or None,
              'add_generation_prompt': add_generation_prompt, 'bos_token': self._marks.get(self.template.bos, ''),
              'eos_token': self._marks.get(self.template.eos, '')}
    try:
      request = json.dumps({'template': self._source, 'values': values, 'marks': self._generation,
                            'characters': self._limit(messages)}, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as e:
      raise TemplateError(f'the messages are not plain JSON: {str(e)[:200]}') from e
    reply = self._ask(request)
    if 'error' in reply:
      raise TemplateError(f'the chat template cannot be used: {reply["error"]}')
    return Rendered(tuple(self._pieces(reply['text'])))

  def close(self):
    """End the process."""
    if self._process is not None:
      self._process.kill()
      self._process.wait()
      for pipe in (self._process.stdin, self._process.stdout):
        with contextlib.suppress(OSError):  # Closing flushes data to a process that has ended.
          pipe.close()
      self._process, self._read = None, b''

  def __enter__(self):
    return self

  def __exit__(self, *unused):
    self.close()

  def __del__(self):
    self.close()

  def _limit(self, messages):
    # Marks are longer than the tokens for which they stand.
    return self.characters + 64 * (8 * len(messages) + 16)

  def _pieces(self, text):
    """Split the rendered text at the marks; yield Pieces."""
    at, generated, size = 0, False, 0
    for match in [*self._pattern.finditer(text), None]:
      plain = text[at:match.start() if match else len(text)]
      mark = match[1] if match else ''
      control = self._special[int(mark)] if mark.isdigit() else ''
      size += len(plain) + len(control)
      if size > self.characters:
        raise TemplateError(f'the chat template cannot be used: it makes more than {self.characters} characters')
      if plain:
        yield Piece(plain, False, generated)
      if control:
        yield Piece(control, True, generated)
      elif mark:
        if generated == (mark == 'begin'):
          raise TemplateError('the chat template cannot be used: {% generation %} is nested')
        generated = mark == 'begin'
      at = match.end() if match else at

  def _ask(self, request):
    """Return the reply of the process to a request; a process that fails is ended and started anew."""
    if self._process is None:
      self._process = _start(self.seconds)
    try:
      line = self._exchange(request + b'\n')
      return json.loads(line)
    except TemplateError:
      self.close()
      raise
    except (OSError, ValueError) as e:
      self.close()
      raise TemplateError('the chat template cannot be used: its process ended') from e
    except BaseException:
      self.close()
      raise

  def _exchange(self, request):
    """Write a request and return the line of the reply."""
    # The process reads the whole request before it writes.
    pipe_in, pipe_out = self._process.stdin.fileno(), self._process.stdout.fileno()
    deadline = time.monotonic() + PATIENCE * max(self.seconds, 1.0)
    sent = memoryview(request)
    while b'\n' not in self._read:
      left = deadline - time.monotonic()
      ready = select.select([pipe_out], [pipe_in] if sent else [], [], max(left, 0))
      if left <= 0 or not (ready[0] or ready[1]):
        raise TemplateError(f'the chat template cannot be used: no answer in {PATIENCE:.0f} s')
      if ready[1]:
        with contextlib.suppress(BrokenPipeError):
          sent = sent[os.write(pipe_in, sent[:1 << 16]):]
          continue
        sent = sent[:0]
      if ready[0]:
        data = os.read(pipe_out, 1 << 20)
        if not data:
          raise TemplateError(f'the chat template cannot be used: {self._exit_reason()}')
        self._read += data
        if len(self._read) > 12 * self.characters + (1 << 20):  # An escaped character takes 12 bytes.
          raise TemplateError('the chat template cannot be used: it makes too much text')
    line, self._read = self._read.split(b'\n', 1)
    return line

  def _exit_reason(self):
    code = self._process.wait()
    if code == -signal.SIGPROF:
      return f'it takes more than {self.seconds:g} s of CPU time'
    return f'its process ended with {code}'


def _start(seconds):
  """Start the worker process.  It gets none of the user's environment variables, so that no secret can leak."""
  if importlib.util.find_spec('jinja2') is None:
    raise TemplateError('chat templates need the package jinja2: pip install jinja2')
  worker = pathlib.Path(__file__).with_name('render_worker.py')
  environment = {'PYTHONPATH': os.pathsep.join(p for p in sys.path if p), 'PYTHONIOENCODING': 'utf-8'}
  # -P: do not put the folder of the script, with llmjax's modules, on the search path.
  return subprocess.Popen([sys.executable, '-P', '-s', str(worker), str(seconds)], env=environment, bufsize=0,
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)


def _message_problem(messages):
  """Return the problem with a conversation, or ''."""
  if not isinstance(messages, (list, tuple)):
    return f'messages must be a list of {{"role", "content"}}, not {type(messages).__name__}'
  for number, message in enumerate(messages):
    if not isinstance(message, dict):
      return f'message {number} must be an object with role and content, not {type(message).__name__}'
    for field in ('role', 'content'):
      if not isinstance(message.get(field), str):
        return f'message {number} must have the text field {field!r}, not {type(message.get(field)).__name__}'
    try:
      json.dumps(message, ensure_ascii=False).encode()
    except UnicodeEncodeError:
      return f'message {number} is not valid UTF-8 (a lone surrogate)'
    except (TypeError, ValueError, RecursionError) as e:
      return f'the messages are not plain JSON: {str(e)[:200]}'
  return ''
