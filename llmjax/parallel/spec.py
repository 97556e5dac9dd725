"""The mesh group of a config."""

import dataclasses

from llmjax.config import setting

AXES = ('data', 'fsdp', 'stage', 'expert', 'context', 'tensor')


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

  def problems(self):
    sizes = {axis: getattr(self, axis) for axis in AXES}
    if zeros := [axis for axis, size in sizes.items() if size == 0]:
      yield f'{", ".join(zeros)}=0: an axis has at least one device; write 1, or -1 to fill'
    if len(free := [axis for axis, size in sizes.items() if size == -1]) > 1:
      yield f'only one axis may be -1, not {" and ".join(free)}; write 1 for all but one'
