"""What each command's `--config` and flags may say.  No JAX here: `--help` must be quick."""

import dataclasses
import os

from llmjax import config, extensions
from llmjax.adapt.spec import AdapterSpec
from llmjax.checkpoint import pickle_guard
from llmjax.checkpoint.spec import CheckpointSpec
from llmjax.config import ConfigError, group, setting
from llmjax.data import prepared
from llmjax.data.spec import RECORDS, DataSpec, PrepareOptions, PrepareSpec
from llmjax.evaluate.spec import EvaluateOptions, ReportOptions
from llmjax.generate.spec import GenerateOptions
from llmjax.model.spec import ModelSpec
from llmjax.ops.limits import LIMITS, NO_BIAS
from llmjax.parallel.spec import ROW_AXES, DistributedSpec, MeshSpec, PipelineSpec, indivisible
from llmjax.plan.meter import CostSpec
from llmjax.post.spec import (
  BATCH_LOSSES,
  UNPAIRED_LOSSES,
  DistillSpec,
  PolicySpec,
  PreferenceSpec,
  RewardModelSpec,
  RlSpec,
)
from llmjax.run.callback import Callback
from llmjax.run.profiler import ProfileSpec, parse_steps
from llmjax.run.sources import (
  distill_problems,
  format_problems,
  reward_problems,
  run_groups,
  teacher_groups,
  vocabulary_problems,
)
from llmjax.train.spec import GuardSpec, OptimizerSpec, TrainSpec

__all__ = ['EvaluateOptions', 'EvaluatedSpec', 'FinetuneSpec',
           'FinishedSpec', 'GenerateOptions', 'LayoutSpec', 'PrepareOptions',
           'PrepareSpec', 'PretrainOptions', 'PretrainSpec', 'PreviewOptions', 'PreviewSpec', 'ReportOptions',
           'RlCommandSpec']

WRITERS = ('tensorboard', 'wandb', 'mlflow')

@dataclasses.dataclass(frozen=True)
class EvaluateSpec:
  """Evaluation inside the loop."""

  splits: tuple[str, ...] = setting(('validation',), 'splits to evaluate; none: no evaluation',
                                    choices=prepared.SPLITS)
  tasks: tuple[str, ...] = setting((), "further evaluations, each as 'module:function', a function (spec, mesh) "
                                   'that returns a function (params, frozen) -> {metric: number}; logged as '
                                   'eval/<function>/<metric>')
  batch_size: int = setting(0, "rows at a time; 0: the training batch's", minimum=0)
  limit: int = setting(0, 'sequences of a split to use, a fixed random sample from all its sources; '
                       '0: all of them', minimum=0)
  per_source: bool = setting(False, 'evaluate each source of the data by itself as well')
  extra_sources: tuple[str, ...] = setting((), 'further prepared folders to evaluate on, such as the '
                                           'pretraining corpus while fine-tuning', kind='path')


@dataclasses.dataclass(frozen=True)
class SampleSpec:
  """Samples drawn while training: samples.jsonl, and the report."""

  prompts: tuple[str, ...] = setting((), 'prompts to complete: one text, or a list of them such as '
                                     '["Once upon a time, there was", "The end"]; none: no samples', kind='text')
  max_new_tokens: int = setting(128, 'tokens of a sample', minimum=1)
  temperature: float = setting(0.8, '0 takes the likeliest token', minimum=0.0)
  top_p: float = setting(0.95, 'smallest set of tokens with this probability', minimum=0.0, maximum=1.0)


@dataclasses.dataclass(frozen=True)
class LogsSpec:
  """Where metrics go beside metrics.jsonl."""

  writers: tuple[str, ...] = setting(('tensorboard',), 'mirrors of metrics.jsonl', choices=WRITERS)


@dataclasses.dataclass(frozen=True)
class PretrainOptions:
  """Flags of `llmjax pretrain`."""

  workdir: str = setting('', "the run's folder; a run that is there already goes on", kind='folder')

  def validate(self):
    if not self.workdir:
      yield 'workdir=DIR is missing: where should the run be kept? For example --workdir=runs/first'


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
  adapter: AdapterSpec = group(AdapterSpec)
  distill: DistillSpec = group(DistillSpec)
  guard: GuardSpec = group(GuardSpec)
  checkpoint: CheckpointSpec = group(CheckpointSpec)
  evaluate: EvaluateSpec = group(EvaluateSpec)
  sample: SampleSpec = group(SampleSpec)
  profile: ProfileSpec = group(ProfileSpec)
  logs: LogsSpec = group(LogsSpec)
  cost: CostSpec = group(CostSpec)

  @property
  def measures(self):
    """What an evaluation finds of which less is better."""
    return ('loss', 'perplexity', 'bits_per_byte', *('teacher_kl',) * bool(self.distill.teacher))

  @classmethod
  def base(cls, values):
    """Returns the model of the teacher whose layers the student begins with."""
    return teacher_groups(values, ('model',))

  def validate(self):
    yield from _extension_problems(self)
    if self.optimizer.warmup_steps > self.train.steps:
      yield (f'optimizer.warmup_steps={self.optimizer.warmup_steps} is more than '
             f'train.steps={self.train.steps}; write optimizer.warmup_steps={max(self.train.steps // 10, 1)} '
             'for a tenth')
    source = self.train.init_from
    if source and '://' not in source:
      if refused := pickle_guard.refusal(source):
        yield f'train.init_from={refused}'
      elif not os.path.exists(source):
        yield (f"train.init_from={source}: there is no such folder; give a run's folder, or one checkpoint of it "
               'such as runs/quickstart/checkpoints/400')
    if source:
      yield from format_problems(self.data, source)
    if self.adapter.kind and not source:
      yield ('train.init_from is missing: which run is the adapter for? For example '
             '--config.train.init_from=runs/quickstart')
    if self.adapter.kind and self.pipeline.schedule == '1f1b':
      yield ('pipeline.schedule=1f1b makes gradients of all weights, and adapters leave theirs frozen; write '
             'pipeline.schedule=gpipe')
    yield from vocabulary_problems('model.vocab_size', self.model,
                                   (*self.data.sources, *self.evaluate.extra_sources), source)
    yield from distill_problems(self)
    traced = None if list(self.profile.validate()) else parse_steps(self.profile.steps)
    if traced and traced[0] > self.train.steps:
      yield f'profile.steps={self.profile.steps} is past the last step, train.steps={self.train.steps}'
    best = self.checkpoint.best_metric
    metrics = [f'eval/{split}/{name}' for split in self.evaluations() for name in self.measures]
    if best and best not in metrics:
      yield f'checkpoint.best_metric={best!r} is not measured; this run has {", ".join(metrics) or "no evaluation"}'
    if self.train.patience:
      names = [f'eval/{name}/{self.measures[0]}' for name in self.evaluations()] if self.measures else []
      if not self.train.eval_every:
        yield 'train.patience needs evaluations on the way; set train.eval_every, to 100 for example'
      if self.train.stop_metric.rpartition('/')[0] not in [name.rpartition('/')[0] for name in names]:
        yield (f'train.stop_metric={self.train.stop_metric} is not measured; write '
               f'{" or ".join(names) or "a split in evaluate.splits"}')
    if self.train.neftune_alpha and self.pipeline.schedule == '1f1b' and self.mesh.size('stage') > 1:
      yield 'train.neftune_alpha has no place in pipeline.schedule=1f1b; write pipeline.schedule=gpipe'
    yield from self.also_problems()
    yield from self.mesh_problems(self.mesh)

  def also_problems(self):
    """Yields what is wrong with evaluate.extra_sources, whose folders are read as the sources are."""
    if self.evaluate.extra_sources:
      folders = (*self.data.sources, *self.evaluate.extra_sources)
      beside = dataclasses.replace(self.data, sources={f: 1.0 for f in folders})
      before = {*self.data.validate()}
      yield from (f'evaluate.extra_sources: {p.removeprefix("sources: ")}' for p in beside.validate()
                  if p not in before)

  def evaluations(self):
    """Returns {name of an evaluation: (split, the sources it is of)}."""
    found = {}
    for split in self.evaluate.splits:
      found[split] = (split, dict(self.data.sources))
      if self.evaluate.per_source and len(self.data.sources) > 1:
        found |= {f'{split}:{_name(folder)}': (split, {folder: 1.0}) for folder in self.data.sources}
      found |= {f'{split}:{_name(folder)}': (split, {folder: 1.0}) for folder in self.evaluate.extra_sources}
    return found

  def mesh_problems(self, mesh):
    """Yields a line for every size that the mesh does not divide, naming the nearest that it does."""
    model, size = self.model, mesh.size
    heads, rows = ('tensor',), ROW_AXES
    wholes = [('model.num_heads', model.num_heads, heads, 1, ''),
              ('model.num_kv_heads', model.resolved_kv_heads, heads, 1, ''),
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
    kernel = self.train.attention
    if kernel in LIMITS:
      limit = LIMITS[kernel](self.data.seq_len, model.resolved_head_dim, model.attention_soft_cap,
                             self.train.compute_dtype)
      if model.position_embedding == 'relative':
        limit = NO_BIAS
      if size('context') > 1:
        limit = f'works on whole sequences, and mesh.context={size("context")} shards them'
      if limit:
        yield f'train.attention={kernel} {limit}; write train.attention=auto'
    if model.position_embedding == 'relative':
      if size('stage') > 1:
        yield (f'mesh.stage={size("stage")}: a pipeline has no relative position bias; write mesh.stage=1, or '
               'model.position_embedding=rotary')
      if size('context') > 1 and self.train.context_attention == 'ring':
        yield f'train.context_attention=ring {NO_BIAS}; write train.context_attention=gather'
    if size('context') > 1:
      wholes.append(('data.seq_len', self.data.seq_len, ('context',), 2, '2 (both ends of a causal row)'))
    microbatches, pipe = self.train.gradient_accumulation_steps, self.pipeline
    if size('stage') > 1:
      stages = ('stage',)
      wholes.append(('model.num_layers', model.num_layers, stages, pipe.groups, f'pipeline.rounds={pipe.groups}'))
      if pipe.microbatches:
        wholes.append(('pipeline.microbatches', pipe.microbatches, stages, 1, ''))
        microbatches *= max(pipe.microbatches // size('stage'), 1)
      if pipe.schedule == '1f1b':
        # The head works on an equal part of every sequence on each stage.
        wholes.append(('data.seq_len', self.data.seq_len, ('stage', 'context'), 1, ''))
    if self.train.batch_size % self.train.gradient_accumulation_steps == 0:  # Else the train group says so.
      wholes.append(('train.batch_size', self.train.batch_size, rows, microbatches,
                     f'{microbatches} microbatches'))
    for name, whole, axes, times, words in wholes:
      yield from indivisible(name, whole, axes, size, times, words)


def _name(folder):
  return os.path.basename(os.path.normpath(folder))


def _extension_problems(spec):
  """Yield what is wrong with the objects of the user's own modules that a config names."""
  paths = [('train.callbacks', path) for path in spec.train.callbacks]
  paths += [('evaluate.tasks', path) for path in spec.evaluate.tasks]
  if spec.train.objective != 'next_token':
    paths.append(('train.objective', spec.train.objective))
    if spec.distill.teacher:
      yield 'train.objective has no effect with distill.teacher; leave one of them out'
    if spec.pipeline.schedule == '1f1b' and spec.mesh.size('stage') > 1:
      yield 'pipeline.schedule=1f1b supports train.objective=next_token only; write pipeline.schedule=gpipe'
  for field, path in paths:
    try:
      value = extensions.load(path, field)
    except ConfigError as e:
      yield from e.problems
      continue
    if field == 'train.callbacks' and not (isinstance(value, type) and issubclass(value, Callback)):
      yield f'{field}={path}: write a subclass of llmjax.run.callback.Callback'


@dataclasses.dataclass(frozen=True)
class FromRunSpec(PretrainSpec):
  """The config of what goes on from a run.  What it does not set of the model is that of train.init_from."""

  @classmethod
  def base(cls, values):
    """Returns the groups that the run to start from sets: its model, and how long its rows are."""
    train = values.get('train')
    source = train.get('init_from') if isinstance(train, dict) else None
    if not source:
      return teacher_groups(values, ('model', 'data'))
    found = run_groups(source, ('model', 'data'))  # `validate` says what is wrong with init_from.
    model = values.get('model')
    if isinstance(model, dict) and model.get('preset'):
      found.pop('model', None)
    return found

  def validate(self):
    yield from super().validate()
    if not (self.train.init_from or (self.distill.teacher and self.distill.init)):
      yield ('train.init_from is missing: which run is to be fine-tuned? For example '
             '--config.train.init_from=runs/quickstart')


@dataclasses.dataclass(frozen=True)
class TunedData(DataSpec):
  """The data group of fine-tuning: text and conversations together, or pairs of answers."""

  kinds = ('text', 'preference', 'chat')

  def validate(self):
    yield from super().validate()
    kinds = self.record_kinds()
    if 'preference' in kinds.values() and len(set(kinds.values())) > 1:
      pairs = [folder for folder, kind in kinds.items() if kind == 'preference']
      yield (f'sources: {", ".join(pairs)} holds pairs and the rest does not; pairs are learnt from by themselves '
             '(preference.sft_weight keeps the likelihood of the better answers up)')


@dataclasses.dataclass(frozen=True)
class FinetuneSpec(FromRunSpec):
  """The config of `llmjax finetune`.  Sources that hold pairs are learnt from as the preference group says."""

  data: TunedData = group(TunedData)
  preference: PreferenceSpec = group(PreferenceSpec)

  @property
  def prefers(self):
    """Whether it learns from pairs."""
    return 'preference' in self.data.record_kinds().values()

  def validate(self):
    yield from super().validate()
    if self.prefers:
      yield from _pair_problems(self)
      yield from _no_teacher(self)
      preference = self.preference
      if preference.reference == 'disable_adapter' and not self.adapter.kind:
        yield ('preference.reference=disable_adapter needs adapters, and a base that stays as it is; write '
               'adapter.kind=lora, or preference.reference=precomputed')
      if (unpaired := self.data.unpaired()) and preference.loss not in UNPAIRED_LOSSES:
        yield (f'preference.loss={preference.loss} compares two completions of one prompt, and {", ".join(unpaired)} '
               f'holds single ones with labels; write preference.loss={" or ".join(UNPAIRED_LOSSES)}')
      if unpaired and preference.ld_alpha != 1.0:
        yield ('preference.ld_alpha compares the lengths of two completions of one prompt, and unpaired ones have '
               'one; write preference.ld_alpha=1')
      if preference.loss == 'kto' and preference.reference == 'precomputed':
        yield ('preference.loss=kto needs the reference at hand, for answers to other prompts; write '
               'preference.reference=copy, or disable_adapter where adapters are trained')
      for name, size in (('train', self.train.batch_size), ('evaluate', self.evaluate.batch_size)):
        if preference.loss == 'kto' and size == 1:
          yield (f'{name}.batch_size=1 leaves preference.loss=kto without completions of other prompts, from which its '
                 f'reference point comes; write {name}.batch_size=2 or more')
      if preference.loss in BATCH_LOSSES and self.train.gradient_accumulation_steps > 1:
        yield (f'preference.loss={preference.loss} looks at all pairs of a batch together, so that it would depend on '
               'train.gradient_accumulation_steps; write train.gradient_accumulation_steps=1')


@dataclasses.dataclass(frozen=True)
class JudgedData(DataSpec):
  """The data group of a reward model: pairs of answers, or solutions whose steps are judged."""

  kinds = ('stepwise', 'preference')

  def validate(self):
    yield from super().validate()
    if unpaired := self.unpaired():
      yield (f'sources: {", ".join(unpaired)} holds single completions with labels, and a reward model learns from '
             'pairs; prepare prompt, chosen and rejected')
    if len({*self.record_kinds().values()} & {*self.kinds}) > 1:
      yield ('sources: some hold pairs and some steps, and one reward model learns from one of them; leave the others '
             'out')


@dataclasses.dataclass(frozen=True)
class RewardSpec(FromRunSpec):
  """The config of `llmjax reward`: fine-tuning's, on pairs or on judged steps."""

  measures = ('loss', 'calibration_error')

  data: JudgedData = group(JudgedData)
  reward: RewardModelSpec = group(RewardModelSpec)

  @property
  def judges_steps(self):
    """Whether it learns to score steps."""
    return 'stepwise' in self.data.record_kinds().values()

  def validate(self):
    yield from super().validate()
    yield from _pair_problems(self)
    yield from _no_teacher(self)
    scores = 'steps' if self.judges_steps else 'completions'
    if self.reward.scores not in ('', scores):
      yield f'reward.scores={self.reward.scores} does not fit the data; write reward.scores={scores}'
    if self.adapter.kind:
      yield ('adapter.kind has no place here: a reward model trains a head that its base does not have; leave it out, '
             'or hold parameters still with optimizer.freeze')


def _pair_problems(spec):
  """Yields what is wrong with training on pairs."""
  if spec.pipeline.schedule == '1f1b' and spec.mesh.size('stage') > 1:
    yield 'pipeline.schedule=1f1b is for next-token prediction; write pipeline.schedule=gpipe'


def _no_teacher(spec):
  """Yield the settings that only training on text and conversations supports."""
  if spec.distill.teacher:
    yield 'distill.teacher is for text and conversations; leave it out'
  if spec.train.objective != 'next_token':
    yield 'train.objective is for text and conversations; leave it out'


@dataclasses.dataclass(frozen=True)
class PromptData(DataSpec):
  """The data group where sources hold prompts.  A row is a prompt and an answer."""

  kinds = ('prompts',)


def prompt_data(spec):
  """Returns the DataSpec of the prompts of an RlCommandSpec or AnswersSpec: none leaves too little room to complete."""
  return dataclasses.replace(spec.data, seq_len=spec.data.seq_len + 1 - spec.rl.max_new_tokens)


@dataclasses.dataclass(frozen=True)
class RlCommandSpec(FromRunSpec):
  """The config of `llmjax rl`: fine-tuning's, on prompts."""

  measures = ()

  data: PromptData = group(PromptData)
  rl: RlSpec = group(RlSpec)
  policy: PolicySpec = group(PolicySpec)

  def validate(self):
    yield from super().validate()
    yield from _no_teacher(self)
    rl, policy, rows = self.rl, self.policy, self.train.batch_size
    if rl.rows % rows:
      fits = [n for n in range(1, rl.rows + 1) if rl.rows % n == 0]
      near = min(fits, key=lambda n: abs(n - rows))
      yield (f'train.batch_size={rows} does not divide the {rl.rows} completions of an iteration, '
             f'rl.prompts_per_iteration={rl.prompts_per_iteration} x rl.num_generations={rl.num_generations}; '
             f'write train.batch_size={near}')
    if policy.advantage_estimator != 'gae' and rl.num_generations < 2:
      yield (f'rl.num_generations={rl.num_generations} leaves nothing to compare with; write rl.num_generations=8, or '
             'policy.name=ppo')
    if rl.max_new_tokens >= self.data.seq_len:
      yield (f'rl.max_new_tokens={rl.max_new_tokens} leaves no room for a prompt in data.seq_len='
             f'{self.data.seq_len}; write data.seq_len={2 * rl.max_new_tokens}')
    if not rl.reference and policy.kl_coef:
      yield 'rl.reference=False leaves no reference model for the KL; write policy.kl_coef=0, or rl.reference=True'
    if self.adapter.kind and policy.advantage_estimator == 'gae':
      yield (f'adapter.kind={self.adapter.kind} leaves no value head to train for policy.advantage_estimator=gae; '
             'write policy.name=grpo, or train all weights')
    if self.guard.policy == 'rollback':
      yield ('guard.policy=rollback would leave out rollouts that are not made yet; write guard.policy=skip or '
             'guard.policy=abort')
    if self.pipeline.schedule == '1f1b' and self.mesh.size('stage') > 1:
      yield 'pipeline.schedule=1f1b is for next-token prediction; write pipeline.schedule=gpipe'
    if rl.reward_model:
      yield from reward_problems('rl.reward_model', rl.reward_model, self.data)


@dataclasses.dataclass(frozen=True)
class PreviewOptions:
  """Flags of `llmjax preview`."""

  rows: int = setting(3, 'rows to show', minimum=1, maximum=1000)
  split: str = setting('train', 'split to take them from', choices=prepared.SPLITS)


@dataclasses.dataclass(frozen=True)
class AnyData(DataSpec):
  """The data group where sources may hold anything."""

  kinds = RECORDS


@dataclasses.dataclass(frozen=True)
class PreviewSpec(PretrainSpec):
  """The config of `llmjax preview`: a recipe of any training command, of which it looks at the data alone."""

  data: AnyData = group(AnyData)
  preference: PreferenceSpec = group(PreferenceSpec)
  reward: RewardModelSpec = group(RewardModelSpec)
  rl: RlSpec = group(RlSpec)
  policy: PolicySpec = group(PolicySpec)

  @classmethod
  def base(cls, values):
    """Returns what the command that trains takes from the run it starts from, data.seq_len above all."""
    train = values.get('train')
    starts = isinstance(train, dict) and train.get('init_from')
    return (FromRunSpec if starts or {'preference', 'reward', 'rl'} & set(values) else PretrainSpec).base(values)

  def validate(self):
    source = self.train.init_from
    if source and '://' not in source and 'data' not in run_groups(source, ('data',)):
      yield (f'train.init_from={source}: there is no such run, and training takes data.seq_len from it; give a run\'s '
             'folder, or write --config.train.init_from= and --config.data.seq_len=NUMBER')


@dataclasses.dataclass(frozen=True)
class ShapesOnlyData(DataSpec):
  """The data group where only shapes matter: its folders need not be there."""

  def validate(self):
    return ()


@dataclasses.dataclass(frozen=True)
class FinishedSpec(PretrainSpec):
  """The config of a run that is only read: nothing that it was made from needs to be there."""

  data: ShapesOnlyData = group(ShapesOnlyData)

  def validate(self):
    return ()


@dataclasses.dataclass(frozen=True)
class EvaluatedSpec(PretrainSpec):
  """The same where data is evaluated, which must be there."""

  def validate(self):
    return self.also_problems()


@dataclasses.dataclass(frozen=True)
class AnswersSpec(EvaluatedSpec):
  """The same where the run's answers to prompts are evaluated."""

  data: PromptData = group(PromptData)
  rl: RlSpec = group(RlSpec)


def of_run(spec_class, settings):
  """Returns the spec_class of a run's config.json, whichever command trained it, without groups that it lacks.

  spec_class: FinishedSpec or EvaluatedSpec.  The run is trained no more, so its adapter, teacher and checkpoints do
  not matter.
  """
  known = {field.name for field in dataclasses.fields(spec_class)} - {'adapter', 'distill', 'checkpoint'}
  return config.build(spec_class, {name: value for name, value in settings.items() if name in known})


@dataclasses.dataclass(frozen=True)
class LayoutSpec(PretrainSpec):
  """The config of `llmjax mesh`: pretraining's, which may be looked at before there is any data."""

  data: ShapesOnlyData = group(ShapesOnlyData)

  def validate(self):
    yield from super().validate()
    if not self.model.vocab_size:
      yield from (f'data.{p}; or set model.vocab_size, and no data is needed'
                  for p in DataSpec.validate(self.data))
