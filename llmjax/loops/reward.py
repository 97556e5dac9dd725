"""`llmjax reward`: a run's model learns to give answers scores, from pairs of a better and a worse one."""

import dataclasses
import json

import jax
import numpy as np

from llmjax.evaluate import pairs as held_out
from llmjax.loops import pairs, start
from llmjax.parallel import distributed
from llmjax.rl import objective

MARGINS = 'reward.json'  # In the run's folder: what the report plots of held-out pairs.


def run(spec, options):
  """Trains what the spec says in options.workdir; returns the exit status."""
  model = dataclasses.replace(spec.model, value_head=True)
  return start.run(dataclasses.replace(spec, model=model), options, make_job, pairs.open_batches)


def make_job(spec, mesh, batches, workdir):
  """Returns the harness.Job of the Bradley-Terry loss."""
  start.keep_template(spec, workdir)
  judge = objective.make_reward_judge(spec.model, spec.train, mesh.devices.flat[0].platform, spec.pipeline,
                                      centring=spec.reward.centring)
  job = pairs.make_job(spec, mesh, batches, lambda params, batch, key: judge(params, batch, key)[0])
  whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  step = jax.jit(lambda params, batch: judge(params, batch, None), out_shardings=whole)

  def evaluator(split):
    def evaluate(params):
      scores, weights = [], []

      def judged(params, batch):
        sums, *each = step(params, batch)
        for rows, found in zip((scores, weights), each, strict=True):
          rows.append(np.asarray(found))
        return sums

      values = held_out.evaluate(judged, params, pairs.read_split(spec, mesh, split, limit=spec.evaluate.limit))
      both = np.concatenate(scores).reshape(-1, 2)[np.concatenate(weights) > 0]
      found = held_out.describe_margins(both[:, 0] - both[:, 1])
      if distributed.is_first():
        file = workdir / MARGINS
        before = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps({**before, split: found}, indent=1) + '\n')
      return {**values, 'calibration_error': found['error'], 'mean_score': float(both.mean())}

    return evaluate

  return dataclasses.replace(job, evaluators={split: evaluator(split) for split in spec.evaluate.splits})
