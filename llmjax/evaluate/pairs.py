"""Held-out pairs, and steps: how often the better answer scores higher, by how much, and how sure the scores are."""

import jax
import numpy as np

from llmjax.parallel import in_flight

BINS = 10


def evaluate(eval_step, params, frozen, batches, unit='pairs'):
  """Returns {'loss', unit: how many, and the means of what the loss reports} over all batches.

  eval_step: a jitted loss_fn(params, frozen, batch) -> (sum, (weight, aux)).  Sums are added in float64 and divided
  once, so padding and batch size do not matter.  A router's penalty is no part of the loss here.
  """
  parts = list(in_flight.results(eval_step(params, frozen, batch) for batch in batches))
  if not parts:
    return {'loss': 0.0, unit: 0}
  loss, (weight, aux) = jax.tree.map(lambda *x: float(np.sum(np.asarray(x, np.float64))), *parts)
  loss -= aux.pop('penalty', 0.0)
  divided = {name: total / max(weight, 1.0) for name, total in aux.items()}
  return {'loss': loss / max(weight, 1.0), unit: int(weight), **divided}


def describe_margins(margins, bins=BINS, unit='pairs'):
  """Returns what plots of a reward model show, from the margins chosen - rejected of held-out pairs, float [n].

  Of a step that is said to be good or bad, the margin is the score, with its sign changed where the step is bad.
  unit: what they are of.  calibration: for equal parts of them by |margin|, {'said', 'right', unit: how many}: the
  mean probability sigmoid(|margin|) that the model gives its own choice (arXiv:2203.02155, eq. 1), and how often that
  was right.
  error: the expected calibration error (arXiv:1706.04599, eq. 3).  histogram: {'edges', 'counts'}.
  """
  margins = np.asarray(margins, np.float64)
  said, right = 1 / (1 + np.exp(-np.minimum(np.abs(margins), 700))), margins > 0
  parts = [part for part in np.array_split(np.argsort(said, kind='stable'), bins) if len(part)]
  calibration = [{'said': round(float(said[part].mean()), 6), 'right': round(float(right[part].mean()), 6),
                  unit: len(part)} for part in parts]
  error = sum(p[unit] * abs(p['said'] - p['right']) for p in calibration) / max(len(margins), 1)
  reach = float(np.abs(margins).max(initial=1e-6))
  counts, edges = np.histogram(margins, bins=2 * bins, range=(-reach, reach))
  return {unit: len(margins), 'accuracy': round(float(right.mean()), 6) if len(margins) else 0.0,
          'mean_margin': round(float(margins.mean()), 6) if len(margins) else 0.0, 'error': round(float(error), 6),
          'calibration': calibration,
          'histogram': {'edges': [round(float(e), 6) for e in edges], 'counts': counts.tolist()}}


def describe_steps(margins, good, places, most=64):
  """Returns what is known of held-out steps beside `describe_margins`.

  margins: float [n].  good: bool [n].  places: int [n], which step of its solution each is, from 1.  base: how often
  the commoner label is right.  good, bad: accuracy of those steps alone.  by_place: the same of each place, the
  first `most`.
  """
  right, good, places = np.asarray(margins) > 0, np.asarray(good, bool), np.asarray(places)
  mean = lambda which: round(float(right[which].mean()), 6) if which.any() else None
  by_place = [{'place': int(n), 'steps': int((places == n).sum()), 'accuracy': mean(places == n)}
              for n in np.unique(places)[:most]]
  share = float(good.mean()) if len(good) else 0.0
  return {'base': round(max(share, 1 - share), 6), 'good': mean(good), 'bad': mean(~good), 'by_place': by_place}
