"""What llmjax/checkpoint relies on in Orbax beyond its documentation, and in which version that was checked."""

import dataclasses
import importlib.metadata
import inspect

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from llmjax.checkpoint import manifest, orbax_io
from llmjax.checkpoint.arrays import Arrays

CHECKED = (0, 12)


def test_the_version_that_the_internals_were_checked_with():
  """A new minor version of Orbax: check orbax_io.py against it, with tests/checkpoint, then write its number here."""
  version = importlib.metadata.version('orbax-checkpoint')
  assert tuple(map(int, version.split('.')[:2])) == CHECKED, version


def test_the_parameters_that_are_used_exist():
  parameters = lambda function: set(inspect.signature(function).parameters)
  assert {'save_concurrent_gb', 'restore_concurrent_gb'} <= parameters(ocp.StandardCheckpointHandler)
  assert {'create_directories_asynchronously', 'barrier_sync_fn'} <= parameters(ocp.options.AsyncOptions)
  for policy, names in (('LatestN', {'n'}), ('EveryNSteps', {'interval_steps'}),
                        ('BestN', {'get_metric_fn', 'n', 'keep_checkpoints_without_metrics'})):
    assert names <= {f.name for f in dataclasses.fields(getattr(checkpoint_managers, policy))}


def test_the_layout_of_a_checkpoint(tmp_path):
  """`migrate` rewrites spec/metadata, the manifest hashes params/ by name, and interrupted saves have known names."""
  state = {'w': jnp.ones((4, 2))}
  writer = orbax_io.make_writer(state, None)
  writer.save(tmp_path / '3', args=ocp.args.Composite(
      params=ocp.args.StandardSave(state), optimizer=ocp.args.StandardSave(state),
      stream=ocp.args.JsonSave({}), spec=ocp.args.JsonSave({'model': {}})))
  writer.close()
  names = manifest.list_files(tmp_path / '3')
  assert names['spec/metadata'].read_text() == '{"model": {}}'
  assert any(name.startswith('params/') for name in names)
  assert Arrays(tmp_path / '3').shapes['params/w'] == jax.ShapeDtypeStruct((4, 2), jnp.float32)
  assert manifest.TEMPORARY.fullmatch('3.orbax-checkpoint-tmp')


def test_the_reason_of_a_failure():
  assert orbax_io.failure_reason(OSError(28, 'x')) == 'No space left on device'
  assert orbax_io.failure_reason(ValueError("... [os_error_code='27'] ...")) == 'File too large'
  assert orbax_io.failure_reason(KeyError('x')) == "KeyError: 'x'"
