"""Pipeline parallelism over the mesh axis `stage`: microbatches move from stage to stage.

Every device runs the same program, in ticks.  In a tick each stage processes one microbatch and sends it to the next
stage; in the ticks without a microbatch (the bubble) it computes a result that is discarded.  Stage s holds the s-th
block of the stacked layers.  The sequences of a batch are sharded over the stages, too (the rule `batch`), so that all
stages compute embedding, head and loss; a microbatch is sent to stage 0 when it starts, and back at the end.

gpipe (arXiv:1811.06965) and interleaved (arXiv:2104.04473, section 2.2: a stage holds several groups of layers, and
microbatches pass all stages several times) are one loop, differentiated by JAX.  1f1b (section 2.1 there) runs a
microbatch's backward pass as early as possible, so that the memory does not grow with the number of microbatches.

Letters: S stages, M microbatches, R rounds (groups of layers per stage), b sequences of a microbatch, T length, D
d_model.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from llmjax.parallel.sharding import mesh_size, require_divisible

AXIS = 'stage'


def num_stages():
  """Return the size of the stage axis of the mesh that is set; 1 without one."""
  return mesh_size(AXIS)


def bubble(schedule, stages, microbatches, rounds=1):
  """Return (idle ticks, all ticks) of a stage; their ratio is the bubble."""
  rounds = rounds if schedule == 'interleaved' else 1
  return stages - 1, microbatches * rounds + stages - 1


def forward(stage_fn, params, x, rows, *, microbatches, rounds=1):
  """Run all layers on x; return (y [B, T, D], aux summed over microbatches and layers).

  stage_fn(params, x [b, T, D], rows, index) -> (y [b, T, D], aux): a group of L / (S R) layers; aux is a dict of
  float32 sums over sequences.  params: leaves [L, ...], L sharded over `stage`.  x: [B, T, D], B sharded over `stage`
  first.  rows: dict of arrays [B, ...] without gradients that every layer needs.  index: of the microbatch and group.
  Raises ConfigError unless M divides B, S divides M and S R divides L.
  """
  _require_parts(params, x.shape[0], microbatches, rounds)
  stages = num_stages()
  slots = microbatches // stages  # Microbatches stored on each stage.
  cycle = stages * rounds  # Ticks in which one stored microbatch of every stage starts.
  ticks = microbatches * rounds + stages - 1

  def local(params, x, rows):
    stage = jax.lax.axis_index(AXIS)
    rows = jax.tree.map(lambda a: _split(a, stages, slots), rows)  # [S, slots, b, ...]
    homes = _split(x, 1, slots)[0]  # [slots, b, T, D]
    params = _deal(params, stages, rounds)

    def tick(carry, time):
      held, feed, drain, done, total = carry
      # Index of this stage's work: over S microbatches, then rounds, then the next S microbatches.
      item = time - stage
      valid = (item >= 0) & (item < microbatches * rounds)
      turn, place = jnp.clip(item // cycle, 0, slots - 1), item % cycle
      # Microbatches that start move towards stage 0, one stage per tick.
      feed = jnp.where(time % cycle == 0, homes[jnp.minimum(time // cycle, slots - 1)], feed)
      x = jnp.where((stage == 0) & (place < stages), feed, held)
      home = place % stages
      mine = jax.tree.map(lambda a: a[home, turn], rows)
      layers = place // stages
      index = (layers * stages + stage) * microbatches + home * slots + turn
      y, aux = stage_fn(_group(params, layers, rounds), x, mine, index)
      total = jax.tree.map(lambda t, a: t + jnp.where(valid, a, 0), total, aux)
      # Finished microbatches move on the same way; after S ticks each is on the stage that stores it.
      drain = jnp.where(stage == stages - 1, y, drain)
      done = done.at[jnp.clip((time - stages + 1) // cycle, 0, slots - 1)].set(drain)
      return (_move(y, 1), _move(feed, -1), _move(drain, -1), done, total), None

    zeros = jnp.zeros_like(homes[0])
    first = jax.tree.map(lambda a: a[0, 0], rows)
    shapes = jax.eval_shape(stage_fn, _group(params, 0, rounds), zeros, first, 0)[1]
    total = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
    carry = (zeros, zeros, zeros, jnp.zeros_like(homes), total)
    carry, _ = jax.lax.scan(tick, carry, jnp.arange(ticks))
    return _join(carry[3]), jax.tree.map(lambda t: t[None], carry[4])

  divided, whole = PartitionSpec(AXIS), PartitionSpec()
  y, total = jax.shard_map(
      local, in_specs=(divided, divided, whole), out_specs=(divided, divided), axis_names={AXIS},
      check_vma=False)(params, x, rows)
  return y, jax.tree.map(lambda t: t.sum(0), total)


def forward_backward(first_fn, stage_fn, last_fn, params, rows, *, microbatches):
  """Run the 1f1b schedule; return (totals, grads): the sums of `last_fn`, and float32 gradients of the loss.

  params: (ends, blocks): the parameters of embedding and head, and the stacked layers [L, ...], L sharded over `stage`.
  first_fn(ends, rows) -> x [b, T, D].  stage_fn: as in `forward`; `penalty` of its aux is part of the loss.
  last_fn(ends, y [b, T / S, D], rows) -> (loss, (weight, aux)), sums over a part of every sequence: the last stage's
  output is sharded over all stages, so that all compute the head.
  totals: (loss, (weight, aux)).  Raises ConfigError unless S divides L, S times `context` divides T, M divides B and S
  divides M.

  The forward pass of microbatch m on stage s is in tick m + s, its backward pass in tick m + 2 (S - 1) - s; only the
  stage's input is saved in between, of at most 2 S - 1 microbatches, and the backward pass recomputes the stage.
  """
  _require_parts(params[1], jax.tree.leaves(rows)[0].shape[0], microbatches)
  require_divisible('data.seq_len', jax.tree.leaves(rows)[0].shape[1], (AXIS, 'context'))
  stages = num_stages()

  def local(params, rows):
    stage = _Stage(first_fn, stage_fn, last_fn, params, rows, microbatches)
    carry = stage.zeros()
    # No backward pass before the first microbatch reaches the last stage, no forward pass after the last one has.
    for start, stop, forward, backward in ((0, stages - 1, True, False),
                                           (stages - 1, microbatches + stages - 1, True, True),
                                           (microbatches + stages - 1, microbatches + 2 * (stages - 1), False, True)):
      tick = functools.partial(stage.tick, forward=forward, backward=backward)
      carry, _ = jax.lax.scan(tick, carry, jnp.arange(start, stop))
    totals, (d_ends, d_blocks) = carry[3:]
    stacked = lambda tree: jax.tree.map(lambda a: a[None], tree)
    return stacked(totals), (stacked(d_ends), d_blocks)

  divided, whole = PartitionSpec(AXIS), PartitionSpec()
  totals, (d_ends, d_blocks) = jax.shard_map(
      local, in_specs=((whole, divided), whole), out_specs=divided, axis_names={AXIS},
      check_vma=False)(params, rows)
  add = lambda tree: jax.tree.map(lambda a: a.sum(0), tree)
  return add(totals), (add(d_ends), d_blocks)


class _Stage:
  """One stage of the 1f1b schedule, inside a shard_map over `stage`.  Arguments as of `forward_backward`."""

  def __init__(self, first_fn, stage_fn, last_fn, params, rows, microbatches):
    self._first_fn, self._stage_fn, self._last_fn, self._microbatches = first_fn, stage_fn, last_fn, microbatches
    self._params, (self._ends, self._blocks) = params, params
    self._stages, self._stage = num_stages(), jax.lax.axis_index(AXIS)
    self._is_first, self._is_last = self._stage == 0, self._stage == self._stages - 1
    self._stash_size = 2 * self._stages - 1
    self._rows = jax.tree.map(lambda a: _split(a, 1, microbatches)[0], rows)  # [M, b, ...]

  def _rows_of(self, index):
    return jax.tree.map(lambda a: a[jnp.clip(index, 0, self._microbatches - 1)], self._rows)

  def _own_part(self, rows):
    return jax.tree.map(lambda a: _slice(a, self._stage, self._stages), rows)

  def zeros(self):
    """Return the initial carry of `tick`: (input, output gradient, stash of inputs, totals, gradients)."""
    x = jax.eval_shape(self._first_fn, self._ends, self._rows_of(0))
    aux = jax.eval_shape(self._stage_fn, self._blocks, x, self._rows_of(0), 0)[1]
    part = jax.ShapeDtypeStruct((x.shape[0], x.shape[1] // self._stages, *x.shape[2:]), x.dtype)
    head = jax.eval_shape(self._last_fn, self._ends, part, self._own_part(self._rows_of(0)))
    zeros = jnp.zeros(x.shape, x.dtype)
    return (zeros, zeros, jnp.zeros((self._stash_size, *x.shape), x.dtype), _zero_totals(head, aux),
            jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), self._params))

  def tick(self, carry, time, *, forward, backward):
    """Run the forward and backward passes of a tick; a body of `lax.scan`."""
    held, d_held, stash, totals, grads = carry
    if forward:
      y, aux, stash = self._forward(time, held, stash)
      totals = _add(totals, _stage_totals(totals, aux))
      held = _move(y, 1)
    if forward and backward:
      head, d_ends, d_y = self._head(time, y)
      totals, grads = _add(totals, head), (_add(grads[0], d_ends), grads[1])
    if backward:
      d_y = jnp.where(self._is_last, d_y, d_held) if forward else jnp.where(self._is_last, 0, d_held)
      d_x, tick_grads = self._backward(time, d_y, stash)
      grads = _add(grads, tick_grads)
      d_held = _move(d_x, -1)
    return (held, d_held, stash, totals, grads), None

  def _forward(self, time, held, stash):
    item = time - self._stage
    rows = self._rows_of(item)
    x = jnp.where(self._is_first, self._first_fn(self._ends, rows), held)
    index = self._stage * self._microbatches + jnp.clip(item, 0, self._microbatches - 1)
    y, aux = self._stage_fn(self._blocks, x, rows, index)
    valid = (item >= 0) & (item < self._microbatches)
    aux = jax.tree.map(lambda a: jnp.where(valid, a, 0), aux)
    return y, aux, stash.at[item % self._stash_size].set(x)

  def _head(self, time, y):
    part = jax.lax.psum_scatter(jnp.where(self._is_last, y, 0), AXIS, scatter_dimension=1, tiled=True)
    rows = self._own_part(self._rows_of(time - self._stages + 1))
    totals, (d_ends, d_y) = jax.value_and_grad(self._last_fn, argnums=(0, 1), has_aux=True)(self._ends, part, rows)
    return totals, d_ends, jax.lax.all_gather(d_y, AXIS, axis=1, tiled=True)

  def _backward(self, time, d_y, stash):
    item = time - 2 * (self._stages - 1) + self._stage
    valid = ((item >= 0) & (item < self._microbatches)).astype(jnp.float32)
    rows = self._rows_of(item)
    index = self._stage * self._microbatches + jnp.clip(item, 0, self._microbatches - 1)
    _, pullback, _ = jax.vjp(lambda p, x: _with_penalty(self._stage_fn(p, x, rows, index)), self._blocks,
                             stash[item % self._stash_size], has_aux=True)
    d_blocks, d_x = pullback((d_y * valid.astype(d_y.dtype), valid))
    d_first = jnp.where(self._is_first, d_x, 0)
    (d_ends,) = jax.vjp(lambda e: self._first_fn(e, rows), self._ends)[1](d_first)
    return d_x, (d_ends, d_blocks)


def _require_parts(blocks, sequences, microbatches, rounds=1):
  """Raise ConfigError if stages and microbatches do not divide the layers and the sequences of a batch."""
  require_divisible('pipeline.microbatches', microbatches, (AXIS,))
  require_divisible('model.num_layers', jax.tree.leaves(blocks)[0].shape[0], (AXIS,), rounds,
                    f'pipeline.rounds={rounds}')
  turns = microbatches // num_stages()
  require_divisible('train.batch_size', sequences, (AXIS,), turns, words=f'{turns} microbatches')


def _with_penalty(outputs):
  """Turn (y, aux) into ((y, penalty), aux), for a vjp with aux."""
  y, aux = outputs
  return (y, jnp.asarray(aux.get('penalty', 0.0), jnp.float32)), aux


def _stage_totals(totals, aux):
  """Return the aux of layers in the structure of totals."""
  loss, (weight, names) = totals
  rest = {name: aux.get(name, jnp.zeros(())) for name in names}
  return jnp.zeros(()) + aux.get('penalty', 0.0), (jnp.zeros(()), rest)


def _zero_totals(head, aux):
  """Return zeros in the structure (loss, (weight, aux of head and layers))."""
  _, (_, names) = head
  return jnp.zeros(()), (jnp.zeros(()), {name: jnp.zeros(()) for name in (*names, *aux)})


def _add(total, more):
  """Add trees of arrays; entries that `more` lacks stay as they are."""
  if isinstance(total, dict):
    return {k: _add(v, more[k]) if k in more else v for k, v in total.items()}
  if isinstance(total, (tuple, list)):
    return type(total)(_add(a, b) for a, b in zip(total, more, strict=True))
  return total + more.astype(total.dtype)


def _move(x, by):
  """Send x to the `by`-th next stage, in a ring."""
  stages = num_stages()
  return jax.lax.ppermute(x, AXIS, [(s, (s + by) % stages) for s in range(stages)])


def _slice(a, part, parts):
  """Return the part-th of `parts` equal parts of axis 1."""
  size = a.shape[1] // parts
  return jax.lax.dynamic_slice_in_dim(a, part * size, size, axis=1)


def _split(a, blocks, microbatches):
  """Reshape [blocks * M * b, ...] to [blocks, M, b, ...]; microbatch m of a block has its sequences m, m + M, ...

  Devices that shard a stage's sequences then have an equal part of every microbatch.
  """
  return a.reshape(blocks, -1, microbatches, *a.shape[1:]).swapaxes(1, 2)


def _join(a):
  """Undo `_split` of one block."""
  return a.swapaxes(0, 1).reshape(-1, *a.shape[2:])


def _group(params, index, rounds):
  """Return one group of layers of leaves [R, L / (S R), ...]."""
  if rounds == 1:
    return jax.tree.map(lambda p: p[0], params)
  return jax.tree.map(lambda p: jax.lax.dynamic_index_in_dim(p, index, keepdims=False), params)


def _deal(params, stages, rounds):
  """Exchange leaves [L / S, ...] of consecutive layers for [R, L / (S R), ...]: every S-th group from this stage on.

  Group c of all S R is stored on stage c // R and needed on stage c % S.  In exchange j every stage sends one group and
  receives one: stages whose first groups are needed on the same stage start with different ones.
  """
  groups = jax.tree.map(lambda p: p.reshape(rounds, -1, *p.shape[1:]), params)
  if rounds == 1 or stages == 1:
    return groups
  period = stages // math.gcd(rounds, stages)
  stage = jax.lax.axis_index(AXIS)
  dealt = jax.tree.map(jnp.zeros_like, groups)
  for turn in range(rounds):
    sent = [(turn + s // period) % rounds for s in range(stages)]
    to = [(s * rounds + k) % stages for s, k in enumerate(sent)]
    place = [0] * stages
    for s, k in enumerate(sent):
      place[to[s]] = (s * rounds + k) // stages
    send, receive = jnp.array(sent)[stage], jnp.array(place)[stage]

    def hand_over(source, target, send=send, receive=receive, to=to):
      moved = jax.lax.ppermute(source[send], AXIS, list(enumerate(to)))
      return target.at[receive].set(moved)

    dealt = jax.tree.map(hand_over, groups, dealt)
  return dealt
