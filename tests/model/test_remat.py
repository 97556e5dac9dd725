"""Values saved and recomputed by each policy of train.remat, as the compiler counts them."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.config import ConfigError
from llmjax.model import stack
from llmjax.model.model import Execution, Model
from llmjax.model.spec import ModelSpec
from llmjax.train import objectives
from llmjax.train.spec import REMATS

SPEC = ModelSpec(num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, mlp_dim=88, vocab_size=67,
                 tie_embeddings=True)
B, T = 2, 48


@functools.cache
def compiled(remat, unroll=1):
  tokens = jax.random.randint(jax.random.key(0), (B, T), 0, SPEC.vocab_size)
  positions = jnp.broadcast_to(jnp.arange(T), tokens.shape)

  def loss(params):
    batch = {'tokens': tokens, 'positions': positions, 'segment_ids': jnp.ones_like(tokens)}
    return jnp.sum(jnp.sin(Model(SPEC, Execution(remat=remat, unroll=unroll)).apply(params, batch)[0]))

  return jax.jit(jax.grad(loss)).lower(params()).compile()


@functools.cache
def params():
  """Random numbers of the right size: nothing of the initializers is at stake."""
  rng = np.random.default_rng(0)
  shapes = Model(SPEC).abstract_params()
  return jax.tree.map(lambda x: jnp.asarray(0.2 * rng.standard_normal(x.shape), x.dtype), shapes)


def temporary(remat, **kwargs):
  return compiled(remat, **kwargs).memory_analysis().temp_size_in_bytes


def flops(remat, **kwargs):
  return compiled(remat, **kwargs).cost_analysis()['flops']


def test_every_name_has_a_policy():
  assert set(stack.REMAT) == set(REMATS)


@pytest.mark.parametrize(('remat', 'unroll'), [
    ('dots', 1), ('minimal', 1), ('out', 1), ('mlp', 1), ('full', 1), ('offload', 1), ('full', 2)])
def test_gradients_are_the_same(remat, unroll):
  expected, found = compiled('none')(params()), compiled(remat, unroll)(params())
  for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
    assert np.abs(a).max() > 0.1
    np.testing.assert_allclose(a, b, rtol=0, atol=5e-6 * np.abs(a).max())  # Sums in another order.


def test_memory_and_flops_are_ordered():
  assert temporary('none') > 1.3 * temporary('minimal') > 1.3 * 1.15 * temporary('full')
  assert temporary('none') > 1.3 * temporary('dots') > 1.3 * 1.15 * temporary('full')
  # XLA counts the body of a loop once, so these are one layer's.
  assert flops('none') <= flops('minimal') < flops('dots') < flops('full')


def products(remat):
  """The number of matrix products in the program: JAX's, before XLA, so that none is merged or lost."""
  closed = jax.make_jaxpr(jax.grad(lambda p: loss_of(p, remat)))(params())
  return str(closed).count('dot_general[')


def loss_of(p, remat):
  tokens = jnp.zeros((B, T), jnp.int32)
  batch = {'tokens': tokens, 'positions': tokens + jnp.arange(T), 'segment_ids': tokens + 1}
  return jnp.sum(Model(SPEC, Execution(remat=remat)).apply(p, batch)[0])


def test_products_computed_again():
  """minimal: none.  out: one.  dots: the two of attention, and on jax before 0.12 two of rotary positions, which TPUs
  alone run.  full: those, and the layer's six but `down`."""
  rotary = 2 * (jax.__version_info__ < (0, 12))
  assert products('minimal') == products('offload') == products('none')
  assert products('out') == products('none') + 1
  assert products('dots') == products('none') + 2 + rotary
  assert products('full') == products('none') + 8 + rotary


def test_straight_code_computes_again_as_well():
  """Without a barrier XLA would merge what is computed twice."""
  assert flops('full', unroll=2) > 1.15 * flops('none', unroll=2)


def test_offload_is_refused_where_there_is_no_such_memory():
  memory = lambda kind: types.SimpleNamespace(kind=kind)
  device = types.SimpleNamespace(device_kind='Abacus', addressable_memories=lambda: [memory('device')])
  objectives.require_remat('minimal', device)
  with pytest.raises(ConfigError, match='train.remat=offload needs .* and Abacus has device only; write '):
    objectives.require_remat('offload', device)
  objectives.require_remat('offload', jax.devices()[0])


def test_offload_moves_what_is_kept_to_the_host():
  """Each kept value is put on the host in the forward loop, and back on the device in the backward loop."""
  text = str(jax.make_jaxpr(jax.grad(lambda p: loss_of(p, 'offload')))(params()))
  kept = len(stack.SAVED) + 2  # attention marks two arrays, and the block's input is moved too.
  assert text.count('devices=(MemorySpace.Host') == text.count('devices=(MemorySpace.Device') == kept
