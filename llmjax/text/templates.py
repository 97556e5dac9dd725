r"""Chat templates: messages to text with its special tokens, and which of it the assistant said.

A template is a Jinja program, often a stranger's.  It runs in Jinja's immutable sandbox, in a process of its own
that has no environment variables, may write no file, and ends after a second of CPU time or a gigabyte of memory.

    rendered = Renderer('chatml').render([{'role': 'user', 'content': 'Hello'}, ...])
    ids, mask = rendered.encode(tokenizer)

What a user says never becomes a control token.  The special tokens that stand in the template itself are
replaced by marks that nobody can guess before it runs, and found by them afterwards; a message that has the
same characters keeps them as plain text, which the tokenizer encodes as such.
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

SECONDS = 1.0  # Of CPU time for one conversation.
CHARACTERS = 1_000_000  # Of one conversation.
TEMPLATE_CHARACTERS = 200_000  # Published ones have up to 15,000.
# CPU time decides; a process that gets none, or waits for something, ends after this many times as long.
PATIENCE = 30.0


class TemplateError(ValueError):
  """A template cannot be used, or refuses the messages.  One line."""


@dataclasses.dataclass(frozen=True)
class Template:
  """source: Jinja.  special: the control tokens in it.  bos, eos: what it knows as bos_token and eos_token."""

  source: str
  special: tuple[str, ...]
  bos: str = ''
  eos: str = ''


# Tools in the system message, calls in the assistant's: Hermes's and Qwen's format.
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

# A system message of its own, and what follows it.
_SYSTEM = """\
{%- set system = none %}
{%- set turns = messages %}
{%- if messages and messages[0]['role'] == 'system' %}
{%- set system = messages[0]['content'] %}
{%- set turns = messages[1:] %}
{%- endif %}
"""


def _im(before, reasoning):
  """Returns ChatML: every message is <|im_start|>role\ncontent<|im_end|>\n; the assistant's ends are trained.

  before: what sets another `system`.  Results of tools are the user's, as Qwen has them.
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


# Qwen2.5's: a system message of its own where there is none, and no reasoning.
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

# Gemma knows no system turn: Gemma 3 puts that text before the first user's.  It has no tools.
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

# With the markers that every tokenizer of `llmjax prepare` has.
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
  """A stretch of a rendered conversation.  control: it is one special token; generated: the assistant's."""

  text: str
  control: bool
  generated: bool


@dataclasses.dataclass(frozen=True)
class Rendered:
  """A conversation as pieces, in order."""

  pieces: tuple[Piece, ...]

  @property
  def text(self) -> str:
    """What transformers' apply_chat_template gives.  It no longer tells special tokens from their spelling."""
    return ''.join(piece.text for piece in self.pieces)

  def generated_spans(self) -> list[tuple[int, int]]:
    """Returns (begin, end) in characters of `text` of what the assistant says, end tokens included."""
    spans, at = [], 0
    for piece in self.pieces:
      end = at + len(piece.text)
      if piece.generated and spans and spans[-1][1] == at:
        spans[-1] = (spans[-1][0], end)
      elif piece.generated:
        spans.append((at, end))
      at = end
    return spans

  def encode(self, tokenizer):
    """Returns (ids int32 [n], bool [n] that says which are the assistant's); BOS only where the template has one.

    Raises TemplateError when the tokenizer lacks one of the special tokens.
    """
    parts = self.tokens(tokenizer)
    ids = [np.zeros(0, np.int32), *(part for _, part in parts)]
    mask = [np.zeros(0, bool), *(np.full(len(part), piece.generated) for piece, part in parts)]
    return np.concatenate(ids), np.concatenate(mask)

  def tokens(self, tokenizer):
    """Returns [(Piece, its ids int32 [n])], in order; errors as `encode`."""
    special = tokenizer.special_ids
    if missing := sorted({p.text for p in self.pieces if p.control} - set(special)):
      raise TemplateError(f'the tokenizer has no special token {", ".join(missing)}; it has '
                          f'{", ".join(special)}: use the template llmjax, or a tokenizer that was '
                          f'trained with --config.tokenizer.special={",".join(missing)}')
    return [(piece, np.asarray([special[piece.text]] if piece.control else tokenizer.encode(piece.text), np.int32))
            for piece in self.pieces]


class Renderer:
  """Renders conversations by one template.  Its process starts at first use; `close` or `with` ends it.

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
    # Nothing that is rendered can hold these: they are drawn anew for each renderer.
    nonce = secrets.token_hex(16)
    self._special = tuple(dict.fromkeys((*template.special, *filter(None, (template.bos, template.eos)))))
    self._marks = {token: f'\x02{nonce}:{i}\x03' for i, token in enumerate(self._special)}
    self._generation = (f'\x02{nonce}:begin\x03', f'\x02{nonce}:end\x03')
    self._pattern = re.compile(f'\x02{nonce}:([0-9]+|begin|end)\x03')
    longest_first = sorted(self._special, key=len, reverse=True)
    pattern = '|'.join(map(re.escape, longest_first)) or '(?!)'
    self._source = re.sub(pattern, lambda m: self._marks[m[0]], template.source)

  def render(self, messages, tools=None, *, add_generation_prompt=False, **values) -> Rendered:
    """Returns the conversation.

    messages: [{'role': str, 'content': str, ...}]; tools: OpenAI's list of them; values: further variables.
    """
    problem = _wrong_messages(messages)
    if problem:
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
    """Ends the process."""
    if self._process is not None:
      self._process.kill()
      self._process.wait()
      for pipe in (self._process.stdin, self._process.stdout):
        with contextlib.suppress(OSError):  # Closing flushes what a process that is gone did not read.
          pipe.close()
      self._process, self._read = None, b''

  def __enter__(self):
    return self

  def __exit__(self, *unused):
    self.close()

  def __del__(self):
    self.close()

  def _limit(self, messages):
    # Marks are longer than their tokens: those of the template's own must not count against it.
    return self.characters + 64 * (8 * len(messages) + 16)

  def _pieces(self, text):
    """Yields the pieces of what the process has rendered."""
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
          raise TemplateError('the chat template cannot be used: {% generation %} stands within another')
        generated = mark == 'begin'
      at = match.end() if match else at

  def _ask(self, request):
    """Returns the process's answer to a request; a process that fails is ended, and the next one is fresh."""
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
    """Writes a request and returns the line that comes back."""
    # One way after the other: the process reads all of a request before it writes.
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
          raise TemplateError(f'the chat template cannot be used: {self._why_it_ended()}')
        self._read += data
        if len(self._read) > 12 * self.characters + (1 << 20):  # An escaped character takes 12 bytes.
          raise TemplateError('the chat template cannot be used: it makes too much text')
    line, self._read = self._read.split(b'\n', 1)
    return line

  def _why_it_ended(self):
    code = self._process.wait()
    if code == -signal.SIGPROF:
      return f'it takes more than {self.seconds:g} s of CPU time'
    return f'its process ended with {code}'


def _start(seconds):
  """Returns the process that renders.  Its environment holds no variable of the user's: no secret can leak."""
  if importlib.util.find_spec('jinja2') is None:
    raise TemplateError('chat templates need the package jinja2: pip install jinja2')
  worker = pathlib.Path(__file__).with_name('render_worker.py')
  environment = {'PYTHONPATH': os.pathsep.join(p for p in sys.path if p), 'PYTHONIOENCODING': 'utf-8'}
  # -P: not the folder of the script, whose modules are llmjax's.
  return subprocess.Popen([sys.executable, '-P', '-s', str(worker), str(seconds)], env=environment, bufsize=0,
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)


def _wrong_messages(messages):
  """Returns what is wrong with a conversation, or ''."""
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
