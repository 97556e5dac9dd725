"""The one train step, and the one evaluation step."""

import jax
import jax.numpy as jnp
import optax


def make_train_step(loss_fn, tx, schedule, accumulation=1):
  """Returns step(state, batch) -> (state, metrics), pure; the caller jits it and donates the state.

  loss_fn(params, batch, key) -> (sum, (weight, aux)): a sum over targets and what to divide it by.
  batch: leaves [B, ...].  Sums, weights and gradients are added over `accumulation` microbatches and
  divided once, so the result does not depend on how many there are (means of means would).
  metrics: float32 scalars `loss` (nats a target), `grad_norm` (before clipping), `lr`,
  `target_tokens`, and the sums in aux divided by the weight.
  """
  grad_fn = jax.value_and_grad(loss_fn, has_aux=True)

  def add_microbatches(params, batch, key):
    def one(rows, index):
      (loss, (weight, aux)), grads = grad_fn(params, rows, jax.random.fold_in(key, index))
      return loss, weight, aux, grads

    if accumulation == 1:
      return one(batch, 0)
    # Microbatch a takes rows a, a + A, ...: each device then finds its part of every microbatch in the
    # rows that it already holds.
    split = lambda x: x.reshape(-1, accumulation, *x.shape[1:]).swapaxes(0, 1)
    microbatches = jax.tree.map(split, batch)
    shapes = jax.eval_shape(one, jax.tree.map(lambda x: x[0], microbatches), 0)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def accumulate(total, item):
      rows, index = item
      return jax.tree.map(jnp.add, total, one(rows, index)), None

    return jax.lax.scan(accumulate, zeros, (microbatches, jnp.arange(accumulation)))[0]

  def train_step(state, batch):
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
    loss, weight, aux, grads = add_microbatches(state.params, batch, key)
    weight = jnp.maximum(weight, 1.0)  # A batch of padding alone must not divide 0 by 0.
    grads = jax.tree.map(lambda g: g / weight.astype(g.dtype), grads)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = {'loss': loss / weight, 'grad_norm': optax.tree.norm(grads),
               'lr': jnp.asarray(schedule(state.step), jnp.float32), 'target_tokens': weight,
               **{name: total / weight for name, total in aux.items()}}
    return state.replace(step=state.step + 1, params=params, opt_state=opt_state), metrics

  return train_step


def lower_step(step, state, batch):
  """Returns the step lowered for this state and batch: the state is donated and keeps its layout.

  state, batch: arrays, or ShapeDtypeStructs with their shardings.
  """
  layout = jax.tree.map(lambda x: x.sharding, state)
  return jax.jit(step, donate_argnums=0, out_shardings=(layout, None)).lower(state, batch)
