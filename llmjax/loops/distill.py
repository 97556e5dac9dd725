"""What a run with a teacher has beside another one's: the teacher or what it said, and layers to begin with."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from llmjax import config
from llmjax.checkpoint import bases
from llmjax.checkpoint.checkpoints import load_params, read_config
from llmjax.config import ConfigError
from llmjax.data import stream
from llmjax.loops import start
from llmjax.loops.adapters import checkpoint_of
from llmjax.loops.sources import run_folder
from llmjax.model import decoder
from llmjax.model.spec import ModelSpec
from llmjax.parallel import distributed
from llmjax.parallel.mesh import batch_blocks, batch_shards, place_batch
from llmjax.parallel.sharding import tree_shardings
from llmjax.rl.objective import TEACHER, Distillation

FOLDER = 'distill'  # In the run's folder: which teacher it has, and what that said.


def settle(spec):
  """Returns the spec with the projection that comparing hidden states of two widths needs."""
  if not spec.distill.teacher:
    return spec
  width = _teacher_model(spec).d_model if spec.distill.compares_hidden else 0
  width = 0 if width == spec.model.d_model else width
  return dataclasses.replace(spec, model=dataclasses.replace(spec.model, projection=width))


def _teacher_model(spec):
  return config.build(ModelSpec, read_config(run_folder(spec.distill.teacher))['model'])


def layer_copy(params, teacher, layers):
  """Returns the parameters with the teacher's in place of theirs; of its blocks, the layers with these numbers."""
  taken = {name: teacher[name] for name in ('embed', 'final_norm', 'head') if name in params}
  taken['blocks'] = jax.tree.map(lambda t: t[np.asarray(layers)], teacher['blocks'])
  cast = lambda mine, theirs: theirs.astype(mine.dtype)
  return {**params, **{name: jax.tree.map(cast, params[name], tree) for name, tree in taken.items()}}


class Lessons:
  """A teacher as a run needs it: in memory, or as tables of what it said of every token."""

  def __init__(self, spec, mesh, workdir):
    """spec: a command's, with `distill.teacher`.  Raises ConfigError where the mesh does not divide the teacher."""
    self.spec, self.mesh, self.folder = spec, mesh, pathlib.Path(workdir) / FOLDER
    self.model = _teacher_model(spec)
    try:
      start.check_mesh(dataclasses.replace(spec, model=self.model), mesh)
    except ConfigError as e:
      raise ConfigError([f'distill.teacher={spec.distill.teacher}: its {p}' for p in e.problems]) from e
    self.known = self._identify()
    self.lessons = Distillation(spec.distill, spec.model, self.model, spec.train, mesh.devices.flat[0].platform,
                                spec.pipeline)
    self.evaluate = self.lessons.evaluate

  def _identify(self):
    """Returns {'path', 'sha256'} of the teacher's checkpoint: the one that the run began with."""
    file, source = self.folder / 'teacher.json', self.spec.distill.teacher
    if file.exists() and any((self.folder.parent / 'checkpoints').glob('[0-9]*')):
      known = json.loads(file.read_text())
      try:
        known['path'] = str(bases.find_base(known, source))
      except ConfigError as e:
        raise ConfigError([f'distill.teacher={source} is not the teacher that this run began with, '
                           f'{known["path"]}; put it back, or start a new run']) from e
      return known
    known = bases.identify(checkpoint_of('distill.teacher', source))
    distributed.wait_for_all('looked for the teacher')
    if distributed.is_first():
      self.folder.mkdir(exist_ok=True)
      file.write_text(json.dumps(known) + '\n')
    distributed.wait_for_all('named the teacher')
    return known

  def load(self):
    """Returns the teacher's parameters, divided as the mesh says."""
    path = pathlib.Path(self.known['path'])
    return load_params(run_folder(path), int(path.name), shardings=lambda model: tree_shardings(
        self.mesh, decoder.param_names(model)))[0]

  def teach(self, job):
    """Returns the job with the teacher's loss, and what that and the first step need."""
    initial = self._initial if self.spec.distill.init else None
    if not self.spec.distill.top_k:
      return dataclasses.replace(job, loss_fn=self.lessons.train, sees_frozen=True, initial=initial,
                                 load_frozen=lambda: {'teacher': self.load()})
    for name, table in self.columns(self.spec.data, 'train').items():
      job.batches.attach(name, table)
    return dataclasses.replace(job, loss_fn=self.lessons.train, initial=initial)

  def _initial(self, params):
    teacher = self.load()
    layers = self.spec.distill.layers(self.spec.model.num_layers, self.model.num_layers)
    layout = jax.tree.map(lambda p: p.sharding, params)
    return jax.jit(functools.partial(layer_copy, layers=layers), out_shardings=layout)(params, teacher)

  def columns(self, data, split):
    """Returns {field: stream.Table [rows, 1, T, k]} of what the teacher said of a split, or None with it in memory.

    They are made once and kept in the run's folder, by the fingerprints of the data and of the teacher.
    """
    k = self.spec.distill.top_k
    if not k:
      return None
    name = f'{split}-{stream.fingerprint(data, split)[:16]}-{self.known["sha256"][:16]}-{k}'
    files = {field: self.folder / f'{name}-{field}.npy' for field in TEACHER}
    missing = not all(file.exists() for file in files.values())
    distributed.wait_for_all(f'looked for what the teacher said of {split}')
    if missing:
      self._write(data, split, files)
      distributed.wait_for_all(f'wrote what the teacher said of {split}')
    return {field: stream.Table(file) for field, file in files.items()}

  def _write(self, data, split, files):
    params, mesh, first = self.load(), self.mesh, distributed.is_first()
    shape = (stream.count_rows(data, split), 1, data.seq_len, self.spec.distill.top_k)
    partial = {field: file.with_suffix('.partial.npy') for field, file in files.items()}
    with jax.set_mesh(mesh):
      step = jax.jit(self.lessons.top_k, out_shardings=jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
      tables = {field: np.lib.format.open_memmap(file, 'w+', jnp.dtype(dtype), shape) for (field, file), dtype in zip(
          partial.items(), ('float32', 'int32'), strict=True)} if first else {}
      begin = 0
      for batch in stream.eval_batches(data, split, start.eval_rows(self.spec, mesh), blocks=batch_blocks(mesh),
                                       block_count=batch_shards(mesh)):
        found = step(params, place_batch(mesh, batch))
        for field, table in tables.items():
          rows = np.asarray(found[field])[:, None]
          table[begin:begin + len(rows)] = rows[:len(table) - begin]  # What is behind is padding.
        begin += len(found[TEACHER[0]])
    for field, table in tables.items():
      table.flush()
      partial[field].replace(files[field])
