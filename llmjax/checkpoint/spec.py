"""The checkpoint group of a config, and the flags of `llmjax checkpoint`. No JAX here."""

import dataclasses

from llmjax.checkpoint import pickle_guard
from llmjax.config import setting


@dataclasses.dataclass(frozen=True)
class CheckpointSpec:
  """Which checkpoints a run keeps, and what it does if one cannot be written.

  A checkpoint is kept if at least one rule keeps it; the newest always is.
  """

  keep: int = setting(3, 'number of newest checkpoints to keep', minimum=1)
  keep_every: int = setting(0, 'also keep every checkpoint whose step is a multiple of this; 0: off', minimum=0)
  best_metric: str = setting('', 'also keep the best checkpoints by this metric, such as eval/validation/loss')
  keep_best: int = setting(1, 'number of best checkpoints to keep', minimum=1)
  best_mode: str = setting('', "whether a lower (min) or higher (max) best_metric is better; empty: max if its name "
                           'contains a word such as accuracy or reward, otherwise min', choices=('', 'min', 'max'))
  on_error: str = setting('stop', 'if a checkpoint cannot be written: stop the run, or continue training until the '
                          'next one', choices=('stop', 'continue'))
  fresh_start: bool = setting(False, 'start anew in a folder that has checkpoints, which are renamed to checkpoints.1 '
                              'and so on; the new run resumes as usual')


def _workdir_problems(options):
  if not options.workdir:
    yield "workdir is missing; write --workdir=FOLDER, a run's folder such as runs/quickstart"
  elif refusal := pickle_guard.refusal(options.workdir):
    yield f'workdir={refusal}'


@dataclasses.dataclass(frozen=True)
class ListOptions:
  """Flags of `llmjax checkpoint ls`."""

  workdir: str = setting('', "the run's folder", kind='path')
  quick: bool = setting(False, 'compare file names and sizes only; do not read contents')

  validate = _workdir_problems


@dataclasses.dataclass(frozen=True)
class VerifyOptions:
  """Flags of `llmjax checkpoint verify`."""

  positional = 'steps'  # The field that positional arguments fill.
  workdir: str = setting('', "the run's folder", kind='path')
  steps: tuple[int, ...] = setting((), 'steps to verify; none: all')

  validate = _workdir_problems


@dataclasses.dataclass(frozen=True)
class SignOptions:
  """Flags of `llmjax checkpoint sign`."""

  positional = 'steps'
  workdir: str = setting('', "the run's folder", kind='path')
  steps: tuple[int, ...] = setting((), 'steps to write a checksum manifest for')

  def validate(self):
    yield from _workdir_problems(self)
    if not self.steps:
      yield 'steps is missing; name the checkpoints that you trust: llmjax checkpoint sign 400 --workdir=FOLDER'


@dataclasses.dataclass(frozen=True)
class MigrateOptions:
  """Flags of `llmjax checkpoint migrate`."""

  workdir: str = setting('', "the run's folder", kind='path')
  dry_run: bool = setting(False, 'only print what would be changed')

  problems = _workdir_problems


@dataclasses.dataclass(frozen=True)
class ShowOptions:
  """Flags of `llmjax checkpoint show`."""

  positional = 'steps'
  workdir: str = setting('', "the run's folder", kind='path')
  steps: tuple[int, ...] = setting((), 'steps to show; none: the newest verified one')
  optimizer: bool = setting(False, "list the optimizer's arrays too")

  validate = _workdir_problems


@dataclasses.dataclass(frozen=True)
class DiffOptions:
  """Flags of `llmjax checkpoint diff`."""

  positional = 'steps'
  workdir: str = setting('', "the run's folder", kind='path')
  steps: tuple[int, ...] = setting((), 'two steps; with --other one or two')
  other: str = setting('', "the folder of another run, which has the second checkpoint", kind='path')

  def validate(self):
    yield from _workdir_problems(self)
    if len(self.steps) != 2 and not (self.other and len(self.steps) == 1):
      yield ('steps: give two, such as llmjax checkpoint diff 200 400 --workdir=FOLDER; with --other=FOLDER one step '
             'of both runs is enough')


@dataclasses.dataclass(frozen=True)
class PruneOptions:
  """Flags of `llmjax checkpoint prune`."""

  workdir: str = setting('', "the run's folder", kind='path')
  keep: int = setting(0, "number of newest checkpoints to keep; 0: as in the run's config", minimum=0)
  dry_run: bool = setting(False, 'only print what would be removed')

  validate = _workdir_problems
