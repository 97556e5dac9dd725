"""Damaged checkpoints are never loaded, and a failed save leaves the previous one intact."""

import json
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llmjax.checkpoint import manifest
from llmjax.checkpoint.checkpoints import Checkpoints, SaveError
from llmjax.checkpoint.load import find_step, require_verified
from llmjax.checkpoint.retention import best_steps, kept_steps
from llmjax.checkpoint.spec import CheckpointSpec
from llmjax.config import ConfigError
from llmjax.train.state import TrainState

STREAM, SETTINGS = {'batches': 12, 'fingerprint': 'abc'}, {'model': {'d_model': 4}}


def make_state(seed):
  """A state with arrays of several dtypes, scalars, and an optimizer."""
  keys = jax.random.split(jax.random.key(seed), 2)
  params = {'embed': jax.random.normal(keys[0], (16, 8)),
            'block': {'w': jax.random.normal(keys[1], (2, 8, 8), jnp.bfloat16)}}
  return TrainState(step=jnp.int32(seed), params=params, opt_state=optax.adam(1e-3).init(params),
                    key=jax.random.key_data(keys[0]))


def save(workdir, *steps, spec=None, **arguments):
  checkpoints = Checkpoints(workdir, spec or CheckpointSpec(keep=9))
  for step in steps:
    checkpoints.save(step, make_state(step), STREAM, SETTINGS, **arguments)
  checkpoints.close()


def assert_loads(checkpoints, step):
  """Assert that the newest verified checkpoint is that of a step, equal to the bit."""
  assert checkpoints.latest() == step
  expected = make_state(step)
  state, stream = checkpoints.restore(step, jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), expected))
  jax.tree.map(np.testing.assert_array_equal, state, expected)
  assert stream == STREAM


def steps_of(workdir):
  return manifest.find_steps(workdir / 'checkpoints')


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  """A folder with the checkpoints 3 and 6; tests copy it."""
  workdir = tmp_path_factory.mktemp('saved')
  save(workdir, 3, 6, metrics={'eval/validation/loss': 1.5, 'eval/validation/other': float('nan')},
       metrics_step=3)
  return workdir


@pytest.fixture
def workdir(saved, tmp_path):
  shutil.copytree(saved, tmp_path / 'run')
  return tmp_path / 'run'


def flip(data, at, bit):
  return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1:]


def damages(data, rng):
  """Yield (kind, damaged bytes, or None for a deleted file) of a file's contents."""
  yield 'is missing', None
  if data:
    yield 'is empty', b''
    yield 'has other contents', flip(data, 0, rng.integers(8))
    for _ in range(3):
      yield 'has other contents', flip(data, rng.integers(len(data)), rng.integers(8))
    yield 'has other contents', flip(data, len(data) - 1, rng.integers(8))
    if len(data) > 1:
      yield f'has {len(data) - 1} bytes instead of', data[:-1]
      yield f'has {len(data) // 2} bytes instead of', data[:len(data) // 2]
    yield f'has {len(data) + 1} bytes instead of', data + b'\0'


def test_every_damage_to_every_file_is_named(workdir, record_property):
  checkpoint, rng, count = workdir / 'checkpoints/6', np.random.default_rng(0), 0
  files = sorted(p for p in checkpoint.rglob('*') if p.is_file())
  names = {str(f.relative_to(checkpoint)) for f in files}
  assert {'manifest.json', '_CHECKPOINT_METADATA', 'params/_METADATA', 'params/manifest.ocdbt', 'stream/metadata',
          'spec/metadata', 'optimizer/_sharding'} <= names
  assert any(n.startswith('params/ocdbt.process_0/d/') for n in names)
  assert manifest.find_damage(checkpoint) == []
  for file in files:
    data, name = file.read_bytes(), str(file.relative_to(checkpoint))
    for kind, damaged in damages(data, rng):
      if damaged is None:
        file.unlink()
      else:
        file.write_bytes(damaged)
      found = manifest.find_damage(checkpoint)
      assert len(found) == 1, (name, kind, found)
      assert name in found[0]
      if name == 'manifest.json':
        assert ('is missing' if damaged is None else 'is damaged') in found[0]
      else:
        assert kind in found[0]
      count += 1
      file.write_bytes(data)
  assert manifest.find_damage(checkpoint) == []
  assert count >= 200
  record_property('inputs', count)


def test_a_damaged_checkpoint_is_skipped(workdir):
  folder, whole = workdir / 'checkpoints', workdir / 'whole'
  shutil.move(folder / '6', whole)

  def data_file(item):
    return str(max((whole / item / 'ocdbt.process_0/d').iterdir(), key=lambda p: p.stat().st_size)
               .relative_to(whole))

  def change(name, edit):
    file = folder / '6' / name
    file.write_bytes(edit(file.read_bytes()))

  middle = lambda data: flip(data, len(data) // 2, 3)
  half = lambda data: data[:len(data) // 2]
  cases = [(data_file('params'), lambda n: change(n, middle)),
           (data_file('optimizer'), lambda n: change(n, middle)),
           (data_file('params'), lambda n: change(n, half)),
           ('params/_METADATA', lambda n: change(n, lambda _: b'')),
           ('params/manifest.ocdbt', lambda n: (folder / '6' / n).unlink()),
           ('stream/metadata', lambda n: change(n, middle)),
           ('_CHECKPOINT_METADATA', lambda n: (folder / '6' / n).unlink()),
           ('manifest.json', lambda n: (folder / '6' / n).unlink()),
           ('manifest.json', lambda n: change(n, half)),
           ('params/d/more', lambda n: (folder / '6' / n).write_text('x')),
           ('manifest.json belongs to step 3', lambda n: [shutil.rmtree(folder / '6'),
                                                 shutil.copytree(folder / '3', folder / '6')]),
           ('an empty folder', lambda n: [shutil.rmtree(folder / '6'), (folder / '6').mkdir()]),
           ('not a folder', lambda n: [shutil.rmtree(folder / '6'), (folder / '6').write_text('')])]
  checkpoints = Checkpoints(workdir)
  for name, damage in cases:
    shutil.copytree(whole, folder / '6')
    damage(name)
    assert_loads(checkpoints, 3)
    line, = checkpoints.passed_over
    assert str(folder / '6') in line and name in line and '\n' not in line
    with pytest.raises(ConfigError, match='6 is not loaded'):
      require_verified(folder / '6')
    if (folder / '6').is_dir():
      shutil.rmtree(folder / '6')
    else:
      (folder / '6').unlink()
  (folder / '9.orbax-checkpoint-tmp').mkdir()
  shutil.copytree(whole, folder / '6')
  assert_loads(checkpoints, 6)
  assert 'save was interrupted' in checkpoints.passed_over[0]
  checkpoints.close()


def test_find_step_falls_back_aloud(workdir, capsys):
  assert find_step(workdir) == 6
  (workdir / 'checkpoints/6/spec/metadata').write_text('{}')
  assert find_step(workdir) == 3
  assert 'spec/metadata has 2 bytes' in capsys.readouterr().err
  with pytest.raises(ConfigError, match='6 is not loaded: spec/metadata'):
    find_step(workdir, 6)
  (workdir / 'checkpoints/3/manifest.json').unlink()
  with pytest.raises(ConfigError, match='has no undamaged checkpoint'):
    find_step(workdir)


def test_checkpoints_without_any_manifest_are_refused(workdir):
  for step in (3, 6):
    (workdir / f'checkpoints/{step}/manifest.json').unlink()
  with pytest.raises(ConfigError, match='llmjax checkpoint sign 6 --workdir='):
    Checkpoints(workdir).latest()
  shutil.rmtree(workdir / 'checkpoints/3')
  with pytest.raises(ConfigError, match='llmjax checkpoint sign 6 --workdir='):
    Checkpoints(workdir).latest()
  # A save that was cut off never has a step's name, so a kill during the first one leaves nothing to resume.
  (workdir / 'checkpoints/6').rename(workdir / 'checkpoints/6.partial')
  assert Checkpoints(workdir).latest() is None


def test_a_folder_without_an_undamaged_checkpoint_is_refused_and_kept(workdir):
  """A run must not start anew on top of checkpoints of which none can be loaded."""
  folder = workdir / 'checkpoints'
  for step in (3, 6):
    file = folder / f'{step}/params/_METADATA'
    file.write_bytes(flip(file.read_bytes(), 4, 1))
  before = {p: p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file()}
  with pytest.raises(ConfigError) as e:
    Checkpoints(workdir).latest()
  line, = e.value.problems
  for words in ('are damaged', '6: params/_METADATA has other contents', 'llmjax checkpoint verify --workdir=',
                '--config.checkpoint.fresh_start=true', 'another --workdir'):
    assert words in line
  assert before == {p: p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file()}
  checkpoints = Checkpoints(workdir)
  aside = checkpoints.set_aside()
  assert aside.name == 'checkpoints.1' and manifest.find_steps(aside) == [3, 6]
  assert checkpoints.latest() is None
  folder.mkdir()
  assert checkpoints.set_aside().name == 'checkpoints.2'


def test_what_cannot_be_verified_is_neither_skipped_nor_replaced(workdir, monkeypatch):
  file = workdir / 'checkpoints/6/manifest.json'
  fields = json.loads(file.read_text())
  file.write_text(manifest._render({**fields, 'version': 2}))
  with pytest.raises(ConfigError, match='checkpoints/6 .* cannot be verified: manifest.json has version 2'):
    Checkpoints(workdir).latest()
  assert find_step(workdir) == 3  # To read an older one harms nothing.
  file.write_text(manifest._render(fields))
  real, hidden = manifest.hash_file, workdir / 'checkpoints/6/stream/metadata'

  def refuse(path):
    if path == hidden:
      raise PermissionError(13, 'Permission denied')
    return real(path)

  monkeypatch.setattr(manifest, 'hash_file', refuse)
  with pytest.raises(ConfigError, match='cannot be verified: stream/metadata cannot be read .Permission denied'):
    Checkpoints(workdir).latest()
  monkeypatch.setattr(manifest, 'hash_file', real)
  assert Checkpoints(workdir).latest() == 6


def test_a_folder_that_cannot_be_listed_is_not_taken_for_an_empty_one(workdir, monkeypatch):
  def fail(path):
    raise OSError(5, 'Input/output error')

  monkeypatch.setattr(type(manifest.epath.Path(workdir)), 'iterdir', fail)
  with pytest.raises(ConfigError, match='checkpoints cannot be listed: Input/output error'):
    Checkpoints(workdir).latest()
  monkeypatch.undo()
  (workdir / 'checkpoints').rename(workdir / 'elsewhere')
  (workdir / 'checkpoints').symlink_to(workdir / 'not mounted')
  with pytest.raises(ConfigError, match='checkpoints cannot be listed: No such file'):
    Checkpoints(workdir).latest()


def test_a_checkpoint_with_other_arrays_is_one_line(workdir):
  state = make_state(6)
  other = state.replace(opt_state=optax.chain(optax.clip(1.0), optax.adam(1e-3)).init(state.params))
  abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), other)
  with pytest.raises(ConfigError, match='6 holds other arrays .* optimizer/opt_state/1/0/count is missing'):
    Checkpoints(workdir).restore(6, abstract)


def test_several_processes_each_write_a_manifest_of_their_share(workdir):
  checkpoint = workdir / 'checkpoints/6'
  alone = manifest.read_manifest(checkpoint)
  (checkpoint / 'manifest.json').unlink()
  for process in (2, 0, 1):
    with pytest.raises(manifest.ManifestError):
      manifest.read_manifest(checkpoint)
    manifest.write_manifest(checkpoint, 6, process=process, processes=3)
  names = ('manifest.json', 'manifest.1.json', 'manifest.2.json')
  shares = [json.loads((checkpoint / name).read_text())['files'] for name in names]
  assert all(shares)
  assert sum(map(len, shares)) == len(alone.files)
  assert manifest.read_manifest(checkpoint).files == alone.files
  assert manifest.find_damage(checkpoint) == []
  name = min(shares[2])
  (checkpoint / name).write_bytes(flip((checkpoint / name).read_bytes(), 0, 0))
  found = [manifest.find_damage(checkpoint, process=k, processes=2) for k in range(2)]
  assert sorted(map(len, found)) == [0, 1]
  (checkpoint / 'manifest.1.json').unlink()
  assert 'manifest.1.json is missing' in manifest.find_damage(checkpoint)[0]


def test_going_back_and_saving_an_older_step(workdir):
  (workdir / 'checkpoints/6/params/_METADATA').unlink()
  checkpoints = Checkpoints(workdir)
  assert checkpoints.latest() == 3
  checkpoints.save(5, make_state(5), STREAM, SETTINGS)
  checkpoints.wait()
  assert steps_of(workdir) == [3, 5]  # 6 is of a past that the run has left.
  assert_loads(checkpoints, 5)
  checkpoints.save(5, make_state(5), STREAM, SETTINGS)  # The same step once more.
  assert_loads(checkpoints, 5)
  checkpoints.save(3, make_state(3), STREAM, SETTINGS)
  assert_loads(checkpoints, 3)
  assert steps_of(workdir) == [3]
  checkpoints.close()


def test_the_state_may_be_donated_at_once(tmp_path):
  checkpoints = Checkpoints(tmp_path)
  step = jax.jit(lambda state: jax.tree.map(lambda x: x + jnp.ones((), x.dtype), state), donate_argnums=0)
  state = make_state(2)
  checkpoints.save(2, state, STREAM, SETTINGS)
  for _ in range(5):
    state = step(state)
  jax.block_until_ready(state)
  assert_loads(checkpoints, 2)
  checkpoints.close()


@pytest.mark.parametrize(('where', 'value'), [('params', jnp.nan), ('optimizer', jnp.inf)])
def test_a_state_that_is_not_finite_is_not_saved(workdir, where, value):
  state = make_state(9)
  if where == 'params':
    state.params['block']['w'] = state.params['block']['w'].at[1, 2, 3].set(value)
  else:
    state.opt_state[0].mu['embed'] = state.opt_state[0].mu['embed'].at[0, 0].set(value)
  checkpoints = Checkpoints(workdir)
  checkpoints.save(9, state, STREAM, SETTINGS)
  failed, = checkpoints.finished(wait=True)
  assert 'block/w is not finite' in failed.problem or 'mu/embed is not finite' in failed.problem
  assert checkpoints.finished() == []
  assert steps_of(workdir) == [3, 6]
  assert_loads(checkpoints, 6)
  checkpoints.close()


@pytest.fixture
def small_files():
  """Files cannot grow past 300 bytes, which is what a full disk or a quota looks like to a writer."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)

  def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]) if size else before)

  yield limit
  limit(None)


@pytest.mark.parametrize('size', [300, 3000])
def test_a_disk_that_refuses_fails_this_save(workdir, small_files, size, caplog):
  checkpoints = Checkpoints(workdir)
  small_files(size)
  checkpoints.save(9, make_state(9), STREAM, SETTINGS)
  failed, = checkpoints.finished(wait=True)
  small_files(None)
  assert failed.problem.startswith(f'{workdir}/checkpoints/9 is not saved: File too large; ')
  assert failed.problem.endswith('bytes are free there') and '\n' not in failed.problem
  assert not caplog.records
  assert sorted(p.name for p in (workdir / 'checkpoints').iterdir()) == ['3', '6']
  assert_loads(checkpoints, 6)
  checkpoints.save(12, make_state(12), STREAM, SETTINGS)  # There is room again.
  assert_loads(checkpoints, 12)
  checkpoints.close()


def test_a_folder_that_cannot_be_made(tmp_path):
  (tmp_path / 'checkpoints').write_text('a file')
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(1, make_state(1), STREAM, SETTINGS)
  with pytest.raises(SaveError, match='checkpoints/1 is not saved: File exists; [0-9,]+ bytes are free'):
    checkpoints.close()


def test_retention(tmp_path):
  spec = CheckpointSpec(keep=2, keep_every=4, best_metric='eval/validation/loss')
  checkpoints = Checkpoints(tmp_path, spec)
  losses = {1: 5.0, 2: 4.0, 3: 1.0, 4: 2.0, 5: 3.0, 6: 1.0, 7: float('nan')}
  for step, loss in losses.items():
    checkpoints.save(step, make_state(step), STREAM, SETTINGS, {'eval/validation/loss': loss}, step)
    checkpoints.wait()
  checkpoints.close()
  assert steps_of(tmp_path) == [3, 4, 6, 7]
  metrics = {step: {'eval/validation/loss': loss} for step, loss in losses.items() if step < 7}
  kept = lambda **fields: kept_steps(CheckpointSpec(**fields), metrics)
  best = lambda scores, **fields: best_steps(CheckpointSpec(**fields), scores)
  assert kept(keep=1) == {6}
  assert kept(keep=1, best_metric='eval/validation/loss', keep_best=3) == {3, 4, 6}
  assert best(metrics, best_metric='eval/validation/loss', best_mode='max') == {1}
  assert best({1: {'accuracy': 1.0}, 2: {'accuracy': 2.0}}, best_metric='accuracy') == {2}
  assert best({1: {'loss': 1.0}, 2: {}}, best_metric='loss', keep_best=3) == {1}
  assert kept(best_metric='absent') == {4, 5, 6}
  # Of equal metrics the older step is the best one.
  assert best({2: {'loss': 1.0}, 4: {'loss': 1.0}}, best_metric='loss') == {2}
  assert best({2: {'score': 1.0}, 4: {'score': 1.0}}, best_metric='score') == {2}
