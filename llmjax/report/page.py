"""Render the templates of the report's pages.

A page is self-contained: it loads nothing from the network, which its Content-Security-Policy enforces.
"""

import functools
import json

import jinja2


def render(template, context):
  """Render a template with plain data, all of which is escaped.

  Each page needs title, subtitle (a line, or several) and charts: a list of plots.line_chart.
  """
  return _environment().get_template(template).render(context)


def render_macro(name, *args):
  """Render a macro of macros.html."""
  return str(getattr(_environment().get_template('macros.html').module, name)(*args))


@functools.cache
def _environment():
  environment = jinja2.Environment(
      loader=jinja2.PackageLoader('llmjax.report'), autoescape=True, undefined=jinja2.StrictUndefined,
      trim_blocks=True, lstrip_blocks=True)
  environment.policies['json.dumps_kwargs'] = {'separators': (',', ':'), 'allow_nan': False}
  environment.filters['setting'] = lambda value: (
      value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False))
  return environment
