"""`llmjax rl`: reinforcement learning from rewards of the model's own completions (PPO, GRPO and variants)."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np

from llmjax import config
from llmjax.checkpoint.load import load_params, read_config
from llmjax.config import ConfigError
from llmjax.data import stream
from llmjax.generate.decode import Generator
from llmjax.model.model import Model
from llmjax.model.spec import ModelSpec
from llmjax.parallel.sharding import tree_shardings
from llmjax.post import objective, rollout
from llmjax.post.rewards import compute_rewards
from llmjax.post.rollout_stream import RolloutStream
from llmjax.run import loop, start
from llmjax.run.cached_outputs import CachedModel
from llmjax.run.initial import checkpoint_of, initial_checkpoint, load_initial
from llmjax.run.sources import run_folder
from llmjax.run.spec import prompt_data


def run(spec, options):
  """Train as the spec says in options.workdir; returns the exit status."""
  # With dropout or noise, the trained policy would differ from the one that generated the completions.
  model = dataclasses.replace(spec.model, dropout=0.0, value_head=spec.policy.advantage_estimator == 'gae')
  train = dataclasses.replace(spec.train, neftune_alpha=0.0)
  return start.run(dataclasses.replace(spec, model=model, train=train), options, make_job, open_prompts)


def open_prompts(spec, mesh):
  """Return the stream of prompts, the same on every process."""
  return stream.open_stream(prompt_data(spec), batch_size=spec.rl.prompts_per_iteration, seed=spec.train.seed)


def make_job(spec, mesh, prompts, workdir):
  """Return the Job of the spec's policy loss on rollouts."""
  tokenizer = stream.load_tokenizer(spec.data)
  with start.keep_template(spec, workdir) as chat:
    stop_ids = chat.stop_ids
  model = start.make_model(spec, mesh)
  scorer = rollout.TokenScorer(model, mesh, rows=spec.train.batch_size,
                               temperature=spec.rl.temperature, vocab_size=tokenizer.vocab_size)
  score = reward_model(spec, mesh, tokenizer) if 'model' in spec.rl.rewards else None
  reference = None
  if spec.rl.reference:
    cache = CachedModel(workdir / 'reference', 'reference', 'train.init_from', spec.train.init_from,
                lambda: initial_checkpoint(spec.train.init_from))
    reference = load_initial(spec, mesh, cache.checkpoint())
  rollouts = RolloutStream(spec, mesh, prompts, tokenizer, workdir, stop_ids=stop_ids, scorer=scorer,
                         reference=reference, score=score)
  loss_fn = objective.make_policy_loss(
      spec.policy, model, temperature=spec.rl.temperature, vocab_size=tokenizer.vocab_size,
      max_length=spec.rl.max_new_tokens,
      value_coef=spec.policy.value_coef if spec.model.value_head else 0.0, value_clip=spec.policy.value_clip)
  return loop.Job(
      spec=spec, mesh=mesh, batches=rollouts, loss_fn=loss_fn, describe=rollouts.describe, sample=None,
      evaluators={split: functools.partial(evaluate, spec, mesh, tokenizer, stop_ids, score, split)
                  for split in spec.evaluate.splits})


def evaluate(spec, mesh, tokenizer, stop_ids, score, split, params, frozen=None):
  """Return the mean reward, and further metrics, of greedy completions of the prompts of a split.

  evaluate.limit: size of the sample of prompts, 0 for all.
  """
  data = prompt_data(spec)
  batches = stream.eval_batches(data, split, spec.rl.prompts_per_iteration, spec.evaluate.limit)
  prompts = [prompt for batch in batches for prompt in batch]
  if not prompts:
    raise ConfigError([f'data.sources: {", ".join(data.sources)} has no prompts in its {split} split'])
  generator = Generator(spec.model, params, jnp.dtype(spec.train.compute_dtype), mesh,
                        vocab_size=tokenizer.vocab_size)
  generated = generator.generate([np.asarray(p['ids'], np.int32) for p in prompts], spec.rl.max_new_tokens,
                            stop_ids=stop_ids)
  completions = [rollout.decode_completion(tokenizer, p, tokens[:n], stop_ids)
             for p, tokens, n in zip(prompts, generated.tokens, generated.lengths, strict=True)]
  rewards = compute_rewards(spec.rl, completions, score)
  by_name = {f'reward/{name}': float(np.mean(values)) for name, values in rewards.by_name.items()}
  return {'reward': float(rewards.raw.mean()), **by_name,
          'ended': float(np.mean([c.ended for c in completions])), 'prompts': len(completions),
          'tokens': float(generated.lengths.mean()),
          **stream.describe_evaluation(data, split, spec.evaluate.limit, *_reward_settings(spec.rl))}


def _reward_settings(rl):
  """Return the settings on which the reward of a greedy completion depends."""
  return (sorted(rl.rewards.items()), rl.max_new_tokens, rl.pattern, rl.format, rl.length, rl.reward_model,
          rl.step_score, rl.missing_eos_penalty)


def reward_model(spec, mesh, tokenizer):
  """Return the function of Completions to the scores of the reward model in spec.rl.reward_model."""
  path = checkpoint_of('rl.reward_model', spec.rl.reward_model)
  settings = read_config(run_folder(path))
  reward_spec = config.build(ModelSpec, settings['model'])
  try:
    start.check_mesh(dataclasses.replace(spec, model=reward_spec), mesh)
  except ConfigError as e:
    raise ConfigError([f'rl.reward_model={spec.rl.reward_model}: its {p}' for p in e.problems]) from e
  params, model, _, _ = load_params(
      run_folder(path), int(path.name), shardings=lambda model: tree_shardings(mesh, Model(model).param_names()))
  scorer_model = start.make_model(dataclasses.replace(spec, model=model), mesh)
  of_steps = settings['reward'].get('scores') == 'steps'
  scorer = rollout.RewardModelScorer(
      scorer_model, mesh, rows=spec.train.batch_size, length=spec.data.seq_len + 1,
      reduction=spec.rl.step_score if of_steps else '')

  def score(completions):
    step_ends = [rollout.find_step_ends(tokenizer, c) for c in completions] if of_steps else None
    return scorer(params, [c.ids for c in completions], step_ends)

  return score
