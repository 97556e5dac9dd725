"""Distillation: a student that imitates the distribution of a teacher.

Letters: B rows, T tokens, V vocab, D width.  Losses are sums over masked tokens, with the mask's sum as weight:
prompt and padding never enter.  Logits are [B, T, V] of any float, reduced in float32; `in_chunks` makes them
a few tokens at a time.
"""

import functools

import jax
import jax.numpy as jnp

from llmjax.ops.chunks import CHUNK_LOGITS, chunk_logits_of, count_chunks, join, split
from llmjax.ops.masked import masked_sum


def _log_softmax(logits, temperature=1.0):
  return jax.nn.log_softmax(logits.astype(jnp.float32) / temperature, axis=-1)


def _weighed(losses, mask):
  mask = mask.astype(jnp.float32)
  return masked_sum(losses, mask), jnp.sum(mask)


def forward_kl(student, teacher, mask, temperature=1.0):
  """Returns (sum, weight) of KL(teacher || student), which covers all that the teacher does."""
  return generalised_jsd(student, teacher, mask, beta=0.0, temperature=temperature)


def reverse_kl(student, teacher, mask, temperature=1.0):
  """Returns (sum, weight) of KL(student || teacher), which seeks the teacher's modes."""
  return generalised_jsd(student, teacher, mask, beta=1.0, temperature=temperature)


def generalised_jsd(student, teacher, mask, beta=0.5, temperature=1.0):
  """Returns (sum, weight) of beta KL(teacher || m) + (1 - beta) KL(student || m).

  m = beta teacher + (1 - beta) student.
  beta=0 is KL(teacher || student) and beta=1 KL(student || teacher), the limits of the divergence over beta and
  over 1 - beta.  No T^2.  Source: GKD, arXiv:2306.13649, eq. 1.
  """
  p, q = _log_softmax(teacher, temperature), _log_softmax(student, temperature)
  divergence = lambda a, b: jnp.sum(jnp.exp(a) * (a - b), axis=-1)
  if beta == 0.0:
    return _weighed(divergence(p, q), mask)
  if beta == 1.0:
    return _weighed(divergence(q, p), mask)
  mixed = jnp.logaddexp(p + jnp.log(beta), q + jnp.log1p(-beta))
  return _weighed(beta * divergence(p, mixed) + (1 - beta) * divergence(q, mixed), mask)


def negative_log_likelihood(student, targets, mask):
  """Returns (sum, weight) of -log p(target) in nats.  targets: int [B, T]."""
  return _weighed(-jnp.take_along_axis(_log_softmax(student), targets[..., None], axis=-1)[..., 0], mask)


def hinton(student, teacher, targets, mask, temperature=2.0, alpha=0.5):
  """Returns (sum, weight) of alpha T^2 KL(teacher || student at T) + (1 - alpha) cross-entropy.

  T^2 holds the size of the soft gradient whatever T is.  Source: arXiv:1503.02531, section 2.
  """
  soft, weight = forward_kl(student, teacher, mask, temperature)
  hard, _ = negative_log_likelihood(student, targets, mask)
  return mix(soft, hard, temperature, alpha), weight


def mix(soft, hard, temperature, alpha):
  """Returns alpha T^2 soft + (1 - alpha) hard."""
  return alpha * temperature**2 * soft + (1 - alpha) * hard


def imitation(spec, student, teacher, targets, mask):
  """Returns sums of a DistillSpec's terms on logits [B, T, V]: {'loss', 'divergence'}, hinton's 'nll' as well.

  teacher: logits, or (values, ids) as of `top_k_kl`.
  """
  if isinstance(teacher, tuple):
    soft, _ = top_k_kl(student, *teacher, mask, spec.temperature)
  else:
    beta = {'reverse_kl': 1.0, 'jsd': spec.beta}.get(spec.loss, 0.0)
    soft, _ = generalised_jsd(student, teacher, mask, beta, spec.temperature)
  if spec.loss != 'hinton':
    return {'loss': soft, 'divergence': soft}
  hard, _ = negative_log_likelihood(student, targets, mask)
  return {'loss': mix(soft, hard, spec.temperature, spec.alpha), 'divergence': soft, 'nll': hard}


def top_k_kl(student, values, ids, mask, temperature=1.0):
  """Returns (sum, weight) of KL(teacher || student) where only the teacher's likeliest k words are known.

  values: float [B, T, k], the teacher's log-probabilities (at temperature 1).  ids: int [B, T, k].  What
  probability they leave is one word more for both, so that the student learns how much is left, too; at
  k = V there is none and this is `forward_kl`.
  """
  q = _log_softmax(student, temperature)
  q = jnp.take_along_axis(q, ids, axis=-1)
  if temperature == 1.0:
    p = values.astype(jnp.float32)
  else:  # The rest has no known shape under another temperature: only the words that are known count.
    p, q = _log_softmax(values, temperature), q - jax.nn.logsumexp(q, axis=-1, keepdims=True)
    return _weighed(jnp.sum(jnp.exp(p) * (p - q), axis=-1), mask)
  rest = lambda a: jnp.maximum(1.0 - jnp.sum(jnp.exp(a), axis=-1), 1e-7)
  p_rest, q_rest = rest(p), rest(q)
  known = jnp.sum(jnp.exp(p) * (p - q), axis=-1)
  return _weighed(known + jnp.where(p_rest > 1e-6, p_rest * (jnp.log(p_rest) - jnp.log(q_rest)), 0.0), mask)


def hidden_mse(student, teacher, mask):
  """Returns (sum, weight) of the mean squared difference of hidden states [B, T, D]."""
  difference = student.astype(jnp.float32) - teacher.astype(jnp.float32)
  return _weighed(jnp.mean(jnp.square(difference), axis=-1), mask)


def hidden_cosine(student, teacher, mask, epsilon=1e-8):
  """Returns (sum, weight) of 1 - cos of hidden states [B, T, D]: DistilBERT's (arXiv:1910.01108, section 2)."""
  student, teacher = student.astype(jnp.float32), teacher.astype(jnp.float32)
  square = lambda x: jnp.sum(jnp.square(x), axis=-1)
  # The root of the product's floor, so that a state of zeros has a gradient.
  norms = jnp.sqrt(jnp.maximum(square(student) * square(teacher), epsilon**2))
  return _weighed(1.0 - jnp.sum(student * teacher, axis=-1) / norms, mask)


def in_chunks(loss, student, teacher, *rows, vocab_axis=(1, 1), soft_cap=(None, None), chunk_logits=CHUNK_LOGITS):
  """Returns loss(student logits, teacher logits, *rows), a tree of sums, with logits of a few tokens of rows at a time.

  student, teacher: (hidden states [B, T, D], output matrix); the teacher's D may differ, and it has no gradient.
  teacher: None where the rows say what it does; the loss gets the student's logits alone then.  rows: arrays
  [B, T, ...]; what pads the last chunk are zeros, of the mask, too.  vocab_axis, soft_cap: of both.  The backward
  pass makes each chunk's logits again; give matrices in float32, so that the gradient is summed in it.
  """
  models = [student] if teacher is None else [student, jax.lax.stop_gradient(teacher)]
  hidden, matrices = zip(*models, strict=True)
  vocab = len(models) * matrices[0].shape[vocab_axis[0]]
  parts = split(count_chunks(hidden[0].shape[:2], vocab, chunk_logits=chunk_logits), hidden, rows)

  @functools.partial(jax.checkpoint, prevent_cse=False)
  def one_chunk(matrices, hidden, rows):
    made = zip(hidden, matrices, vocab_axis, soft_cap, strict=False)
    return loss(*(chunk_logits_of(*each) for each in made), *rows)

  shapes = jax.eval_shape(one_chunk, matrices, *jax.tree.map(lambda a: a[0], parts))
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
  return jax.lax.scan(lambda total, chunk: (jax.tree.map(jnp.add, total, one_chunk(matrices, *chunk)), None), zeros,
                      parts)[0]


def top_k(x, w, k, *, vocab_axis=1, soft_cap=None, chunk_logits=CHUNK_LOGITS):
  """Returns (values float32 [B, T, k], ids int32 [B, T, k]): the likeliest words' log-probabilities.

  x: hidden states [B, T, D].  w: the output matrix.  Logits of a few tokens of each row exist at a time.
  """
  chunks = count_chunks(x.shape[:2], w.shape[vocab_axis], chunk_logits=chunk_logits)
  likeliest = lambda x: jax.lax.top_k(_log_softmax(chunk_logits_of(x, w, vocab_axis, soft_cap)), k)
  return join(x.shape[1], *jax.lax.map(likeliest, split(chunks, x)[0]))
