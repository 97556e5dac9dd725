"""The entry point: `llmjax COMMAND --config=FILE --config.GROUP.FIELD=VALUE --FLAG=VALUE`."""

import contextlib
import errno
import importlib
import multiprocessing
import os
import signal
import sys
import threading

import llmjax
from llmjax import config, help_text, secrets
from llmjax.command_line import parse, split_command, unknown_command
from llmjax.command_table import COMMANDS

_HELP = ('help', '-h', '--help', '--helpfull')
# Errors of paths that are wrong, so that the same command line would fail again.
_PATH_ERRORS = (errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.EROFS)


def main(argv=None):
  """Run a command and exit with its status: 0 success, 1 failure, 2 wrong command line.

  argv: the arguments without the program's name, from a caller in this process; None: those of the process.
  """
  owns_process = argv is None
  if owns_process:
    for stream in filter(None, (sys.stdout, sys.stderr)):
      stream.reconfigure(errors='backslashreplace')  # For characters that the terminal's encoding lacks.
    secrets.hide_output()
    _repeat_lost_interrupts()
  argv = list(sys.argv[1:] if argv is None else argv)
  try:
    try:
      _run(argv)
    finally:
      if sys.stdout:
        sys.stdout.flush()
  except KeyboardInterrupt as e:
    status = e.args[0] if e.args else 130  # Other signals raise it with their status: see distributed.Stop.
    print(f'\nllmjax {" ".join(argv[:1])}: stopped by {"Ctrl-C" if status == 130 else "a signal"}', file=sys.stderr)
    if owns_process:
      _exit_at_once(status)
    sys.exit(status)
  except BrokenPipeError:  # The reader of the output, such as `head`, has closed it.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # So that the flush at exit cannot fail.
    sys.exit(141)


def _run(argv):
  if argv[:1] == ['help'] and len(argv) > 1:
    argv = [*argv[1:], '--help']
  if not argv or argv[0] in _HELP:
    _exit_with_output(help_text.overview())
  if argv[0] in ('version', '-V', '--version'):
    _exit_with_output(f'llmjax {llmjax.__version__}')
  name, arguments = split_command(argv)
  if name not in COMMANDS:
    if any(command.startswith(f'{name} ') for command in COMMANDS) and (not arguments or arguments[0] in _HELP):
      overview = help_text.overview(f'{name} ')
      _exit_with_output(overview) if arguments else _fail(2, overview)
    _fail(2, unknown_command(argv))
  own_arguments = arguments[:arguments.index('--')] if '--' in arguments else arguments
  if set(own_arguments) & set(_HELP[1:]):
    _exit_with_output(help_text.command_help(name))
  try:
    spec, options = parse(COMMANDS[name], arguments)
    status = _import(COMMANDS[name].module).run(spec, options)
  except config.ConfigError as e:
    count = len(e.problems)
    _fail(2, f'llmjax {name}: ' + '\n  '.join([f'{count} problems'] * (count > 1) + e.problems))
  except OSError as e:  # The path and the system's reason are enough; python -X dev shows the traceback.
    if e.filename is None or sys.flags.dev_mode:
      raise
    status = 2 if e.errno in _PATH_ERRORS else 1
    _fail(status, f'llmjax {name}: {config.shown(str(e.filename), quote=False)}: {e.strerror}')
  sys.exit(status or 0)


def _exit_with_output(text):
  print(text)
  sys.exit(0)


def _fail(status, message):
  print(message, file=sys.stderr)
  sys.exit(status)


def _import(module):
  """Import a module, and deliver a Ctrl-C afterwards: inside, extensions make it an ImportError or abort."""
  mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
  try:
    return importlib.import_module(module)
  finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _exit_at_once(status):
  """End an interrupted process without Python's finalization.

  JAX raises KeyboardInterrupt from a compilation while XLA's threads continue it.  Finalization would free the
  compiler's memory under them: a segmentation fault, or a process that never ends.
  """
  for child in multiprocessing.active_children():
    child.terminate()
  for stream in filter(None, (sys.stdout, sys.stderr)):
    with contextlib.suppress(OSError, ValueError):
      stream.flush()
  os._exit(status)


def _repeat_lost_interrupts():
  """Repeat a Ctrl-C that was raised inside a callback whose exceptions Python ignores, such as a finalizer of JAX."""
  previous_hook = sys.unraisablehook

  def hook(unraisable):
    if unraisable.exc_type is KeyboardInterrupt:
      threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
    else:
      previous_hook(unraisable)

  sys.unraisablehook = hook
