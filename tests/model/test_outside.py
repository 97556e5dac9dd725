"""Presets and mixers of a user's own module, in a folder outside the package."""

import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from llmjax import config
from llmjax.config import ConfigError
from llmjax.generate.decode import Generator
from llmjax.model.model import Model
from llmjax.model.spec import ModelSpec

ROOT = pathlib.Path(__file__).parents[2]
MODULE = '''
import jax.numpy as jnp
from flax import linen as nn, struct
from llmjax.model.layers import linear


def small():
  return dict(num_layers=2, d_model=32, num_heads=2, mlp_dim=48, norm='layer', vocab_size=67)


def typo():
  return dict(num_layer=2)


@struct.dataclass
class Sum:
  total: jnp.ndarray

  def grow(self, extra):
    return self


class Mean(nn.Module):
  """The mean of a linear map of all tokens so far."""

  spec: object
  kind: str = 'global'
  param_dtype: jnp.dtype = jnp.float32

  @staticmethod
  def init_cache(spec, batch, slots, dtype):
    return Sum(jnp.zeros((batch, 1, spec.d_model)))

  @nn.compact
  def __call__(self, x, cache, context):
    d, real = self.spec.d_model, (context.segment_ids != 0)[..., None]
    total = jnp.cumsum(jnp.where(real, linear(self, 'value', (d, d), ('embed', 'mlp'))(x), 0), axis=1)
    if cache is not None:
      total = total + cache.total
      cache = Sum(total[:, -1:])
    position = jnp.maximum(context.attention[self.kind].mask.q_positions, 0)[..., None]
    return (total / (position + 1)).astype(x.dtype), cache
'''


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
  (tmp_path / 'my_models.py').write_text(MODULE)
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, 'path', [*sys.path])
  monkeypatch.delitem(sys.modules, 'my_models', raising=False)
  yield tmp_path
  sys.modules.pop('my_models', None)


def test_preset():
  spec = config.build(ModelSpec, {'preset': 'my_models:small'}, [('num_layers', '3')])
  assert (spec.num_layers, spec.d_model, spec.norm) == (3, 32, 'layer')
  whole = config.to_dict(spec)
  os.remove('my_models.py')
  sys.modules.pop('my_models')
  assert config.build(ModelSpec, whole) == spec  # The config of a run has all fields.


@pytest.mark.parametrize('fields, message', [
    ({'preset': 'my_models:typo'}, "returns 'num_layer', which is not a field; did you mean num_layers"),
    ({'preset': 'my_models:smal'}, 'did you mean my_models:small'),
    ({'mixer': 'my_models:Meen'}, 'did you mean my_models:Mean'),
    ({'mixer': 'attentoin'}, 'did you mean attention')])
def test_errors_are_one_line(fields, message):
  with pytest.raises(ConfigError, match=message) as e:
    config.build(ModelSpec, fields)
  assert len(e.value.problems) == 1


def test_command_line():
  done = subprocess.run(
      [sys.executable, '-m', 'llmjax', 'pretrain', '--workdir=x', '--config.data.sources=nowhere',
       '--config.model.preset=my_models:typo'], capture_output=True, text=True, check=False,
      env={**os.environ, 'PYTHONPATH': str(ROOT)})
  assert done.returncode == 2 and 'model.preset=my_models:typo returns' in done.stderr, done.stderr
  assert 'Traceback' not in done.stderr


def test_mixer_generates_as_it_computes():
  spec = config.build(ModelSpec, {'preset': 'my_models:small', 'mixer': 'my_models:Mean'})
  model = Model(spec)
  params = model.init(jax.random.key(0))
  params = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(jax.random.key(1), p.shape), params)
  assert model.count_params()['total'] == sum(p.size for p in jax.tree.leaves(params))
  made = Generator(spec, params).generate([np.array([5, 9, 3]), np.array([7])], 6)
  for prompt, tokens in zip(([5, 9, 3], [7]), made.tokens, strict=True):
    row = np.array([prompt + list(map(int, tokens))])
    batch = {'tokens': row, 'positions': np.arange(row.size)[None], 'segment_ids': np.ones_like(row)}
    logits = model.logits(params, model.apply(params, batch)[0])
    np.testing.assert_array_equal(np.argmax(logits[0, len(prompt) - 1:-1], -1), tokens)
