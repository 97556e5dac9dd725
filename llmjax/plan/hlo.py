"""Parses the text of an optimized HLO module: computations, instructions, and trip counts of while loops.

The text is `compiled.as_text()` of any platform.  Imports no JAX.
"""

import dataclasses
import functools
import math
import re

# Bits per element; `token` and opaque values have none.
_BITS = {'pred': 8, 'bf16': 16, 'token': 0, 'opaque': 0}
_ARRAY = re.compile(r'(pred|bf16|token|opaque|[sufc]\d+(?:e\d+m\d+\w*)?)\[([^\]]*)\]')
_HEADER = re.compile(r'(ENTRY )?%?([\w.<>-]+) \(.*\{$')
_INSTRUCTION = re.compile(r'\s+(ROOT )?%?([\w.<>-]+) = ')
_COMMENT = re.compile(r'/\*.*?\*/')
_SAME_VALUE = ('copy', 'copy-start', 'copy-done', 'bitcast', 'convert', 'reshape', 'opt-barrier')
_OPENING, _CLOSING = '([{', ')]}'
_MIRRORED = {'LT': 'GT', 'GT': 'LT', 'LE': 'GE', 'GE': 'LE'}


@dataclasses.dataclass(frozen=True)
class Array:
  """The type of an array.  dtype: HLO name, such as f32 or bf16."""

  dtype: str
  shape: tuple[int, ...]

  @property
  def bytes(self):
    return -(-math.prod(self.shape) * element_bits(self.dtype) // 8)

  def __str__(self):
    return f'{self.dtype}[{",".join(map(str, self.shape))}]'


def element_bits(dtype):
  """Return the bits per element of an HLO dtype: 32 for f32, 4 for s4, 8 for f8e4m3fn."""
  return _BITS.get(dtype) if dtype in _BITS else int(re.match(r'[a-z]+(\d+)', dtype)[1])


def parse_type(text):
  """Parse a type: an Array, or a list of types for a tuple."""
  text = text.strip()
  if text.startswith('('):
    return [parse_type(part) for part in split_top(text[1:_closing(text, 0)])]
  match = _ARRAY.match(text)
  if match is None:
    return Array('opaque', ())
  # `<=8` is a bounded dynamic size; memory is allocated for the bound.
  return Array(match[1], tuple(int(n.strip('<= ?')) for n in match[2].split(',') if n.strip('<= ?')))


def flatten(type_):
  """Return the Arrays of a type, in order."""
  return [a for part in type_ for a in flatten(part)] if isinstance(type_, list) else [type_]


def split_top(text):
  """Split at the commas that are outside brackets and quotes."""
  parts, depth, start, quoted = [], 0, 0, False
  for i, c in enumerate(text):
    if c == '"':
      quoted = not quoted
    elif not quoted:
      depth += (c in _OPENING) - (c in _CLOSING)
      if c == ',' and not depth:
        parts.append(text[start:i].strip())
        start = i + 1
  last = text[start:].strip()
  return [*parts, last] if last else parts


def _closing(text, start):
  """Return the position of the bracket that closes the one at `start`."""
  depth, quoted = 0, False
  for i in range(start, len(text)):
    c = text[i]
    if c == '"' and text[i - 1] != '\\':
      quoted = not quoted
    elif not quoted:
      depth += (c in _OPENING) - (c in _CLOSING)
      if not depth:
        return i
  raise ValueError(f'unbalanced brackets in the HLO: {text[start:start + 80]!r}')


@dataclasses.dataclass(frozen=True)
class Instruction:
  """`%name = type op(operands), attributes`.  arguments: the text between the parentheses."""

  name: str
  type: object
  op: str
  operands: tuple[str, ...]
  arguments: str
  attributes: str

  def attribute(self, key):
    """Return the value of the attribute `key=value`, or None."""
    match = re.search(rf'(?:^|[\s,]){key}=', self.attributes)
    if match is None:
      return None
    return split_top(self.attributes[match.end():])[0]

  def computation(self, key):
    """Return the name of the computation in an attribute such as `calls`, or None."""
    text = self.attribute(key)
    return text and text.lstrip('%')

  @property
  def op_name(self):
    match = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.attributes)
    return match[1] if match else ''


@dataclasses.dataclass
class Computation:
  """A computation.  instructions: by name, in program order.  root: name of the result."""

  name: str
  instructions: dict[str, Instruction]
  root: str = ''


class Module:
  """A parsed HLO module: computations by name, name of the entry computation, numbers of replicas and partitions."""

  def __init__(self, text):
    self.computations, self.entry = _parse(text)
    header = text[:text.find('\n')]
    count = lambda key: int(m[1]) if (m := re.search(rf'\b{key}=(\d+)', header)) else 1
    self.num_partitions, self.num_replicas = count('num_partitions'), count('replica_count')


def _parse(text):
  computations, entry, current, pending = {}, None, None, []

  def finish():
    if pending:
      instruction, is_root = _parse_instruction(_COMMENT.sub('', ' '.join(pending)))
      current.instructions[instruction.name] = instruction
      if is_root:
        current.root = instruction.name
      pending.clear()

  for line in text.splitlines():
    if current is None:
      if match := _HEADER.match(line):
        current = Computation(match[2], {})
        entry = current.name if match[1] else entry
    elif re.match(r'\}(, \w+=.*)?$', line) and not line.startswith('}}'):
      finish()
      computations[current.name], current = current, None
    elif _INSTRUCTION.match(line):
      finish()
      pending.append(line)
    else:  # Some instructions span several lines.
      pending.append(line)
  if entry is None:
    raise ValueError('not the text of an HLO module: it has no ENTRY computation')
  return computations, entry


def _parse_instruction(line):
  match = _INSTRUCTION.match(line)
  rest = line[match.end():]
  end = _closing(rest, 0) + 1 if rest.startswith('(') else rest.index(' ')
  type_, rest = parse_type(rest[:end]), rest[end:].lstrip()
  start = rest.index('(')
  end = _closing(rest, start)
  op, arguments = rest[:start].strip(), rest[start + 1:end]
  operands = () if op in ('constant', 'parameter') else tuple(
      part.split()[-1].lstrip('%') for part in split_top(arguments))
  return Instruction(match[2], type_, op, operands, arguments, rest[end + 1:]), bool(match[1])


@dataclasses.dataclass(frozen=True)
class Induction:
  """The value of an element of the loop state at the start of an iteration, plus `offset`."""

  index: int
  offset: int = 0


class Frame:
  """A computation bound to its arguments; evaluates the integers in it that are known statically.

  arguments: one function path -> value per parameter, where a path is a tuple of tuple indices.  A value is an int, an
  Induction, or None if unknown.
  """

  def __init__(self, module, name, arguments=()):
    self.module, self.computation, self._arguments = module, module.computations[name], arguments
    self.value = functools.cache(self._value)

  def root(self, path=()):
    """Return the value of the result, or of its element at a path."""
    return self.value(self.computation.root, path)

  def called(self, instruction):
    """Return the frame of the computation that a call, fusion or async start applies to its operands."""
    name = instruction.computation('calls') or instruction.computation('to_apply')
    return Frame(self.module, name, [functools.partial(self.value, o) for o in instruction.operands])

  def branches(self, instruction):
    """Return the frames of the branches of a conditional; each takes one operand."""
    names = instruction.attribute('branch_computations')
    names = [instruction.attribute('true_computation'), instruction.attribute('false_computation')] if (
        names is None) else split_top(names[1:-1])
    return [Frame(self.module, name.lstrip('%'), [functools.partial(self.value, operand)])
            for name, operand in zip(names, instruction.operands[1:], strict=True)]

  def _value(self, name, path=()):
    instruction = self.computation.instructions.get(name)
    if instruction is None:
      return None
    op, operands = instruction.op, instruction.operands
    if op == 'constant':
      text = instruction.arguments.strip()
      return int(text) if re.fullmatch(r'-?\d+', text) else None
    if op == 'parameter':
      number = int(instruction.arguments)
      return self._arguments[number](path) if number < len(self._arguments) else None
    if op in _SAME_VALUE:
      return self.value(operands[0], path)
    if op == 'get-tuple-element':
      return self.value(operands[0], (int(instruction.attribute('index')), *path))
    if op == 'tuple':
      return self.value(operands[path[0]], path[1:]) if path else None
    if not _is_integer(instruction.type, path):
      return None  # Only loop counters matter; tracing floating-point values would be slow.
    if op in ('fusion', 'call'):
      return self.called(instruction).root(path)
    if op in ('add', 'subtract', 'multiply'):
      return _combine(op, self.value(operands[0]), self.value(operands[1]))
    if op == 'while' and Loop(self, instruction).is_invariant(path):
      return self.value(operands[0], path)
    return None


def _is_integer(type_, path):
  for i in path:
    type_ = type_[i]
  return isinstance(type_, Array) and type_.dtype[0] in 'su' and not type_.shape


def _combine(op, a, b):
  if isinstance(a, int) and isinstance(b, int):
    return a + b if op == 'add' else a - b if op == 'subtract' else a * b
  if isinstance(a, Induction) and isinstance(b, int) and op != 'multiply':
    return Induction(a.index, a.offset + (b if op == 'add' else -b))
  if isinstance(a, int) and isinstance(b, Induction) and op == 'add':
    return Induction(b.index, b.offset + a)
  return None


class Loop:
  """A while loop in a frame."""

  def __init__(self, frame, instruction):
    self._frame, self._while = frame, instruction
    # With every element of the state symbolic, to find those that the body returns unchanged.
    self._raw = Frame(frame.module, instruction.computation('body'), [Induction])

  @property
  def body(self):
    return Frame(self._frame.module, self._while.computation('body'), [self._state])

  @property
  def condition(self):
    return Frame(self._frame.module, self._while.computation('condition'), [self._state])

  def is_invariant(self, path):
    """Return whether an element of the state is loop-invariant."""
    return self._raw.root(path) == Induction(path)

  def _state(self, path):
    return self._frame.value(self._while.operands[0], path) if self.is_invariant(path) else Induction(path)

  def trips(self):
    """Return the trip count, or None if it is not static.

    Taken from XLA's `known_trip_count` if present, else derived from the condition (a state element compared with a
    constant), the initial value of that element, and its increment in the body.
    """
    if match := re.search(r'"known_trip_count":\{"n":"?(\d+)', self._while.attributes):
      return int(match[1])
    comparison = self._comparison(self.condition)
    if comparison is None:
      return None
    direction, left, limit = comparison
    if isinstance(left, int) and isinstance(limit, Induction):
      direction, left, limit = _MIRRORED.get(direction, direction), limit, left
    if not isinstance(left, Induction) or not isinstance(limit, int):
      return None
    initial = self._frame.value(self._while.operands[0], left.index)
    after = self.body.root(left.index)
    if not isinstance(initial, int) or not isinstance(after, Induction) or after.index != left.index:
      return None
    return _count(direction, initial + left.offset, after.offset, limit)

  def _comparison(self, frame):
    """Return (direction, left, right) of the comparison that a computation returns, or None."""
    root = frame.computation.instructions[frame.computation.root]
    if root.op in ('fusion', 'call'):
      return self._comparison(frame.called(root))
    if root.op != 'compare':
      return None
    return root.attribute('direction'), *(frame.value(o) for o in root.operands)


def _count(direction, value, step, limit):
  """Return how many of `value, value + step, ...` satisfy the comparison before the first that does not."""
  distance = limit - value
  if direction in ('GT', 'GE'):
    distance, step = -distance, -step
  if direction in ('LE', 'GE'):
    distance += 1
  if direction == 'NE':
    return distance // step if step and distance % step == 0 and distance // step >= 0 else None
  if direction == 'EQ' or (distance > 0 and step <= 0):
    return None
  return max(-(-distance // step), 0) if step > 0 else 0
