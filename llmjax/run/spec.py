"""Configs and flags of the training commands.  Does not import JAX, so that `--help` is quick."""

import dataclasses
import os

from llmjax import extensions
from llmjax.adapt.spec import AdapterSpec
from llmjax.checkpoint import pickle_guard
from llmjax.checkpoint.spec import CheckpointSpec
from llmjax.config import ConfigError, group, setting
from llmjax.data.spec import DataSpec
from llmjax.evaluate.spec import EvaluateSpec
from llmjax.generate.spec import SampleSpec
from llmjax.model.spec import ModelSpec
from llmjax.parallel.spec import DistributedSpec, MeshSpec, PipelineSpec
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
from llmjax.run import mesh_limits
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
from llmjax.run.writers import LogsSpec
from llmjax.train.spec import GuardSpec, OptimizerSpec, TrainSpec


@dataclasses.dataclass(frozen=True)
class PretrainOptions:
  """Flags of the training commands."""

  workdir: str = setting('', 'folder to write the run to; an existing run is resumed', kind='folder')

  def validate(self):
    if not self.workdir:
      yield 'workdir is missing; write --workdir=FOLDER, the folder to write the run to, such as runs/first'


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

  @classmethod
  def base(cls, values):
    """Return the values of a recipe's unset fields that come from another run: here the teacher's model."""
    return teacher_groups(values, ('model',))

  @property
  def metrics(self):
    """Evaluation metrics that are better when lower."""
    return ('loss', 'perplexity', 'bits_per_byte', *('teacher_kl',) * bool(self.distill.teacher))

  def evaluations(self):
    """Return {name of the evaluation: (split, {prepared folder: weight})}."""
    result = {}
    for split in self.evaluate.splits:
      result[split] = (split, dict(self.data.sources))
      per_source = self.data.sources if self.evaluate.per_source and len(self.data.sources) > 1 else ()
      for folder in (*per_source, *self.evaluate.extra_sources):
        result[f'{split}:{os.path.basename(os.path.normpath(folder))}'] = (split, {folder: 1.0})
    return result

  def validate(self):
    yield from _extension_problems(self)
    if self.optimizer.warmup_steps > self.train.steps:
      yield (f'optimizer.warmup_steps={self.optimizer.warmup_steps} is more than train.steps={self.train.steps}; write '
             f'optimizer.warmup_steps={max(self.train.steps // 10, 1)}, which is 10% of the steps')
    yield from _init_problems(self)
    yield from vocabulary_problems('model.vocab_size', self.model, (*self.data.sources, *self.evaluate.extra_sources),
                                   self.train.init_from)
    yield from distill_problems(self)
    traced = None if list(self.profile.validate()) else parse_steps(self.profile.steps)
    if traced and traced[0] > self.train.steps:
      yield (f'profile.steps={self.profile.steps} starts after the last step, train.steps={self.train.steps}; write '
             'earlier steps')
    yield from self._metric_problems()
    if self.train.neftune_alpha:
      yield from _1f1b_problems(self, 'train.neftune_alpha')
    yield from self.extra_source_problems()
    yield from self.mesh_problems(self.mesh)

  def _metric_problems(self):
    """Yield the problems of the metrics that select checkpoints and stop the run."""
    metrics = [f'eval/{name}/{metric}' for name in self.evaluations() for metric in self.metrics]
    known = ' or '.join(metrics) or 'a split in evaluate.splits'
    if self.checkpoint.best_metric and self.checkpoint.best_metric not in metrics:
      yield f'checkpoint.best_metric={self.checkpoint.best_metric!r} is not a metric of this run; write {known}'
    if self.train.patience:
      if not self.train.eval_every:
        yield 'train.patience requires evaluations during training; set train.eval_every, such as 100'
      if self.train.stop_metric.rpartition('/')[0] not in [metric.rpartition('/')[0] for metric in metrics]:
        yield f'train.stop_metric={self.train.stop_metric} is not a metric of this run; write {known}'

  def extra_source_problems(self):
    """Yield the problems of evaluate.extra_sources, which must fit together with the training sources."""
    if self.evaluate.extra_sources:
      folders = (*self.data.sources, *self.evaluate.extra_sources)
      all_data = dataclasses.replace(self.data, sources={folder: 1.0 for folder in folders})
      data_problems = {*self.data.validate()}
      yield from (f'evaluate.extra_sources: {problem.removeprefix("sources: ")}' for problem in all_data.validate()
                  if problem not in data_problems)

  def mesh_problems(self, mesh):
    """Yield the settings that a MeshSpec does not support and the sizes that it does not divide."""
    return mesh_limits.mesh_problems(self, mesh)


def _1f1b_problems(spec, feature):
  """Yield a problem if the 1F1B schedule is used, which supports next-token prediction of all parameters only."""
  if spec.pipeline.schedule == '1f1b' and spec.mesh.size('stage') > 1:
    yield f'pipeline.schedule=1f1b does not support {feature}; write pipeline.schedule=gpipe'


def _init_problems(spec):
  """Yield the problems of train.init_from and of the adapter, which needs it."""
  source = spec.train.init_from
  if source and '://' not in source:
    if refusal := pickle_guard.refusal(source):
      yield f'train.init_from={refusal}'
    elif not os.path.exists(source):
      yield (f'train.init_from={source}: there is no such folder; write the folder of a run, or one of its checkpoints '
             'such as runs/quickstart/checkpoints/400')
  if source:
    yield from format_problems(spec.data, source)
  if spec.adapter.kind and not source:
    yield ('train.init_from is missing; an adapter needs the run of its base model: '
           '--config.train.init_from=runs/quickstart')
  if spec.adapter.kind and spec.pipeline.schedule == '1f1b':
    yield 'pipeline.schedule=1f1b does not support adapters; write pipeline.schedule=gpipe'


def _extension_problems(spec):
  """Yield the problems of the `module:name` paths of a config."""
  paths = [('train.callbacks', path) for path in spec.train.callbacks]
  paths += [('evaluate.tasks', path) for path in spec.evaluate.tasks]
  if spec.train.objective != 'next_token':
    paths.append(('train.objective', spec.train.objective))
    if spec.distill.teacher:
      yield 'train.objective has no effect with distill.teacher; leave one of them out'
    yield from _1f1b_problems(spec, f'train.objective={spec.train.objective}')
  for field, path in paths:
    try:
      value = extensions.load(path, field)
    except ConfigError as e:
      yield from e.problems
      continue
    if field == 'train.callbacks' and not (isinstance(value, type) and issubclass(value, Callback)):
      yield f'{field}={path}: write a subclass of llmjax.run.callback.Callback'


def _text_only_problems(spec):
  """Yield the settings that apply to training on text and conversations only."""
  if spec.distill.teacher:
    yield 'distill.teacher applies to text and conversations only; leave it out'
  if spec.train.objective != 'next_token':
    yield 'train.objective applies to text and conversations only; leave it out'


@dataclasses.dataclass(frozen=True)
class FromRunSpec(PretrainSpec):
  """The config of a command that starts from a run.  The model and data.seq_len of the run are the defaults."""

  @classmethod
  def base(cls, values):
    """Return the model and data.seq_len of train.init_from, or of the teacher that initializes the student."""
    train = values.get('train')
    source = train.get('init_from') if isinstance(train, dict) else None
    if not source:
      return teacher_groups(values, ('model', 'data'))
    groups = run_groups(source, ('model', 'data'))  # Empty if there is no such run, which `validate` reports.
    model = values.get('model')
    if isinstance(model, dict) and model.get('preset'):
      groups.pop('model', None)
    return groups

  def validate(self):
    yield from super().validate()
    if not (self.train.init_from or (self.distill.teacher and self.distill.init)):
      yield 'train.init_from is missing; name the run to start from: --config.train.init_from=runs/quickstart'


@dataclasses.dataclass(frozen=True)
class FinetuneData(DataSpec):
  """The `data` group: sources of text and conversations, or of preferences, and how they are packed."""

  kinds = ('text', 'preference', 'chat')

  def validate(self):
    yield from super().validate()
    kinds = self.record_kinds()
    if 'preference' in kinds.values() and len(set(kinds.values())) > 1:
      folders = ', '.join(folder for folder, kind in kinds.items() if kind == 'preference')
      yield (f'sources: {folders} holds preferences and the other sources do not; remove one kind '
             '(preference.sft_weight adds the likelihood of the chosen completions to the loss)')


@dataclasses.dataclass(frozen=True)
class FinetuneSpec(FromRunSpec):
  """The config of `llmjax finetune`: supervised fine-tuning, or preference optimization if the data are preferences."""

  data: FinetuneData = group(FinetuneData)
  preference: PreferenceSpec = group(PreferenceSpec)

  @property
  def is_preference(self):
    """Whether the run optimizes preferences."""
    return 'preference' in self.data.record_kinds().values()

  def validate(self):
    yield from super().validate()
    if self.is_preference:
      yield from _1f1b_problems(self, 'preference data')
      yield from _text_only_problems(self)
      yield from self._preference_problems()

  def _preference_problems(self):
    preference, unpaired = self.preference, self.data.unpaired()
    loss = preference.loss
    if preference.reference == 'disable_adapter' and not self.adapter.kind:
      yield ('preference.reference=disable_adapter requires an adapter; write adapter.kind=lora, or '
             'preference.reference=precomputed')
    if unpaired and loss not in UNPAIRED_LOSSES:
      yield (f'preference.loss={loss} compares two completions of a prompt, and {", ".join(unpaired)} holds unpaired '
             f'completions; write preference.loss={" or ".join(UNPAIRED_LOSSES)}')
    if unpaired and preference.ld_alpha != 1.0:
      yield ('preference.ld_alpha compares two completions of a prompt, and the data are unpaired; write '
             'preference.ld_alpha=1')
    if loss in BATCH_LOSSES and self.train.gradient_accumulation_steps > 1:
      yield (f'preference.loss={loss} compares all completions of a batch and does not support gradient accumulation; '
             'write train.gradient_accumulation_steps=1')
    if loss == 'kto':
      if preference.reference == 'precomputed':
        yield ('preference.loss=kto needs the reference model during training, for its KL estimate; write '
               'preference.reference=copy, or disable_adapter with an adapter')
      for name, size in (('train', self.train.batch_size), ('evaluate', self.evaluate.batch_size)):
        if size == 1:
          yield (f'{name}.batch_size=1 is too small for preference.loss=kto, which estimates the KL from prompts and '
                 f'completions of different examples; write {name}.batch_size=2 or more')


@dataclasses.dataclass(frozen=True)
class RewardData(DataSpec):
  """The `data` group: sources of preferences, or of solutions with step labels."""

  kinds = ('stepwise', 'preference')

  def validate(self):
    yield from super().validate()
    if unpaired := self.unpaired():
      yield (f'sources: {", ".join(unpaired)} holds unpaired completions, and a reward model is trained on pairs; '
             'prepare records with prompt, chosen and rejected')
    if len({*self.record_kinds().values()} & {*self.kinds}) > 1:
      yield ('sources hold both preference and stepwise records, and a reward model is trained on one kind; remove '
             'the other')


@dataclasses.dataclass(frozen=True)
class RewardSpec(FromRunSpec):
  """The config of `llmjax reward`: an outcome reward model, or a process reward model if the data have step labels."""

  data: RewardData = group(RewardData)
  reward: RewardModelSpec = group(RewardModelSpec)

  metrics = ('loss', 'calibration_error')

  @property
  def is_stepwise(self):
    """Whether the model is a process reward model."""
    return 'stepwise' in self.data.record_kinds().values()

  def validate(self):
    yield from super().validate()
    yield from _1f1b_problems(self, 'reward models')
    yield from _text_only_problems(self)
    scores = 'steps' if self.is_stepwise else 'completions'
    if self.reward.scores not in ('', scores):
      yield f'reward.scores={self.reward.scores} does not fit the data; write reward.scores={scores}'
    if self.adapter.kind:
      yield (f'adapter.kind={self.adapter.kind} is not supported, as the value head of a reward model must be trained '
             'too; leave it out, or freeze parameters with optimizer.freeze')


@dataclasses.dataclass(frozen=True)
class PromptData(DataSpec):
  """The `data` group: sources of prompts.  seq_len is the length of a prompt with its completion."""

  kinds = ('prompts',)


def prompt_data(spec):
  """Return the DataSpec of the prompts of an RlCommandSpec or CompletionsSpec, short enough for max_new_tokens more."""
  return dataclasses.replace(spec.data, seq_len=spec.data.seq_len + 1 - spec.rl.max_new_tokens)


@dataclasses.dataclass(frozen=True)
class RlCommandSpec(FromRunSpec):
  """The config of `llmjax rl`: reinforcement learning from the rewards of sampled completions."""

  data: PromptData = group(PromptData)
  rl: RlSpec = group(RlSpec)
  policy: PolicySpec = group(PolicySpec)

  metrics = ()

  def validate(self):
    yield from super().validate()
    yield from _text_only_problems(self)
    rl, batch_size = self.rl, self.train.batch_size
    if rl.rows % batch_size:
      nearest = min((n for n in range(1, rl.rows + 1) if rl.rows % n == 0), key=lambda n: abs(n - batch_size))
      yield (f'train.batch_size={batch_size} does not divide the {rl.rows} completions of an iteration, '
             f'rl.prompts_per_iteration={rl.prompts_per_iteration} x rl.num_generations={rl.num_generations}; '
             f'write train.batch_size={nearest}')
    if rl.max_new_tokens >= self.data.seq_len:
      yield (f'rl.max_new_tokens={rl.max_new_tokens} leaves no room for a prompt in data.seq_len='
             f'{self.data.seq_len}; write data.seq_len={2 * rl.max_new_tokens}')
    yield from self._policy_problems()
    if self.guard.policy == 'rollback':
      yield ('guard.policy=rollback is not supported, as rollouts cannot be skipped before they are sampled; write '
             'guard.policy=skip or guard.policy=abort')
    yield from _1f1b_problems(self, 'policy optimization')
    if rl.reward_model:
      yield from reward_problems('rl.reward_model', rl.reward_model, self.data)

  def _policy_problems(self):
    rl, policy = self.rl, self.policy
    if policy.advantage_estimator != 'gae' and rl.num_generations < 2:
      yield (f'rl.num_generations={rl.num_generations}: policy.advantage_estimator={policy.advantage_estimator} '
             'compares completions of the same prompt; write rl.num_generations=8, or policy.name=ppo')
    if not rl.reference and policy.kl_coef:
      yield 'policy.kl_coef requires a reference model; write policy.kl_coef=0, or rl.reference=True'
    if self.adapter.kind and policy.advantage_estimator == 'gae':
      yield (f'adapter.kind={self.adapter.kind} does not support the value head of policy.advantage_estimator=gae; '
             'write policy.name=grpo, or leave adapter.kind out')
