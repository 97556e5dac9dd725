"""Generation: prefill, decode steps with a KV cache, and a Generator that runs them in chunks.

Letters: B batch, P prompt slots, S cache slots, T tokens of one step, V vocab_size.

Prompts are padded on the left, so that the next token of every sequence goes into the same slot and the cache is
updated in place.  Slots store the positions and segments of their tokens, so the padding does not change the logits.
The number of slots is rounded up to a bucket; compiled programs depend on the bucket and not on the length.
"""

import contextlib
import functools
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from llmjax.generate.spec import SamplingSpec
from llmjax.model.model import Execution, Model
from llmjax.ops import sampling as sampling_ops
from llmjax.ops.products import is_weight
from llmjax.parallel import in_flight
from llmjax.parallel.mesh import batch_shards
from llmjax.parallel.sharding import constrain, mesh_spec

CHUNK = 64  # Maximum number of tokens that a program generates: 64 host round trips become one.
STREAM_CHUNK = 12  # The same when the text is streamed to a reader.
MIN_BUCKET = 32  # Fewer slots save no time.
# Initial slots of the cache of up to MIN_CACHE_ROWS sequences, so that a short completion needs one compilation; for
# more sequences, whose every slot costs time, the total is the same.
MIN_CACHE, MIN_CACHE_ROWS = 256, 8
STOP_IDS = 8  # Stop token ids are padded to a multiple of this, so that their number does not recompile the program.


def bucket(length, minimum=MIN_BUCKET):
  """Return the smallest of 4, 5, 6 or 7 times a power of two that is at least `length` and `minimum`.

  Four programs per doubling, with at most a fifth of the slots unused.
  """
  length = max(length, minimum)
  unit = 1 << max(0, (length - 1).bit_length() - 3)
  return -(-length // unit) * unit


def prefill(model, params, tokens, lengths, step=1):
  """Run the prompts; return (float32 logits [B, V] of the next token, a full cache of P slots).

  params: unstacked (`Model.unstack`).  tokens: int32 [B, P], padded on the left.  lengths: int32 [B], at least 1.
  step: maximum number of tokens of a later `decode_step`.
  """
  batch, slots = tokens.shape
  # Padding has negative positions: aligned masks need positions that rise along the sequence.
  positions = (jnp.arange(slots) - (slots - lengths[:, None])).astype(jnp.int32)
  inputs = {'tokens': tokens, 'positions': positions, 'segment_ids': (positions >= 0).astype(jnp.int32)}
  x, cache, _ = model.apply(params, inputs, cache=_pin(model.init_cache(batch, slots, step)))
  return model.logits(params, x[:, -1]), cache


def decode_step(model, params, cache, tokens):
  """Run the next tokens; return (float32 logits [B, T, V] of the token after each, the updated cache).

  tokens: int32 [B, T]; T is 1 in plain decoding, more to verify a draft or to extend a prompt.  The cache must have T
  free slots.
  """
  positions = cache.lengths[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)
  inputs = {'tokens': tokens, 'positions': positions, 'segment_ids': jnp.ones_like(positions)}
  x, cache, _ = model.apply(params, inputs, cache=cache)
  return model.logits(params, x), _pin(cache)


def _pin(cache):
  """Shard the cache over the mesh that is set: sequences over data, heads over tensor."""
  return cache.replace(layers=jax.tree.map(lambda x: constrain(x, 'batch', 'kv_heads', None, None), cache.layers))


class _State(NamedTuple):
  """Carry of the decode loop.

  token: int32 [B], the last token, not yet in the cache.  done: bool [B], whether a stop token was generated.
  seen: bool [B, V], the tokens of the sequence.  keys: [B], a PRNG key per sequence.
  """

  cache: Any  # Of `Model.init_cache`.
  token: jax.Array
  done: jax.Array
  seen: jax.Array
  keys: jax.Array


class _Choice(NamedTuple):
  """Traced parameters of sampling.

  sampling: arguments of `ops.sampling.sample`.  stop_ids: int32, padded with -1.  vocab_size: of the tokenizer.
  sampled_logprobs: whether to return log-probabilities of the sampling distribution, see `ops.sampling.sample`.
  """

  sampling: dict
  stop_ids: jax.Array
  vocab_size: jax.Array
  sampled_logprobs: jax.Array


def _choose(choice, logits, seen, keys, positions):
  """Sample by the sequences' keys and positions; return (token, logprob, is_stop), each [B]."""
  ids = jnp.arange(logits.shape[-1])
  logits = jnp.where(ids < choice.vocab_size, logits, sampling_ops.REMOVED)
  keys = jax.vmap(jax.random.fold_in)(keys, positions)
  token, logprob = sampling_ops.sample(keys, logits, seen=seen, drawn=choice.sampled_logprobs, **choice.sampling)
  return token, logprob, jnp.any(token[:, None] == choice.stop_ids, axis=-1)


def _see(seen, token):
  return seen.at[jnp.arange(seen.shape[0]), token].set(True)


@functools.partial(jax.jit, static_argnames='model')
def _start(model, params, tokens, lengths, keys, choice):
  """Prefill and sample the first token; return (state, that token [B], its logprob [B])."""
  logits, cache = prefill(model, params, tokens, lengths)
  seen = jnp.zeros(logits.shape, bool)
  # Padding does not count as seen: its ids are out of range, where a scatter drops them.
  is_token = jnp.arange(tokens.shape[1]) >= tokens.shape[1] - lengths[:, None]
  ids = jnp.where(is_token, tokens, logits.shape[-1])
  seen = jax.vmap(lambda row, row_ids: row.at[row_ids].set(True, mode='drop'))(seen, ids)
  token, logprob, done = _choose(choice, logits, seen, keys, lengths)
  return _State(cache, token, done, _see(seen, token), keys), token, logprob


@functools.partial(jax.jit, static_argnames=('model', 'slots'))
def _grow(model, cache, slots):
  return model.grow_cache(cache, slots)


@functools.partial(jax.jit, static_argnames='model', donate_argnames='state')
def _decode_chunk(model, params, state, choice, steps):
  """Run at most `steps` decode steps; return (state, tokens int32 [B, CHUNK], logprobs [B, CHUNK], steps done).

  Stops early when every sequence is done.  Tokens after the end of a sequence are 0.
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
  """Completions: tokens int32 [B, max_new_tokens], 0 after the end; logprobs float32 of the same shape, in nats.

  lengths: int32 [B], tokens of each completion, its stop token included.
  """

  tokens: np.ndarray
  logprobs: np.ndarray
  lengths: np.ndarray


class Generator:
  """Generates completions.  All Generators of the same spec and dtype share their compiled programs."""

  def __init__(self, model_spec, params, compute_dtype=jnp.float32, mesh=None, *, bos_id=None,
               vocab_size=None, context_length=None):
    """Unstack and cast the parameters.

    params: as trained, stacked.  bos_id: first token of an empty prompt.  vocab_size: the tokenizer's, if the model's
    is rounded up; tokens beyond it are never sampled.  context_length: training length; longer sequences warn.
    """
    self.spec, self.mesh = model_spec, mesh
    self.model = Model(model_spec, Execution(compute_dtype=jnp.dtype(compute_dtype).name))
    self.bos_id, self.context_length = bos_id, context_length
    self.vocab_size = vocab_size or model_spec.vocab_size
    with self.on_mesh():
      self.params = _prepare(self.model, params)

  def generate(self, prompts, max_new_tokens, sampling=None, key=None, stop_ids=(), drawn_logprobs=False):
    """Generate completions; return a Generation.

    prompts: list of int arrays of token ids; the result does not depend on which prompts share the batch.  sampling: a
    SamplingSpec; None: greedy decoding.  key: a PRNG key, or [B] keys, one per prompt.  drawn_logprobs: return
    log-probabilities of the sampling distribution (temperature, top-k, top-p, min-p) instead of the model's.
    """
    tokens = np.zeros((len(prompts), max_new_tokens), np.int32)
    logprobs = np.zeros((len(prompts), max_new_tokens), np.float32)
    lengths, start = np.zeros(len(prompts), np.int32), 0
    for new, new_logprobs, counts in self.stream(prompts, max_new_tokens, sampling, key, stop_ids,
                                                 CHUNK, drawn_logprobs):
      stop = start + new.shape[1]
      tokens[:, start:stop], logprobs[:, start:stop] = new, new_logprobs
      lengths, start = lengths + counts, stop
    return Generation(tokens, logprobs, lengths)

  def past_training(self, prompt_tokens, new_tokens):
    """Return a warning if sequences get longer than the training length, else None."""
    if self.context_length and prompt_tokens + new_tokens > self.context_length:
      return (f'{prompt_tokens} prompt tokens and {new_tokens} new ones go past the {self.context_length} that '
              'the model was trained on; rotary positions allow it, but quality may fall')
    return None

  def stream(self, prompts, max_new_tokens, sampling=None, key=None, stop_ids=(),
             chunk=STREAM_CHUNK, drawn_logprobs=False):
    """Yield (tokens int32 [B, n], logprobs float32 [B, n], counts int32 [B]) while generating.

    counts: how many of the n tokens belong to each completion, 0 after its end.  The first chunk is the token after
    prefill; the others have up to `chunk` tokens, at most CHUNK.  The tokens do not depend on `chunk`.
    """
    prompts = [self._checked(prompt) for prompt in prompts]
    if not prompts or max_new_tokens < 1:
      return
    key = jax.random.key(0) if key is None else key
    longest = max(map(len, prompts))
    if message := self.past_training(longest, max_new_tokens):
      warnings.warn(message, stacklevel=2)
    rows = len(prompts)
    # Every device has the same number of sequences; added ones repeat the last and are dropped.
    shards = batch_shards(self.mesh) if self.mesh else 1
    prompts += [prompts[-1]] * (-rows % shards)
    padded = np.zeros((len(prompts), bucket(longest)), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
      row[len(row) - len(prompt):] = prompt
    lengths = np.asarray([len(prompt) for prompt in prompts], np.int32)
    # A sequence's key depends on its index alone, not on the size of the batch.
    keys = key if key.ndim else jax.vmap(jax.random.fold_in, (None, 0))(key, np.arange(rows))
    keys = keys[np.minimum(np.arange(len(prompts)), rows - 1)]
    choice = self._choice(sampling, stop_ids, drawn_logprobs)
    done = np.zeros(rows, bool)

    def cut(tokens, logprobs):
      """Drop added sequences, and count the tokens of each up to its stop token."""
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
    generated, slots = 1, padded.shape[1]
    least = max(MIN_BUCKET, MIN_CACHE * MIN_CACHE_ROWS // max(rows, MIN_CACHE_ROWS))
    while generated < max_new_tokens and not done.all():
      # The last token is never written into the cache.
      used, total = padded.shape[1] + generated - 1, padded.shape[1] + max_new_tokens - 1
      if used == slots:
        slots = bucket(max(min(total, 2 * used), least))
        with self.on_mesh():
          state = state._replace(cache=_grow(self.model, state.cache, slots))
      steps = min(chunk, CHUNK, max_new_tokens - generated, slots - used)
      with self.on_mesh():
        state, tokens, logprobs, count = _decode_chunk(self.model, self.params, state, choice, np.int32(steps))
      count = int(self.to_host(count))
      yield cut(tokens[:, :count], logprobs[:, :count])
      generated += count

  def _checked(self, prompt):
    prompt = np.asarray(prompt, np.int32).reshape(-1)
    if not prompt.size:
      if self.bos_id is None:
        raise ValueError('an empty prompt needs a first token: give the Generator a bos_id')
      prompt = np.asarray([self.bos_id], np.int32)
    if prompt.min() < 0 or prompt.max() >= self.spec.vocab_size:
      raise ValueError(f'prompts have token ids {prompt.min()} to {prompt.max()}; the model has '
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
    """Return the context manager that sets the mesh."""
    return jax.set_mesh(self.mesh) if self.mesh else contextlib.nullcontext()

  def place_rows(self, x):
    """Put a host array [B, ...] on the devices, sequences sharded over the mesh."""
    if not self.mesh:
      return x
    sharding = NamedSharding(self.mesh, mesh_spec(('batch',)))
    if sharding.is_fully_addressable:
      return jax.device_put(x, sharding)
    return jax.jit(lambda x: x, out_shardings=sharding)(x)  # Every process has the same x.

  def to_host(self, x):
    """Return a host array, whole on every process."""
    if self.mesh and not x.is_fully_addressable:
      x = jax.jit(lambda x: x, out_shardings=NamedSharding(self.mesh, PartitionSpec()))(x)
    return np.asarray(in_flight.wait(x))


@functools.partial(jax.jit, static_argnames='model')
def _prepare(model, params):
  """Unstack the parameters; those that `Model.cast` casts, embedding and head get the compute dtype."""
  params = model.cast(model.unstack(params))
  ends = {name: {**params[name]} for name in ('embed', 'head') if name in params}
  bias = ends['embed'].pop('relative_bias', None)
  ends = jax.tree.map(lambda p: p.astype(model.dtype), ends, is_leaf=is_weight)
  if bias is not None:
    ends['embed']['relative_bias'] = bias
  return {**params, **ends}
