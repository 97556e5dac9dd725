"""Objectives of a model: log-probabilities on meshes, and losses that see neither padding nor accumulation."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llmjax.generate.decode import Generator
from llmjax.model.model import Model
from llmjax.model.spec import ModelSpec
from llmjax.parallel.mesh import make_mesh, place_batch
from llmjax.parallel.sharding import tree_shardings
from llmjax.parallel.spec import MeshSpec
from llmjax.post import objective, rollout
from llmjax.post.spec import POLICY_LOSSES, UNPAIRED_LOSSES, PolicySpec, PreferenceSpec, RlSpec
from llmjax.train.objectives import make_model
from llmjax.train.spec import TrainSpec
from llmjax.train.state import TrainState
from llmjax.train.step import make_train_step

SPEC = ModelSpec(num_layers=2, d_model=16, num_heads=2, mlp_dim=32, vocab_size=32, value_head=True, tie_embeddings=True)
TRAIN = TrainSpec(compute_dtype='float32')
WORDS, LENGTH = 29, 16


def noisy(model):
  """Returns parameters no longer those of a start: values and probabilities differ from token to token."""
  tree = Model(model).init(jax.random.key(0))
  noise = iter(jax.random.split(jax.random.key(1), 100))
  return jax.tree.map(lambda p: p + 0.1 * jax.random.normal(next(noise), p.shape), tree)


@pytest.fixture(scope='module')
def params():
  return noisy(SPEC)


def draw_rows(count=8, seed=0, length=LENGTH):
  draw = np.random.default_rng(seed)
  prompts = [draw.integers(1, WORDS, draw.integers(1, 6)) for _ in range(count)]
  answers = [draw.integers(1, WORDS, draw.integers(1, 9)) for _ in range(count)]
  return prompts, answers, rollout.make_batch(prompts, answers, length)


def policy_batch(params, seed=0):
  _, _, batch = draw_rows(seed=seed)
  draw = np.random.default_rng(seed + 1)
  mask = batch['loss_mask']
  for name in ('old_logprobs', 'ref_logprobs', 'advantages', 'returns', 'old_values'):
    batch[name] = (draw.normal(size=mask.shape) * mask).astype(np.float32)
  batch['old_logprobs'] -= 3.0 * mask
  return batch


def test_rows_are_prompts_and_answers():
  prompts, answers, batch = draw_rows()
  for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
    np.testing.assert_array_equal(batch['targets'][i][batch['loss_mask'][i] > 0], answer)
    size = len(prompt) + len(answer) - 1
    np.testing.assert_array_equal(batch['tokens'][i, :size], [*prompt, *answer][:-1])
    assert (batch['segment_ids'][i, :size] == 1).all() and not batch['segment_ids'][i, size:].any()
  values = [np.arange(1, len(a) + 1) for a in answers]
  spread = rollout.align_to_targets(values, prompts, LENGTH)
  np.testing.assert_array_equal(spread[batch['loss_mask'] > 0], np.concatenate(values))


@pytest.mark.parametrize('temperature', [1.0, 0.7])
def test_sampler_and_trainer_agree(params, temperature):
  """Prompts of all lengths side by side, padded on the left there and on the right here."""
  prompts = draw_rows()[0]
  rl = RlSpec(num_generations=2, max_new_tokens=8, temperature=temperature)
  generator = Generator(SPEC, params, vocab_size=WORDS)
  answers, logprobs = rollout.sample(generator, prompts, 2, rl, jax.random.key(3), stop_ids=(2, 3, 4, 5))
  repeated = [p for p in prompts for _ in range(2)]
  batch = rollout.make_batch(repeated, answers, LENGTH)
  assert len({len(a) for a in answers}) > 2 and max(a.max() for a in answers) < WORDS
  mesh = make_mesh(MeshSpec(data=1), jax.devices()[:1])
  scorer = rollout.TokenScorer(make_model(SPEC, TRAIN, 'cpu'), mesh, rows=8, temperature=temperature, vocab_size=WORDS)
  found = scorer(params, batch, True)
  sampled = rollout.align_to_targets(logprobs, repeated, LENGTH)
  assert max(rollout.logprob_gap(sampled, found['logprobs'], batch['loss_mask'])) < 1e-5
  mean, largest = rollout.logprob_gap(sampled, found['logprobs'] + 0.01, batch['loss_mask'])
  assert largest > mean > 1e-3
  assert found['values'].std() > 0


@pytest.mark.slow
def test_what_top_p_takes_away_is_seen(params):
  prompts = draw_rows()[0]
  rl = RlSpec(num_generations=1, max_new_tokens=8, top_p=0.5)
  answers, logprobs = rollout.sample(Generator(SPEC, params, vocab_size=WORDS), prompts, 1, rl, jax.random.key(3), ())
  mesh = make_mesh(MeshSpec(data=1), jax.devices()[:1])
  scorer = rollout.TokenScorer(make_model(SPEC, TRAIN, 'cpu'), mesh, rows=8, vocab_size=WORDS)
  batch = rollout.make_batch(prompts, answers, LENGTH)
  sampled = rollout.align_to_targets(logprobs, prompts, LENGTH)
  gaps = (sampled - scorer(params, batch)['logprobs'])[batch['loss_mask'] > 0]
  assert (gaps > -1e-5).all() and (gaps < -np.log(0.5) + 1e-5).all() and gaps.mean() > 0.1


@pytest.mark.slow
@pytest.mark.skipif(jax.device_count() < 8, reason='needs 8 devices')
@pytest.mark.parametrize('sizes', [pytest.param({'data': 2, 'fsdp': 2, 'tensor': 2}, marks=pytest.mark.slow),
                                   {'data': 2, 'context': 2, 'tensor': 2}])
def test_meshes(params, sizes):
  """Loss, gradient, and the log-probabilities of a scorer, as on one device."""
  batch = policy_batch(params)
  spec = PolicySpec(**POLICY_LOSSES['grpo'], kl_coef=0.1, entropy_coef=0.01)

  def make(mesh):
    loss_fn = objective.make_policy_loss(spec, make_model(SPEC, TRAIN, 'cpu'), value_coef=0.5, vocab_size=WORDS,
                                         temperature=0.8)
    scorer = rollout.TokenScorer(make_model(SPEC, TRAIN, 'cpu'), mesh, rows=8, vocab_size=WORDS)
    own = jax.device_put(params, tree_shardings(mesh, Model(SPEC).param_names()))
    with jax.set_mesh(mesh):
      found = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(own, {}, place_batch(mesh, batch), None)
    return jax.device_get((found, scorer(own, batch, True)))

  expected = make(make_mesh(MeshSpec(data=1), jax.devices()[:1]))
  found = make(make_mesh(MeshSpec(**{'data': 1, **sizes}), jax.devices()))
  mask = batch['segment_ids'] != 0
  expected[1].update({k: v * mask for k, v in expected[1].items()})
  found[1].update({k: v * mask for k, v in found[1].items()})

  def assert_near(a, b):
    np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * max(np.abs(b).max(), 1.0))  # Relative to the array's largest.

  jax.tree.map(assert_near, found, expected)


def pair_batch(count=4):
  draw = np.random.default_rng(5)
  prompts = [draw.integers(1, WORDS, 3) for _ in range(count) for _ in range(2)]
  answers = [draw.integers(1, WORDS, draw.integers(1, 9)) for _ in range(2 * count)]
  batch = rollout.make_batch(prompts, answers, LENGTH)
  batch['ref_logprobs'] = draw.normal(-20, 1, 2 * count).astype(np.float32)
  batch['label'] = np.array([1, 0] * count, np.float32)
  return batch


def step_batch():
  """Rows of two documents, some of whose targets are judged with labels 0, 1 and in between."""
  draw = np.random.default_rng(6)
  sizes = draw.integers(3, 1 + LENGTH // 2, (8, 2))
  place = np.arange(LENGTH)
  first, ends = sizes[:, :1], sizes.sum(1, keepdims=True)
  segments = np.where(place < first, 1, np.where(place < ends, 2, 0)).astype(np.int32)
  real = segments > 0
  batch = {name: (draw.integers(1, WORDS, real.shape) * real).astype(np.int32) for name in ('tokens', 'targets')}
  marks = (draw.random(real.shape) < 0.4) & real
  labels = draw.choice([0.0, 0.3, 1.0], real.shape)
  return {**batch, 'segment_ids': segments, 'positions': (np.where(segments == 2, place - first, place) * real).astype(
      np.int32), 'loss_mask': marks.astype(np.float32), 'step_labels': np.where(marks, labels, 0).astype(np.float32)}


def wider(batch, left, right, rows=0):
  """Returns the batch with tokens of padding on both sides of its rows, and rows of padding."""
  def pad(name, a):
    widths = [(0, rows)] + ([(left, right)] if a.ndim > 1 else [])
    return np.pad(a, widths, constant_values=7 if name in ('tokens', 'targets') else 0)
  return {name: pad(name, a) for name, a in batch.items()}


def test_steps_are_judged_alike_however_they_lie_in_rows(params):
  judge, packed = jax.jit(objective.make_step_scorer(make_model(SPEC, TRAIN, 'cpu'))), step_batch()
  alone = {name: np.zeros((2 * len(a), LENGTH), a.dtype) for name, a in packed.items()}
  for row in range(2 * len(packed['tokens'])):
    (there,) = np.nonzero(packed['segment_ids'][row // 2] == row % 2 + 1)
    for name, a in packed.items():
      alone[name][row, 3:3 + len(there)] = 1 if name == 'segment_ids' else a[row // 2][there]
  (loss, (weight, aux)), each = judge(params, packed, None)
  (other, (count, found)), single = judge(params, alone, None)
  assert weight == count == (packed['loss_mask'] > 0).sum() > 20
  np.testing.assert_allclose([loss, aux['accuracy']], [other, found['accuracy']], rtol=1e-5)
  (marks,), (others,) = (np.nonzero(np.ravel(e['weight'])) for e in (each, single))
  for name, values in each.items():
    np.testing.assert_allclose(np.ravel(values)[marks], np.ravel(single[name])[others], rtol=1e-5, atol=1e-6)
  values = np.ravel(each['score'])[marks].astype(np.float64)
  labels = packed['step_labels'].ravel()[marks].astype(np.float64)
  by_hand = np.logaddexp(0, -values) * labels + np.logaddexp(0, values) * (1 - labels)
  np.testing.assert_allclose(loss, by_hand.sum(), rtol=1e-5)
  assert aux['accuracy'] == ((values > 0) == (labels > 0.5)).sum() == (np.ravel(each['margin'])[marks] > 0).sum()
  for row, places in enumerate(np.asarray(single['place'])):
    judged = places[alone['loss_mask'][row] > 0]
    np.testing.assert_array_equal(judged, 1 + np.arange(len(judged)))


@pytest.mark.slow
@pytest.mark.skipif(jax.device_count() < 8, reason='needs 8 devices')
def test_steps_on_a_mesh(params):
  batch = step_batch()

  def judged(mesh):
    own = jax.device_put(params, tree_shardings(mesh, Model(SPEC).param_names()))
    with jax.set_mesh(mesh):
      judge = jax.jit(objective.make_step_scorer(make_model(SPEC, TRAIN, 'cpu')))
      return jax.device_get(judge(own, place_batch(mesh, batch), None))

  expected = judged(make_mesh(MeshSpec(data=1), jax.devices()[:1]))
  found = judged(make_mesh(MeshSpec(data=2, context=2, tensor=2), jax.devices()))
  real = expected[1]['weight'] > 0
  for each in (expected[1], found[1]):
    each.update({name: a[real] for name, a in each.items()})
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), found, expected)


LOSSES = {
    'pairs': lambda model: objective.make_pair_loss(
        PreferenceSpec(sft_weight=0.1, ld_alpha=0.5), make_model(model, TRAIN, 'cpu'), vocab_size=WORDS),
    'unpaired': lambda model: objective.make_unpaired_loss(
        PreferenceSpec(loss='apo_zero_unpaired'), make_model(model, TRAIN, 'cpu'), vocab_size=WORDS),
    'steps': lambda model: objective.loss_of(objective.make_step_scorer(make_model(model, TRAIN, 'cpu'))),
    'reward': lambda model: objective.loss_of(objective.make_pair_scorer(
        make_model(model, TRAIN, 'cpu'), center_rewards_coef=0.01)),
    'ppo': lambda model: objective.make_policy_loss(
        PolicySpec(**POLICY_LOSSES['ppo'], entropy_coef=0.01), make_model(model, TRAIN, 'cpu'),
        value_coef=0.5, vocab_size=WORDS),
    'grpo': lambda model: objective.make_policy_loss(
        PolicySpec(**POLICY_LOSSES['grpo'], kl_coef=0.1), make_model(model, TRAIN, 'cpu'),
        value_coef=0.5, vocab_size=WORDS),
}
MIXTURE = dataclasses.replace(SPEC, num_experts=4, mlp_dim=8, balance_loss=0.5, router_z_loss=0.1)


def batch_of(name, params):
  batch = (pair_batch() if name in ('pairs', 'unpaired', 'reward') else step_batch() if name == 'steps'
           else policy_batch(params))
  return {key: a for key, a in batch.items() if (name, key) != ('reward', 'ref_logprobs')}


def sgd_step(loss_fn, params, batch, gradient_accumulation_steps=1, together=1):
  """Returns (state, metrics) after a step of gradient descent at rate 1."""
  tx = optax.sgd(1.0)
  state = TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=tx.init(params),
                     key=jax.random.key_data(jax.random.key(0)))
  return jax.jit(make_train_step(loss_fn, tx, lambda step: 1.0, gradient_accumulation_steps,
                                 together=together))(state, batch)


@pytest.mark.slow
@pytest.mark.parametrize('name, model', [*((name, SPEC) for name in LOSSES), *((name, MIXTURE) for name in LOSSES)],
                         ids=[*LOSSES, *(f'{name}-mixture' for name in LOSSES)])
def test_padding_and_accumulation(params, name, model):
  params = params if model == SPEC else noisy(model)
  loss_fn, batch = LOSSES[name](model), batch_of(name, params)
  step = functools.partial(sgd_step, loss_fn, params, together=2 if name in ('pairs', 'unpaired', 'reward') else 1)
  state, metrics = step(batch)
  moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), state.params, params)
  assert max(jax.tree.leaves(moved)) > 1e-3
  if name in ('reward', 'ppo', 'grpo', 'steps'):
    assert moved['value']['kernel'] > 1e-4
  for other in (step(batch, 4), step(wider(batch, 0, 8)), step(wider(batch, 5, 3, rows=2))):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6), other[0].params, state.params)
    for key in metrics:
      np.testing.assert_allclose(other[1][key], metrics[key], rtol=1e-4, atol=1e-6, err_msg=key)


@pytest.mark.parametrize('name', [pytest.param(name, marks=[] if name in ('pairs', 'reward') else pytest.mark.slow)
                                  for name in LOSSES])
def test_the_routers_losses_are_means_over_all_tokens(name):
  """Also in two parts of a batch, whose numbers of tokens and of pairs, answers, or sampled tokens differ."""
  params = noisy(MIXTURE)
  batch = batch_of(name, params)
  shown = objective.with_last_target(batch) if name == 'reward' else batch
  model = make_model(MIXTURE, TRAIN, 'cpu')
  aux = jax.jit(lambda params, batch: model.apply(params, batch)[2])(params, shown)
  tokens = (shown['segment_ids'] != 0).sum()
  together = 2 if name in ('pairs', 'unpaired', 'reward') else 1
  _, metrics = sgd_step(LOSSES[name](MIXTURE), params, batch, 2, together)
  for key in ('load_balance', 'router_z', 'penalty'):
    np.testing.assert_allclose(metrics[key], aux[key] / tokens, rtol=1e-5, err_msg=key)


def test_a_reward_model_reads_the_last_token(params):
  """Of a pair's row the last target, too; and the same number as for the whole answer at once."""
  prompts, answers, batch = draw_rows()
  whole = jax.tree.map(jnp.asarray, objective.with_last_target({k: jnp.asarray(v) for k, v in batch.items()}))
  scores, _ = objective.score_sequences(make_model(SPEC, TRAIN, 'cpu'), params, whole)
  mesh = make_mesh(MeshSpec(data=1), jax.devices()[:1])
  rows = [np.concatenate(pair) for pair in zip(prompts, answers, strict=True)]
  for size, length in ((8, 14), (3, 31)):  # The batch and the padding change nothing.
    scorer = rollout.RewardModelScorer(make_model(SPEC, TRAIN, 'cpu'), mesh, rows=size, length=length)
    np.testing.assert_allclose(scorer(params, rows), scores, rtol=1e-5, atol=1e-5)
    places = [range(len(row)) for row in rows]  # As if every token ended a step.
    each = np.array([scorer(params, [row[:i + 1] for i in range(len(row))]) for row in rows[:1]])
    for reduction, expected in (('min', np.min), ('product', np.prod)):
      of_steps = rollout.RewardModelScorer(make_model(SPEC, TRAIN, 'cpu'), mesh, rows=size, length=length,
                                           reduction=reduction)
      np.testing.assert_allclose(of_steps(params, rows, places)[0], expected(1 / (1 + np.exp(-each[0]))), rtol=1e-5)
  other = scorer(params, [np.append(r[:-1], (r[-1] + 1) % WORDS) for r in rows])
  assert np.abs(other - scores).min() > 1e-4


def test_dpo_of_a_fresh_reference_is_log_2(params):
  batch = pair_batch()
  spec = PreferenceSpec()
  sums = objective.make_sequence_logprobs(spec, make_model(SPEC, TRAIN, 'cpu'), vocab_size=WORDS)
  batch['ref_logprobs'] = jax.jit(sums)(params, batch)
  loss_fn = objective.make_pair_loss(spec, make_model(SPEC, TRAIN, 'cpu'), vocab_size=WORDS)
  loss, (weight, aux) = jax.jit(loss_fn)(params, {}, batch, None)
  np.testing.assert_allclose(loss / weight, np.log(2), rtol=1e-6)
  assert weight == 4 and aux['margin'] == 0


def test_the_first_step_of_an_iteration_is_on_policy(params):
  """What the scorer says is what the loss sees: no ratio but 1, nothing clipped."""
  batch = policy_batch(params)
  mesh = make_mesh(MeshSpec(data=1), jax.devices()[:1])
  scorer = rollout.TokenScorer(make_model(SPEC, TRAIN, 'cpu'), mesh, rows=4, vocab_size=WORDS, temperature=0.9)
  batch['old_logprobs'] = scorer(params, batch)['logprobs']
  spec = PolicySpec(clip_low=1e-4)
  loss_fn = objective.make_policy_loss(spec, make_model(SPEC, TRAIN, 'cpu'), vocab_size=WORDS, temperature=0.9)
  _, (weight, aux) = jax.jit(loss_fn)(params, {}, batch, None)
  assert aux['clip_fraction'] == 0
  np.testing.assert_allclose(aux['ratio'] / weight, 1.0, rtol=1e-5)


@pytest.mark.parametrize('loss', ['sigmoid', 'ipo', 'orpo', 'kto', 'apo_zero_unpaired'])
def test_every_loss_logs_the_same_log_probabilities(params, loss):
  """Means over pairs of the sums over whole completions, whatever the loss weighs, divides or counts."""
  batch = {k: jnp.asarray(v) for k, v in wider(pair_batch(), 0, 0, rows=2).items()}  # With a pair of padding.
  batch['loss_mask'] *= 0.5
  batch[objective.MISMATCHED] = batch['ref_logprobs']
  make = objective.make_unpaired_loss if loss in UNPAIRED_LOSSES else objective.make_pair_loss
  spec = PreferenceSpec(loss=loss, ld_alpha=1.0 if loss in UNPAIRED_LOSSES else 0.5)
  _, (weight, aux) = jax.jit(make(spec, make_model(SPEC, TRAIN, 'cpu'), vocab_size=WORDS))(params, {}, batch, None)
  logprobs = target_logprobs(params, batch)
  sums = np.where(np.asarray(batch['loss_mask']) > 0, logprobs, 0).sum(1)
  for name, half in (('chosen', sums[:8:2]), ('rejected', sums[1:8:2])):
    np.testing.assert_allclose(aux[f'{name}_logprob'] / weight, half.mean(), rtol=1e-5)
  if loss in UNPAIRED_LOSSES:  # A good completion without a bad one beside it.
    batch['loss_mask'] = batch['loss_mask'].at[1].set(0.0)
    _, (weight, aux) = jax.jit(make(spec, make_model(SPEC, TRAIN, 'cpu'), vocab_size=WORDS))(params, {}, batch, None)
    for name, half in (('chosen', sums[:8:2]), ('rejected', sums[3:8:2])):
      np.testing.assert_allclose(aux[f'{name}_logprob'] / weight, half.mean(), rtol=1e-5)


def target_logprobs(params, batch):
  """Returns log p(target) of each place, [B, T]."""
  return np.asarray(objective.score_tokens(make_model(SPEC, TRAIN, 'cpu'), params, batch, vocab_size=WORDS).logprobs)


def test_mismatched_completions_are_of_other_prompts():
  batch = {k: jnp.asarray(v) for k, v in pair_batch(3).items()}
  completions = lambda b: [b['targets'][i][b['loss_mask'][i] > 0].tolist() for i in range(len(b['targets']))]
  assert completions(objective.mismatch_completions(batch)) == (lambda own: own[2:] + own[:2])(completions(batch))
  # A pair of padding neither gives a completion nor gets one.
  padded = {k: jnp.concatenate([v[:2], jnp.zeros_like(v[2:])]) for k, v in batch.items()}
  assert completions(objective.mismatch_completions(padded)) == [[]] * 6
  with pytest.raises(ValueError, match='two pairs or more'):
    objective.mismatch_completions({k: v[:2] for k, v in batch.items()})


@pytest.mark.parametrize('loss', UNPAIRED_LOSSES)
def test_a_completion_without_another_half_counts_by_itself(params, loss):
  """The loss of three pairs of which one lacks its bad half is the mean over the five completions."""
  rng = np.random.default_rng(0)
  mask = np.zeros((6, 8), np.float32)
  mask[:, 3:6] = 1
  mask[5] = 0
  batch = {'tokens': rng.integers(1, WORDS, (6, 8)), 'targets': rng.integers(1, WORDS, (6, 8)), 'loss_mask': mask,
           'segment_ids': np.ones((6, 8), np.int32), 'positions': np.tile(np.arange(8, dtype=np.int32), (6, 1)),
           'ref_logprobs': rng.normal(-9, 1, 6).astype(np.float32), 'label': np.array([1, 0] * 3, np.float32),
           objective.MISMATCHED: rng.normal(-9, 1, 6).astype(np.float32)}
  arguments = PreferenceSpec(loss=loss, reference='copy'), make_model(SPEC, TRAIN, 'cpu')
  sums = lambda batch: np.asarray(objective.make_sequence_logprobs(*arguments)(params, batch), np.float64)
  total, (weight, _) = objective.make_unpaired_loss(*arguments)(params, {}, batch, None)
  ratio = sums(batch) - batch['ref_logprobs']
  other = objective.mismatch_completions(batch)
  whole = np.asarray(other['loss_mask']).any(1)
  assert whole.tolist() == [True, True, True, False, True, False]  # Row 3 would get the completion that row 5 lacks.
  kl = max(0.0, np.mean((sums(other) - batch[objective.MISMATCHED])[whole])) if loss == 'kto' else 0.0
  sign = np.array([1, -1, 1, -1, 1])
  expected = np.sum(1 / (1 + np.exp(arguments[0].beta * sign * (ratio[:5] - kl))))
  assert float(weight) == 5
  np.testing.assert_allclose(float(total), expected, rtol=1e-5)
