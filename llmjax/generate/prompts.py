"""Prompts of `llmjax generate`: from flags, a file, standard input or a terminal to token ids."""

import pathlib
import sys

import numpy as np

from llmjax import config
from llmjax.config import ConfigError
from llmjax.generate.spec import CHAT_TEMPLATE
from llmjax.text.chat import ChatFormat
from llmjax.text.templates import TemplateError


class TextPrompt:
  """Encodes prompts for a model of plain text.  stop_ids: tokens that end its completion."""

  def __init__(self, tokenizer):
    self.tokenizer, self.stop_ids = tokenizer, (tokenizer.eos_id,)

  def __enter__(self):
    return self

  def __exit__(self, *unused):
    pass

  def encode(self, messages, source='the prompt'):
    """Return the token ids of messages, from the beginning of the sequence on.  source: for the ConfigError."""
    try:
      return self._encode(messages)
    except (TemplateError, UnicodeEncodeError) as e:
      raise ConfigError([f'{source} cannot be encoded: {config.one_line(e)}']) from e

  def _encode(self, messages):
    text = '\n\n'.join(message['content'] for message in messages)
    return np.concatenate([[self.tokenizer.bos_id], self.tokenizer.encode(text)])

  def add_turn(self, prompt, completion):
    """Record a prompt and its completion, which later prompts follow."""


class ChatPrompt(TextPrompt):
  """Encodes prompts for a chat model: each follows the earlier turns of the conversation."""

  def __init__(self, chat, system=''):
    self.chat, self.stop_ids = chat, chat.stop_ids
    self.messages = [{'role': 'system', 'content': system}] if system else []

  def __exit__(self, *unused):
    self.chat.close()

  def _encode(self, messages):
    return self.chat.prompt([*self.messages, *messages])

  def add_turn(self, prompt, completion):
    self.messages += [{'role': 'user', 'content': prompt}, {'role': 'assistant', 'content': completion}]


def make_prompter(options, tokenizer):
  """Return the ChatPrompt or TextPrompt that GenerateOptions ask for."""
  if not options.chat:
    return TextPrompt(tokenizer)
  return ChatPrompt(load_chat(options.workdir, tokenizer, '--chat'), options.system)


def load_chat(workdir, tokenizer, flag):
  """Return the ChatFormat of a run; raise ConfigError, which names the flag that asked for it, if it has none."""
  file = pathlib.Path(workdir) / CHAT_TEMPLATE
  if not file.exists():
    raise ConfigError([f'{flag}: {workdir} was not trained on conversations (no {CHAT_TEMPLATE}); give a run of '
                       '`llmjax finetune`'])
  try:
    return ChatFormat.load(file, tokenizer)
  except (OSError, ValueError, KeyError, TypeError) as e:
    raise ConfigError([f'{flag}: {file} cannot be used: {config.one_line(e)}']) from e


def read_given_prompt(options):
  """Return the prompt of the flags or of standard input; None if standard input is a terminal."""
  if options.prompt:
    return options.prompt
  if options.prompt_file:
    try:
      return pathlib.Path(options.prompt_file).read_text(encoding='utf-8')
    except OSError as e:
      raise ConfigError([f'--prompt_file={options.prompt_file} cannot be read: {e.strerror}; give a text file, or '
                         '--prompt=TEXT']) from e
    except UnicodeDecodeError as e:
      raise ConfigError([f'--prompt_file={options.prompt_file} is not UTF-8 (byte {e.start}); save it as '
                         'UTF-8']) from e
  if sys.stdin is None or not sys.stdin.isatty():
    return sys.stdin.read().removesuffix('\n') if sys.stdin else ''  # `echo` adds the newline.
  return None


def typed_prompts():
  """Yield lines typed at the terminal until Ctrl-D."""
  try:
    import readline  # noqa: F401  Editing and history, where the platform has them.
  except ImportError:
    pass
  print('type a prompt; Ctrl-D ends', file=sys.stderr)
  while True:
    try:
      yield input('> ')
    except EOFError:
      print(file=sys.stderr)
      return
