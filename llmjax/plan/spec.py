"""Options of `llmjax plan` and `llmjax mesh`.  Imports no JAX, so that `--help` is quick."""

import dataclasses

from llmjax.config import setting


@dataclasses.dataclass(frozen=True)
class MeshOptions:
  """Flags of `llmjax mesh`."""

  devices: int = setting(0, 'number of devices to emulate; 0: the product of the mesh sizes, counting -1 as 1',
                         minimum=0)
  no_compile: bool = setting(False, 'skip the compilation, and with it the list of collectives')


@dataclasses.dataclass(frozen=True)
class PlanOptions:
  """Flags of `llmjax plan`."""

  topology: str = setting('', 'TPU slice, such as v5p:4x4x4; with --fast also the GPUs of a node, such as h100:8')
  slices: int = setting(1, 'number of TPU slices, or of GPU nodes', minimum=1)
  fast: bool = setting(False, 'use the analytical model, without compiling; takes less than two seconds')
  output: str = setting('', 'folder for plan.json and plan.html; empty: write neither', kind='folder')
  hlo: str = setting('', 'file for the HLO text of the compiled program; empty: do not write it', kind='file')
  search: bool = setting(False, 'search for the fastest mesh, rematerialization, gradient accumulation and batch size')
  jobs: int = setting(1, '--search: number of concurrent compilations; each takes about two cores and 4 GB', minimum=1)
  sequences_per_chip: tuple[int, ...] = setting((), '--search: global batch sizes to try, in sequences per chip, such '
                                                'as 1,2,4; empty: train.batch_size only')
  max_compiles: int = setting(12, '--search: maximum number of programs to compile', minimum=1)

  def validate(self):
    if not self.topology:
      yield 'topology=NAME is missing: name the TPU slice, for example --topology=v5p:4x4x4'
    if self.hlo and self.fast:
      yield 'hlo needs a compiled program, and --fast does not compile; remove one of them'
    if self.search and self.fast:
      yield 'search and --fast exclude each other: a search compiles its best candidates; remove one of them'
