"""The training step."""

import jax
import jax.numpy as jnp
import optax

from llmjax.parallel.sharding import require_divisible
from llmjax.train.guard import check_step
from llmjax.train.objectives import ROUTER_SCALE


def make_train_step(loss_fn, tx, schedule, gradient_accumulation_steps=1, guard=None, together=1):
  """Return the pure function step(state, batch) -> (state, metrics); the caller jits it and donates the state.

  loss_fn: function (params, frozen, batch, key) -> (sum, (weight, aux)): a sum over targets and its divisor.
  batch: leaves [B, ...].  Sums, weights and gradients are added over the microbatches and divided once, so the result
  does not depend on the number of microbatches (a mean of means would).  A loss with a router penalty has to be
  decorated with `objectives.weighed` for the same reason.
  metrics: float32 scalars `loss` (nats per target), `grad_norm` (before clipping), `lr`, `target_tokens` (the weight),
  `tokens` (without padding), and the sums in aux divided by the weight.
  together: number of consecutive sequences that stay in one microbatch, 2 for pairs.
  guard: GuardSpec; tx then comes from `guard.watched`.  A bad step is counted, but leaves parameters and optimizer
  state unchanged; metrics also has the outputs of `guard.check_step`.
  The step raises ConfigError if the batch is not divisible by the mesh in use and `gradient_accumulation_steps`.
  """
  grad_fn = jax.value_and_grad(loss_fn, has_aux=True)

  def add_microbatches(state, batch, key):
    def one(rows, index):
      (loss, (weight, aux)), grads = grad_fn(state.params, state.frozen, rows, jax.random.fold_in(key, index))
      return loss, weight, aux, grads

    if gradient_accumulation_steps == 1:
      return one(batch, 0)
    microbatches = _split(batch, gradient_accumulation_steps, together)
    shapes = jax.eval_shape(one, jax.tree.map(lambda x: x[0], microbatches), 0)
    if 'penalty' in shapes[2] and hasattr(loss_fn, 'router_scale'):
      # Of the whole batch: a scale per microbatch would depend on how the batch is split.
      rows = jax.tree.leaves(microbatches)[0].shape[:2]
      microbatches[ROUTER_SCALE] = jnp.broadcast_to(loss_fn.router_scale(batch), rows)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def accumulate(total, item):
      rows, index = item
      return jax.tree.map(jnp.add, total, one(rows, index)), None

    return jax.lax.scan(accumulate, zeros, (microbatches, jnp.arange(gradient_accumulation_steps)))[0]

  def train_step(state, batch):
    require_divisible('train.batch_size', jax.tree.leaves(batch)[0].shape[0] // together,
                      times=gradient_accumulation_steps, words=f'{gradient_accumulation_steps} microbatches')
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
    loss, weight, aux, grads = add_microbatches(state, batch, key)
    weight = jnp.where(weight > 0, weight, 1.0)  # A batch of padding has weight 0.
    grads = jax.tree.map(lambda g: g / weight.astype(g.dtype), grads)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    tokens = {'tokens': jnp.sum(batch['segment_ids'] != 0)} if 'segment_ids' in batch else {}
    loss, norm, updates_done, outputs = loss / weight, optax.tree.norm(grads), state.step, {}
    if guard is not None:
      before = state.opt_state
      updates_done -= before.watch.bad  # The optimizer's own schedule does not count bad steps.
      outputs, watch = check_step(guard, before.watch, loss.astype(jnp.float32), norm.astype(jnp.float32))
      params, rule = jax.tree.map(lambda new, old: jnp.where(outputs['bad'] == 0, new, old),
                                  (params, opt_state.rule), (state.params, before.rule))
      opt_state = before._replace(rule=rule, watch=watch)
    metrics = {'loss': loss, 'grad_norm': norm, 'lr': jnp.asarray(schedule(updates_done), jnp.float32),
               'target_tokens': weight, **tokens, **{name: total / weight for name, total in aux.items()}, **outputs}
    return state.replace(step=state.step + 1, params=params, opt_state=opt_state), metrics

  return train_step


def _split(batch, count, together):
  """Split a batch into microbatches, leaves [count, B / count, ...].

  Microbatch a takes sequences a, a + count, ..., so that each device already holds its shard of every microbatch.
  """
  def split(x):
    return x.reshape(-1, count, together, *x.shape[1:]).swapaxes(0, 1).reshape(count, -1, *x.shape[1:])

  return jax.tree.map(split, batch)


def lower_step(step, state, batch):
  """Lower the step for this state and batch; the state is donated and keeps its shardings.

  state, batch: arrays, or ShapeDtypeStructs with shardings.
  """
  layout = jax.tree.map(lambda x: x.sharding, state)
  return jax.jit(step, donate_argnums=0, out_shardings=(layout, None)).lower(state, batch)
