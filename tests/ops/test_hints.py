"""XLA scheduling hints: they change no value, and they are in one module."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.ops import hints

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize('hinted, plain', [
    (hints.materialize_gradient, lambda x: x),
    (lambda x: hints.materialize_result(x, True), lambda x: x),
    (lambda x: sum(a * i for i, a in enumerate(hints.fan_out(x, 3, True))), lambda x: 3 * x),
    (lambda x: hints.gate_product(jax.nn.silu, x, jnp.sin(x)), lambda x: jax.nn.silu(x) * jnp.sin(x)),
    (lambda x: hints.transpose_in_memory(x, (1, 0)), lambda x: x.T)])
def test_values_and_gradients(hinted, plain):
  x = jax.random.normal(jax.random.key(0), (3, 4))
  for f, g in ((hinted, plain), (jax.grad(lambda x: jnp.sum(jnp.cos(hinted(x)))), jax.grad(
      lambda x: jnp.sum(jnp.cos(plain(x)))))):
    np.testing.assert_allclose(jax.jit(f)(x), g(x), rtol=1e-6, atol=1e-7)


def test_barriers_are_in_one_module():
  users = [path for path in (ROOT / 'llmjax').rglob('*.py') if 'optimization_barrier' in path.read_text()]
  assert users == [ROOT / 'llmjax/ops/hints.py']
