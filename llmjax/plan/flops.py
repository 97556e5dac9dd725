"""Counts the FLOPs of a compiled program's matrix products, including every loop iteration.

XLA's own `cost_analysis` counts the body of a loop once.
"""

import math

from llmjax.plan.hlo import Frame, Loop, Module, flatten


def count_products(text):
  """Return the FLOPs of the matrix products that one device executes in one run; a multiply-add is 2.

  text: an optimized HLO module.  Of a conditional the most expensive branch counts.  Raises ValueError for a loop with
  products whose trip count is unknown, and for products in custom calls or convolutions.
  """
  module = Module(text)
  return _count(module, Frame(module, module.entry))


def _count(module, frame):
  total = 0
  for instruction in frame.computation.instructions.values():
    op = instruction.op
    if op == 'dot':
      total += _dot_flops(frame, instruction)
    elif op == 'while':
      loop = Loop(frame, instruction)
      if flops := _count(module, loop.body):
        if (trips := loop.trips()) is None:
          raise ValueError(f'the loop {instruction.name} contains products, but its trip count is unknown')
        total += trips * flops
    elif op == 'conditional':
      total += max(_count(module, branch) for branch in frame.branches(instruction))
    elif op in ('call', 'fusion', 'async-start', 'call-start'):
      total += _count(module, frame.called(instruction))
    elif op == 'convolution' or op == 'custom-call' and 'matmul' in (instruction.attribute('custom_call_target') or ''):
      raise ValueError(f'{instruction.name} is a product of unsupported kind: {op}')
  return total


def _dot_flops(frame, instruction):
  left = flatten(frame.computation.instructions[instruction.operands[0]].type)[0]
  axes = instruction.attribute('lhs_contracting_dims').strip('{}')
  contracted = math.prod(left.shape[int(axis)] for axis in axes.split(',') if axis)
  return 2 * math.prod(flatten(instruction.type)[0].shape) * contracted
