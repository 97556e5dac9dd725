"""Mixture of experts: routing, its two auxiliary losses, and the experts' products.

Letters: B batch, T length, n tokens, D d_model, F mlp_dim, E experts, k experts per token, C capacity (slots of an
expert for a sequence).
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llmjax.ops import grouped


def route(logits, count):
  """Pick the top-k experts, weighted by a softmax over their logits (arXiv:2401.04088, section 2.1).

  logits: float32 [..., E].  Returns (weights [..., k] that sum to 1, expert ids int32 [..., k], probabilities [...,
  E]).
  """
  probabilities = jax.nn.softmax(logits, axis=-1)
  top, ids = jax.lax.top_k(probabilities, count)
  return top / jnp.sum(top, axis=-1, keepdims=True), ids, probabilities


def balance_loss(probabilities, ids, mask):
  """Compute the load-balancing loss of every sequence, times its tokens, summed: 1 per token if balanced.

  E sum_e f_e p_e with f_e the fraction of a sequence's choices of expert e and p_e its mean probability
  (arXiv:2101.03961, eq. 4).  Per sequence (arXiv:2412.19437, eq. 17), not per batch: a product of means over a batch
  would depend on how the batch is split.
  probabilities: [B, T, E].  ids: [B, T, k].  mask: float [B, T], 0 for padding.
  """
  experts, count = probabilities.shape[-1], ids.shape[-1]
  tokens = jnp.maximum(jnp.sum(mask, axis=1), 1.0)[:, None]
  chosen = jnp.sum(jax.nn.one_hot(ids, experts), axis=2)
  f = jnp.einsum('BTE,BT->BE', chosen, mask) / tokens / count
  p = jnp.einsum('BTE,BT->BE', probabilities, mask) / tokens
  return jnp.sum(experts * jnp.sum(f * p, axis=-1) * jnp.sum(mask, axis=1))


def router_z_loss(logits, mask):
  """Sum log(Z)^2 over tokens, Z the softmax denominator of the router (arXiv:2202.08906, eq. 5)."""
  return jnp.sum(mask * jnp.square(jax.nn.logsumexp(logits, axis=-1)))


def dropless(x, weights, ids, gate, up, down, activation, first=0, share=1.0,
             layouts=(None, None)):
  """Compute each token's weighted sum over its local experts, [n, D], without dropping tokens.

  x: [n, D].  weights, ids: [n, k].  gate, up: [E', D, F] and down: [E', F, D] of the E' local experts, the first of
  which has id `first`.  Tokens are sorted by expert, so that each expert multiplies one contiguous block
  (arXiv:2211.15841, section 4).  layouts: of gate and up, and of down; they and share as in `ops.grouped.product`.
  """
  experts = gate.shape[0]
  expert = ids.reshape(-1) - first
  expert = jnp.where((expert >= 0) & (expert < experts), expert, experts)  # Choices of other experts sort last.
  order = jnp.argsort(expert, stable=True)
  places = jnp.argsort(order).reshape(ids.shape)
  sizes = jnp.sum(jax.nn.one_hot(expert, experts, dtype=jnp.int32), axis=0)
  places = jnp.where(places < jnp.sum(sizes), places, order.size)
  product = lambda a, w, layout: grouped.product(a, w.astype(a.dtype), sizes, layout, share)
  rows = permute(x, order, places)
  gated, raised = (checkpoint_name(product(rows, w, layouts[0]), name) for w, name in ((gate, 'gate'), (up, 'up')))
  # Weighted before the product: the backward pass then does not need the result.
  factors = permute(weights.reshape(-1, 1), order, places.reshape(-1, 1)).astype(x.dtype)
  return unpermute(product(activation(gated) * raised * factors, down, layouts[1]), order, places)


@jax.custom_vjp
def permute(x, order, places):
  """Permute the tokens of x [n, D] by expert, [n k, D]: row i is the token of choice order[i].

  places: int [n, k], the inverse of order: the row of each choice, or n k if its expert is not local.  Rows of such
  choices are undefined, here and in the argument of `unpermute`.  The gradient is `unpermute`, a sum of gathered rows:
  XLA would scatter them one by one.
  """
  return x[order // places.shape[1]]


@jax.custom_vjp
def unpermute(rows, order, places):
  """Sum rows [n k, D] in the order of `permute` over each token's choices: [n, D]."""
  # One gather per choice: on a TPU, adding neighbouring rows is slow.
  rows_of_choices = (rows.at[choice].get(mode='fill', fill_value=0).astype(jnp.float32) for choice in places.T)
  return functools.reduce(jnp.add, rows_of_choices).astype(rows.dtype)


permute.defvjp(lambda x, order, places: (permute(x, order, places), (order, places)),
              lambda residuals, d_rows: (unpermute(d_rows, *residuals), None, None))
unpermute.defvjp(lambda rows, order, places: (unpermute(rows, order, places), (order, places)),
               lambda residuals, d_y: (permute(d_y, *residuals), None, None))


def slots(ids, mask, experts, capacity):
  """Assign tokens to the slots of experts (arXiv:2006.16668, algorithm 1).

  Every sequence has C slots of each expert; first choices are served before second ones, tokens in order; choices
  without a slot are dropped.  ids: int [B, T, k].  mask: [B, T], 0 for padding, which takes no slot.
  Returns (token of every slot int32 [B, E, C], T for a free slot; slot of every choice [B, T, k], E C if dropped).
  """
  rows, length, count = ids.shape
  choices = ids.swapaxes(1, 2).reshape(rows, -1)  # First choices of all tokens, then second ones.
  hot = jax.nn.one_hot(choices, experts, dtype=jnp.int32) * jnp.tile(mask > 0, (1, count))[..., None]
  place = jnp.sum((jnp.cumsum(hot, axis=1) - 1) * hot, axis=-1)
  kept = (place < capacity) & (jnp.sum(hot, axis=-1) > 0)
  slot = jnp.where(kept, choices * capacity + place, experts * capacity)
  token = jnp.tile(jnp.arange(length), count)
  taken = jax.vmap(lambda s: jnp.full(experts * capacity, length).at[s].set(token, mode='drop'))(slot)
  return taken.reshape(rows, experts, capacity), slot.reshape(rows, count, length).swapaxes(1, 2)


def capacity(length, experts, count, factor):
  """Return C, the slots of an expert for a sequence of `length` tokens."""
  return max(1, math.ceil(factor * length * count / experts))


def gather_slots(x, taken):
  """Gather the tokens x [B, T, D] of every slot, [B, E, C, D]; zeros in free slots."""
  rows = taken.shape[0]
  padded = jnp.pad(x, ((0, 0), (0, 1), (0, 0)))
  flat = jnp.take_along_axis(padded, taken.reshape(rows, -1, 1), axis=1)
  return flat.reshape(*taken.shape, x.shape[-1])


def combine_slots(y, weights, slot):
  """Compute each token's weighted sum over its slots, [B, T, D].  y: [B, E, C, D]."""
  rows, length, count = slot.shape
  flat = jnp.pad(y.reshape(rows, -1, y.shape[-1]), ((0, 0), (0, 1), (0, 0)))
  outputs = jnp.take_along_axis(flat, slot.reshape(rows, -1, 1), axis=1)
  return jnp.sum(outputs.reshape(rows, length, count, -1) * weights[..., None].astype(y.dtype), axis=2)
