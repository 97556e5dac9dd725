"""Count lines per folder, and list the longest files and functions: python tools/count_lines.py llmjax [OTHER/llmjax].

Code: lines that are neither blank, nor a comment, nor a docstring.  Two folders are counted side by side.
"""

import ast
import pathlib
import sys


def docstring_lines(tree):
  """Return the line numbers of all docstrings."""
  kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
  first = [n.body[0] for n in ast.walk(tree) if isinstance(n, kinds) and ast.get_docstring(n, clean=False) is not None]
  return {line for node in first for line in range(node.lineno, node.end_lineno + 1)}


def count(root):
  """Return ({folder: [files, lines, code]}, [(lines, file)], [(lines, file, function)]) of a package."""
  folders, files, functions = {}, [], []
  for path in sorted(pathlib.Path(root).rglob('*.py')):
    text, name = path.read_text(encoding='utf-8'), str(path.relative_to(root))
    lines, tree = text.splitlines(), ast.parse(text)
    skipped = docstring_lines(tree)
    code = sum(1 for i, line in enumerate(lines, 1) if line.strip() and line.strip()[0] != '#' and i not in skipped)
    total = folders.setdefault(name.split('/')[0] if '/' in name else '(top)', [0, 0, 0])
    for i, n in enumerate((1, len(lines), code)):
      total[i] += n
    files.append((len(lines), name))
    functions += [(n.end_lineno - n.lineno + 1, name, n.name) for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
  return folders, sorted(files, reverse=True), sorted(functions, reverse=True)


def main(roots):
  counts = [count(root) for root in roots]
  print('| folder |' + ' files | lines | code |' * len(roots))
  print('| --- |' + ' ---: | ---: | ---: |' * len(roots))
  for folder in [*sorted({f for folders, *_ in counts for f in folders}), 'total']:
    cells = []
    for folders, *_ in counts:
      total = [sum(column) for column in zip(*folders.values(), strict=True)]
      numbers = total if folder == 'total' else folders.get(folder)
      cells += [f'{n:,}' for n in numbers] if numbers else ['', '', '']
    print(f'| {folder} | ' + ' | '.join(cells) + ' |')
  for root, (_, files, functions) in zip(roots, counts, strict=True):
    print(f'\n{root}: longest files ' + ', '.join(f'{name} {n}' for n, name in files[:4])
          + '; longest functions ' + ', '.join(f'{function} ({name}) {n}' for n, name, function in functions[:4]))


if __name__ == '__main__':
  main(sys.argv[1:] or ['llmjax'])
