"""Processes find one another, or all report the same missing process."""

import socket
import threading

import pytest

from llmjax.config import ConfigError
from llmjax.parallel.rendezvous import PORT, Process, rendezvous, resolve_process
from llmjax.parallel.spec import DistributedSpec


def free_port():
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    return s.getsockname()[1]


def gather(processes, timeout):
  """Run the rendezvous of processes (threads here); return the lines of process 0 and each one's error or None."""
  lines, errors = [], [None] * len(processes)

  def join(i):
    try:
      rendezvous(processes[i], '127.0.0.1', timeout, lines.append)
    except ConfigError as e:
      errors[i] = str(e)

  threads = [threading.Thread(target=join, args=(i,)) for i in range(len(processes))]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(20)
    assert not thread.is_alive()
  return lines, errors


def test_all_connect():
  address = ('127.0.0.1', free_port())
  lines, errors = gather([Process(address, 4, i) for i in (3, 1, 0, 2)], 10)
  assert errors == [None] * 4
  assert lines[-1] == '4 of 4 processes here'
  with socket.create_server(address):  # The port is free again, for JAX.
    pass


def test_one_is_missing():
  address = ('127.0.0.1', free_port())
  lines, errors = gather([Process(address, 4, i) for i in (0, 1, 3)], 1.2)
  assert lines == ['3 of 4 processes here, waiting for rank 2']
  assert len(set(errors)) == 1
  assert errors[0].startswith('3 of 4 processes here, waiting for rank 2: gave up after 1.2 s')
  assert '\n' not in errors[0]


def test_the_first_is_missing():
  _, errors = gather([Process(('127.0.0.1', free_port()), 4, 3)], 0.5)
  assert 'process 3 of 4 cannot reach process 0 at 127.0.0.1:' in errors[0]


@pytest.mark.parametrize('strangers', [[(3, 1), (3, 1)], [(2, 1)], [(4, 3)]])
def test_contradictory_processes(strangers):
  address = ('127.0.0.1', free_port())
  _, errors = gather([Process(address, 3, 0), *(Process(address, *s) for s in strangers)], 5)
  assert all('give each its own process_id' in end for end in errors)


def test_resolve_process(monkeypatch):
  for name in ('SLURM_JOB_ID', 'OMPI_MCA_orte_hnp_uri'):
    monkeypatch.delenv(name, raising=False)
  launched = {'LLMJAX_COORDINATOR': 'host:99', 'LLMJAX_PROCESSES': '4', 'LLMJAX_PROCESS_ID': '2'}
  assert resolve_process(DistributedSpec(), {}) is None
  assert resolve_process(DistributedSpec(), launched) == Process(('host', 99), 4, 2)
  assert resolve_process(DistributedSpec(coordinator='[::1]:7', process_id=1), launched) == Process(('::1', 7), 4, 1)
  assert resolve_process(DistributedSpec(coordinator='host', processes=2, process_id=0), {}) == Process(
      ('host', PORT), 2, 0)
  with pytest.raises(ConfigError, match='distributed.process_id is not known'):
    resolve_process(DistributedSpec(coordinator='host', processes=2), {})
  with pytest.raises(ConfigError, match='must be host or host:port'):
    resolve_process(DistributedSpec(coordinator='host:x'), launched)
  slurm = {'JOB_ID': 5, 'STEP_NODELIST': 'node[03-04]', 'NTASKS': 4, 'PROCID': 3, 'LOCALID': 1,
           'STEP_TASKS_PER_NODE': '2(x2)'}
  for name, value in slurm.items():
    monkeypatch.setenv(f'SLURM_{name}', str(value))
  assert resolve_process(DistributedSpec(port=99), {}) == Process(('node03', 99), 4, 3, (1,))
  monkeypatch.setenv('SLURM_STEP_TASKS_PER_NODE', '1(x4)')  # All GPUs of a node are its process's.
  assert resolve_process(DistributedSpec(), {}).device_ids is None
  monkeypatch.setenv('SLURM_NTASKS', '1')
  assert resolve_process(DistributedSpec(), {}) is None
