"""Final answers of solutions: which texts are equal in value, which are not, and that no text takes long."""

import threading
import time

import hypothesis
import hypothesis.strategies as st
import pytest

from llmjax.post import math_reward

EQUAL = [
    # Fractions and decimals.
    (r'\frac{1}{2}', r'\frac{1}{2}'), (r'\frac{1}{2}', '1/2'), (r'\frac12', '0.5'), (r'\dfrac{3}{6}', '.5'),
    (r'-\frac{1}{2}', r'\frac{-1}{2}'), (r'\frac{1}{-2}', '-0.5'), ('−3', '-3'), ('+5', '5'), (r'\frac{10}{4}', '2.50'),
    (r'{1 \over 2}', '0.5'), (r'\frac{\frac{1}{2}}{3}', '1/6'), (r'0.\overline{3}', r'\frac13'), ('½', '0.5'),
    (r'0.1\overline{6}', '1/6'), ('12.', '12'), ('007', '7'),
    # Mixed numbers.
    (r'1\frac{1}{2}', '1.5'), ('1 1/2', r'\frac32'), (r'-2\frac14', '-2.25'), (r'2\frac{1}{2}\text{ cups}', '5/2'),
    # Roots and powers.
    (r'\sqrt{8}', r'2\sqrt{2}'), (r'\sqrt2', '2^{1/2}'), (r'\sqrt[3]{27}', '3'),
    (r'\frac{1}{\sqrt{2}}', r'\frac{\sqrt2}{2}'),
    (r'10^{3}', '1000'), (r'(-8)^{1/3}', '-2'), (r'2^{-2}', '0.25'), ('√16', '4'), (r'\sqrt{\frac{4}{9}}', '2/3'),
    (r'\sqrt{3+2\sqrt{2}}', r'1+\sqrt{2}'), ('-2^2', '-4'), ('2^10', '1024'), ('10³', '1000'), ('sqrt(2)', r'\sqrt{2}'),
    # Scientific notation and thousands.
    (r'1.5\times 10^{3}', '1500'), (r'1.5\cdot10^3', '1.5e3'), ('1.5 × 10³', '1,500'), (r'2\times10^{-4}', '0.0002'),
    ('1,234,567', '1234567'), (r'1{,}234', '1234'), (r'1,\!234', '1234'), (r'12\,345', '12345'),
    (r'\$1,234.50', '1234.5'),
    ('6.02e23', r'6.02 \times 10^{23}'),
    # Units and per cent.
    (r'12\text{ cm}', '12'), (r'12\text{ cm}^2', '12'), ('12 apples', '12'), (r'\$12', '12 dollars'),
    (r'90^\circ', '90'),
    (r'20^{\circ}\text{C}', '20'), ('12cm', r'12\text{ centimeters}'), (r'5\mathrm{~km/h}', '5'),
    (r'3\pi\text{ cm}', r'3\pi'),
    (r'50\%', '0.5'), (r'50\%', '50'), (r'50\%', r'\frac12'), ('50%', r'50\%'), ('12.5 percent', r'12.5\%'),
    # Collections.
    ('(1, 2)', r'\left(1,2\right)'), (r'(1, \frac{1}{2})', '(1,0.5)'), ('1, 2', '2,1'), (r'\{1,2\}', r'\{2,1\}'),
    (r'1 \text{ and } 2', '1,2'), ('x=1, x=2', '1,2'), (r'x = 1 \text{ or } x = -2', '-2,1'), (r'\pm 3', '3,-3'),
    (r'\frac{1\pm\sqrt{5}}{2}', r'\frac{1+\sqrt5}{2}, \frac{1-\sqrt5}{2}'), ('[1,2)', r'[1, 2)'),
    (r'(-\infty,2]\cup[3,\infty)', r'\left[3,\infty\right)\cup\left(-\infty,2\right]'), (r'x \in [0,1]', '[0,1]'),
    (r'\emptyset', r'\varnothing'),
    (r'\begin{pmatrix}1\\ \frac12\end{pmatrix}', r'\begin{pmatrix} 1 \\ 0.5 \end{pmatrix}'),
    (r'\langle 1,2\rangle', '(1,2)'), (r'x \ge 3', r'[3,\infty)'), (r'1 < x \le 2', '(1,2]'), ('x<2', r'(-\infty, 2)'),
    # Expressions and relations.
    ('x+1', '1+x'), (r'\frac{x+1}{2}', r'\frac12x+\frac12'), ('(x+1)^2', 'x^2+2x+1'), ('x = 5', '5'),
    ('y=2x+1', '2x+1'),
    ('2x+4y=6', 'x+2y=3'), ('y = 2x', '2x - y = 0'), ('x > 3', r'-x < -3'), (r'x \ge 3', r'3 \le x'),
    (r'f(x)=x^2', 'x^2'),
    (r'2\pi r', r'r \cdot 2 \pi'), (r'\ln(e^2)', '2'), (r'\log_2 8', '3'), (r'\sin 30^\circ', r'\frac12'),
    (r'\cos\frac{\pi}{3}', '0.5'), (r'\tan(\pi/4)', '1'), ('5!', '120'), (r'\binom{5}{2}', '10'),
    ('x_{1}+x_2', 'x_2 + x_1'),
    (r'a^{b}', 'a^b'), (r'\sin^2 x + \cos^2 x', '1'), ('3 + 4 = 7', '7'), ('x = 3 + 4 = 7', '7'), ('|-3|', '3'),
    # Text.
    (r'\text{Yes}', 'yes'), (r'\text{(A)}', 'A'), (r'\text{Tuesday}', r'\text{ tuesday }'),
    ('\\text{No solution}', 'no solution'),
]
DIFFERENT = [
    (r'\frac{1}{2}', r'\frac{3}{2}'), (r'10^{3}', '3'), (r'\frac{1}{2}', '2'), ('1.5', r'1\frac{1}{3}'), ('5', '-5'),
    ('0.333', r'\frac13'), ('3.14159', r'\pi'), (r'\sqrt{2}', '1.41421356'), ('(1,2)', '(2,1)'), ('[1,2)', '(1,2)'),
    ('1,2', '1,2,3'), ('1,1', '1,2'), (r'12\text{ cm}', r'12\text{ m}'), ('1234567890123456789', '1234567890123456788'),
    ('x+1', 'x+2'), ('x > 3', 'x < 3'), (r'x \ge 3', 'x > 3'), (r'50\%', '5'), (r'50\%', r'5\%'), ('', '0'),
    ('yes', 'no'),
    (r'\text{Yes}', '1'), ('1/0', '1/0.0'), (r'\sqrt{-4}', '2'), (r'2\frac{1}{2}', '1'), ('2xy', '2x'), ('x', 'y'),
    (r'\{1,2\}', '(1,2)'), ('1000', '1'), ('1,000', '1'), (r'1010_2', '1010'), (r'x > 3', r'[3,\infty)'), ('a', ''),
]


@pytest.mark.parametrize('one, other', EQUAL)
def test_equal_answers(one, other):
  for text, reference in ((one, other), (other, one)):
    assert math_reward.same_answer(rf'So it is $\boxed{{{text}}}$.', reference)
    assert math_reward.same_answer(text, f'Because of this.\n#### {reference}')


@pytest.mark.parametrize('one, other', DIFFERENT)
def test_different_answers(one, other):
  for text, reference in ((one, other), (other, one)):
    assert not math_reward.same_answer(rf'So it is $\boxed{{{text}}}$.', reference)


@pytest.mark.parametrize('text, right', [
    (r'So it is $\boxed{\frac{1}{2}}$.', '1/2'), (r'\boxed{1} then \boxed{\sqrt{\frac{1}{4}}}', '1/2'),
    (r'\boxed 7', '7'),
    (r'\fbox{3}', '3'), (r'First $x = 2$, so the answer is $\frac{3}{4}$.', '3/4'),
    (r'The answer is \frac{1}{2}.', '1/2'),
    ('The answer is 12. It was not hard, was it? 13!', '12'), ('Answer: 3/4', '0.75'),
    (r'We get $x^2 = 4$, hence $x = \pm 2$.', '2,-2'),
    ('They have 12 apples and 3 pears', '3'), ('it costs $1,000,000', '1000000'), ('#### 7 apples of 9', '7'),
    (r'Half of \frac{1}{2} of 20 is 5 apples', '5'), (r'\boxed{about 12 apples}', '12'), ('so x = 1/2', '0.5'),
    (r'\boxed{x = \frac{1}{2}', '1/2'), (r'#### \frac{2}{3}', '4/6')])
def test_where_the_answer_is(text, right):
  assert math_reward.same_answer(text, right)


@pytest.mark.parametrize('text', [
    '10^{10^{10}}', '9^{9^{9^9}}', '9!!!!!!!!', '(((((' * 5000, '{' * 10_000, '-' * 100_000 + '1', '1' * 100_000,
    '1e999999999',
    '2^' * 3000 + '2', r'\frac' * 3000, r'\sqrt{' * 3000 + '2' + '}' * 3000, '1.' * 5000, ',' * 10_000,
    '(' + '1,' * 290 + '1)',
    r'\boxed{' * 20_000, '$' * 20_000, '1/' * 290 + '1', '(x+1)^{1000}', '(x+y)^{10^5}', '1000!' * 100,
    '1.0000001^{10^{17}}',
    r'\exp(10^{9})', r'\sin(10^{300})', '0.' + '9' * 590, r'\overline{' + '9' * 500 + '}', '1,' * 5000, 'a b' * 5000,
    '3 ' * 50_000, 'answer is ' * 20_000, '#' * 50_000, '\\' * 50_000, r'\text{' * 5000, '٣', '1' + '0' * 550 + '!',
    '1 1/' * 2000,
    r'\begin{pmatrix}' * 100, '2^{-10^{9}}', r'\binom{1000}{500}^{1000}', '|' * 5000, 'e^{e^{e^{e^{e}}}}', '\ud800 1'])
def test_hostile_texts_are_graded_at_once(text):
  for one in (text, rf'\boxed{{{text}}}', f'#### {text}', f'answer is {text}'):
    begin = time.process_time()
    assert not math_reward.same_answer(one, '12345')
    math_reward.same_answer(one, one)
    assert time.process_time() - begin < 1.0


@hypothesis.given(st.text(alphabet='0123456789+-*/^(){}[]\\.,%$|!=<>xye_& frac',
max_size=60) | st.lists(st.sampled_from(
    [r'\frac', r'\sqrt', '{', '}', '(', ')', '[', ']', '1', '23', '^', '_', '-', '+', ',', r'\pi', 'x', r'\pm',
    r'\cup', r'\infty',
     '!', r'\text{cm}', r'\%', '=', '<', r'\sin', r'\begin', r'\end', '&', r'\\', r'\degree', '|', ' ']),
     max_size=25).map(''.join))
@hypothesis.settings(deadline=None, max_examples=300)
def test_no_text_raises(text):
  for reference in (text, '1', r'\{1,x\}'):
    math_reward.same_answer(text, reference)
    math_reward.same_answer(rf'\boxed{{{text}}}', reference)
    math_reward.final_number(text)


@hypothesis.given(st.fractions(max_denominator=1000), st.fractions(max_denominator=1000))
@hypothesis.settings(deadline=None, max_examples=100)
def test_fractions_are_exact(one, other):
  latex = lambda x: rf'\frac{{{x.numerator}}}{{{x.denominator}}}'
  assert math_reward.same_answer(latex(one), str(one)) and math_reward.final_number(latex(one)) == one
  assert math_reward.same_answer(latex(one), latex(other)) == (one == other)
  assert math_reward.same_answer(f'{latex(one)}+{latex(other)}', str(one + other))


def test_threads_grade_alike():
  found = []
  grade = lambda: found.append([math_reward.same_answer(*pair) for pair in EQUAL + DIFFERENT])
  grade()
  math_reward.final_answer.cache_clear()
  threads = [threading.Thread(target=grade) for _ in range(3)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert len(found) == 4 and all(grades == found[0] for grades in found)
