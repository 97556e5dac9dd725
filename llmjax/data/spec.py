"""The `data` group of a training config, and the config of `llmjax prepare`.  No heavy imports."""

import dataclasses
import difflib
import os
import pathlib

from llmjax.config import group, setting
from llmjax.data import prepared
from llmjax.text.template_path import split_template

SOURCES = ('python_docs', 'text_dir', 'tfds')
RECORDS = ('text', 'chat', 'pairs', 'prompts', 'steps')
TEMPLATES = ('llmjax', 'chatml', 'qwen', 'llama3', 'gemma', 'plain')
PACKINGS = ('concat', 'best_fit', 'pad')


@dataclasses.dataclass(frozen=True)
class TokenizerSpec:
  """How a SentencePiece tokenizer is trained, or which one is used."""

  path: str = setting('', "a tokenizer.model to use; '': train one on the train split", kind='path')
  vocab_size: int = setting(4096, 'ids, special ones and 256 bytes included', minimum=300,
                            maximum=1_000_000)
  model_type: str = setting('unigram', 'unigram encodes five times faster; bpe trains faster on '
                            'large samples', choices=('unigram', 'bpe'))
  sample_lines: int = setting(20_000, 'lines of the train split to train on', minimum=100)
  num_threads: int = setting(2, 'threads for training; a unigram model depends on their number',
                             minimum=1, maximum=64)
  seed: int = setting(0, 'draws the sample', minimum=0)
  special: tuple[str, ...] = setting((), "control symbols besides llmjax's own, such as <|im_start|>,<|im_end|> for a "
                                     "later template=chatml; a template's own come by themselves")

  def validate(self):
    if self.path and self.special:
      yield 'special is for a tokenizer that is trained; leave it out beside path'
    if self.path and not os.path.isfile(self.path):
      yield f'path={self.path}: there is no such file; name a tokenizer.model of a prepared folder'


@dataclasses.dataclass(frozen=True)
class DataSpec:
  """The `data` group: which prepared folders are mixed, and how documents become rows."""

  kinds = ('text', 'chat')  # What the sources may hold.

  sources: dict[str, float] = setting(
      {'data/python_docs': 1.0}, 'prepared folders and the share of rows each one gives', kind='path')
  seq_len: int = setting(512, 'targets in a row', minimum=2)
  packing: str = setting('concat', 'concat: rows are filled from consecutive documents, which may go on in the next '
                         'row; best_fit: whole documents, as many as fit; pad: one document a row', choices=PACKINGS)
  overflow: str = setting('error', 'conversations longer than seq_len: raise an error, truncate at the end, or drop; '
                            'text continues in the next sequence', choices=('error', 'truncate', 'drop'))
  workers: int = setting(0, 'processes that build batches; 0: the training process itself, which '
                         'suffices for token stores', minimum=0, maximum=256)
  tokenizer: str = setting('', "a tokenizer.model; '': the sources' own", kind='path')
  allow_mismatch: bool = setting(False, 'read sources that were prepared with another tokenizer or chat template than '
                                 'the run that training starts from, its teacher or its reward model has')

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
    kinds = {folder: prepared.kind(manifest) for folder, manifest in manifests.items()}
    if wrong := [folder for folder, kind in kinds.items() if kind not in self.kinds]:
      yield (f'sources: {", ".join(wrong)} holds {kinds[wrong[0]]}, and this command reads {" or ".join(self.kinds)}; '
             f'prepare it with --config.records={self.kinds[-1]}')
    chats = [folder for folder, kind in kinds.items() if kind in ('chat', 'steps')]
    if chats and self.packing == 'concat':
      yield (f'packing=concat would cut the conversations of {", ".join(chats)} at the ends of rows; write '
             'packing=best_fit')
    if len(set(hashes.values())) > 1:
      first = next(iter(hashes))
      others = [folder for folder in hashes if hashes[folder] != hashes[first]]
      yield (f'sources: {", ".join(others)} and {first} have different tokenizers; prepare the '
             'one again with --force '
             f'--config.tokenizer.path={prepared.tokenizer_path(first)}')
    templates = {folder: manifests[folder].get('template') for folder in chats}
    if others := [folder for folder in chats if templates[folder] != templates[chats[0]]]:
      yield (f'sources: {", ".join(others)} and {chats[0]} have different chat templates; prepare the one again with '
             '--force --config.template=NAME')
    if self.tokenizer:
      if not os.path.isfile(self.tokenizer):
        yield f'tokenizer={self.tokenizer}: there is no such file; leave it empty'
      elif hashes and prepared.file_sha256(self.tokenizer) not in hashes.values():
        yield (f'tokenizer={self.tokenizer} did not make the tokens of {next(iter(hashes))}; leave '
               'it empty, or prepare the folder again with --force '
               f'--config.tokenizer.path={self.tokenizer}')

  def manifests(self):
    """Returns ({folder: manifest} of the sources that are prepared, {folder: ValueError} of the others)."""
    manifests, errors = {}, {}
    for folder in self.sources:
      try:
        manifests[folder] = prepared.read_manifest(folder)
      except ValueError as e:
        errors[folder] = e
    return manifests, errors

  def unpaired(self):
    """Returns the sources that hold unpaired preferences."""
    return [folder for folder, manifest in self.manifests()[0].items() if manifest.get('unpaired')]

  def held(self):
    """Returns {folder: what it holds, such as 'pairs'} of the sources that are prepared."""
    return {folder: prepared.kind(manifest) for folder, manifest in self.manifests()[0].items()}


def _how_to_prepare(folder):
  """Returns what is wrong with a source folder that has no manifest, and the command to type."""
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
  """Everything that `llmjax prepare` needs.  The fields are at the top level of the config."""

  source: str = setting('python_docs', "python_docs: the Python installation's own text; text_dir: "
                        'files of yours; tfds: a TensorFlow Datasets name', choices=SOURCES)
  path: str = setting('', 'text_dir: a folder (searched recursively), a file or an archive', kind='path')
  name: str = setting('', 'tfds: name of the dataset, such as lm1b or wikipedia/20230601.en')
  text_key: str = setting('', "field of JSONL, Parquet and TFDS records that holds the text; '': "
                          "text, or a TFDS dataset's only text field")
  suffixes: tuple[str, ...] = setting(
      ('.txt', '.text', '.md', '.markdown', '.rst', '.jsonl', '.ndjson', '.parquet'),
      'text_dir: files to read, also inside .gz, .zst, .bz2, .xz, .tar and .zip')
  records: str = setting('text', 'what a record is. text: text; chat: a conversation; pairs: a prompt with a chosen '
                         'and a rejected answer; prompts: a prompt and the right answer; steps: a prompt and a '
                         'solution whose steps are judged one by one', choices=RECORDS)
  template: str = setting('llmjax', 'chat template of conversations; plain: the prompt and its completion, nothing '
                          'else; a file: Jinja, or a tokenizer_config.json, of whose named templates FILE is the one '
                          'named default and FILE#NAME another', kind='path', choices=TEMPLATES)
  reasoning: str = setting('render', "the assistant's reasoning where the template has no place for it. render: the "
                           'record is left out; drop: only the reasoning is, and such records are counted',
                           choices=('render', 'drop'))
  train_history: bool = setting(False, "train the assistant's turns in `history` and in `prompt`, too, not only the "
                                'last output')
  output: str = setting('', "the prepared folder; '': data/<name of the source>", kind='folder')
  validation_fraction: float = setting(0.05, 'share of bytes held out for evaluation while '
                                       'training', minimum=0.0, maximum=0.5)
  test_fraction: float = setting(0.05, 'share of bytes held out to the end', minimum=0.0,
                                 maximum=0.5)
  document_bytes: int = setting(1 << 20, 'text_dir: longer text files are cut into documents of '
                                'about this size, at blank lines', minimum=1024)
  max_record_bytes: int = setting(16 << 20, 'longer lines and records are quarantined',
                                  minimum=1024, maximum=1 << 30)
  max_unpacked_bytes: int = setting(1 << 38, 'what one compressed file or archive may unpack to; what came '
                                    'before is kept', minimum=1 << 20)
  max_unpacked_ratio: int = setting(200, 'the same, in times its size, from 64 MiB on: text compresses to a '
                                    'fifth, bombs to a thousandth', minimum=2, maximum=1_000_000)
  max_window_bytes: int = setting(1 << 31, 'how far back a .zst or .xz file may refer, which takes that much memory '
                                  '(zstd --long=31 is the most)', minimum=1 << 20, maximum=1 << 31)
  follow_links: bool = setting(False, 'text_dir: read what symbolic links lead to outside the folder')
  include_site_packages: bool = setting(
      False, "python_docs: train on installed packages' sources too; nobody else has that corpus")
  tokenizer: TokenizerSpec = group(TokenizerSpec)

  @property
  def folder(self) -> str:
    """Where the prepared corpus goes."""
    if self.output:
      return self.output
    if self.source == 'text_dir':
      name = pathlib.Path(self.path).resolve().name.split('.')[0]
    else:
      name = self.name.replace('/', '_').replace(':', '_') or self.source
    return str(pathlib.Path('data') / (name or 'text'))

  def validate(self):
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
    if self.validation_fraction + self.test_fraction > 0.5:
      yield ('validation_fraction and test_fraction leave less than half of the text to train on; '
             'write smaller ones, such as 0.05')
    if self.records != 'text' and self.source == 'python_docs':
      yield f'records={self.records} is for records of yours: add --config.source=text_dir --config.path=FILE_OR_DIR'
    if self.template not in TEMPLATES and not os.path.isfile(split_template(self.template)[0]):
      near = difflib.get_close_matches(self.template, TEMPLATES, n=1)
      hint = f'did you mean {near[0]}?' if near else f'write one of {", ".join(TEMPLATES)}'
      yield f'template={self.template}: there is no such template or file; {hint}'
    for suffix in self.suffixes:
      if not suffix.startswith('.'):
        yield f'suffixes: {suffix!r} must start with a dot; write {"." + suffix!r}'


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

  text_dir: str = setting('', 'prepare the text files of this folder; needs no --config', kind='path')
  force: bool = setting(False, 'prepare again what is already prepared')

  @property
  def overrides(self):
    """Fields of the config that the flags set."""
    return [('source', 'text_dir'), ('path', self.text_dir), ('name', '')] if self.text_dir else []
