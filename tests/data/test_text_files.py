import gzip
import json
import tarfile

import hypothesis
import hypothesis.strategies as st
import pytest

from llmjax.data import text_files
from llmjax.data.documents import Document, Limits, Rejected

SUFFIXES = ('.txt', '.md', '.jsonl', '.parquet')


def read(path, **kwargs):
  """Returns ({name: text}, [Rejected])."""
  items = list(text_files.read_files(path, Limits(SUFFIXES, **kwargs)))
  return ({i.name: i.text for i in items if isinstance(i, Document)},
          [i for i in items if isinstance(i, Rejected)])


def test_bad_lines_go_and_nothing_else(tmp_path):
  (tmp_path / 'a.txt').write_bytes(b'one\nbad \xff line\ntwo\r\nnul \0 here\nthree\n')
  texts, rejected = read(tmp_path)
  assert texts == {'a.txt': 'one\ntwo\r\nthree\n'}
  assert [(r.file, r.offset, r.line, r.bytes) for r in rejected] == [
      ('a.txt', 8, 2, 11), ('a.txt', 24, 4, 11)]
  assert 'invalid UTF-8 (byte 0xff)' in rejected[0].reason and rejected[1].reason == 'NUL byte'


def test_byte_order_marks(tmp_path):
  (tmp_path / 'a.txt').write_bytes(b'\xef\xbb\xbfhello\n')
  (tmp_path / 'b.txt').write_bytes('hello'.encode('utf-16'))
  (tmp_path / 'c.jsonl').write_bytes(b'\xef\xbb\xbf{"text": "x"}\n')
  texts, rejected = read(tmp_path)
  assert texts == {'a.txt': 'hello\n', 'b.txt': 'hello', 'c.jsonl#1': 'x'}
  assert [(r.file, r.kept) for r in rejected] == [('a.txt', True), ('b.txt', True), ('c.jsonl', True)]


@pytest.mark.parametrize('content', [b'', b'\n \n\t\n', b'\xef\xbb\xbf'])
def test_empty_files(tmp_path, content):
  (tmp_path / 'a.txt').write_bytes(content)
  texts, rejected = read(tmp_path)
  assert not texts and rejected[-1].reason == 'empty'


def test_a_line_of_300_megabytes(tmp_path):
  with open(tmp_path / 'a.txt', 'wb') as f:
    f.write(b'first\n')
    f.seek(300 << 20)  # Sparse: nothing is written to the disk.
    f.write(b'\nlast\n')
  with open(tmp_path / 'b.jsonl', 'wb') as f:
    f.write(b'{"text": "first"}\n')
    f.seek(300 << 20)
    f.write(b'\n{"text": "last"}\n')
  texts, rejected = read(tmp_path, max_record_bytes=1 << 20)
  assert texts == {'a.txt': 'first\nlast\n', 'b.jsonl#1': 'first', 'b.jsonl#3': 'last'}
  assert [(r.offset, r.line, r.bytes) for r in rejected] == [
      (6, 2, (300 << 20) - 6 + 1), (18, 2, (300 << 20) - 18 + 1)]
  assert all('max_record_bytes' in r.reason for r in rejected)


@hypothesis.given(st.lists(st.text(st.characters(exclude_categories=('Cs',),
                                                 exclude_characters='\0\ufeff')), min_size=1),
                  st.integers(4, 60))
@hypothesis.settings(deadline=None, max_examples=150,
                     suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
def test_pieces_joined_are_the_file(tmp_path, lines, size):
  text = '\n'.join(lines)
  (tmp_path / 'a.txt').write_bytes(text.encode())
  items = list(text_files.read_files(tmp_path, Limits(SUFFIXES, document_bytes=size)))
  pieces = [i.text for i in items if isinstance(i, Document)]
  if all(line.strip() for line in lines):
    assert ''.join(pieces) == text
  assert ''.join(''.join(pieces).split()) == ''.join(text.split())
  assert all(piece.strip() for piece in pieces)


@hypothesis.given(st.lists(st.sampled_from(
    [b'good line', b'also \xc3\xa9', b'bad \xff', b'\0', b'']), max_size=40))
@hypothesis.settings(deadline=None, max_examples=100,
                     suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
def test_every_good_line_survives(tmp_path, lines):
  (tmp_path / 'a.txt').write_bytes(b'\n'.join(lines))
  texts, rejected = read(tmp_path, document_bytes=50)
  good = [line.decode() for line in lines if b'\xff' not in line and b'\0' not in line]
  assert '\n'.join(''.join(texts.values()).split('\n')).split() == ' '.join(good).split()
  bad = [i + 1 for i, line in enumerate(lines) if b'\xff' in line or b'\0' in line]
  assert [r.line for r in rejected if r.reason != 'empty'] == bad


def test_long_files_are_cut_at_blank_lines(tmp_path):
  (tmp_path / 'a.md').write_text('\n\n'.join(f'paragraph {i}' for i in range(100)))
  texts, _ = read(tmp_path, document_bytes=200)
  assert len(texts) > 5 and all(t.startswith('paragraph') for t in texts.values())
  assert list(texts)[:2] == ['a.md#1', 'a.md#2']


def test_jsonl_problems(tmp_path):
  records = [json.dumps({'text': 'good'}), '{broken', json.dumps({'body': 'x'}), '[1]',
             json.dumps({'text': ''}), json.dumps({'text': 5}), json.dumps({'text': 'a\0b'}),
             json.dumps({'text': '\ud800'}), '', json.dumps({'text': 'also good'})]
  (tmp_path / 'a.jsonl').write_text('\n'.join(records))
  texts, rejected = read(tmp_path)
  assert texts == {'a.jsonl#1': 'good', 'a.jsonl#10': 'also good'}
  assert [r.line for r in rejected] == [2, 3, 4, 5, 6, 7, 8]
  reasons = ' | '.join(r.reason for r in rejected)
  for part in ('not JSON', "no field 'text' (found: body)", 'empty', 'holds int', 'NUL',
               'surrogate'):
    assert part in reasons
  assert read(tmp_path, text_key='body')[0] == {'a.jsonl#3': 'x'}


def test_parquet(tmp_path):
  pyarrow = pytest.importorskip('pyarrow')
  pq = pytest.importorskip('pyarrow.parquet')
  pq.write_table(pyarrow.table({'text': ['one', '', None, 'two']}), tmp_path / 'a.parquet')
  pq.write_table(pyarrow.table({'body': ['x']}), tmp_path / 'b.parquet')
  (tmp_path / 'c.parquet').write_bytes(b'nonsense')
  texts, rejected = read(tmp_path)
  assert texts == {'a.parquet#1': 'one', 'a.parquet#4': 'two'}
  assert [r.file for r in rejected] == ['a.parquet', 'a.parquet', 'b.parquet', 'c.parquet']
  assert [r.line for r in rejected][:2] == [2, 3] and 'found: body' in rejected[2].reason


def test_compressed_files_and_archives(tmp_path):
  zstandard = pytest.importorskip('zstandard')
  (tmp_path / 'src').mkdir()
  (tmp_path / 'src' / 'x.txt').write_text('from the archive\n')
  (tmp_path / 'src' / 'y.bin').write_text('not text\n')
  data = tmp_path / 'data'
  (data / 'deep' / 'er').mkdir(parents=True)
  with tarfile.open(data / 't.tar.gz', 'w:gz') as t:
    t.add(tmp_path / 'src', 'src')
  (data / 'deep' / 'er' / 'a.txt.gz').write_bytes(gzip.compress(b'gzipped\n'))
  (data / 'b.jsonl.zst').write_bytes(zstandard.compress(b'{"text": "zipped"}\n'))
  (data / '.hidden.txt').write_text('no')
  (data / 'other.csv').write_text('a,b')
  found = text_files.Listing()
  items = list(text_files.read_files(data, Limits(SUFFIXES), found))
  assert {i.name: i.text for i in items} == {
      't.tar.gz/src/x.txt': 'from the archive\n', 'deep/er/a.txt.gz': 'gzipped\n',
      'b.jsonl.zst#1': 'zipped'}
  assert found.ignored == {'.csv': 1, '.bin': 1} and found.files == 3
  alone = list(text_files.read_files(data / 't.tar.gz', Limits(SUFFIXES)))
  assert [i.name for i in alone] == ['t.tar.gz/src/x.txt']


def test_damaged_compression_keeps_what_came_before(tmp_path):
  whole = gzip.compress(b''.join(b'{"text": "record %d"}\n' % i for i in range(200_000)))
  (tmp_path / 'a.jsonl.gz').write_bytes(whole[:len(whole) // 2])
  text = gzip.compress(b''.join(b'this is line %d\n' % i for i in range(200_000)))
  (tmp_path / 'a.txt.gz').write_bytes(text[:len(text) // 2])
  (tmp_path / 'b.txt.gz').write_bytes(b'not gzip')
  (tmp_path / 'c.txt.zst').write_bytes(b'not zstd')
  (tmp_path / 'd.tar').write_bytes(b'not tar' * 200)
  texts, rejected = read(tmp_path)
  assert len(texts) > 50_000
  assert sum(len(t) for name, t in texts.items() if name.startswith('a.txt')) > 1_500_000
  assert [r.file for r in rejected] == ['a.jsonl.gz', 'a.txt.gz', 'b.txt.gz', 'c.txt.zst', 'd.tar']
  assert all('damaged' in r.reason for r in rejected)
