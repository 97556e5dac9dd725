"""Expert parallelism: the experts are sharded over the mesh axis `expert`."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from llmjax.ops import moe
from llmjax.parallel.attention import from_zigzag, to_zigzag
from llmjax.parallel.sharding import auto_axes, axes_of, constrain, mesh_size, row_layout

UP_NAMES, DOWN_NAMES = ('experts', 'expert_embed', 'mlp'), ('experts', 'mlp', 'expert_embed')


@dataclasses.dataclass(frozen=True)
class ManualLayout:
  """Sharding of a weight inside a shard_map: one of its axes over mesh axes, the first of them outermost."""

  axes: tuple[str, ...]
  axis: int

  def all_gather(self, w):
    """Gather the axis of a weight."""
    for name in reversed(self.axes):
      w = jax.lax.all_gather(w, name, axis=self.axis, tiled=True)
    return w

  def reduce_scatter(self, gradient):
    """Sum the gradients of the devices, and shard the sum as the weight."""
    for name in self.axes:
      gradient = jax.lax.psum_scatter(gradient, name, scatter_dimension=self.axis, tiled=True)
    return gradient


def dropless(x, weights, ids, gate, up, down, activation):
  """Compute each token's weighted sum over its experts, [B, T, D]; see `ops.moe.dropless`.

  x: [B, T, D].  weights, ids: [B, T, k].  gate, up: [E, D, F].  down: [E, F, D].
  Devices along `expert` all-gather their tokens, each computes the part of its own experts (and columns along
  `tensor`), and the sums are reduce-scattered.
  """
  def local(x, weights, ids, *matrices, **options):
    flat = lambda a: a.reshape(-1, a.shape[-1])
    return moe.dropless(flat(x), flat(weights), flat(ids), *matrices, activation, **options).reshape(x.shape)

  if not auto_axes():
    return local(x, weights, ids, gate, up, down)

  # All auto axes, those of size 1 included: a TPU kernel lowers only if none is left.
  mesh = jax.sharding.get_abstract_mesh()
  names = [a for a in mesh.axis_names if a not in mesh.manual_axes]
  only = lambda name: tuple(a for a in axes_of(name) if a in names and mesh_size(a) > 1)
  parts = [only('batch'), only('length')]
  # Sequences that the mesh does not divide, such as the one of initialization, are replicated.
  divided = all(x.shape[i] % math.prod(map(mesh_size, axes)) == 0 for i, axes in enumerate(parts))
  single = tuple(a for a in names if mesh_size(a) == 1)

  def spec(first, *rest):
    # Axes of size 1 are named, too: gradients are summed over axes that are not.
    return PartitionSpec((*first, *single), *(axes or None for axes in rest))

  rows = spec(*parts) if divided else spec(())

  layouts = tuple(ManualLayout(only('expert_embed'), axis) for axis in (1, 2))
  devices = mesh_size('expert')

  def run(x, weights, ids, *matrices):
    first, summed, gathered = 0, only('mlp'), devices > 1 and divided
    if devices > 1:
      first = jax.lax.axis_index('expert') * matrices[0].shape[0]
    if gathered:
      x, weights, ids = (jax.lax.all_gather(a, 'expert', axis=0, tiled=True) for a in (x, weights, ids))
    y = local(x, weights, ids, *matrices, first=first, layouts=layouts, share=1 / devices)
    if gathered:
      y = jax.lax.psum_scatter(y, 'expert', scatter_dimension=0, tiled=True)
    elif devices > 1:
      summed = (*summed, 'expert')
    return jax.lax.psum(y, summed) if summed else y

  specs = [spec(*map(only, names)) for names in (UP_NAMES, UP_NAMES, DOWN_NAMES)]
  # Gathered over `data` here, if they are sharded over it, and over `fsdp` inside: in two steps, as other weights.
  gate, up, down = constrain(gate, *UP_NAMES), constrain(up, *UP_NAMES), constrain(down, *DOWN_NAMES)
  return jax.shard_map(run, in_specs=(rows, rows, rows, *specs), out_specs=rows, axis_names=set(names),
                       check_vma=False)(x, weights, ids, gate, up, down)


def with_capacity(x, weights, ids, mask, gate, up, down, activation, size, zigzag=False):
  """Compute each token's weighted sum over its experts, [B, T, D], with `size` slots per expert and sequence.

  Shapes as in `dropless`.  mask: [B, T], 0 for padding.  zigzag: tokens are in zigzag order; slots are still assigned
  in the order of the text.  See `ops.moe.slots`.
  """
  dispatch, combine = _exchange(x.shape, gate.shape[0], size, zigzag)
  layout = ('expert_rows', 'experts', 'slots', None)
  slots, slot = dispatch(x, ids, mask)
  slots = constrain(slots, *layout)
  product = lambda a, w: jnp.einsum('BECX,EXY->BECY', a, w.astype(a.dtype))
  hidden = constrain(activation(product(slots, gate)) * product(slots, up), *layout[:3], 'act_mlp')
  return combine(constrain(product(hidden, down), *layout), weights, slot)


def _exchange(shape, experts, size, zigzag):
  """Return functions (dispatch, combine): from tokens to the slots of experts [B, E, C, D], and back.

  Each device gathers its sequences along `context`, fills its share of every expert's slots, and exchanges slots of its
  sequences for slots of its experts (all-to-all, arXiv:2006.16668, section 3.2).  In shard_maps, because XLA aborts
  when it partitions such gathers along `context` inside a pipeline stage.  shape: of the tokens, [B, T, ...].
  """
  axes, (batch, length) = row_layout(shape[:2])
  parts = math.prod(map(mesh_size, length or ()))
  width = -(-size // parts)  # Slots of an expert per device; the last ones may stay free.
  exchanged = 'expert' in (batch or ())
  tokens, sequences = PartitionSpec(batch, length), PartitionSpec(batch)
  slots = PartitionSpec(tuple(a for a in batch or () if a != 'expert') or None, 'expert' if exchanged else None, length)
  first_slot = lambda: jax.lax.axis_index(length) * width if length else 0

  def whole(a):
    a = jax.lax.all_gather(a, length, axis=1, tiled=True) if length else a
    return from_zigzag(a) if zigzag else a

  def dispatch(x, ids, mask):
    taken, slot = moe.slots(whole(ids), whole(mask), experts, size)
    taken = jnp.pad(taken, ((0, 0), (0, 0), (0, parts * width - size)), constant_values=shape[1])
    taken = jax.lax.dynamic_slice_in_dim(taken, first_slot(), width, axis=2)
    filled = moe.gather_slots(whole(x), taken)
    return (jax.lax.all_to_all(filled, 'expert', 1, 0, tiled=True) if exchanged else filled), slot

  def combine(y, weights, slot):
    y = jax.lax.all_to_all(y, 'expert', 0, 1, tiled=True) if exchanged else y
    place = slot % size - first_slot()
    here = (slot < experts * size) & (place >= 0) & (place < width)
    y = moe.combine_slots(y, whole(weights), jnp.where(here, slot // size * width + place, experts * width))
    y = to_zigzag(y) if zigzag else y
    return jax.lax.psum_scatter(y, length, scatter_dimension=1, tiled=True) if length else y

  if not axes:
    return dispatch, combine
  on_mesh = lambda fn, ins, outs: jax.shard_map(
      fn, in_specs=ins, out_specs=outs, axis_names=set(axes), check_vma=False)
  return (on_mesh(dispatch, (tokens, tokens, tokens), (slots, sequences)),
          on_mesh(combine, (slots, tokens, sequences), tokens))
