"""The mesh and pipeline groups of a config.  No JAX here."""

import dataclasses
import math

from llmjax.config import setting

AXES = ('data', 'fsdp', 'stage', 'expert', 'context', 'tensor')
ROW_AXES = ('data', 'fsdp', 'expert', 'stage')  # The sequences of a batch are sharded over these.


def indivisible(name, whole, axes, size, times=1, words=''):
  """Yield a message if the value of a config field is not divisible by the sizes of mesh axes.

  size: function of an axis to its size.  times, words: another factor it must be divisible by, and its description.
  """
  parts = math.prod(map(size, axes)) * times
  if whole % parts:
    below = whole // parts * parts
    fits = ' or '.join(str(n) for n in (below, below + parts) if n)
    text = ' x '.join([f'mesh.{a}={size(a)}' for a in axes if size(a) > 1] + [words or str(times)] * (times > 1))
    yield f'{name}={whole} is not divisible by {text}; write {name}={fits}, or change the mesh'


@dataclasses.dataclass(frozen=True)
class MeshSpec:
  """Sizes of the axes of the device mesh; their product is the number of devices."""

  data: int = setting(-1, 'data parallelism: number of replicas; -1: all remaining devices', minimum=-1)
  fsdp: int = setting(1, 'fully sharded data parallelism: devices that shard parameters, optimizer state and batch',
                      minimum=-1)
  stage: int = setting(1, 'pipeline parallelism: number of stages', minimum=-1)
  expert: int = setting(1, 'expert parallelism: devices that shard the experts', minimum=-1)
  context: int = setting(1, 'context parallelism: devices that shard the sequence length', minimum=-1)
  tensor: int = setting(1, 'tensor parallelism: devices that shard heads, MLP columns and vocabulary', minimum=-1)

  dcn_data: int = setting(1, 'data parallelism between slices, over the data-center network; data is within each',
                          minimum=1)
  dcn_fsdp: int = setting(1, 'fsdp between slices; fsdp is within each', minimum=1)
  dcn_stage: int = setting(1, 'pipeline stages on different slices; stage is within each', minimum=1)
  zero: int = setting(0, 'ZeRO stage over data. 0: replicas; 1: shard the optimizer state; 3: parameters, too, '
                      'gathered over data and then over fsdp', choices=(0, 1, 3))

  def validate(self):
    sizes = {axis: getattr(self, axis) for axis in AXES}
    if zeros := [axis for axis, size in sizes.items() if size == 0]:
      yield f'{", ".join(zeros)}=0: an axis has at least one device; write 1, or -1 to fill'
    if len(free := [axis for axis, size in sizes.items() if size == -1]) > 1:
      yield f'{" and ".join(free)} are -1: only one axis may be -1; write 1 for all but one'

  @property
  def slices(self):
    """Number of slices: groups of chips with a fast network."""
    return self.dcn_data * self.dcn_fsdp * self.dcn_stage

  def size(self, *axes):
    """Return the product of the sizes of axes, over all slices; a size of -1 counts as 1."""
    sizes = (max(getattr(self, a), 1) * getattr(self, f'dcn_{a}', 1) for a in axes)
    return math.prod(sizes)


@dataclasses.dataclass(frozen=True)
class PipelineSpec:
  """Pipeline schedule; unused if mesh.stage is 1."""

  schedule: str = setting('gpipe', '1f1b needs the least memory, interleaved has the smallest bubble',
                          choices=('gpipe', 'interleaved', '1f1b'))
  microbatches: int = setting(0, 'number of pipeline microbatches; 0: four times the stages if the batch '
                              'size allows it', minimum=0)
  rounds: int = setting(2, 'interleaved: number of groups of layers (virtual stages) per stage', minimum=1)

  def count(self, stages, rows):
    """Return the number of microbatches.  rows: sequences of a batch per device."""
    return self.microbatches or stages * next(n for n in (4, 3, 2, 1) if rows % n == 0)

  @property
  def groups(self):
    """Number of groups of layers per stage."""
    return self.rounds if self.schedule == 'interleaved' else 1


@dataclasses.dataclass(frozen=True)
class DistributedSpec:
  """Rendezvous of several processes.

  Unset fields are taken from LLMJAX_COORDINATOR, LLMJAX_PROCESSES and LLMJAX_PROCESS_ID (set by `llmjax launch`), then
  from Slurm, Open MPI, or the TPU's metadata.
  """

  coordinator: str = setting('', 'address of process 0 for the other processes: host or host:port')
  processes: int = setting(-1, 'number of processes; -1: from the environment', minimum=-1)
  process_id: int = setting(-1, 'index of this process, from 0; -1: from the environment', minimum=-1)
  port: int = setting(0, 'port of the coordinator, if its address has none; 0: the default of the cluster, else '
                      '8476', minimum=0, maximum=65535)
  bind: str = setting('', "address of the network interface that process 0 listens on; '': all interfaces")
  heartbeat_seconds: int = setting(30, 'seconds without a heartbeat after which a process is lost and the run ends',
                                   minimum=2)
  hang_seconds: float = setting(1800.0, 'seconds without progress after which a process exits with status 76; more '
                                'than a step with its wait for data. A warning that names the late process comes '
                                'after 10 times the longest step, at least 5 minutes. 0: only a supervisor ends it',
                                minimum=0.0)
  start_timeout_seconds: int = setting(300, 'seconds that processes wait for each other, at start-up and at barriers',
                                       minimum=1)

  def validate(self):
    if self.processes == 0:
      yield 'processes=0: write the number of processes, or -1'
    if self.processes > 0 and self.process_id >= self.processes:
      yield (f'process_id={self.process_id} of processes={self.processes}: they count from 0, so the last '
             f'is {self.processes - 1}')
