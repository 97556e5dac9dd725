"""`llmjax finetune`: fine-tuning on conversations or text, or preference optimization."""

import dataclasses

from llmjax.config import ConfigError
from llmjax.loops import distill, preference, pretrain
from llmjax.run import start
from llmjax.text.templates import TemplateError


def run(spec, options):
  """Train as the spec says in options.workdir; returns the exit status."""
  if spec.is_preference:
    return start.run(spec, options, preference.preference_job)
  return start.run(distill.add_projection(spec), options, make_job)


def make_job(spec, mesh, batches, workdir):
  """Return the Job of pretraining, with samples that are prompted through the chat template."""
  job = pretrain.make_job(spec, mesh, batches, workdir)
  chat = start.keep_template(spec, workdir)
  if chat is None:
    return job  # Text only: continued pretraining.
  try:
    with chat:
      ask = lambda text: chat.prompt([{'role': 'user', 'content': text}])
      sample = pretrain.make_sampler(spec, mesh, ask, chat.stop_ids)
  except TemplateError as e:
    raise ConfigError([f'sample.prompts: {e}']) from e
  return dataclasses.replace(job, sample=sample)
