"""The FLOPs of a compiled program's matrix products, every turn of its loops counted.

XLA's own `cost_analysis` counts the body of a loop once.
"""

import math

from llmjax.plan.hlo import Frame, Loop, Module, flatten


def count_products(text):
  """Returns the FLOPs of one device's matrix products in one run of a program; a multiply-add is 2.

  text: of an optimized HLO module.  Of a conditional the dearest branch counts.  Raises ValueError where a
  loop that holds products does not tell its turns, or where a product is a call that this does not know.
  """
  module = Module(text)
  return _count(module, Frame(module, module.entry))


def _count(module, frame):
  total = 0
  for instruction in frame.computation.instructions.values():
    op = instruction.op
    if op == 'dot':
      total += _dot(frame, instruction)
    elif op == 'while':
      loop = Loop(frame, instruction)
      if inside := _count(module, loop.body):
        if (turns := loop.trips()) is None:
          raise ValueError(f'the loop {instruction.name} holds products, but its text does not tell its turns')
        total += turns * inside
    elif op == 'conditional':
      total += max(_count(module, branch) for branch in frame.branches(instruction))
    elif op in ('call', 'fusion', 'async-start', 'call-start'):
      total += _count(module, frame.called(instruction))
    elif op == 'convolution' or op == 'custom-call' and 'matmul' in (instruction.attribute('custom_call_target') or ''):
      raise ValueError(f'{instruction.name} is a product whose size this cannot read: {op}')
  return total


def _dot(frame, instruction):
  left = flatten(frame.computation.instructions[instruction.operands[0]].type)[0]
  axes = instruction.attribute('lhs_contracting_dims').strip('{}')
  summed = math.prod(left.shape[int(axis)] for axis in axes.split(',') if axis)
  return 2 * math.prod(flatten(instruction.type)[0].shape) * summed
