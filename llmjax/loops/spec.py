"""What each command's `--config` and flags may say.  No JAX here: `--help` must be quick."""

import dataclasses

from llmjax.checkpoint.spec import CheckpointSpec
from llmjax.config import group, setting
from llmjax.data.spec import DataSpec, PrepareOptions, PrepareSpec
from llmjax.evaluate.spec import DoctorOptions, EvaluateOptions, ReportOptions
from llmjax.generate.spec import GenerateOptions
from llmjax.loops.profiling import ProfileSpec, parse_steps
from llmjax.model.spec import ModelSpec
from llmjax.parallel.spec import DistributedSpec, MeshSpec, PipelineSpec
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
  distributed: DistributedSpec = group(DistributedSpec)
  pipeline: PipelineSpec = group(PipelineSpec)
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
    traced = None if list(self.profile.problems()) else parse_steps(self.profile.steps)
    if traced and traced[0] > self.train.steps:
      yield f'profile.steps={self.profile.steps} is past the last step, train.steps={self.train.steps}'
    best = self.checkpoint.best_metric
    metrics = [f'eval/{split}/{name}' for split in self.evaluate.splits
               for name in ('loss', 'perplexity', 'bits_per_byte')]
    if best and best not in metrics:
      yield f'checkpoint.best_metric={best!r} is not measured; this run has {", ".join(metrics) or "no evaluation"}'
    yield from self.mesh_problems(self.mesh)

  def mesh_problems(self, mesh):
    """Yields a line for every size that the mesh does not divide, naming the nearest that it does."""
    model, size = self.model, mesh.size
    heads, rows = ('tensor',), ('data', 'fsdp', 'expert', 'stage')
    wholes = [('model.num_heads', model.num_heads, heads, 1, ''),
              ('model.num_kv_heads', model.kv_heads, heads, 1, ''),
              ('model.mlp_dim', model.mlp_dim, heads, 1, ''),
              ('model.d_model', model.d_model, rows if mesh.zero1 else rows[1:], 1, ''),
              ('data.seq_len', self.data.seq_len, ('context', 'tensor'), 1, '')]
    if model.vocab_size:
      wholes.append(('model.vocab_size', model.vocab_size, heads, 1, ''))
    if model.num_experts:
      wholes.append(('model.num_experts', model.num_experts, ('expert',), 1, ''))
    elif size('expert') > 1:
      yield (f'mesh.expert={size("expert")} needs experts; set model.num_experts, or write mesh.expert=1 and '
             f'mesh.fsdp={size("fsdp") * size("expert")}')
    if size('context') > 1:
      wholes.append(('data.seq_len', self.data.seq_len, ('context',), 2, '2 (both ends of a causal row)'))
    microbatches, pipe = self.train.accumulation, self.pipeline
    if size('stage') > 1:
      stages = ('stage',)
      wholes.append(('model.num_layers', model.num_layers, stages, pipe.groups, f'pipeline.rounds={pipe.groups}'))
      if pipe.microbatches:
        wholes.append(('pipeline.microbatches', pipe.microbatches, stages, 1, ''))
        microbatches *= max(pipe.microbatches // size('stage'), 1)
      if pipe.schedule == '1f1b':
        wholes.append(('data.seq_len', self.data.seq_len, stages, 1, ''))
    wholes.append(('train.batch_size', self.train.batch_size, rows, microbatches,
                   f'{microbatches} microbatches'))
    for name, whole, axes, times, words in wholes:
      parts = size(*axes) * times
      if whole % parts:
        below = whole // parts * parts
        fits = ' or '.join(str(n) for n in (below, below + parts) if n)
        text = ' x '.join([f'mesh.{a}={size(a)}' for a in axes if size(a) > 1] + [words] * (times > 1))
        yield f'{name}={whole} is not divisible by {text}; write {name}={fits}, or change the mesh'


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
