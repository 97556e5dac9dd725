"""`llmjax generate`: sample text from a run, streamed to the terminal."""

import contextlib
import json
import os
import pathlib
import re
import sys
import warnings

import jax
import numpy as np

from llmjax.checkpoint.load import read_config
from llmjax.data.records import read_prompt, read_records
from llmjax.generate.decode import CHUNK, STREAM_CHUNK
from llmjax.generate.load import TOKENIZER, load_generator
from llmjax.generate.output import Display, describe_end, describe_speed, show_rows
from llmjax.generate.prompts import ChatPrompt, make_prompter, read_given_prompt, typed_prompts
from llmjax.generate.spec import ANSWERS
from llmjax.generate.stops import TextStream
from llmjax.parallel import distributed
from llmjax.parallel.spec import DistributedSpec
from llmjax.run.compile_time import Stopwatch
from llmjax.run.saved_run import EvaluatedRunSpec, SavedRunSpec, spec_of_run
from llmjax.run.workdir import enable_compilation_cache

ROWS = 32  # Prompts of a file in a batch.


def run(spec, options):
  """Complete the prompts of the GenerateOptions, or those typed at the terminal."""
  del spec  # The run's own config.json counts.
  with distributed.together(DistributedSpec()), contextlib.ExitStack() as stack:
    if jax.distributed.is_initialized() and not distributed.is_first():  # All compute, process 0 prints.
      silence = stack.enter_context(open(os.devnull, 'w'))
      stack.enter_context(contextlib.redirect_stdout(silence))
      stack.enter_context(contextlib.redirect_stderr(silence))
    return _generate(options)


def _generate(options):
  has_tokenizer = (pathlib.Path(options.workdir) / TOKENIZER).exists()  # Then the corpus need not be there.
  run_spec = spec_of_run(SavedRunSpec if has_tokenizer else EvaluatedRunSpec, read_config(options.workdir))
  records = options.prompts and read_records(
      options.prompts, lambda record: (read_prompt(record), record.get('answer', record.get('output'))))
  prompt = None if records else read_given_prompt(options)
  enable_compilation_cache(run_spec.train.compilation_cache)
  generator, tokenizer, step = load_generator(options, run_spec)
  print(f'llmjax generate: step {step} of {options.workdir}', file=sys.stderr)
  if hasattr(sys.stdout, 'reconfigure'):
    sys.stdout.reconfigure(errors='replace')  # A terminal that cannot show a character shows '?'.
  key = jax.random.key(options.seed)
  with make_prompter(options, tokenizer) as prompter:
    if records:
      _complete_file(generator, tokenizer, records, options, key, prompter, step)
    elif prompt is not None:
      complete(generator, tokenizer, prompt, options, key, prompter)
    else:
      for count, typed in enumerate(typed_prompts()):
        texts = complete(generator, tokenizer, typed, options, jax.random.fold_in(key, count), prompter)
        prompter.add_turn(typed, texts[0])
  return 0


def complete(generator, tokenizer, prompt, options, key, prompter):
  """Write options.num_samples completions of a prompt to standard output; return their texts."""
  ids = prompter.encode([{'role': 'user', 'content': prompt}])
  if message := generator.past_training(len(ids), options.max_new_tokens):
    print(f'llmjax generate: {message}', file=sys.stderr)
    warnings.filterwarnings('ignore', re.escape(message))
  live = options.stream and options.num_samples == 1 and not options.json
  display = Display(sys.stdout, prompt + '\n' * isinstance(prompter, ChatPrompt))
  rows = [TextStream(tokenizer, options.stop_texts, prompter.stop_ids) for _ in range(options.num_samples)]
  texts, times, counts_of_chunks, watch = ['' for _ in rows], [], [], Stopwatch()
  if live:
    display.prompt()
  for tokens, logprobs, counts in generator.stream(
      [ids] * len(rows), options.max_new_tokens, options, key, prompter.stop_ids,
      chunk=STREAM_CHUNK if live or options.stop else CHUNK):
    times.append(watch.seconds)
    counts_of_chunks.append(int(counts.sum()))
    for i, row in enumerate(rows):
      piece = row.add(tokens[i, :counts[i]], logprobs[i, :counts[i]])
      texts[i] += piece
      if live:
        display.completion(piece)
    if all(row.stopped for row in rows):
      break
  for i, row in enumerate(rows):
    piece = row.finish()
    texts[i] += piece
    if live:
      display.completion(piece)
  show_rows(sys.stdout, prompt, display, rows, texts, options, live)
  print(f'{sum(len(row.tokens) for row in rows)} tokens; {describe_speed(times, counts_of_chunks, watch.compiling)}; '
        f'stopped by: {describe_end(rows)}', file=sys.stderr)
  return texts


def _complete_file(generator, tokenizer, records, options, key, prompter, step):
  """Write a completion of each prompt to the run's answers.jsonl, atomically.

  records: [(messages, the gold answer or None)].
  """
  lines = []
  keys = jax.vmap(jax.random.fold_in, (None, 0))(key, np.arange(len(records)))  # Independent of the batch.
  for first in range(0, len(records), ROWS):
    batch = records[first:first + ROWS]
    ids = [prompter.encode(messages, f'--prompts={options.prompts}') for messages, _ in batch]
    output = generator.generate(ids, options.max_new_tokens, options, keys[first:first + ROWS], prompter.stop_ids)
    for (messages, gold), tokens, logprobs, length in zip(batch, *output, strict=True):
      row = TextStream(tokenizer, options.stop_texts, prompter.stop_ids)
      text = row.add(tokens[:length], logprobs[:length]) + row.finish()
      lines.append({'prompt': messages[-1]['content'], 'text': text, 'right': gold, 'tokens': len(row.tokens),
                    'stopped': row.stopped or 'length', 'chat': options.chat, 'temperature': options.temperature,
                    'step': step})
  file = pathlib.Path(options.workdir) / ANSWERS
  partial = file.with_suffix('.partial')
  partial.write_text(''.join(json.dumps(line, ensure_ascii=False) + '\n' for line in lines), encoding='utf-8')
  os.replace(partial, file)
  ended = sum(line['stopped'] == 'end' for line in lines)
  print(f'{file}: {len(lines)} completions, {ended} ended by the model')
