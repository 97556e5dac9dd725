"""The checkpoint group of a config.  No JAX here."""

import dataclasses

from llmjax.config import setting


@dataclasses.dataclass(frozen=True)
class CheckpointSpec:
  """What is kept of the checkpoints that a run writes."""

  keep: int = setting(3, 'newest checkpoints to keep', minimum=1)
