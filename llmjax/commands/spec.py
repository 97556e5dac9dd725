"""Configs of the commands that inspect a training recipe: `preview`, `mesh` and `plan`.  Does not import JAX."""

import dataclasses

from llmjax.config import find_problems, group, setting
from llmjax.data import prepared
from llmjax.data.spec import RECORDS, DataSpec
from llmjax.post.spec import PolicySpec, PreferenceSpec, RewardModelSpec, RlSpec
from llmjax.run.saved_run import UncheckedData
from llmjax.run.sources import run_groups
from llmjax.run.spec import FromRunSpec, PretrainSpec


@dataclasses.dataclass(frozen=True)
class PreviewOptions:
  """Flags of `llmjax preview`."""

  rows: int = setting(3, 'number of sequences to show', minimum=1, maximum=1000)
  split: str = setting('train', 'split to show sequences of', choices=prepared.SPLITS)


@dataclasses.dataclass(frozen=True)
class PreviewData(DataSpec):
  """The `data` group: sources of any kind of record, and how they are packed."""

  kinds = RECORDS


@dataclasses.dataclass(frozen=True)
class PreviewSpec(PretrainSpec):
  """The config of `llmjax preview`: a recipe of any training command, of which only the data are checked."""

  data: PreviewData = group(PreviewData)
  preference: PreferenceSpec = group(PreferenceSpec)
  reward: RewardModelSpec = group(RewardModelSpec)
  rl: RlSpec = group(RlSpec)
  policy: PolicySpec = group(PolicySpec)

  @classmethod
  def base(cls, values):
    """Return the values, such as data.seq_len, that the training command takes from another run."""
    train = values.get('train')
    has_init = isinstance(train, dict) and train.get('init_from')
    return (FromRunSpec if has_init or {'preference', 'reward', 'rl'} & set(values) else PretrainSpec).base(values)

  def validate(self):
    source = self.train.init_from
    if source and '://' not in source and 'data' not in run_groups(source, ('data',)):
      yield (f"train.init_from={source}: there is no such run to take data.seq_len from; write the folder of a run, or "
             '--config.train.init_from= and --config.data.seq_len=NUMBER')


@dataclasses.dataclass(frozen=True)
class LayoutSpec(PretrainSpec):
  """The config of `llmjax mesh`: that of pretraining, for which data need not be prepared if vocab_size is set."""

  data: UncheckedData = group(UncheckedData)

  def validate(self):
    yield from super().validate()
    if not self.model.vocab_size:
      yield from (f'data.{problem}; or set model.vocab_size, which needs no data'
                  for problem in DataSpec.validate(self.data))


@dataclasses.dataclass(frozen=True)
class PlanSpec(LayoutSpec):
  """The config of `llmjax plan`.  `mesh_problems` is empty, as the mesh is not resolved before the chips are known."""

  def mesh_problems(self, mesh):
    return ()

  def resolved_problems(self):
    """Yield all problems of a spec whose mesh is resolved, including sizes that the mesh does not divide."""
    yield from find_problems(self)
    yield from super().mesh_problems(self.mesh)
