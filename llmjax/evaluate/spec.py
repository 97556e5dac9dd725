"""Options of the commands that look at a run or at a machine.  No JAX here."""

import dataclasses

from llmjax.checkpoint import weights
from llmjax.config import setting

PLATFORMS = ('', 'cpu', 'gpu', 'tpu')


def _workdir_problems(options):
  if not options.workdir:
    yield "workdir is missing; write --workdir=FOLDER, a run's folder such as runs/quickstart"
  elif refused := weights.refusal(options.workdir):
    yield f'workdir={refused}'


def _run_problems(options):
  yield from _workdir_problems(options)
  yield from weights.no_run(options.workdir)


@dataclasses.dataclass(frozen=True)
class EvaluateOptions:
  """Flags of `llmjax evaluate`."""

  workdir: str = setting('', "the run's folder")
  splits: tuple[str, ...] = setting(('validation',), 'what to evaluate on')
  step: int = setting(0, 'the checkpoint; 0: the latest', minimum=0)
  batch_size: int = setting(0, "rows at once; 0: the run's own", minimum=0)
  limit: int = setting(0, 'rows to evaluate; 0: all', minimum=0)

  problems = _run_problems


@dataclasses.dataclass(frozen=True)
class ReportOptions:
  """Flags of `llmjax report`."""

  workdir: str = setting('', "the run's folder")

  problems = _workdir_problems


@dataclasses.dataclass(frozen=True)
class DoctorOptions:
  """Flags of `llmjax doctor`."""

  platform: str = setting('', 'must be usable; empty: whatever JAX finds', choices=PLATFORMS)
