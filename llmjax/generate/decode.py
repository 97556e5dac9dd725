"""Generation: a KV cache, prefill, decode steps, and a Generator that runs them in chunks.

Letters: B batch, P prompt slots, S cache slots, T tokens of one step, K key/value heads, H
head_dim, V vocab_size.

Prompts are padded on the left, so the next token of every row goes into the same slot and the cache
is updated in place.  A slot knows its token's position and whether it holds a token at all, so a
row gets the same logits whatever its padding.  Slots come in buckets; compiled programs depend on
the bucket and not on the length.
"""

import contextlib
import functools
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from llmjax.generate.spec import SamplingSpec
from llmjax.model.cache import Cache
from llmjax.model.model import Execution, Model
from llmjax.ops import sampling as sampling_ops
from llmjax.ops.products import is_weight
from llmjax.parallel import in_flight
from llmjax.parallel.mesh import batch_shards
from llmjax.parallel.sharding import constrain, mesh_spec

CHUNK = 64  # Most tokens made between two looks of the host; 64 host round trips become one.
STREAM_CHUNK = 12  # Tokens between two looks when someone is reading along.
MIN_BUCKET = 32  # Fewer slots than this save no time.
# The cache of a row that is alone starts no smaller, so that a short answer never meets a second compile; a cache of
# many rows, whose every slot costs time, starts with as many in all.
MIN_CACHE, MIN_CACHE_ROWS = 256, 8
STOP_IDS = 8  # Stop token ids come in multiples of this, so that their number is no new program.


def bucket(length, minimum=MIN_BUCKET):
  """Returns the least of 4, 5, 6 or 7 times a power of two that is at least `length` and `minimum`.

  Four programs to every doubling, and never more than a fifth of the slots unused.
  """
  length = max(length, minimum)
  unit = 1 << max(0, (length - 1).bit_length() - 3)
  return -(-length // unit) * unit


def prefill(model, params, tokens, lengths, step=1):
  """Returns (logits float32 [B, V] of the token after each prompt, a full Cache of P slots).

  params: unstacked (`Model.unstack`).  tokens: int32 [B, P], each prompt at the right end.  lengths: int32 [B],
  at least 1.  step: tokens of a later `decode_step`, at most.
  """
  batch, slots = tokens.shape
  # Padding has positions below 0: they rise along the sequence, as aligned masks promise.
  positions = (jnp.arange(slots) - (slots - lengths[:, None])).astype(jnp.int32)
  inputs = {'tokens': tokens, 'positions': positions, 'segment_ids': (positions >= 0).astype(jnp.int32)}
  x, cache, _ = model.apply(params, inputs, cache=_pin(model.init_cache(batch, slots, step)))
  return model.logits(params, x[:, -1]), cache


def decode_step(model, params, cache, tokens):
  """Returns (logits float32 [B, T, V] of the token after each of `tokens`, the Cache with them).

  tokens: int32 [B, T]; T is 1 in plain decoding, more when a draft is verified or a prompt continues.  The cache must
  have T free slots.
  """
  positions = cache.lengths[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)
  inputs = {'tokens': tokens, 'positions': positions, 'segment_ids': jnp.ones_like(positions)}
  x, cache, _ = model.apply(params, inputs, cache=cache)
  return model.logits(params, x), _pin(cache)


def _pin(cache):
  """Returns the cache with its layers sharded over the mesh, if one is set: sequences over data, heads over tensor."""
  return cache.replace(layers=jax.tree.map(lambda x: constrain(x, 'batch', 'kv_heads', None, None), cache.layers))


class _State(NamedTuple):
  """What the decode loop carries.

  token, done: [B], the last token, not yet in the cache, and whether the row has met a stop token.
  seen: bool [B, V], tokens in the row.  keys: [B], one PRNG key for each row.
  """

  cache: Cache
  token: jax.Array
  done: jax.Array
  seen: jax.Array
  keys: jax.Array


class _Choice(NamedTuple):
  """How tokens are chosen, all traced: sampling parameters, stop ids, number of real tokens.

  drawn: whether log-probabilities are those of the distribution drawn from: see `ops.sampling.sample`.
  """

  sampling: dict
  stop_ids: jax.Array
  vocab_size: jax.Array
  drawn: jax.Array


def _choose(choice, logits, seen, keys, positions):
  """Returns (token, logprob, is_stop), each [B]; a draw depends on the row's key and position."""
  ids = jnp.arange(logits.shape[-1])
  logits = jnp.where(ids < choice.vocab_size, logits, sampling_ops.REMOVED)
  keys = jax.vmap(jax.random.fold_in)(keys, positions)
  token, logprob = sampling_ops.sample(keys, logits, seen=seen, drawn=choice.drawn, **choice.sampling)
  return token, logprob, jnp.any(token[:, None] == choice.stop_ids, axis=-1)


def _see(seen, token):
  return seen.at[jnp.arange(seen.shape[0]), token].set(True)


@functools.partial(jax.jit, static_argnames='model')
def _start(model, params, tokens, lengths, keys, choice):
  """Returns (the state after prefill and the first token, that token [B], its logprob [B])."""
  logits, cache = prefill(model, params, tokens, lengths)
  seen = jnp.zeros(logits.shape, bool)
  # Padding must not count as seen: it is sent out of range, where a scatter drops it.
  held = jnp.arange(tokens.shape[1]) >= tokens.shape[1] - lengths[:, None]
  ids = jnp.where(held, tokens, logits.shape[-1])
  seen = jax.vmap(lambda row, row_ids: row.at[row_ids].set(True, mode='drop'))(seen, ids)
  token, logprob, done = _choose(choice, logits, seen, keys, lengths)
  return _State(cache, token, done, _see(seen, token), keys), token, logprob


@functools.partial(jax.jit, static_argnames=('model', 'slots'))
def _grow(model, cache, slots):
  return model.grow_cache(cache, slots)


@functools.partial(jax.jit, static_argnames='model', donate_argnames='state')
def _decode_chunk(model, params, state, choice, steps):
  """Returns (state, tokens int32 [B, CHUNK], logprobs [B, CHUNK], the steps done) after `steps` at
  most.

  Stops early when every row is done.  A done row goes on in the dark: its tokens are written as 0.
  """
  batch = state.token.shape[0]

  def unfinished(carry):
    count, state, _, _ = carry
    return (count < steps) & ~jnp.all(state.done)

  def step(carry):
    count, state, tokens, logprobs = carry
    logits, cache = decode_step(model, params, state.cache, state.token[:, None])
    token, logprob, is_stop = _choose(choice, logits[:, 0], state.seen, state.keys, cache.lengths)
    token, logprob = jnp.where(state.done, 0, token), jnp.where(state.done, 0.0, logprob)
    put = lambda rows, new: jax.lax.dynamic_update_slice(rows, new[:, None], (0, count))
    state = _State(cache, token, state.done | is_stop, _see(state.seen, token), state.keys)
    return count + 1, state, put(tokens, token), put(logprobs, logprob)

  blank = jnp.zeros((batch, CHUNK), jnp.int32), jnp.zeros((batch, CHUNK), jnp.float32)
  count, state, tokens, logprobs = jax.lax.while_loop(unfinished, step, (0, state, *blank))
  return state, tokens, logprobs, count


class Generation(NamedTuple):
  """tokens: int32 [B, max_new_tokens], 0 after a row's end.  logprobs: float32, the same shape,
  nats. lengths: int32 [B], tokens of each row, the stop token included where there was one.
  """

  tokens: np.ndarray
  logprobs: np.ndarray
  lengths: np.ndarray


class Generator:
  """A model ready to speak.  Programs are shared by all Generators of the same spec and dtype."""

  def __init__(self, model_spec, params, compute_dtype=jnp.float32, mesh=None, *, bos_id=None,
               vocab_size=None, context_length=None):
    """params: as trained, stacked; held unstacked from here on, matrices in compute_dtype.

    bos_id: what an empty prompt starts from.  vocab_size: the tokenizer's, when the model's is
    rounded up; no token beyond it is ever chosen.  context_length: the length trained on; longer
    rows warn.
    """
    self.spec, self.mesh = model_spec, mesh
    self.model = Model(model_spec, Execution(compute_dtype=jnp.dtype(compute_dtype).name))
    self.bos_id, self.context_length = bos_id, context_length
    self.vocab_size = vocab_size or model_spec.vocab_size
    with self.on_mesh():
      self.params = _prepare(self.model, params)

  def generate(self, prompts, max_new_tokens, sampling=None, key=None, stop_ids=(), drawn_logprobs=False):
    """Returns a Generation: (tokens [B, max_new_tokens], logprobs, lengths).

    prompts: token ids, one int array for each row, of any lengths; each row gets what it would get
    alone.  sampling: a SamplingSpec; None is greedy.  key: a PRNG key, or one for each row [B].
    drawn_logprobs: give the log-probabilities of the distribution that was drawn from, with its
    temperature and what top-p and the like leave, instead of the model's own.
    """
    tokens = np.zeros((len(prompts), max_new_tokens), np.int32)
    logprobs = np.zeros((len(prompts), max_new_tokens), np.float32)
    lengths, at = np.zeros(len(prompts), np.int32), 0
    for new, new_logprobs, counts in self.stream(prompts, max_new_tokens, sampling, key, stop_ids,
                                                 CHUNK, drawn_logprobs):
      tokens[:, at:at + new.shape[1]] = new
      logprobs[:, at:at + new.shape[1]] = new_logprobs
      lengths += counts
      at += new.shape[1]
    return Generation(tokens, logprobs, lengths)

  def past_training(self, prompt_tokens, new_tokens):
    """Returns what to say where rows grow longer than those that the model was trained on, else None."""
    if self.context_length and prompt_tokens + new_tokens > self.context_length:
      return (f'{prompt_tokens} prompt tokens and {new_tokens} new ones go past the {self.context_length} that '
              'the model was trained on; rotary positions allow it, but quality may fall')
    return None

  def stream(self, prompts, max_new_tokens, sampling=None, key=None, stop_ids=(),
             chunk=STREAM_CHUNK, drawn_logprobs=False):
    """Yields (tokens int32 [B, n], logprobs float32 [B, n], counts int32 [B]) as they are made.

    counts: how many of the n belong to each row; a row that has ended has 0.  The first yield is
    one token, right after prefill; then `chunk` at a time, CHUNK at most.  The tokens are the same
    for every chunk.
    """
    prompts = [self._checked(prompt) for prompt in prompts]
    if not prompts or max_new_tokens < 1:
      return
    key = jax.random.key(0) if key is None else key
    longest = max(map(len, prompts))
    if message := self.past_training(longest, max_new_tokens):
      warnings.warn(message, stacklevel=2)
    rows = len(prompts)
    # Every device has as many rows; the added ones repeat the last and are dropped.
    shards = batch_shards(self.mesh) if self.mesh else 1
    prompts += [prompts[-1]] * (-rows % shards)
    padded = np.zeros((len(prompts), bucket(longest)), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
      row[len(row) - len(prompt):] = prompt
    lengths = np.asarray([len(prompt) for prompt in prompts], np.int32)
    # A row's key depends on its place only, so rows added or left out change nothing.
    keys = key if key.ndim else jax.vmap(jax.random.fold_in, (None, 0))(key, np.arange(rows))
    keys = keys[np.minimum(np.arange(len(prompts)), rows - 1)]
    choice = self._choice(sampling, stop_ids, drawn_logprobs)
    done = np.zeros(rows, bool)

    def cut(tokens, logprobs):
      """Drops added rows, and counts each row's tokens up to its stop token."""
      nonlocal done
      tokens, logprobs = self.to_host(tokens)[:rows], self.to_host(logprobs)[:rows]
      stops = np.isin(tokens, stop_ids) & ~done[:, None]
      first = np.where(stops.any(1), stops.argmax(1) + 1, tokens.shape[1])
      counts = np.where(done, 0, first).astype(np.int32)
      done = done | stops.any(1)
      return tokens, logprobs, counts

    with self.on_mesh():
      state, token, logprob = _start(self.model, self.params, self.place_rows(padded),
                                     self.place_rows(lengths), self.place_rows(keys), choice)
    yield cut(token[:, None], logprob[:, None])
    made, slots = 1, padded.shape[1]
    least = max(MIN_BUCKET, MIN_CACHE * MIN_CACHE_ROWS // max(rows, MIN_CACHE_ROWS))
    while made < max_new_tokens and not done.all():
      # The last token is never written into the cache.
      used, total = padded.shape[1] + made - 1, padded.shape[1] + max_new_tokens - 1
      if used == slots:
        slots = bucket(max(min(total, 2 * used), least))
        with self.on_mesh():
          state = state._replace(cache=_grow(self.model, state.cache, slots))
      steps = min(chunk, CHUNK, max_new_tokens - made, slots - used)
      with self.on_mesh():
        state, tokens, logprobs, count = _decode_chunk(self.model, self.params, state, choice, np.int32(steps))
      count = int(self.to_host(count))
      yield cut(tokens[:, :count], logprobs[:, :count])
      made += count

  def _checked(self, prompt):
    prompt = np.asarray(prompt, np.int32).reshape(-1)
    if not prompt.size:
      if self.bos_id is None:
        raise ValueError('an empty prompt needs a beginning: give the Generator a bos_id')
      prompt = np.asarray([self.bos_id], np.int32)
    if prompt.min() < 0 or prompt.max() >= self.spec.vocab_size:
      raise ValueError(f'prompts have token ids {prompt.min()} to {prompt.max()}; the model knows '
                       f'0 to {self.spec.vocab_size - 1}')
    return prompt

  def _choice(self, sampling, stop_ids, drawn=False):
    sampling = sampling or SamplingSpec(temperature=0.0)
    names = ('temperature', 'top_p', 'min_p', 'repetition_penalty')
    values = {name: np.float32(getattr(sampling, name)) for name in names}
    ids = np.full(max(1, -(-len(stop_ids) // STOP_IDS)) * STOP_IDS, -1, np.int32)
    ids[:len(stop_ids)] = stop_ids
    return _Choice({**values, 'top_k': np.int32(sampling.top_k)}, ids, np.int32(self.vocab_size), np.bool_(drawn))

  def on_mesh(self):
    """Returns the context in which its programs run."""
    return jax.set_mesh(self.mesh) if self.mesh else contextlib.nullcontext()

  def place_rows(self, x):
    """Returns a host array [B, ...] on the devices, rows over the mesh."""
    if not self.mesh:
      return x
    sharding = NamedSharding(self.mesh, mesh_spec(('batch',)))
    if sharding.is_fully_addressable:
      return jax.device_put(x, sharding)
    return jax.jit(lambda x: x, out_shardings=sharding)(x)  # Every process has the same x.

  def to_host(self, x):
    """Returns a host array; on a mesh over several processes every one of them gets all rows."""
    if self.mesh and not x.is_fully_addressable:
      x = jax.jit(lambda x: x, out_shardings=NamedSharding(self.mesh, PartitionSpec()))(x)
    return np.asarray(in_flight.wait(x))


@functools.partial(jax.jit, static_argnames='model')
def _prepare(model, params):
  """Returns unstacked parameters; embedding, head and what `Model.cast` casts are in the compute dtype."""
  params = model.cast(model.unstack(params))
  ends = {name: params[name] for name in ('embed', 'head') if name in params}
  return {**params, **jax.tree.map(lambda p: p.astype(model.dtype), ends, is_leaf=is_weight)}
