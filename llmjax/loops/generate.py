"""`llmjax generate`: text from a run's model, streamed to the terminal."""

import contextlib
import json
import os
import pathlib
import re
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np

from llmjax import config
from llmjax.checkpoint.load import load_params, read_config
from llmjax.config import ConfigError
from llmjax.data import stream
from llmjax.data.records import read_prompt, read_records
from llmjax.generate.decode import CHUNK, STREAM_CHUNK, Generator
from llmjax.generate.spec import ANSWERS, CHAT_TEMPLATE
from llmjax.generate.stops import TextStream
from llmjax.model.model import Model
from llmjax.parallel import distributed
from llmjax.parallel.mesh import fitting_mesh
from llmjax.parallel.sharding import tree_shardings
from llmjax.parallel.spec import DistributedSpec
from llmjax.run.compile_time import Stopwatch
from llmjax.run.spec import EvaluatedSpec, FinishedSpec, of_run
from llmjax.run.workdir import enable_compilation_cache
from llmjax.text.chat import ChatFormat
from llmjax.text.templates import TemplateError
from llmjax.text.tokenizer import Tokenizer

DIM, PLAIN = '\x1b[2m', '\x1b[0m'
ROWS = 32  # Prompts of a file at a time.
REASONS = {'end': 'the model ended the text', 'stop': 'stop text {!r}', '': 'max_new_tokens'}


def run(spec, options):
  """Answers the prompts that the options name, or those typed at the prompt line."""
  del spec  # The run's own config.json is the config, but for where its processes were.
  with distributed.together(DistributedSpec()), contextlib.ExitStack() as stack:
    if jax.distributed.is_initialized() and not distributed.is_first():  # All compute, one speaks.
      silence = stack.enter_context(open(os.devnull, 'w'))
      stack.enter_context(contextlib.redirect_stdout(silence))
      stack.enter_context(contextlib.redirect_stderr(silence))
    return _generate(options)


def _generate(options):
  kept = (pathlib.Path(options.workdir) / 'tokenizer.model').exists()  # Then the corpus may be elsewhere.
  run_spec = of_run(FinishedSpec if kept else EvaluatedSpec, read_config(options.workdir))
  asked = options.prompts and read_records(
      options.prompts, lambda record: (read_prompt(record), record.get('answer', record.get('output'))))
  prompt = None if asked else _given_prompt(options)
  enable_compilation_cache(run_spec.train.compilation_cache)
  generator, tokenizer, step = load_generator(options, run_spec)
  print(f'llmjax generate: step {step} of {options.workdir}', file=sys.stderr)
  if hasattr(sys.stdout, 'reconfigure'):
    sys.stdout.reconfigure(errors='replace')  # A terminal that cannot show a character shows '?'.
  key = jax.random.key(options.seed)
  with _conversation(options, tokenizer) as ask:
    if asked:
      _answer_file(generator, tokenizer, asked, options, key, ask, step)
      return 0
    if prompt is not None:
      answer(generator, tokenizer, prompt, options, key, ask=ask)
      return 0
    for count, typed in enumerate(_typed_prompts()):
      rows, texts = answer(generator, tokenizer, typed, options, jax.random.fold_in(key, count), ask=ask)
      ask.went_on(typed, texts[0])
  return 0


class Continuation:
  """How a model that goes on with texts is asked.  stop_ids: tokens that end its answer."""

  def __init__(self, tokenizer):
    self.tokenizer, self.stop_ids = tokenizer, (tokenizer.eos_id,)

  def __enter__(self):
    return self

  def __exit__(self, *unused):
    pass

  def encode(self, prompt):
    """Returns the ids that stand before the answer."""
    return np.concatenate([[self.tokenizer.bos_id], self.tokenizer.encode(prompt)])

  def encode_messages(self, messages):
    """Returns the same of messages."""
    return self.encode('\n\n'.join(message['content'] for message in messages))

  def went_on(self, prompt, answer):
    """Notes what was said."""


class Conversation(Continuation):
  """The same of a model that answers messages: every prompt comes after what was said before."""

  def __init__(self, chat, system=''):
    self.chat, self.stop_ids = chat, chat.stop_ids
    self.messages = [{'role': 'system', 'content': system}] if system else []

  def __exit__(self, *unused):
    self.chat.close()

  def encode(self, prompt):
    return self.encode_messages([{'role': 'user', 'content': prompt}])

  def encode_messages(self, messages):
    return self.chat.prompt([*self.messages, *messages])

  def went_on(self, prompt, answer):
    self.messages += [{'role': 'user', 'content': prompt}, {'role': 'assistant', 'content': answer}]


def _conversation(options, tokenizer):
  """Returns how to ask the run's model: as the options say, with the template that the run keeps."""
  if not options.chat:
    return Continuation(tokenizer)
  return Conversation(load_chat(options.workdir, tokenizer, '--chat'), options.system)


def load_chat(workdir, tokenizer, setting):
  """Returns the ChatFormat that a run keeps; raises ConfigError, which names the setting that asked for it."""
  file = pathlib.Path(workdir) / CHAT_TEMPLATE
  if not file.exists():
    raise ConfigError([f'{setting}: {workdir} was not trained on conversations (no {CHAT_TEMPLATE}); give a run of '
                       '`llmjax finetune`'])
  try:
    return ChatFormat.load(file, tokenizer)
  except (OSError, ValueError, KeyError, TypeError) as e:
    raise ConfigError([f'{setting}: {file} cannot be used: {config.one_line(e)}']) from e


def load_generator(options, run_spec):
  """Returns (Generator, Tokenizer, step) of the run, sharded as in training."""
  mesh = fitting_mesh(run_spec.mesh)
  params, model, _, step = load_params(
      options.workdir, options.step,
      shardings=lambda model: tree_shardings(mesh, Model(model).param_names()))
  kept = pathlib.Path(options.workdir) / 'tokenizer.model'
  tokenizer = Tokenizer(kept) if kept.exists() else stream.load_tokenizer(run_spec.data)
  # CPUs have no fast bf16 product, so float32 costs nothing there and is closer to the truth.
  on_cpu = mesh.devices.flat[0].platform == 'cpu'
  dtype = jnp.float32 if on_cpu else jnp.dtype(run_spec.train.compute_dtype)
  generator = Generator(model, params, dtype, mesh, bos_id=tokenizer.bos_id,
                        vocab_size=tokenizer.vocab_size, context_length=run_spec.data.seq_len)
  return generator, tokenizer, step


def answer(generator, tokenizer, prompt, options, key, output=None, ask=None):
  """Writes options.num_samples answers to one prompt; returns (their TextStreams, their texts).

  ask: a Continuation or Conversation; None goes on with the prompt.
  """
  output, ask = output or sys.stdout, ask or Continuation(tokenizer)
  try:
    ids = ask.encode(prompt)
  except UnicodeEncodeError as e:
    raise ConfigError([f'the prompt is not valid UTF-8: {e}']) from e
  except TemplateError as e:
    raise ConfigError([f'the prompt cannot be asked: {e}']) from e
  if message := generator.past_training(len(ids), options.max_new_tokens):
    print(f'llmjax generate: {message}', file=sys.stderr)
    warnings.filterwarnings('ignore', re.escape(message))
  live = options.stream and options.num_samples == 1 and not options.json
  show = _Display(output, prompt + '\n' * isinstance(ask, Conversation))
  rows = [TextStream(tokenizer, options.stop_texts, ask.stop_ids)
          for _ in range(options.num_samples)]
  texts = ['' for _ in rows]
  if live:
    show.prompt()
  watch, times, made = Stopwatch(), [], []
  for tokens, logprobs, counts in generator.stream(
      [ids] * len(rows), options.max_new_tokens, options, key, ask.stop_ids,
      chunk=STREAM_CHUNK if live or options.stop else CHUNK):
    times.append(watch.seconds)
    made.append(int(counts.sum()))
    for i, row in enumerate(rows):
      piece = row.add(tokens[i, :counts[i]], logprobs[i, :counts[i]])
      texts[i] += piece
      if live:
        show.completion(piece)
    if all(row.stopped for row in rows):
      break
  for i, row in enumerate(rows):
    rest = row.finish()
    texts[i] += rest
    if options.json:
      print(json.dumps(_record(prompt, texts[i], row), ensure_ascii=False), file=output)
    elif live:
      show.completion(rest)
      show.end()
    else:
      if len(rows) > 1:
        print(f'--- {i + 1} of {len(rows)}', file=output)
      show.prompt()
      show.completion(texts[i])
      show.end()
  output.flush()
  reasons = ', '.join(dict.fromkeys(REASONS[row.stopped].format(row.stop_text) for row in rows))
  print(f'{sum(len(row.tokens) for row in rows)} tokens; {describe_speed(times, made, watch.compiling)}; '
        f'stopped by: {reasons}', file=sys.stderr)
  return rows, texts


def describe_speed(times, made, compiling):
  """Returns '0.05 s to the first token, then 589 tokens/s; compiled in 20.1 s'.

  times: seconds from the start to each piece, without those of compiling.  made: tokens in it, of all rows together.
  """
  parts = [f'{times[0]:.2g} s to the first token']
  if len(times) > 1:
    parts.append(f'then {sum(made[1:]) / max(times[-1] - times[0], 1e-9):.3g} tokens/s')
  return ', '.join(parts) + (f'; compiled in {compiling:.1f} s' if compiling >= 0.05 else '')


def _answer_file(generator, tokenizer, asked, options, key, ask, step):
  """Writes an answer to each of the prompts into the run's answers.jsonl, in one move.

  asked: [(messages, the right answer or None)].
  """
  lines = []
  keys = jax.vmap(jax.random.fold_in, (None, 0))(key, np.arange(len(asked)))  # Of its own, whatever stands beside it.
  for first in range(0, len(asked), ROWS):
    part = asked[first:first + ROWS]
    try:
      ids = [ask.encode_messages(messages) for messages, _ in part]
    except (TemplateError, UnicodeEncodeError) as e:
      raise ConfigError([f'--prompts={options.prompts}: {config.one_line(e)}']) from e
    made = generator.generate(ids, options.max_new_tokens, options, keys[first:first + ROWS], ask.stop_ids)
    for (messages, right), tokens, logprobs, length in zip(part, *made, strict=True):
      row = TextStream(tokenizer, options.stop_texts, ask.stop_ids)
      text = row.add(tokens[:length], logprobs[:length]) + row.finish()
      lines.append({'prompt': messages[-1]['content'], 'text': text, 'right': right, 'tokens': len(row.tokens),
                    'stopped': row.stopped or 'length', 'chat': options.chat, 'temperature': options.temperature,
                    'step': step})
  file = pathlib.Path(options.workdir) / ANSWERS
  partial = file.with_suffix('.partial')
  partial.write_text(''.join(json.dumps(line, ensure_ascii=False) + '\n' for line in lines), encoding='utf-8')
  os.replace(partial, file)
  ended = sum(line['stopped'] == 'end' for line in lines)
  print(f'{file}: {len(lines)} answers, {ended} ended by the model')


def _record(prompt, text, row):
  return {'prompt': prompt, 'text': text, 'tokens': row.tokens,
          'logprobs': [round(p, 6) for p in row.logprobs], 'stopped': row.stopped or 'length',
          'stop_text': row.stop_text or None}


class _Display:
  """The prompt, dim on a terminal, and the completion after it."""

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
      # What a model says must not move the cursor or change the title of the window.
      text = ''.join(c if c.isprintable() or c in '\n\t' else '\ufffd' for c in text)
    if text:
      self._output.write(before + text + after)
      self._output.flush()


def _given_prompt(options):
  """Returns the prompt of the flags or of standard input; None when a person sits at a terminal."""
  if options.prompt:
    return options.prompt
  if options.prompt_file:
    try:
      return pathlib.Path(options.prompt_file).read_text(encoding='utf-8')
    except OSError as e:
      raise ConfigError([f'--prompt_file={options.prompt_file} cannot be read: {e.strerror}; give '
                         'a text file, or --prompt=TEXT']) from e
    except UnicodeDecodeError as e:
      raise ConfigError([f'--prompt_file={options.prompt_file} is not UTF-8 (byte {e.start}); save '
                         'it as UTF-8']) from e
  if sys.stdin is None or not sys.stdin.isatty():
    # `echo` ends what it says with a newline that nobody means.
    return sys.stdin.read().removesuffix('\n') if sys.stdin else ''
  return None


def _typed_prompts():
  """Yields lines typed at the terminal until Ctrl-D."""
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
