"""`llmjax feedback revise|prefer`: a model criticises, rewrites and compares answers by written principles.

Records go to a JSONL file as they are made, each with where it came from; the same command goes on from there.
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
from llmjax.run.spec import FinishedSpec, of_run
from llmjax.run.workdir import enable_compilation_cache
from llmjax.run.writers import Lines, LogError
from llmjax.text.templates import TemplateError

STAGES = 1 << 16  # More than a record has; its number and the stage make a key.


def run(spec, options):
  """Writes the records that the options ask for; returns the exit status."""
  del spec
  prefers = isinstance(options, ai_feedback.PreferOptions)
  needed = ('prefer',) if prefers else ('critique', 'revise')
  principles, digest = ai_feedback.read_principles(options.principles, needed)
  given = prefers and not options.policy
  prompts = read_records(options.prompts, read_answers if given else lambda record: (read_prompt(record),))
  prompts = prompts[:options.limit or None]
  with _Voice(options.workdir, options) as voice:
    origin = {'model': voice.origin, 'principles_sha256': digest, 'seed': options.seed}
    if prefers:
      policy = _Voice(options.policy, options) if options.policy else None
      if policy:
        origin['policy'] = policy.origin

      def make(first, batch):
        if policy:
          conversations = [messages for messages, in batch]
          pairs = [policy.speak(conversations, first, stage) for stage in ('first answer', 'second answer')]
          batch = list(zip(conversations, *pairs, strict=True))
        return ai_feedback.compare(batch, voice.judge, principles, seed=options.seed, first=first,
                                clamp=(1 - options.certainty, options.certainty))
    else:
      def make(first, batch):
        return ai_feedback.revise([messages for messages, in batch],
                               lambda conversations, stage: voice.speak(conversations, first, stage), principles,
                               rounds=options.rounds, seed=options.seed, first=first)

    _write_records(options, prompts, make, origin)
  if prefers:
    made = read_lines(options.output)
    found = ai_feedback.describe_places(made)
    print(f'{len(made)} preferences; the judge: place A {found["mean_bias"]:+.1%} above even on average, '
          f'{found["mean_absolute_bias"]:.1%} off in either direction; '
          f'{found["inconsistent"]:.1%} named another answer when the answers changed places')
  learner = options.policy if prefers and options.policy else options.workdir
  command = ['llmjax', 'prepare', '--config=configs/data/chat.py', f'--config.path={options.output}',
             f'--config.records={"preference" if prefers else "chat"}',
             f'--config.tokenizer.path={pathlib.Path(learner) / prepared.TOKENIZER}']
  print(f'next: {shlex.join(command)}')
  return 0


def _write_records(options, prompts, make, origin):
  """Appends the records that the output lacks, a batch at a time."""
  output = pathlib.Path(options.output)
  asked = {**{k: v for k, v in dataclasses.asdict(options).items() if k not in ('output', 'limit', 'batch_size')},
           **origin, 'prompts_sha256': hashlib.sha256(pathlib.Path(options.prompts).read_bytes()).hexdigest()}
  note = output.with_name(output.name + '.origin.json')
  done = len(read_lines(output))
  if done and (not note.exists() or json.loads(note.read_text()) != json.loads(json.dumps(asked))):
    raise ConfigError([f'--output={output} has {done} records that were made from something else; move it away, or '
                       'give another --output'])
  try:
    output.parent.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(asked, indent=1) + '\n')
    compiled = compile_clock()
    show = Stages(unit='prompts', clock=lambda: time.monotonic() - compiled.seconds)
    show('feedback', 0, len(prompts) - done)
    with contextlib.closing(Lines(output)) as file:
      # Batches lie where they would without an interruption.
      for first in range(done, len(prompts), options.batch_size):
        batch = prompts[first:first + options.batch_size]
        for number, record in enumerate(make(first, batch), first):
          record['provenance'].update(origin, record=number)
          file.append(record)
        show('feedback', first + len(batch) - done, len(prompts) - done)
    show.finish(f'; compiled in {compiled.seconds:.1f} s' if compiled.seconds >= 0.05 else '')
  except (OSError, LogError) as e:
    raise ConfigError([f'--output={output}: {e}']) from e
  except TemplateError as e:
    raise ConfigError([f'the chat template of {options.workdir}: {e}']) from e


class _Voice:
  """A run's model that answers conversations and judges choices."""

  def __init__(self, workdir, options):
    step = options.step if workdir == options.workdir else 0
    self._options = dataclasses.replace(options, workdir=workdir, step=step)
    run_spec = of_run(FinishedSpec, read_config(workdir))
    enable_compilation_cache(run_spec.train.compilation_cache)
    self._generator, self._tokenizer, step = load_generator(self._options, run_spec)
    self._chat = load_chat(workdir, self._tokenizer, '--workdir' if workdir == options.workdir else '--policy')
    digest = hashlib.sha256((checkpoints_folder(workdir) / str(step) / 'manifest.json').read_bytes()).hexdigest()
    self.origin = {'workdir': str(workdir), 'step': step, 'manifest_sha256': digest}

  def __enter__(self):
    return self

  def __exit__(self, *unused):
    self._chat.close()

  def speak(self, conversations, first, stage):
    """Returns one sampled answer to each; it depends on the record's number and the stage, not on the batch."""
    stage = int.from_bytes(hashlib.sha256(stage.encode()).digest()[:2], 'big')
    base = jax.random.key(self._options.seed)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(
        base, np.arange(first, first + len(conversations), dtype=np.uint32) * np.uint32(STAGES) + np.uint32(stage))
    made = self._generator.generate([self._chat.prompt(c) for c in conversations], self._options.max_new_tokens,
                                    self._options, keys, self._chat.stop_ids)
    texts = []
    for tokens, length in zip(made.tokens, made.lengths, strict=True):
      kept = tokens[:length]
      texts.append(self._tokenizer.decode(kept[:-1] if length and kept[-1] in self._chat.stop_ids else kept))
    return [text.strip() for text in texts]

  def judge(self, conversations):
    """Returns the log-probabilities [n, 2] of the answers A and B."""
    prompts = [self._chat.prompt(c) for c in conversations]
    rows = [score(self._generator, prompts, [self._tokenizer.encode(choice)] * len(prompts))
            for choice in ai_feedback.CHOICES]
    return np.stack([[float(np.sum(r)) for r in row] for row in rows], axis=1)
