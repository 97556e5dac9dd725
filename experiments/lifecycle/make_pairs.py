"""Write preference pairs from completions of a run for questions with gold answers.

    llmjax generate --workdir=runs/lifecycle/sft --prompts=data/questions/rest.jsonl --chat --temperature=1
    python experiments/lifecycle/make_pairs.py runs/lifecycle/sft/answers.jsonl data/questions/pairs.jsonl

The chosen completion is the gold answer.  The rejected one is in turn the completion of the run, the first words of the
gold answer, and its words in another order.  Each question is in one pair only, so that no held-out answer was trained
on.
"""

import json
import pathlib
import random
import sys


def main(answers, pairs):
  rng, records = random.Random(0), []
  for i, line in enumerate(pathlib.Path(answers).read_text(encoding='utf-8').splitlines()):
    answer = json.loads(line)
    words = answer['right'].split()
    worse = (answer['text'].strip(), ' '.join(words[:rng.randint(1, max(1, len(words) - 1))]),
             ' '.join(rng.sample(words, len(words))))[i % 3]
    if worse and worse != answer['right']:
      records.append({'prompt': answer['prompt'], 'chosen': answer['right'], 'rejected': worse})
  pathlib.Path(pairs).write_text(''.join(json.dumps(r, ensure_ascii=False) + '\n' for r in records), encoding='utf-8')


if __name__ == '__main__':
  main(*sys.argv[1:])
