"""Callbacks: everything that happens around the training steps.

A callback is a class with some of the hooks below.  The loop calls them on every process, in the order of
`loop.make_callbacks`, and then those of `train.callbacks`:

| hook | when | what it is for |
| --- | --- | --- |
| `on_init(run)` | the state is loaded, nothing is compiled | |
| `on_start(run)` | after compiling, before the first step | preparation |
| `before_step(run)` | before each step | |
| `needs_values(run)` | after each step was dispatched | return True to have the devices finish: the next two follow |
| `on_values(run, rows)` | with the metrics of the steps since the last call | checks and logging |
| `on_log(run, values)` | before `values` are logged | add or change metrics; return a note for the terminal |
| `at_pause(run)` | after `on_values`, unless the run ends or rolls back | evaluation, samples, checkpoints |
| `on_evaluation(run, name, values)` | after each evaluation | early stopping |
| `after_step(run)` | after each step | |
| `on_rollback(run, rollback)` | after the state of an earlier step was restored | |
| `flush(run)` | with each log line, checkpoint, and at the end | write what is measured so far |
| `on_end(run)` | when the run ends or is interrupted | final checkpoint |
| `close(run)` | last, also after an error | release resources; processes may have failed, so no collectives |

Between `needs_values` and the next step the devices are idle, and the time is not counted as that of steps.  Hooks that
start collectives must do so on all processes: decide by the step, not by anything that differs between processes.
"""


class Callback:
  """Base class of callbacks: every hook does nothing.  `run` is a `loop.Run`."""

  def on_init(self, run):
    pass

  def on_start(self, run):
    pass

  def before_step(self, run):
    pass

  def needs_values(self, run):
    return False

  def on_values(self, run, rows):
    """rows: one dict per step since the last call, in order: `step`, `position`, and its metrics as numbers."""

  def on_log(self, run, values):
    """values: {metric: value} of the steps since the last log line; may be changed.  Returns a note, or None."""

  def at_pause(self, run):
    pass

  def on_evaluation(self, run, name, values):
    """name: of the evaluation.  values: {metric: value}, without the prefix `eval/<name>/`."""

  def after_step(self, run):
    pass

  def on_rollback(self, run, rollback):
    """rollback: loop.Rollback.  `run.step` is the restored one."""

  def flush(self, run):
    pass

  def on_end(self, run):
    pass

  def close(self, run):
    pass
