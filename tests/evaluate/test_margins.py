"""Held-out preference pairs: means over batches, and the calibration of a reward model."""

import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.evaluate import margins


def test_means_do_not_depend_on_the_batch_size():
  values = np.random.default_rng(0).normal(size=12).astype(np.float32)

  def step(params, frozen, batch):
    weight = jnp.sum(batch['real'])
    return jnp.sum(batch['real'] * batch['x'] ** 2), (weight, {'accuracy': jnp.sum(batch['real'] * (batch['x'] > 0))})

  def batches(size):
    for start in range(0, 12, size):
      part = values[start:start + size]
      yield {'x': np.pad(part, (0, size - len(part)), constant_values=9),
             'real': np.pad(np.ones(len(part)), (0, size - len(part)))}

  result = margins.evaluate(step, None, {}, batches(12))
  assert result == {'loss': pytest.approx(float(np.mean(values ** 2)), rel=1e-6), 'pairs': 12,
                   'accuracy': pytest.approx(float(np.mean(values > 0)))}
  for size in (1, 5):
    assert margins.evaluate(step, None, {}, batches(size)) == pytest.approx(result, rel=1e-6)


def test_a_calibrated_model_has_no_calibration_error():
  rng = np.random.default_rng(0)
  truth = rng.normal(scale=2, size=40_000)
  right = rng.random(len(truth)) < 1 / (1 + np.exp(-np.abs(truth)))
  values = np.where(right, np.abs(truth), -np.abs(truth))
  calibrated, overconfident = margins.describe_margins(values), margins.describe_margins(5 * values)
  assert calibrated['error'] < 0.01 < 0.1 < overconfident['error']
  assert calibrated['accuracy'] == overconfident['accuracy'] == round(float(right.mean()), 6)
  assert sum(p['pairs'] for p in calibrated['calibration']) == sum(calibrated['histogram']['counts']) == len(truth)
  confidences = [p['confidence'] for p in calibrated['calibration']]
  assert confidences == sorted(confidences)


def test_zero_pairs_and_one_pair():
  assert margins.describe_margins([])['pairs'] == 0
  one = margins.describe_margins([-2.0])
  assert one['accuracy'] == 0.0 and one['calibration'] == [
      {'confidence': pytest.approx(0.880797), 'accuracy': 0.0, 'pairs': 1}]
