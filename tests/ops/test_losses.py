"""Losses against NumPy in float64, and their gradients against those of the plain form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.ops import losses

BATCH, LENGTH, WIDTH, WORDS = 2, 11, 8, 13


def draw(vocab_axis=1, dtype=jnp.float32, seed=0):
  """(x, w, targets, loss_mask); 11 tokens are no multiple of any chunk tested but 1."""
  keys = jax.random.split(jax.random.key(seed), 4)
  x = jax.random.normal(keys[0], (BATCH, LENGTH, WIDTH), dtype)
  w = jax.random.normal(keys[1], (WIDTH, WORDS) if vocab_axis == 1 else (WORDS, WIDTH), dtype)
  targets = jax.random.randint(keys[2], (BATCH, LENGTH), 0, WORDS)
  loss_mask = jax.random.uniform(keys[3], (BATCH, LENGTH)) * (jnp.arange(LENGTH) % 4 > 0)
  return x, w, targets, loss_mask


def make_logits(x, w, soft_cap=None, vocab_axis=1):
  logits = x @ (w if vocab_axis == 1 else w.T)
  return logits if soft_cap is None else soft_cap * jnp.tanh(logits / soft_cap)


def numpy_logprobs(logits, targets):
  """Returns (log p of targets, log Z), float64 [B, T]."""
  logits = np.asarray(logits, np.float64)
  log_z = np.log(np.exp(logits).sum(-1))
  return np.take_along_axis(logits, np.asarray(targets)[..., None], -1)[..., 0] - log_z, log_z


@pytest.mark.parametrize('vocab_axis, chunk, soft_cap, z_loss', [
    (1, None, None, 0.0), (1, 4, None, 0.1), (0, 3, 2.0, 0.1), (1, 1, 2.0, 0.0), (0, 100, None, 0.0)])
def test_chunked_loss_and_gradients(vocab_axis, chunk, soft_cap, z_loss):
  x, w, targets, loss_mask = draw(vocab_axis)

  def ours(x, w, loss_mask):
    loss, weight, aux = losses.chunked_cross_entropy(
        x, w, targets, loss_mask, z_loss=z_loss, soft_cap=soft_cap, chunk=chunk, vocab_axis=vocab_axis)
    return 3 * loss, (loss, weight, aux)

  def plain(x, w, loss_mask):
    logits = make_logits(x, w, soft_cap, vocab_axis)
    return 3 * losses.cross_entropy(logits, targets, loss_mask, z_loss=z_loss)[0]

  logits = make_logits(x, w, soft_cap, vocab_axis)
  logprobs, log_z = numpy_logprobs(logits, targets)
  mask = np.asarray(loss_mask, np.float64)
  grads, differentiated = jax.jit(jax.grad(ours, argnums=(0, 1, 2), has_aux=True))(x, w, loss_mask)
  for loss, weight, aux in (differentiated, jax.jit(ours)(x, w, loss_mask)[1]):
    np.testing.assert_allclose(loss, (mask * (z_loss * log_z**2 - logprobs)).sum(), rtol=1e-5)
    np.testing.assert_allclose(weight, mask.sum(), rtol=1e-6)
    np.testing.assert_allclose(aux['z_loss'], z_loss * (mask * log_z**2).sum(), rtol=1e-5)
    hits = np.asarray(logits).argmax(-1) == np.asarray(targets)
    np.testing.assert_allclose(aux['correct'], (mask * hits).sum(), rtol=1e-5)
  for got, expected in zip(grads, jax.grad(plain, argnums=(0, 1, 2))(x, w, loss_mask), strict=True):
    np.testing.assert_allclose(got, expected, atol=2e-5)


@pytest.mark.parametrize('vocab_axis, chunk, soft_cap, temperature, words, entropy', [
    (1, None, None, 1.0, None, False), (0, 4, 2.0, 0.7, 11, True), (1, 3, None, 1.5, None, True)])
def test_token_logprobs_and_gradients(vocab_axis, chunk, soft_cap, temperature, words, entropy):
  x, w, targets, weights = draw(vocab_axis)
  targets = jnp.minimum(targets, (words or WORDS) - 1)

  def ours(x, w):
    found = losses.token_logprobs(
        x, w, targets, soft_cap=soft_cap, chunk=chunk, vocab_axis=vocab_axis, temperature=temperature,
        vocab_size=words, entropy=entropy)
    logprobs, entropies = found if entropy else (found, jnp.zeros(targets.shape))
    return jnp.sum(weights * (jnp.exp(logprobs) + 3 * jnp.square(entropies))), (logprobs, entropies)

  def plain(x, w):
    logits = make_logits(x, w, soft_cap, vocab_axis)[..., :words] / temperature
    logprobs = jax.nn.log_softmax(logits)
    entropies = -jnp.sum(jnp.exp(logprobs) * logprobs, -1) * entropy
    return jnp.sum(weights * (jnp.exp(jnp.take_along_axis(logprobs, targets[..., None], -1)[..., 0])
                              + 3 * jnp.square(entropies)))

  grads, (logprobs, entropies) = jax.jit(jax.grad(ours, argnums=(0, 1), has_aux=True))(x, w)
  logits = make_logits(x, w, soft_cap, vocab_axis)[..., :words] / temperature
  expected, _ = numpy_logprobs(logits, targets)
  assert logprobs.dtype == jnp.float32
  np.testing.assert_allclose(logprobs, expected, atol=1e-5)
  if entropy:
    p = np.asarray(jax.nn.softmax(logits), np.float64)
    np.testing.assert_allclose(entropies, -(p * np.log(p)).sum(-1), atol=1e-5)
  for got, want in zip(grads, jax.grad(plain, argnums=(0, 1))(x, w), strict=True):
    np.testing.assert_allclose(got, want, atol=2e-5)


def test_logprobs_never_hold_the_logits_of_the_batch():
  shapes = [jax.ShapeDtypeStruct(s, d) for s, d in (
      ((4, 8192, 32), jnp.float32), ((32, 4096), jnp.float32), ((4, 8192), jnp.int32))]
  total = lambda *a: sum(map(jnp.sum, losses.token_logprobs(*a, chunk=64, entropy=True)))
  compiled = jax.jit(jax.grad(total, argnums=(0, 1))).lower(*shapes).compile()
  # All of them are 512 MiB.  A GPU's matrix products have 32 MiB of their own to work in.
  assert compiled.memory_analysis().temp_size_in_bytes < 128 * 2**20


def test_masked_targets_change_nothing():
  x, w, targets, _ = draw()
  loss_mask = (jnp.arange(LENGTH) < 6) * jnp.ones((BATCH, 1))
  total = jax.jit(jax.value_and_grad(
      lambda x, t: losses.chunked_cross_entropy(x, w, t, loss_mask, chunk=4)[0]))
  loss, grad = total(x, targets)
  changed, _ = total(x.at[:, 6:].set(9.0), targets.at[:, 6:].set(0))
  np.testing.assert_allclose(loss, changed, rtol=1e-6)
  np.testing.assert_array_equal(grad[:, 6:], 0)


def test_empty_mask_gives_zero():
  x, w, targets, _ = draw()
  nothing = jnp.zeros(targets.shape)
  loss, weight, _ = losses.chunked_cross_entropy(x, w, targets, nothing)
  grad = jax.grad(lambda x: losses.chunked_cross_entropy(x, w, targets, nothing)[0])(x)
  assert loss == 0 and weight == 0 and not grad.any()


def test_bfloat16_products_and_float32_sums():
  x, w, targets, loss_mask = draw(dtype=jnp.bfloat16)
  total = lambda x, w: losses.chunked_cross_entropy(x, w, targets, loss_mask, chunk=4)[0]
  loss, grads = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(x, w)
  plain = lambda x, w: losses.cross_entropy(make_logits(x, w), targets, loss_mask)[0]
  exact, expected = jax.value_and_grad(plain, argnums=(0, 1))(x.astype(jnp.float32),
                                                             w.astype(jnp.float32))
  assert loss.dtype == jnp.float32 and all(g.dtype == jnp.bfloat16 for g in grads)
  np.testing.assert_allclose(loss, exact, rtol=1e-4)
  for got, want in zip(grads, expected, strict=True):
    np.testing.assert_allclose(got.astype(jnp.float32), want, atol=0.05)


def test_logits_of_the_batch_are_never_in_memory():
  """[B, T, V] in float32 would be 512 MiB here; the program's temporaries are a quarter of it at most."""
  shapes = [jax.ShapeDtypeStruct(s, d) for s, d in (
      ((4, 8192, 32), jnp.float32), ((32, 4096), jnp.float32), ((4, 8192), jnp.int32),
      ((4, 8192), jnp.float32))]
  total = lambda *a: losses.chunked_cross_entropy(*a, chunk=64)[0]
  compiled = jax.jit(jax.grad(total, argnums=(0, 1))).lower(*shapes).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < 128 * 2**20


def test_gradient_is_computed_only_if_needed():
  x, w, targets, loss_mask = draw()
  total = lambda x, w: losses.chunked_cross_entropy(x, w, targets, loss_mask)[0]
  count = lambda f: jax.jit(f).lower(x, w).as_text().count('dot_general')
  assert count(total) == 1 and count(jax.grad(total, argnums=(0, 1))) == 3


@pytest.mark.devices(4)
@pytest.mark.parametrize('names', [('data', None, None), ('data', 'tensor', None)])
def test_sharded_rows_and_vocabulary(names):
  mesh = jax.make_mesh((2, 2), ('data', 'tensor'), axis_types=(jax.sharding.AxisType.Auto,) * 2,
                       devices=jax.devices()[:4])
  x, w, targets, loss_mask = draw()
  x, targets, loss_mask = x[:, :8], targets[:, :8], loss_mask[:, :8]
  w = jnp.pad(w, ((0, 0), (0, 3)))
  place = lambda a, *spec: jax.device_put(a, jax.NamedSharding(mesh, jax.P(*spec)))
  total = jax.jit(jax.value_and_grad(
      lambda x, w, t, m: losses.chunked_cross_entropy(x, w, t, m, chunk=4)[0], argnums=(0, 1)))
  placed = (place(x, *names), place(w, None, None if names[1] else 'tensor'),
            place(targets, *names[:2]), place(loss_mask, *names[:2]))
  got, expected = total(*placed), total(x, w, targets, loss_mask)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), got, expected)
