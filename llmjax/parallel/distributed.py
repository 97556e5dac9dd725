"""Many processes of one run: finding one another, stopping together, failing alone.

Process 0 listens on the coordinator's port until all are there, saying who is missing; then the port is
handed to JAX's coordination service.  JAX by itself waits without a word and ends in a traceback.
"""

import atexit
import contextlib
import ctypes
import dataclasses
import functools
import itertools
import json
import os
import selectors
import signal
import socket
import sys
import threading
import time

import jax

from llmjax.config import ConfigError
from llmjax.parallel import heartbeat, in_flight
from llmjax.parallel.spec import DistributedSpec

PORT = 8476
SAY_SECONDS = 10.0
# Arrivals within this time share a line, so that hundreds of hosts do not make hundreds of lines.
SETTLE_SECONDS = 0.5
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # A run saves and stops after one of them.
TWICE_SECONDS = 1.0  # Two signals within this time count as one.
MEETING_SECONDS = 0.05  # Between two looks for the other processes.
SLACK_SECONDS = 30.0  # A process waits so much longer than process 0 may, and then takes it for dead.
SLICE_SECONDS = 1.0  # A wait inside JAX's client is this long at most, so that Ctrl-C is heard between two of them.


_limits = {'start_timeout_seconds': DistributedSpec().start_timeout_seconds}  # Of this process's run.


@dataclasses.dataclass(frozen=True)
class Place:
  """Where a process stands.  coordinator: (host, port).  device_ids: local devices to use, None for all."""

  coordinator: tuple[str, int]
  processes: int
  process_id: int
  device_ids: tuple[int, ...] | None = None


def initialize(spec):
  """Joins this process to the others of its run; does nothing where it is alone.  Returns whether it did.

  Call it before anything asks JAX for its devices.  A second call does nothing.  Raises ConfigError, on
  every process, when one of them does not come.
  """
  if jax.distributed.is_initialized():
    return False
  place = find_place(spec)
  if place is None:
    return False
  _limits['start_timeout_seconds'] = spec.start_timeout_seconds
  host, port = place.coordinator
  bind = spec.bind or (host if host.startswith('127.') or host == 'localhost' else _all_interfaces())
  meet(place, bind, spec.start_timeout_seconds, functools.partial(print, flush=True))
  try:
    jax.distributed.initialize(
        f'{_bracketed(host)}:{port}', place.processes, place.process_id, local_device_ids=place.device_ids,
        cluster_detection_method='deactivate', initialization_timeout=spec.start_timeout_seconds,
        heartbeat_timeout_seconds=spec.heartbeat_seconds,
        coordinator_bind_address=f'{_bracketed(bind)}:{port}')
  except (RuntimeError, ValueError) as e:
    raise ConfigError([f'distributed: process {place.process_id} of {place.processes} could not join the '
                       f'others at {host}:{port} ({str(e).splitlines()[0]}); is another run on that port? '
                       'Choose one with --config.distributed.port']) from e
  return True


def find_place(spec, environment=os.environ):
  """Returns this process's Place, from the spec, then LLMJAX_ variables, then the cluster; None when alone.

  Raises ConfigError when only a part is known.
  """
  coordinator = spec.coordinator or environment.get('LLMJAX_COORDINATOR', '')
  count = spec.processes if spec.processes > 0 else _number(environment, 'LLMJAX_PROCESSES')
  number = spec.process_id if spec.process_id >= 0 else _number(environment, 'LLMJAX_PROCESS_ID')
  device_ids = None
  if None in (coordinator or None, count, number) and count != 1:
    found, device_ids = _ask_cluster(spec)
    if found is None and not coordinator and count is None and number is None:
      return None
    found = found or ('', None, None)
    coordinator = coordinator or found[0]
    count = found[1] if count is None else count
    number = found[2] if number is None else number
  # One process that was given a coordinator joins it all the same: its collectives are then those of many
  # processes, and so are its sums, to the bit.
  if count == 1 and not coordinator:
    return None
  missing = [name for name, value in (('coordinator', coordinator or None), ('processes', count),
                                      ('process_id', number)) if value is None]
  if missing:
    raise ConfigError([f'distributed.{name} is not known; write --config.distributed.{name}=..., or set '
                       f'LLMJAX_{name.upper()}' for name in missing])
  if not 0 <= number < count:
    raise ConfigError([f'distributed.process_id={number} of processes={count}: they count from 0'])
  host, colon, port = coordinator.rpartition(':')
  if not colon or coordinator.endswith(']'):
    host, port = coordinator, str(spec.port or PORT)
  if not port.isdigit() or not host:
    raise ConfigError([f'distributed.coordinator={coordinator!r} must be host or host:port, such as '
                       f'node-0:{PORT}'])
  return Place((host.strip('[]'), int(port)), count, number, device_ids)


def _number(environment, name):
  text = environment.get(name, '')
  if not text:
    return None
  if not text.isdigit():
    raise ConfigError([f'{name}={text!r} must be a whole number'])
  return int(text)


def _ask_cluster(spec):
  """Returns ((coordinator, processes, process_id) or None, device_ids or None) as JAX detects them."""
  from jax._src.clusters import cloud_tpu_cluster, ompi_cluster, slurm_cluster

  # Kubernetes without TPUs is left out: JAX asks its API server, which few pods may.  `launch gke` sets
  # the variables instead.
  clusters = (slurm_cluster.SlurmCluster, ompi_cluster.OmpiCluster, cloud_tpu_cluster.GkeTpuCluster,
              cloud_tpu_cluster.GceTpuCluster)
  cluster = next((c for c in clusters if c.is_env_present()), None)
  if cluster is None:
    return None, None
  count = cluster.get_process_count()
  if count == 1:
    return ('', 1, 0), None
  device_ids = None
  # JAX would give a process that has a GPU node to itself the first GPU only.
  if cluster is slurm_cluster.SlurmCluster and not os.environ.get(
      'SLURM_STEP_TASKS_PER_NODE', '').split('(')[0] == '1':
    device_ids = (cluster.get_local_process_id(),)
  address = cluster.get_coordinator_address(
      timeout_secs=spec.start_timeout_seconds, override_coordinator_port=str(spec.port) if spec.port else None)
  return (address, count, cluster.get_process_id()), device_ids


def meet(place, bind, timeout, say, clock=time.monotonic):
  """Returns when all processes are there; raises the same ConfigError on each of them after `timeout` seconds.

  bind: the address that process 0 listens on.  say: prints who is missing, on process 0.
  """
  if place.process_id == 0:
    _await_others(place, bind, timeout, say, clock)
  else:
    _report_to_first(place, timeout, clock)


def _await_others(place, bind, timeout, say, clock):
  host, port = place.coordinator
  deadline, said, spoken, changed = clock() + timeout, '', clock(), clock()
  present, stranger, selector = {}, None, selectors.DefaultSelector()
  try:
    server = _listen(bind, port)
  except OSError as e:
    raise ConfigError([f'distributed: process 0 cannot listen on port {port} ({e.strerror}); end what uses '
                       'it, or choose another with --config.distributed.port']) from e
  with server, contextlib.closing(selector):
    selector.register(server, selectors.EVENT_READ)
    try:
      while len(present) < place.processes - 1:
        line = _who_is_here(place.processes, {0, *present})
        if line != said and clock() - changed > SETTLE_SECONDS or clock() - spoken > SAY_SECONDS:
          said, spoken = line, clock()
          say(line)
        if clock() > deadline:
          raise ConfigError([
              f'{line}: gave up after {timeout} s; look at what it printed, and whether its machine reaches '
              f'{host}:{port}; --config.distributed.start_timeout_seconds waits longer'])
        for key, _ in selector.select(0.1):
          changed = clock()
          if key.fileobj is server:
            peer, _ = server.accept()
            selector.register(peer, selectors.EVENT_READ)
            peer.settimeout(5.0)
            continue
          hello = _read_hello(key.fileobj)
          if hello is None:  # Gone, or no process of ours: a port scanner, say.
            selector.unregister(key.fileobj)
            key.fileobj.close()
            present = {number: peer for number, peer in present.items() if peer is not key.fileobj}
            continue
          number, count = hello
          if count != place.processes or not 0 < number < count or number in present:
            stranger = key.fileobj
            raise ConfigError([f'distributed: process {number} of {count} came to process 0 of '
                               f'{place.processes}' + (', and so did another one' if number in present else '')
                               + '; give each its own process_id, and all the same processes'])
          present[number] = key.fileobj
    except ConfigError as e:
      _answer([*present.values(), stranger], e.problems)
      raise
    if place.processes > 1:
      say(f'{place.processes} of {place.processes} processes here')
    _answer(present.values(), [])


def _who_is_here(count, present):
  missing = sorted(set(range(count)) - present)
  names = [str(n) for n in missing[:8]] + [f'{len(missing) - 8} more'] * (len(missing) > 8)
  joined = ' and '.join([', '.join(names[:-1]), names[-1]] if len(names) > 1 else names)
  return f'{len(present)} of {count} processes here, waiting for rank{"s" * (len(missing) > 1)} {joined}'


def _read_hello(peer):
  """Returns (process_id, processes) that a process says of itself, or None."""
  try:
    hello = json.loads(peer.recv(200) or 'null')
    return int(hello['llmjax']), int(hello['of'])
  except (OSError, ValueError, TypeError, KeyError):
    return None


def _answer(peers, problems):
  """Tells the processes to go on (no problems) or why not, and waits until they have read it."""
  for peer in filter(None, peers):
    with contextlib.suppress(OSError):
      peer.sendall(json.dumps(problems).encode() + b'\n')
      # They close first, so that no closed connection of ours keeps the port from JAX's service.
      peer.recv(1)
    peer.close()


def _report_to_first(place, timeout, clock):
  host, port = place.coordinator
  deadline = clock() + timeout
  hello = json.dumps({'llmjax': place.process_id, 'of': place.processes}).encode()
  problems = [f'process {place.process_id} of {place.processes} cannot reach process 0 at {host}:{port}: gave up '
              f'after {timeout} s; look at what process 0 printed, whether a firewall is between them, and at '
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
    time.sleep(0.3)  # Process 0 is not up yet, or was started again.
  if problems:
    raise ConfigError(problems)


def _listen(address, port):
  family = socket.AF_INET6 if ':' in address else socket.AF_INET
  return socket.create_server((address, port), family=family, backlog=1024,
                              dualstack_ipv6=family == socket.AF_INET6 and socket.has_dualstack_ipv6()
                              and address == '::')


def _all_interfaces():
  """Returns the address of all interfaces."""
  return '::' if socket.has_dualstack_ipv6() else '0.0.0.0'


def _bracketed(host):
  return f'[{host}]' if ':' in host else host


@contextlib.contextmanager
def together(spec):
  """Joins the processes for the block's time; a failure inside it ends this process without the others.

  JAX would have it wait for them five minutes before the error's status is seen.
  """
  initialize(spec)
  try:
    yield
  except AbsentError as e:
    leave_alone(1)
    raise SystemExit(f'llmjax: {e}') from None
  except BaseException as e:
    leave_alone(2 if isinstance(e, ConfigError) else 130 if isinstance(e, KeyboardInterrupt) else 1)
    raise


def leave_alone(status):
  """Lets this process, if it is one of several, end without the others once Python is done."""
  if jax.distributed.is_initialized():
    # Before Python waits for threads, of which some may be waiting for the other processes; atexit is too late.
    getattr(threading, '_register_atexit', atexit.register)(_end, status)


def _end(status):
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(status)


class Stop:
  """Tells after which step to stop, once Ctrl-C, SIGTERM or SIGHUP has come: see agreed_stop."""

  def __init__(self, poll=None, tell=None):
    self._poll, self._tell = poll, tell  # Both of several processes, or neither.
    self._signum, self._asked, self._started = None, 0.0, False
    self._terminals = [stream for stream in (1, 2) if os.isatty(stream)]

  def __call__(self, step):
    """Returns whether to stop, which all processes hear at the same step.  Call it before the first step, too."""
    self._started = True
    return self._poll(step) if self._poll else self._signum is not None

  @property
  def status(self):
    """The exit status of a run that has stopped: 130 after Ctrl-C, else PREEMPTED, to be started again."""
    return 130 if self._signum == signal.SIGINT else heartbeat.PREEMPTED

  def hear(self, signum):
    """Notes a signal.  Runs in a thread: the main one may be in a collective that never ends."""
    now = time.monotonic()
    if signum == signal.SIGHUP:  # Whatever is printed to a terminal that is gone would be an error.
      for stream in self._terminals:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    if self._signum is None:
      self._asked, self._signum = now, signum
      if self._tell:
        self._tell()
    elif now - self._asked > TWICE_SECONDS:  # Some launchers send the same notice by two ways.
      print(f'llmjax: a second {signal.Signals(signum).name}: leaving without a save', file=sys.stderr)
      _end(128 + signum)

  def handle(self, signum, frame):
    """The handler: only before the first step, where there is nothing to save, it ends what goes on."""
    if not self._poll and not self._started:
      if self._signum is None:
        self._asked, self._signum = time.monotonic(), signum
      raise KeyboardInterrupt


@contextlib.contextmanager
def agreed_stop():
  """Yields a Stop, whose stop(step) is true on all processes at one and the same step after a signal of STOPPING.

  Any one of them may get it.  A second one, a second later or more, ends the process at once.  SIGHUP stays ignored
  where it is, as under nohup.
  """
  if threading.current_thread() is not threading.main_thread():  # Only it may handle signals.
    yield Stop()
    return
  with contextlib.ExitStack() as stack:
    stop = Stop()
    if jax.distributed.is_initialized():
      from jax.experimental import multihost_utils
      libc = ctypes.CDLL(None)
      libc.signal.restype, libc.signal.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p)
      # JAX's preemption service handles SIGTERM without Python's knowledge.  Its handler notes the signal and
      # its thread tells the others; it is called from here, so that signals can be counted.
      service = libc.signal(signal.SIGTERM, None)
      stack.callback(libc.signal, signal.SIGTERM, service)
      notice = ctypes.CFUNCTYPE(None, ctypes.c_int)(service)
      stop = Stop(multihost_utils.reached_preemption_sync_point, lambda: notice(signal.SIGTERM))
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    thread = threading.Thread(target=_listen_for_signals, args=(ours, stop.hear), name='signals', daemon=True)
    thread.start()
    for ending in (ours.close, thread.join, theirs.close):  # The last one is done first: it ends the thread.
      stack.callback(ending)
    for signum in STOPPING:
      if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN:
        stack.enter_context(_handling(signum, stop.handle))
    stack.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False))
    yield stop


def _listen_for_signals(pipe, hear):
  while numbers := pipe.recv(16):
    for number in numbers:
      if number in STOPPING:
        hear(number)


@contextlib.contextmanager
def _handling(signum, handler):
  before = signal.signal(signum, handler)
  try:
    yield
  finally:
    signal.signal(signum, before)


def is_first():
  """Returns whether this process is the one that prints and writes."""
  return jax.process_index() == 0


def wait_for_all(name):
  """Returns when every process has called this.  name: what they have done.  Raises AbsentError as `gather`."""
  gather(None, name)


_gathered = itertools.count()  # All processes count alike.


def gather(value, name):
  """Returns every process's value, in order, once all have called this; a value is anything of JSON.

  It goes through JAX's coordination service, not the devices, whose collectives wait without a limit.  name: what the
  processes have done, for messages.  Raises AbsentError, on all processes, where some do not come within the
  start_timeout_seconds that `initialize` was given.
  """
  if jax.process_count() == 1:
    return [value]
  from jax._src import distributed
  client, number, seconds = distributed.global_state.client, next(_gathered), _limits['start_timeout_seconds']
  here, result = f'llmjax/gather/{number}/here/', f'llmjax/gather/{number}/result'
  begin = time.monotonic()
  client.key_value_set(f'{here}{jax.process_index()}', json.dumps(value))
  if is_first():
    found = _collect(client, here, name, begin, seconds)
    client.key_value_set(result, json.dumps(found))
    if number:  # All have read the last result, or they would not be here.
      client.key_value_delete(f'llmjax/gather/{number - 1}/')
  else:
    text = _read_key(client, result, begin + seconds + SLACK_SECONDS)
    found = json.loads(text) if text else {'absent': (
        f'process {jax.process_index()}: no word from process 0 within {seconds} s at: {name}; look at what it '
        'printed; --config.distributed.start_timeout_seconds waits longer')}
  if 'absent' in found:
    raise AbsentError(found['absent'])
  return found['values']


def _collect(client, here, name, begin, seconds):
  """Returns {'values': those of all processes}, or {'absent': why not, in one line}.  For process 0."""
  values, count, said = [], jax.process_count(), False
  while len(values) < count:
    text = _read_key(client, f'{here}{len(values)}', time.monotonic() + SLICE_SECONDS)
    if text:
      values.append(json.loads(text))
      continue
    waited = time.monotonic() - begin
    if not said and waited > SAY_SECONDS or waited > seconds:
      present = {int(key.rpartition('/')[2]) for key, _ in client.key_value_dir_get(here)}
      line = f'{_who_is_here(count, present)} at: {name}'
      if waited > seconds:
        return {'absent': f'{line}: gave up after {seconds} s; look at what it printed; '
                          '--config.distributed.start_timeout_seconds waits longer'}
      said = True
      print(f'llmjax: {line}', file=sys.stderr, flush=True)
  return {'values': values}


def _read_key(client, key, deadline):
  """Returns a key's value once there is one, or None at the deadline (of time.monotonic)."""
  while (left := deadline - time.monotonic()) > 0:
    try:
      return client.blocking_key_value_get(key, max(int(1000 * min(left, SLICE_SECONDS)), 1))
    except jax.errors.JaxRuntimeError as e:
      if 'DEADLINE_EXCEEDED' not in str(e):
        raise
  return None


def start_heartbeat(spec, workdir):
  """Returns this process's Heartbeat, which watches its loop.  spec: a DistributedSpec.  workdir: for stacks.

  A loop that makes no progress for spec.hang_seconds ends its process; under a supervisor its limit holds.
  """
  supervisor, limit = os.environ.get(heartbeat.FOLDER, ''), os.environ.get(heartbeat.LIMIT, '')
  processes, seconds = jax.process_count(), float(limit or 0)
  folder = supervisor or (os.path.join(workdir, 'heartbeats') if processes > 1 else None)
  return heartbeat.Heartbeat(
      jax.process_index(), processes, folder=folder, stacks=os.path.join(workdir, 'stacks'), hang_seconds=seconds,
      leave=bool(limit), end_seconds=0.0 if seconds else spec.hang_seconds, progress=in_flight.finished,
      pulse=heartbeat.SUPERVISED_PULSE if supervisor else heartbeat.PULSE)


class AbsentError(Exception):
  """A process does not come to where the others wait; the text is one line that says which or why."""


class Meeting:
  """A place that all processes come to, or hear at once why one of them does not.

  JAX's own barriers let the others wait for their whole timeout.  What is said lies in its coordination service.
  name: the same on all processes, and no other meeting's.
  """

  def __init__(self, name):
    from jax._src import distributed
    self._client, self._folder = distributed.global_state.client, f'llmjax/{name}/'

  def refuse(self, reason):
    """Says why this process will not come."""
    self._client.key_value_set(f'{self._folder}said/refused', f'{reason} (process {jax.process_index()})',
                               allow_overwrite=True)

  def check(self):
    """Raises AbsentError when a process has refused; returns the keys of those waits that are over."""
    said = {key.rpartition('said/')[2]: text for key, text in self._client.key_value_dir_get(f'{self._folder}said/')}
    if reason := said.get('refused'):
      raise AbsentError(reason)
    return said.keys()

  def wait(self, key, timeout_ms):
    """Returns when all processes wait for this key; raises AbsentError or TimeoutError.  For threads: it polls."""
    deadline, here = time.monotonic() + timeout_ms / 1000, f'{self._folder}{key}/'
    self._client.key_value_set(f'{here}{jax.process_index()}', '')
    while key not in self.check():
      if is_first() and len(self._client.key_value_dir_get(here)) == jax.process_count():
        self._client.key_value_set(f'{self._folder}said/{key}', '')
        return
      if time.monotonic() > deadline:
        raise TimeoutError(f'some processes did not come to {key} within {timeout_ms / 1000:.0f} s')
      time.sleep(MEETING_SECONDS)

  def forget(self):
    """Frees what was said, once every process has been told."""
    if is_first():
      self._client.key_value_delete(self._folder)
