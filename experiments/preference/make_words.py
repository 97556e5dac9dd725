"""Write data with a planted preference: conversations of random words, and preference pairs.

  python experiments/preference/make_words.py data/words [--flipped=0.2]

A base model trained on chat.jsonl generates each of 16 words equally often.  The chosen completion of a pair has more
of the 4 preferred words; `--flipped` exchanges this fraction of the training pairs.  pairs_test.jsonl has no flipped
pairs, prompts.jsonl has prompts for RL.  steps.jsonl has solutions of 2 to 5 lines; a line is a good step if at least 2
of its 6 words are preferred.
"""

import argparse
import json
import pathlib
import random

WORDS = ('ant bee cat dog elk fox gnu hen ibis jay koi lynx mole newt owl pig').split()
PREFERRED = frozenset(WORDS[::4])
LENGTH = 12  # Words of an answer.


def draw(rng):
  return ' '.join(rng.choices(WORDS, k=LENGTH))


def count(answer):
  """Count the preferred words."""
  return sum(word in PREFERRED for word in answer.split())


def make_pair(rng):
  while True:
    answers = sorted((draw(rng), draw(rng)), key=count)
    if count(answers[0]) < count(answers[1]):
      return answers[1], answers[0]


def write(path, rows):
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('output', type=pathlib.Path)
  parser.add_argument('--pairs', type=int, default=4000)
  parser.add_argument('--flipped', type=float, default=0.0)
  parser.add_argument('--seed', type=int, default=0)
  args = parser.parse_args()
  rng = random.Random(args.seed)
  args.output.mkdir(parents=True, exist_ok=True)
  write(args.output / 'chat.jsonl', [{'prompt': f'list {i}:', 'completion': ' ' + draw(rng)} for i in range(6000)])

  def pairs(count, flipped):
    for i in range(count):
      pair = make_pair(rng)
      chosen, rejected = pair[::-1] if rng.random() < flipped else pair
      yield {'prompt': f'list {i}:', 'chosen': ' ' + chosen, 'rejected': ' ' + rejected}

  write(args.output / 'pairs.jsonl', pairs(args.pairs, args.flipped))
  write(args.output / 'pairs_test.jsonl', pairs(400, 0.0))

  write(args.output / 'prompts.jsonl', [{'prompt': f'list {i}:', 'answer': ''} for i in range(1000)])

  def step():
    text = ' '.join(rng.choices(WORDS, k=LENGTH // 2))
    return {'text': f' {text}', 'label': count(text) >= 2}

  write(args.output / 'steps.jsonl', [{'prompt': f'list {i}:', 'steps': [step() for _ in range(rng.randint(2, 5))]}
                                      for i in range(args.pairs)])


if __name__ == '__main__':
  main()
