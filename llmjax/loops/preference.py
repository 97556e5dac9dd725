"""What training on pairs of answers shares: batches of pairs, held-out pairs, the reference's log-probabilities.

Rows 2 i and 2 i + 1 of a batch are the better and the worse answer to one prompt; train.batch_size counts pairs.
"""

import functools

import jax

from llmjax.data import stream
from llmjax.evaluate import margins
from llmjax.parallel.mesh import batch_blocks, batch_shards, place_batch
from llmjax.post import objective
from llmjax.post.spec import REFERENCE_FREE_LOSSES, UNPAIRED_LOSSES
from llmjax.run import loop, start
from llmjax.run.cached_outputs import CachedModel
from llmjax.run.initial import initial_checkpoint, load_initial

REFERENCE = 'ref_logprobs'


def make_job(spec, mesh, batches, loss_fn, columns=None, **options):
  """Returns the loop.Job of a loss_fn on pairs.

  columns: {split: {field: float32 [pairs, 2]}} for the splits that are evaluated.  options: of the Job.
  """
  eval_step = jax.jit(lambda params, frozen, batch: loss_fn(params, frozen, batch, None))

  def evaluator(split):
    described = stream.describe_evaluation(spec.data, split, spec.evaluate.limit)

    def evaluate(params, frozen):
      found = read_split(spec, mesh, split, (columns or {}).get(split), spec.evaluate.limit)
      return {**margins.evaluate(eval_step, params, frozen, found), **described}

    return evaluate

  return loop.Job(spec=spec, mesh=mesh, batches=batches, loss_fn=loss_fn, together=2,
                     evaluators={split: evaluator(split) for split in spec.evaluate.splits},
                     describe=make_describer(spec, batches), **{'sample': None, **options})


def read_split(spec, mesh, split, columns=None, limit=0):
  """Yields the batches, on the devices, with every pair of a split once; at most `limit` pairs where it is not 0."""
  size = start.eval_rows(spec, mesh)
  for batch in stream.eval_batches(spec.data, split, size, limit, blocks=batch_blocks(mesh),
                                 block_count=batch_shards(mesh), columns=columns):
    yield place_batch(mesh, batch)


def make_describer(spec, batches):
  """Returns a function of a batch's number to its pairs as text."""

  def describe(number):
    tokenizer = stream.load_tokenizer(spec.data)
    return [{'source': row['source'], 'pair': row['row'],
             'text': dict(zip(('chosen', 'rejected'), map(tokenizer.decode, row['tokens']), strict=True))}
            for row in batches.describe(number)]

  return describe


# The reference: the model that training begins with.


def preference_job(spec, mesh, batches, workdir):
  """Returns the loop.Job of the spec's preference loss, and its reference as the spec wants it."""
  start.keep_template(spec, workdir)
  model, vocab_size = start.make_model(spec, mesh), stream.vocab_size(spec.data)
  unpaired = spec.preference.loss in UNPAIRED_LOSSES
  loss_fn = (objective.make_unpaired_loss if unpaired else objective.make_pair_loss)(
      spec.preference, model, vocab_size, spec.train.neftune_alpha)
  if spec.preference.loss in REFERENCE_FREE_LOSSES:
    return make_job(spec, mesh, batches, loss_fn)
  score = objective.make_sequence_logprobs(spec.preference, model, vocab_size)
  kept = None if spec.preference.reference == 'disable_adapter' else CachedModel(
      workdir / 'reference', 'reference', 'train.init_from', spec.train.init_from,
      lambda: initial_checkpoint(spec.train.init_from))
  if spec.preference.reference == 'precomputed':
    tables = score_reference(spec, mesh, score, kept)
    batches.attach(REFERENCE, tables['train'])
    return make_job(spec, mesh, batches, loss_fn, {split: {REFERENCE: t} for split, t in tables.items()})
  name = 'reference' if kept else 'base'

  @functools.wraps(loss_fn)
  def with_reference(params, frozen, batch, key):
    found = {REFERENCE: score(frozen[name], batch)}
    if spec.preference.loss == 'kto':
      found[objective.MISMATCHED] = score(frozen[name], objective.mismatch_completions(batch))
    return loss_fn(params, frozen, {**batch, **jax.lax.stop_gradient(found)}, key)

  frozen = {name: lambda: load_initial(spec, mesh, kept.checkpoint())} if kept else {}
  return make_job(spec, mesh, batches, with_reference, frozen=frozen)


def score_reference(spec, mesh, score, kept):
  """Returns {split: dataset.Table, float32 [pairs, 2]}: the sums of the reference's log-probabilities over all answers.

  In nats.  kept: the CachedModel of the reference.
  """
  load = functools.cache(lambda: load_initial(spec, mesh, kept.checkpoint()))
  said = lambda params, batch: {REFERENCE: score(params, batch)}

  def table(split):
    found = kept.outputs(mesh, spec.data, split, f'{spec.preference.ld_alpha:g}', {REFERENCE: 'float32'},
                        (stream.count_examples(spec.data, split), 2),
                        lambda: (said, load(), read_split(spec, mesh, split)))
    return found[REFERENCE]

  return {split: table(split) for split in dict.fromkeys(('train', *spec.evaluate.splits))}
