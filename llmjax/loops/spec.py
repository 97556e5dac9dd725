"""What each command's `--config` and flags may say.  No JAX here: `--help` must be quick."""

import dataclasses

from llmjax.checkpoint.spec import CheckpointSpec
from llmjax.config import group, setting
from llmjax.data.spec import DataSpec, PrepareOptions, PrepareSpec
from llmjax.evaluate.spec import DoctorOptions, EvaluateOptions, ReportOptions
from llmjax.generate.spec import GenerateOptions
from llmjax.loops.profiling import ProfileSpec
from llmjax.model.spec import ModelSpec
from llmjax.parallel.spec import MeshSpec
from llmjax.train.spec import OptimizerSpec, TrainSpec

__all__ = ['DoctorOptions', 'EvaluateOptions', 'GenerateOptions', 'LayoutSpec', 'MeshOptions',
           'PrepareOptions', 'PrepareSpec', 'PretrainOptions', 'PretrainSpec', 'ReportOptions']


@dataclasses.dataclass(frozen=True)
class EvaluateSpec:
  """Evaluation inside the loop."""

  splits: tuple[str, ...] = setting(('validation',), 'splits to evaluate; none: no evaluation')
  batch_size: int = setting(0, "rows at a time; 0: the training batch's", minimum=0)
  limit: int = setting(0, 'rows of a split to use, the same ones each time; 0: all of them', minimum=0)


@dataclasses.dataclass(frozen=True)
class SampleSpec:
  """Samples drawn while training: samples.jsonl, and the report."""

  prompts: tuple[str, ...] = setting((), 'texts to go on from; none: no samples')
  max_new_tokens: int = setting(128, 'tokens of a sample', minimum=1)
  temperature: float = setting(0.8, '0 takes the likeliest token', minimum=0.0)
  top_p: float = setting(0.95, 'smallest set of tokens with this probability', minimum=0.0, maximum=1.0)


@dataclasses.dataclass(frozen=True)
class LogsSpec:
  """Where metrics go beside metrics.jsonl."""

  writers: tuple[str, ...] = setting(('tensorboard',), 'mirrors of metrics.jsonl: tensorboard, wandb, '
                                     'mlflow')


@dataclasses.dataclass(frozen=True)
class PretrainOptions:
  """Flags of `llmjax pretrain`."""

  workdir: str = setting('', "the run's folder; a run that is there already goes on")

  def problems(self):
    if not self.workdir:
      yield 'workdir=DIR is missing: where should the run be kept? For example --workdir=runs/first'


@dataclasses.dataclass(frozen=True)
class MeshOptions:
  """Flags of `llmjax mesh`."""

  devices: int = setting(0, 'how many to emulate; 0: the product of the mesh sizes, with 1 for a -1',
                         minimum=0)
  no_compile: bool = setting(False, "leave out the step's collectives, which take a compilation to find")


@dataclasses.dataclass(frozen=True)
class PretrainSpec:
  """The config of `llmjax pretrain`."""

  model: ModelSpec = group(ModelSpec)
  data: DataSpec = group(DataSpec)
  mesh: MeshSpec = group(MeshSpec)
  train: TrainSpec = group(TrainSpec)
  optimizer: OptimizerSpec = group(OptimizerSpec)
  checkpoint: CheckpointSpec = group(CheckpointSpec)
  evaluate: EvaluateSpec = group(EvaluateSpec)
  sample: SampleSpec = group(SampleSpec)
  profile: ProfileSpec = group(ProfileSpec)
  logs: LogsSpec = group(LogsSpec)

  def problems(self):
    if self.optimizer.warmup_steps > self.train.steps:
      yield (f'optimizer.warmup_steps={self.optimizer.warmup_steps} is more than '
             f'train.steps={self.train.steps}; write {max(self.train.steps // 10, 1)} for a tenth')
    for size, axis in (('num_heads', 'tensor'), ('kv_heads', 'tensor'), ('mlp_dim', 'tensor'),
                       ('d_model', 'fsdp'), ('num_layers', 'stage')):
      parts, whole = getattr(self.mesh, axis), getattr(self.model, size)
      if parts > 1 and whole % parts:
        yield (f'model.{size}={whole} is not divisible by mesh.{axis}={parts}; write '
               f'mesh.{axis}={max(n for n in range(1, parts + 1) if whole % n == 0)}')
    rows = self.train.batch_size // self.train.accumulation
    shards = max(self.mesh.data, 1) * max(self.mesh.fsdp, 1)
    if rows % shards:
      yield (f'train.batch_size={self.train.batch_size} gives {rows} rows a microbatch, which '
             f'mesh.data x mesh.fsdp = {shards} devices cannot share; write a multiple of '
             f'{shards * self.train.accumulation}')


@dataclasses.dataclass(frozen=True)
class ShapesOnlyData(DataSpec):
  """The data group where only shapes matter: its folders need not be there."""

  def problems(self):
    return ()


@dataclasses.dataclass(frozen=True)
class LayoutSpec(PretrainSpec):
  """The config of `llmjax mesh`: pretraining's, which may be looked at before there is any data."""

  data: ShapesOnlyData = group(ShapesOnlyData)

  def problems(self):
    yield from super().problems()
    if not self.model.vocab_size:
      yield from (f'data.{p}; or set model.vocab_size, and no data is needed'
                  for p in DataSpec.problems(self.data))
