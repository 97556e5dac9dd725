"""Distillation losses against golden arrays, and against their plain forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.post import distillation
from llmjax.post.spec import DistillSpec
from tests.helpers import close


@pytest.mark.parametrize('beta', [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize('temperature', [1.0, 2.0])
def test_generalized_jsd(oracle, beta, temperature):
  arrays = oracle('trl116.npz')

  def mean(student):
    loss, weight = distillation.generalized_jsd(
        student, arrays['kd/teacher'], arrays['kd/labels'] != -100, beta, temperature)
    return loss / weight

  loss, grad = jax.jit(jax.value_and_grad(mean))(arrays['kd/student'])
  close(loss, arrays[f'kd/beta{beta}_T{temperature}/loss'])
  close(grad, arrays[f'kd/beta{beta}_T{temperature}/grad'])


def draw(batch=2, length=7, width=5, words=11, seed=0):
  source = np.random.default_rng(seed)
  x_s, x_t = source.normal(size=(2, batch, length, width)).astype(np.float32)
  w_s, w_t = source.normal(size=(2, width, words)).astype(np.float32)
  targets = source.integers(0, words, (batch, length))
  mask = (np.arange(length) < [[5], [7]]).astype(np.float32)
  return x_s, w_s, x_t, w_t, targets, mask


def hinton(student, teacher, targets, mask, temperature=2.0, alpha=0.5):
  spec = DistillSpec(loss='hinton', temperature=temperature, alpha=alpha)
  return distillation.distillation_loss(spec, student, teacher, targets, mask)['loss'], None


def test_hinton_by_hand():
  x_s, w_s, x_t, w_t, targets, mask = draw()
  student, teacher = x_s @ w_s, x_t @ w_t
  loss = hinton(student, teacher, targets, mask, temperature=3.0, alpha=0.7)[0]
  soft = lambda a, t: np.exp(a.astype(np.float64) / t) / np.exp(a.astype(np.float64) / t).sum(-1, keepdims=True)
  p, q = soft(teacher, 3.0), soft(student, 3.0)
  hard = -np.log(np.take_along_axis(soft(student, 1.0), targets[..., None], -1)[..., 0])
  expected = 0.7 * 9 * (p * np.log(p / q)).sum(-1) + 0.3 * hard
  close(loss, (mask * expected).sum())


LOSSES = {
    'forward': lambda s, t, targets, mask: distillation.forward_kl(s, t, mask),
    'reverse': lambda s, t, targets, mask: distillation.reverse_kl(s, t, mask, 2.0),
    'jsd': lambda s, t, targets, mask: distillation.generalized_jsd(s, t, mask, 0.3),
    'hinton': hinton,
}


@pytest.mark.parametrize('name', LOSSES)
def test_chunks_and_padding_change_nothing(name):
  x_s, w_s, x_t, w_t, targets, mask = draw()
  plain = lambda x, w: LOSSES[name](x @ w, x_t @ w_t, targets, mask)[0]

  def chunked(x, w, x_t=x_t, targets=targets, mask=mask):
    return distillation.sum_in_chunks(LOSSES[name], (x, w), (x_t, w_t), targets, mask, chunk_logits=2 * 11 * 2 * 3)[0]

  expected = jax.jit(jax.value_and_grad(plain, argnums=(0, 1)))(x_s, w_s)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-6),
               jax.jit(jax.value_and_grad(chunked, argnums=(0, 1)))(x_s, w_s), expected)
  wide = [np.pad(a, ((0, 1), (2, 3)) + ((0, 0),) * (a.ndim - 2), constant_values=3) for a in (x_s, x_t, targets)]
  wide_mask = np.pad(mask, ((0, 1), (2, 3)))
  np.testing.assert_allclose(chunked(wide[0], w_s, *wide[1:], wide_mask), expected[0], rtol=2e-5)


def test_a_teacher_has_no_gradient():
  x_s, w_s, x_t, w_t, targets, mask = draw()
  grad = jax.grad(lambda w: distillation.sum_in_chunks(LOSSES['hinton'], (x_s, w_s), (x_t, w), targets, mask)[0])(w_t)
  np.testing.assert_array_equal(grad, 0)


def test_a_student_that_is_the_teacher_loses_nothing():
  x_s, w_s, *_, mask = draw()
  for beta in (0.0, 0.4, 1.0):
    mean = lambda s, beta=beta: distillation.generalized_jsd(s, x_s @ w_s, mask, beta)[0]
    loss, grad = jax.value_and_grad(mean)(x_s @ w_s)
    assert abs(loss) < 1e-5 and jnp.abs(grad).max() < 1e-6


def test_top_k_of_all_words_is_the_whole_divergence():
  x_s, w_s, x_t, w_t, _, mask = draw()
  student, teacher = x_s @ w_s, x_t @ w_t
  values, ids = jax.lax.top_k(jax.nn.log_softmax(teacher), 11)
  np.testing.assert_allclose(distillation.top_k_kl(student, values, ids, mask)[0],
                             distillation.forward_kl(student, teacher, mask)[0], rtol=1e-5)
  np.testing.assert_allclose(distillation.top_k_kl(student, values, ids, mask, 2.0)[0],
                             distillation.forward_kl(student, teacher, mask, 2.0)[0], rtol=1e-5)
  part = distillation.top_k_kl(student, values[..., :4], ids[..., :4], mask)[0]
  assert 0 < part < distillation.forward_kl(student, teacher, mask)[0]  # Lumping words together can only lose.


def test_hidden_states():
  x_s, _, x_t, _, _, mask = draw()
  cosine = (x_s * x_t).sum(-1) / np.linalg.norm(x_s, axis=-1) / np.linalg.norm(x_t, axis=-1)
  close(distillation.hidden_cosine(x_s, x_t, mask)[0], (mask * (1 - cosine)).sum())
  close(distillation.hidden_mse(x_s, x_t, mask)[0], (mask * ((x_s - x_t)**2).mean(-1)).sum())
  grad = jax.grad(lambda x: distillation.hidden_cosine(x, x_t, mask)[0])(np.zeros_like(x_s))
  assert np.isfinite(grad).all()
