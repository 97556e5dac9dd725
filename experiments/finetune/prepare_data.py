"""Write fine-tuning data: tldr pages as "description -> command" conversations, and general instructions.

    python experiments/finetune/prepare_data.py PAGES.jsonl INSTRUCTIONS.json OUTPUT

PAGES: tldr-pages as JSONL with `text` (Markdown; CC BY 4.0).  INSTRUCTIONS: a JSON array of instruction, input, output.
Writes OUTPUT/tldr.jsonl (prompt, completion) and OUTPUT/instructions.json, for `llmjax prepare
--config=configs/data/chat.py`.
"""

import json
import pathlib
import re
import shutil
import sys

EXAMPLE = re.compile(r'^- (.+?):\n\n`(.+?)`$', re.MULTILINE)


def pairs(page):
  """Yield (description, command) of each example of a page."""
  name = page.partition('\n')[0].lstrip('# ').strip()
  for task, command in EXAMPLE.findall(page):
    yield f'{task} ({name})', command


def main(pages, instructions, output):
  folder = pathlib.Path(output)
  folder.mkdir(parents=True, exist_ok=True)
  with open(folder / 'tldr.jsonl', 'w', encoding='utf-8') as file:
    for line in pathlib.Path(pages).read_text(encoding='utf-8').splitlines():
      for task, command in pairs(json.loads(line)['text']):
        file.write(json.dumps({'prompt': task, 'completion': command}, ensure_ascii=False) + '\n')
  shutil.copyfile(instructions, folder / 'instructions.json')


if __name__ == '__main__':
  main(*sys.argv[1:])
