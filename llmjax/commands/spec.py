"""Configs of commands that inspect a training recipe.  Imports no JAX, so that `--help` is quick."""

import dataclasses

from llmjax.config import find_problems
from llmjax.run.spec import LayoutSpec


@dataclasses.dataclass(frozen=True)
class PlanSpec(LayoutSpec):
  """The config of `llmjax plan`: pretraining's, except that the mesh is checked once the chips are known."""

  def mesh_problems(self, mesh):
    return ()

  def settled_problems(self):
    """Yield all problems of the spec, including sizes that the mesh does not divide."""
    yield from find_problems(self)
    yield from super().mesh_problems(self.mesh)
