"""Write a folder for `DATA=FOLDER bash tools/lifecycle.sh` from two public data sets.

    python experiments/lifecycle/make_public.py tldr/pages instruction-data-with-preference.json data/public

The first argument is the English pages of https://github.com/tldr-pages/tldr (CC BY 4.0), a folder of Markdown or a
JSONL file with a `text` per page: descriptions of commands become questions, the commands answers.  The second is a
JSON list of `instruction`, `input`, `output`, `chosen` and `rejected`, as in chapter 7 of
https://github.com/rasbt/LLMs-from-scratch (Apache-2.0).  chat.jsonl has both, pairs.jsonl the preferences of other
instructions, and ask.jsonl four prompts of each kind that are in neither.
"""

import json
import pathlib
import random
import re
import sys

COMMANDS, LONGEST = 3000, 160  # So many command lines; characters of question and answer together.
EXAMPLE = re.compile(r'^- (.+):\n\n`(.+)`$', re.MULTILINE)


def read_pages(path):
  path = pathlib.Path(path)
  if path.is_dir():
    return [file.read_text(encoding='utf-8') for file in sorted(path.rglob('*.md'))]
  return [json.loads(line)['text'] for line in path.read_text(encoding='utf-8').splitlines()]


def read_commands(pages):
  """Yield (question, command) of the examples of pages, without the braces of placeholders."""
  for page in pages:
    for told, command in EXAMPLE.findall(page):
      plain = lambda text: re.sub(r'\{\{|\}\}|\[(?=\w\])|(?<=\[\w)\]', '', text)
      question = f'{page.splitlines()[0].lstrip("# ")}: {re.sub(r"[][]", "", told)}?'
      if len(question) + len(plain(command)) <= LONGEST:
        yield question, plain(command)


def main(pages, instructions, folder):
  rng, folder = random.Random(0), pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  commands = sorted(set(read_commands(read_pages(pages))))
  rng.shuffle(commands)
  records = json.loads(pathlib.Path(instructions).read_text(encoding='utf-8'))
  rng.shuffle(records)
  ask = lambda r: f'{r["instruction"]}\n{r["input"]}'.strip()
  cut = len(records) // 2
  files = {
      'ask': [{'prompt': q, 'answer': a} for q, a in commands[:4]] +
             [{'prompt': ask(r), 'answer': r['output']} for r in records[:4]],
      'chat': [{'prompt': q, 'completion': a} for q, a in commands[4:COMMANDS]] +
              [{'prompt': ask(r), 'completion': r['output']} for r in records[4:cut]],
      'pairs': [{'prompt': ask(r), 'chosen': r['chosen'], 'rejected': r['rejected']} for r in records[cut:]
                if r['chosen'] != r['rejected']]}
  for name, rows in files.items():
    (folder / f'{name}.jsonl').write_text(''.join(json.dumps(r, ensure_ascii=False) + '\n' for r in rows),
                                          encoding='utf-8')


if __name__ == '__main__':
  main(*sys.argv[1:])
