"""LoRA, rsLoRA and DoRA equal the reference for every use of a weight, and leave the base frozen."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llmjax.adapt import lora
from llmjax.adapt.matrices import find_targets, matrices, matrix_axes
from llmjax.adapt.quantize import quantize_tree
from llmjax.adapt.spec import AdapterSpec
from llmjax.config import ConfigError, find_problems
from llmjax.model.model import Execution, Model
from llmjax.model.spec import ModelSpec
from llmjax.ops.products import project
from llmjax.train import objectives, trainable
from llmjax.train.optimizers import make_optimizer
from llmjax.train.spec import OptimizerSpec, TrainSpec
from llmjax.train.state import TrainState
from llmjax.train.step import make_train_step

MODELS = {
    'dense': ModelSpec(num_layers=2, d_model=32, num_heads=2, num_kv_heads=1, mlp_dim=48, vocab_size=96),
    'moe': ModelSpec(num_layers=2, d_model=32, num_heads=2, mlp_dim=16, vocab_size=96, num_experts=4,
                     shared_experts=1, tie_embeddings=True),
}
TRAIN = TrainSpec(compute_dtype='float32')
ALL = ('*',)


@functools.cache
def base_of(kind):
  params = jax.jit(Model(MODELS[kind]).init)(jax.random.key(0))
  if 'head' in params:  # It starts at zero, which would hide the rest.
    params['head']['kernel'] = 0.2 * jax.random.normal(jax.random.key(9), params['head']['kernel'].shape)
  return jax.device_get(params)


@functools.cache
def batch_of():
  rng = np.random.default_rng(0)
  segments = np.repeat([[1] * 5 + [2] * 6 + [0] * 1], 4, axis=0).astype(np.int32)
  return {'tokens': rng.integers(0, 96, (4, 12)).astype(np.int32), 'segment_ids': segments,
          'targets': rng.integers(0, 96, (4, 12)).astype(np.int32),
          'positions': np.repeat([[*range(5), *range(6), 0]], 4, axis=0).astype(np.int32),
          'loss_mask': (segments > 0) * np.float32(rng.random((4, 12)) < 0.8)}


@functools.partial(jax.jit, static_argnums=(0, 2))
def moved(spec, base, seed=1):
  """Return an adapter with an effect: b is not zero, magnitudes are not the norms."""
  adapter = lora.init_adapter(spec, base, jax.random.key(seed))
  leaves, tree = jax.tree.flatten(adapter)
  keys = jax.random.split(jax.random.key(seed), len(leaves))
  return tree.unflatten([x + 0.05 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)])


def reference_weight(w, factors, spec, in_dims):
  """Merge the weight of a matrix or a stack of matrices in NumPy, in a loop over the batch."""
  w, a, b = (np.asarray(x, np.float64) for x in (w, factors['a'], factors['b']))
  batch = a.ndim - in_dims - 1
  merged = np.zeros_like(w)
  for index in np.ndindex(*w.shape[:batch]):
    rows = np.prod(w.shape[batch:batch + in_dims])
    scale = spec.alpha / (np.sqrt(spec.rank) if spec.kind == 'rslora' else spec.rank)
    flat = w[index].reshape(rows, -1) + scale * a[index].reshape(rows, -1) @ b[index].reshape(spec.rank, -1)
    if spec.kind == 'dora':
      flat = flat * np.asarray(factors['magnitude'][index], np.float64).reshape(-1) / np.linalg.norm(flat, axis=0)
    merged[index] = flat.reshape(w[index].shape)
  return merged


@functools.partial(jax.jit, static_argnums=1)
def logits(params, model):
  model = Model(model, Execution(attention=('reference',)))
  return model.logits(params, model.apply(params, batch_of())[0])


@pytest.mark.parametrize('kind', ['lora', 'rslora', 'dora'])
def test_products_equal_peft(kind, oracle):
  w, a, b, x, y = (oracle[f'lora/{kind}/{name}'] for name in ('W', 'A', 'B', 'x', 'y'))
  magnitude = oracle['lora/dora/m'] if kind == 'dora' else None
  near = []
  for alpha in (1.0, 2.0, 4.0, 8.0, 16.0, 32.0):  # The file does not say which it was.
    scale = AdapterSpec(kind=kind, rank=2, alpha=alpha).scale
    weight = lora.Adapted(w.T, (lora.Factors(a.T, b.T, magnitude, scale=scale),), 1)
    np.testing.assert_allclose(project(x, weight), x @ weight.dense(), rtol=1e-5, atol=1e-5)
    near.append(np.allclose(project(x, weight), y, rtol=1e-5, atol=1e-6))
  assert sum(near) == 1


@pytest.mark.parametrize(('kind', 'model'), [
    ('lora', 'dense'), *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        ('dora', 'dense'), ('rslora', 'moe'), ('dora', 'moe')))])
def test_merged_equals_unmerged_equals_numpy(kind, model):
  spec, base = AdapterSpec(kind=kind, rank=3, alpha=6.0, targets=ALL), base_of(model)
  adapters = {'one': moved(spec, base)}
  assert set(matrices(base)) == set(find_targets(base, ALL)) and len(matrices(base)) >= 9
  merged = jax.jit(lambda b, a: lora.merge(b, a, {'one': spec}))(base, adapters)
  assert jax.tree.structure(merged) == jax.tree.structure(base)
  for path, w in matrices(base).items():
    factors, found = adapters['one'], merged
    for part in path.split('/'):
      factors, found = factors[part], found[part]
    expected = reference_weight(w, factors, spec, matrix_axes(path)[0])
    assert np.abs(expected - w).max() > 1e-3
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6, err_msg=path)
  combined = lora.combine(base, adapters, {'one': spec})
  run = lambda p: logits(p, MODELS[model])
  np.testing.assert_allclose(run(combined), run(merged), rtol=0, atol=1e-5)
  assert np.abs(run(merged) - run(base)).max() > 0.1


@pytest.mark.slow
def test_inactive_adapters_give_the_base_bit_exactly():
  spec, base = AdapterSpec(kind='dora', rank=2), base_of('dense')
  adapters, specs = {'one': moved(spec, base)}, {'one': spec}
  off = lora.combine(base, adapters, specs, active=())
  assert all(a is b for a, b in zip(jax.tree.leaves(off), jax.tree.leaves(base), strict=True))
  fresh = {'one': lora.init_adapter(spec, base, jax.random.key(0))}
  run = lambda p: logits(p, MODELS['dense'])
  np.testing.assert_allclose(run(lora.combine(base, fresh, specs)), run(base), rtol=0, atol=1e-5)
  plain = dataclasses.replace(spec, kind='lora')
  fresh = {'one': lora.init_adapter(plain, base, jax.random.key(0))}
  np.testing.assert_array_equal(run(lora.combine(base, fresh, {'one': plain})), run(base))


@pytest.mark.slow
def test_several_adapters_are_weighted_and_summed():
  base, a, b = base_of('dense'), AdapterSpec(kind='lora', rank=2), AdapterSpec(
      kind='rslora', rank=3, targets=('*/query', '*/gate'))
  adapters, specs = {'a': moved(a, base, 1), 'b': moved(b, base, 2)}, {'a': a, 'b': b}
  weights = {'b': 0.5}
  merge = lambda **options: jax.jit(lambda: lora.merge(base, adapters, specs, **options))()
  merged, alone = merge(weights=weights), [merge(active=(name,)) for name in 'ab']
  expected = jax.tree.map(lambda w, x, y: (x - w) + 0.5 * (y - w) + w, base, *alone)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), merged, expected)
  combined = lora.combine(base, adapters, specs, weights=weights)
  np.testing.assert_allclose(logits(combined, MODELS['dense']), logits(merged, MODELS['dense']), rtol=0, atol=1e-5)
  only = lora.combine(base, adapters, specs, active=('b',))
  np.testing.assert_allclose(logits(only, MODELS['dense']), logits(alone[1], MODELS['dense']), rtol=0, atol=1e-5)
  back = jax.jit(lambda: lora.unmerge(merged, adapters, specs, weights=weights))()
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), back, base)
  with pytest.raises(ConfigError, match="no adapter 'c'; there are a, b"):
    lora.combine(base, adapters, specs, active=('c',))
  dora = AdapterSpec(kind='dora')
  with pytest.raises(ConfigError, match='cannot be unmerged'):
    lora.unmerge(merged, {'d': moved(dora, base)}, {'d': dora})


@pytest.mark.slow
@pytest.mark.parametrize(('kind', 'model', 'remat'), [
    ('lora', 'dense', 'none'), ('dora', 'dense', 'minimal'), ('rslora', 'moe', 'full')])
def test_gradients_equal_those_through_the_merged_weights(kind, model, remat):
  spec, base = AdapterSpec(kind=kind, rank=3, targets=ALL), base_of(model)
  adapters, batch = {'one': moved(spec, base)}, batch_of()
  loss_fn = objectives.next_token(objectives.make_model(MODELS[model], dataclasses.replace(TRAIN, remat=remat), 'cpu'))
  adapted = adapters_of(model, spec).wrap(loss_fn)
  through_merged = lambda adapters: loss_fn(lora.merge(base, adapters, {'one': spec}), {}, batch, None)[0]
  found = jax.jit(jax.grad(lambda a: adapted(a, {'base': base}, batch, None)[0]))(adapters)
  expected = jax.jit(jax.grad(through_merged))(adapters)
  for (path, x), y in zip(jax.tree_util.tree_flatten_with_path(expected)[0], jax.tree.leaves(found), strict=True):
    scale = np.abs(x).max()
    assert scale > 0, path
    np.testing.assert_allclose(y / scale, x / scale, atol=2e-5, err_msg=str(path))


def test_the_norm_of_dora_has_no_gradient():
  """Compare with finite differences of one matrix with the norm held constant."""
  key = jax.random.split(jax.random.key(3), 5)
  w, a, b = (jax.random.normal(k, s) for k, s in zip(key[:3], [(6, 5), (6, 2), (2, 5)], strict=True))
  x, magnitude = jax.random.normal(key[3], (4, 6)), jnp.abs(jax.random.normal(key[4], (5,)))
  norm = jnp.linalg.norm(w + 2.0 * a @ b, axis=0)
  held = lambda a, b, m: jnp.sum(jnp.sin(x @ (w + 2.0 * a @ b) * m / norm))
  ours = lambda a, b, m: jnp.sum(jnp.sin(project(x, lora.Adapted(w, (lora.Factors(a, b, m, scale=2.0),), 1))))
  for found, expected in zip(jax.grad(ours, (0, 1, 2))(a, b, magnitude), jax.grad(held, (0, 1, 2))(a, b, magnitude),
                             strict=True):
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def adapters_of(model, spec):
  """Return the Trainable of an adapter that is called 'one'."""
  return trainable.adapters(MODELS[model] if isinstance(model, str) else model,
                            dataclasses.replace(spec, name='one'))


def train(spec, steps=3, gradient_accumulation_steps=1, key=1, batch=None, lr=1e-2):
  """Train adapters on the dense model; returns (state before, state after, losses)."""
  base = base_of('dense')
  frozen = {'base': quantize_tree(base, spec.quantize) if spec.quantize else base}
  tx, schedule = make_optimizer(OptimizerSpec(lr=lr, schedule='constant'), steps)
  params = {'one': lora.init_adapter(spec, frozen['base'], jax.random.key(0))}
  state = TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), jax.random.key_data(jax.random.key(key)),
                     frozen)
  before = jax.device_get(state)
  plain = objectives.next_token(objectives.make_model(MODELS['dense'], TRAIN, 'cpu'))
  loss_fn = adapters_of('dense', spec).wrap(plain)
  step, losses = jax.jit(make_train_step(loss_fn, tx, schedule, gradient_accumulation_steps), donate_argnums=0), []
  state = jax.tree.map(jnp.copy, state)
  for _ in range(steps):
    state, metrics = step(state, batch_of() if batch is None else batch)
    losses.append(float(metrics['loss']))
  return before, jax.device_get(state), losses


@pytest.mark.parametrize(('kind', 'quantize'), [
    ('lora', ''), pytest.param('dora', 'nf4', marks=pytest.mark.slow),
    pytest.param('lora', 'int8', marks=pytest.mark.slow)])
def test_training_leaves_the_base_unchanged_without_optimizer_state(kind, quantize):
  before, after, losses = train(AdapterSpec(kind=kind, rank=2, quantize=quantize), steps=20)
  assert losses[-1] < losses[0] - 0.2
  jax.tree.map(np.testing.assert_array_equal, after.frozen, before.frozen)
  changed = jax.tree.map(lambda a, b: bool(np.any(a != b)), after.params, before.params)
  assert all(jax.tree.leaves(changed))
  size = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))
  # Two moments, counters, nothing else; and far less than the base's would be.
  assert 2 * size(after.params) <= size(after.opt_state) <= 2 * size(after.params) + 64
  assert size(after.opt_state) < 0.5 * size(base_of('dense'))


@pytest.mark.slow
def test_gradient_accumulation_is_exact_and_dropout_depends_on_the_step():
  spec = AdapterSpec(kind='lora', rank=2)
  batch = batch_of()
  assert len(set(batch['loss_mask'].sum(1))) > 1
  one, four = train(spec, batch=batch)[1], train(spec, gradient_accumulation_steps=4, batch=batch)[1]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), one.params, four.params)
  dropped = dataclasses.replace(spec, dropout=0.5)
  a, b, c = (train(dropped, key=k)[2] for k in (1, 1, 2))
  assert a == b and a[1:] != c[1:]
  assert a[0] == c[0]  # b is zero in the first step: nothing that is dropped counts.


@pytest.mark.slow
def test_dropout_differs_by_layer_and_weight_and_keeps_the_mean():
  spec, base = AdapterSpec(kind='lora', rank=2, dropout=0.25), base_of('dense')
  combined = lora.combine(base, {'one': moved(spec, base)}, {'one': spec}, key=jax.random.key(0))
  keys = [f.key for w in jax.tree.leaves(combined, is_leaf=lambda x: isinstance(x, lora.Adapted))
          if isinstance(w, lora.Adapted) for f in w.factors]
  assert len({tuple(row) for k in keys for row in np.asarray(k).tolist()}) == 7 * 2
  w = combined['blocks']['mlp']['gate']
  x = jnp.ones((1, 32))
  layer = lambda key: jax.tree.map(lambda leaf: leaf[0], w.replace(base=jnp.zeros_like(w.base), factors=(
      w.factors[0].replace(key=jax.random.key_data(jax.random.split(key, 2))),)))
  outputs = jax.vmap(lambda k: project(x, layer(k)))(jax.random.split(jax.random.key(5), 4000))
  np.testing.assert_allclose(outputs.mean(0), x @ layer(jax.random.key(0)).dense(), atol=0.02)
  assert outputs.std(0).max() > 0.02


@pytest.mark.slow
def test_the_gradient_of_frozen_weights_is_not_computed():
  """The compiled program has the FLOPs of the forward pass and the inputs' gradients, without the weights'."""
  model = dataclasses.replace(MODELS['dense'], d_model=128, mlp_dim=256, num_kv_heads=2, vocab_size=512)
  base = Model(model).abstract_params()
  spec, batch = AdapterSpec(kind='lora', rank=1), batch_of()

  def flops(remat, unroll):
    train = dataclasses.replace(TRAIN, remat=remat, scan_unroll=unroll)
    loss_fn = objectives.next_token(objectives.make_model(model, train, 'cpu'))
    adapted = adapters_of(model, spec).wrap(loss_fn)
    adapters = jax.eval_shape(lambda b: {'one': lora.init_adapter(spec, b, jax.random.key(0))}, base)
    count = lambda f, *args: jax.jit(f).lower(*args).compile().cost_analysis()['flops']
    full = count(jax.grad(lambda p: loss_fn(p, {}, batch, None)[0]), base)
    return full, count(jax.grad(lambda a, b: adapted(a, {'base': b}, batch, None)[0]), adapters, base)

  for remat, unroll, most in (('none', 0, 0.72), ('full', 1, 0.80)):
    full, found = flops(remat, unroll)
    assert found < most * full, (remat, found / full)


@pytest.mark.slow
def test_target_patterns():
  base = base_of('moe')
  assert list(find_targets(base, ('*/attention/q*',))) == ['blocks/attention/query']
  assert list(find_targets(base, (r're:blocks/mlp/(up|down)',))) == ['blocks/mlp/down', 'blocks/mlp/up']
  assert 'blocks/mlp/router' not in find_targets(base, ('*',))
  with pytest.raises(ConfigError) as e:
    find_targets(base, ('*/nothing', '*/query', 're:query'))
  assert len(e.value.problems) == 2
  assert "'*/nothing' matches no matrix; there are blocks/attention/key, " in str(e.value)
  assert any('no regular expression' in p for p in find_problems(AdapterSpec(targets=('re:(',))))
  spec = AdapterSpec(kind='lora', dropout=0.1)
  for kind, targets in (('moe', ('*/mlp/gate',)), ('moe', ('embed/*',)), ('dense', ('head/*',))):
    spec = dataclasses.replace(spec, targets=targets)
    with pytest.raises(ConfigError, match='adapter.dropout is not supported for'):
      lora.combine(base_of(kind), {'a': moved(spec, base_of(kind))}, {'a': spec}, key=jax.random.key(0))


@pytest.mark.slow
def test_generation_with_unmerged_adapters():
  from llmjax.generate.decode import Generator
  model, base, spec = MODELS['dense'], base_of('dense'), AdapterSpec(kind='lora', rank=3, quantize='nf4')
  base = quantize_tree(jax.tree.map(jnp.asarray, base), 'nf4')
  adapters, specs = {'one': moved(spec, base)}, {'one': spec}
  prompts = [np.array([3, 5, 7]), np.array([11])]
  answers = [Generator(model, params).generate(prompts, 8) for params in (
      lora.combine(base, adapters, specs), lora.merge(base, adapters, specs))]
  np.testing.assert_array_equal(answers[0].tokens, answers[1].tokens)
  np.testing.assert_allclose(answers[0].logprobs, answers[1].logprobs, atol=1e-5)
  assert optax.tree.norm(jax.tree.leaves(adapters)) > 0
