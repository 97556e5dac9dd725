"""The rendezvous of a run's processes at start-up, before JAX.

Process 0 listens on the coordinator's port until all processes have connected, and reports which are missing; then it
frees the port for JAX's coordination service, which by itself would wait silently and fail with a traceback.
"""

import contextlib
import dataclasses
import json
import os
import selectors
import socket
import time

from llmjax.config import ConfigError
from llmjax.parallel import jax_internals

PORT = 8476
REPORT_SECONDS = 10.0
# Arrivals within this time share a line, so that hundreds of hosts do not make hundreds of lines.
SETTLE_SECONDS = 0.5
SLACK_SECONDS = 30.0  # A process waits this much longer than process 0 may, and then takes it for dead.
WAIT_LONGER = '--config.distributed.start_timeout_seconds waits longer'


@dataclasses.dataclass(frozen=True)
class Process:
  """A process of a run.  coordinator: (host, port) of process 0.  device_ids: local devices to use; None: all."""

  coordinator: tuple[str, int]
  count: int
  process_id: int
  device_ids: tuple[int, ...] | None = None


def resolve_process(spec, environment=os.environ):
  """Return this Process by the DistributedSpec, then LLMJAX_ variables, then the cluster; None for a lone process.

  Raises ConfigError if only a part of it is known.
  """
  coordinator = spec.coordinator or environment.get('LLMJAX_COORDINATOR', '')
  count = spec.processes if spec.processes > 0 else _number(environment, 'LLMJAX_PROCESSES')
  process_id = spec.process_id if spec.process_id >= 0 else _number(environment, 'LLMJAX_PROCESS_ID')
  device_ids = None
  if None in (coordinator or None, count, process_id) and count != 1:
    detected, device_ids = _detect(spec)
    if detected is None and not coordinator and count is None and process_id is None:
      return None
    detected = detected or ('', None, None)
    coordinator = coordinator or detected[0]
    count = detected[1] if count is None else count
    process_id = detected[2] if process_id is None else process_id
  # One process that was given a coordinator connects to it: its collectives, and with them its sums, are then the same
  # to the bit as those of many processes.
  if count == 1 and not coordinator:
    return None
  fields = {'coordinator': coordinator or None, 'processes': count, 'process_id': process_id}
  if missing := [name for name, value in fields.items() if value is None]:
    raise ConfigError([f'distributed.{name} is not known; write --config.distributed.{name}=..., or set '
                       f'LLMJAX_{name.upper()}' for name in missing])
  if not 0 <= process_id < count:
    raise ConfigError([f'distributed.process_id={process_id} of processes={count}: they count from 0'])
  host, colon, port = coordinator.rpartition(':')
  if not colon or coordinator.endswith(']'):
    host, port = coordinator, str(spec.port or PORT)
  if not port.isdigit() or not host:
    raise ConfigError([f'distributed.coordinator={coordinator!r} must be host or host:port, such as node-0:{PORT}'])
  return Process((host.strip('[]'), int(port)), count, process_id, device_ids)


def _number(environment, name):
  text = environment.get(name, '')
  if not text:
    return None
  if not text.isdigit():
    raise ConfigError([f'{name}={text!r} must be a whole number'])
  return int(text)


def _detect(spec):
  """Return ((coordinator, count, process_id) or None, device_ids or None) of the cluster that JAX detects."""
  cluster = jax_internals.detect_cluster()
  if cluster is None:
    return None, None
  count = cluster.get_process_count()
  if count == 1:
    return ('', 1, 0), None
  device_ids = None
  # JAX would give a process that has a GPU node to itself the first GPU only.
  alone = os.environ.get('SLURM_STEP_TASKS_PER_NODE', '').split('(')[0] == '1'
  if cluster is jax_internals.slurm_cluster() and not alone:
    device_ids = (cluster.get_local_process_id(),)
  address = cluster.get_coordinator_address(
      timeout_secs=spec.start_timeout_seconds, override_coordinator_port=str(spec.port) if spec.port else None)
  return (address, count, cluster.get_process_id()), device_ids


def rendezvous(process, bind, timeout, log, clock=time.monotonic):
  """Wait until all processes have connected; raise the same ConfigError on each of them after `timeout` seconds.

  bind: the address that process 0 listens on.  log: called with lines that say which processes are missing.
  """
  if process.process_id == 0:
    _Server(process, timeout, log, clock).run(bind)
  else:
    _connect(process, timeout, clock)


class _Server:
  """Process 0: accepts the connections of the others and answers them once all are there, or with the error."""

  def __init__(self, process, timeout, log, clock):
    self._process, self._timeout, self._log, self._clock = process, timeout, log, clock
    self._peers, self._rejected = {}, None  # {process_id: socket}.
    self._selector = selectors.DefaultSelector()

  def run(self, bind):
    host, port = self._process.coordinator
    try:
      server = listen(bind, port)
    except OSError as e:
      raise ConfigError([f'distributed: process 0 cannot listen on port {port} ({e.strerror}); end the program that '
                         'uses it, or choose another with --config.distributed.port']) from e
    with server, contextlib.closing(self._selector):
      self._selector.register(server, selectors.EVENT_READ)
      try:
        self._accept_all(server, f'{host}:{port}')
      except ConfigError as e:
        _answer([*self._peers.values(), self._rejected], e.problems)
        raise
      if self._process.count > 1:
        self._log(f'{self._process.count} of {self._process.count} processes here')
      _answer(self._peers.values(), [])

  def _accept_all(self, server, address):
    clock, count = self._clock, self._process.count
    deadline, logged, log_time, change_time = clock() + self._timeout, '', clock(), clock()
    while len(self._peers) < count - 1:
      line = missing_processes(count, {0, *self._peers})
      if line != logged and clock() - change_time > SETTLE_SECONDS or clock() - log_time > REPORT_SECONDS:
        logged, log_time = line, clock()
        self._log(line)
      if clock() > deadline:
        raise ConfigError([f'{line}: gave up after {self._timeout} s; look at what it printed, and whether its machine '
                           f'reaches {address}; {WAIT_LONGER}'])
      for key, _ in self._selector.select(0.1):
        change_time = clock()
        if key.fileobj is server:
          peer, _ = server.accept()
          self._selector.register(peer, selectors.EVENT_READ)
          peer.settimeout(5.0)
        else:
          self._receive(key.fileobj)

  def _receive(self, peer):
    """Read a connection's message, and drop connections that are closed or no process of a run (a port scanner)."""
    hello, expected = _read_hello(peer), self._process.count
    if hello is None:
      self._selector.unregister(peer)
      peer.close()
      self._peers = {process_id: other for process_id, other in self._peers.items() if other is not peer}
      return
    process_id, count = hello
    if count != expected or not 0 < process_id < count or process_id in self._peers:
      self._rejected = peer
      twice = ', and another one has the same process_id' if process_id in self._peers else ''
      raise ConfigError([f'distributed: process {process_id} of {count} connected to process 0 of {expected}{twice}; '
                         'give each its own process_id, and all the same processes'])
    self._peers[process_id] = peer


def missing_processes(count, present):
  """Return '3 of 4 processes here, waiting for rank 2'.  present: set of process ids."""
  missing = sorted(set(range(count)) - present)
  names = [str(n) for n in missing[:8]] + [f'{len(missing) - 8} more'] * (len(missing) > 8)
  joined = ' and '.join([', '.join(names[:-1]), names[-1]] if len(names) > 1 else names)
  return f'{len(present)} of {count} processes here, waiting for rank{"s" * (len(missing) > 1)} {joined}'


def _read_hello(peer):
  """Return (process_id, number of processes) of a connected process, or None."""
  try:
    hello = json.loads(peer.recv(200) or 'null')
    return int(hello['llmjax']), int(hello['of'])
  except (OSError, ValueError, TypeError, KeyError):
    return None


def _answer(peers, problems):
  """Send the problems (none: go ahead) to the processes, and wait until they have read them."""
  for peer in filter(None, peers):
    with contextlib.suppress(OSError):
      peer.sendall(json.dumps(problems).encode() + b'\n')
      # They close first, so that no closed connection of ours keeps the port from JAX's service.
      peer.recv(1)
    peer.close()


def _connect(process, timeout, clock):
  """Connect to process 0 and wait for its answer."""
  host, port = process.coordinator
  deadline = clock() + timeout
  hello = json.dumps({'llmjax': process.process_id, 'of': process.count}).encode()
  problems = [f'process {process.process_id} of {process.count} cannot reach process 0 at {host}:{port}: gave up after '
              f'{timeout} s; look at what process 0 printed, whether a firewall is between them, and at '
              'distributed.coordinator']
  while clock() < deadline:
    try:
      with socket.create_connection((host, port), timeout=5.0) as peer:
        peer.sendall(hello)
        peer.settimeout(timeout + SLACK_SECONDS)
        if text := peer.makefile('rb').readline():
          problems = json.loads(text)
          break
    except (OSError, ValueError):
      pass
    time.sleep(0.3)  # Process 0 is not up yet, or is being restarted.
  if problems:
    raise ConfigError(problems)


def all_interfaces():
  """Return the address that stands for all interfaces of this machine."""
  return '::' if socket.has_dualstack_ipv6() else '0.0.0.0'


def listen(address, port):
  """Return a listening socket."""
  family = socket.AF_INET6 if ':' in address else socket.AF_INET
  dualstack = address == '::' and socket.has_dualstack_ipv6()
  return socket.create_server((address, port), family=family, backlog=1024, dualstack_ipv6=dualstack)
