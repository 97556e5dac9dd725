"""Held-out pairs: how often the better answer scores higher, by how much, and how sure the scores are."""

import jax
import numpy as np

BINS = 10


def evaluate(eval_step, params, batches):
  """Returns {'loss', 'pairs', and the means of what the loss reports} over all batches.

  eval_step: a jitted loss_fn(params, batch) -> (sum, (weight, aux)).  Sums are added in float64 and divided once, so
  padding and batch size do not matter.
  """
  pending = [eval_step(params, batch) for batch in batches]
  if not pending:
    return {'loss': 0.0, 'pairs': 0}
  loss, (weight, aux) = jax.tree.map(lambda *x: float(np.sum(np.asarray(x, np.float64))), *pending)
  divided = {name: total / max(weight, 1.0) for name, total in aux.items()}
  return {'loss': loss / max(weight, 1.0), 'pairs': int(weight), **divided}


def describe_margins(margins, bins=BINS):
  """Returns what plots of a reward model show, from the margins chosen - rejected of held-out pairs, float [n].

  calibration: for equal parts of the pairs by |margin|, {'said', 'right', 'pairs'}: the mean probability
  sigmoid(|margin|) that the model gives its own choice (arXiv:2203.02155, eq. 1), and how often that was right.
  error: the expected calibration error (arXiv:1706.04599, eq. 3).  histogram: {'edges', 'counts'}.
  """
  margins = np.asarray(margins, np.float64)
  said, right = 1 / (1 + np.exp(-np.minimum(np.abs(margins), 700))), margins > 0
  parts = [part for part in np.array_split(np.argsort(said, kind='stable'), bins) if len(part)]
  calibration = [{'said': round(float(said[part].mean()), 6), 'right': round(float(right[part].mean()), 6),
                  'pairs': len(part)} for part in parts]
  error = sum(p['pairs'] * abs(p['said'] - p['right']) for p in calibration) / max(len(margins), 1)
  reach = float(np.abs(margins).max(initial=1e-6))
  counts, edges = np.histogram(margins, bins=2 * bins, range=(-reach, reach))
  return {'pairs': len(margins), 'accuracy': round(float(right.mean()), 6) if len(margins) else 0.0,
          'mean_margin': round(float(margins.mean()), 6) if len(margins) else 0.0, 'error': round(float(error), 6),
          'calibration': calibration,
          'histogram': {'edges': [round(float(e), 6) for e in edges], 'counts': counts.tolist()}}
