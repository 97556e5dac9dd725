import sys

import pytest

from llmjax.config import ConfigError
from llmjax.data import python_docs
from llmjax.data.documents import Document, Rejected


@pytest.fixture(scope='module')
def items():
  return list(python_docs.read_python_docs())


def test_what_is_read(items):
  documents = [i for i in items if isinstance(i, Document)]
  names = [d.name for d in documents]
  assert len(set(names)) == len(names) and len([i for i in items if isinstance(i, Rejected)]) < 5
  kinds = {kind: [n for n in names if n.startswith(kind)]
           for kind in ('topic/', 'source/', 'builtin/')}
  assert len(kinds['topic/']) >= 70 and len(kinds['source/']) > 300 and len(kinds['builtin/']) > 20
  assert {'source/argparse.py', 'source/email/message.py', 'builtin/itertools'} <= set(names)
  for part in ('encodings', 'test', 'idlelib', 'lib2to3', 'turtledemo', 'site-packages',
               'pydoc_data'):
    assert not [n for n in names if part in n.split('/')[:-1]]
  assert 8e6 < sum(len(d.text) for d in documents) < 20e6


def test_held_out_shares_and_modules(items):
  documents = [i for i in items if isinstance(i, Document)]
  total = sum(len(d.text) for d in documents)
  for split in ('validation', 'test'):
    share = sum(len(d.text) for d in documents if d.split == split) / total
    assert 0.03 < share < 0.1, (split, share)
  owners = {}
  for d in documents:
    kind, module = d.name.split('/')[:2]
    module = module if kind == 'topic' else module.removesuffix('.py').lstrip('_')
    owners.setdefault((kind == 'topic', module), set()).add(d.split)
  assert all(len(found) == 1 for found in owners.values())
  assert owners[False, 'heapq'] == {'validation'}  # Its accelerator _heapq is not in train.


def test_lists_name_what_exists(items):
  names = {i.name for i in items if isinstance(i, Document)}
  for modules in python_docs.HELD_OUT_MODULES.values():
    assert set(modules) <= sys.stdlib_module_names
    for module in modules:
      assert {f'source/{module}.py', f'source/{module}/__init__.py'} & names
  for topics in python_docs.HELD_OUT_TOPICS.values():
    assert {f'topic/{topic}' for topic in topics} <= names
  every = [m for modules in python_docs.HELD_OUT_MODULES.values() for m in modules]
  assert len(set(every)) == len(every)


def test_held_out_text_is_not_in_train(items):
  lines = {}
  for d in items:
    if isinstance(d, Document):
      long = {line.strip() for line in d.text.splitlines() if len(line.strip()) > 50}
      lines.setdefault((d.split, d.name.startswith('topic/')), []).append((d.name, long))
  train = set().union(*(long for (split, _), found in lines.items() if split == 'train'
                        for _, long in found))
  for (split, is_topic), found in lines.items():
    if split != 'train':
      every = set().union(*(long for _, long in found))
      assert len(every & train) <= 0.03 * len(every), (split, is_topic)
      if is_topic:
        assert not [n for n, long in found if len(long & train) > 0.1 * len(long)]


def test_same_each_time(items):
  assert items == list(python_docs.read_python_docs())


def test_a_python_without_sources_points_to_text_dir(tmp_path, monkeypatch):
  with pytest.raises(ConfigError, match='--text-dir=DIR') as error:
    list(python_docs.read_python_docs(library=tmp_path))
  assert len(error.value.problems) == 1
  monkeypatch.setitem(sys.modules, 'pydoc_data.topics', None)
  with pytest.raises(ConfigError, match='--text-dir=DIR'):
    list(python_docs.read_python_docs())
