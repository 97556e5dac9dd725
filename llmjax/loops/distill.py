"""Distillation: the teacher, its cached predictions, and initialization from its layers."""

import dataclasses
import functools
import pathlib

import jax
import numpy as np

from llmjax import config
from llmjax.checkpoint.load import load_params, read_config
from llmjax.config import ConfigError
from llmjax.data import stream
from llmjax.model.model import Model
from llmjax.model.spec import ModelSpec
from llmjax.parallel.sharding import tree_shardings
from llmjax.post.distillation import TEACHER_FIELDS, Distillation
from llmjax.post.on_policy import OnPolicyStream
from llmjax.run import start
from llmjax.run.cached_outputs import CachedModel
from llmjax.run.initial import checkpoint_of
from llmjax.run.sources import run_folder

FOLDER = 'distill'  # In the run's folder: the identity of the teacher and its cached predictions.


def add_projection(spec):
  """Return the spec with the projection that a loss on hidden states of different widths needs."""
  if not spec.distill.teacher:
    return spec
  width = _teacher_model(spec).d_model if spec.distill.compares_hidden else 0
  width = 0 if width == spec.model.d_model else width
  return dataclasses.replace(spec, model=dataclasses.replace(spec.model, projection=width))


def _teacher_model(spec):
  return config.build(ModelSpec, read_config(run_folder(spec.distill.teacher))['model'])


def layer_copy(params, teacher, layers):
  """Return the parameters, replaced by the teacher's; of its blocks only the layers with these indices."""
  copied = {name: teacher[name] for name in ('embed', 'final_norm', 'head') if name in params}
  copied['blocks'] = jax.tree.map(lambda t: t[np.asarray(layers)], teacher['blocks'])
  cast = lambda mine, theirs: theirs.astype(mine.dtype)
  return {**params, **{name: jax.tree.map(cast, params[name], tree) for name, tree in copied.items()}}


class Teacher:
  """The teacher of a run: in memory, or as cached top-k predictions of every token."""

  def __init__(self, spec, mesh, workdir):
    """spec: a command's, with `distill.teacher`.  Raises ConfigError if the mesh does not divide the teacher."""
    self.spec, self.mesh = spec, mesh
    self.model = _teacher_model(spec)
    try:
      start.check_mesh(dataclasses.replace(spec, model=self.model), mesh)
    except ConfigError as e:
      raise ConfigError([f'distill.teacher={spec.distill.teacher}: its {p}' for p in e.problems]) from e
    source = spec.distill.teacher
    self.cache = CachedModel(pathlib.Path(workdir) / FOLDER, 'teacher', 'distill.teacher', source,
                     lambda: checkpoint_of('distill.teacher', source))
    self.path = self.cache.checkpoint()
    self.losses = Distillation(spec.distill, start.make_model(spec, mesh),
                                start.make_model(dataclasses.replace(spec, model=self.model), mesh),
                                spec.train.neftune_alpha)
    self.evaluate = self.losses.evaluate

  def load(self):
    """Load the teacher's parameters, sharded."""
    return load_params(run_folder(self.path), int(self.path.name), shardings=lambda model: tree_shardings(
        self.mesh, Model(model).param_names()))[0]

  def add_to(self, job):
    """Return the Job with the distillation loss and what it reads."""
    initial = self._initial if self.spec.distill.init else None
    if self.spec.distill.on_policy_fraction:
      job = self._on_policy(job)
    if not self.spec.distill.top_k:
      return dataclasses.replace(job, loss_fn=self.losses.train, initialize=initial,
                                 frozen={'teacher': self.load})
    for name, table in self.columns(self.spec.data, 'train').items():
      job.batches.attach(name, table)
    return dataclasses.replace(job, loss_fn=self.losses.train, initialize=initial)

  def _on_policy(self, job):
    """Return the Job with batches in which the student generates some of the completions."""
    chat, tokenizer = stream.chat_format(self.spec.data), stream.load_tokenizer(self.spec.data)
    stop_ids = (tokenizer.eos_id,)
    if chat is not None:
      with chat:
        stop_ids = chat.stop_ids
    return dataclasses.replace(job, batches=OnPolicyStream(self.spec, self.mesh, job.batches, tokenizer, stop_ids))

  def _initial(self, params):
    teacher = self.load()
    layers = self.spec.distill.layers(self.spec.model.num_layers, self.model.num_layers)
    layout = jax.tree.map(lambda p: p.sharding, params)
    return jax.jit(functools.partial(layer_copy, layers=layers), out_shardings=layout)(params, teacher)

  def columns(self, data, split):
    """Return {field: dataset.Table [examples, 1, T, k]} of the teacher's predictions, or None if it is in memory."""
    k, mesh = self.spec.distill.top_k, self.mesh
    if not k:
      return None

    return self.cache.outputs(mesh, data, split, k, dict(zip(TEACHER_FIELDS, ('float32', 'int32'), strict=True)),
                            (stream.count_examples(data, split), 1, data.seq_len, k),
                              lambda: (self.losses.top_k, self.load(), start.read_split(self.spec, mesh, split, data)))
