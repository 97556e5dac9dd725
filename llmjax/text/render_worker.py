"""Worker process of `templates` that renders chat templates.  A script; it imports nothing of llmjax.

Each line of standard input is a JSON request, each line of standard output the JSON reply.  A template that takes too
much CPU time ends the process: the default action of the timer's signal runs no Python code, so it also interrupts one
long multiplication.
"""

import functools
import json
import resource
import signal
import sys

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

MEMORY_BYTES = 1 << 30


class Generation(jinja2.ext.Extension):
  """The block `{% generation %}` ... `{% endgeneration %}` around text that the assistant generates."""

  tags = {'generation'}

  def parse(self, parser):
    line = next(parser.stream).lineno
    body = parser.parse_statements(('name:endgeneration',), drop_needle=True)
    return jinja2.nodes.CallBlock(self.call_method('mark'), [], [], body).set_lineno(line)

  def mark(self, caller):
    begin, end = self.environment.generation_marks
    return f'{begin}{caller()}{end}'


class TemplateRefuses(Exception):
  """The template called raise_exception."""


def refuse(message):
  raise TemplateRefuses(str(message))


def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
  # Jinja's own filter escapes HTML; chat models were trained on plain JSON.
  return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.lru_cache(maxsize=1)  # A renderer has one template.
def compile_template(source, marks):
  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
      trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
  environment.generation_marks = marks
  environment.filters['tojson'] = to_json
  environment.globals['raise_exception'] = refuse
  return environment.from_string(source)


def render(request):
  """Return {'text'} or {'error': one line}."""
  try:
    template = compile_template(request['template'], tuple(request['marks']))
    size, parts = 0, []
    for part in template.generate(**request['values']):
      size += len(part)
      if size > request['characters']:
        return {'error': f'it makes more than {request["characters"]} characters'}
      parts.append(part)
    return {'text': ''.join(parts)}
  except TemplateRefuses as e:
    return {'error': f'it refuses these messages: {_one_line(e)}'}
  except jinja2.exceptions.SecurityError as e:
    return {'error': f'it does what no template may: {_one_line(e)}'}
  except jinja2.TemplateSyntaxError as e:
    return {'error': f'line {e.lineno}: {_one_line(e.message)}'}
  except MemoryError:
    return {'error': 'it takes too much memory'}
  except RecursionError:
    return {'error': 'it is nested too deep'}
  except Exception as e:  # A template may raise anything.
    return {'error': f'{type(e).__name__}: {_one_line(e)}'}


def _one_line(value):
  return ' '.join(str(value)[:1000].split())[:200]


def main():
  seconds = float(sys.argv[1])
  resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
  resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
  resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # No files; pipes are not affected.
  signal.signal(signal.SIGPROF, signal.SIG_DFL)
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # The parent handles Ctrl-C and closes the pipe.
  for line in sys.stdin.buffer:
    signal.setitimer(signal.ITIMER_PROF, seconds)
    reply = json.dumps(render(json.loads(line)))
    signal.setitimer(signal.ITIMER_PROF, 0)
    sys.stdout.write(reply + '\n')
    sys.stdout.flush()


if __name__ == '__main__':
  main()
