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
from llmjax.run import loop, start
from llmjax.train import objectives


def run(spec, options):
  """Train as the spec says in options.workdir; returns the exit status."""
  return start.run(distill.add_projection(spec), options, make_job)


def make_job(spec, mesh, batches, workdir):
  """Return the Job of next-token prediction, or of distillation if the spec has a teacher."""
  tokenizer = stream.load_tokenizer(spec.data)
  encode = lambda text: np.array([tokenizer.bos_id, *tokenizer.encode(text)])
  job = loop.Job(
      spec=spec, mesh=mesh, batches=batches,
      loss_fn=objectives.make_objective(start.make_model(spec, mesh), spec.train),
      evaluators={}, sample=make_sampler(spec, mesh, encode, (tokenizer.eos_id,)),
      describe=make_describer(spec, batches))
  if not spec.distill.teacher:
    return dataclasses.replace(job, evaluators=make_evaluators(spec, mesh))
  teacher = distill.Teacher(spec, mesh, workdir)
  evaluators = make_evaluators(spec, mesh, teacher.evaluate, ('teacher_kl',), teacher.columns)
  job = teacher.add_to(job)
  return dataclasses.replace(job, evaluators=evaluators, describe=make_describer(spec, job.batches))


def make_evaluators(spec, mesh, loss_fn=None, names=(), columns=lambda data, split: None):
  """Return {name: function (params, frozen) -> metrics} of the perplexity evaluations that the spec asks for.

  loss_fn: its sum is the negative log-likelihood of the targets; None: that of the model.  names: sums in its aux whose
  means are reported.  columns: function (DataSpec, split) -> {field: dataset.Table} of further fields of the batches.
  """
  loss_fn = loss_fn or objectives.likelihood(start.make_model(spec, mesh))
  token_bytes = stream.load_tokenizer(spec.data).token_bytes()
  eval_step = perplexity.make_eval_step(loss_fn, token_bytes, names)

  def evaluator(split, sources):
    data = dataclasses.replace(spec.data, sources=sources)
    tables, limit = columns(data, split), spec.evaluate.limit
    description = stream.describe_evaluation(data, split, limit)

    def evaluate(params, frozen):
      batches = start.read_split(spec, mesh, split, data, limit, tables)
      return {**perplexity.evaluate(eval_step, params, frozen, batches, names), **description}

    return evaluate

  return {name: evaluator(split, sources) for name, (split, sources) in spec.evaluations().items()}


def make_describer(spec, batches):
  """Return a function from a batch's number to its sequences as text, a list of {source, row, text}."""

  def describe(number):
    tokenizer = stream.load_tokenizer(spec.data)
    return [{'source': row['source'], 'row': row['row'], 'text': [tokenizer.decode(t) for t in row['tokens']]}
            for row in batches.describe(number)]

  return describe


def make_sampler(spec, mesh, encode, stop_ids):
  """Return the function (params) -> [(prompt, continuation)] of sample.prompts, or None without prompts.

  encode: function from the text of a prompt to token ids.  stop_ids: tokens that end a continuation.
  """
  if not spec.sample.prompts:
    return None
  tokenizer = stream.load_tokenizer(spec.data)
  sampling = SamplingSpec(temperature=spec.sample.temperature, top_p=spec.sample.top_p)
  prompts = [encode(p) for p in spec.sample.prompts]

  def sample(params):
    generator = Generator(spec.model, params, jnp.dtype(spec.train.compute_dtype), mesh,
                          vocab_size=tokenizer.vocab_size)
    generated = generator.generate(prompts, spec.sample.max_new_tokens, sampling, jax.random.key(spec.train.seed),
                                   stop_ids=stop_ids)
    texts = [tokenizer.decode(tokens[:n]) for tokens, n in zip(generated.tokens, generated.lengths, strict=True)]
    return list(zip(spec.sample.prompts, texts, strict=True))

  return sample
