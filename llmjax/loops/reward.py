"""`llmjax reward`: a run's model learns to give scores: to answers, from pairs of them, or to the steps of one."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np

from llmjax.data import stream
from llmjax.evaluate import margins
from llmjax.loops import preference, pretrain
from llmjax.parallel import distributed
from llmjax.parallel.mesh import batch_blocks, batch_shards, place_batch
from llmjax.post import objective
from llmjax.run import loop, start

MARGINS = 'reward.json'  # In the run's folder: what the report plots of held-out pairs or steps.


def run(spec, options):
  """Trains what the spec says in options.workdir; returns the exit status."""
  scores = 'steps' if spec.is_stepwise else 'completions'
  spec = dataclasses.replace(spec, model=dataclasses.replace(spec.model, value_head=True),
                             reward=dataclasses.replace(spec.reward, scores=scores))
  return start.run(spec, options, make_job)


def make_job(spec, mesh, batches, workdir):
  """Returns the loop.Job of the Bradley-Terry loss of pairs, or of the cross-entropy of steps."""
  start.keep_template(spec, workdir)
  model, noise = start.make_model(spec, mesh), spec.train.neftune_alpha
  if spec.is_stepwise:
    scorer = objective.make_step_scorer(model, noise)
  else:
    scorer = objective.make_pair_scorer(model, center_rewards_coef=spec.reward.center_rewards_coef, neftune_alpha=noise)
  loss_fn = objective.loss_of(scorer)
  if spec.is_stepwise:
    job = loop.Job(spec=spec, mesh=mesh, batches=batches, loss_fn=loss_fn, evaluators={}, sample=None,
                      describe=pretrain.make_describer(spec, batches))
  else:
    job = preference.make_job(spec, mesh, batches, loss_fn)
  evaluators = {split: make_evaluator(spec, mesh, scorer, split, workdir) for split in spec.evaluate.splits}
  return dataclasses.replace(job, evaluators=evaluators)


def make_evaluator(spec, mesh, scorer, split, workdir):
  """Returns the function of the parameters to a split's metrics, which writes what the report plots as well."""
  whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  count = lambda batch: jnp.sum(jnp.any(batch['segment_ids'] > 0, axis=1))  # Sequences that do not pad the batch.
  step = jax.jit(lambda params, batch: (*scorer(params, batch, None), count(batch)), out_shardings=whole)
  unit = 'steps' if spec.is_stepwise else 'pairs'
  described = stream.describe_evaluation(spec.data, split, spec.evaluate.limit)

  def evaluate(params, frozen):
    parts, counts = [], []

    def judged(params, frozen, batch):
      sums, each, sequences = step(params, batch)
      counts.append(int(sequences))
      parts.append({name: np.asarray(a).ravel() for name, a in each.items()})
      return sums

    read = (_read_rows if spec.is_stepwise else preference.read_split)(spec, mesh, split, limit=spec.evaluate.limit)
    values = margins.evaluate(judged, params, frozen, read, unit)
    each = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    real = each['weight'] > 0
    each = {name: a[real] for name, a in each.items()}
    found = margins.describe_margins(each['margin'], unit=unit)
    values |= {'calibration_error': found['error'], 'mean_score': float(each['score'].mean())}
    if spec.is_stepwise:
      found |= margins.describe_steps(each['margin'], each['good'], each['place'])
      values |= {'base_accuracy': found['base'], 'sequences': sum(counts)}
    if distributed.is_first():
      file = workdir / MARGINS
      before = json.loads(file.read_text()) if file.exists() else {}
      file.write_text(json.dumps({**before, split: found}, indent=1) + '\n')
    return {**values, **described}

  return evaluate


def _read_rows(spec, mesh, split, limit=0):
  """Yields the batches, on the devices, with every row of a split once; at most `limit` rows where it is not 0."""
  size = start.eval_rows(spec, mesh)
  for batch in stream.eval_batches(spec.data, split, size, limit, blocks=batch_blocks(mesh),
                                   block_count=batch_shards(mesh)):
    yield place_batch(mesh, batch)
