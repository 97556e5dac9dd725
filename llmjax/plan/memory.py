"""Attributes the memory of a compiled program to named arrays.  Imports no JAX."""

import dataclasses
import re

from llmjax.plan.hlo import Frame, Loop, flatten


@dataclasses.dataclass(frozen=True)
class Tensor:
  """An array on one device.  name: the operation or parameter it comes from.  count: number of such arrays."""

  name: str
  type: str
  bytes: int
  count: int = 1


def stacked_arrays(module, accumulation_steps=1):
  """Return (activations, gradients): Tensors stacked over the iterations of the loops over layers.

  The forward loop writes the activations that the backward loop reads; the backward loop writes gradients.
  accumulation_steps: trip count of the loop over microbatches, which contains the loops over layers.
  """
  activations, gradients = _stacked_arrays(Frame(module, module.entry), accumulation_steps)
  return _count_equal(activations), _count_equal(gradients)


def _stacked_arrays(frame, accumulation_steps):
  activations, gradients = [], []
  for instruction in frame.computation.instructions.values():
    if instruction.op != 'while':
      continue
    loop = Loop(frame, instruction)
    trips = loop.trips()
    if accumulation_steps > 1 and trips == accumulation_steps:
      nested = _stacked_arrays(loop.body, 1)
      if any(nested):
        return nested
    body = loop.body.computation
    root = body.instructions[body.root]
    if root.op != 'tuple' or not trips or trips < 2:
      continue
    for index, name in enumerate(root.operands):
      arrays = flatten(instruction.type[index])
      if len(arrays) != 1 or arrays[0].shape[:1] != (trips,) or loop.is_invariant((index,)):
        continue
      writer = _writer(body, name)
      backward = 'transpose(' in instruction.op_name or 'transpose(' in writer
      (gradients if backward else activations).append(Tensor(short_name(writer), str(arrays[0]), arrays[0].bytes))
  return activations, gradients


def largest_buffers(module, count=10):
  """Return the largest arrays of the entry computation and of the loops and calls in it."""
  tensors, seen = [], set()

  def walk(name, in_loop):
    if name in seen:
      return
    seen.add(name)
    for i in module.computations[name].instructions.values():
      if i.op == 'while':
        walk(i.computation('body'), True)
      elif i.op == 'call':
        walk(i.computation('to_apply'), in_loop)
      elif i.op not in ('tuple', 'get-tuple-element', 'bitcast', 'opt-barrier', 'copy-done', 'constant') and not (
          in_loop and i.op == 'parameter'):
        for array in flatten(i.type):
          tensors.append(Tensor(short_name(i.op_name) or i.op, str(array), array.bytes))

  walk(module.entry, False)
  return sorted(_count_equal(tensors), key=lambda t: -t.bytes)[:count]


def _count_equal(tensors):
  counts = {}
  for tensor in tensors:
    counts[tensor] = counts.get(tensor, 0) + 1
  return sorted((dataclasses.replace(t, count=n) for t, n in counts.items()), key=lambda t: -t.bytes * t.count)


def _writer(body, name):
  """Return the op_name of the operation that computes an element of the loop state."""
  best = ''
  for _ in range(20):
    instruction = body.instructions.get(name)
    if instruction is None:
      break
    op_name, operands = instruction.op_name, [o for o in instruction.operands if o in body.instructions]
    if op_name and not re.search('dynamic_update|copy|transpose$', op_name.rsplit('/', 1)[-1]):
      return op_name
    best = best or op_name
    if instruction.op not in ('copy', 'bitcast', 'get-tuple-element', 'copy-done', 'copy-start', 'fusion',
                              'dynamic-update-slice') or not operands:
      break
    size = lambda o: sum(a.bytes for a in flatten(body.instructions[o].type))
    written = [o for o in operands if size(o) < size(name)]
    name = max(written, key=size) if written else operands[0]
  return best


def short_name(op_name):
  """'jit(train_step)/transpose(jvp())/while/body/Block/mlp/dot_general' -> 'backward Block/mlp/dot_general'."""
  text = re.sub(r'\[\\?[\'"]*(\w+)\\?[\'"]*\]', r'/\1', op_name)
  back = 'backward ' if 'transpose(' in text else ''
  parts = [p for p in re.sub(r'\w+\(((?:\w+\()?[^()]*\)?)\)', r'\1', text).split('/')
           if p not in ('', 'while', 'body', 'closed_call', 'train_step', 'jvp()', 'checkpoint', 'shard_map', 'jvp')]
  return back + '/'.join(parts[-3:])


def parse_out_of_memory(message):
  """Parse the compiler's out-of-memory message; return {'used', 'limit', 'temporaries_only', 'allocations'} or None.

  Bytes per device.  One form of the message gives the temporaries only, without the arguments.
  """
  size = r'([\d.]+)([KMGT]?)'
  whole = re.search(f'Used {size} of {size} hbm', message)
  temporaries = re.search(rf'HLO temporaries \({size}\) exceeds available HBM \({size}\)', message)
  if not (match := whole or temporaries):
    return None
  return {'used': _size(match[1], match[2]), 'limit': _size(match[3], match[4]),
          'temporaries_only': whole is None, 'allocations': _allocations(message)}


def _size(value, unit):
  return int(float(value) * {'': 1, 'K': 1 << 10, 'M': 1 << 20, 'G': 1 << 30, 'T': 1 << 40}[unit])


def _allocations(message):
  """Return the Tensors that the message lists, the largest first."""
  tensors = []
  for block in re.split(r'\n\s*\d+\. Size: ', message)[1:]:
    size = re.match(r'([\d.]+)([KMGT])', block)
    shape, name = re.search(r'Shape: (\w+\[[\d,]*\])', block), re.search(r'op_name="([^"]*)"', block)
    if size and shape:
      tensors.append(Tensor(short_name(name[1]) if name else '', shape[1], _size(size[1], size[2])))
  return tensors
