"""Evaluation every `train.eval_every` steps."""

from llmjax.run.callback import Callback


class Evaluation(Callback):
  """Run the evaluators of the stage, log their metrics, and pass them to the other callbacks."""

  def __init__(self, evaluators):
    """evaluators: {name: function (params, frozen) -> metrics}."""
    self._evaluators = evaluators

  def needs_values(self, run):
    return run.is_due(run.spec.train.eval_every)

  def at_pause(self, run):
    if not run.is_due(run.spec.train.eval_every):
      return
    for name, evaluator in self._evaluators.items():
      with run.phase('eval', 'evaluate') as watch:
        values = evaluator(run.params(), run.state.frozen)
        seconds = watch.seconds
      metrics = {f'eval/{name}/{k}': v for k, v in values.items()}
      run.log(metrics)
      run.progress.evaluated(run.step, name, values, seconds, watch.compiling)
      numbers = {k: v for k, v in metrics.items() if not isinstance(v, str)}  # Strings describe the data.
      run.evaluated = run.step, {**run.evaluated[1], **numbers}
      run.call('on_evaluation', name, values)
