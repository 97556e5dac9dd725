"""No loop runs more than a few programs ahead of the devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.evaluate import margins, perplexity
from llmjax.parallel import in_flight
from llmjax.parallel.mesh import make_mesh
from llmjax.parallel.spec import MeshSpec
from llmjax.post import rollout
from llmjax.run import cached_outputs
from llmjax.run import loop as harness
from tests.run import test_guard

PROGRAMS = 12


@jax.jit
def slow(x):
  """Returns x, after some milliseconds: longer than the host needs to dispatch a program."""
  w = jnp.full((160, 160), x.ravel()[0], jnp.float32)
  w = jax.lax.fori_loop(0, 100, lambda _, w: jnp.tanh(w @ w), w)
  return x + 0 * w[0, 0]


class Counted:
  """Wraps a function of device arrays; `ahead` has, for each call, how many earlier outputs were not computed yet."""

  def __init__(self, function):
    self.function, self.outputs, self.ahead = function, [], []

  def __call__(self, *arguments):
    self.ahead.append(sum(not x.is_ready() for x in jax.tree.leaves(self.outputs)))
    found = self.function(*arguments)
    self.outputs.append(jax.tree.leaves(found)[0])
    return found


def run_perplexity(step):
  perplexity.evaluate(lambda params, frozen, batch: step(batch), None, {}, (jnp.ones(4),) * PROGRAMS)


def run_pairs(step):
  margins.evaluate(lambda params, frozen, batch: (step(batch)[0], (batch[0], {})), None, {}, (jnp.ones(3),) * PROGRAMS)


def run_tables(step):
  # A process that does not write the tables reads nothing, and must not run ahead for that.
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(cached_outputs.distributed, 'is_first', lambda: False)
    cached_outputs._write({}, {}, (PROGRAMS,), in_flight.results({'x': step(jnp.ones(3))} for _ in range(PROGRAMS)))


def run_scores(step):
  mesh = make_mesh(MeshSpec(), jax.devices()[:1])
  score = rollout._Microbatched(lambda params, batch: {'x': batch['tokens']}, mesh, 1, 0)
  score._function = lambda params, batch: {'x': step(batch['tokens'])}
  found = score(None, {'tokens': np.arange(PROGRAMS, dtype=np.float32)[:, None]})
  np.testing.assert_array_equal(found['x'][:, 0], np.arange(PROGRAMS))


@pytest.mark.parametrize('run', [run_perplexity, run_pairs, run_tables, run_scores])
def test_an_evaluation_is_a_few_programs_ahead(run, monkeypatch):
  slow(jnp.ones(3))
  step = Counted(slow)
  run(step)
  assert len(step.ahead) == PROGRAMS and max(step.ahead) <= in_flight.LIMIT
  monkeypatch.setattr(in_flight, 'LIMIT', 100)  # The count does see a loop that runs ahead.
  step = Counted(slow)
  run(step)
  assert max(step.ahead) > 4


@pytest.mark.parametrize('limited', [True, False])
def test_training_is_a_few_steps_ahead_between_log_lines(tmp_path, monkeypatch, limited):
  counted, compile_ = [], harness.Run.compile_step

  def compile_slow(loop, batch):
    step = compile_(loop, batch)

    def run(state, batch):
      state, metrics = step(state, batch)
      return state, {**metrics, 'loss': slow(metrics['loss'])}

    slow(jnp.float32(0))
    counted.append(Counted(lambda *arguments: run(*arguments)[::-1]))  # The state is given away: count the metrics.
    return lambda *arguments: counted[0](*arguments)[::-1]

  monkeypatch.setattr(harness.Run, 'compile_step', compile_slow)
  if not limited:
    monkeypatch.setattr(in_flight, 'LIMIT', 100)
  before = in_flight.finished()
  status, _ = test_guard.train(tmp_path, steps=20, log_every=0)
  assert status == 0 and in_flight.finished() - before >= 20
  (step,) = counted
  assert len(step.ahead) == 20
  assert max(step.ahead) <= in_flight.LIMIT if limited else max(step.ahead) > 4


@pytest.mark.slow
def test_hundreds_of_steps_on_eight_devices_with_one_log_line(tmp_path):
  """Without a limit jaxlib may deadlock in many more of them: see tools/stress_dispatch.py."""
  status, _ = test_guard.train(tmp_path, *test_guard.MESHES['eight'], steps=300, log_every=1000,
                               guard={'checksum_every': 7})
  assert status == 0
  assert list(test_guard.losses(tmp_path)) == [300]


def test_results_come_in_order_and_errors_come_out():
  assert [int(x) for x in in_flight.results(jnp.int32(i) + 1 for i in range(5))] == [1, 2, 3, 4, 5]
  assert list(in_flight.results(())) == []

  def fails():
    yield jnp.int32(1)
    raise OSError

  with pytest.raises(OSError):
    list(in_flight.results(fails()))
