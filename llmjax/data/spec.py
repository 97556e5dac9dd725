"""The `data` group of a training config, and the config of `llmjax prepare`.  No heavy imports."""

import dataclasses
import difflib
import os
import pathlib

from llmjax import extensions
from llmjax.config import group, setting
from llmjax.data import prepared
from llmjax.text.template_path import split_template

SOURCES = ('python_docs', 'text_dir', 'tfds')
RECORDS = prepared.KINDS
TEMPLATES = ('llmjax', 'chatml', 'qwen', 'llama3', 'gemma', 'plain')
PACKINGS = ('concat', 'best_fit', 'pad')


@dataclasses.dataclass(frozen=True)
class TokenizerSpec:
  """The SentencePiece tokenizer: an existing one, or how to train one."""

  path: str = setting('', "existing tokenizer.model to use; '': train one on the train split", kind='path')
  vocab_size: int = setting(4096, 'vocabulary size, including special tokens and 256 bytes', minimum=300,
                            maximum=1_000_000)
  model_type: str = setting('unigram', 'algorithm; unigram encodes five times faster, bpe trains faster on large '
                            'samples', choices=('unigram', 'bpe'))
  sample_lines: int = setting(20_000, 'number of lines of the train split to train on', minimum=100)
  num_threads: int = setting(2, 'threads for training; the result of unigram depends on their number', minimum=1,
                             maximum=64)
  seed: int = setting(0, 'random seed of the sample', minimum=0)
  special: tuple[str, ...] = setting((), "additional control tokens, such as <|im_start|>,<|im_end|> for a later "
                                     'template=chatml; those of the chat template are always added')

  def validate(self):
    if self.path and self.special:
      yield 'special applies to a tokenizer that is trained; leave it out, or leave path out'
    if self.path and not os.path.isfile(self.path):
      yield f'path={self.path}: there is no such file; name the tokenizer.model of a prepared folder'


@dataclasses.dataclass(frozen=True)
class DataSpec:
  """The `data` group: prepared folders, their mixture, and how documents are packed into sequences."""

  kinds = ('text', 'chat')  # Kinds of record that the command can train on.

  sources: dict[str, float] = setting(
      {'data/python_docs': 1.0}, 'prepared folders and their sampling weights', kind='path')
  seq_len: int = setting(512, 'sequence length in tokens', minimum=2)
  packing: str = setting('concat', 'concat: concatenate documents and cut every seq_len tokens; best_fit: pack whole '
                         'documents; pad: one document per sequence', choices=PACKINGS)
  overflow: str = setting('error', 'what to do with conversations longer than seq_len: raise an error, truncate at the '
                          'end, or drop; text continues in the next sequence', choices=('error', 'truncate', 'drop'))
  workers: int = setting(0, 'data loader processes; 0: load in the training process, which is fast enough for token '
                         'stores', minimum=0, maximum=256)
  tokenizer: str = setting('', "tokenizer.model; '': that of the sources", kind='path')
  allow_mismatch: bool = setting(False, 'allow sources whose tokenizer or chat template differs from that of '
                                 'train.init_from, the teacher or the reward model')

  def validate(self):
    if not self.sources:
      yield 'sources is empty; name a prepared folder: --config.data.sources.data/python_docs=1'
    manifests, errors = self.manifests()
    for folder, weight in self.sources.items():
      if not 0 < weight < float('inf'):
        yield f'sources[{folder}]={weight:g}: a weight must be above 0; leave the folder out'
      if folder in errors:
        yield f'sources: {errors[folder] if prepared.is_prepared(folder) else _how_to_prepare(folder)}'
    hashes = {folder: manifest['tokenizer']['sha256'] for folder, manifest in manifests.items()}
    yield from self._kind_problems(manifests)
    if len(set(hashes.values())) > 1:
      first = next(iter(hashes))
      others = [folder for folder in hashes if hashes[folder] != hashes[first]]
      yield (f'sources: {", ".join(others)} and {first} have different tokenizers; prepare the one again with --force '
             f'--config.tokenizer.path={prepared.tokenizer_path(first)}')
    if self.tokenizer:
      if not os.path.isfile(self.tokenizer):
        yield f'tokenizer={self.tokenizer}: there is no such file; leave it empty'
      elif hashes and prepared.file_sha256(self.tokenizer) not in hashes.values():
        yield (f'tokenizer={self.tokenizer} is not the tokenizer of {next(iter(hashes))}; leave it empty, or prepare '
               f'the folder again with --force --config.tokenizer.path={self.tokenizer}')

  def _kind_problems(self, manifests):
    """Yield the problems with the kinds of record and chat templates of the sources."""
    kinds = {folder: prepared.kind(manifest) for folder, manifest in manifests.items()}
    if wrong := [folder for folder, kind in kinds.items() if kind not in self.kinds]:
      yield (f'sources: {", ".join(wrong)} holds {kinds[wrong[0]]} records, and this command reads '
             f'{" or ".join(self.kinds)}; prepare it with --config.records={self.kinds[-1]}')
    chats = [folder for folder, kind in kinds.items() if kind in ('chat', 'stepwise')]
    if chats and self.packing == 'concat':
      yield f'packing=concat would cut the conversations of {", ".join(chats)}; write packing=best_fit'
    templates = {folder: manifests[folder].get('template') for folder in chats}
    if others := [folder for folder in chats if templates[folder] != templates[chats[0]]]:
      yield (f'sources: {", ".join(others)} and {chats[0]} have different chat templates; prepare the one again with '
             '--force --config.template=NAME')

  def manifests(self):
    """Return ({folder: manifest} of the sources that are prepared, {folder: ValueError} of the others)."""
    manifests, errors = {}, {}
    for folder in self.sources:
      try:
        manifests[folder] = prepared.read_manifest(folder)
      except ValueError as e:
        errors[folder] = e
    return manifests, errors

  def unpaired(self):
    """Return the sources that hold unpaired preferences."""
    return [folder for folder, manifest in self.manifests()[0].items() if manifest.get('unpaired')]

  def record_kinds(self):
    """Return {folder: kind of record} of the sources that are prepared."""
    return {folder: prepared.kind(manifest) for folder, manifest in self.manifests()[0].items()}


def _how_to_prepare(folder):
  """Return the problem with a source folder without a manifest, and the command that prepares it."""
  if near := prepared.near_folders(folder):
    return f'{folder} is not a prepared folder; did you mean {" or ".join(near)}?'
  name = pathlib.Path(folder).name
  if name == 'python_docs':
    command = 'llmjax prepare --config=configs/data/python_docs.py'
    if pathlib.Path(folder) != pathlib.Path('data/python_docs'):
      command += f' --config.output={folder}'
  else:
    command = f'llmjax prepare --text-dir=DIR --config.output={folder}'
  state = 'holds no manifest.json' if os.path.isdir(folder) else 'does not exist'
  return f'{folder} {state}; prepare it first: {command}'


@dataclasses.dataclass(frozen=True)
class PrepareSpec:
  """The config of `llmjax prepare`.  The fields are at the top level."""

  source: str = setting('python_docs', "python_docs: the Python installation's own text; text_dir: the text at path; "
                        'tfds: the TensorFlow dataset of name; module:name: a function of your own that yields '
                        'records (see docs/data_formats.md)')
  path: str = setting('', 'text_dir: a folder (searched recursively), a file or an archive', kind='path')
  name: str = setting('', 'tfds: name of the dataset, such as lm1b or wikipedia/20230601.en')
  text_key: str = setting('', "field of JSONL, Parquet and TFDS records that holds the text; '': text, or the only "
                          'text field of a TFDS dataset')
  suffixes: tuple[str, ...] = setting(
      ('.txt', '.text', '.md', '.markdown', '.rst', '.jsonl', '.ndjson', '.parquet'),
      'text_dir: suffixes of the files to read, also inside .gz, .zst, .bz2, .xz, .tar and .zip')
  records: str = setting('text', 'kind of record. text: plain text; chat: a conversation; preference: a prompt with '
                         'a chosen and a rejected completion; prompts: a prompt and its reference answer; stepwise: a '
                         'prompt and a solution with a label for every step', choices=RECORDS)
  template: str = setting('llmjax', 'chat template; plain: prompt and completion without any template; or a file: '
                          'Jinja, or a tokenizer_config.json, where FILE#NAME selects one of several named templates',
                          kind='path', choices=TEMPLATES)
  reasoning: str = setting('render', 'what to do where the template cannot render reasoning. render: leave the record '
                           'out; drop: leave the reasoning out', choices=('render', 'drop'))
  train_history: bool = setting(False, "also train the assistant's turns in `history` and `prompt`, not only the last "
                                'completion')
  output: str = setting('', "prepared folder to write; '': data/<name of the source>", kind='folder')
  validation_fraction: float = setting(0.05, 'fraction of the bytes for the validation split', minimum=0.0, maximum=0.5)
  test_fraction: float = setting(0.05, 'fraction of the bytes for the test split', minimum=0.0, maximum=0.5)
  document_bytes: int = setting(1 << 20, 'text_dir: size in bytes at which longer text files are split into documents, '
                                'at blank lines', minimum=1024)
  max_record_bytes: int = setting(16 << 20, 'maximum size of a line or record; longer ones are quarantined',
                                  minimum=1024, maximum=1 << 30)
  max_unpacked_bytes: int = setting(1 << 38, 'maximum unpacked size of one compressed file or archive', minimum=1 << 20)
  max_unpacked_ratio: int = setting(200, 'maximum ratio of unpacked to packed size, from 64 MiB on; text compresses by '
                                    'about 5, a decompression bomb by 1,000', minimum=2, maximum=1_000_000)
  max_window_bytes: int = setting(1 << 31, 'maximum window of .zst and .xz files, which is also the memory needed '
                                  '(zstd --long=31 is the most)', minimum=1 << 20, maximum=1 << 31)
  follow_links: bool = setting(False, 'text_dir: follow symbolic links to outside the folder')
  include_site_packages: bool = setting(
      False, 'python_docs: also train on the sources of installed packages; the corpus is then not reproducible')
  tokenizer: TokenizerSpec = group(TokenizerSpec)

  @property
  def folder(self) -> str:
    """The prepared folder."""
    if self.output:
      return self.output
    if self.source == 'text_dir':
      name = pathlib.Path(self.path).resolve().name.split('.')[0]
    else:
      name = self.name.replace('/', '_').replace(':', '_') or self.source.split(':')[-1]
    return str(pathlib.Path('data') / (name or 'text'))

  def validate(self):
    yield from self._source_problems()
    if self.validation_fraction + self.test_fraction > 0.5:
      yield ('validation_fraction and test_fraction leave less than half of the text to train on; '
             'write smaller ones, such as 0.05')
    if self.template not in TEMPLATES and not os.path.isfile(split_template(self.template)[0]):
      near = difflib.get_close_matches(self.template, TEMPLATES, n=1)
      hint = f'did you mean {near[0]}?' if near else f'write one of {", ".join(TEMPLATES)}'
      yield f'template={self.template}: there is no such template or file; {hint}'
    for suffix in self.suffixes:
      if not suffix.startswith('.'):
        yield f'suffixes: {suffix!r} must start with a dot; write {"." + suffix!r}'

  def _source_problems(self):
    if self.source not in SOURCES:
      if not extensions.is_path(self.source):
        near = difflib.get_close_matches(self.source, SOURCES, n=1)
        hint = f'; did you mean {near[0]}?' if near else ''
        yield f'source={self.source!r} must be one of {", ".join(SOURCES)}, or module:name{hint}'
      return
    if self.source == 'text_dir':
      if not self.path:
        yield 'path is missing: name the folder or file with your text, --config.path=DIR'
      elif not os.path.exists(self.path):
        yield f'path={self.path}: there is no such file or folder{_near_path(self.path)}'
      elif not os.access(self.path, os.R_OK):
        yield f'path={self.path} cannot be read: you have no permission'
    elif self.path:
      yield f'path={self.path} is for your own text: add --config.source=text_dir'
    if self.source == 'tfds' and not self.name:
      yield 'name is missing: name a TFDS text dataset, such as --config.name=lm1b'
    if self.source != 'tfds' and self.name:
      yield f'name={self.name} is for TFDS datasets: add --config.source=tfds'
    if self.records != 'text' and self.source == 'python_docs':
      yield (f'records={self.records} is for records of your own: add --config.source=text_dir '
             '--config.path=FILE_OR_DIR')


def _near_path(path):
  parent = pathlib.Path(path).parent
  try:
    names = [p.name for p in parent.iterdir()]
  except OSError:
    return f'; {parent} does not exist either'
  near = difflib.get_close_matches(pathlib.Path(path).name, names, n=1)
  return f'; did you mean {parent / near[0]}?' if near else ''


@dataclasses.dataclass(frozen=True)
class PrepareOptions:
  """Flags of `llmjax prepare`."""

  text_dir: str = setting('', 'folder of text files to prepare; needs no --config', kind='path')
  force: bool = setting(False, 'prepare again where the folder is prepared already')

  @property
  def overrides(self):
    """Fields of the config that the flags set."""
    return [('source', 'text_dir'), ('path', self.text_dir), ('name', '')] if self.text_dir else []
