"""The adapter group of a config.  No JAX here."""

import dataclasses
import re

from llmjax.config import setting

KINDS = ('lora', 'rslora', 'dora')
FORMATS = ('int8', 'nf4')


@dataclasses.dataclass(frozen=True)
class AdapterSpec:
  """Low-rank matrices that train in place of the weights of train.init_from, which stay as they are."""

  kind: str = setting('', 'train adapters of this kind; empty: train all weights', choices=('', *KINDS))
  rank: int = setting(16, 'columns of A and rows of B', minimum=1)
  alpha: float = setting(32.0, 'the product A B counts alpha / rank times; rslora: alpha / sqrt(rank)', minimum=0.0)
  dropout: float = setting(0.0, "rate on the adapters' input, while training; stages and context of a mesh drop others "
                           'than one device does', minimum=0.0, maximum=0.9)
  targets: tuple[str, ...] = setting(
      ('*/attention/*', '*/mlp/*'), 'matrices that get an adapter, by path: patterns such as */attention/query; '
      're:... is a regular expression of the whole path')
  quantize: str = setting('', "keep the blocks' frozen matrices as nf4 (4.2 bits a weight) or int8; empty: as they "
                          'are', choices=('', *FORMATS))
  name: str = setting('default', 'of this adapter')

  @property
  def scale(self):
    """Returns the factor of A B: arXiv:2106.09685, section 4.1; rslora: arXiv:2312.03732, eq. 4."""
    return self.alpha / (self.rank**0.5 if self.kind == 'rslora' else self.rank)

  def validate(self):
    if not self.targets:
      yield "targets is empty; write patterns of weights to adapt, such as */attention/*"
    for pattern in self.targets:
      if pattern.startswith('re:'):
        try:
          re.compile(pattern[3:])
        except re.error as e:
          yield f'targets: {pattern!r} is no regular expression: {e}'
    if not re.fullmatch(r'[A-Za-z0-9_.-]+', self.name) or '..' in self.name:
      yield f'name={self.name!r} must be of letters, digits, _, - and .'
    if self.quantize and not self.kind:
      yield f'quantize={self.quantize} is of a frozen base; set adapter.kind, to lora for example'


@dataclasses.dataclass(frozen=True)
class AdapterShowOptions:
  """Flags of `llmjax adapter show`."""

  workdir: str = setting('', "the folder of a run with adapter.kind", kind='path')
  step: int = setting(0, 'checkpoint; 0: the newest', minimum=0)

  def validate(self):
    yield from missing(self, 'workdir', "the folder of a run with adapter.kind, such as --workdir=runs/lora")


@dataclasses.dataclass(frozen=True)
class AdapterMergeOptions(AdapterShowOptions):
  """Flags of `llmjax adapter merge`."""

  output: str = setting('', "a new run's folder for the merged weights", kind='folder')

  def validate(self):
    yield from super().validate()
    yield from missing(self, 'output', "a new folder, such as --output=runs/merged")


@dataclasses.dataclass(frozen=True)
class AdapterExportOptions(AdapterShowOptions):
  """Flags of `llmjax adapter export`."""

  output: str = setting('', 'a new folder for adapter_config.json and adapter_model.safetensors', kind='folder')
  base_name: str = setting('', "base_model_name_or_path to write there; empty: the run's train.init_from")

  def validate(self):
    yield from super().validate()
    yield from missing(self, 'output', "a new folder, such as --output=adapter")


@dataclasses.dataclass(frozen=True)
class AdapterImportOptions:
  """Flags of `llmjax adapter import`."""

  peft: str = setting('', 'the folder that peft has written', kind='path')
  init_from: str = setting('', "the run that it is for, or one of its checkpoints", kind='path')
  workdir: str = setting('', "a new run's folder for the adapter", kind='folder')

  def validate(self):
    yield from missing(self, 'peft', "the folder that peft has written")
    yield from missing(self, 'init_from', "the run that the adapter is for, such as --init-from=runs/quickstart")
    yield from missing(self, 'workdir', "a new folder, such as --workdir=runs/imported")


def missing(options, name, words):
  """Yields the line for a flag that was not given."""
  if not getattr(options, name):
    yield f'{name} is missing: give {words}'
