"""What valid files of every format may have: all of it is read, or named as unsupported with a way to convert it."""

import base64
import bz2
import gzip
import io
import json
import lzma
import struct
import tarfile
import zipfile

import pytest
import zstandard

from llmjax.data import records, text_files
from llmjax.data.documents import Document, Limits, Rejected

SUFFIXES = ('.txt', '.jsonl', '.parquet')


def read(path, **kwargs):
  """Returns (texts in order, [reason of each that was left out])."""
  items = list(text_files.read_files(path, Limits(**{'suffixes': SUFFIXES, **kwargs})))
  return [i.text for i in items if isinstance(i, Document)], [i.reason for i in items if isinstance(i, Rejected)]


def line(number):
  return json.dumps({'text': f'document {number}'}).encode() + b'\n'


ZSTD = zstandard.ZstdCompressor()
# `tar --sparse` in GNU's format and in those of pax, as base85 of xz.
SPARSE = [
    '{Wp48S^xk9=GL@E0stWa8~^|S5YJf5;3xk8p<MtuoCrqgRo~N0YeENfkA@^iC8QvPh!hZ^&>>8xBx0Y&;+t)161L{?XyM;<m$rQ9o=6Kt7y3'
    'w!^^lED)ynMv0}xcxHE~0OSBeVm&uJq&%CE+p<e4=#Lm82+q(FwCu4JcE*9x?Yb_ZSI&GVu0fU<g;1A&%{SY9YFP2+g-l4-G4z25RevpT#2#'
    'dsx@4B_(PjNm{vn}(r?6#7#D00000su4B93J)CB00F%LfKUJcO=X1HvBYQl0ssI200dcD',
    '{Wp48S^xk9=GL@E0stWa8~^|S5YJf5;3xk9Azc6$3&w|%T05tY$0ZK95A$BpKjlyScV3NgTTlDMt312EaFSu-{3{k|*oTT2q>{TlqpgJygJQ'
    '7@{n&A-+3uEmUTW*WG={$r2X*YX0nralUc17%x!U$<ka;vW9$o%b4!##`*Bk+Wv*bjNv-x?|GL&(^pV0t`uJbMIoO-l;aG^GM6Yu+$zS{oVC'
    '@KH)LOT2s$9G{2VAYpqGyO_&+5}8IOQxloK+1Pu0K*uuost5Ir=Cp`6@@v%d`SfDvP$V)<eCn&h;*Tl(!z?2>3R*GCLS(Y&LTBAj-8W>?I$E'
    't#D-pr$dIr3<;m#>(zS6+Dls&1XBE;t#pJif-iLp#*$(+IbIU57xZ-E;`VB+H&zNj+QY}A+>Wa|-00000<hdOI9L70!00F%MfKUJcogXBgvB'
    'YQl0ssI200dcD',
    '{Wp48S^xk9=GL@E0stWa8~^|S5YJf5;3xk9CtUy+3&w|%T05tY$0ZK95A$BpKjlyScV3NgTTlDMt312EaFSu-{3{X(dMvk^I?oIH>M~o-(6<'
    'ZaAL~^QWL%sd>znW0+K0ug(VJ0kS(`k-f-@gPG<C_($t!(&=T$~jcro0-&P8>-5q)NO8Fju?ICnJ<8d!c4%}EeFv=<S*d(w$WEJ^doIoRAFb'
    '+w=I%O*3AQWK~>UcnVa#uPQ~A_+hjDK;r$ax4R(6I&z=F4}G4AP>CN%3xljXg7b4^pn-=kf^s{7(9&MgRm&}k2_|7cpL<plV)RxPII^z2em$'
    '$pCk-ROPTa(3OMG~m&YJ@nz3IF9AxD%l?TS+TkuaR%<eZPDbC$=LQ#OUVsQ|P@rH;$1PWI75$iV;$$DQX4FCWDms`?*2f)e300F}SfKUJcEO'
    'QL6vBYQl0ssI200dcD',
    '{Wp48S^xk9=GL@E0stWa8~^|S5YJf5;3xk9E?oc@3&w|%T05tY$0ZK95A$BpKjlyScV3NgTTlDMt312EaFSu-{3{X#Q9!Z!$0o2A3jaEUJ~S'
    '&gue`M^6@Og7%a2^RnBH*uDAoTnAD`W&<Kcb;rQv~<a`XC2Y(JU~#AA)kJ>Ic`Z)M2Rl#_l$2soGz9za(#aemf7Oh4AFf7d+FRqrcVF_UCX2'
    'n1FiSZ8!Z-!Pw=teuz4`MnSb%4fEq?0Q5Auk|F$1l8VY1pW|>(maJ`w5)71kA>%wp74<g+~eklN~C%V*x%8e2dEguv#|du$CdwSw|V?jgM?I'
    'fgc2(1F2=MCY1J$o+8Q`eFywS-7yZeit~7w%^LfR0&jg4v@?kBGowJKn$Gjl)v`juY5<wcB4_Z3nL^Uiy4w^@3+Rud0000007V^_!b-42W00'
    'GJZfKUJc<RSxzvBYQl0ssI200dcD',]
SKIPPED = struct.pack('<II', 0x184D2A50, 5) + b'hello'


def long_window(log):
  parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=log, enable_ldm=True)
  packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
  return packer.compress(b''.join(line(i) for i in range(40))) + packer.flush()


@pytest.mark.parametrize('log', [28, 31])
def test_long_windows_of_zstd(tmp_path, log):
  (tmp_path / 'a.jsonl.zst').write_bytes(long_window(log))
  assert zstandard.get_frame_parameters(long_window(log)).window_size == 1 << log
  assert read(tmp_path) == ([f'document {i}' for i in range(40)], [])
  texts, (reason,) = read(tmp_path, max_window_bytes=1 << 27)
  assert not texts and f'its window of {1 << log:,} bytes is more than max_window_bytes=134217728; raise' in reason
  assert 'repack it: zstd -dc' in reason and 'damaged' not in reason


MEMBERS = {
    '.zst': [
        [ZSTD.compress(line(1)), ZSTD.compress(line(2))],
        [SKIPPED, ZSTD.compress(line(1)), SKIPPED, ZSTD.compress(b''), ZSTD.compress(line(2)), SKIPPED]],
    '.gz': [
        [gzip.compress(line(1)), gzip.compress(line(2))],
        [gzip.compress(line(1)), b'\0' * 9, gzip.compress(b''), gzip.compress(line(2)), b'\0' * 512]],
    '.bz2': [[bz2.compress(line(1)), bz2.compress(line(2))]],
    '.xz': [
        [lzma.compress(line(1)), lzma.compress(line(2))],
        [lzma.compress(line(1)), b'\0' * 8, lzma.compress(line(2))],
        [lzma.compress(line(1) + line(2), format=lzma.FORMAT_ALONE)]],
}


@pytest.mark.parametrize('suffix', MEMBERS)
def test_members_and_what_may_be_between_them(tmp_path, suffix):
  for i, parts in enumerate(MEMBERS[suffix]):
    (tmp_path / f'{i}.jsonl{suffix}').write_bytes(b''.join(parts))
  assert read(tmp_path) == (['document 1', 'document 2'] * len(MEMBERS[suffix]), [])


@pytest.mark.parametrize('suffix, pack', [
    ('.zst', ZSTD.compress), ('.gz', gzip.compress), ('.bz2', bz2.compress), ('.xz', lzma.compress)])
def test_a_file_that_breaks_off_is_named_and_what_came_before_is_kept(tmp_path, suffix, pack):
  last = b''.join(line(i) for i in range(2, 300))
  file = tmp_path / f'a.jsonl{suffix}'
  for fault in (pack(last)[:-1], pack(last)[:20], b'no such format, for sure'):
    file.write_bytes(pack(line(1)) + fault)
    texts, (reason,) = read(tmp_path)
    assert texts[0] == 'document 1' and reason.startswith('damaged file, the rest is lost: ')
  file.write_bytes(pack(line(1)) + pack(last))
  assert len(read(tmp_path)[0]) == 299


def test_large_members_come_whole(tmp_path):
  lines = b''.join(line(i) for i in range(60_000))
  quick = lambda data: lzma.compress(data, preset=0)
  for suffix, pack in (('zst', ZSTD.compress), ('gz', gzip.compress), ('xz', quick)):
    (tmp_path / f'a.jsonl.{suffix}').write_bytes(pack(lines))
  texts, rejected = read(tmp_path)
  assert texts == [f'document {i}' for i in range(60_000)] * 3 and not rejected


def test_what_is_not_supported_says_how_to_convert_it(tmp_path):
  trained = zstandard.train_dictionary(1000, [line(i) * 3 for i in range(500)])
  xz = lzma.compress(line(1), preset=lzma.PRESET_EXTREME | 9)  # A window of 64 MiB.
  for name, content, expected in (
      ('a.jsonl.zst', zstandard.ZstdCompressor(dict_data=trained).compress(line(1)), 'zstd -dc -D DICTIONARY FILE'),
      ('a.jsonl.xz', xz, 'max_window_bytes=1048576; raise that, or repack it'),
      ('a.jsonl.lz4', b'x', '.lz4 is not supported; unpack or repack it: lz4 -dc FILE | zstd'),
      ('a.7z', b'x', '7z x FILE'),
      ('a.tar.Z', b'x', 'uncompress -c FILE'), ('a.txt.br', b'x', 'brotli -dc FILE'),
      ('a.rar', b'x', 'unrar x FILE'),
      ('a.jsonl', b'{\n "data": [\n{"text": "a"}]}', "jq -c '.FIELD[]' FILE > NEW.jsonl")):
    (tmp_path / name).write_bytes(content)
    texts, (reason,) = read(tmp_path / name, max_window_bytes=1 << 20)
    assert not texts and expected in reason and 'damaged' not in reason
  found = text_files.Listing()
  (tmp_path / 'a.csv.lz4').write_bytes(b'x')  # Of a kind that is not read in any case.
  assert not list(text_files.read_files(tmp_path / 'a.csv.lz4', Limits(SUFFIXES), found))
  assert found.ignored == {'.csv.lz4': 1}


@pytest.mark.parametrize('name, pack', [
    ('a.tgz', gzip.compress), ('a.tar.gz', gzip.compress), ('a.tbz2', bz2.compress), ('a.txz', lzma.compress),
    ('a.tzst', ZSTD.compress), ('a.tar.zstd', ZSTD.compress), ('a.tar', bytes)])
@pytest.mark.parametrize('form', [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_tars(tmp_path, name, pack, form):
  out = io.BytesIO()
  with tarfile.open(fileobj=out, mode='w', format=form) as archive:
    for i, member in enumerate(('short.jsonl', 'long' * 60 + '.jsonl', 'dir/é.jsonl', 'later.jsonl')):
      info = tarfile.TarInfo(member)
      info.size, info.uid, info.mtime = len(line(i)), 3_000_000, 1.5
      archive.addfile(info, io.BytesIO(line(i)))
  (tmp_path / name).write_bytes(pack(out.getvalue()))
  assert read(tmp_path) == ([f'document {i}' for i in range(4)], [])


def test_sparse_tars(tmp_path):
  """GNU tar's four forms of a file of 64 KiB: a line, a hole of NUL bytes, and another line."""
  for i, packed in enumerate(SPARSE):
    (tmp_path / f'{i}.tar.xz').write_bytes(base64.b85decode(packed))
  texts, rejected = read(tmp_path)
  assert texts == ['document 1', 'document 2'] * 4 and rejected == ['NUL byte'] * 4


@pytest.mark.parametrize('method', [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_zips(tmp_path, method):
  with zipfile.ZipFile(tmp_path / 'a.zip', 'w', method) as archive:
    for i in (1, 2):
      with archive.open(f'é{i}.jsonl', 'w', force_zip64=True) as member:
        member.write(line(i))
    archive.comment = b'a comment'
  data = (tmp_path / 'a.zip').read_bytes()
  (tmp_path / 'a.zip').write_bytes(b'#!/bin/sh that unpacks\n' + data)
  assert read(tmp_path) == (['document 1', 'document 2'], [])


@pytest.mark.parametrize('encoding', ['utf-8-sig', 'utf-16', 'utf-16-le', 'utf-16-be', 'utf-32', 'utf-32-be'])
def test_encodings_with_a_mark(tmp_path, encoding):
  mark = '' if encoding in ('utf-8-sig', 'utf-16', 'utf-32') else '\ufeff'
  text = 'caf\u00e9 \U0001f600\r\nzw\u00f6lf\r\n' * 30_000
  (tmp_path / 'a.txt').write_bytes((mark + text).encode(encoding))
  (tmp_path / 'b.jsonl').write_bytes((mark + '{"text": "é"}\r\n{"text": "b"}\r\n').encode(encoding))
  (tmp_path / 'c.jsonl.gz').write_bytes(gzip.compress((mark + '\n[{"text": "é"},\r\n{"text": "b"}]').encode(encoding)))
  texts, reasons = read(tmp_path, document_bytes=10 << 20)
  assert texts == [text, 'é', 'b', 'é', 'b'] and reasons == ['byte-order mark removed, text kept'] * 3
  (tmp_path / 'a.txt').write_bytes((mark + 'good\nbad \ud800\nalso good\n').encode(encoding, 'surrogatepass'))
  texts, reasons = read(tmp_path / 'a.txt')
  assert texts == ['good\nalso good\n'] and 'invalid UTF-8 (byte 0xed)' in reasons[1]
  if encoding != 'utf-8-sig':
    (tmp_path / 'a.txt').write_bytes((mark + 'good\ncut').encode(encoding)[:-1])
    texts, reasons = read(tmp_path / 'a.txt')
    assert texts[0].startswith('good\n') and 'truncated data' in reasons[-1]


def test_arrays_and_lines_by_either_name(tmp_path):
  limits = {'suffixes': ('.json', '.jsonl', '.ndjson'), 'normalise': lambda record: record['text']}
  records = [{'text': f'{i} ' + 'x' * (i * 997 % 5000)} for i in range(2000)]
  forms = [json.dumps(records), json.dumps(records, indent=2), ''.join(json.dumps(r) + '\r\n' for r in records),
           ' \n' + json.dumps(records) + '\n\n']
  for i, form in enumerate(forms):
    for suffix in ('json', 'jsonl', 'ndjson'):
      (tmp_path / f'a.{suffix}').write_text(form)
      assert read(tmp_path / f'a.{suffix}', **limits) == ([r['text'] for r in records], []), i
  for fault, reason in ((b'[{"text": "a"}, {"text": "b"', 'not JSON, the rest is lost'),
                        (b'[{"text": "a"} {"text": "b"}]', "'{' where , or ] is expected"),
                        (b'[{"text": "a"}, {"text": "' + b'x' * (6 << 20), 'no end of a record within max_record_'),
                        (b'[{"text": "a"}, {"text": "\xff"}]', "can't decode byte 0xff")):
    (tmp_path / 'b.json').write_bytes(fault)
    texts, (found,) = read(tmp_path / 'b.json', max_record_bytes=1 << 20, **limits)
    assert texts == ['a'] and reason in found
  _, reasons = read(tmp_path / 'a.json', **{**limits, 'max_record_bytes': 4000})
  assert reasons[0] == 'record longer than max_record_bytes=4000'
  (tmp_path / 'c.json').write_text('[]')
  assert read(tmp_path / 'c.json', **limits) == ([], [])


@pytest.mark.parametrize('compression', ['none', 'snappy', 'gzip', 'brotli', 'zstd', 'lz4'])
def test_parquet_compressions(tmp_path, compression):
  pyarrow, pq = pytest.importorskip('pyarrow'), pytest.importorskip('pyarrow.parquet')
  pq.write_table(pyarrow.table({'text': ['one', 'two']}), tmp_path / 'a.parquet', compression=compression)
  assert read(tmp_path) == (['one', 'two'], [])


def test_parquet_types(tmp_path):
  pyarrow, pq = pytest.importorskip('pyarrow'), pytest.importorskip('pyarrow.parquet')
  texts = pyarrow.array(['one', 'two'])
  for name, column in (('large', texts.cast(pyarrow.large_string())), ('view', texts.cast(pyarrow.string_view())),
                       ('binary', texts.cast(pyarrow.binary())), ('dictionary', texts.dictionary_encode())):
    pq.write_table(pyarrow.table({'text': column}), tmp_path / f'{name}.parquet')
  assert read(tmp_path) == (['one', 'two'] * 4, [])
  said = [{'role': 'user', 'content': 'q'}, {'role': 'assistant', 'content': 'a', 'weight': 0.5}]
  rows = [{'messages': said, 'id': i} for i in range(2)]
  nested = pyarrow.Table.from_pylist(rows).append_column('when', pyarrow.array([1, 2], pyarrow.timestamp('us')))
  (tmp_path / 'nested').mkdir()
  pq.write_table(nested, tmp_path / 'nested' / 'a.parquet', row_group_size=1)
  made, reasons = read(tmp_path / 'nested', normalise=records.normaliser('chat'))
  assert [json.loads(text)['messages'][1]['content'] for text in made] == ['a', 'a'] and not reasons
