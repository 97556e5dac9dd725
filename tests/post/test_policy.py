"""Policy losses, advantages and KL against golden arrays, and what must hold of them without."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.post import advantages, kl, policy
from llmjax.post.spec import POLICY_LOSSES, PolicySpec
from tests.helpers import close


def named(name, **fields):
  return PolicySpec(**{'name': name, **POLICY_LOSSES[name], **fields})


# Golden name -> the loss.
GOLDEN = {
    'grpo': named('grpo'), 'grpo_kl0.04': named('grpo', kl_coef=0.04), 'bnpo': named('bnpo'),
    'dr_grpo': named('dr_grpo'), 'dapo_cliphigher': named('dapo'),
    'gspo': named('gspo', clip_low=0.03, clip_high=0.04), 'cispo': named('cispo'),
    'two_sided_delta1.5': named('grpo', dual_clip=1.5), 'sapo': named('sapo'), 'vespo': named('vespo'),
    'grpo_onpolicy': named('grpo'), 'grpo_ent0.01': named('grpo', entropy_coef=0.01),
}


@pytest.mark.parametrize('name', [*GOLDEN, 'rloo'])
def test_policy_losses(oracle, name):
  arrays = oracle('trl116.npz')
  batch = {key: arrays[f'grpo/{key}'] for key in ('old', 'ref', 'adv', 'mask', 'entropy')}
  spec = GOLDEN.get(name) or named('rloo')

  def mean(logprobs, spec=spec):
    old = jax.lax.stop_gradient(logprobs) if name == 'grpo_onpolicy' else batch['old']
    loss, weight, aux = policy.policy_loss(
        spec, logprobs, old, batch['adv'], batch['mask'], ref_logprobs=batch['ref'],
        entropies=batch['entropy'], max_length=batch['mask'].shape[1])
    return loss / weight, {key: value / weight for key, value in aux.items()}

  step = jax.jit(jax.value_and_grad(mean, has_aux=True))
  (loss, aux), grad = step(arrays['grpo/new'])
  key = 'rloo' if name == 'rloo' else f'grpo/{name}'
  close(grad, arrays[f'{key}/grad'])
  if spec.entropy_coef:
    # There the entropy is a mean over tokens beside a mean over sequences.  Ours is weighed as the loss is.
    tokens = mean(arrays['grpo/new'], dataclasses.replace(spec, loss_aggregation='token'))[1]['entropy']
    loss = loss + spec.entropy_coef * (aux['entropy'] - tokens)
  close(loss, arrays[f'{key}/loss'])


def test_kl_estimators_and_shaped_rewards(oracle):
  arrays = oracle('trl0114_ppo.npz')
  logprobs, reference, mask = (arrays[key] for key in ('logp', 'ref', 'mask'))
  everything = kl.full(arrays['full_logp'], arrays['full_ref'])
  close(everything, arrays['klpen/full'])
  for theirs, ours in {'kl': 'k1', 'abs': 'abs', 'mse': 'k2', 'full': everything}.items():
    rewards, penalty = advantages.shape_rewards(arrays['scores'], logprobs, reference, mask, 0.2, ours)
    close(penalty * mask, arrays[f'klpen/{theirs}'] * mask)
    close(rewards, arrays[f'rewards/{theirs}'] * mask)


def test_adaptive_coefficient(oracle):
  arrays = oracle('trl0114_ppo.npz')
  coefficient = 0.2
  for measured, expected in zip(arrays['adaptive_kl/in'], arrays['adaptive_kl/out'], strict=True):
    coefficient = kl.adapt(coefficient, measured, target=6.0, horizon=10_000, samples=256)
    close(coefficient, expected)


def test_whitening(oracle):
  arrays = oracle('trl0114_ppo.npz')
  for key, shift in (('whiten', True), ('whiten_noshift', False)):
    close(advantages.whiten(arrays['values'], arrays['mask'], shift), arrays[key] * arrays['mask'])


@pytest.mark.parametrize('discount, decay', [(1.0, 0.95), (0.99, 0.9)])
def test_generalised_advantages(oracle, discount, decay):
  arrays = oracle('trl0114_ppo.npz')
  mask = arrays['mask']
  key = f'g{discount}_l{decay}'
  found, returns = advantages.gae(arrays['rewards/kl'], arrays['values'], mask, discount, decay)
  close(returns, arrays[f'gae/w0_{key}/ret'] * mask)
  close(advantages.whiten(found, mask), arrays[f'gae/w0_{key}/adv'] * mask)

  # With whitened rewards the goldens have rewards in the padding, too: the mean that whitening adds again.
  # Ours have none; with the same ones put there, the results are the same.
  rewards = advantages.whiten(arrays['rewards/kl'] * mask, mask, shift_mean=False)
  flat, count = arrays['rewards/kl'][mask > 0], mask.sum()
  leak = flat.mean() * (1 - (flat.var() * count / (count - 1) + 1e-8) ** -0.5)
  assert 1e-7 < leak < 1e-4
  everywhere = np.ones_like(mask)
  found, returns = advantages.gae(rewards + leak * (1 - mask), arrays['values'] * mask, everywhere, discount, decay)
  close(returns * mask, arrays[f'gae/w1_{key}/ret'] * mask)
  close(advantages.whiten(found, mask), arrays[f'gae/w1_{key}/adv'] * mask)


def test_ppo_loss(oracle):
  arrays = oracle('trl0114_ppo.npz')
  mask, key = arrays['mask'], 'gae/w0_g1.0_l0.95'

  def policy_mean(logprobs):
    loss, weight, aux = policy.policy_loss(PolicySpec(), logprobs, arrays['logp'], arrays[f'{key}/adv'], mask)
    return loss / weight, {k: v / weight for k, v in aux.items()}

  def value_mean(values):
    loss, weight, aux = policy.value_loss(values, arrays['values'], arrays[f'{key}/ret'], mask)
    return 0.1 * loss / weight, {k: v / weight for k, v in aux.items()}

  (loss, aux), grad = jax.jit(jax.value_and_grad(policy_mean, has_aux=True))(arrays['new_logp'])
  close(loss, arrays['loss/pg'])
  close(grad, arrays['loss/dlogp'])
  close(aux['clip_fraction'], arrays['stat/policy/clipfrac'])
  close(aux['approximate_kl'], arrays['stat/policy/approxkl'])
  (loss, aux), grad = jax.jit(jax.value_and_grad(value_mean, has_aux=True))(arrays['vpred'])
  close(loss, arrays['loss/vf'])
  close(grad, arrays['loss/dv'])
  close(aux['value_clip_fraction'], arrays['stat/val/clipfrac'])


def test_overlong_penalty(oracle):
  lengths = [50, 80, 85, 90, 100, 101]
  close(advantages.overlong_penalty(lengths, 100, 20), oracle('trl116.npz')['reward/overlong'])
  close(advantages.overlong_penalty(lengths, 100, 20), [0, 0, -0.25, -0.5, -1, -1])


# Without golden arrays.


def draw(rows=6, length=7, seed=0):
  """Returns the arguments of a policy loss; rows of 1 to `length` tokens."""
  source = np.random.default_rng(seed)
  mask = (np.arange(length) < source.integers(1, length + 1, (rows, 1))).astype(np.float32)
  logprobs, old, reference = -source.uniform(0.1, 3, (3, rows, length)).astype(np.float32)
  return {'logprobs': logprobs, 'old_logprobs': logprobs + 0.3 * (old + 1.5), 'ref_logprobs': reference,
          'advantages': source.normal(size=rows).astype(np.float32), 'mask': mask,
          'entropies': -reference}


@pytest.mark.parametrize('name', POLICY_LOSSES)
def test_padding_and_accumulation_change_nothing(name):
  spec, rows = named(name, kl_coef=0.1, entropy_coef=0.01), draw()
  total = jax.jit(lambda rows: policy.policy_loss(spec, **rows, max_length=16))
  grad = jax.jit(jax.grad(lambda logprobs, rows: total({**rows, 'logprobs': logprobs})[0]))
  whole, d_whole = total(rows), grad(rows['logprobs'], rows)

  def pad(name, a, left, right):
    fill = 0 if name == 'mask' else -7.0
    widths = [(0, 2)] + [(left, right)] * (a.ndim - 1)
    return np.pad(a, widths, constant_values=fill)

  for left, right in ((0, 3), (2, 1)):
    padded = {name: pad(name, a, left, right) for name, a in rows.items()}
    jax.tree.map(close, total(padded), whole)
    d_padded = np.array(grad(padded['logprobs'], padded))
    close(d_padded[:6, left:left + 7], d_whole)
    d_padded[:6, left:left + 7] = 0
    np.testing.assert_array_equal(d_padded, 0)
  parts = [total({name: a[s] for name, a in rows.items()}) for s in (slice(0, 2), slice(2, 6))]
  jax.tree.map(close, jax.tree.map(jnp.add, *parts), whole)


@pytest.mark.parametrize('name', POLICY_LOSSES)
def test_the_first_epoch_is_on_policy(name):
  spec, rows = named(name), draw()
  rows['old_logprobs'] = rows['logprobs']
  loss, weight, aux = policy.policy_loss(spec, **rows, max_length=7)
  assert aux['clip_fraction'] == 0 and aux['approximate_kl'] == 0
  close(aux['ratio'] / weight, 1.0)
  grad = jax.grad(lambda p: policy.policy_loss(spec, **{**rows, 'logprobs': p}, max_length=7)[0])
  per_token = rows['mask'] * -rows['advantages'][:, None]
  if spec.loss_aggregation != 'token' and spec.loss_aggregation != 'constant':
    per_token /= rows['mask'].sum(1, keepdims=True)
  if spec.loss_aggregation == 'constant':
    per_token /= 7
  if spec.importance_sampling == 'trajectory':  # Of the product: every token has the row's whole gradient.
    per_token *= rows['mask'].sum(1, keepdims=True)
  close(grad(rows['logprobs']), per_token)


@pytest.mark.parametrize('name', POLICY_LOSSES)
@pytest.mark.parametrize('normalization', ['group', 'batch', 'none'])
def test_equal_rewards_give_no_gradient(name, normalization):
  rows = draw()
  for reward in (0.0, 0.1, -7.3):
    for estimator in ('group_mean', 'leave_one_out'):
      found = advantages.group_advantages(jnp.full(6, reward), 3, estimator, normalization)
      np.testing.assert_array_equal(found, 0)
  rows['advantages'] = found
  grad = jax.grad(lambda p: policy.policy_loss(named(name), **{**rows, 'logprobs': p}, max_length=7)[0])
  np.testing.assert_array_equal(grad(rows['logprobs']), 0)


def test_group_advantages_by_hand():
  rewards = jnp.asarray([1.0, 0.0, 3.0, 2.0])  # Groups of two.
  root = np.sqrt(0.5)
  close(advantages.group_advantages(rewards, 2), np.array([0.5, -0.5, 0.5, -0.5]) / (root + 1e-4))
  close(advantages.group_advantages(rewards, 2, normalization='none'), [0.5, -0.5, 0.5, -0.5])
  close(advantages.group_advantages(rewards, 2, 'leave_one_out', 'none'), [1.0, -1.0, 1.0, -1.0])
  std = np.std([1, 0, 3, 2], ddof=1)
  close(advantages.group_advantages(rewards, 2, normalization='batch'), np.array([0.5, -0.5, 0.5, -0.5]) / (std + 1e-4))


def test_advantages_do_not_see_padding():
  rows = draw(4, 6, seed=1)
  rewards, values = rows['logprobs'], rows['old_logprobs']
  short, returns = advantages.gae(rewards, values, rows['mask'], 0.9, 0.8)
  wide = [np.pad(a, ((0, 0), (3, 2)), constant_values=np.nan) for a in (rewards, values)]
  mask = np.pad(rows['mask'], ((0, 0), (3, 2)))
  found, found_returns = advantages.gae(*wide, mask, 0.9, 0.8)
  close(found[:, 3:-2], short)
  close(found_returns[:, 3:-2], returns * rows['mask'])
  close(advantages.whiten(jnp.where(mask > 0, wide[0], 9.0), mask)[:, 3:-2],
        advantages.whiten(rewards, rows['mask']))


def test_a_gap_in_the_answer_is_passed_over():
  """Tokens that the policy did not choose, in between, change nothing for those before them."""
  rewards, values = np.array([[0.0, 9.0, 1.0]]), np.array([[0.5, 9.0, 0.2]])
  found, _ = advantages.gae(rewards, values, np.array([[1, 0, 1]]), 0.9, 0.8)
  whole, _ = advantages.gae(rewards[:, [0, 2]], values[:, [0, 2]], np.ones((1, 2)), 0.9, 0.8)
  close(found[:, [0, 2]], whole)
  assert found[0, 1] == 0


def test_k3_is_a_kl():
  source = np.random.default_rng(0)
  p, q = jax.nn.log_softmax(source.normal(size=(2, 50)))
  exact = kl.full(p, q)
  for name in ('k1', 'k3'):
    close(jnp.sum(jnp.exp(p) * kl.ESTIMATORS[name](p, q)), exact)
  assert (kl.k3(p, q) >= 0).all() and kl.k3(p, p).max() == 0
