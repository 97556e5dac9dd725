"""Write questions about Python's standard library from its docstrings.

    python experiments/lifecycle/make_questions.py data/questions

The answer to a question about a function or class is the first paragraph of its docstring, if it has 15 to 120
characters.  chat.jsonl (prompt, completion) has two thirds of them, rest.jsonl (prompt, answer) the others, and
ask.jsonl eight of modules that the corpus python_docs holds out.
"""

import ast
import json
import pathlib
import random
import sys

from llmjax.data import python_docs

SHORTEST, LONGEST = 15, 120  # Characters of an answer.
ASKED = 8


def read_lines():
  """Yield (split, name, first paragraph of the docstring) of the definitions in the library's sources, in order."""
  def walk(node, name):
    for child in node.body:
      if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and not child.name.startswith('_'):
        inner = f'{name}.{child.name}'
        if doc := ast.get_docstring(child):
          yield inner, ' '.join(doc.split('\n\n')[0].split())
        yield from walk(child, inner)

  for document in python_docs.read_python_docs():
    if getattr(document, 'name', '').startswith('source/'):
      module = document.name.removeprefix('source/').removesuffix('.py').removesuffix('/__init__').replace('/', '.')
      try:
        tree = ast.parse(document.text)
      except SyntaxError:
        continue  # A template of another version's syntax.
      yield from ((document.split, *found) for found in walk(tree, module))


def main(folder):
  folder, rng = pathlib.Path(folder), random.Random(0)
  folder.mkdir(parents=True, exist_ok=True)
  rows, seen = [], set()
  for split, name, line in read_lines():
    if SHORTEST <= len(line) <= LONGEST and line not in seen and '._' not in f'.{name}':
      seen.add(line)
      rows.append((split, name, line))

  ask = lambda name: f'What does {name} do?'
  known, new = ([row[1:] for row in rows if (row[0] == 'train') == train] for train in (True, False))
  rng.shuffle(known)
  cut = 2 * len(known) // 3
  for file, records in (
      ('chat', [{'prompt': ask(name), 'completion': line} for name, line in known[:cut]]),
      ('rest', [{'prompt': ask(name), 'answer': line} for name, line in known[cut:]]),
      ('ask', [{'prompt': ask(name), 'answer': line} for name, line in rng.sample(new, ASKED)])):
    (folder / f'{file}.jsonl').write_text(''.join(json.dumps(r, ensure_ascii=False) + '\n' for r in records),
                                          encoding='utf-8')


if __name__ == '__main__':
  main(sys.argv[1] if len(sys.argv) > 1 else 'data/questions')
