"""The checkpoint group of a config.  No JAX here."""

import dataclasses

from llmjax.checkpoint import pickle_guard
from llmjax.config import setting

# A metric with one of these in its name is better when it is higher.
HIGHER_IS_BETTER = ('accuracy', 'exact_match', 'score', 'reward', 'pass', 'win_rate', 'f1', 'bleu', 'rouge')


@dataclasses.dataclass(frozen=True)
class CheckpointSpec:
  """What is kept of the checkpoints that a run writes, and what happens when one cannot be written.

  A checkpoint is kept when any of the rules wants it; the newest always is.
  """

  keep: int = setting(3, 'newest checkpoints to keep', minimum=1)
  keep_every: int = setting(0, 'keep every step that this divides, for good; 0: none', minimum=0)
  best_metric: str = setting('', 'keep the best by this too, such as eval/validation/loss')
  keep_best: int = setting(1, 'how many of the best to keep', minimum=1)
  best_mode: str = setting('', "which is best: min or max; empty: min, but max for a name such as accuracy",
                           choices=('', 'min', 'max'))
  on_error: str = setting('stop', 'when a checkpoint cannot be written: stop, so that no work is lost unseen, '
                          'or continue to the next one', choices=('stop', 'continue'))
  fresh_start: bool = setting(False, 'start anew in a folder with checkpoints, which are renamed to checkpoints.1 and '
                              'so on; what was started so is resumed as ever')

  def best_steps(self, metrics):
    """Returns the `keep_best` best steps.  metrics: step -> {name: value} of the good checkpoints."""
    mode = self.best_mode or (
        'max' if any(word in self.best_metric for word in HIGHER_IS_BETTER) else 'min')
    sign = -1 if mode == 'max' else 1
    # Of equals, the older one: the newer may carry a metric that was measured before it.
    ranked = sorted((sign * m[self.best_metric], step) for step, m in metrics.items() if self.best_metric in m)
    return {step for _, step in ranked[:self.keep_best]}

  def kept_steps(self, metrics):
    """Returns the steps to keep.  metrics: as in best_steps."""
    kept = set(sorted(metrics)[-self.keep:]) | self.best_steps(metrics)
    return kept | {step for step in metrics if self.keep_every and step % self.keep_every == 0}


def _workdir_problems(options):
  if not options.workdir:
    yield "workdir is missing; write --workdir=FOLDER, a run's folder such as runs/quickstart"
  elif refused := pickle_guard.refusal(options.workdir):
    yield f'workdir={refused}'


@dataclasses.dataclass(frozen=True)
class ListOptions:
  """Flags of `llmjax checkpoint ls`."""

  workdir: str = setting('', "the run's folder", kind='path')
  quick: bool = setting(False, 'look at names and sizes only, and read no contents')

  validate = _workdir_problems


@dataclasses.dataclass(frozen=True)
class VerifyOptions:
  """Flags of `llmjax checkpoint verify`."""

  words = 'steps'  # The field that plain words of the command line fill.
  workdir: str = setting('', "the run's folder", kind='path')
  steps: tuple[int, ...] = setting((), 'which; none: all')

  validate = _workdir_problems


@dataclasses.dataclass(frozen=True)
class SealOptions(VerifyOptions):
  """Flags of `llmjax checkpoint seal`."""

  def validate(self):
    yield from _workdir_problems(self)
    if not self.steps:
      yield 'steps is missing; name the checkpoints that you trust: llmjax checkpoint seal 400 --workdir=FOLDER'


@dataclasses.dataclass(frozen=True)
class ShowOptions:
  """Flags of `llmjax checkpoint show`."""

  words = 'steps'
  workdir: str = setting('', "the run's folder", kind='path')
  steps: tuple[int, ...] = setting((), 'which; none: the newest good one')
  optimizer: bool = setting(False, "list the optimizer's arrays too")

  validate = _workdir_problems


@dataclasses.dataclass(frozen=True)
class DiffOptions:
  """Flags of `llmjax checkpoint diff`."""

  words = 'steps'
  workdir: str = setting('', "the run's folder", kind='path')
  steps: tuple[int, ...] = setting((), 'two; or, with --other, one or two')
  other: str = setting('', "another run's folder, which the second checkpoint is of", kind='path')

  def validate(self):
    yield from _workdir_problems(self)
    if len(self.steps) != 2 and not (self.other and len(self.steps) == 1):
      yield ('steps: two are wanted, such as llmjax checkpoint diff 200 400 --workdir=FOLDER; '
             'with --other=FOLDER one step of both will do')


@dataclasses.dataclass(frozen=True)
class PruneOptions:
  """Flags of `llmjax checkpoint prune`."""

  workdir: str = setting('', "the run's folder", kind='path')
  keep: int = setting(0, "newest to keep; 0: what the run's config says", minimum=0)
  dry_run: bool = setting(False, 'only say what would be removed')

  validate = _workdir_problems
