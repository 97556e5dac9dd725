"""Expert parallelism: each device of the mesh axis `expert` holds some experts."""

import dataclasses
import math

import jax
from jax.sharding import PartitionSpec

from llmjax.ops import moe
from llmjax.parallel.sharding import auto_axes, axes_of, constrain, mesh_size

WIDE, BACK = ('experts', 'expert_embed', 'mlp'), ('experts', 'mlp', 'expert_embed')


@dataclasses.dataclass(frozen=True)
class Gathered:
  """How a weight lies inside a shard_map: one of its axes over mesh axes, the first of them outermost."""

  axes: tuple[str, ...]
  axis: int

  def fetch(self, w):
    """Returns the weight with that axis whole."""
    for name in reversed(self.axes):
      w = jax.lax.all_gather(w, name, axis=self.axis, tiled=True)
    return w

  def give_back(self, gradient):
    """Returns the sum of the devices' gradients, divided as the weight is."""
    for name in self.axes:
      gradient = jax.lax.psum_scatter(gradient, name, scatter_dimension=self.axis, tiled=True)
    return gradient


def dropless(x, weights, ids, gate, up, down, activation):
  """Returns each token's weighted sum over its experts, [B, T, D]; see `ops.moe.dropless`.

  x: [B, T, D].  weights, ids: [B, T, k].  gate, up: [E, D, F].  down: [E, F, D].
  The devices that share experts gather their tokens, each computes what its own experts (and its own
  columns of them) add, and the sums are scattered back.
  """
  def local(x, weights, ids, *matrices, **options):
    flat = lambda a: a.reshape(-1, a.shape[-1])
    return moe.dropless(flat(x), flat(weights), flat(ids), *matrices, activation, **options).reshape(x.shape)

  if not auto_axes():
    return local(x, weights, ids, gate, up, down)

  # All axes that are not handled yet, those of size 1 among them: a TPU kernel lowers only where none is left.
  mesh = jax.sharding.get_abstract_mesh()
  names = [a for a in mesh.axis_names if a not in mesh.manual_axes]
  only = lambda name: tuple(a for a in axes_of(name) if a in names and mesh_size(a) > 1)
  parts = [only('batch'), only('length')]
  # Rows that the mesh cannot share, such as the one that initialisation traces with, are whole on every device.
  divided = all(x.shape[i] % math.prod(map(mesh_size, axes)) == 0 for i, axes in enumerate(parts))
  single = tuple(a for a in names if mesh_size(a) == 1)

  def spec(first, *rest):
    # Axes of size 1 are named as well: gradients are summed over those that are not.
    return PartitionSpec((*first, *single), *(axes or None for axes in rest))

  rows = spec(*parts) if divided else spec(())

  layouts = tuple(Gathered(only('expert_embed'), axis) for axis in (1, 2))
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

  specs = [spec(*map(only, layout)) for layout in (WIDE, WIDE, BACK)]
  # Over `data` they are gathered here, if they lie over it, and over `fsdp` inside: in two steps, as other weights.
  gate, up, down = constrain(gate, *WIDE), constrain(up, *WIDE), constrain(down, *BACK)
  return jax.shard_map(run, in_specs=(rows, rows, rows, *specs), out_specs=rows, axis_names=set(names),
                       check_vma=False)(x, weights, ids, gate, up, down)
