"""Counted products against sizes known beforehand."""

import jax
import jax.numpy as jnp
import pytest

from llmjax.plan.flops import count_products


def count(fn, *shapes):
  return count_products(jax.jit(fn).lower(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes))
                        .compile().as_text())


def test_a_product_and_a_batched_product():
  assert count(lambda a, b: jnp.tanh(a @ b) + 1, (48, 32), (32, 24)) == 2 * 48 * 32 * 24
  assert count(lambda a, b: jnp.einsum('bij,bkj->bik', a, b), (4, 24, 16), (4, 40, 16)) == 2 * 4 * 24 * 40 * 16


def test_every_loop_iteration_counts():
  def three(x, w):
    return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=3)[0]

  assert count(three, (16, 16), (16, 16)) == 3 * 2 * 16**3

  def nested(x, w):
    return jax.lax.fori_loop(0, 5, lambda _, x: three(x, w), x)

  assert count(nested, (16, 16), (16, 16)) == 15 * 2 * 16**3


def test_the_most_expensive_branch_counts():
  def either(x, w):
    return jax.lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x @ w)

  assert count(either, (16, 16), (16, 16)) == 2 * 2 * 16**3


def test_unknown_trip_count_is_an_error():
  def unknown(x, w):
    return jax.lax.while_loop(lambda x: x[0, 0] < 1, lambda x: x @ w, x)

  with pytest.raises(ValueError, match='trip count is unknown'):
    count(unknown, (16, 16), (16, 16))
