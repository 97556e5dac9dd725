"""`llmjax finetune`: a run's model goes on with conversations, pairs of answers, or other text."""

import dataclasses

from llmjax.config import ConfigError
from llmjax.loops import distill, preference, pretrain
from llmjax.run import start
from llmjax.text.templates import TemplateError


def run(spec, options):
  """Trains what the spec says in options.workdir; returns the exit status."""
  if spec.is_preference:
    return start.run(spec, options, preference.preference_job)
  return start.run(distill.settle(spec), options, make_job)


def make_job(spec, mesh, batches, workdir):
  """Returns pretraining's job, its samples asked as the chat template asks."""
  job = pretrain.make_job(spec, mesh, batches, workdir)
  chat = start.keep_template(spec, workdir)
  if chat is None:
    return job  # Text alone: a model moves to another domain.
  try:
    with chat:
      ask = lambda text: chat.prompt([{'role': 'user', 'content': text}])
      sample = pretrain.make_sampler(spec, mesh, ask, chat.stop_ids)
  except TemplateError as e:
    raise ConfigError([f'sample.prompts: {e}']) from e
  return dataclasses.replace(job, sample=sample)
