"""Writes the data of the RL recipes: sums of two digits, of which a base model learns to give 30 % right answers.

    python experiments/rl/make_sums.py data/sums

makes data/sums/chat.jsonl, every sum with every number from 0 to 18 as its answer, of which the right one weighs as
much as 30 % and the others 70 % together, and data/sums/prompts.jsonl (prompt, answer).
"""

import json
import pathlib
import sys


def main(folder, right=0.3):
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  pairs = [(a, b) for a in range(10) for b in range(10)]
  with open(folder / 'chat.jsonl', 'w') as f:
    for a, b in pairs:
      for said in range(19):
        weight = 1.0 if said == a + b else round((1 - right) / right / 18, 4)
        f.write(json.dumps({'messages': [{'role': 'user', 'content': f'{a}+{b}='},
                                         {'role': 'assistant', 'content': str(said), 'weight': weight}]}) + '\n')
  with open(folder / 'prompts.jsonl', 'w') as f:
    for a, b in pairs:
      f.write(json.dumps({'prompt': f'{a}+{b}=', 'answer': str(a + b)}) + '\n')


if __name__ == '__main__':
  main(sys.argv[1] if len(sys.argv) > 1 else 'data/sums')
