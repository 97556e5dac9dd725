"""Training objectives: each makes a loss_fn(params, batch, key) -> (sum, (weight, aux))."""

import jax.numpy as jnp

from llmjax.config import ConfigError
from llmjax.model import decoder
from llmjax.ops.losses import chunked_cross_entropy


def resolve_attention(name, platform):
  """Returns the attention kernel of a platform: the mesh's, not the host's."""
  return 'blockwise' if name == 'auto' else name


def resolve_unroll(unroll, num_layers, platform, remat='none'):
  """Returns how many layers each turn of the scan holds.

  XLA's CPU backend runs the body of a loop with less parallelism than straight-line code, and compile
  time is no concern at the sizes a CPU trains; elsewhere one layer compiles fastest.  With remat the CPU
  scans as well: in straight-line code its scheduler computes again early and saves next to nothing.
  """
  return unroll or (num_layers if platform == 'cpu' and remat == 'none' else 1)


def require_remat(name, device):
  """Raises ConfigError when train.remat is not possible on the devices of a mesh; device: one of them."""
  if name == 'offload':
    kinds = {memory.kind for memory in device.addressable_memories()}
    if 'pinned_host' not in kinds:
      raise ConfigError([f'train.remat=offload needs the host memory that JAX calls pinned_host, and '
                         f'{device.device_kind} has {", ".join(sorted(kinds))} only; write '
                         'train.remat=minimal'])


def next_token(model, train, platform):
  """Returns the loss_fn of language modelling; its sum is in nats."""
  implementation = resolve_attention(train.attention, platform)
  unroll = resolve_unroll(train.scan_unroll, model.num_layers, platform, train.remat)

  def loss_fn(params, batch, key):
    context = decoder.make_context(
        model, batch['positions'], batch['segment_ids'], implementation=implementation,
        key=key if model.dropout else None)
    x, _, _ = decoder.hidden_states(
        model, params, batch['tokens'], context, compute_dtype=jnp.dtype(train.compute_dtype),
        remat=train.remat, unroll=unroll)
    matrix, vocab_axis = decoder.output_matrix(model, params)
    loss, weight, aux = chunked_cross_entropy(
        x, matrix, batch['targets'], batch['loss_mask'], z_loss=train.z_loss,
        soft_cap=model.logits_soft_cap or None, vocab_axis=vocab_axis)
    return loss, (weight, aux)

  return loss_fn
