"""`llmjax feedback revise|prefer`: a model critiques, revises and compares completions by written principles.

Records are appended to a JSONL file, each with its provenance; the same command resumes after the last one.
"""

import contextlib
import dataclasses
import hashlib
import json
import pathlib
import shlex
import time

import jax
import numpy as np

from llmjax.checkpoint.load import checkpoints_folder, read_config
from llmjax.config import ConfigError
from llmjax.data import prepared
from llmjax.data.records import read_answers, read_prompt, read_records
from llmjax.evaluate.metrics import read_lines
from llmjax.generate.load import load_generator
from llmjax.generate.prompts import load_chat
from llmjax.generate.score import score
from llmjax.post import ai_feedback
from llmjax.run.compile_time import compile_clock
from llmjax.run.progress import Stages
from llmjax.run.saved_run import SavedRunSpec, spec_of_run
from llmjax.run.workdir import enable_compilation_cache
from llmjax.run.writers import Lines, LogError
from llmjax.text.templates import TemplateError

STAGES = 1 << 16  # More than a record has; a record's number and the stage make a random key.


def run(spec, options):
  """Write the records that the options ask for; returns the exit status."""
  del spec
  prefers = isinstance(options, ai_feedback.PreferOptions)
  required = ('prefer',) if prefers else ('critique', 'revise')
  principles, digest = ai_feedback.read_principles(options.principles, required)
  has_completions = prefers and not options.policy
  records = read_records(options.prompts, read_answers if has_completions else lambda record: (read_prompt(record),))
  records = records[:options.limit or None]
  with _ChatModel(options.workdir, options) as model:
    origin = {'model': model.origin, 'principles_sha256': digest, 'seed': options.seed}
    policy = _ChatModel(options.policy, options) if prefers and options.policy else None
    if policy:
      origin['policy'] = policy.origin

    def revise(first, batch):
      generate = lambda conversations, stage: model.generate(conversations, first, stage)
      return ai_feedback.revise([messages for messages, in batch], generate, principles, rounds=options.rounds,
                                seed=options.seed, first=first)

    def prefer(first, batch):
      if policy:
        conversations = [messages for messages, in batch]
        completions = [policy.generate(conversations, first, stage) for stage in ('first answer', 'second answer')]
        batch = list(zip(conversations, *completions, strict=True))
      return ai_feedback.compare(batch, model.score_choices, principles, seed=options.seed, first=first,
                                 clip=(1 - options.certainty, options.certainty))

    _write_records(options, records, prefer if prefers else revise, origin)
  if prefers:
    preferences = read_lines(options.output)
    bias = ai_feedback.position_bias(preferences)
    print(f'{len(preferences)} preferences; position bias: P(A) {bias["mean_bias"]:+.1%} from 1/2 on average, '
          f'{bias["mean_absolute_bias"]:.1%} in absolute value; {bias["inconsistent"]:.1%} chose another completion '
          'when the order was exchanged')
  learner = options.policy if policy else options.workdir
  command = ['llmjax', 'prepare', '--config=configs/data/chat.py', f'--config.path={options.output}',
             f'--config.records={"preference" if prefers else "chat"}',
             f'--config.tokenizer.path={pathlib.Path(learner) / prepared.TOKENIZER}']
  print(f'next: {shlex.join(command)}')
  return 0


def _write_records(options, records, make, origin):
  """Append the records that the output lacks, one batch at a time.  make(first, batch) -> records with provenance."""
  output = pathlib.Path(options.output)
  request = {**{k: v for k, v in dataclasses.asdict(options).items() if k not in ('output', 'limit', 'batch_size')},
             **origin, 'prompts_sha256': hashlib.sha256(pathlib.Path(options.prompts).read_bytes()).hexdigest()}
  request_file = output.with_name(output.name + '.origin.json')
  done = len(read_lines(output))
  if done and (not request_file.exists() or json.loads(request_file.read_text()) != json.loads(json.dumps(request))):
    raise ConfigError([f'--output={output} has {done} records of another model, prompts or flags; move it away, or '
                       'give another --output'])
  try:
    output.parent.mkdir(parents=True, exist_ok=True)
    request_file.write_text(json.dumps(request, indent=1) + '\n')
    compiled = compile_clock()
    progress = Stages(unit='prompts', clock=lambda: time.monotonic() - compiled.seconds)
    progress('feedback', 0, len(records) - done)
    with contextlib.closing(Lines(output)) as file:
      # Batches are the same as without an interruption.
      for first in range(done, len(records), options.batch_size):
        batch = records[first:first + options.batch_size]
        for number, record in enumerate(make(first, batch), first):
          record['provenance'].update(origin, record=number)
          file.append(record)
        progress('feedback', first + len(batch) - done, len(records) - done)
    progress.finish(f'; compiled in {compiled.seconds:.1f} s' if compiled.seconds >= 0.05 else '')
  except (OSError, LogError) as e:
    raise ConfigError([f'--output={output}: {e}']) from e
  except TemplateError as e:
    raise ConfigError([f'the chat template of {options.workdir}: {e}']) from e


class _ChatModel:
  """A run's model that generates completions and scores choices."""

  def __init__(self, workdir, options):
    step = options.step if workdir == options.workdir else 0
    self._options = dataclasses.replace(options, workdir=workdir, step=step)
    run_spec = spec_of_run(SavedRunSpec, read_config(workdir))
    enable_compilation_cache(run_spec.train.compilation_cache)
    self._generator, self._tokenizer, step = load_generator(self._options, run_spec)
    self._chat = load_chat(workdir, self._tokenizer, '--workdir' if workdir == options.workdir else '--policy')
    digest = hashlib.sha256((checkpoints_folder(workdir) / str(step) / 'manifest.json').read_bytes()).hexdigest()
    self.origin = {'workdir': str(workdir), 'step': step, 'manifest_sha256': digest}

  def __enter__(self):
    return self

  def __exit__(self, *unused):
    self._chat.close()

  def generate(self, conversations, first, stage):
    """Sample one completion per conversation, with a key of the record's number and the stage, not of the batch."""
    stage = int.from_bytes(hashlib.sha256(stage.encode()).digest()[:2], 'big')
    base = jax.random.key(self._options.seed)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(
        base, np.arange(first, first + len(conversations), dtype=np.uint32) * np.uint32(STAGES) + np.uint32(stage))
    samples = self._generator.generate([self._chat.prompt(c) for c in conversations], self._options.max_new_tokens,
                                       self._options, keys, self._chat.stop_ids)
    texts = []
    for tokens, length in zip(samples.tokens, samples.lengths, strict=True):
      tokens = tokens[:length]
      texts.append(self._tokenizer.decode(tokens[:-1] if length and tokens[-1] in self._chat.stop_ids else tokens))
    return [text.strip() for text in texts]

  def score_choices(self, conversations):
    """Return the log-probabilities [n, 2] of the completions A and B, in nats."""
    prompts = [self._chat.prompt(c) for c in conversations]
    logprobs = [score(self._generator, prompts, [self._tokenizer.encode(choice)] * len(prompts))
                for choice in ai_feedback.CHOICES]
    return np.stack([[float(np.sum(tokens)) for tokens in choice] for choice in logprobs], axis=1)
