"""Knowledge distillation: a student model learns the output distribution of a teacher model.

Letters: B sequences, T tokens, V vocab, D width, k cached logits of a token.  Losses are sums over masked tokens with
the sum of the mask as weight.  Logits are [B, T, V] of any float, reduced in float32, and only exist for a few tokens
of each sequence at a time (`sum_in_chunks`).
"""

import functools

import jax
import jax.numpy as jnp

from llmjax.ops.chunks import CHUNK_LOGITS, chunk_logits_of, count_chunks, join, split
from llmjax.ops.masked import masked_sum
from llmjax.parallel.sharding import by_rows, sum_over_rows
from llmjax.train.objectives import count_targets, forward, weighed, with_router_losses

# Batch fields of a teacher that is not in memory: log-probabilities float32 and token ids int32, [B, T, k].
TEACHER_FIELDS = ('teacher_logprobs', 'teacher_ids')


def _log_softmax(logits, temperature=1.0):
  return jax.nn.log_softmax(logits.astype(jnp.float32) / temperature, axis=-1)


def _kl(log_p, log_q):
  return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def _sum_and_weight(losses, mask):
  mask = mask.astype(jnp.float32)
  return masked_sum(losses, mask), jnp.sum(mask)


def forward_kl(student, teacher, mask, temperature=1.0):
  """Return (sum, weight) of KL(teacher || student), which is mode-covering.

  teacher: logits, or (log-probabilities, ids) of its top k tokens as `top_k_kl` takes them.
  """
  if isinstance(teacher, tuple):
    return top_k_kl(student, *teacher, mask, temperature)
  return generalized_jsd(student, teacher, mask, beta=0.0, temperature=temperature)


def reverse_kl(student, teacher, mask, temperature=1.0):
  """Return (sum, weight) of KL(student || teacher), which is mode-seeking."""
  return generalized_jsd(student, teacher, mask, beta=1.0, temperature=temperature)


def generalized_jsd(student, teacher, mask, beta=0.5, temperature=1.0):
  """Return (sum, weight) of beta KL(teacher || m) + (1 - beta) KL(student || m), m = beta teacher + (1 - beta) student.

  beta=0 is KL(teacher || student) and beta=1 KL(student || teacher), the limits of the divergence divided by beta and
  by 1 - beta.  The gradient is not scaled by temperature^2.  Source: GKD, arXiv:2306.13649, eq. 1.
  """
  p, q = _log_softmax(teacher, temperature), _log_softmax(student, temperature)
  if beta == 0.0:
    return _sum_and_weight(_kl(p, q), mask)
  if beta == 1.0:
    return _sum_and_weight(_kl(q, p), mask)
  mixture = jnp.logaddexp(p + jnp.log(beta), q + jnp.log1p(-beta))
  return _sum_and_weight(beta * _kl(p, mixture) + (1 - beta) * _kl(q, mixture), mask)


def top_k_kl(student, teacher_logprobs, ids, mask, temperature=1.0):
  """Return (sum, weight) of KL(teacher || student) from the teacher's top k tokens.

  teacher_logprobs: float [B, T, k], at temperature 1.  ids: int [B, T, k].  The remaining probability is treated as one
  more token of both models; at k = V nothing remains and this is `forward_kl`.
  """
  q = jnp.take_along_axis(_log_softmax(student, temperature), ids, axis=-1)
  if temperature != 1.0:  # The remainder's shape at another temperature is unknown: renormalize over the k tokens.
    p, q = _log_softmax(teacher_logprobs, temperature), q - jax.nn.logsumexp(q, axis=-1, keepdims=True)
    return _sum_and_weight(_kl(p, q), mask)
  p = teacher_logprobs.astype(jnp.float32)
  remainder = lambda logprobs: jnp.maximum(1.0 - jnp.sum(jnp.exp(logprobs), axis=-1), 1e-7)
  p_rest, q_rest = remainder(p), remainder(q)
  rest = jnp.where(p_rest > 1e-6, p_rest * (jnp.log(p_rest) - jnp.log(q_rest)), 0.0)
  return _sum_and_weight(_kl(p, q) + rest, mask)


def negative_log_likelihood(student, targets, mask):
  """Return (sum, weight) of -log p(target) in nats.  targets: int [B, T]."""
  logprobs = jnp.take_along_axis(_log_softmax(student), targets[..., None], axis=-1)[..., 0]
  return _sum_and_weight(-logprobs, mask)


def distillation_loss(spec, student, teacher, targets, mask):
  """Return the sums of a DistillSpec's loss on logits: {'loss', 'divergence'}, with loss hinton also 'nll'.

  hinton is alpha T^2 KL(teacher || student at temperature T) + (1 - alpha) cross-entropy; T^2 keeps the scale of the
  soft gradient (arXiv:1503.02531, section 2).  teacher: as in `forward_kl`.
  """
  if spec.loss in ('forward_kl', 'hinton'):
    divergence, _ = forward_kl(student, teacher, mask, spec.temperature)
  else:
    beta = 1.0 if spec.loss == 'reverse_kl' else spec.beta
    divergence, _ = generalized_jsd(student, teacher, mask, beta, spec.temperature)
  if spec.loss != 'hinton':
    return {'loss': divergence, 'divergence': divergence}
  nll, _ = negative_log_likelihood(student, targets, mask)
  loss = spec.alpha * spec.temperature**2 * divergence + (1 - spec.alpha) * nll
  return {'loss': loss, 'divergence': divergence, 'nll': nll}


def hidden_mse(student, teacher, mask):
  """Return (sum, weight) of the mean squared error between hidden states [B, T, D]."""
  difference = student.astype(jnp.float32) - teacher.astype(jnp.float32)
  return _sum_and_weight(jnp.mean(jnp.square(difference), axis=-1), mask)


def hidden_cosine(student, teacher, mask, epsilon=1e-8):
  """Return (sum, weight) of 1 - cos between hidden states [B, T, D] (DistilBERT, arXiv:1910.01108, section 2)."""
  student, teacher = student.astype(jnp.float32), teacher.astype(jnp.float32)
  squared_norm = lambda x: jnp.sum(jnp.square(x), axis=-1)
  # The floor is under the root, so that the gradient of a zero state is finite.
  norms = jnp.sqrt(jnp.maximum(squared_norm(student) * squared_norm(teacher), epsilon**2))
  return _sum_and_weight(1.0 - jnp.sum(student * teacher, axis=-1) / norms, mask)


def sum_in_chunks(loss, student, teacher, *arrays, vocab_axis=(1, 1), soft_cap=(None, None),
                  chunk_logits=CHUNK_LOGITS):
  """Return loss(student logits, teacher logits, *arrays), a tree of sums, computed on a few tokens at a time.

  student, teacher: (hidden states [B, T, D], output matrix); D may differ, and the teacher has no gradient.  teacher:
  None to pass the student's logits alone.  arrays: [B, T, ...]; zeros pad the last chunk, the mask included.
  vocab_axis, soft_cap: of both models.  The backward pass recomputes each chunk's logits; pass matrices in float32, so
  that their gradients are accumulated in it.
  """
  models = [student] if teacher is None else [student, jax.lax.stop_gradient(teacher)]
  hidden, matrices = zip(*models, strict=True)
  vocab = len(models) * matrices[0].shape[vocab_axis[0]]
  chunks = split(count_chunks(hidden[0].shape[:2], vocab, chunk_logits=chunk_logits), hidden, arrays)

  @functools.partial(jax.checkpoint, prevent_cse=False)
  def chunk_loss(matrices, hidden, arrays):
    logits = (chunk_logits_of(*model) for model in zip(hidden, matrices, vocab_axis, soft_cap, strict=False))
    return loss(*logits, *arrays)

  shapes = jax.eval_shape(chunk_loss, matrices, *jax.tree.map(lambda a: a[0], chunks))
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
  add = lambda total, chunk: (jax.tree.map(jnp.add, total, chunk_loss(matrices, *chunk)), None)
  return jax.lax.scan(add, zeros, chunks)[0]


def top_k_logprobs(x, w, k, *, vocab_axis=1, soft_cap=None, chunk_logits=CHUNK_LOGITS):
  """Return (log-probabilities float32, ids int32), [B, T, k], of the k most likely tokens.

  x: hidden states [B, T, D].  w: the output matrix.  Logits exist for a few tokens of each sequence at a time.
  """
  chunks = count_chunks(x.shape[:2], w.shape[vocab_axis], chunk_logits=chunk_logits)
  top_k = lambda x: jax.lax.top_k(_log_softmax(chunk_logits_of(x, w, vocab_axis, soft_cap)), k)
  return join(x.shape[1], *jax.lax.map(top_k, split(chunks, x)[0]))


class Distillation:
  """The loss functions of a student and its teacher, for training and evaluation.

  The teacher's parameters are frozen['teacher']; without them batches have TEACHER_FIELDS.  loss_mask weights the
  targets of all sums.
  """

  def __init__(self, spec, student, teacher, neftune_alpha=0.0):
    """student, teacher: Models with the same vocabulary.  neftune_alpha: noise of the student's embeddings."""
    self.spec, self.student, self.teacher, self._neftune_alpha = spec, student, teacher, neftune_alpha

  @weighed(count_targets)
  def train(self, params, frozen, batch, key):
    """The loss_fn of training; aux: sums `divergence` (nats), `nll` of hinton, `hidden_mse` and `hidden_cosine`."""
    batch = self.student.order(batch)
    x, aux = forward(self.student, params, batch, key, self._neftune_alpha)
    teacher_hidden = self._teacher_hidden(frozen, batch)
    loss = functools.partial(distillation_loss, self.spec)
    sums = self._sum_over_batch(loss, params, x, frozen, teacher_hidden, batch)
    mask = batch['loss_mask'].astype(jnp.float32)
    loss, aux = with_router_losses(sums.pop('loss'), jnp.sum(mask), aux, batch)
    if self.spec.compares_hidden:
      student_hidden = self.student.project_hidden(params, x)
      for name, term, weight in (('hidden_mse', hidden_mse, self.spec.hidden_weight),
                                 ('hidden_cosine', hidden_cosine, self.spec.cosine_weight)):
        if weight:
          sums[name], _ = term(student_hidden, teacher_hidden, mask)
          loss = loss + weight * sums[name]
    return loss, (jnp.sum(mask), {**jax.lax.stop_gradient(sums), **aux})

  def evaluate(self, params, frozen, batch, key=None):
    """The loss_fn of evaluation: negative log-likelihood ; aux: `teacher_kl`, KL(teacher || student)."""
    def loss(student, teacher, targets, mask):
      return {'nll': negative_log_likelihood(student, targets, mask)[0],
              'teacher_kl': forward_kl(student, teacher, mask)[0]}

    batch = self.student.order(batch)
    x, _ = forward(self.student, params, batch, key)
    sums = self._sum_over_batch(loss, params, x, frozen, self._teacher_hidden(frozen, batch), batch)
    return sums.pop('nll'), (jnp.sum(batch['loss_mask'].astype(jnp.float32)), sums)

  def top_k(self, params, batch):
    """Return the TEACHER_FIELDS of a batch, [B, T, k].  params: the teacher's."""
    batch = self.teacher.order(batch)
    x, _ = forward(self.teacher, params, batch)
    matrix, vocab_axis = self.teacher.output_matrix(params)
    top_k = lambda w, x: top_k_logprobs(x, w, self.spec.top_k, vocab_axis=vocab_axis, **self.teacher.chunking)
    outputs = by_rows(top_k, x, weights=matrix.astype(self.teacher.dtype))
    return dict(zip(TEACHER_FIELDS, map(self.teacher.restore, outputs), strict=True))

  def _teacher_hidden(self, frozen, batch):
    """Return the teacher's final hidden states of an ordered batch, or None where it is not in memory."""
    if 'teacher' not in (frozen or {}):
      return None
    return jax.lax.stop_gradient(forward(self.teacher, frozen['teacher'], batch)[0])

  def _sum_over_batch(self, loss, params, x, frozen, teacher_hidden, batch):
    """Return loss(student logits, teacher logits or top k, targets, mask), summed over all tokens."""
    matrix, axis = self.student.output_matrix(params)
    chunking = {**self.student.chunking, 'soft_cap': (self.student.chunking['soft_cap'],
                                                      self.teacher.chunking['soft_cap'])}
    labels = batch['targets'], batch['loss_mask']
    if teacher_hidden is None:
      with_top_k = lambda logits, logprobs, ids, *labels: loss(logits, (logprobs, ids), *labels)

      def sums(matrix, x, *arrays):
        return sum_in_chunks(with_top_k, (x, matrix), None, *arrays, vocab_axis=(axis,), **chunking)

      return sum_over_rows(sums, matrix, x, *(batch[name] for name in TEACHER_FIELDS), *labels)
    teacher_matrix, teacher_axis = self.teacher.output_matrix(jax.lax.stop_gradient(frozen['teacher']))

    def sums(matrices, x, teacher_hidden, *labels):
      return sum_in_chunks(loss, (x, matrices[0]), (teacher_hidden, matrices[1]), *labels,
                           vocab_axis=(axis, teacher_axis), **chunking)

    return sum_over_rows(sums, (matrix, teacher_matrix), x, teacher_hidden, *labels)
