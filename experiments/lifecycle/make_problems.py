"""Write word problems with verifiable answers, and solutions in the format of GSM8K (arXiv:2110.14168).

    python experiments/lifecycle/make_problems.py data/problems

A person has up to 10 things and gets or loses some.  A solution has the sum, then `#### answer`.  chat.jsonl (prompt,
completion) has 300 problems for fine-tuning, prompts.jsonl (prompt, answer) 2,400 others for RL, and ask.jsonl four.
No problem is in two files, but the same sum may be, with another person or other things.
"""

import json
import pathlib
import random
import sys

NAMES = 'Ann Ben Eve Tom Sue Max Ida Leo'.split()
THINGS = 'pens books keys files cards coins boxes lists'.split()
LARGEST = 10
TAUGHT, ASKED, PRACTISED = 300, 4, 2400


def tell(name, things, start, change):
  """Return the question."""
  happens = f'{"gets" if change > 0 else "loses"} {abs(change)}'
  return f'{name} has {start} {things} and {happens}. How many {things} are left?'


def solve(start, change):
  """Return the solution."""
  return f"{start} {'+' if change > 0 else '-'} {abs(change)} = {start + change}\n#### {start + change}"


def main(folder):
  folder, rng = pathlib.Path(folder), random.Random(0)
  folder.mkdir(parents=True, exist_ok=True)
  problems = [(name, things, start, change) for name in NAMES for things in THINGS
              for start in range(1, LARGEST + 1) for change in range(-start, LARGEST - start + 1) if change]
  rng.shuffle(problems)
  at = 0
  for file, count, answer in (('chat', TAUGHT, 'completion'), ('ask', ASKED, 'answer'),
                              ('prompts', PRACTISED, 'answer')):
    records = [{'prompt': tell(*p), answer: solve(*p[2:])} for p in problems[at:at + count]]
    (folder / f'{file}.jsonl').write_text(''.join(json.dumps(record) + '\n' for record in records))
    at += count


if __name__ == '__main__':
  main(sys.argv[1] if len(sys.argv) > 1 else 'data/problems')
