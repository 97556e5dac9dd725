"""The mesh and pipeline groups of a config.  No JAX here."""

import dataclasses
import math

from llmjax.config import setting

AXES = ('data', 'fsdp', 'stage', 'expert', 'context', 'tensor')
ROW_AXES = ('data', 'fsdp', 'expert', 'stage')  # Those that the sequences of a batch are sharded over.


def indivisible(name, whole, axes, size, times=1, words=''):
  """Yield a line where a config field's number is not divisible by mesh axes, naming the nearest that is.

  size: function of an axis to its size.  times, words: what else it must be divisible by, and the words for that.
  """
  parts = math.prod(map(size, axes)) * times
  if whole % parts:
    below = whole // parts * parts
    fits = ' or '.join(str(n) for n in (below, below + parts) if n)
    text = ' x '.join([f'mesh.{a}={size(a)}' for a in axes if size(a) > 1] + [words or str(times)] * (times > 1))
    yield f'{name}={whole} is not divisible by {text}; write {name}={fits}, or change the mesh'


@dataclasses.dataclass(frozen=True)
class MeshSpec:
  """Sizes of the device mesh's axes; their product is the number of devices."""

  data: int = setting(-1, 'copies of the model, each on its own rows; -1 takes all devices left',
                      minimum=-1)
  fsdp: int = setting(1, 'devices that share parameters and optimizer state as well as rows',
                      minimum=-1)
  stage: int = setting(1, 'pipeline stages', minimum=-1)
  expert: int = setting(1, 'devices that share the experts', minimum=-1)
  context: int = setting(1, 'devices that share a row along its length', minimum=-1)
  tensor: int = setting(1, 'devices that share heads, MLP columns and vocabulary', minimum=-1)

  dcn_data: int = setting(1, 'slices that hold copies of the model; data within each', minimum=1)
  dcn_fsdp: int = setting(1, 'slices that share parameters; fsdp within each', minimum=1)
  dcn_stage: int = setting(1, 'slices that hold different pipeline stages', minimum=1)
  zero: int = setting(0, 'what is shared over data as well. 0: nothing; 1: the optimizer state; 3: parameters too, '
                      'gathered in two steps, over data and over fsdp', choices=(0, 1, 3))

  def validate(self):
    sizes = {axis: getattr(self, axis) for axis in AXES}
    if zeros := [axis for axis, size in sizes.items() if size == 0]:
      yield f'{", ".join(zeros)}=0: an axis has at least one device; write 1, or -1 to fill'
    if len(free := [axis for axis, size in sizes.items() if size == -1]) > 1:
      yield f'{" and ".join(free)} are -1: only one axis may be -1; write 1 for all but one'

  @property
  def slices(self):
    """Groups of chips with a fast network of their own."""
    return self.dcn_data * self.dcn_fsdp * self.dcn_stage

  def size(self, *axes):
    """Return the product of these axes' sizes over all slices; an axis to be filled counts as 1."""
    sizes = (max(getattr(self, a), 1) * getattr(self, f'dcn_{a}', 1) for a in axes)
    return math.prod(sizes)


@dataclasses.dataclass(frozen=True)
class PipelineSpec:
  """How microbatches go through the pipeline stages; unused where mesh.stage is 1."""

  schedule: str = setting('gpipe', '1f1b keeps the least memory, interleaved idles the least',
                          choices=('gpipe', 'interleaved', '1f1b'))
  microbatches: int = setting(0, 'parts of a batch that are in the pipeline one after the other; 0: four '
                              'times the stages where the rows allow it', minimum=0)
  rounds: int = setting(2, 'interleaved: groups of layers on each stage', minimum=1)

  def count(self, stages, rows):
    """Return the number of microbatches.  rows: those of a batch that lie on one device."""
    return self.microbatches or stages * next(n for n in (4, 3, 2, 1) if rows % n == 0)

  @property
  def groups(self):
    """Groups of layers on each stage."""
    return self.rounds if self.schedule == 'interleaved' else 1


@dataclasses.dataclass(frozen=True)
class DistributedSpec:
  """How many processes find one another; all empty, as by default, leaves it to the environment.

  What is empty here is taken from LLMJAX_COORDINATOR, LLMJAX_PROCESSES and LLMJAX_PROCESS_ID (as
  `llmjax launch` sets them), then from Slurm, Open MPI, or the TPU's own metadata.
  """

  coordinator: str = setting('', 'host or host:port of process 0, as the others reach it')
  processes: int = setting(-1, 'processes in all; -1: as the environment says', minimum=-1)
  process_id: int = setting(-1, 'number of this one, from 0; -1: as the environment says', minimum=-1)
  port: int = setting(0, 'of the coordinator where no host:port says it; 0: what the cluster suggests, else '
                      '8476', minimum=0, maximum=65535)
  bind: str = setting('', "address of the interface that process 0 listens on; '': all interfaces")
  heartbeat_seconds: int = setting(30, 'a process that was silent so long is lost, and the run ends', minimum=2)
  hang_seconds: float = setting(1800.0, 'a process whose steps make no progress for so long ends with status 76; '
                                'must be more than a step takes, with its wait for data. It says before where it '
                                'waits and who is late: after 10 times its longest step, 5 minutes at least. '
                                '0: only a supervisor ends it', minimum=0.0)
  start_timeout_seconds: int = setting(300, 'how long processes wait for one another, at the start and wherever they '
                                       'agree on something', minimum=1)

  def validate(self):
    if self.processes == 0:
      yield 'processes=0: write how many there are, or -1'
    if self.processes > 0 and self.process_id >= self.processes:
      yield (f'process_id={self.process_id} of processes={self.processes}: they count from 0, so the last '
             f'is {self.processes - 1}')
