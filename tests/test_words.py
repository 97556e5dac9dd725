"""One term for one thing: former names and private words do not come back into code, recipes and documentation."""

import re

import pytest

from tests.helpers import ROOT

# Former names and words: what to write instead.
WORDS = {
    r'\b(sees_frozen|load_frozen|Trained|Adapting|stop_frozen|with_adapters)\b': 'Trainable and TrainState.frozen',
    r'\b(Ledger|Window)\b': 'Goodput, StepTimer',
    r'\bgive_back\b': 'reduce_scatter',
    r'\b(rows_per_chip|rows-per-chip)\b': 'sequences_per_chip',
    r'\bcentring\b': 'center_rewards_coef',
    r'\bmaths\b': 'math',
    r'\bsitting(s)?\b': 'attempt',
    r'\b(seal(s|ed|ing)?)\b(?!\.json)': 'manifest, verified',
    r'\bjudg(e|es|ed|ing)\b': 'grade, score, check, compare, verify',
    r'\bmeetings?\b': 'rendezvous, barrier',
    r'\btells? apart\b|\btold apart\b': 'distinguish',
    r'\b(lies|lie) (along|on a mesh)\b': 'is sharded over',
    r'\b(go|goes|going) on\b': 'continue, resume',
    r'\bworked through\b': 'split into microbatches',
    r'\blikeliest\b': 'greedy, most probable',
    r'\bmodels? (says?|speaks?|said)\b': 'output, completion, generate',
}
# Files that name the former words on purpose.
EXEMPT = {'llmjax/renamed.py', 'llmjax/checkpoint/migrate.py', 'llmjax/checkpoint/manifest.py',
          'tools/compare_versions.py'}
FILES = [path for folder, pattern in (('llmjax', '*.py'), ('configs', '*.py'), ('tools', '*'), ('docs', '*.md'),
                                      ('.', 'README.md'))
         for path in (ROOT / folder).rglob(pattern) if folder != '.' or path.parent == ROOT]


@pytest.mark.parametrize('pattern', WORDS)
def test_former_words_are_gone(pattern):
  found = []
  for path in FILES:
    name = str(path.relative_to(ROOT))
    if name in EXEMPT or not path.is_file() or '__pycache__' in name:
      continue
    for number, line in enumerate(path.read_text(encoding='utf-8').splitlines(), 1):
      if re.search(pattern, line) and 'checkpoint seal' not in line:
        found.append(f'{name}:{number}: {line.strip()[:90]}')
  assert not found, f'write {WORDS[pattern]} instead:\n' + '\n'.join(found)
