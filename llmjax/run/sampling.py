"""Samples every `train.sample_every` steps."""

from llmjax.run.callback import Callback


class Sampling(Callback):
  """Complete the prompts of `sample.prompts` and write samples.jsonl."""

  def __init__(self, sample):
    """sample: function (params) -> [(prompt, continuation)], or None for no samples."""
    self._sample = sample

  def needs_values(self, run):
    return run.is_due(run.spec.train.sample_every)

  def at_pause(self, run):
    if self._sample is None or not run.is_due(run.spec.train.sample_every):
      return
    with run.phase('sample'):
      for prompt, text in self._sample(run.params()):
        run.writers.write_sample(run.step, prompt, text)
