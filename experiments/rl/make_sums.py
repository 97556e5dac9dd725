"""Write the data of the RL recipes: sums of two digits.  The base model learns to give 3 of 10 correct answers.

    python experiments/rl/make_sums.py data/sums

chat.jsonl has every sum with every number from 0 to 9 as its answer, with a weight of 30 % for the correct one and of
70 % for the others together.  prompts.jsonl (prompt, answer) has all of these sums.
"""

import json
import pathlib
import sys

RIGHT = 0.3  # Part of the right answers.


def main(folder):
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  sums = [(a, b) for a in range(10) for b in range(10 - a)]
  weights = {True: 1.0, False: round((1 - RIGHT) / RIGHT / 9, 4)}
  chats = [{'messages': [{'role': 'user', 'content': f'{a}+{b}='},
                         {'role': 'assistant', 'content': str(said), 'weight': weights[said == a + b]}]}
           for a, b in sums for said in range(10)]
  prompts = [{'prompt': f'{a}+{b}=', 'answer': str(a + b)} for a, b in sums]
  for name, rows in (('chat', chats), ('prompts', prompts)):
    (folder / f'{name}.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))


if __name__ == '__main__':
  main(sys.argv[1] if len(sys.argv) > 1 else 'data/sums')
