"""Metrics every `train.log_every` steps, and the lines of the terminal."""

import jax

from llmjax.model import counts
from llmjax.run.callback import Callback
from llmjax.run.changes import describe_jump
from llmjax.run.timer import Speed


class Logging(Callback):
  """Write the metrics of the steps, and print the progress."""

  def on_init(self, run):
    attempt, checkpoints = run.attempt, run.checkpoints
    lost = run.goodput.go_back(run.first)
    for line in (*run.spec.optimizer.warnings(run.total), *attempt.notes):
      run.say(line)
    for line in checkpoints.passed_over:
      run.say(line)
      run.event('damaged_checkpoint', reason=line)
    run.event('start', lost_seconds=round(lost, 3), config=attempt.config)
    if run.first:
      run.say(f'resuming from step {run.first} of {run.workdir}')
      self._report_changes(run)
    elif run.spec.train.init_from:
      run.say(f'starting from the parameters of {run.spec.train.init_from}')

  def on_start(self, run):
    with run.goodput.charge('init'):
      self._speed = Speed(run.spec, run.mesh)
    run.say(_headline(run))

  def needs_values(self, run):
    return run.is_due(run.spec.train.log_every)

  def on_values(self, run, rows):
    if not (run.is_due(run.spec.train.log_every) or run.is_ending):
      return
    values = run.timer.read()
    values['train/mfu'] = self._speed.mfu(values['train/tokens_per_second'])
    notes = run.call('on_log', values)
    run.log(values)
    run.progress.log(run.step, values, ', '.join(filter(None, notes)))
    run.call('flush')

  def after_step(self, run):
    if not run.is_due(run.spec.train.log_every):
      run.progress.tick(run.step)

  def _report_changes(self, run):
    """Print and record the settings that differ from those of the steps before."""
    changes = [*run.attempt.changes, *run.data_change]
    for change in changes:
      run.say(f'changed at step {run.first}: {change}')
    if jump := describe_jump(run.attempt.before, run.spec, run.first):
      run.say(f'warning: {jump}')
    if changes:
      run.event('config_change', changes={c.field: [c.old, c.new] for c in changes},
                **{'learning_rate': jump} if jump else {})


def _headline(run):
  """Return the line that describes the model, the part of it that trains, and the devices."""
  spec, mesh = run.spec, run.mesh
  total = counts.count_params(spec.model)['total']
  trained = sum(x.size for x in jax.tree.leaves(run.state.params))
  is_part = spec.adapter.kind or spec.optimizer.freeze
  part = f', {spec.adapter.kind} {trained / 1e6:.2f} M trained'.replace('  ', ' ') if is_part else ''
  axes = ' x '.join(f'{a} {n}' for a, n in mesh.shape.items() if n > 1) or 'one device'
  return (f'{total / 1e6:.2f} M parameters{part}, {spec.train.batch_size * spec.data.seq_len} tokens a step, '
          f'{mesh.devices.size} x {mesh.devices.flat[0].device_kind} ({axes}), compiled in {run.compile_seconds:.1f}s')
