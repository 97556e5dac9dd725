"""A Generator of a run's checkpoint."""

import pathlib

import jax.numpy as jnp

from llmjax.checkpoint.load import load_params
from llmjax.data import stream
from llmjax.generate.decode import Generator
from llmjax.model.model import Model
from llmjax.parallel.mesh import fitting_mesh
from llmjax.parallel.sharding import tree_shardings
from llmjax.text.tokenizer import Tokenizer

TOKENIZER = 'tokenizer.model'  # In a run's folder.


def load_generator(options, run_spec):
  """Return (Generator, Tokenizer, step) of a run, sharded as in training.  options: with `workdir` and `step`."""
  mesh = fitting_mesh(run_spec.mesh)
  params, model, _, step = load_params(
      options.workdir, options.step, shardings=lambda model: tree_shardings(mesh, Model(model).param_names()))
  file = pathlib.Path(options.workdir) / TOKENIZER
  tokenizer = Tokenizer(file) if file.exists() else stream.load_tokenizer(run_spec.data)
  # CPUs have no fast bfloat16 product, so float32 costs nothing there and is more exact.
  on_cpu = mesh.devices.flat[0].platform == 'cpu'
  dtype = jnp.float32 if on_cpu else jnp.dtype(run_spec.train.compute_dtype)
  generator = Generator(model, params, dtype, mesh, bos_id=tokenizer.bos_id, vocab_size=tokenizer.vocab_size,
                        context_length=run_spec.data.seq_len)
  return generator, tokenizer, step
