r"""Parser and exact arithmetic for mathematical answers written in plain text or LaTeX.

`parse` evaluates an expression while it reads it.  A number is a tuple of its values at NUM_POINTS fixed assignments
of the variables (polynomial identity testing): exact fractions where possible, else decimals of 60 digits.
Collections and relations hold such tuples.  Work is bounded by counts (depth, bits, items) and never by time, so that
a text gives the same result on every machine and in every thread.
"""

import dataclasses
import decimal
import functools
import hashlib
import math
import re
from decimal import Decimal
from fractions import Fraction

NUM_POINTS = 3  # Assignments of the variables at which expressions are compared.
_MAX_DEPTH, _MAX_BITS, _MAX_ITEMS = 40, 8192, 100
CONTEXT = decimal.Context(prec=60, Emax=10**6, Emin=-10**6, traps=[
    decimal.InvalidOperation, decimal.DivisionByZero, decimal.Overflow, decimal.Underflow])
_PI = Decimal('3.14159265358979323846264338327950288419716939937510582097494459230781640628620899')

_TOKEN = re.compile(r'\s*(?:(?:\d+\.\d+|\.\d+|\d+\.?)(?:[eE][+-]?\d{1,6})?|\\\\|\\[A-Za-z]+|\\[{}]|\S)')
_FUNCTIONS = ('ln', 'log', 'exp', 'sin', 'cos', 'tan', 'cot', 'sec', 'csc')
_GREEK = ('alpha beta gamma delta epsilon theta lambda mu nu rho sigma tau phi varphi psi omega Delta Theta Lambda '
          'Sigma Phi Psi Omega').split()
_RELATIONS = {'=': '=', '<': '<', '>': '>', r'\lt': '<', r'\gt': '>', r'\le': '<=', r'\leq': '<=', r'\ge': '>=',
              r'\geq': '>=', r'\ne': '!=', r'\neq': '!='}


class ParseError(ValueError):
  """The text is not a supported expression, or exceeds a size limit."""


@dataclasses.dataclass(frozen=True)
class Collection:
  """kind: the brackets, such as '(]'; '{}' (a set, or values without brackets) and 'union' are unordered."""

  kind: str
  items: tuple


@dataclasses.dataclass(frozen=True)
class Relation:
  """lhs and rhs: values.  name: the variable where lhs is a single one, else ''."""

  op: str
  lhs: tuple
  rhs: tuple
  name: str = ''


def parse(text):
  """Parse an answer into a number (a tuple of its values at the points), a Collection or a Relation.

  Raises ParseError and ArithmeticError.  Call it within `decimal.localcontext(CONTEXT)`.
  """
  parser = _Parser(text)
  items = parser.items(('',))
  if not items:
    raise ParseError('empty')
  names = {item.name for item in items if isinstance(item, Relation) and item.op == '='}
  if len(names) == 1 and all(isinstance(i, Relation) and i.op == '=' and is_constant(i.rhs) for i in items) and (
      '' not in names or len(items) == 1 and is_constant(items[0].lhs)):
    items = [item.rhs for item in items]  # x = 3; x = 1, x = 2; 3 + 4 = 7.
  return items[0] if len(items) == 1 else Collection('{}', tuple(items))


class _Parser:
  """Recursive-descent parser that evaluates as it reads."""

  def __init__(self, text):
    if not re.search(r'[\\^_{]', text) and re.search(r'[A-Za-z]{2}', re.sub(r'\d[eE][+-]?\d', '', text)):
      raise ParseError('words')
    if re.search(r'(?<![\\A-Za-z])[A-Za-z]{3}', re.sub(r'\\(?:begin|end)\{\w+\}', '', text)):
      raise ParseError('words')
    self.tokens = [match[0].strip() for match in _TOKEN.finditer(text.rstrip())]
    self.at = self.depth = 0

  def peek(self):
    return self.tokens[self.at] if self.at < len(self.tokens) else ''

  def next(self, expected=None):
    token = self.peek()
    if token == '' or (expected and token not in expected):
      raise ParseError(f'{token!r}, expected {expected}')
    self.at += 1
    return token

  def items(self, ends):
    """Read a list of items up to one of the tokens `ends`, which is not consumed."""
    items = []
    while self.peek() not in ends:
      items.append(self.item())
      if self.peek() not in (',', ';'):
        break
      self.next()
    if self.peek() not in ends or len(items) > _MAX_ITEMS:
      raise ParseError('items')
    return items

  def item(self):
    """Read a value, a relation, or a chain of inequalities, which is an interval."""
    start, lhs = self.at, self.union()
    lhs_text = ''.join(self.tokens[start:self.at])
    if (op := _RELATIONS.get(self.peek())) is None:
      return lhs
    self.next()
    rhs = self.union()
    if self.peek() in _RELATIONS and op == '=':  # a = b = c has the value c.
      while self.peek() == '=':
        self.next()
        rhs = self.union()
      return rhs
    if op in ('<', '<=') and (upper := _RELATIONS.get(self.peek())) in ('<', '<='):  # 1 < x <= 2
      self.next()
      return Collection(('[' if op == '<=' else '(') + (']' if upper == '<=' else ')'), (lhs, self.union()))
    if op == '=' and not isinstance(rhs, tuple):
      return rhs  # (x, y) = (1, 2)
    name = lhs_text if re.fullmatch(r'\\?[A-Za-z]+(?:_\{?\w+\}?)?|[A-Za-z]\([a-z]\)', lhs_text) else ''
    return Relation(op, lhs, rhs, name)

  def union(self):
    sets = [self.sum()]
    while self.peek() == r'\cup':
      self.next()
      sets.append(self.sum())
    return sets[0] if len(sets) == 1 else Collection('union', tuple(sets))

  def sum(self):
    sign = self.next() if self.peek() in (r'\pm', r'\mp') else ''
    value = self.term()
    if sign:
      return Collection('{}', (value, scale(value, -1)))
    while self.peek() in ('+', '-', r'\pm', r'\mp'):
      op, other = self.next(), self.term()
      plus_minus = [pointwise(add, value, scale(other, factor)) for factor in (1, -1)]
      if op in (r'\pm', r'\mp'):
        return Collection('{}', tuple(plus_minus))
      value = plus_minus[op == '-']
    return value

  def term(self):
    value = self.factor()
    while True:
      token = self.peek()
      if token in ('*', '/', r'\times', r'\cdot', r'\div'):
        self.next()
        value = pointwise(divide if token in ('/', r'\div') else multiply, value, self.factor())
      elif token and self.starts_factor(token):
        value = pointwise(multiply, value, self.factor())
      else:
        return value

  def starts_factor(self, token):
    if token[0].isdigit() or token[0] == '.':
      return not self.tokens[self.at - 1][-1].isdigit()  # Two adjacent numbers are not a product.
    return token.isalpha() or token in ('(', '{') or token[0] == '\\' and token[1:] in (
        *_FUNCTIONS, *_GREEK, 'frac', 'sqrt', 'pi', 'binom')

  def factor(self):
    sign = 1
    while self.peek() in ('+', '-'):
      sign *= -1 if self.next() == '-' else 1
    value = self.power()
    return value if sign == 1 else scale(value, -1)

  def power(self):
    self.depth += 1
    if self.depth > _MAX_DEPTH:
      raise ParseError('too deep')
    value = self.atom()
    while self.peek() in ('!', '^', r'\degree'):
      op = self.next()
      if op == '!':
        value = pointwise(_factorial, value)
      elif op == r'\degree':
        value = pointwise(lambda x: multiply(x, _PI / 180), value)
      else:
        value = pointwise(_power, value, self.factor())
    self.depth -= 1
    return value

  def group(self):
    """Read a braced group or a single token; of adjacent digits only the first one, as in LaTeX."""
    if self.peek() == '{':
      self.next()
      value = self.sum()
      self.next('}')
      return value
    token = self.peek()
    if token.isdigit() and len(token) > 1:
      self.tokens[self.at:self.at + 1] = [token[0], token[1:]]
    return self.atom()

  def atom(self):
    token = self.next()
    if token[0].isdigit() or token[0] == '.':
      return constant(_number(token))
    if token in ('(', '['):
      return self.brackets(token)
    if token == '{':
      value = self.sum()
      if self.peek() == r'\over':
        self.next()
        value = pointwise(divide, value, self.sum())
      self.next('}')
      return value
    if token == r'\{':
      items = self.items((r'\}',))
      self.next()
      return Collection('{}', tuple(items))
    if token == '|':
      value = self.sum()
      self.next('|')
      return pointwise(abs, value)
    if token.isalpha() or token[1:] in _GREEK:
      return self.variable(token)
    return self.command(token[1:])

  def brackets(self, opening):
    items = self.items((')', ']'))
    closing = self.next()
    if len(items) == 1 and opening + closing == '()' or (
        len(items) == 1 and opening + closing == '[]' and isinstance(items[0], tuple)):
      return items[0]
    return Collection(opening + closing, tuple(items))

  def variable(self, name):
    if self.peek() == '_':
      self.next()
      name += '_' + (self.next() if self.peek() != '{' else self.braced_text())
    elif name == 'e':
      return constant(Decimal(1).exp())
    return tuple(_variable_value(name, i) for i in range(NUM_POINTS))

  def braced_text(self):
    self.next('{')
    end = self.tokens.index('}', self.at)
    text, self.at = ''.join(self.tokens[self.at:end]), end + 1
    return text

  def command(self, name):
    if name in ('frac', 'binom'):
      top = self.group()
      return pointwise(divide if name == 'frac' else _binomial, top, self.group())
    if name == 'sqrt':
      root = constant(Fraction(2))
      if self.peek() == '[':
        self.next()
        root = self.sum()
        self.next(']')
      return pointwise(_power, self.group(), pointwise(lambda x: divide(Fraction(1), x), root))
    if name in ('pi', 'infty'):
      return constant(_PI if name == 'pi' else Decimal('Infinity'))
    if name in ('emptyset', 'varnothing'):
      return Collection('{}', ())
    if name == 'begin':
      return self.matrix()
    if name in _FUNCTIONS:
      return self.function(name)
    raise ParseError(name)

  def function(self, name):
    base = power = None
    while self.peek() in ('_', '^'):
      if self.next() == '_':
        base = self.group()
      else:
        power = self.group()
    if power is not None and any(x != power[0] or x < 0 for x in power):
      raise ParseError('inverse function')
    value = self.power()
    while (token := self.peek()) and (token.isalpha() or token in (r'\pi', r'\frac')):
      value = pointwise(multiply, value, self.power())
    value = pointwise(functools.partial(_function, name), value)
    if base is not None:
      value = pointwise(divide, value, pointwise(functools.partial(_function, 'ln'), base))
      value = pointwise(lambda x: multiply(x, _function('ln', Fraction(10))), value) if name == 'log' else value
    return value if power is None else pointwise(_power, value, power)

  def matrix(self):
    r"""Read what follows \begin: {pmatrix} a & b \\ c & d \end{pmatrix}."""
    name = self.braced_text()
    if 'matrix' not in name:
      raise ParseError(name)
    rows = [[]]
    while self.peek() != r'\end':
      rows[-1].append(self.sum())
      if self.peek() == r'\\':
        self.next()
        rows.append([])
      elif self.peek() != r'\end':
        self.next('&')
    self.next()
    self.braced_text()
    return Collection('matrix', tuple(Collection('row', tuple(row)) for row in rows if row))


# Arithmetic on Fractions and Decimals.


def constant(number):
  """Return the value of a number that no variable changes."""
  return (number,) * NUM_POINTS


def is_constant(value):
  """Return whether a value is a number that no variable changes."""
  return isinstance(value, tuple) and all(x == value[0] for x in value)


def pointwise(function, *values):
  """Apply a function of numbers at every point; one operand may be an unordered collection, such as 1 ± x."""
  collections = [i for i, v in enumerate(values) if not isinstance(v, tuple)]
  if len(collections) == 1 and getattr(values[collections[0]], 'kind', '') == '{}':
    i = collections[0]
    return Collection('{}', tuple(pointwise(function, *values[:i], v, *values[i + 1:]) for v in values[i].items))
  if collections:
    raise ParseError('arithmetic on collections')
  return tuple(function(*numbers) for numbers in zip(*values, strict=True))


def scale(value, factor):
  """Multiply a value, or every item of a collection, by a number."""
  if isinstance(value, Collection):
    return Collection(value.kind, tuple(scale(item, factor) for item in value.items))
  return pointwise(lambda x: multiply(x, Fraction(factor)), value)


def to_decimal(x):
  """Return a Fraction or Decimal as a Decimal."""
  return Decimal(x.numerator) / Decimal(x.denominator) if isinstance(x, Fraction) else x


def _exact(function):
  """Extend a function of two numbers to mixed types; Fractions stay exact until they have more than _MAX_BITS."""
  def wrapped(a, b):
    if isinstance(a, Fraction) and isinstance(b, Fraction):
      return _bounded(function(a, b))
    return function(to_decimal(a), to_decimal(b))

  return wrapped


def _bounded(x):
  is_small = not isinstance(x, Fraction) or x.numerator.bit_length() + x.denominator.bit_length() <= _MAX_BITS
  return x if is_small else to_decimal(x)


add = _exact(lambda a, b: a + b)
multiply = _exact(lambda a, b: a * b)
divide = _exact(lambda a, b: a / b)


def _number(token):
  mantissa, _, exponent = token.lower().partition('e')
  if len(mantissa) > 300 or abs(int(exponent or 0)) > 100_000:
    raise ParseError('number too long')
  if abs(int(exponent or 0)) > 1000:
    return Decimal(token)
  return Fraction(token.rstrip('.') if not exponent else token)


@functools.lru_cache(maxsize=1024)
def _variable_value(name, index):
  """Return the value of a variable at a point: a fraction between 1 and 3, by a hash of its name."""
  draw = int.from_bytes(hashlib.blake2b(f'{name} {index}'.encode(), digest_size=4).digest())
  return 1 + Fraction(2 * draw, 2**32 - 5)


def _power(base, exponent):
  if isinstance(base, Fraction) and isinstance(exponent, Fraction):
    bits = base.numerator.bit_length() + base.denominator.bit_length()
    if abs(exponent.numerator) * bits <= _MAX_BITS and exponent.denominator <= 64:
      root = _exact_root(base, exponent.denominator)
      if root is not None:
        return root ** exponent.numerator
    if base < 0 and exponent.denominator % 2:
      size = _power(-base, exponent)
      return size if exponent.numerator % 2 == 0 else multiply(size, Fraction(-1))
  return to_decimal(base) ** to_decimal(exponent)


def _exact_root(x, degree):
  """Return the real root as a Fraction, or None where it is irrational."""
  if degree == 1:
    return x
  if x < 0:
    root = _exact_root(-x, degree) if degree % 2 else None
    return None if root is None else -root
  root = Fraction(*(round(Decimal(n) ** (1 / Decimal(degree))) for n in (x.numerator, x.denominator)))
  return root if root ** degree == x else None


def _small_integer(x):
  if not isinstance(x, Fraction) or x.denominator != 1 or not 0 <= x <= 1000:
    raise ParseError('not an integer from 0 to 1000')
  return int(x)


def _factorial(x):
  return _bounded(Fraction(math.factorial(_small_integer(x))))


def _binomial(n, k):
  return _bounded(Fraction(math.comb(_small_integer(n), _small_integer(k))))


def _function(name, x):
  x = to_decimal(x)
  if name in ('ln', 'log', 'exp'):
    return x.exp() if name == 'exp' else x.ln() if name == 'ln' else x.log10()
  if abs(x) > 10**6:
    raise ParseError('angle too large')
  sine, cosine = _sine(x), _sine(x + _PI / 2)
  return {'sin': lambda: sine, 'cos': lambda: cosine, 'tan': lambda: sine / cosine, 'cot': lambda: cosine / sine,
          'sec': lambda: 1 / cosine, 'csc': lambda: 1 / sine}[name]()


def _sine(x):
  """Return the sine by its Taylor series; exactly 0 where it is below the rounding error."""
  x = x.remainder_near(2 * _PI)
  total = term = x
  for n in range(2, 120, 2):
    term = -term * x * x / (n * (n + 1))
    total += term
    if abs(term) < Decimal('1e-65'):
      break
  return total if abs(total) > Decimal('1e-45') else Decimal(0)
