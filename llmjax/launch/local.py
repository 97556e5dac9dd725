"""`llmjax launch local`: one command as several processes of this machine, on emulated CPU devices.

It is the real thing but for the chips: JAX's coordination service, collectives over sockets, checkpoints
written together.
"""

import contextlib
import ctypes
import dataclasses
import os
import pathlib
import queue
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

from llmjax.config import setting

# When one process has failed, the others may be about to say why, too; then they are ended.
GRACE_SECONDS = 3.0
TAIL_LINES = 25
PR_SET_PDEATHSIG = 1  # From linux/prctl.h.


@dataclasses.dataclass(frozen=True)
class LocalOptions:
  """Flags of `llmjax launch local`."""

  processes: int = setting(2, 'processes to start', minimum=1, maximum=256)
  devices_per_process: int = setting(1, 'emulated CPU devices of each', minimum=1, maximum=256)
  logs: str = setting('', "folder for what processes other than the first print; '': shown only when one fails")


def run(command, options):
  """Runs `llmjax <command>` in every process; returns the status of the first one that fails, else 0.

  Process 0 has the terminal.  Signals go to all; when one process ends badly, all end.
  """
  with contextlib.ExitStack() as stack:
    folder = pathlib.Path(options.logs or stack.enter_context(tempfile.TemporaryDirectory()))
    folder.mkdir(parents=True, exist_ok=True)
    group = _Group(folder)
    stack.callback(group.kill)
    before = {s: signal.signal(s, group.forward) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    stack.callback(lambda: [signal.signal(s, handler) for s, handler in before.items()])
    coordinator = f'127.0.0.1:{_free_port()}'
    for i in range(options.processes):
      group.start(command, _environment(os.environ, coordinator, options, i))
    return group.wait()


def _environment(environment, coordinator, options, process_id):
  """Returns the variables that tell a process its place (see parallel/distributed.py) and its devices."""
  # An emulated device count of the caller's would hold for each process.
  flags = re.sub(r'--xla_force_host_platform_device_count=\S+', '', environment.get('XLA_FLAGS', ''))
  direct = {}
  if any(name.lower().endswith('_proxy') for name in environment):  # gRPC would go through it.
    direct = {'no_proxy': ','.join(filter(None, [environment.get('no_proxy', ''), '127.0.0.1,localhost']))}
  return {**environment, **direct, 'LLMJAX_COORDINATOR': coordinator, 'LLMJAX_PROCESSES': str(options.processes),
          'LLMJAX_PROCESS_ID': str(process_id), 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': flags.strip(),
          'JAX_NUM_CPU_DEVICES': str(options.devices_per_process)}


class _Group:
  """The processes, in order; each leads a process group of its own, so that a terminal signals only us."""

  def __init__(self, folder):
    self._folder, self._children, self._signals = folder, [], 0
    self._ended = queue.SimpleQueue()  # Numbers of processes, in the order in which they ended.

  def start(self, command, environment):
    log = self._log(len(self._children)) if self._children else None
    with open(log, 'wb') if log else contextlib.nullcontext() as output:
      self._children.append(subprocess.Popen(
          [sys.executable, '-m', 'llmjax', *command], env=environment, start_new_session=True,
          stdin=subprocess.DEVNULL, stdout=output, stderr=output and subprocess.STDOUT,
          preexec_fn=_end_with_parent))
    threading.Thread(target=self._note_end, args=[len(self._children) - 1], daemon=True).start()

  def _note_end(self, i):
    self._children[i].wait()
    self._ended.put(i)

  def forward(self, signum, frame):
    """Passes a signal on; the second Ctrl-C ends everything."""
    self._signals += 1
    if self._signals > 1:
      self.kill()
    for child in self._children:
      with contextlib.suppress(ProcessLookupError):
        child.send_signal(signal.SIGINT if signum == signal.SIGINT else signal.SIGTERM)

  def wait(self):
    """Returns the status when all have ended, having ended them if one failed and said which."""
    for _ in self._children:
      i = self._ended.get()
      if self._children[i].returncode:
        return self._after_failure(i)
    return 0

  def kill(self):
    for child in self._children:
      if child.poll() is None:
        with contextlib.suppress(ProcessLookupError):
          os.killpg(child.pid, signal.SIGKILL)
    for child in self._children:
      child.wait()

  def _after_failure(self, i):
    status = self._children[i].returncode
    # After a signal, or a kill for memory, the others can only complain of a lost connection.
    deadline = time.monotonic() + (GRACE_SECONDS if status > 0 else 0)
    while time.monotonic() < deadline and None in [child.poll() for child in self._children]:
      time.sleep(0.05)
    first = self._children[0].poll()
    self.kill()
    # A wrong setting and Ctrl-C end all in the same way, and process 0 has said so.
    if status in (2, 130) and first == status:
      return status
    words = f'signal {signal.Signals(-status).name}' if status < 0 else f'status {status}'
    print(f'llmjax launch: process {i} of {len(self._children)} ended with {words}; the others were ended',
          file=sys.stderr)
    if i and (tail := self._log(i).read_text(errors='replace').splitlines()[-TAIL_LINES:]):
      print(f'its last {"lines" if len(tail) > 1 else "line"}:', *tail, sep='\n  ', file=sys.stderr)
    return 128 - status if status < 0 else status

  def _log(self, i):
    return self._folder / f'process-{i}.log'


def _end_with_parent():
  """In the child: the kernel ends it should this launcher be killed (Linux only)."""
  if sys.platform.startswith('linux'):
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _free_port():
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    return s.getsockname()[1]
