"""Which checkpoints a run keeps, decided by Orbax's preservation policies.

Orbax's CheckpointManager is not used to apply them: it writes no checksum manifest before it renames a checkpoint, so
a process that is killed in between would leave an unverifiable checkpoint under its final name, and it would count
damaged checkpoints.
"""

import dataclasses

from orbax.checkpoint import checkpoint_managers as policies

# A metric whose name contains one of these is better when it is higher.
HIGHER_IS_BETTER = ('accuracy', 'exact_match', 'score', 'reward', 'pass', 'win_rate', 'f1', 'bleu', 'rouge')


@dataclasses.dataclass(frozen=True)
class _Checkpoint:
  """Orbax's PolicyCheckpointInfo. metrics: the sort key of `_best_policy`, or None without the metric."""

  step: int
  metrics: tuple | None
  time: None = None


def kept_steps(spec, metrics):
  """Return the steps that at least one rule of a CheckpointSpec keeps.

  metrics: {step: {name: value}} of all verified checkpoints.
  """
  rules = [policies.LatestN(spec.keep), _best_policy(spec)]
  if spec.keep_every:
    rules.append(policies.EveryNSteps(spec.keep_every))
  return _select(policies.AnyPreservationPolicy(rules), spec, metrics)


def best_steps(spec, metrics):
  """Return the `spec.keep_best` best steps by `spec.best_metric`. metrics: as in `kept_steps`."""
  measured = {step: values for step, values in metrics.items() if spec.best_metric in values}
  return _select(_best_policy(spec), spec, measured)


def _best_policy(spec):
  return policies.BestN(get_metric_fn=lambda key: key, n=spec.keep_best if spec.best_metric else 0,
                        keep_checkpoints_without_metrics=False)


def _select(policy, spec, metrics):
  mode = spec.best_mode or ('max' if any(word in spec.best_metric for word in HIGHER_IS_BETTER) else 'min')
  sign = 1 if mode == 'max' else -1
  # BestN keeps the largest keys. Of equal metrics the older step wins: a newer one may repeat an earlier measurement.
  key = lambda step: (sign * metrics[step][spec.best_metric], -step) if spec.best_metric in metrics[step] else None
  checkpoints = [_Checkpoint(step, key(step)) for step in sorted(metrics)]
  kept = policy.should_preserve(checkpoints, context=policies.PreservationContext())
  return {checkpoint.step for checkpoint, keep in zip(checkpoints, kept, strict=True) if keep}
