"""Writes the data of RL recipes: sums, of which a base model learns to give some right answers.

    python experiments/rl/make_sums.py data/sums
    python experiments/rl/make_sums.py data/sums --worked=20

Without --worked: chat.jsonl has every sum of one digit with every number from 0 to 9 as its answer, of which the right
one weighs as much as 30 % and the others 70 % together; prompts.jsonl (prompt, answer) has all of these sums.

--worked=N: word problems about two numbers from 1 to N, with solutions as GSM8K (arXiv:2110.14168) writes them: the
working, then `#### answer`.  chat.jsonl has half of them, ask.jsonl four, prompts.jsonl the rest.
"""

import argparse
import json
import pathlib
import random

NAMES = ('Ann', 'Ben', 'Eve', 'Tom')
THINGS = ('pens', 'books', 'keys', 'files')


def plain(right=0.3):
  """Returns {file: records}: sums of one digit."""
  sums = [(a, b) for a in range(10) for b in range(10 - a)]
  weights = {True: 1.0, False: round((1 - right) / right / 9, 4)}
  chats = [{'messages': [{'role': 'user', 'content': f'{a}+{b}='},
                         {'role': 'assistant', 'content': str(said), 'weight': weights[said == a + b]}]}
           for a, b in sums for said in range(10)]
  return {'chat': chats, 'prompts': [{'prompt': f'{a}+{b}=', 'answer': str(a + b)} for a, b in sums]}


def worked(largest, seed=0):
  """Returns {file: records}: word problems; no sum is in two files."""
  rng = random.Random(seed)
  sums = [(a, b) for a in range(1, largest + 1) for b in range(1, largest + 1)]
  rng.shuffle(sums)

  def ask(a, b):
    name, things = rng.choice(NAMES), rng.choice(THINGS)
    return f'{name} has {a} {things} and gets {b} more. How many {things} are there?'

  solve = lambda a, b: f'{a} + {b} = {a + b}\n#### {a + b}'
  answered = lambda sums: [{'prompt': ask(*s), 'answer': solve(*s)} for s in sums]
  half = len(sums) // 2
  return {'chat': [{'prompt': ask(*s), 'completion': solve(*s)} for s in sums[:half]],
          'ask': answered(sums[half:half + 4]), 'prompts': answered(sums[half + 4:])}


def main(output, largest=0):
  output = pathlib.Path(output)
  output.mkdir(parents=True, exist_ok=True)
  for name, rows in (worked(largest) if largest else plain()).items():
    (output / f'{name}.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))


if __name__ == '__main__':
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('output', nargs='?', default='data/sums')
  parser.add_argument('--worked', type=int, default=0)
  args = parser.parse_args()
  main(args.output, args.worked)
