"""The judge of steps against NumPy, and checksums against corrupted copies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from llmjax.parallel.mesh import make_mesh
from llmjax.parallel.spec import MeshSpec
from llmjax.train import guard
from llmjax.train.replicas import Replicas, checksum
from llmjax.train.spec import GuardSpec


def test_scores_are_those_of_numpy_and_bad_steps_leave_the_window_alone():
  spec = GuardSpec(spike_threshold=6.0, window=16)
  watch = guard.watched(guard.optax.sgd(1.0), spec.window).init({}).watch
  step = jax.jit(lambda watch, loss, norm: guard.check_step(spec, watch, loss, norm))
  rng = np.random.default_rng(0)
  kept, found = [], []
  for i in range(60):
    loss, norm = rng.normal(3.0, 0.1), rng.gamma(9.0, 0.1)
    if i in (5, 30, 45):
      loss = (9.0, 9.0, np.nan)[(5, 30, 45).index(i)]
    if i in (31, 50):
      norm = (30.0, np.inf)[(31, 50).index(i)]
    verdict, after = step(watch, jnp.float32(loss), jnp.float32(norm))
    if len(kept) >= 16:
      rows = np.array(kept[-16:], np.float32)
      median = np.median(rows, axis=0)
      deviation = 1.4826 * np.median(np.abs(rows - median), axis=0)
      scores = (np.array([loss, norm]) - median) / (deviation + guard.FLOOR * np.abs(median))
      np.testing.assert_allclose([verdict['loss_score'], verdict['norm_score']], scores, rtol=1e-4)
    else:
      assert verdict['loss_score'] == verdict['norm_score'] == 0
    if verdict['bad']:
      found.append((i, int(verdict['bad'])))
      np.testing.assert_array_equal(after.losses, watch.losses)
      np.testing.assert_array_equal(after.norms, watch.norms)
    else:
      kept.append((loss, norm))
    watch = after
  assert found == [(30, guard.LOSS_SPIKE), (31, guard.NORM_SPIKE), (45, guard.NOT_FINITE), (50, guard.NOT_FINITE)]
  assert (int(watch.good), int(watch.bad)) == (56, 4)


@pytest.fixture(scope='module')
def held():
  """(mesh, parameters of several kinds of layout, their Replicas)."""
  mesh = make_mesh(MeshSpec(data=2, fsdp=2, tensor=2))
  rng = np.random.default_rng(0)
  layouts = {'whole': ((7,), 'float32', ()), 'narrow': ((4, 6), 'bfloat16', (None, 'tensor')),
             'half': ((4, 3, 2), 'float32', ('fsdp',)), 'pairs': ((8, 8), 'float32', ('fsdp', 'tensor')),
             'none': ((8, 2), 'float32', (('data', 'fsdp', 'tensor'),))}
  params = {name: jax.device_put(jnp.asarray(rng.normal(size=shape), dtype), NamedSharding(mesh, PartitionSpec(*axes)))
            for name, (shape, dtype, axes) in layouts.items()}
  return mesh, params, Replicas(params, mesh)


def flip(x, device, element, bit):
  """Returns x with one bit of one element of one device's copy changed."""
  parts = []
  for shard in x.addressable_shards:
    data = np.array(shard.data)
    if shard.device == device:
      bits = data.reshape(-1).view(f'uint{8 * data.itemsize}')
      bits[element % bits.size] ^= bits.dtype.type(1 << bit % (8 * data.itemsize))
    parts.append(jax.device_put(data, shard.device))
  return jax.make_array_from_single_device_arrays(x.shape, x.sharding, parts)


@pytest.mark.devices(8)
@pytest.mark.parametrize('name', ['whole', 'narrow', 'half'])
def test_a_flipped_bit_names_its_device(held, name):
  mesh, params, replicas = held
  assert replicas.compare(replicas.sums(params)) == ([], [], True)
  rng = np.random.default_rng(1)
  for _ in range(20):
    device = mesh.devices.flat[rng.integers(8)]
    wrong = {**params, name: flip(params[name], device, *rng.integers(0, 1000, 2).tolist())}
    assert replicas.compare(replicas.sums(wrong)) == ([device], [name], True)


@pytest.mark.devices(8)
def test_two_copies_name_both_and_what_has_no_copy_is_left_out(held):
  mesh, params, replicas = held
  device = mesh.devices[1, 0, 1] if mesh.devices.ndim == 3 else mesh.devices.flat[5]
  devices, names, sure = replicas.compare(replicas.sums({**params, 'pairs': flip(params['pairs'], device, 3, 9)}))
  assert device in devices and len(devices) == 2 and names == ['pairs'] and not sure
  alone = {'none': params['none']}
  assert not Replicas(alone, mesh)
  assert replicas.compare(replicas.sums({**params, 'none': flip(params['none'], device, 3, 9)}))[0] == []


def test_the_checksum_tells_places_apart():
  x = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
  swapped = x.copy()
  swapped[0, 1, 2], swapped[2, 3, 4] = x[2, 3, 4], x[0, 1, 2]
  bits = x.reshape(-1).view(np.uint32).astype(object)
  expected = sum(int(b) * (2 * i + 1) for i, b in enumerate(bits)) % 2**32
  assert int(checksum(jnp.asarray(x))) == expected != int(checksum(jnp.asarray(swapped)))
