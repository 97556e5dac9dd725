"""The `evaluate` group of a config, and the flags of `llmjax evaluate` and `llmjax report`.  Does not import JAX."""

import dataclasses
import os

from llmjax.checkpoint import pickle_guard
from llmjax.config import setting
from llmjax.data import prepared


@dataclasses.dataclass(frozen=True)
class EvaluateSpec:
  """The `evaluate` group: evaluation during training, every train.eval_every steps and at the end."""

  splits: tuple[str, ...] = setting(('validation',), 'splits of the data to evaluate; empty: no evaluation',
                                    choices=prepared.SPLITS)
  tasks: tuple[str, ...] = setting((), 'additional evaluations, module:function: a function (spec, mesh) of your own '
                                   'that returns a function (params, frozen) -> {metric: number}; logged as '
                                   'eval/<function>/<metric>')
  batch_size: int = setting(0, 'sequences per batch; 0: train.batch_size', minimum=0)
  limit: int = setting(0, 'maximum number of sequences, a fixed random sample of each split; 0: all', minimum=0)
  per_source: bool = setting(False, 'also evaluate every source of the data separately')
  extra_sources: tuple[str, ...] = setting((), 'additional prepared data folders to evaluate on, such as the '
                                           'pretraining data during fine-tuning', kind='path')


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
  splits: tuple[str, ...] = setting(('validation',), 'splits of the data to evaluate', choices=prepared.SPLITS)
  step: int = setting(0, 'step of the checkpoint to evaluate; 0: the latest', minimum=0)
  batch_size: int = setting(0, "sequences per batch; 0: the run's evaluate.batch_size", minimum=0)
  limit: int = setting(0, 'maximum number of sequences, a fixed random sample of each split; 0: all', minimum=0)
  sources: tuple[str, ...] = setting((), 'prepared data folders to evaluate on separately, instead of the training '
                                     'data: text, conversations, or prompts with gold answers', kind='path')
  seq_len: int = setting(0, "sequence length in tokens; 0: the run's data.seq_len", minimum=0)
  reward: str = setting('math', 'reward of greedy completions, for sources of prompts',
                        choices=('math', 'exact', 'doctest'))
  max_new_tokens: int = setting(64, 'maximum tokens per completion, for sources of prompts', minimum=1)

  def validate(self):
    yield from _run_problems(self)
    for folder in self.sources:
      try:
        records = prepared.kind(prepared.read_manifest(folder))
      except ValueError as e:
        yield f'sources: {e}'
        continue
      if records in ('preference', 'stepwise'):
        yield f'sources: {folder} holds {records} records; `llmjax reward` and `llmjax finetune` evaluate those'
    names = [os.path.basename(os.path.normpath(folder)) for folder in self.sources]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
      yield f'sources: several folders are named {", ".join(repeated)}; evaluate them one at a time'


@dataclasses.dataclass(frozen=True)
class ReportOptions:
  """Flags of `llmjax report`."""

  workdir: str = setting('', "the run's folder", kind='path')
  compare: tuple[str, ...] = setting((), 'folders of other runs to show on the same page, in this order, such as '
                                     'later training stages of the model', kind='path')
  output: str = setting('', "with --compare, the HTML file to write; '': compare.html in --workdir",
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
      paths = [os.path.normpath(folder) for folder in folders]
      if repeated := sorted({f for f, path in zip(folders, paths, strict=True) if paths.count(path) > 1}):
        yield f'compare: {", ".join(repeated)} is listed twice; list every run once'
      if self.output and not self.output.endswith('.html'):
        yield f'output={self.output} must be an HTML file; write {self.output.rstrip("/")}/report.html'
    elif self.output:
      yield 'output requires --compare=RUN,RUN; the report on a single run is report.html in its folder'
