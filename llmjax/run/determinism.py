"""train.deterministic: what makes JAX's backends give the same bits again."""

import os

from llmjax.config import ConfigError

# It excludes operations that add in any order (scatters, some attention and matrix kernels), and choosing
# kernels by timing them, which may choose others in the next start.
GPU_FLAG = '--xla_gpu_deterministic_ops'


def require(environment=os.environ):
  """Sets the flags; call it before JAX looks for devices.  Raises ConfigError when it is too late, or refused.

  XLA's CPU backend chooses no kernel by timing and adds in an order that the number of cores fixes.  Its TPU
  backend has no such flag.
  """
  flags = environment.get('XLA_FLAGS', '').split()
  given = [flag for flag in flags if flag.split('=')[0] == GPU_FLAG]
  if given and given[-1] not in (GPU_FLAG, f'{GPU_FLAG}=true', f'{GPU_FLAG}=1'):
    raise ConfigError([f'train.deterministic is on and XLA_FLAGS says {given[-1]}; leave one of them out'])
  if given:
    return
  from jax._src import xla_bridge
  if xla_bridge.backends_are_initialized():
    import jax
    if jax.default_backend() == 'gpu':
      raise ConfigError(['train.deterministic: JAX has started already, in this process; set XLA_FLAGS='
                         f'{GPU_FLAG}=true before'])
    return
  environment['XLA_FLAGS'] = ' '.join([*flags, f'{GPU_FLAG}=true'])
