"""Pipeline parallelism over the mesh axis `stage`: microbatches move from stage to stage.

Every device runs the same program, in ticks.  In a tick each stage works on one microbatch and hands it
to the next stage; ticks in which a stage has nothing to do (the bubble) compute on what lies there, and
the result is dropped.  Stage s holds the s-th block of the stacked layers.  Rows of a batch are divided
over the stages too (the rule `batch`), so that embedding, head and loss are shared by all stages instead
of standing idle on all but one; a microbatch travels to stage 0 when its turn comes, and home at the end.

gpipe (arXiv:1811.06965) and interleaved (arXiv:2104.04473, section 2.2: a stage holds several groups of
layers and microbatches go round) are one loop, differentiated by JAX.  1f1b (section 2.1 there) runs a
microbatch's backward pass as soon as it can, so what is kept does not grow with their number.

Letters: S stages, M microbatches, R rounds (groups of layers in a stage), b rows of a microbatch, T, D.
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
  """Return ticks of work over all ticks, as (idle, all): idle / all is the part of the time lost."""
  rounds = rounds if schedule == 'interleaved' else 1
  return stages - 1, microbatches * rounds + stages - 1


def forward(stage_fn, params, x, rows, *, microbatches, rounds=1):
  """Run all layers on x; returns (y [B, T, D], aux summed over microbatches and layers).

  stage_fn(params, x [b, T, D], rows, index) -> (y [b, T, D], aux), aux a dict of float32 scalars that
  are sums over rows; its params are a group of L / (S R) layers.  params: leaves [L, ...], L over
  `stage`.  x: [B, T, D], B over `stage` first.  rows: dict of arrays [B, ...] without gradients that
  every layer needs.  index: the microbatch's number.  B must be divisible by M, M by S, L by S R; else ConfigError.
  """
  _require_parts(params, x.shape[0], microbatches, rounds)
  stages = num_stages()
  slots = microbatches // stages  # Microbatches that are at home on each stage.
  cycle = stages * rounds  # Ticks in which one microbatch of every stage starts.
  ticks = microbatches * rounds + stages - 1

  def local(params, x, rows):
    stage = jax.lax.axis_index(AXIS)
    rows = jax.tree.map(lambda a: _split(a, stages, slots), rows)  # [S, slots, b, ...]
    homes = _split(x, 1, slots)[0]  # [slots, b, T, D]
    params = _deal(params, stages, rounds)

    def tick(carry, time):
      held, feed, drain, done, total = carry
      # This stage's item: numbers count microbatch after microbatch, all rounds of S of them first.
      item = time - stage
      valid = (item >= 0) & (item < microbatches * rounds)
      turn, place = jnp.clip(item // cycle, 0, slots - 1), item % cycle
      # What starts travels down the stages, one a tick, each stage's microbatch behind that of the last.
      feed = jnp.where(time % cycle == 0, homes[jnp.minimum(time // cycle, slots - 1)], feed)
      x = jnp.where((stage == 0) & (place < stages), feed, held)
      home = place % stages
      mine = jax.tree.map(lambda a: a[home, turn], rows)
      layers = place // stages
      index = (layers * stages + stage) * microbatches + home * slots + turn
      y, aux = stage_fn(_group(params, layers, rounds), x, mine, index)
      total = jax.tree.map(lambda t, a: t + jnp.where(valid, a, 0), total, aux)
      # What ends travels down the same way; after S ticks each is at home.
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
  """Run 1f1b; returns (totals, grads): what `last_fn` sums, and float32 gradients of the loss.

  params: (ends, blocks): what embedding and head use, and the stacked layers [L, ...], L over `stage`.
  first_fn(ends, rows) -> x [b, T, D].  stage_fn: as in `forward`; its aux may hold `penalty`, which is
  part of the loss.  last_fn(ends, y [b, T / S, D], rows) -> (loss, (weight, aux)), sums over a part of
  every row: the last stage's output is divided over all stages, so that none waits for the head.
  totals: (loss, (weight, aux)).  L must be divisible by S, T by S times `context`, B by M, M by S; else ConfigError.

  Microbatch m is forward on stage s in tick m + s, and backward in tick m + 2 (S - 1) - s; in between
  only the stage's input is kept, of at most 2 S - 1 microbatches, and the backward pass runs the stage
  again from there.
  """
  _require_parts(params[1], jax.tree.leaves(rows)[0].shape[0], microbatches)
  require_divisible('data.seq_len', jax.tree.leaves(rows)[0].shape[1], (AXIS, 'context'))
  stages = num_stages()
  keep = 2 * stages - 1

  def local(params, rows):
    ends, blocks = params
    stage = jax.lax.axis_index(AXIS)
    is_first, is_last = stage == 0, stage == stages - 1
    rows = jax.tree.map(lambda a: _split(a, 1, microbatches)[0], rows)  # [M, b, ...]
    pick = lambda index: jax.tree.map(lambda a: a[jnp.clip(index, 0, microbatches - 1)], rows)
    cut = lambda a: _slice(a, stage, stages)

    def run_forward(time, held, stash):
      item = time - stage
      mine = pick(item)
      x = jnp.where(is_first, first_fn(ends, mine), held)
      y, aux = stage_fn(blocks, x, mine, stage * microbatches + jnp.clip(item, 0, microbatches - 1))
      valid = (item >= 0) & (item < microbatches)
      aux = jax.tree.map(lambda a: jnp.where(valid, a, 0), aux)
      return y, aux, stash.at[item % keep].set(x)

    def run_head(time, y):
      parts = jax.lax.psum_scatter(jnp.where(is_last, y, 0), AXIS, scatter_dimension=1, tiled=True)
      mine = jax.tree.map(cut, pick(time - stages + 1))
      totals, (d_ends, d_y) = jax.value_and_grad(
          last_fn, argnums=(0, 1), has_aux=True)(ends, parts, mine)
      return totals, d_ends, jax.lax.all_gather(d_y, AXIS, axis=1, tiled=True)

    def run_backward(time, d_y, stash):
      item = time - 2 * (stages - 1) + stage
      valid = ((item >= 0) & (item < microbatches)).astype(jnp.float32)
      index, mine = jnp.clip(item, 0, microbatches - 1), pick(item)
      _, pullback, _ = jax.vjp(
          lambda p, x: _with_penalty(stage_fn(p, x, mine, stage * microbatches + index)), blocks, stash[item % keep],
          has_aux=True)
      d_blocks, d_x = pullback((d_y * valid.astype(d_y.dtype), valid))
      d_first = jnp.where(is_first, d_x, 0)
      (d_ends,) = jax.vjp(lambda e: first_fn(e, mine), ends)[1](d_first)
      return d_x, (d_ends, d_blocks)

    def tick(carry, time, forward, backward):
      held, d_held, stash, totals, grads = carry
      if forward:
        y, aux, stash = run_forward(time, held, stash)
        totals = _add(totals, _stage_totals(totals, aux))
        held = _move(y, 1)
      if forward and backward:
        head, d_ends, d_y = run_head(time, y)
        totals, grads = _add(totals, head), (_add(grads[0], d_ends), grads[1])
      if backward:
        d_y = jnp.where(is_last, d_y, d_held) if forward else jnp.where(is_last, 0, d_held)
        d_x, more = run_backward(time, d_y, stash)
        grads = _add(grads, more)
        d_held = _move(d_x, -1)
      return (held, d_held, stash, totals, grads), None

    x = jax.eval_shape(first_fn, ends, pick(0))
    aux = jax.eval_shape(stage_fn, blocks, x, pick(0), 0)[1]
    part = jax.ShapeDtypeStruct((x.shape[0], x.shape[1] // stages, *x.shape[2:]), x.dtype)
    head = jax.eval_shape(last_fn, ends, part, jax.tree.map(cut, pick(0)))
    zeros = jnp.zeros(x.shape, x.dtype)
    carry = (zeros, zeros, jnp.zeros((keep, *x.shape), x.dtype), _zero_totals(head, aux),
             jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params))
    # Before the first microbatch reaches the last stage nothing can go back; after the last one has,
    # nothing goes forward.
    for start, stop, phase in ((0, stages - 1, (True, False)),
                               (stages - 1, microbatches + stages - 1, (True, True)),
                               (microbatches + stages - 1, microbatches + 2 * (stages - 1), (False, True))):
      step = functools.partial(tick, forward=phase[0], backward=phase[1])
      carry, _ = jax.lax.scan(step, carry, jnp.arange(start, stop))
    totals, (d_ends, d_blocks) = carry[3:]
    stacked = lambda tree: jax.tree.map(lambda a: a[None], tree)
    return stacked(totals), (stacked(d_ends), d_blocks)

  divided, whole = PartitionSpec(AXIS), PartitionSpec()
  totals, (d_ends, d_blocks) = jax.shard_map(
      local, in_specs=((whole, divided), whole), out_specs=divided, axis_names={AXIS},
      check_vma=False)(params, rows)
  add = lambda tree: jax.tree.map(lambda a: a.sum(0), tree)
  return add(totals), (add(d_ends), d_blocks)


def _require_parts(blocks, sequences, microbatches, rounds=1):
  """Raise ConfigError where stages and microbatches do not divide the layers and the sequences of a batch."""
  require_divisible('pipeline.microbatches', microbatches, (AXIS,))
  require_divisible('model.num_layers', jax.tree.leaves(blocks)[0].shape[0], (AXIS,), rounds,
                    f'pipeline.rounds={rounds}')
  turns = microbatches // num_stages()
  require_divisible('train.batch_size', sequences, (AXIS,), turns, words=f'{turns} microbatches')


def _with_penalty(outputs):
  """Split (y, aux) into what has a gradient and what has none."""
  y, aux = outputs
  return (y, jnp.asarray(aux.get('penalty', 0.0), jnp.float32)), aux


def _stage_totals(totals, aux):
  """Return aux of the layers in the form of totals."""
  loss, (weight, names) = totals
  rest = {name: aux.get(name, jnp.zeros(())) for name in names}
  return jnp.zeros(()) + aux.get('penalty', 0.0), (jnp.zeros(()), rest)


def _zero_totals(head, aux):
  """Return zeros for (loss, (weight, aux of head and layers))."""
  _, (_, names) = head
  return jnp.zeros(()), (jnp.zeros(()), {name: jnp.zeros(()) for name in (*names, *aux)})


def _add(total, more):
  """Add trees of arrays; names that `more` lacks stay as they are."""
  if isinstance(total, dict):
    return {k: _add(v, more[k]) if k in more else v for k, v in total.items()}
  if isinstance(total, (tuple, list)):
    return type(total)(_add(a, b) for a, b in zip(total, more, strict=True))
  return total + more.astype(total.dtype)


def _move(x, by):
  """Send x to the stage `by` further on, in a ring."""
  stages = num_stages()
  return jax.lax.ppermute(x, AXIS, [(s, (s + by) % stages) for s in range(stages)])


def _slice(a, part, parts):
  """Return the part-th of `parts` equal pieces of axis 1."""
  size = a.shape[1] // parts
  return jax.lax.dynamic_slice_in_dim(a, part * size, size, axis=1)


def _split(a, blocks, microbatches):
  """[blocks * M * b, ...] to [blocks, M, b, ...]; microbatch m of a block has its rows m, m + M, ...

  So the devices that share a stage's rows each have an equal part of every microbatch.
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
  """Leaves [L / S, ...] of consecutive layers to [R, L / (S R), ...]: every S-th group from this stage on.

  Group c of all S R lies on stage c // R and is needed on stage c % S.  In hand-over j every stage sends
  one group and receives one: stages whose first groups are needed on the same stage take turns.
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
