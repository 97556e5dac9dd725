"""Write sentences from a second-order Markov chain of words, whose entropy is known exactly.

    python experiments/distill/make_chains.py data/chains

Writes data/chains/many.jsonl, enough to learn the chain, and data/chains/few.jsonl, a sixteenth of it, and prints the
perplexity of the chain, which is the minimum of any model.  There are 16 words.
"""

import json
import pathlib
import random
import sys

import numpy as np

WORDS = 'ant bee cat dog elk fox gnu hen ibis jay koi lynx mole newt owl pig'.split()
LENGTH, MANY, FEW = 24, 4096, 256  # Words of a document, and documents.


def make_source(seed=0):
  """Return the probabilities of a word after two others, float64 [16, 16, 16]; a few of them are likely."""
  draw = np.random.default_rng(seed)
  logits = draw.normal(0, 1.7, (16, 16, 16))
  table = np.exp(logits)
  return table / table.sum(-1, keepdims=True)


def draw_document(table, rng):
  words = [rng.randrange(16), rng.randrange(16)]
  while len(words) < LENGTH:
    words.append(rng.choices(range(16), table[words[-2], words[-1]])[0])
  return ' '.join(WORDS[w] for w in words)


def main(folder):
  folder, table, rng = pathlib.Path(folder), make_source(), random.Random(0)
  for name, count in (('many', MANY), ('few', FEW)):
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f'{name}.jsonl', 'w') as f:
      for _ in range(count):
        f.write(json.dumps({'text': draw_document(table, rng)}) + '\n')
  print(f'perplexity of the source: {np.exp(-(table * np.log(table)).sum(-1).mean()):.2f} a word')


if __name__ == '__main__':
  main(sys.argv[1] if len(sys.argv) > 1 else 'data/chains')
