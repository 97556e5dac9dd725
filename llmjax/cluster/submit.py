"""Helpers of the cluster launchers: quote a command, and run the cluster's command-line tool."""

import shlex
import shutil
import subprocess

from llmjax.config import ConfigError


def shell_line(command, setup=''):
  """Return the shell command that runs `setup`, if any, and then `llmjax <command>`.

  It uses exec, so that signals reach llmjax and not a waiting shell.
  """
  line = quoted(['llmjax', *command])
  return f'{setup} && exec {line}' if setup else line


def quoted(argv):
  """Quote an argument list for a shell, in readable form: --flag='two words'."""
  parts = [arg.partition('=') if arg.startswith('--') else ('', '', arg) for arg in argv]
  return ' '.join(f'{shlex.quote(name) if name else ""}{equals}{shlex.quote(value) if value or not equals else ""}'
                  for name, equals, value in parts)


def run_tool(argv, stdin=None, *, dry_run, install):
  """Run a command-line tool and return its status; with dry_run only print its input, or its command line.

  stdin: input of the tool.  install: hint for the error if the tool is not installed.
  """
  if dry_run:
    print(stdin if stdin is not None else quoted(argv), end='' if stdin else '\n')
    return 0
  if shutil.which(argv[0]) is None:
    raise ConfigError([f'{argv[0]} is not installed here ({install}); --dry-run prints its input'])
  return subprocess.run(argv, input=stdin, text=True, check=False).returncode
