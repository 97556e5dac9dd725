"""Archives and folders made to do harm: nothing is written, followed, awaited or unpacked without end."""

import gzip
import io
import os
import stat
import tarfile
import time
import zipfile
import zlib

import pytest

from llmjax.data import text_files
from llmjax.data.documents import Document, Limits, Rejected

SUFFIXES = ('.txt', '.md', '.jsonl', '.parquet')
MIB = 1 << 20
BLANK = b' ' * (MIB - 1) + b'\n'


def read(path, **kwargs):
  """Returns ({name: text}, {file: reason})."""
  items = list(text_files.read_files(path, Limits(SUFFIXES, **kwargs)))
  return ({i.name: i.text for i in items if isinstance(i, Document)},
          {i.file: i.reason for i in items if isinstance(i, Rejected)})


def add(archive, name, content=b'text\n', **fields):
  info = tarfile.TarInfo(name)
  info.size = len(content)
  for field, value in fields.items():
    setattr(info, field, value)
  archive.addfile(info, io.BytesIO(content) if info.size else None)


def everything(folder):
  return sorted(str(p.relative_to(folder)) for p in folder.rglob('*'))


def test_members_that_climb_out_write_nothing(tmp_path):
  data = tmp_path / 'in' / 'data'
  data.mkdir(parents=True)
  names = ['../evil.txt', '../../evil.txt', '/tmp/evil-of-llmjax.txt', 'a/../../b.txt', '~/evil.txt', 'C:\\evil.txt',
           'line\nbreak\x1b[2J.txt', 'x' * 300 + '.txt', 'good.txt']
  with tarfile.open(data / 't.tar', 'w') as t, zipfile.ZipFile(data / 'z.zip', 'w') as z:
    for name in names:
      add(t, name)
      z.writestr(name, b'text\n')
  before = everything(tmp_path)
  texts, rejected = read(data)
  assert everything(tmp_path) == before and not os.path.exists('/tmp/evil-of-llmjax.txt')
  assert len(texts) == 2 * len(names) and set(texts.values()) == {'text\n'} and not rejected
  assert all(name.isprintable() for name in texts)


def test_links_and_devices_in_archives(tmp_path):
  (tmp_path / 'secret.txt').write_text('secret\n')
  data = tmp_path / 'data'
  data.mkdir()
  with tarfile.open(data / 't.tar', 'w') as t:
    for name, kind in (('s.txt', tarfile.SYMTYPE), ('h.txt', tarfile.LNKTYPE), ('c.txt', tarfile.CHRTYPE),
                       ('b.txt', tarfile.BLKTYPE), ('f.txt', tarfile.FIFOTYPE)):
      add(t, name, b'', type=kind, linkname='../secret.txt')
    add(t, 'good.txt')
  with zipfile.ZipFile(data / 'z.zip', 'w') as z:
    link = zipfile.ZipInfo('s.txt')
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    z.writestr(link, '../secret.txt')
    z.writestr('good.txt', 'text\n')
  texts, rejected = read(data)
  assert texts == {'t.tar/good.txt': 'text\n', 'z.zip/good.txt': 'text\n'}
  assert len(rejected) == 6 and set(rejected.values()) == {'a link or a device in an archive'}


def test_links_and_pipes_in_folders(tmp_path):
  (tmp_path / 'secret.txt').write_text('secret\n')
  data = tmp_path / 'data'
  (data / 'sub').mkdir(parents=True)
  (data / 'good.txt').write_text('text\n')
  (data / 'inside.txt').symlink_to('good.txt')
  (data / 'outside.txt').symlink_to(tmp_path / 'secret.txt')
  (data / 'sub' / 'climbs.txt').symlink_to('../../secret.txt')
  (data / 'nowhere.txt').symlink_to('absent')
  (data / 'loop.txt').symlink_to('loop.txt')
  (data / 'zero.txt').symlink_to('/dev/zero')
  os.mkfifo(data / 'pipe.txt')
  texts, rejected = read(data)
  assert set(texts) == {'good.txt', 'inside.txt'}
  assert set(rejected) == {'outside.txt', 'sub/climbs.txt', 'nowhere.txt', 'loop.txt', 'zero.txt', 'pipe.txt'}
  assert 'follow_links=true' in rejected['outside.txt'] and rejected['pipe.txt'] == 'not a regular file'
  followed, rejected = read(data, follow_links=True)
  assert followed['sub/climbs.txt'] == 'secret\n' and rejected['zero.txt'] == 'not a regular file'
  # A file and a folder that are named may themselves be links: the user has chosen them.
  (tmp_path / 'link').symlink_to(data)
  assert set(read(tmp_path / 'link')[0]) == set(texts)
  assert read(data / 'outside.txt')[0] == {'outside.txt': 'secret\n'}


def zeros(count):
  """Returns a gzip file of `count` blanks, a multiple of a MiB, quickly."""
  packer = zlib.compressobj(9, wbits=31)
  block = BLANK
  return b''.join([*(packer.compress(block) for _ in range(count // MIB)), packer.flush()])


@pytest.mark.slow
def test_bombs(tmp_path):
  big = zeros(80 * MIB)
  data = tmp_path / 'data'
  data.mkdir()
  (data / 'bomb.txt.gz').write_bytes(gzip.compress(b'before\n') + big)
  (data / 'bomb.jsonl.gz').write_bytes(gzip.compress(b'{"text": "before"}\n') + big)
  with tarfile.open(data / 'bomb.tar', 'w') as t:
    add(t, 'before.txt')
    add(t, 'bomb.txt.gz', big)
  with zipfile.ZipFile(data / 'bomb.zip', 'w', zipfile.ZIP_DEFLATED) as z:
    z.writestr('before.txt', 'text\n')
    with z.open('bomb.txt', 'w') as f:
      for _ in range(80):
        f.write(BLANK)
  (data / 'good.txt').write_text('text\n')
  begin = time.process_time()
  texts, rejected = read(data)
  assert time.process_time() - begin < 5
  assert {name: text.strip() for name, text in texts.items()} == {
      'bomb.txt.gz#1': 'before', 'bomb.jsonl.gz#1': 'before', 'bomb.tar/before.txt': 'text',
      'bomb.zip/before.txt': 'text', 'good.txt': 'text'}
  assert sum('max_unpacked_ratio=200' in reason for reason in rejected.values()) == 4, rejected
  texts, rejected = read(data, max_unpacked_bytes=70 * MIB, max_unpacked_ratio=1_000_000)
  assert sum(f'max_unpacked_bytes={70 * MIB}' in reason for reason in rejected.values()) == 4
  assert 'good.txt' in texts
  assert set(read(data, max_unpacked_ratio=1_000_000)[1].values()) == {'empty'}


def test_sparse_members_and_archives_within_archives(tmp_path):
  inner = b'deep\n'
  for level in range(6):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode='w') as t:
      add(t, 'a.tar' if level else 'a.txt', inner)
    inner = out.getvalue()
  (tmp_path / 'deep.tar').write_bytes(inner)
  out = io.BytesIO()
  with zipfile.ZipFile(out, 'w') as z:
    z.writestr('x.txt', 'x\n')
  with tarfile.open(tmp_path / 'mixed.tar.gz', 'w:gz') as t:
    add(t, 'in.zip', out.getvalue())
  texts, rejected = read(tmp_path)
  assert texts == {'mixed.tar.gz/in.zip/x.txt': 'x\n'}
  assert rejected == {'deep.tar/a.tar/a.tar/a.tar': 'an archive within 3 archives'}


def test_parquet_that_repeats_one_long_text(tmp_path):
  pyarrow = pytest.importorskip('pyarrow')
  pq = pytest.importorskip('pyarrow.parquet')
  rows = 40_000
  text = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * rows, pyarrow.int32()), ['long ' * 1000])
  pq.write_table(pyarrow.table({'text': text}), tmp_path / 'a.parquet')
  assert (tmp_path / 'a.parquet').stat().st_size < 20_000
  texts, rejected = read(tmp_path)
  assert 'max_unpacked_ratio' in rejected['a.parquet'] and 1000 < len(texts) < rows


def test_encrypted_members_and_odd_methods(tmp_path):
  with zipfile.ZipFile(tmp_path / 'z.zip', 'w') as z:
    z.writestr('a.txt', 'text\n')
    z.writestr('b.txt', 'text\n')
    z.writestr('c.txt', 'text\n')
  data = bytearray((tmp_path / 'z.zip').read_bytes())
  place = data.find(b'PK\x01\x02')
  data[place + 8] |= 1  # Of a.txt: encrypted.
  place = data.find(b'PK\x01\x02', place + 1)
  data[place + 10] = 97  # Of b.txt: a method that no zipfile has.
  (tmp_path / 'z.zip').write_bytes(data)
  texts, rejected = read(tmp_path)
  assert texts == {'z.zip/c.txt': 'text\n'}
  assert rejected['z.zip/a.txt'] == 'encrypted, which is not supported: unpack it'
  assert rejected['z.zip/b.txt'].startswith('unsupported file') and 'with deflate' in rejected['z.zip/b.txt']


def test_names_that_are_no_text(tmp_path):
  names = [b'\xff\xfe.txt', b'new\nline.txt', b'\x1b[31mred.txt', 'é.txt'.encode()]
  for name in names:
    with open(os.path.join(os.fsencode(tmp_path), name), 'wb') as f:
      f.write(b'text\n')
  texts, rejected = read(tmp_path)
  assert set(texts) == {'\\xff\\xfe.txt', 'new\\nline.txt', '\\x1b[31mred.txt', 'é.txt'} and not rejected
