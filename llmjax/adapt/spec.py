"""The adapter group of a config, and the flags of `llmjax adapter`. No JAX here."""

import dataclasses
import re

from llmjax.config import setting

KINDS = ('lora', 'rslora', 'dora')
FORMATS = ('int8', 'nf4')


@dataclasses.dataclass(frozen=True)
class AdapterSpec:
  """Low-rank adapters on the frozen weights of train.init_from."""

  kind: str = setting('', 'kind of low-rank adapter to train; empty: train all weights', choices=('', *KINDS))
  rank: int = setting(16, 'rank of the update matrices A and B', minimum=1)
  alpha: float = setting(32.0, 'scales the update A B by alpha / rank; rslora: alpha / sqrt(rank)', minimum=0.0)
  dropout: float = setting(0.0, "dropout rate on the adapters' input; with mesh.stage or mesh.context other elements "
                           'are dropped than on one device', minimum=0.0, maximum=0.9)
  targets: tuple[str, ...] = setting(
      ('*/attention/*', '*/mlp/*'), 'paths of the matrices to adapt, as glob patterns such as */attention/query; '
      're:... is a regular expression of the whole path')
  quantize: str = setting('', "quantize the frozen matrices of the blocks to nf4 (QLoRA, 4.2 bits per weight) or int8; "
                          'empty: no quantization', choices=('', *FORMATS))
  name: str = setting('default', 'name of the adapter')

  @property
  def scale(self):
    """Factor of A B: arXiv:2106.09685, section 4.1; rslora: arXiv:2312.03732, eq. 4."""
    return self.alpha / (self.rank**0.5 if self.kind == 'rslora' else self.rank)

  def validate(self):
    if not self.targets:
      yield 'targets is empty; write patterns of matrices to adapt, such as */attention/*'
    for pattern in self.targets:
      if pattern.startswith('re:'):
        try:
          re.compile(pattern[3:])
        except re.error as e:
          yield f'targets: {pattern!r} is no regular expression: {e}'
    if not re.fullmatch(r'[A-Za-z0-9_.-]+', self.name) or '..' in self.name:
      yield f'name={self.name!r} may contain letters, digits, _, - and . only'
    if self.quantize and not self.kind:
      yield f'quantize={self.quantize} applies to the frozen base of an adapter; set adapter.kind, for example to lora'


@dataclasses.dataclass(frozen=True)
class AdapterShowOptions:
  """Flags of `llmjax adapter show`."""

  workdir: str = setting('', 'the folder of a run with adapter.kind', kind='path')
  step: int = setting(0, 'step of the checkpoint; 0: the newest', minimum=0)

  def validate(self):
    yield from missing(self, 'workdir', "the folder of a run with adapter.kind, such as --workdir=runs/lora")


@dataclasses.dataclass(frozen=True)
class AdapterMergeOptions(AdapterShowOptions):
  """Flags of `llmjax adapter merge`."""

  output: str = setting('', 'a new run folder for the merged weights', kind='folder')

  def validate(self):
    yield from super().validate()
    yield from missing(self, 'output', "a new folder, such as --output=runs/merged")


@dataclasses.dataclass(frozen=True)
class AdapterExportOptions(AdapterShowOptions):
  """Flags of `llmjax adapter export`."""

  output: str = setting('', 'a new folder for adapter_config.json and adapter_model.safetensors', kind='folder')
  base_name: str = setting('', "base_model_name_or_path of adapter_config.json; empty: the run's train.init_from")

  def validate(self):
    yield from super().validate()
    yield from missing(self, 'output', "a new folder, such as --output=adapter")


@dataclasses.dataclass(frozen=True)
class AdapterImportOptions:
  """Flags of `llmjax adapter import`."""

  peft: str = setting('', 'a folder with adapter_config.json and adapter_model.safetensors', kind='path')
  init_from: str = setting('', 'the run of the base model, or one of its checkpoints', kind='path')
  workdir: str = setting('', 'a new run folder for the adapter', kind='folder')

  def validate(self):
    yield from missing(self, 'peft', 'the folder that peft has written')
    yield from missing(self, 'init_from', "the run that the adapter is for, such as --init-from=runs/quickstart")
    yield from missing(self, 'workdir', "a new folder, such as --workdir=runs/imported")


def missing(options, name, words):
  """Yield the problem of a flag that was not given. words: what to write."""
  if not getattr(options, name):
    yield f'{name} is missing: give {words}'
