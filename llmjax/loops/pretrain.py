"""`llmjax pretrain`: next-token prediction on prepared corpora."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from llmjax.data import stream
from llmjax.evaluate import perplexity
from llmjax.generate.decode import Generator
from llmjax.generate.spec import SamplingSpec
from llmjax.loops import distill
from llmjax.parallel.mesh import batch_blocks, batch_shards, place_batch
from llmjax.run import loop, start
from llmjax.train import objectives


def run(spec, options):
  """Trains what the spec says in options.workdir; returns the exit status."""
  return start.run(distill.settle(spec), options, make_job)


def make_job(spec, mesh, batches, workdir):
  """Returns the loop.Job of next-token prediction on the spec's data, or of a teacher's predictions."""
  tokenizer = stream.load_tokenizer(spec.data)
  encode = lambda text: np.array([tokenizer.bos_id, *tokenizer.encode(text)])
  job = loop.Job(
      spec=spec, mesh=mesh, batches=batches,
      loss_fn=objectives.make_objective(start.make_model(spec, mesh), spec.train),
      evaluators={}, sample=make_sampler(spec, mesh, encode, (tokenizer.eos_id,)),
      describe=make_describer(spec, batches))
  if not spec.distill.teacher:
    return dataclasses.replace(job, evaluators=make_evaluators(spec, mesh))
  lessons = distill.Lessons(spec, mesh, workdir)
  evaluators = make_evaluators(spec, mesh, lessons.evaluate, ('teacher_kl',), lessons.columns)
  job = lessons.teach(job)
  return dataclasses.replace(job, evaluators=evaluators, describe=make_describer(spec, job.batches))


def make_evaluators(spec, mesh, loss_fn=None, names=(), columns=lambda data, split: None):
  """Returns {name of an evaluation: function of (params, frozen) to perplexity, bits per byte, and what they are of}.

  loss_fn: whose sum is the targets' negative log-likelihood; what else an evaluation gets it gets, too.  names: of
  sums in its aux whose means are reported.  columns: function of the DataSpec and split to fields of their batches.
  """
  loss_fn = loss_fn or objectives.likelihood(start.make_model(spec, mesh))
  token_bytes = stream.load_tokenizer(spec.data).token_bytes()
  eval_step = perplexity.make_eval_step(loss_fn, token_bytes, names)
  batch_size = start.eval_rows(spec, mesh)

  def evaluator(split, sources):
    data = dataclasses.replace(spec.data, sources=sources)
    found = columns(data, split)
    described = stream.describe_evaluation(data, split, spec.evaluate.limit)

    def evaluate(params, frozen):
      batches = stream.eval_batches(data, split, batch_size, spec.evaluate.limit, blocks=batch_blocks(mesh),
                                    block_count=batch_shards(mesh), columns=found)
      values = perplexity.evaluate(eval_step, params, frozen, (place_batch(mesh, b) for b in batches), names)
      return {**values, **described}

    return evaluate

  return {name: evaluator(*what) for name, what in spec.evaluations().items()}


def make_describer(spec, batches):
  """Returns a function of a batch's number to its rows as text: a list of {source, row, text}."""

  def describe(number):
    tokenizer = stream.load_tokenizer(spec.data)
    return [{'source': row['source'], 'row': row['row'], 'text': [tokenizer.decode(t) for t in row['tokens']]}
            for row in batches.describe(number)]

  return describe


def make_sampler(spec, mesh, encode, stop_ids):
  """Returns a function of the parameters to [(prompt, continuation)], or None without prompts.

  encode: function of a prompt's text to its ids.  stop_ids: tokens that end a continuation.
  """
  if not spec.sample.prompts:
    return None
  tokenizer = stream.load_tokenizer(spec.data)
  sampling = SamplingSpec(temperature=spec.sample.temperature, top_p=spec.sample.top_p)
  prompts = [encode(p) for p in spec.sample.prompts]

  def sample(params):
    generator = Generator(spec.model, params, jnp.dtype(spec.train.compute_dtype), mesh,
                          vocab_size=tokenizer.vocab_size)
    made = generator.generate(prompts, spec.sample.max_new_tokens, sampling,
                              jax.random.key(spec.train.seed), stop_ids=stop_ids)
    texts = [tokenizer.decode(tokens[:n]) for tokens, n in zip(made.tokens, made.lengths, strict=True)]
    return list(zip(spec.sample.prompts, texts, strict=True))

  return sample
