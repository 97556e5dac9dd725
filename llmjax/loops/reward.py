"""`llmjax reward`: a run's model learns to give answers scores, from pairs of a better and a worse one."""

import dataclasses
import json

import jax
import numpy as np

from llmjax.evaluate.pairs import describe_margins
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
  platform = mesh.devices.flat[0].platform
  loss_fn = objective.make_reward_loss(spec.model, spec.train, platform, spec.pipeline, centring=spec.reward.centring)
  job = pairs.make_job(spec, mesh, batches, loss_fn)
  step = jax.jit(objective.make_end_scores(spec.model, spec.train, platform, spec.pipeline),
                 out_shardings=jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))

  def with_margins(split, evaluate):
    def evaluated(params):
      scores = np.concatenate([np.stack([np.asarray(step(params, batch)),
                                         np.asarray(jax.jit(_has_answer, out_shardings=step_layout)(batch))])
                               for batch in pairs.read_split(spec, mesh, split, limit=spec.evaluate.limit)], axis=1)
      real = (scores[1, 0::2] > 0) & (scores[1, 1::2] > 0)
      found = describe_margins((scores[0, 0::2] - scores[0, 1::2])[real])
      if distributed.is_first():
        file = workdir / MARGINS
        before = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps({**before, split: found}, indent=1) + '\n')
      return {**evaluate(params), 'calibration_error': found['error'], 'mean_score': float(scores[0].mean())}

    return evaluated

  step_layout = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  return dataclasses.replace(job, evaluators={split: with_margins(split, e) for split, e in job.evaluators.items()})


def _has_answer(batch):
  return batch['loss_mask'].max(axis=1)
