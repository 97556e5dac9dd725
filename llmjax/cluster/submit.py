"""What the launchers of clusters share: quoting a command, and running the cluster's own tool."""

import shlex
import shutil
import subprocess

from llmjax.config import ConfigError


def shell_line(command, setup=''):
  """Returns the shell text that runs `llmjax <command>`, after `setup` where there is one.

  exec: signals then reach llmjax itself and not the shell that waits for it.
  """
  line = quoted(['llmjax', *command])
  return f'{setup} && exec {line}' if setup else line


def quoted(argv):
  """Returns shell text of an argument list, as a person would write it: --flag='two words'."""
  parts = [arg.partition('=') if arg.startswith('--') else ('', '', arg) for arg in argv]
  return ' '.join(f'{shlex.quote(name) if name else ""}{equals}{shlex.quote(value) if value or not equals else ""}'
                  for name, equals, value in parts)


def run_tool(argv, stdin=None, *, dry_run, install):
  """Runs a cluster's tool and returns its status; with dry_run prints the command, or the file it would get.

  stdin: text that the tool reads.  install: where to get the tool, said when it is not there.
  """
  if dry_run:
    print(stdin if stdin is not None else quoted(argv), end='' if stdin else '\n')
    return 0
  if shutil.which(argv[0]) is None:
    raise ConfigError([f'{argv[0]} is not installed here ({install}); --dry-run prints what it would be given'])
  return subprocess.run(argv, input=stdin, text=True, check=False).returncode
