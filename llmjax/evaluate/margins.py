"""Evaluate reward models and policies on held-out preference pairs, or on labelled solution steps."""

import jax
import numpy as np

from llmjax.parallel import in_flight

BINS = 10


def evaluate(eval_step, params, frozen, batches, unit='pairs'):
  """Return {'loss', unit: number of pairs or steps} and the means of the loss's aux, over all batches.

  eval_step: a jitted loss_fn(params, frozen, batch) -> (sum, (weight, aux)).  Sums are accumulated in float64 and
  divided once, so the result does not depend on padding or batch size.  Router penalties are excluded from the loss.
  """
  results = list(in_flight.results(eval_step(params, frozen, batch) for batch in batches))
  if not results:
    return {'loss': 0.0, unit: 0}
  loss, (weight, aux) = jax.tree.map(lambda *x: float(np.sum(np.asarray(x, np.float64))), *results)
  loss -= aux.pop('penalty', 0.0)
  means = {name: total / max(weight, 1.0) for name, total in aux.items()}
  return {'loss': loss / max(weight, 1.0), unit: int(weight), **means}


def describe_margins(margins, bins=BINS, unit='pairs'):
  """Return the accuracy, calibration and histogram of margins, float [n], for the report.

  A margin is the score of the chosen minus that of the rejected completion.  For a solution step it is the score, with
  its sign flipped if the step is incorrect.  unit: 'pairs' or 'steps'.
  calibration: for bins of equal size by |margin|, {'confidence', 'accuracy', unit: size}, where confidence is the mean
  probability sigmoid(|margin|) of the model's own choice (arXiv:2203.02155, eq. 1).
  error: the expected calibration error (arXiv:1706.04599, eq. 3).  histogram: {'edges', 'counts'}.
  """
  margins = np.asarray(margins, np.float64)
  confidence, correct = 1 / (1 + np.exp(-np.minimum(np.abs(margins), 700))), margins > 0
  mean = lambda x: round(float(x.mean()), 6) if len(x) else 0.0
  groups = [group for group in np.array_split(np.argsort(confidence, kind='stable'), bins) if len(group)]
  calibration = [{'confidence': mean(confidence[group]), 'accuracy': mean(correct[group]), unit: len(group)}
                 for group in groups]
  error = sum(b[unit] * abs(b['confidence'] - b['accuracy']) for b in calibration) / max(len(margins), 1)
  limit = float(np.abs(margins).max(initial=1e-6))
  counts, edges = np.histogram(margins, bins=2 * bins, range=(-limit, limit))
  return {unit: len(margins), 'accuracy': mean(correct), 'mean_margin': mean(margins), 'error': round(float(error), 6),
          'calibration': calibration,
          'histogram': {'edges': [round(float(e), 6) for e in edges], 'counts': counts.tolist()}}


def describe_steps(margins, good, places, limit=64):
  """Return the accuracy on solution steps by label and by position.

  margins: float [n].  good: bool [n], whether the step is correct.  places: int [n], its position in the solution,
  from 1.  base: accuracy of always predicting the more frequent label.  good, bad: accuracy on steps with that label.
  by_position: accuracy at each of the first `limit` positions.
  """
  correct, good, places = np.asarray(margins) > 0, np.asarray(good, bool), np.asarray(places)
  accuracy = lambda mask: round(float(correct[mask].mean()), 6) if mask.any() else None
  by_position = [{'position': int(n), 'steps': int((places == n).sum()), 'accuracy': accuracy(places == n)}
                 for n in np.unique(places)[:limit]]
  share = float(good.mean()) if len(good) else 0.0
  return {'base': round(max(share, 1 - share), 6), 'good': accuracy(good), 'bad': accuracy(~good),
          'by_position': by_position}
