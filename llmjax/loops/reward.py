"""`llmjax reward`: train a reward model of completions on preference pairs, or of steps on step labels."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np

from llmjax.data import stream
from llmjax.evaluate import margins
from llmjax.loops import preference, pretrain
from llmjax.parallel import distributed
from llmjax.post import objective
from llmjax.run import loop, start

MARGINS = 'reward.json'  # File in the run's folder with the score margins of held-out pairs or steps, for the report.


def run(spec, options):
  """Train as the spec says in options.workdir; returns the exit status."""
  scores = 'steps' if spec.is_stepwise else 'completions'
  spec = dataclasses.replace(spec, model=dataclasses.replace(spec.model, value_head=True),
                             reward=dataclasses.replace(spec.reward, scores=scores))
  return start.run(spec, options, make_job)


def make_job(spec, mesh, batches, workdir):
  """Return the Job of the Bradley-Terry loss of pairs, or of the cross-entropy of step labels."""
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
  """Return the function (params, frozen) -> metrics of a split, which also writes MARGINS."""
  replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  count = lambda batch: jnp.sum(jnp.any(batch['segment_ids'] > 0, axis=1))  # Without padding sequences.
  step = jax.jit(lambda params, batch: (*scorer(params, batch, None), count(batch)), out_shardings=replicated)
  unit = 'steps' if spec.is_stepwise else 'pairs'
  description = stream.describe_evaluation(spec.data, split, spec.evaluate.limit)

  def evaluate(params, frozen):
    parts, counts = [], []

    def eval_step(params, frozen, batch):
      sums, each, sequences = step(params, batch)
      counts.append(int(sequences))
      parts.append({name: np.asarray(a).ravel() for name, a in each.items()})
      return sums

    batches = start.read_split(spec, mesh, split, limit=spec.evaluate.limit)
    values = margins.evaluate(eval_step, params, frozen, batches, unit)
    each = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    real = each['weight'] > 0
    each = {name: a[real] for name, a in each.items()}
    summary = margins.describe_margins(each['margin'], unit=unit)
    values |= {'calibration_error': summary['error'], 'mean_score': float(each['score'].mean())}
    if spec.is_stepwise:
      summary |= margins.describe_steps(each['margin'], each['good'], each['place'])
      values |= {'base_accuracy': summary['base'], 'sequences': sum(counts)}
    if distributed.is_first():
      file = workdir / MARGINS
      before = json.loads(file.read_text()) if file.exists() else {}
      file.write_text(json.dumps({**before, split: summary}, indent=1) + '\n')
    return {**values, **description}

  return evaluate
