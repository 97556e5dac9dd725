"""Processes find one another, or all say the same of the one that is missing."""

import socket
import threading

import pytest

from llmjax.config import ConfigError
from llmjax.parallel import distributed
from llmjax.parallel.distributed import Place, find_place, meet
from llmjax.parallel.spec import DistributedSpec


def free_port():
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    return s.getsockname()[1]


def gather(places, timeout):
  """Lets processes (threads here) meet; returns what process 0 said and each one's error or None."""
  said, ends = [], [None] * len(places)

  def join(i):
    try:
      meet(places[i], '127.0.0.1', timeout, said.append)
    except ConfigError as e:
      ends[i] = str(e)

  threads = [threading.Thread(target=join, args=(i,)) for i in range(len(places))]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(20)
    assert not thread.is_alive()
  return said, ends


def test_all_come():
  address = ('127.0.0.1', free_port())
  said, ends = gather([Place(address, 4, i) for i in (3, 1, 0, 2)], 10)
  assert ends == [None] * 4
  assert said[-1] == '4 of 4 processes here'
  with socket.create_server(address):  # The port is free again, for JAX.
    pass


def test_one_is_missing():
  address = ('127.0.0.1', free_port())
  said, ends = gather([Place(address, 4, i) for i in (0, 1, 3)], 1.2)
  assert said == ['3 of 4 processes here, waiting for rank 2']
  assert len(set(ends)) == 1
  assert ends[0].startswith('3 of 4 processes here, waiting for rank 2: gave up after 1.2 s')
  assert '\n' not in ends[0]


def test_the_first_is_missing():
  _, ends = gather([Place(('127.0.0.1', free_port()), 4, 3)], 0.5)
  assert 'process 3 of 4 cannot reach process 0 at 127.0.0.1:' in ends[0]


@pytest.mark.parametrize('strangers', [[(3, 1), (3, 1)], [(2, 1)], [(4, 3)]])
def test_places_that_contradict_one_another(strangers):
  address = ('127.0.0.1', free_port())
  _, ends = gather([Place(address, 3, 0), *(Place(address, *s) for s in strangers)], 5)
  assert all('give each its own process_id' in end for end in ends)


def test_where_a_place_comes_from(monkeypatch):
  for name in ('SLURM_JOB_ID', 'OMPI_MCA_orte_hnp_uri'):
    monkeypatch.delenv(name, raising=False)
  launched = {'LLMJAX_COORDINATOR': 'host:99', 'LLMJAX_PROCESSES': '4', 'LLMJAX_PROCESS_ID': '2'}
  assert find_place(DistributedSpec(), {}) is None
  assert find_place(DistributedSpec(), launched) == Place(('host', 99), 4, 2)
  assert find_place(DistributedSpec(coordinator='[::1]:7', process_id=1), launched) == Place(('::1', 7), 4, 1)
  assert find_place(DistributedSpec(coordinator='host', processes=2, process_id=0), {}) == Place(
      ('host', distributed.PORT), 2, 0)
  with pytest.raises(ConfigError, match='distributed.process_id is not known'):
    find_place(DistributedSpec(coordinator='host', processes=2), {})
  with pytest.raises(ConfigError, match='must be host or host:port'):
    find_place(DistributedSpec(coordinator='host:x'), launched)
  slurm = {'JOB_ID': 5, 'STEP_NODELIST': 'node[03-04]', 'NTASKS': 4, 'PROCID': 3, 'LOCALID': 1,
           'STEP_TASKS_PER_NODE': '2(x2)'}
  for name, value in slurm.items():
    monkeypatch.setenv(f'SLURM_{name}', str(value))
  assert find_place(DistributedSpec(port=99), {}) == Place(('node03', 99), 4, 3, (1,))
  monkeypatch.setenv('SLURM_STEP_TASKS_PER_NODE', '1(x4)')  # All GPUs of a node are its process's.
  assert find_place(DistributedSpec(), {}).device_ids is None
  monkeypatch.setenv('SLURM_NTASKS', '1')
  assert find_place(DistributedSpec(), {}) is None
