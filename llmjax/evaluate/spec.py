"""Options of the commands that look at a run.  No JAX here."""

import dataclasses
import os

from llmjax.checkpoint import pickle_guard
from llmjax.config import setting
from llmjax.data import prepared


def _workdir_problems(options):
  if not options.workdir:
    yield "workdir is missing; write --workdir=FOLDER, a run's folder such as runs/quickstart"
  elif refused := pickle_guard.refusal(options.workdir):
    yield f'workdir={refused}'


def _run_problems(options):
  yield from _workdir_problems(options)
  yield from pickle_guard.no_run(options.workdir)


@dataclasses.dataclass(frozen=True)
class EvaluateOptions:
  """Flags of `llmjax evaluate`."""

  workdir: str = setting('', "the run's folder", kind='path')
  splits: tuple[str, ...] = setting(('validation',), 'what to evaluate on', choices=prepared.SPLITS)
  step: int = setting(0, 'the checkpoint; 0: the latest', minimum=0)
  batch_size: int = setting(0, "rows at once; 0: the run's own", minimum=0)
  limit: int = setting(0, 'sequences to evaluate, a fixed random sample of the split; 0: all', minimum=0)
  sources: tuple[str, ...] = setting((), 'prepared folders to evaluate on, each by itself, in place of those trained '
                                     'on: text, conversations, or prompts with right answers', kind='path')
  seq_len: int = setting(0, "tokens of a row; 0: the run's own", minimum=0)
  reward: str = setting('math', 'of sources with prompts: what the likeliest answers are worth',
                        choices=('math', 'exact', 'doctest'))
  max_new_tokens: int = setting(64, 'of sources with prompts: tokens of an answer at most', minimum=1)

  def validate(self):
    yield from _run_problems(self)
    for folder in self.sources:
      try:
        held = prepared.kind(prepared.read_manifest(folder))
      except ValueError as e:
        yield f'sources: {e}'
        continue
      if held in ('preference', 'stepwise'):
        yield f'sources: {folder} holds {held} records; `llmjax reward` and `llmjax finetune` evaluate those'
    names = [os.path.basename(os.path.normpath(folder)) for folder in self.sources]
    if twice := sorted({name for name in names if names.count(name) > 1}):
      yield f'sources: {", ".join(twice)} is the name of two folders; evaluate one after the other'


@dataclasses.dataclass(frozen=True)
class ReportOptions:
  """Flags of `llmjax report`."""

  workdir: str = setting('', "the run's folder", kind='path')
  compare: tuple[str, ...] = setting((), 'folders of other runs, such as later stages of the same model: one page '
                                     'about all of them, in this order', kind='path')
  output: str = setting('', "with --compare: the page to write; '': compare.html in the folder of --workdir",
                        kind='file')

  def validate(self):
    yield from _workdir_problems(self)
    folders = (self.workdir, *self.compare)
    yield from pickle_guard.no_run(self.workdir)
    if self.compare:
      for folder in self.compare:
        if refused := pickle_guard.refusal(folder):
          yield f'compare={refused}'
        yield from (p.replace('workdir', 'compare', 1) for p in pickle_guard.no_run(folder))
      if twice := sorted({f for f in folders if [os.path.normpath(g) for g in folders].count(os.path.normpath(f)) > 1}):
        yield f'compare: {", ".join(twice)} is there twice; name every run once'
      if self.output and not self.output.endswith('.html'):
        yield f'output={self.output} must be the name of a page; write {self.output.rstrip("/")}/report.html'
    elif self.output:
      yield 'output is for --compare=RUN,RUN; the page of one run is report.html in its folder'
