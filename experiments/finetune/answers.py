"""Evaluate runs on the held-out prompts of a prepared chat folder: greedy completions compared with the gold answers.

    python experiments/finetune/answers.py FOLDER COUNT RUN [RUN ...]

Prints for each run the number of completions with an end token, exact matches, the mean F1 of words, and examples.
"""

import collections
import json
import sys
import types

import jax
import jax.numpy as jnp

from llmjax.checkpoint.load import read_config
from llmjax.data import stream
from llmjax.data.spec import DataSpec
from llmjax.generate.load import load_generator
from llmjax.run.saved_run import SavedRunSpec, spec_of_run


def f1(said, right):
  """Return the F1 of the words of two texts."""
  a, b = (collections.Counter(text.split()) for text in (said, right))
  same = (a & b).total()
  return 2 * same / (a.total() + b.total()) if same else 0.0


def main(folder, count, runs):
  records = [json.loads(text)['messages'] for _, text in stream.read_documents(folder, 'test')][:count]
  right = [messages[-1]['content'] for messages in records]
  said = {}
  for run in runs:
    spec = spec_of_run(SavedRunSpec, read_config(run))
    generator, tokenizer, _ = load_generator(types.SimpleNamespace(workdir=run, step=0), spec)
    with stream.chat_format(DataSpec(sources={folder: 1.0})) as chat:
      prompts = [chat.prompt(messages[:-1]) for messages in records]
      made = generator.generate(prompts, 64, None, jax.random.key(0), stop_ids=chat.stop_ids)
    ended = sum(int(tokens[n - 1]) in chat.stop_ids for tokens, n in zip(made.tokens, made.lengths, strict=True))
    said[run] = [tokenizer.decode(tokens[:n]) for tokens, n in zip(made.tokens, made.lengths, strict=True)]
    pairs = list(zip(said[run], right, strict=True))
    print(f'{run}: {ended} of {count} ended, {sum(a == b for a, b in pairs)} right to the character, '
          f'mean word F1 {jnp.mean(jnp.array([f1(*p) for p in pairs])):.3f}')
  for i in range(0, count, max(count // 5, 1)):
    print(f'\nasked: {records[i][-2]["content"]!r}\nright: {right[i]!r}')
    for run in runs:
      print(f'{run}: {said[run][i][:160]!r}')


if __name__ == '__main__':
  main(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
