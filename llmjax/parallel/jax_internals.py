"""All that llmjax uses of JAX outside its public interface, so that a new version of JAX can break this file alone.

TESTED names the versions of JAX with which `check` found everything in place.
"""

import importlib
import importlib.metadata

TESTED = ('0.10', '0.11', '0.12')

# Attribute -> why the public interface does not do.
NEEDED = {
    'jax._src.distributed.global_state': 'client of the coordination service: key-value store and barriers',
    'jax._src.xla_bridge.backends_are_initialized': 'whether XLA_FLAGS has been read',
    'jax._src.clusters.slurm_cluster.SlurmCluster': 'cluster detection before jax.distributed.initialize',
    'jax._src.clusters.ompi_cluster.OmpiCluster': 'cluster detection before jax.distributed.initialize',
    'jax._src.clusters.cloud_tpu_cluster.GkeTpuCluster': 'cluster detection before jax.distributed.initialize',
    'jax._src.clusters.cloud_tpu_cluster.GceTpuCluster': 'cluster detection before jax.distributed.initialize',
}


def check():
  """Return one line for every name of NEEDED that the installed JAX lacks."""
  return [problem for name in NEEDED if (problem := _find(name)[1])]


def coordination_client():
  """Return the client of JAX's coordination service, or None before `jax.distributed.initialize`."""
  return _get('jax._src.distributed.global_state').client


def backends_are_initialized():
  """Return whether JAX has looked for devices, after which XLA_FLAGS has no effect."""
  return _get('jax._src.xla_bridge.backends_are_initialized')()


def slurm_cluster():
  """Return JAX's detection of Slurm."""
  return _get('jax._src.clusters.slurm_cluster.SlurmCluster')


def detect_cluster():
  """Return JAX's detection of the cluster that this process runs on, or None.

  Kubernetes without TPUs is left out: JAX asks its API server, to which few pods have access.  `launch gke` sets
  environment variables instead.
  """
  clusters = (_get(name) for name in NEEDED if name.startswith('jax._src.clusters.'))
  return next((cluster for cluster in clusters if cluster.is_env_present()), None)


def _get(name):
  """Return an attribute by its dotted name; raise RuntimeError, in one line, if the installed JAX lacks it."""
  value, problem = _find(name)
  if problem:
    raise RuntimeError(problem)
  return value


def _find(name):
  """Return (the attribute, '') or (None, one line that names it)."""
  module, _, attribute = name.rpartition('.')
  try:
    return getattr(importlib.import_module(module), attribute), ''
  except (ImportError, AttributeError):
    return None, (f'jax {importlib.metadata.version("jax")} has no {name} ({NEEDED[name]}); install jax '
                  f'{TESTED[0]} to {TESTED[-1]}, or adapt llmjax/parallel/jax_internals.py')
