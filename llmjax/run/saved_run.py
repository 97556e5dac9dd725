"""The configs of existing runs, for evaluation and generation.  Does not import JAX."""

import dataclasses

from llmjax import config
from llmjax.config import group
from llmjax.data.spec import DataSpec
from llmjax.post.spec import RlSpec
from llmjax.run.spec import PretrainSpec, PromptData


@dataclasses.dataclass(frozen=True)
class UncheckedData(DataSpec):
  """The `data` group: prepared folders, which need not exist, and how they are packed."""

  def validate(self):
    return ()


@dataclasses.dataclass(frozen=True)
class SavedRunSpec(PretrainSpec):
  """The config of a run of any training command.  The files that it was trained on need not exist."""

  data: UncheckedData = group(UncheckedData)

  def validate(self):
    return ()


@dataclasses.dataclass(frozen=True)
class EvaluatedRunSpec(PretrainSpec):
  """The config of a run of any training command, whose prepared data must exist."""

  def validate(self):
    return self.extra_source_problems()


@dataclasses.dataclass(frozen=True)
class CompletionsSpec(EvaluatedRunSpec):
  """The config of a run whose completions of prepared prompts are evaluated."""

  data: PromptData = group(PromptData)
  rl: RlSpec = group(RlSpec)


def spec_of_run(spec_class, values):
  """Build the SavedRunSpec, EvaluatedRunSpec or CompletionsSpec of a run from the values in its config.json.

  Groups that spec_class lacks are ignored, as are `adapter`, `distill` and `checkpoint`, which only training uses.
  """
  groups = {field.name for field in dataclasses.fields(spec_class)} - {'adapter', 'distill', 'checkpoint'}
  return config.build(spec_class, {name: value for name, value in values.items() if name in groups})
