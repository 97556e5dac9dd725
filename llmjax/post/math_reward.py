r"""Final answers of solutions in plain text or LaTeX, and whether two of them are equal.

An answer is an expression, a relation, or a tuple, interval, set or matrix of them (see `math_expressions`).  Numbers
are compared exactly where both are fractions, else to a relative 1e-30.  An answer that cannot be parsed is compared as
text.  math-verify 0.9 was tried: its limits are alarms of 5 s on the main thread.
"""

import dataclasses
import decimal
import functools
import re
from decimal import Decimal
from fractions import Fraction

from llmjax.post.math_expressions import (
  CONTEXT,
  Collection,
  ParseError,
  Relation,
  add,
  constant,
  divide,
  parse,
  pointwise,
  scale,
  to_decimal,
)

MAX_LENGTH = 600  # Characters of an answer; longer ones are compared as text.
_TOLERANCE = Decimal('1e-30')  # Relative; half of the 60 digits are left for cancellation.

# Numbers as people write them: -1,234.5, .5, 3/4, 1e3.
_NUMBER = re.compile(r'-?(?:\d{1,3}(?:,\d{3})+|\d+|(?=\.\d))(?:\.\d+)?(?:[eE][+-]?\d{1,3})?(?:\s*/\s*\d+)?')
_ANSWER_IS = re.compile(r'(?i)\banswer\s*(?:is|:|=)\s*:?')
_MATH = re.compile(r'\$\$(.{1,600}?)\$\$|\$([^$\n]{1,600})\$|\\\((.{1,600}?)\\\)|\\\[(.{1,600}?)\\\]', re.DOTALL)
_FLIPPED = {'<': '>', '>': '<', '<=': '>=', '>=': '<=', '=': '=', '!=': '!='}
_INTERVALS = {'<': '()', '<=': '(]', '>': '()', '>=': '[)'}
# Units whose difference makes answers unequal; other words after a number (apples) are ignored.
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
    first = self.value[0] if isinstance(self.value, tuple) else None
    return first if isinstance(first, Fraction) and all(x == first for x in self.value) else None


def same_answer(solution, reference):
  """Return whether two solutions end in equal answers; False where the reference has none."""
  expected = final_answer(reference)
  answer = None if expected is None else final_answer(solution)
  if answer is None:
    return False
  if answer.value is None or expected.value is None:
    return answer.value is expected.value and _plain(answer.text) == _plain(expected.text) != ''
  if answer.unit and expected.unit and answer.unit != expected.unit:
    return False
  try:
    with decimal.localcontext(CONTEXT):
      if _same(answer.value, expected.value):
        return True
      # 50 % equals 1/2, but the answer to "how many per cent" is 50.
      return answer.percent != expected.percent and _same(
          *(scale(a.value, 100 if a.percent else 1) for a in (answer, expected)))
  except (decimal.DecimalException, ArithmeticError, ParseError):
    return False


@functools.lru_cache(maxsize=4096)
def final_answer(text):
  r"""Extract the final Answer of a solution, or None.

  In this order: the text after the last `####`, the content of the last `\boxed{}`, the text after the last
  "answer is", the whole text, or else its last formula or number.  These are the conventions of GSM8K
  (arXiv:2110.14168) and MATH (arXiv:2103.03874).
  """
  if '####' in text:
    line = (text.rpartition('####')[2].strip().splitlines() or [''])[0]
    return _read(line) or _find_number(line, 0) or (Answer(line) if line else None)
  if (boxed := _last_boxed(text)) is not None:
    return _read(boxed) or ('\\' not in boxed and _find_number(boxed)) or Answer(boxed)
  *before, tail = _ANSWER_IS.split(text[-10 * MAX_LENGTH:])
  tail = tail.strip()
  line = re.split(r'\.\s', tail.splitlines()[0])[0] if tail and before else tail
  if answer := _read(line):
    return answer
  tail = line if before else tail
  formulas = [(match.end(), answer) for match in _MATH.finditer(tail)
              if (answer := _read(''.join(group or '' for group in match.groups())))]
  if formulas and not re.search(r'\d', tail[formulas[-1][0]:]):
    return formulas[-1][1]
  if '\\' in tail:  # LaTeX without dollar signs: what follows the last word.
    formula = re.split(r'(?<![\\A-Za-z{])[A-Za-z]{2,}(?![A-Za-z}])', tail.rstrip('.'))[-1].strip()
    if (answer := _read(formula)) or not re.search(r'\d', tail[max(tail.rfind('}'), tail.rfind('\\')):]):
      return answer or (Answer(line) if line else None)
  return _find_number(tail) or (Answer(line) if line else None)


def final_number(text):
  """Return the final answer of a solution as a Fraction, or None where it is not a number."""
  answer = final_answer(text)
  return answer and answer.number


def _find_number(text, index=-1):
  numbers = _NUMBER.findall(text)
  return _read(re.sub(r'[,\s]', '', numbers[index])) if numbers else None


def _last_boxed(text):
  r"""Return the content of the last \boxed{} or \fbox{}, up to the matching brace, or None."""
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
  return rest[1:]  # The text ends within the braces.


def _plain(text):
  """Normalize a text for comparison: remove markup, white space and case."""
  text = re.sub(r'\\(?:text|mathrm|mbox|textbf|mathbf|textrm|textit|boldsymbol)\b|\\[,;:! ]|[\s{}$]', '', text)
  return text.replace('\\', '').rstrip('.').casefold()


# From text to the grammar of `math_expressions`.


def _read(text):
  """Return the Answer that a whole text is, or None where it cannot be parsed."""
  if not text.strip() or len(text) > MAX_LENGTH:
    return None
  try:
    with decimal.localcontext(CONTEXT):
      expression, unit, percent = _split_unit(_normalize(text))
      value = parse(expression)
      return Answer(text, scale(value, Fraction(1, 100)) if percent else value, unit, percent)
  except (decimal.DecimalException, ArithmeticError, ValueError):
    return None


def _normalize(text):
  """Rewrite the many ways to typeset an answer as one; styles and spaces of LaTeX disappear."""
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
  digit = r'(?:\{\s*(\d+)\s*\}|(\d))'
  whole = r'(?<![\d.^_])(?<!frac)(?<!sqrt)(\d{1,20})'
  text = re.sub(rf'{whole}(?:\s*\\frac\s*{digit}\s*{digit}|\s+(\d+)\s*/\s*(\d+))(?![\d/])', _mixed, text)
  # Separators of thousands; within brackets a comma separates items.
  if not re.search(r'[\[(]|\\\{', text):
    text = re.sub(r'(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])', lambda m: m[0].replace(',', ''), text)
  text = text.strip().rstrip('.').strip()
  if whole := re.fullmatch(r'\\(?:text|mathrm|mbox|textbf)\s*\{([^{}]*)\}', text):
    text = whole[1].strip()
  text = re.sub(r'\\langle(?![A-Za-z])', '(', re.sub(r'\\rangle(?![A-Za-z])', ')', text))
  return re.sub(r'^(?:[A-Za-z]\s*\\in(?![A-Za-z])|\\text\s*\{[^{}]*\}\s*=(?=.))', '', text)


def _repeating(match):
  """Rewrite 0.1\\overline{6} as a fraction."""
  whole, fixed, period = match.groups()
  power, nines = 10 ** len(fixed), 10 ** len(period) - 1
  return f'({(int(whole or 0) * power + int(fixed or 0)) * nines + int(period)}/{power * nines})'


def _mixed(match):
  """Rewrite 1\\frac{1}{2} or 1 1/2 as a sum."""
  whole, top, bottom = match[1], match[2] or match[3] or match[6], match[4] or match[5] or match[7]
  return f'({whole}+{top}/{bottom})' if int(top) < int(bottom) else match[0]


def _split_unit(text):
  """Return (text without its unit, the unit or '', whether the unit is per cent)."""
  markup = r'\\(?:text|mathrm|mbox|textbf|textrm|operatorname)'
  degree = '' if re.search(r'\\(?:sin|cos|tan|cot|sec|csc)', text) else r'\\degree|'
  # Words after a number: a known unit, or a word of three letters or more.
  words = r'\s+(?:[A-Za-z/ ]*[A-Za-z]{3}[A-Za-z/ ]*|[a-z]{2}|[mgshl]|[a-z]+/[a-z]+)'
  match = (re.search(rf'(?<=[\w}})%])\s*((?:{degree}{markup}\s*\{{[^{{}}]*\}})\s*(?:\^\s*\{{?-?\d\}}?)?\s*)+$', text)
           or re.search(rf'(?<=[\d}})]){words}(?:\^\{{?\d\}}?)?$', text)
           or re.search(r'(?<=\d)(?:[cmk]m|[mk]g|ft|lb|ml|min|mph|km/h|m/s)$', text))
  unit, percent = '', False
  if match:
    name = re.sub(markup + r'|[\\{}\s]', '', match[0]).casefold()
    unit, percent, text = _UNITS.get(name, ''), name in ('percent', 'percentage'), text[:match.start()].rstrip()
  sign = re.search(r'\\?%$', text)
  return (text[:sign.start()] if sign else text), unit, percent or bool(sign)


# Comparison of values.


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
    single, value = (one, other) if isinstance(one, Collection) else (other, one)
    return single.kind == '{}' and len(single.items) == 1 and _same(single.items[0], value)
  if one.kind != other.kind or len(one.items) != len(other.items):
    return False
  if one.kind not in ('{}', 'union'):
    return all(map(_same, one.items, other.items))
  unmatched = list(other.items)
  for item in one.items:
    match = next((i for i, candidate in enumerate(unmatched) if _same(item, candidate)), None)
    if match is None:
      return False
    del unmatched[match]
  return True


def _interval(relation):
  """Return the interval that an inequality describes, such as (3, infinity) for x > 3."""
  bound, infinity = relation.rhs, constant(Decimal('Infinity'))
  below = relation.op in ('<', '<=')
  return Collection(_INTERVALS[relation.op], (scale(infinity, -1), bound) if below else (bound, infinity))


def _same_number(a, b):
  if isinstance(a, Fraction) and isinstance(b, Fraction):
    return a == b
  a, b = to_decimal(a), to_decimal(b)
  if a.is_infinite() or b.is_infinite():
    return a == b
  return abs(a - b) <= max(_TOLERANCE * max(abs(a), abs(b)), Decimal('1e-45'))


def _same_relation(one, other):
  """Return whether two relations differ by a factor: 2x + 4y = 6 and x + 2y = 3, also -x > 1 and x < -1."""
  if not all(isinstance(side, tuple) for side in (one.lhs, one.rhs, other.lhs, other.rhs)):
    return False
  ratios = pointwise(lambda a, b, c, d: divide(add(a, -b), add(c, -d)), one.lhs, one.rhs, other.lhs, other.rhs)
  op = other.op if ratios[0] > 0 else _FLIPPED[other.op]
  return one.op == op and ratios[0] != 0 and all(_same_number(r, ratios[0]) for r in ratios)
