r"""Final answers of solutions in plain text or LaTeX, and whether two of them are equal.

An answer is an expression, a relation, or a tuple, interval, set or matrix of them.  Expressions are compared by value:
exact fractions where there are some, else 60 digits, and with variables at fixed points (polynomial identity testing).
Model output is bounded by counts (characters, depth, digits) and never by time, so a text is graded alike on every
machine and in every thread.  math-verify 0.9 was tried: its limits are alarms of 5 s on the main thread.
"""

import dataclasses
import decimal
import fractions
import functools
import hashlib
import math
import re

Fraction, Decimal = fractions.Fraction, decimal.Decimal

MAX_LENGTH = 600  # Characters of an answer; longer ones are compared as text.
_MAX_DEPTH, _MAX_BITS, _MAX_ITEMS = 40, 8192, 100
_POINTS = 3  # At which expressions with variables are compared.
_CONTEXT = decimal.Context(prec=60, Emax=10**6, Emin=-10**6, traps=[
    decimal.InvalidOperation, decimal.DivisionByZero, decimal.Overflow, decimal.Underflow])
_TOLERANCE = Decimal('1e-30')  # Relative; half of the digits are left for cancellation.
_PI = Decimal('3.14159265358979323846264338327950288419716939937510582097494459230781640628620899')

# Numbers as people write them: -1,234.5, .5, 3/4, 1e3.
_NUMBER = re.compile(r'-?(?:\d{1,3}(?:,\d{3})+|\d+|(?=\.\d))(?:\.\d+)?(?:[eE][+-]?\d{1,3})?(?:\s*/\s*\d+)?')
_ANSWER_IS = re.compile(r'(?i)\banswer\s*(?:is|:|=)\s*:?')
_MATHS = re.compile(r'\$\$(.{1,600}?)\$\$|\$([^$\n]{1,600})\$|\\\((.{1,600}?)\\\)|\\\[(.{1,600}?)\\\]', re.DOTALL)
_TOKEN = re.compile(r'\s*(?:(?:\d+\.\d+|\.\d+|\d+\.?)(?:[eE][+-]?\d{1,6})?|\\\\|\\[A-Za-z]+|\\[{}]|\S)')
_FUNCTIONS = ('ln', 'log', 'exp', 'sin', 'cos', 'tan', 'cot', 'sec', 'csc')
_GREEK = ('alpha beta gamma delta epsilon theta lambda mu nu rho sigma tau phi varphi psi omega Delta Theta Lambda '
          'Sigma Phi Psi Omega').split()
_RELATIONS = {'=': '=', '<': '<', '>': '>', r'\lt': '<', r'\gt': '>', r'\le': '<=', r'\leq': '<=', r'\ge': '>=',
              r'\geq': '>=', r'\ne': '!=', r'\neq': '!='}
_FLIPPED = {'<': '>', '>': '<', '<=': '>=', '>=': '<=', '=': '=', '!=': '!='}
_INTERVALS = {'<': '()', '<=': '(]', '>': '()', '>=': '[)'}
# Units that differ in meaning; others (apples, dollars) are not compared.
_UNITS = {alias: names.split()[0] for names in (
    'mm millimeter millimeters millimetres', 'cm centimeter centimeters centimetres', 'm meter meters metre metres',
    'km kilometer kilometers kilometres', 'in inch inches', 'ft foot feet', 'yd yard yards', 'mi mile miles',
    'mg milligram milligrams', 'g gram grams', 'kg kilogram kilograms', 'lb lbs pound pounds', 'oz ounce ounces',
    's sec second seconds', 'min minute minutes', 'h hr hour hours', 'day days', 'week weeks', 'year years',
    'ml milliliter milliliters', 'l liter liters litre litres', 'degree degrees', 'mph', 'km/h', 'm/s', 'cent cents',
    'dollar dollars') for alias in names.split()}
_REPLACED = {'−': '-', '–': '-', '×': r'\times ', '·': r'\cdot ', '÷': '/', '√': r'\sqrt ', 'π': r'\pi ', '≤': r'\le ',
             '≥': r'\ge ', '≠': r'\ne ', '∞': r'\infty ', '∪': r'\cup ', '∈': r'\in ', '°': r'^\circ ', '⁄': '/',
             '±': r'\pm ', '½': r'\frac12', '¼': r'\frac14', '¾': r'\frac34', '％': '%', '，': ',', '∅': r'\emptyset '}
_SUPERSCRIPTS = str.maketrans('⁰¹²³⁴⁵⁶⁷⁸⁹⁻', '0123456789-')


class Unreadable(ValueError):
  """A text is no mathematics that is understood here, or is too large."""


@dataclasses.dataclass(frozen=True)
class Collection:
  """kind: its brackets, such as '(]'; '{}' (a set, or values without brackets) and 'union' have no order."""

  kind: str
  items: tuple


@dataclasses.dataclass(frozen=True)
class Relation:
  """lhs and rhs: values.  name: of the variable that is all of lhs, or ''."""

  op: str
  lhs: tuple
  rhs: tuple
  name: str = ''


@dataclasses.dataclass(frozen=True)
class Answer:
  """value: a tuple of numbers at the points, a Collection or a Relation; None where only the text can be compared."""

  text: str
  value: object = None
  unit: str = ''
  percent: bool = False

  @property
  def number(self):
    """The value as a Fraction, or None where it is something else."""
    one = self.value[0] if isinstance(self.value, tuple) else None
    return one if isinstance(one, Fraction) and all(x == one for x in self.value) else None


def equal(text, reference):
  """Returns whether two solutions end with equal answers; False where the reference has none."""
  right = final_answer(reference)
  if right is None:
    return False
  found = final_answer(text)
  if found is None:
    return False
  if found.value is None or right.value is None:
    return found.value is right.value and _plain(found.text) == _plain(right.text) != ''
  if found.unit and right.unit and found.unit != right.unit:
    return False
  try:
    with decimal.localcontext(_CONTEXT):
      if _same(found.value, right.value):
        return True
      # 50 % is a half, but "how many per cent" asks for 50.
      return found.percent != right.percent and _same(
          *(_scale(a.value, 100 if a.percent else 1) for a in (found, right)))
  except (decimal.DecimalException, ArithmeticError, Unreadable):
    return False


@functools.lru_cache(maxsize=4096)
def final_answer(text):
  r"""Returns the Answer that a solution ends with, or None.

  What stands after the last `####`, in the last `\boxed{}`, after the last "answer is", or is the whole text, else the
  last mathematics or number of it: the conventions of GSM8K (arXiv:2110.14168) and MATH (arXiv:2103.03874).
  """
  if '####' in text:
    line = (text.rpartition('####')[2].strip().splitlines() or [''])[0]
    return _read(line) or _last_number(line, first=True) or (Answer(line) if line else None)
  if (boxed := _last_boxed(text)) is not None:
    return _read(boxed) or ('\\' not in boxed and _last_number(boxed)) or Answer(boxed)
  *before, tail = _ANSWER_IS.split(text[-10 * MAX_LENGTH:])
  tail = tail.strip()
  line = re.split(r'\.\s', tail.splitlines()[0])[0] if tail and before else tail
  if found := _read(line):
    return found
  tail = line if before else tail
  segments = [(m.end(), found) for m in _MATHS.finditer(tail) if (found := _read(''.join(g or '' for g in m.groups())))]
  if segments and not re.search(r'\d', tail[segments[-1][0]:]):
    return segments[-1][1]
  if '\\' in tail:  # LaTeX without dollars: what follows the last word.
    run = re.split(r'(?<![\\A-Za-z{])[A-Za-z]{2,}(?![A-Za-z}])', tail.rstrip('.'))[-1].strip()
    if (found := _read(run)) or not re.search(r'\d', tail[max(tail.rfind('}'), tail.rfind('\\')):]):
      return found or (Answer(line) if line else None)
  return _last_number(tail) or (Answer(line) if line else None)


def final_number(text):
  """Returns the number that a solution ends with, as a Fraction, or None."""
  found = final_answer(text)
  return found and found.number


def _last_number(text, first=False):
  found = _NUMBER.findall(text)
  return _read(re.sub(r'[,\s]', '', found[0 if first else -1])) if found else None


def _last_boxed(text):
  r"""Returns what the last \boxed{} or \fbox{} holds, its braces balanced, or None."""
  start = max(text.rfind(r'\boxed'), text.rfind(r'\fbox'))
  if start < 0:
    return None
  rest = text[start:].partition('box')[2].removeprefix('ed').lstrip()
  if not rest.startswith('{'):
    return rest.split()[0].strip('$.') if rest.split() else ''
  depth = 0
  for i, c in enumerate(rest):
    depth += (c == '{') - (c == '}')
    if not depth:
      return rest[1:i]
  return rest[1:]  # Broken off.


def _plain(text):
  """Returns a text for comparison as such: without markup, white space and case."""
  text = re.sub(r'\\(?:text|mathrm|mbox|textbf|mathbf|textrm|textit|boldsymbol)\b|\\[,;:! ]|[\s{}$]', '', text)
  return text.replace('\\', '').rstrip('.').casefold()


# From text to tokens.


def _read(text):
  """Returns the Answer of a text that is all mathematics, or None."""
  if not text.strip() or len(text) > MAX_LENGTH:
    return None
  try:
    with decimal.localcontext(_CONTEXT):
      clean, unit, percent = _without_unit(_clean(text))
      value = _Parser(clean).answer()
      return Answer(text, _scale(value, Fraction(1, 100)) if percent else value, unit, percent)
  except (decimal.DecimalException, ArithmeticError, ValueError):
    return None


def _clean(text):
  text = re.sub(r'√\s*(\d+)', r'\\sqrt{\1}', text)
  for old, new in _REPLACED.items():
    text = text.replace(old, new)
  text = re.sub('[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+', lambda m: '^{' + m[0].translate(_SUPERSCRIPTS) + '}', text)
  text = re.sub(r'(?<=\d)\{,\}(?=\d{3})', '', text)
  text = re.sub(r'\\(?:left|right|[bB]igg?[lr]?|displaystyle)(?![A-Za-z])|(?<!\\)\\[!,;:()\[\]]|\\?\$|[€£]', '', text)
  text = re.sub(r'\\(?:quad|qquad)(?![A-Za-z])|(?<!\\)\\ |~', ' ', text)
  text = re.sub(r'\\[dtc]frac(?![A-Za-z])', r'\\frac', text)
  text = re.sub(r'\\(?:mathbf|boldsymbol|mathbb|mathit)\s*\{([^{}]*)\}', r'{\1}', text)
  text = re.sub(r'\\(?:text|mathrm|mbox)\s*\{\s*(?:and|or)\s*\}|(?<=[\d})])\s+(?:and|or)\s+', ' , ', text)
  text = re.sub(r'\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![A-Za-z]))|\\degree(?![A-Za-z])', r'\\degree ', text)
  text = re.sub(r'(?<![\\A-Za-z])(sqrt|pi|infinity|infty|ln|log|exp|sin|cos|tan)(?![A-Za-z])',
                lambda m: '\\' + m[1].replace('infinity', 'infty'), text)
  text = re.sub(r'(\d*)\.(\d*)\\(?:overline|bar)\s*\{(\d{1,20})\}', _repeating, text)
  part = r'(?:\{\s*(\d+)\s*\}|(\d))'
  whole = r'(?<![\d.^_])(?<!frac)(?<!sqrt)(\d{1,20})'
  text = re.sub(rf'{whole}(?:\s*\\frac\s*{part}\s*{part}|\s+(\d+)\s*/\s*(\d+))(?![\d/])', _mixed, text)
  # Thousands, unless brackets around them make the comma one between items.
  if not re.search(r'[\[(]|\\\{', text):
    text = re.sub(r'(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])', lambda m: m[0].replace(',', ''), text)
  text = text.strip().rstrip('.').strip()
  if whole := re.fullmatch(r'\\(?:text|mathrm|mbox|textbf)\s*\{([^{}]*)\}', text):
    text = whole[1].strip()
  text = re.sub(r'\\langle(?![A-Za-z])', '(', re.sub(r'\\rangle(?![A-Za-z])', ')', text))
  return re.sub(r'^(?:[A-Za-z]\s*\\in(?![A-Za-z])|\\text\s*\{[^{}]*\}\s*=(?=.))', '', text)


def _repeating(match):
  """0.1\\overline{6} as a fraction."""
  whole, fixed, period = match.groups()
  scale, nines = 10 ** len(fixed), 10 ** len(period) - 1
  return f'({(int(whole or 0) * scale + int(fixed or 0)) * nines + int(period)}/{scale * nines})'


def _mixed(match):
  """1\\frac{1}{2} or 1 1/2 as a sum."""
  whole, top, bottom = match[1], match[2] or match[3] or match[6], match[4] or match[5] or match[7]
  return f'({whole}+{top}/{bottom})' if int(top) < int(bottom) else match[0]


def _without_unit(text):
  """Returns (text, unit or '', whether it is of per cent)."""
  markup = r'\\(?:text|mathrm|mbox|textbf|textrm|operatorname)'
  degree = '' if re.search(r'\\(?:sin|cos|tan|cot|sec|csc)', text) else r'\\degree|'
  found = re.search(rf'(?<=[\w}})%])\s*((?:{degree}{markup}\s*\{{[^{{}}]*\}})\s*(?:\^\s*\{{?-?\d\}}?)?\s*)+$', text)
  # Plain words after a number: a known unit, or a word of three letters or more.
  words = r'\s+(?:[A-Za-z/ ]*[A-Za-z]{3}[A-Za-z/ ]*|[a-z]{2}|[mgshl]|[a-z]+/[a-z]+)'
  found = found or re.search(rf'(?<=[\d}})]){words}(?:\^\{{?\d\}}?)?$', text)
  found = found or re.search(r'(?<=\d)(?:[cmk]m|[mk]g|ft|lb|ml|min|mph|km/h|m/s)$', text)
  unit, percent = '', False
  if found:
    name = re.sub(markup + r'|[\\{}\s]', '', found[0]).casefold()
    unit, percent, text = _UNITS.get(name, ''), name in ('percent', 'percentage'), text[:found.start()].rstrip()
  sign = re.search(r'\\?%$', text)
  return (text[:sign.start()] if sign else text), unit, percent or bool(sign)


# From tokens to values.


class _Parser:
  """A descent over the grammar of an answer that computes as it reads.  Raises Unreadable and ArithmeticError."""

  def __init__(self, text):
    if not re.search(r'[\\^_{]', text) and re.search(r'[A-Za-z]{2}', re.sub(r'\d[eE][+-]?\d', '', text)):
      raise Unreadable('words')
    if re.search(r'(?<![\\A-Za-z])[A-Za-z]{3}', re.sub(r'\\(?:begin|end)\{\w+\}', '', text)):
      raise Unreadable('words')
    self.tokens, at, text = [], 0, text.rstrip()
    while at < len(text):
      match = _TOKEN.match(text, at)
      self.tokens.append(match[0].strip())
      at = match.end()
    self.at = self.depth = 0

  def answer(self):
    items = self.items(('',))
    if not items:
      raise Unreadable('nothing')
    names = {item.name for item in items if isinstance(item, Relation) and item.op == '='}
    if len(names) == 1 and all(isinstance(i, Relation) and i.op == '=' and _is_constant(i.rhs) for i in items) and (
        '' not in names or len(items) == 1 and _is_constant(items[0].lhs)):
      items = [item.rhs for item in items]  # x = 3; x = 1, x = 2; 3 + 4 = 7.
    return items[0] if len(items) == 1 else Collection('{}', tuple(items))

  def peek(self):
    return self.tokens[self.at] if self.at < len(self.tokens) else ''

  def next(self, expected=None):
    token = self.peek()
    if token == '' or (expected and token not in expected):
      raise Unreadable(f'{token!r}, not {expected}')
    self.at += 1
    return token

  def items(self, ends):
    """Returns the items up to one of the tokens `ends`, which is not read."""
    found = []
    while self.peek() not in ends:
      found.append(self.item())
      if self.peek() not in (',', ';'):
        break
      self.next()
    if self.peek() not in ends or len(found) > _MAX_ITEMS:
      raise Unreadable('items')
    return found

  def item(self):
    start, lhs = self.at, self.union()
    named = self.tokens[start:self.at]
    if (op := _RELATIONS.get(self.peek())) is None:
      return lhs
    self.next()
    rhs = self.union()
    if self.peek() in _RELATIONS and op == '=':  # a = b = c ends in c.
      return self.chain(rhs)
    if op in ('<', '<=') and (upper := _RELATIONS.get(self.peek())) in ('<', '<='):  # 1 < x <= 2
      self.next()
      return Collection(('[' if op == '<=' else '(') + (']' if upper == '<=' else ')'), (lhs, self.union()))
    if op == '=' and not isinstance(rhs, tuple):
      return rhs  # (x, y) = (1, 2)
    name = ''.join(named) if re.fullmatch(r'\\?[A-Za-z]+(?:_\{?\w+\}?)?|[A-Za-z]\([a-z]\)', ''.join(named)) else ''
    return Relation(op, lhs, rhs, name)

  def chain(self, value):
    while self.peek() == '=':
      self.next()
      value = self.union()
    return value

  def union(self):
    parts = [self.sum()]
    while self.peek() == r'\cup':
      self.next()
      parts.append(self.sum())
    return parts[0] if len(parts) == 1 else Collection('union', tuple(parts))

  def sum(self):
    sign = self.next() if self.peek() in (r'\pm', r'\mp') else ''
    value = self.term()
    if sign:
      return Collection('{}', (value, _scale(value, -1)))
    while self.peek() in ('+', '-', r'\pm', r'\mp'):
      op, other = self.next(), self.term()
      both = [_each(_add, value, _scale(other, factor)) for factor in (1, -1)]
      if op in (r'\pm', r'\mp'):
        return Collection('{}', tuple(both))
      value = both[op == '-']
    return value

  def term(self):
    value = self.factor()
    while True:
      token = self.peek()
      if token in ('*', '/', r'\times', r'\cdot', r'\div'):
        self.next()
        other = self.factor()
        value = _each(_divide if token in ('/', r'\div') else _multiply, value, other)
      elif token and self.starts_factor(token):
        value = _each(_multiply, value, self.factor())
      else:
        return value

  def starts_factor(self, token):
    if token[0].isdigit() or token[0] == '.':
      return not self.tokens[self.at - 1][-1].isdigit()  # Two numbers side by side are no product.
    return token.isalpha() or token in ('(', '{') or token[0] == '\\' and token[1:] in (
        *_FUNCTIONS, *_GREEK, 'frac', 'sqrt', 'pi', 'binom')

  def factor(self):
    sign = 1
    while self.peek() in ('+', '-'):
      sign *= -1 if self.next() == '-' else 1
    value = self.power()
    return value if sign == 1 else _scale(value, -1)

  def power(self):
    self.depth += 1
    if self.depth > _MAX_DEPTH:
      raise Unreadable('too deep')
    value = self.atom()
    while self.peek() in ('!', '^', r'\degree'):
      op = self.next()
      if op == '!':
        value = _each(_factorial, value)
      elif op == r'\degree':
        value = _each(lambda x: _multiply(x, _PI / 180), value)
      else:
        value = _each(_power, value, self.factor())
    self.depth -= 1
    return value

  def group(self):
    """Returns the value in braces, or of one token; of digits side by side the first one alone, as LaTeX has it."""
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
      return _constant(_number(token))
    if token in ('(', '['):
      return self.brackets(token)
    if token == '{':
      value = self.sum()
      if self.peek() == r'\over':
        self.next()
        value = _each(_divide, value, self.sum())
      self.next('}')
      return value
    if token == r'\{':
      items = self.items((r'\}',))
      self.next()
      return Collection('{}', tuple(items))
    if token == '|':
      value = self.sum()
      self.next('|')
      return _each(abs, value)
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
      name += '_' + (self.next() if self.peek() != '{' else self.subscript())
    elif name == 'e':
      return _constant(Decimal(1).exp())
    return tuple(_point(name, i) for i in range(_POINTS))

  def subscript(self):
    self.next('{')
    end = self.tokens.index('}', self.at)
    name, self.at = ''.join(self.tokens[self.at:end]), end + 1
    return name

  def command(self, name):
    if name == 'frac':
      top = self.group()
      return _each(_divide, top, self.group())
    if name == 'sqrt':
      root = _constant(Fraction(2))
      if self.peek() == '[':
        self.next()
        root = self.sum()
        self.next(']')
      return _each(_power, self.group(), _each(lambda x: _divide(Fraction(1), x), root))
    if name == 'binom':
      top = self.group()
      return _each(_binomial, top, self.group())
    if name == 'pi':
      return _constant(_PI)
    if name == 'infty':
      return _constant(Decimal('Infinity'))
    if name in ('emptyset', 'varnothing'):
      return Collection('{}', ())
    if name == 'begin':
      return self.matrix()
    if name in _FUNCTIONS:
      return self.function(name)
    raise Unreadable(name)

  def function(self, name):
    base = power = None
    while self.peek() in ('_', '^'):
      if self.next() == '_':
        base = self.group()
      else:
        power = self.group()
    if power is not None and any(x != power[0] or x < 0 for x in power):
      raise Unreadable('an inverse function')
    value = self.power()
    while (token := self.peek()) and (token.isalpha() or token in (r'\pi', r'\frac')):
      value = _each(_multiply, value, self.power())
    value = _each(functools.partial(_function, name), value)
    if base is not None:
      value = _each(_divide, value, _each(functools.partial(_function, 'ln'), base))
      value = _each(lambda x: _multiply(x, _function('ln', Fraction(10))), value) if name == 'log' else value
    return value if power is None else _each(_power, value, power)

  def matrix(self):
    r"""Reads what follows \begin: {pmatrix} a & b \\ c & d \end{pmatrix}."""
    name = self.subscript()
    if 'matrix' not in name:
      raise Unreadable(name)
    rows = [[]]
    while self.peek() != r'\end':
      rows[-1].append(self.sum())
      if self.peek() == r'\\':
        self.next()
        rows.append([])
      elif self.peek() != r'\end':
        self.next('&')
    self.next()
    self.subscript()
    return Collection('matrix', tuple(Collection('row', tuple(row)) for row in rows if row))


# Values: tuples of a Fraction or a Decimal for each point.


def _constant(number):
  return (number,) * _POINTS


def _is_constant(value):
  return isinstance(value, tuple) and all(x == value[0] for x in value)


def _number(token):
  mantissa, _, exponent = token.lower().partition('e')
  if len(mantissa) > 300 or abs(int(exponent or 0)) > 100_000:
    raise Unreadable('a long number')
  if abs(int(exponent or 0)) > 1000:
    return Decimal(token)
  return Fraction(token.rstrip('.') if not exponent else token)


@functools.lru_cache(maxsize=1024)
def _point(name, index):
  """Returns the value of a variable at a point: a fraction between 1 and 3 that the name decides."""
  draw = int.from_bytes(hashlib.blake2b(f'{name} {index}'.encode(), digest_size=4).digest())
  return 1 + Fraction(2 * draw, 2**32 - 5)


def _each(function, *values):
  """Returns function(*numbers) at every point; of values with two signs, both."""
  several = [i for i, v in enumerate(values) if not isinstance(v, tuple)]
  if len(several) == 1 and getattr(values[several[0]], 'kind', '') == '{}':
    i = several[0]
    return Collection('{}', tuple(_each(function, *values[:i], v, *values[i + 1:]) for v in values[i].items))
  if several:
    raise Unreadable('arithmetic of collections')
  return tuple(function(*numbers) for numbers in zip(*values, strict=True))


def _scale(value, factor):
  if isinstance(value, Collection):
    return Collection(value.kind, tuple(_scale(item, factor) for item in value.items))
  return _each(lambda x: _multiply(x, Fraction(factor)), value)


def _decimal(x):
  return Decimal(x.numerator) / Decimal(x.denominator) if isinstance(x, Fraction) else x


def _bounded(x):
  """Returns a fraction as it is, or with 60 digits where it has become large."""
  small = not isinstance(x, Fraction) or x.numerator.bit_length() + x.denominator.bit_length() <= _MAX_BITS
  return x if small else _decimal(x)


def _exactly(function):
  """Makes of a function of two fractions one that takes Decimals as well."""
  def both(a, b):
    if isinstance(a, Fraction) and isinstance(b, Fraction):
      return _bounded(function(a, b))
    return function(_decimal(a), _decimal(b))

  return both


_add = _exactly(lambda a, b: a + b)
_multiply = _exactly(lambda a, b: a * b)
_divide = _exactly(lambda a, b: a / b)


def _power(base, exponent):
  if isinstance(base, Fraction) and isinstance(exponent, Fraction):
    bits = base.numerator.bit_length() + base.denominator.bit_length()
    if abs(exponent.numerator) * bits <= _MAX_BITS and exponent.denominator <= 64:
      root = _root(base, exponent.denominator)
      if isinstance(root, Fraction):
        return root ** exponent.numerator
    if base < 0 and exponent.denominator % 2:
      size = _power(-base, exponent)
      return size if exponent.numerator % 2 == 0 else _multiply(size, Fraction(-1))
  return _decimal(base) ** _decimal(exponent)


def _root(x, degree):
  """Returns the real root as a Fraction where it is one, else None."""
  if degree == 1:
    return x
  if x < 0:
    return -_root(-x, degree) if degree % 2 and _root(-x, degree) is not None else None
  parts = [round(Decimal(n) ** (1 / Decimal(degree))) for n in (x.numerator, x.denominator)]
  found = Fraction(*parts)
  return found if found ** degree == x else None


def _whole(x, most):
  if not isinstance(x, Fraction) or x.denominator != 1 or not 0 <= x <= most:
    raise Unreadable('no small whole number')
  return int(x)


def _factorial(x):
  return _bounded(Fraction(math.factorial(_whole(x, 1000))))


def _binomial(n, k):
  return _bounded(Fraction(math.comb(_whole(n, 1000), _whole(k, 1000))))


def _function(name, x):
  x = _decimal(x)
  if name in ('ln', 'log', 'exp'):
    return x.exp() if name == 'exp' else x.ln() if name == 'ln' else x.log10()
  if abs(x) > 10**6:
    raise Unreadable('a large angle')
  sine, cosine = _sine(x), _sine(x + _PI / 2)
  return {'sin': lambda: sine, 'cos': lambda: cosine, 'tan': lambda: sine / cosine, 'cot': lambda: cosine / sine,
          'sec': lambda: 1 / cosine, 'csc': lambda: 1 / sine}[name]()


def _sine(x):
  """Returns the sine by its series; 0 where it is 0 but for rounding."""
  x = x.remainder_near(2 * _PI)
  total = term = x
  for n in range(2, 120, 2):
    term = -term * x * x / (n * (n + 1))
    total += term
    if abs(term) < Decimal('1e-65'):
      break
  return total if abs(total) > Decimal('1e-45') else Decimal(0)


# Equality.


def _same(one, other):
  if isinstance(one, tuple) and isinstance(other, tuple):
    return all(map(_same_number, one, other))
  if isinstance(one, Relation) and isinstance(other, Relation):
    return _same_relation(one, other)
  if isinstance(one, Relation) or isinstance(other, Relation):
    relation, value = (one, other) if isinstance(one, Relation) else (other, one)
    if isinstance(value, Collection):
      return relation.op in _INTERVALS and bool(relation.name) and _same(_interval(relation), value)
    return bool(relation.name) and relation.op == '=' and _same(relation.rhs, value)
  if not isinstance(one, Collection) or not isinstance(other, Collection):
    single = next(v for v in (one, other) if isinstance(v, Collection))
    return single.kind == '{}' and len(single.items) == 1 and _same(single.items[0], other if single is one else one)
  if one.kind != other.kind or len(one.items) != len(other.items):
    return False
  if one.kind not in ('{}', 'union'):
    return all(map(_same, one.items, other.items))
  left = list(other.items)
  for item in one.items:
    match = next((i for i, theirs in enumerate(left) if _same(item, theirs)), None)
    if match is None:
      return False
    del left[match]
  return True


def _interval(relation):
  """Returns x > 3 as the interval from 3 to infinity."""
  ends = relation.rhs, _constant(Decimal('Infinity'))
  below = relation.op in ('<', '<=')
  return Collection(_INTERVALS[relation.op], (_scale(ends[1], -1), ends[0]) if below else ends)


def _same_number(a, b):
  if isinstance(a, Fraction) and isinstance(b, Fraction):
    return a == b
  a, b = _decimal(a), _decimal(b)
  if a.is_infinite() or b.is_infinite():
    return a == b
  return abs(a - b) <= max(_TOLERANCE * max(abs(a), abs(b)), Decimal('1e-45'))


def _same_relation(one, other):
  """Whether they differ by a factor: 2x + 4y = 6 and x + 2y = 3, also -x > 1 and x < -1."""
  if not all(isinstance(side, tuple) for side in (one.lhs, one.rhs, other.lhs, other.rhs)):
    return False
  ratios = _each(lambda a, b, c, d: _divide(_add(a, -b), _add(c, -d)), one.lhs, one.rhs, other.lhs, other.rhs)
  op = other.op if ratios[0] > 0 else _FLIPPED[other.op]
  return one.op == op and ratios[0] != 0 and all(_same_number(r, ratios[0]) for r in ratios)
