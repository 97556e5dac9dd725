"""`llmjax pretrain`: next-token prediction on prepared corpora."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np

from llmjax.config import ConfigError
from llmjax.data import stream
from llmjax.evaluate import perplexity
from llmjax.generate.decode import Generator
from llmjax.generate.spec import SamplingSpec
from llmjax.loops import determinism, doctor, harness
from llmjax.loops.doctor import require_platform
from llmjax.loops.environment import describe_data, describe_environment
from llmjax.loops.ledger import Ledger, process_age
from llmjax.parallel import distributed
from llmjax.parallel.host import share_arena
from llmjax.parallel.mesh import batch_blocks, batch_shards, make_mesh, place_batch
from llmjax.train import objectives


def run(spec, options):
  """Trains what the spec says in options.workdir; returns the exit status."""
  ledger = Ledger(options.workdir, age=process_age())
  if spec.train.deterministic:
    determinism.require()
  if not doctor.accelerator_present():
    share_arena()
  with distributed.together(spec.distributed), harness.hold_workdir(options.workdir):
    return _train(spec, options, ledger)


def _train(spec, options, ledger):
  with ledger.charge('init'):
    harness.enable_compilation_cache(spec.train.compilation_cache)
    require_platform(spec.train.platform)
    spec = resolve(spec)
    workdir = harness.claim_workdir(options.workdir, spec)
    mesh = make_mesh(spec.mesh)
    check_mesh(spec, mesh)
    objectives.require_remat(spec.train.remat, mesh.devices.flat[0])
    if distributed.is_first():
      for name, content in (('environment', describe_environment(mesh)),
                            ('data', describe_data(spec.data))):
        (workdir / f'{name}.json').write_text(json.dumps(content, indent=2) + '\n')
      if not (any((workdir / 'checkpoints').glob('[0-9]*')) and (workdir / 'tokenizer.model').exists()):
        shutil.copyfile(stream.load_tokenizer(spec.data).path, workdir / 'tokenizer.model')
    batches = stream.open_stream(
        spec.data, batch_size=spec.train.batch_size, seed=spec.train.seed,
        blocks=batch_blocks(mesh), block_count=batch_shards(mesh))
  platform = mesh.devices.flat[0].platform
  job = harness.Job(
      spec=spec, mesh=mesh, batches=batches, ledger=ledger,
      loss_fn=objectives.next_token(spec.model, spec.train, platform, spec.pipeline),
      evaluators=make_evaluators(spec, mesh), sample=make_sampler(spec, mesh),
      describe=make_describer(spec, batches))
  with jax.set_mesh(mesh):
    return harness.train(job, workdir)


def resolve(spec):
  """Returns the spec with everything filled in that the data and the mesh decide."""
  vocab_size = spec.model.vocab_size
  if not vocab_size:
    # A multiple of 128 shards evenly and fills a TPU's lanes.
    vocab_size = -(-stream.vocab_size(spec.data) // 128) * 128
  return dataclasses.replace(spec, model=dataclasses.replace(spec.model, vocab_size=vocab_size))


def check_mesh(spec, mesh):
  """Raises ConfigError when the mesh, now that its sizes are known, does not divide the run's arrays."""
  sizes = {axis: size // getattr(spec.mesh, f'dcn_{axis}', 1) for axis, size in mesh.shape.items()}
  if problems := list(spec.mesh_problems(dataclasses.replace(spec.mesh, **sizes))):
    raise ConfigError(problems)


def make_evaluators(spec, mesh):
  """Returns {split: function of the parameters to perplexity and bits per byte}."""
  loss_fn = objectives.likelihood(spec.model, spec.train, mesh.devices.flat[0].platform, spec.pipeline)
  token_bytes = stream.load_tokenizer(spec.data).token_bytes()
  eval_step = perplexity.make_eval_step(loss_fn, token_bytes)
  shards = batch_shards(mesh) * max(spec.pipeline.microbatches // mesh.shape['stage'], 1)
  batch_size = -(-(spec.evaluate.batch_size or spec.train.batch_size) // shards) * shards

  def evaluator(split):
    def evaluate(params):
      limit = -(-spec.evaluate.limit // batch_size) or None  # Rows to batches.
      batches = stream.eval_batches(
          spec.data, split, batch_size, limit, blocks=batch_blocks(mesh), block_count=batch_shards(mesh))
      return perplexity.evaluate(eval_step, params, (place_batch(mesh, b) for b in batches))

    return evaluate

  return {split: evaluator(split) for split in spec.evaluate.splits}


def make_describer(spec, batches):
  """Returns a function of a batch's number to its rows as text: a list of {source, row, text}."""

  def describe(number):
    tokenizer = stream.load_tokenizer(spec.data)
    return [{'source': row['source'], 'row': row['row'], 'text': [tokenizer.decode(t) for t in row['tokens']]}
            for row in batches.describe(number)]

  return describe


def make_sampler(spec, mesh):
  """Returns a function of the parameters to [(prompt, continuation)], or None without prompts."""
  if not spec.sample.prompts:
    return None
  tokenizer = stream.load_tokenizer(spec.data)
  sampling = SamplingSpec(temperature=spec.sample.temperature, top_p=spec.sample.top_p)
  prompts = [np.array([tokenizer.bos_id, *tokenizer.encode(p)]) for p in spec.sample.prompts]

  def sample(params):
    generator = Generator(spec.model, params, jnp.dtype(spec.train.compute_dtype), mesh,
                          vocab_size=tokenizer.vocab_size)
    made = generator.generate(prompts, spec.sample.max_new_tokens, sampling,
                              jax.random.key(spec.train.seed), stop_ids=(tokenizer.eos_id,))
    texts = [tokenizer.decode(tokens[:n]) for tokens, n in zip(made.tokens, made.lengths, strict=True)]
    return list(zip(spec.sample.prompts, texts, strict=True))

  return sample
