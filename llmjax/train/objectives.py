"""Training objectives: each returns a loss_fn(params, frozen, batch, key) -> (sum, (weight, aux)).

params: the model's parameters.  frozen: {name: tree of arrays} that the loss reads and that do not train, such as a
teacher's parameters.  batch: see data/stream.py.  key: of dropout, None for evaluation.
sum, weight: float32; the loss is sum / weight.  aux: {metric: sum}, divided by the weight as well.
"""

import dataclasses

import jax
import jax.numpy as jnp

from llmjax import extensions
from llmjax.config import ConfigError
from llmjax.model.model import Execution, Model
from llmjax.ops.chunks import CHUNK_LOGITS
from llmjax.ops.losses import chunked_cross_entropy
from llmjax.parallel import pipeline
from llmjax.parallel.attention import to_zigzag
from llmjax.parallel.sharding import row_shards, sum_over_rows

# The attention kernel of each platform.
KERNELS = {'tpu': 'splash', 'gpu': 'cudnn'}

# Every chunk adds to the float32 gradient of the whole output matrix: fewer chunks move less memory.
ACCELERATOR_CHUNK_LOGITS = 1 << 27


def resolve_attention(name, platform):
  """Return names of attention implementations for a platform (of the mesh, not the host); the first usable one runs.

  auto: the platform's kernel if it supports the model, else blockwise.  On CPUs kernels are emulated, for tests.
  Raises ConfigError for a kernel of another platform.
  """
  if name == 'auto':
    return (KERNELS[platform], 'blockwise') if platform in KERNELS else ('blockwise',)
  home = next((p for p, kernel in KERNELS.items() if kernel == name), platform)
  if home == platform:
    return (name,)
  if platform == 'cpu':
    return (f'{name}_emulated',)
  raise ConfigError([f'train.attention={name} runs on {home}, not on {platform}; write auto'])


def resolve_unroll(train, num_layers, platform):
  """Return the number of layers per iteration of the scan.

  XLA's CPU backend parallelizes loop bodies less than straight-line code, and small models compile quickly.  With remat
  only a loop saves memory: in unrolled code XLA may schedule the recomputation too early.
  """
  return train.scan_unroll or (num_layers if platform == 'cpu' and train.remat == 'none' else 1)


def require_remat(name, device):
  """Raise ConfigError if the devices do not support train.remat=name.  device: one of the mesh."""
  if name == 'offload':
    kinds = {memory.kind for memory in device.addressable_memories()}
    if 'pinned_host' not in kinds:
      raise ConfigError([f'train.remat=offload needs the host memory that JAX calls pinned_host, and '
                         f'{device.device_kind} has {", ".join(sorted(kinds))} only; write '
                         'train.remat=minimal'])


def make_model(spec, train, platform, pipe=None):
  """Return the Model of a ModelSpec, executed as a TrainSpec says on a platform.  pipe: PipelineSpec, or None."""
  return Model(spec, Execution(
      compute_dtype=train.compute_dtype, attention=resolve_attention(train.attention, platform), remat=train.remat,
      unroll=resolve_unroll(train, spec.num_layers, platform), pipeline=pipe, ring=train.context_attention == 'ring',
      chunk_logits=CHUNK_LOGITS if platform == 'cpu' else ACCELERATOR_CHUNK_LOGITS))


def make_objective(model, train):
  """Return the loss_fn of a TrainSpec's `objective`: next-token prediction, or that of the user's own function.

  Your own function takes (model, train) and returns such a loss_fn; it needs `forward` and `model.logits`.
  """
  if train.objective != 'next_token':
    return extensions.load(train.objective, 'train.objective')(model, train)
  return next_token(model, z_loss=train.z_loss, neftune_alpha=train.neftune_alpha)


def likelihood(model):
  """Return the loss_fn of evaluation: the negative log-likelihood of the targets, without auxiliary losses."""
  return next_token(dataclasses.replace(
      model, spec=dataclasses.replace(model.spec, balance_loss=0.0, router_z_loss=0.0)))


def embedding_noise(key, x, segment_ids, alpha):
  """Return the noise of NEFTune for embeddings x [B, T, D]: U(-1, 1) * alpha / sqrt(L * D) (arXiv:2310.05914, alg. 1).

  L is the length of the document, by segment_ids [B, T], so that neither packing nor padding changes the noise.
  """
  count = lambda row: jnp.bincount(row, length=row.shape[0] + 1)[row]
  lengths = jax.vmap(count)(segment_ids)
  scale = alpha * jax.lax.rsqrt(lengths.astype(jnp.float32) * x.shape[-1])
  return (jax.random.uniform(key, x.shape, minval=-1.0, maxval=1.0) * scale[..., None]).astype(x.dtype)


# Field of a microbatch, float32 [B]: `router_scale` of the whole batch.
ROUTER_SCALE = 'router_scale'


def router_scale(batch, weight):
  """Return the factor from a sum over the tokens of a batch to its mean times the weight of the loss, float32.

  Router losses are thereby means over all tokens, whether the loss is a mean over targets, pairs or sequences.
  """
  return weight / jnp.maximum(jnp.sum(batch['segment_ids'] != 0), 1)


def with_router_losses(loss, weight, aux, batch):
  """Return (loss + router penalty, aux), with the router losses in aux scaled for division by the weight.

  aux: of the model, sums over the tokens of the batch; empty without experts.
  """
  if not aux:
    return loss, aux
  scale = batch[ROUTER_SCALE][0] if ROUTER_SCALE in batch else router_scale(batch, weight)
  aux = jax.tree.map(lambda total: total * scale, aux)
  return loss + aux['penalty'], aux


def weighed(weigh, forwarded=lambda batch: batch):
  """Return a decorator that adds the attribute `router_scale`, a function of a batch, to a loss_fn.

  A step with several microbatches needs the scale of the whole batch before it differentiates the first one.
  weigh: function from a batch to the weight that the loss_fn returns.  forwarded: function from a batch to the one that
  passes through the model.
  """
  def decorate(loss_fn):
    loss_fn.router_scale = lambda batch: router_scale(forwarded(batch), weigh(batch))
    return loss_fn

  return decorate


def count_targets(batch):
  """Return the sum of the loss mask, the weight of losses that are means over targets."""
  return jnp.sum(batch['loss_mask'].astype(jnp.float32))


def forward(model, params, batch, key=None, neftune_alpha=0.0):
  """Return (final hidden states [B, T, D], aux) of an ordered batch.  key: of dropout and noise; None for neither."""
  perturb = None
  if neftune_alpha and key is not None:
    # A different key than the layers', which are split from the same one.
    noise_key, segments = jax.random.fold_in(key, 0x4EF7), model.restore(batch['segment_ids'])
    noise = lambda x: embedding_noise(noise_key, x, segments, neftune_alpha)
    perturb = lambda x: x + (to_zigzag(noise(x)) if model.use_ring() else noise(x))
  x, _, aux = model.apply(params, batch, key=key, perturb=perturb)
  return x, aux


def next_token(model, *, z_loss=0.0, neftune_alpha=0.0):
  """Return the loss_fn of next-token prediction, in nats.  z_loss, neftune_alpha: see TrainSpec."""
  def score(params, x, rows):
    """Return (sum of losses, (weight, aux)) of final hidden states x [B, T, D]."""
    matrix, vocab_axis = model.output_matrix(params)

    def sums(matrix, x, targets, loss_mask):
      loss, weight, aux = chunked_cross_entropy(
          x, matrix, targets, loss_mask, z_loss=z_loss, vocab_axis=vocab_axis, **model.chunking)
      return loss, (weight, aux)

    return sum_over_rows(sums, matrix.astype(model.dtype), x, rows['targets'], rows['loss_mask'])

  def plain(params, batch, key):
    x, aux = forward(model, params, batch, key, neftune_alpha)
    loss, (weight, names) = score(params, x, batch)
    loss, aux = with_router_losses(loss, weight, aux, batch)
    return loss, (weight, {**names, **aux})

  pipe = model.execution.pipeline

  def totals_and_gradients(params, batch, key):
    ends = {name: tree for name, tree in params.items() if name != 'blocks'}
    run = model.stage(key)

    def layers(*arguments):
      x, aux = run(*arguments)
      return x, with_router_losses(0.0, count_targets(batch), aux, batch)[1]

    last = lambda ends, x, rows: score(ends, model.normalize(ends, x), rows)
    blocks = model.cast({'blocks': params['blocks']})['blocks']
    stages = pipeline.num_stages()
    totals, (d_ends, d_blocks) = pipeline.forward_backward(
        model.embed, layers, last, (ends, blocks), batch,
        microbatches=pipe.count(stages, batch['tokens'].shape[0] // row_shards()))
    grads = {**d_ends, 'blocks': d_blocks}
    return totals, jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params)

  @jax.custom_vjp
  def one_forward_one_backward(params, batch, key):
    return plain(params, batch, key)

  def backward(grads, cotangents):
    scale, _ = cotangents  # Only the sum has a gradient.
    return jax.tree.map(lambda g: g * scale.astype(g.dtype), grads), None, None

  one_forward_one_backward.defvjp(totals_and_gradients, backward)

  @weighed(count_targets)
  def loss_fn(params, frozen, batch, key):
    staged = pipe is not None and pipe.schedule == '1f1b' and pipeline.num_stages() > 1
    return (one_forward_one_backward if staged else plain)(params, model.order(batch), key)

  return loss_fn
