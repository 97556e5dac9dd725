"""Set the XLA flags of train.deterministic, with which a run is bitwise reproducible."""

import os

from llmjax.config import ConfigError
from llmjax.parallel import jax_internals

# Disables kernels with nondeterministic accumulation order (scatters, some attention and matrix kernels), and
# autotuning, which may choose other kernels in the next run.
GPU_FLAG = '--xla_gpu_deterministic_ops'


def require(environment=os.environ):
  """Set the flags.  Must be called before JAX initializes its backends.

  XLA's CPU backend does not autotune, and its order of accumulation depends only on the number of cores.  The TPU
  backend has no such flag.
  Raises ConfigError if the GPU backend is initialized already, or XLA_FLAGS disables the flag.
  """
  flags = environment.get('XLA_FLAGS', '').split()
  given = [flag for flag in flags if flag.split('=')[0] == GPU_FLAG]
  if given and given[-1] not in (GPU_FLAG, f'{GPU_FLAG}=true', f'{GPU_FLAG}=1'):
    raise ConfigError([f'train.deterministic is on and XLA_FLAGS contains {given[-1]}; remove one of them'])
  if given:
    return
  if jax_internals.backends_are_initialized():
    import jax
    if jax.default_backend() == 'gpu':
      raise ConfigError(['train.deterministic: JAX is initialized already in this process; set XLA_FLAGS='
                         f'{GPU_FLAG}=true before it starts'])
    return
  environment['XLA_FLAGS'] = ' '.join([*flags, f'{GPU_FLAG}=true'])
