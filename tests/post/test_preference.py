"""Preference losses and gradients against golden arrays, and what must hold of them without."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.ops import losses
from llmjax.post import objective, preference, reward_model
from llmjax.post.spec import PAIR_LOSSES, PreferenceSpec
from tests.helpers import close

# Golden name -> the spec's fields.
NEW = {
    **{name: {'loss': name} for name in (
        'sigmoid', 'hinge', 'ipo', 'nca_pair', 'bco_pair', 'sppo_hard', 'aot', 'aot_unpaired', 'apo_zero',
        'apo_down', 'discopop', 'sigmoid_norm')},
    'robust': {'loss': 'robust', 'label_smoothing': 0.1},
    'exo_pair': {'loss': 'exo_pair', 'label_smoothing': 0.001},
    'sigmoid_forward_kl': {'divergence': 'forward_kl'},
    'sigmoid_js_divergence': {'divergence': 'js'},
    'sigmoid_alpha_divergence': {'divergence': 'alpha'},
    'sigmoid_ld0.5': {'ld_alpha': 0.5},
}
# The older version called the forms of aot otherwise.
OLD = {**{f'{name}_0.0': {'loss': name} for name in (
    'sigmoid', 'hinge', 'ipo', 'nca_pair', 'bco_pair', 'sppo_hard', 'apo_zero', 'apo_down', 'discopop')},
       'sigmoid_0.1': {'loss': 'sigmoid', 'label_smoothing': 0.1},
       'robust_0.1': {'loss': 'robust', 'label_smoothing': 0.1},
       'exo_pair_0.001': {'loss': 'exo_pair', 'label_smoothing': 0.001},
       'aot_0.0': {'loss': 'aot'}, 'aot_pair_0.0': {'loss': 'aot_unpaired'}}


def token_logprobs(logits, ids):
  logprobs = jax.nn.log_softmax(jnp.asarray(logits)[:, :-1])
  return jnp.take_along_axis(logprobs, ids[:, 1:, None], -1)[..., 0]


def make_pairs(arrays, logits, spec):
  count = len(logits) // 2
  mask = arrays['dpo/cmask'][:, 1:]
  # Product code has the two completions of a pair next to one another; here all chosen ones come first.
  order = np.arange(2 * count).reshape(2, count).T.ravel()
  positions = np.tile(np.arange(mask.shape[1]), (2 * count, 1))
  weights = objective.completion_weights(spec, {'loss_mask': mask[order], 'positions': positions})[np.argsort(order)]
  policy, length = preference.sum_logprobs(token_logprobs(logits, arrays['dpo/ids']), weights)
  reference, _ = preference.sum_logprobs(token_logprobs(arrays['dpo/ref_logits'], arrays['dpo/ids']), weights)
  halves = [part for a in (policy, reference, length) for part in (a[:count], a[count:])]
  return preference.Pairs(*halves)


@pytest.mark.parametrize('name', NEW)
def test_losses_of_token_logprobs(oracle, name):
  arrays = oracle('trl116.npz')
  spec = PreferenceSpec(**NEW[name])
  assert not list(spec.validate())

  def mean(logits):
    loss, weight, aux = preference.pair_loss(spec, make_pairs(arrays, logits, spec))
    return loss / weight, {key: value / weight for key, value in aux.items()}

  (loss, aux), grad = jax.jit(jax.value_and_grad(mean, has_aux=True))(arrays['dpo/logits'])
  close(loss, arrays[f'dpo/{name}/loss'])
  if name != 'sigmoid_ld0.5':  # Of which there is only the loss.
    close(grad, arrays[f'dpo/{name}/grad'])
  if name == 'sigmoid':
    for ours, theirs in {'chosen_reward': 'rewards/chosen', 'rejected_reward': 'rewards/rejected',
                         'margin': 'rewards/margins', 'accuracy': 'rewards/accuracies',
                         'chosen_logprob': 'logps/chosen', 'rejected_logprob': 'logps/rejected'}.items():
      close(aux[ours], arrays[f'dpo/sigmoid/metric/{theirs}'])


def test_likelihood_of_the_better_answers(oracle):
  arrays = oracle('trl116.npz')
  count = len(arrays['dpo/ids']) // 2

  def mean(logits):
    loss, weight = losses.cross_entropy(logits[:count, :-1], arrays['dpo/ids'][:count, 1:],
                                        arrays['dpo/cmask'][:count, 1:])
    return loss / weight

  loss, grad = jax.jit(jax.value_and_grad(mean))(jnp.asarray(arrays['dpo/logits']))
  close(loss, arrays['dpo/sft/loss'])
  close(grad, arrays['dpo/sft/grad'])


@pytest.mark.parametrize('name', OLD)
def test_losses_of_sequence_logprobs(oracle, name):
  arrays = oracle('trl024.npz')
  spec = PreferenceSpec(**OLD[name])

  def rows(chosen, rejected):
    ones = jnp.ones(len(chosen))
    pairs = preference.Pairs(chosen, rejected, arrays['rc'], arrays['rr'], ones, ones)
    return preference.LOSSES[spec.loss](pairs, spec, *preference.implicit_scores(pairs, spec))

  close(rows(arrays['pc'], arrays['pr']), arrays[f'dpo/{name}/loss'])
  grads = jax.grad(lambda c, r: rows(c, r).mean(), argnums=(0, 1))(arrays['pc'], arrays['pr'])
  for got, key in zip(grads, ('dpc', 'dpr'), strict=True):
    close(got, arrays[f'dpo/{name}/{key}'])


@pytest.mark.parametrize('name, fields', [
    ('kto_1.0', {'loss': 'kto'}), ('kto_1.33', {'loss': 'kto', 'undesirable_weight': 1.33}),
    ('apo_zero_unpaired_1.0', {'loss': 'apo_zero_unpaired'})])
def test_single_answers(oracle, name, fields):
  arrays = oracle('trl116.npz')
  spec, ids, mask = PreferenceSpec(**fields), arrays['dpo/ids'], arrays['dpo/cmask'][:, 1:]
  reference, _ = preference.sum_logprobs(token_logprobs(arrays['dpo/ref_logits'], ids), mask)

  # Every prompt with the answer of the row before it.
  other_ids, other_mask = np.roll(ids, 1, 0), np.roll(mask, 1, 0)
  others = [preference.sum_logprobs(token_logprobs(arrays[f'dpo/{key}'], other_ids), other_mask)[0]
            for key in ('logits', 'ref_logits')]
  kl = preference.mismatched_kl(*others)
  if spec.loss == 'kto':
    close(kl, arrays[f'kto/{name}/kl'])

  def mean(logits):
    logprobs, _ = preference.sum_logprobs(token_logprobs(logits, ids), mask)
    loss, weight, _ = preference.unpaired_loss(spec, logprobs, reference, arrays['kto/label'], kl)
    return loss / weight

  loss, grad = jax.jit(jax.value_and_grad(mean))(arrays['dpo/logits'])
  close(loss, arrays[f'kto/{name}/loss'])
  close(grad, arrays[f'kto/{name}/grad'])


def test_single_answers_of_sequence_logprobs(oracle):
  arrays = oracle('trl024.npz')
  spec = PreferenceSpec(loss='kto', undesirable_weight=1.33)
  kl = preference.mismatched_kl(arrays['kl_p'], arrays['kl_r'])
  close(kl, arrays['kto/kl'])
  logprobs, reference = np.concatenate([arrays['pc'], arrays['pr']]), np.concatenate([arrays['rc'], arrays['rr']])
  one = jax.vmap(lambda p, r, good: preference.unpaired_loss(spec, p[None], r[None], good[None], kl)[0])
  close(one(logprobs, reference, np.arange(12) < 6), arrays['kto/losses'])


def test_losses_without_a_reference(oracle):
  arrays = oracle('trl116.npz')
  chosen, rejected, ones = arrays['pref/pc'], arrays['pref/pr'], jnp.ones(5)
  pairs = preference.Pairs(chosen, rejected, 0 * ones, 0 * ones, ones, ones)
  close(-0.1 * preference.odds_ratio(chosen, rejected), arrays['orpo/beta_logsigmoid'])
  for name, loss in (('sigmoid', 'cpo'), ('hinge', 'hinge'), ('ipo', 'ipo')):
    spec = PreferenceSpec(loss=loss)
    close(preference.LOSSES[loss](pairs, spec, *preference.implicit_scores(pairs, spec)), arrays[f'cpo/{name}'])
  orpo = preference.LOSSES['orpo'](pairs, PreferenceSpec(loss='orpo'), None, None)
  close(orpo, -chosen - arrays['orpo/beta_logsigmoid'])


@pytest.mark.parametrize('name', ['plain', 'margin', 'center'])
def test_reward_model(oracle, name):
  arrays = oracle('trl116.npz')
  margin, center_rewards_coef = (arrays['rm/margin'] if name == 'margin' else None), (0.01 if name == 'center' else 0.0)

  def mean(scores):
    loss, weight, _ = reward_model.bradley_terry(scores[:4, 0], scores[4:, 0], margin, center_rewards_coef)
    return loss / weight

  loss, grad = jax.jit(jax.value_and_grad(mean))(arrays['rm/scores'])
  close(loss, arrays[f'rm/{name}/loss'])
  close(grad, arrays[f'rm/{name}/grad'])


def draw_pairs(count, seed=0):
  draw = np.random.default_rng(seed)
  lengths = draw.integers(2, 9, (2, count))
  sums = -draw.uniform(0.5, 2, (4, count)) * lengths[[0, 1, 0, 1]]
  return preference.Pairs(*map(jnp.asarray, sums.astype(np.float32)), *map(jnp.asarray, lengths))


@pytest.mark.parametrize('loss', PAIR_LOSSES)
def test_sums_add_up_and_padding_counts_nowhere(loss):
  spec = PreferenceSpec(loss=loss, label_smoothing=0.01 if loss == 'exo_pair' else 0.0, sft_weight=0.1)
  pairs = draw_pairs(6)
  total = jax.jit(functools.partial(preference.pair_loss, spec))
  whole = total(pairs)
  padded = jax.tree.map(lambda a: jnp.pad(a, (0, 3), constant_values=np.nan if a.dtype == np.float32 else 0)
                        if jnp.ndim(a) else a, pairs)
  weights = jnp.arange(9) < 6
  jax.tree.map(close, total(padded, weights), whole)
  grad = jax.jit(jax.grad(lambda c, p, w: total(p._replace(chosen=c), w)[0]))
  found = grad(padded.chosen, padded, weights)
  close(found[:6], grad(pairs.chosen, pairs, weights[:6]))
  np.testing.assert_array_equal(found[6:], 0)
  if loss not in ('aot', 'aot_unpaired'):  # Which sort the pairs that they see.
    cut = lambda s: jax.tree.map(lambda a: a[s] if jnp.ndim(a) else a, pairs)
    parts = [total(cut(s)) for s in (slice(0, 1), slice(1, 6))]
    jax.tree.map(close, jax.tree.map(jnp.add, *parts), whole)


def test_dpo_of_the_reference_itself_is_log_2():
  pairs = draw_pairs(4)
  same = pairs._replace(ref_chosen=pairs.chosen, ref_rejected=pairs.rejected)
  loss, weight, aux = preference.pair_loss(PreferenceSpec(), same)
  close(loss / weight, np.log(2))
  assert aux['margin'] == 0 and aux['chosen_logprob'] == pairs.chosen.sum()


def test_simpo_by_hand():
  pairs = draw_pairs(3)
  h = 2.0 * (pairs.chosen / pairs.chosen_length - pairs.rejected / pairs.rejected_length) - 0.7
  loss, _, _ = preference.pair_loss(PreferenceSpec(loss='simpo', beta=2.0, simpo_gamma=0.7), pairs)
  close(loss, np.log1p(np.exp(-np.asarray(h, np.float64))).sum())


def test_every_loss_pushes_the_answers_apart():
  for loss in set(PAIR_LOSSES) - {'discopop'}:  # Which has a hump where the model is its reference.
    spec = PreferenceSpec(loss=loss, label_smoothing=0.01 if loss == 'exo_pair' else 0.0)
    pairs = jax.tree.map(lambda a: a[:1] if jnp.ndim(a) else a, draw_pairs(1))
    same = pairs._replace(ref_chosen=pairs.chosen, ref_rejected=pairs.rejected)
    d = jax.grad(lambda c, r: preference.pair_loss(spec, same._replace(chosen=c, rejected=r))[0],  # noqa: B023
                 argnums=(0, 1))(pairs.chosen, pairs.rejected)
    assert d[0] - d[1] < 0, loss


def test_score_is_read_at_the_last_real_token():
  values = jnp.asarray([[1., 2., 3., jnp.nan], [jnp.nan, 5., 6., 7.], [1., 2., 3., 4.]])
  mask = jnp.asarray([[1, 1, 1, 0], [0, 1, 1, 1], [0, 1, 0, 0]])
  np.testing.assert_array_equal(reward_model.score_at_end(values, mask), [3., 7., 2.])


def test_process_rewards():
  values, labels = jnp.asarray([[0.3, -1.0, 2.0]]), jnp.asarray([[1, 0, 1]])
  loss, weight, aux = reward_model.process_loss(values, labels, jnp.asarray([[1, 0, 1]]))
  close(loss, np.log1p(np.exp(-0.3)) + np.log1p(np.exp(-2.0)))
  assert weight == 2 and aux['accuracy'] == 2
  good = 1 / (1 + np.exp(-np.array([0.3, 2.0])))
  close(reward_model.process_score(values, jnp.asarray([[1, 0, 1]])), good.min())
  close(reward_model.process_score(values, jnp.asarray([[1, 0, 1]]), 'product'), good.prod())
