"""What each command's `--config` and flags may say.  No JAX here: `--help` must be quick."""

import dataclasses
import os

from llmjax.checkpoint import weights
from llmjax.checkpoint.spec import CheckpointSpec
from llmjax.config import find_problems, group, setting
from llmjax.data import prepared
from llmjax.data.spec import DataSpec, PrepareOptions, PrepareSpec
from llmjax.evaluate.spec import DoctorOptions, EvaluateOptions, ReportOptions
from llmjax.generate.spec import GenerateOptions
from llmjax.loops.profiling import ProfileSpec, parse_steps
from llmjax.model.spec import ModelSpec
from llmjax.parallel.spec import DistributedSpec, MeshSpec, PipelineSpec
from llmjax.plan.energy import CostSpec
from llmjax.train.spec import GuardSpec, OptimizerSpec, TrainSpec

__all__ = ['CHAOS_EVENTS', 'ChaosOptions', 'DoctorOptions', 'EvaluateOptions', 'GenerateOptions', 'LayoutSpec',
           'MeshOptions', 'PlanOptions', 'PlanSpec', 'PrepareOptions', 'PrepareSpec', 'PretrainOptions',
           'PretrainSpec', 'ReportOptions']

WRITERS = ('tensorboard', 'wandb', 'mlflow')

# What `llmjax chaos` does to a run, and how its table calls it.
CHAOS_EVENTS = {
    'kill': 'kill -9 at any moment',
    'save': 'kill -9 during a save',
    'start': 'kill -9 during start-up',
    'terminate': 'SIGTERM (preemption)',
    'stop': 'SIGSTOP (hang)',
    'damage': 'kill -9, newest checkpoint damaged',
    'disk': 'disk full',
}


@dataclasses.dataclass(frozen=True)
class EvaluateSpec:
  """Evaluation inside the loop."""

  splits: tuple[str, ...] = setting(('validation',), 'splits to evaluate; none: no evaluation')
  batch_size: int = setting(0, "rows at a time; 0: the training batch's", minimum=0)
  limit: int = setting(0, 'rows of a split to use, the same ones each time; 0: all of them', minimum=0)

  def problems(self):
    for split in self.splits:
      if split not in prepared.SPLITS:
        yield f'splits: {split!r} is not one; write some of {", ".join(prepared.SPLITS)}'


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

  def problems(self):
    for name in self.writers:
      if name not in WRITERS:
        yield f'writers: {name!r} is not one; write some of {", ".join(WRITERS)}'


@dataclasses.dataclass(frozen=True)
class PretrainOptions:
  """Flags of `llmjax pretrain`."""

  workdir: str = setting('', "the run's folder; a run that is there already goes on")

  def problems(self):
    if not self.workdir:
      yield 'workdir=DIR is missing: where should the run be kept? For example --workdir=runs/first'
    elif os.path.isfile(self.workdir):
      yield f"workdir={self.workdir} is a file; name a folder to keep the run in, such as runs/first"


@dataclasses.dataclass(frozen=True)
class MeshOptions:
  """Flags of `llmjax mesh`."""

  devices: int = setting(0, 'how many to emulate; 0: the product of the mesh sizes, with 1 for a -1',
                         minimum=0)
  no_compile: bool = setting(False, "leave out the step's collectives, which take a compilation to find")


@dataclasses.dataclass(frozen=True)
class PlanOptions:
  """Flags of `llmjax plan`."""

  topology: str = setting('', 'chips of one slice, as v5p:4x4x4; with --fast also h100:8, the GPUs of one node')
  slices: int = setting(1, 'slices, or nodes of GPUs', minimum=1)
  fast: bool = setting(False, 'closed forms only: under two seconds, no compiler')
  output: str = setting('', 'folder to write plan.json and plan.html to; empty: none')
  hlo: str = setting('', "file to write the compiled program's text to; empty: none")
  search: bool = setting(False, 'find the best mesh, remat, accumulation and batch for these chips')
  jobs: int = setting(1, 'programs that --search compiles at once, each about two cores and 4 GB', minimum=1)
  rows_per_chip: tuple[int, ...] = setting((), "global batches that --search tries, in rows for each chip, as 1,2,4; "
                                           "none: the config's batch alone")
  most: int = setting(12, 'programs that --search compiles at most', minimum=1)

  def problems(self):
    if not self.topology:
      yield 'topology=NAME is missing: for which chips? For example --topology=v5p:4x4x4'
    if self.search and self.fast:
      yield 'search and --fast exclude one another: a search ranks by closed forms and then compiles'


@dataclasses.dataclass(frozen=True)
class ChaosOptions:
  """Flags of `llmjax chaos`."""

  workdir: str = setting('runs/chaos', 'a new folder for the two runs and chaos.json')
  kills: int = setting(20, 'how often to disturb the run', minimum=1, maximum=10_000)
  processes: int = setting(1, 'processes of the run', minimum=1, maximum=64)
  devices_per_process: int = setting(0, "emulated CPU devices of each; 0: the machine's own devices, or 1 each where "
                                     'there are several processes', minimum=0, maximum=256)
  steps: int = setting(0, "steps of the run; 0: the recipe's", minimum=0)
  seed: int = setting(0, 'of what happens when', minimum=0)
  events: tuple[str, ...] = setting((), 'only these: kill, save, start, terminate, stop, damage, disk; none: all')

  def problems(self):
    if unknown := [name for name in self.events if name not in CHAOS_EVENTS]:
      yield f'events: {", ".join(unknown)} is none; known: {", ".join(CHAOS_EVENTS)}'


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
  guard: GuardSpec = group(GuardSpec)
  checkpoint: CheckpointSpec = group(CheckpointSpec)
  evaluate: EvaluateSpec = group(EvaluateSpec)
  sample: SampleSpec = group(SampleSpec)
  profile: ProfileSpec = group(ProfileSpec)
  logs: LogsSpec = group(LogsSpec)
  cost: CostSpec = group(CostSpec)

  def problems(self):
    if self.optimizer.warmup_steps > self.train.steps:
      yield (f'optimizer.warmup_steps={self.optimizer.warmup_steps} is more than '
             f'train.steps={self.train.steps}; write {max(self.train.steps // 10, 1)} for a tenth')
    source = self.train.init_from
    if source and '://' not in source:
      if refused := weights.refusal(source):
        yield f'train.init_from={refused}'
      elif not os.path.exists(source):
        yield (f"train.init_from={source}: there is no such folder; give a run's folder, or one checkpoint of it "
               'such as runs/quickstart/checkpoints/400')
    traced = None if list(self.profile.problems()) else parse_steps(self.profile.steps)
    if traced and traced[0] > self.train.steps:
      yield f'profile.steps={self.profile.steps} is past the last step, train.steps={self.train.steps}'
    best = self.checkpoint.best_metric
    metrics = [f'eval/{split}/{name}' for split in self.evaluate.splits
               for name in ('loss', 'perplexity', 'bits_per_byte')]
    if best and best not in metrics:
      yield f'checkpoint.best_metric={best!r} is not measured; this run has {", ".join(metrics) or "no evaluation"}'
    if self.train.patience:
      names = [f'eval/{split}/loss' for split in self.evaluate.splits]
      if not self.train.eval_every:
        yield 'train.patience needs evaluations on the way; set train.eval_every, to 100 for example'
      if self.train.stop_metric.rpartition('/')[0] not in [name.rpartition('/')[0] for name in names]:
        yield (f'train.stop_metric={self.train.stop_metric} is not measured; write '
               f'{" or ".join(names) or "a split in evaluate.splits"}')
    yield from self.mesh_problems(self.mesh)

  def mesh_problems(self, mesh):
    """Yields a line for every size that the mesh does not divide, naming the nearest that it does."""
    model, size = self.model, mesh.size
    heads, rows = ('tensor',), ('data', 'fsdp', 'expert', 'stage')
    wholes = [('model.num_heads', model.num_heads, heads, 1, ''),
              ('model.num_kv_heads', model.kv_heads, heads, 1, ''),
              ('model.mlp_dim', model.mlp_dim, heads, 1, ''),
              ('model.d_model', model.d_model, rows if mesh.zero else rows[1:], 1, ''),
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
    if self.train.batch_size % self.train.accumulation == 0:  # Else the train group says so.
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


@dataclasses.dataclass(frozen=True)
class PlanSpec(LayoutSpec):
  """The config of `llmjax plan`: pretraining's, whose mesh is looked at once the chips are known."""

  def mesh_problems(self, mesh):
    return ()

  def settled_problems(self):
    """Yields everything that is wrong with the spec, what its mesh does not divide included."""
    yield from find_problems(self)
    yield from super().mesh_problems(self.mesh)
