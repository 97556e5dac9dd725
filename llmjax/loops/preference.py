"""Training on preference pairs: batches, evaluation, and reference log-probabilities.

Sequences 2 i and 2 i + 1 of a batch are the chosen and the rejected completion of one prompt; train.batch_size counts
pairs.
"""

import functools

import jax

from llmjax.data import stream
from llmjax.evaluate import margins
from llmjax.post import objective
from llmjax.post.spec import REFERENCE_FREE_LOSSES, UNPAIRED_LOSSES
from llmjax.run import loop, start
from llmjax.run.cached_outputs import CachedModel
from llmjax.run.initial import initial_checkpoint, load_initial

REFERENCE = 'ref_logprobs'


def make_job(spec, mesh, batches, loss_fn, columns=None, **options):
  """Return the Job of a loss_fn on pairs.

  columns: {split: {field: dataset.Table [pairs, 2]}} of the evaluated splits.  options: further fields of the Job.
  """
  eval_step = jax.jit(lambda params, frozen, batch: loss_fn(params, frozen, batch, None))

  def evaluator(split):
    description = stream.describe_evaluation(spec.data, split, spec.evaluate.limit)

    def evaluate(params, frozen):
      batches = start.read_split(spec, mesh, split, None, spec.evaluate.limit, (columns or {}).get(split))
      return {**margins.evaluate(eval_step, params, frozen, batches), **description}

    return evaluate

  return loop.Job(spec=spec, mesh=mesh, batches=batches, loss_fn=loss_fn, together=2,
                     evaluators={split: evaluator(split) for split in spec.evaluate.splits},
                     describe=make_describer(spec, batches), **{'sample': None, **options})


def make_describer(spec, batches):
  """Return a function from a batch's number to its pairs as text."""

  def describe(number):
    tokenizer = stream.load_tokenizer(spec.data)
    return [{'source': row['source'], 'pair': row['row'],
             'text': dict(zip(('chosen', 'rejected'), map(tokenizer.decode, row['tokens']), strict=True))}
            for row in batches.describe(number)]

  return describe


def preference_job(spec, mesh, batches, workdir):
  """Return the Job of the spec's preference loss.

  The reference model is that of train.init_from.  Its log-probabilities are precomputed, or it is kept in memory, or it
  is the base of the adapters.
  """
  start.keep_template(spec, workdir)
  model, vocab_size = start.make_model(spec, mesh), stream.vocab_size(spec.data)
  unpaired = spec.preference.loss in UNPAIRED_LOSSES
  loss_fn = (objective.make_unpaired_loss if unpaired else objective.make_pair_loss)(
      spec.preference, model, vocab_size, spec.train.neftune_alpha)
  if spec.preference.loss in REFERENCE_FREE_LOSSES:
    return make_job(spec, mesh, batches, loss_fn)
  score = objective.make_sequence_logprobs(spec.preference, model, vocab_size)
  cache = None if spec.preference.reference == 'disable_adapter' else CachedModel(
      workdir / 'reference', 'reference', 'train.init_from', spec.train.init_from,
      lambda: initial_checkpoint(spec.train.init_from))
  if spec.preference.reference == 'precomputed':
    tables = score_reference(spec, mesh, score, cache)
    batches.attach(REFERENCE, tables['train'])
    return make_job(spec, mesh, batches, loss_fn, {split: {REFERENCE: t} for split, t in tables.items()})
  name = 'reference' if cache else 'base'

  @functools.wraps(loss_fn)
  def with_reference(params, frozen, batch, key):
    logprobs = {REFERENCE: score(frozen[name], batch)}
    if spec.preference.loss == 'kto':
      logprobs[objective.MISMATCHED] = score(frozen[name], objective.mismatch_completions(batch))
    return loss_fn(params, frozen, {**batch, **jax.lax.stop_gradient(logprobs)}, key)

  frozen = {name: lambda: load_initial(spec, mesh, cache.checkpoint())} if cache else {}
  return make_job(spec, mesh, batches, with_reference, frozen=frozen)


def score_reference(spec, mesh, score, cache):
  """Return {split: dataset.Table, float32 [pairs, 2]} of the reference's sequence log-probabilities, in nats.

  cache: CachedModel of the reference.
  """
  load = functools.cache(lambda: load_initial(spec, mesh, cache.checkpoint()))
  outputs = lambda params, batch: {REFERENCE: score(params, batch)}

  def of_split(split):
    table = cache.outputs(mesh, spec.data, split, f'{spec.preference.ld_alpha:g}', {REFERENCE: 'float32'},
                        (stream.count_examples(spec.data, split), 2),
                        lambda: (outputs, load(), start.read_split(spec, mesh, split)))
    return table[REFERENCE]

  return {split: of_split(split) for split in dict.fromkeys(('train', *spec.evaluate.splits))}
