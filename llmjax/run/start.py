"""Start-up of every training command: processes, run folder, mesh, data."""

import contextlib
import dataclasses
import json
import shutil

import jax

from llmjax import extensions
from llmjax.config import ConfigError
from llmjax.data import stream
from llmjax.generate.spec import CHAT_TEMPLATE
from llmjax.parallel import distributed
from llmjax.parallel.host import share_arena
from llmjax.parallel.mesh import batch_blocks, batch_shards, make_mesh, place_batch
from llmjax.run import determinism, hardware, loop
from llmjax.run.environment import describe_data, describe_environment
from llmjax.run.goodput import Goodput, process_age
from llmjax.run.hardware import require_platform
from llmjax.run.workdir import claim_workdir, enable_compilation_cache, hold_workdir
from llmjax.train import objectives


def run(spec, options, make_job, open_batches=None):
  """Train as the spec says in options.workdir; returns the exit status.

  make_job: function (spec, mesh, batches, workdir) -> loop.Job, everything that differs between commands.
  open_batches: function (spec, mesh) -> batches; None: those of `stream.open_stream`.
  """
  goodput = Goodput(options.workdir, age=process_age())
  if spec.train.deterministic:
    determinism.require()
  if not hardware.accelerator_present():
    share_arena()
  with distributed.together(spec.distributed), hold_workdir(options.workdir), contextlib.ExitStack() as stack:
    status = _train(spec, options, goodput, make_job, open_batches or _open_sequences, stack)
    if status == 1:  # After a failed save, threads may still wait for it.
      distributed.leave_alone(status)
    return status


def _train(spec, options, goodput, make_job, open_batches, stack):
  with goodput.charge('init'):
    enable_compilation_cache(spec.train.compilation_cache)
    require_platform(spec.train.platform)
    spec = resolve(spec)
    attempt = claim_workdir(options.workdir, spec)
    workdir = attempt.workdir
    heart = stack.enter_context(distributed.start_heartbeat(spec.distributed, workdir))
    mesh = make_mesh(spec.mesh)
    check_mesh(spec, mesh)
    objectives.require_remat(spec.train.remat, mesh.devices.flat[0])
    if distributed.is_first():
      for name, content in (('environment', describe_environment(mesh, workdir)),
                            ('data', describe_data(spec.data))):
        (workdir / f'{name}.json').write_text(json.dumps(content, indent=2) + '\n')
      if not (attempt.first and (workdir / 'tokenizer.model').exists()):
        shutil.copyfile(stream.load_tokenizer(spec.data).path, workdir / 'tokenizer.model')
    batches = open_batches(spec, mesh)
  job = make_job(spec, mesh, batches, workdir)
  job = dataclasses.replace(job, evaluators={**job.evaluators, **make_tasks(spec, mesh)}, goodput=goodput, heart=heart)
  with jax.set_mesh(mesh):
    return loop.train(job, workdir, attempt)


def _open_sequences(spec, mesh):
  return stream.open_stream(spec.data, batch_size=spec.train.batch_size, seed=spec.train.seed,
                            blocks=batch_blocks(mesh), block_count=batch_shards(mesh))


def make_model(spec, mesh):
  """Return the Model of a command's spec for a mesh."""
  return objectives.make_model(spec.model, spec.train, mesh.devices.flat[0].platform, spec.pipeline)


def make_tasks(spec, mesh):
  """Return {name: function (params, frozen) -> metrics} of the user's own functions in evaluate.tasks."""
  return {path.rpartition(':')[2]: extensions.load(path, 'evaluate.tasks')(spec, mesh) for path in spec.evaluate.tasks}


def eval_batch_size(spec, mesh):
  """Return the sequences per evaluation batch: evaluate.batch_size, rounded up to what the mesh divides."""
  shards = batch_shards(mesh) * max(spec.pipeline.microbatches // mesh.shape['stage'], 1)
  return -(-(spec.evaluate.batch_size or spec.train.batch_size) // shards) * shards


def read_split(spec, mesh, split, data=None, limit=0, columns=None):
  """Yield batches, placed on the mesh, with every example of a split once, or a sample of `limit` examples.

  data: DataSpec, by default that of the spec.  columns: {field: dataset.Table} of further fields, or None.
  """
  for batch in stream.eval_batches(data or spec.data, split, eval_batch_size(spec, mesh), limit,
                                   blocks=batch_blocks(mesh), block_count=batch_shards(mesh), columns=columns):
    yield place_batch(mesh, batch)


def keep_template(spec, workdir):
  """Save the ChatFormat of the data in the run's folder, for `llmjax generate --chat`, and return it; None for text."""
  chat = stream.chat_format(spec.data)
  if chat is not None and distributed.is_first():
    chat.save(workdir / CHAT_TEMPLATE)
  return chat


def resolve(spec):
  """Return the spec with the vocabulary size of the data filled in, if the model has none."""
  vocab_size = spec.model.vocab_size
  if not vocab_size:
    # A multiple of 128 can be sharded evenly and fills the lanes of a TPU.
    vocab_size = -(-stream.vocab_size(spec.data) // 128) * 128
  return dataclasses.replace(spec, model=dataclasses.replace(spec.model, vocab_size=vocab_size))


def check_mesh(spec, mesh):
  """Raise ConfigError if the sizes of the mesh do not divide the arrays of the run."""
  sizes = {axis: size // getattr(spec.mesh, f'dcn_{axis}', 1) for axis, size in mesh.shape.items()}
  if problems := list(spec.mesh_problems(dataclasses.replace(spec.mesh, **sizes))):
    raise ConfigError(problems)
