"""Which attention a run takes, and that the choice does not change the loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.config import ConfigError
from llmjax.model.model import Model
from llmjax.model.spec import ModelSpec
from llmjax.parallel.mesh import make_mesh
from llmjax.parallel.spec import MeshSpec
from llmjax.train.objectives import make_model, next_token, resolve_attention
from llmjax.train.spec import TrainSpec


@pytest.mark.parametrize('name, platform, taken', [
    ('auto', 'cpu', ('blockwise',)),
    ('auto', 'tpu', ('splash', 'blockwise')),
    ('auto', 'gpu', ('cudnn', 'blockwise')),
    ('splash', 'tpu', ('splash',)),
    ('cudnn', 'gpu', ('cudnn',)),
    ('splash', 'cpu', ('splash_emulated',)),
    ('reference', 'tpu', ('reference',))])
def test_attention_follows_the_platform(name, platform, taken):
  assert resolve_attention(name, platform) == taken


def test_the_kernel_of_another_platform_is_an_error():
  with pytest.raises(ConfigError, match='attention=cudnn runs on gpu, not on tpu; write auto'):
    resolve_attention('cudnn', 'tpu')


@pytest.mark.slow
@pytest.mark.devices(8)
def test_the_kernel_does_not_change_the_loss():
  model = ModelSpec(num_layers=1, d_model=64, num_heads=2, num_kv_heads=1, head_dim=64, mlp_dim=32,
                    vocab_size=40, window=50)
  rng = np.random.default_rng(0)
  batch = {'tokens': rng.integers(0, 40, (4, 128)), 'targets': rng.integers(0, 40, (4, 128)),
           'loss_mask': np.ones((4, 128), np.float32),
           'segment_ids': np.repeat([[1, 2]], 64, axis=1) * np.ones((4, 1), np.int64),
           'positions': np.tile(np.arange(64), (4, 2))}
  params = Model(model).init(jax.random.key(0))
  params['head']['kernel'] = jax.random.normal(jax.random.key(1), params['head']['kernel'].shape)

  def gradient(dtype, attention):
    train = TrainSpec(attention=attention, compute_dtype=dtype)
    loss_fn = next_token(make_model(model, train, 'cpu'))
    return jax.jit(jax.grad(lambda p, b: loss_fn(p, {}, b, None)[0]))(params, jax.tree.map(jnp.asarray, batch))

  for sizes, devices, dtype, kernel, tolerance in (
      (dict(data=2, fsdp=2, tensor=2), 8, 'float32', 'splash', 1e-5), ({}, 1, 'bfloat16', 'cudnn', 3e-2)):
    with jax.set_mesh(make_mesh(MeshSpec(**sizes), jax.devices()[:devices])):
      found, plain = gradient(dtype, kernel), gradient(dtype, 'blockwise')
      for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance * np.abs(b).max())
