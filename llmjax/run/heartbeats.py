"""The heartbeat of each step, by which a supervisor and the other processes see a process that hangs."""

from llmjax.run.callback import Callback


class Heartbeats(Callback):
  """Report each step that is done.  The loop itself reports the phases between them."""

  def after_step(self, run):
    run.heart.beat(run.step, waited=run.has_waited, saved=run.saved)
