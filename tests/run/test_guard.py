"""What goes wrong in a run is found, told, and done about; on one device and on eight."""

import json
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.checkpoint.spec import CheckpointSpec
from llmjax.model.spec import ModelSpec
from llmjax.parallel.mesh import batch_blocks, batch_shards, make_mesh
from llmjax.parallel.spec import MeshSpec
from llmjax.run import loop as harness
from llmjax.run import timer
from llmjax.run.goodput import BUCKETS, Goodput
from llmjax.run.spec import PretrainSpec
from llmjax.run.writers import LogsSpec
from llmjax.train import objectives
from llmjax.train.spec import GuardSpec, OptimizerSpec, TrainSpec

MODEL = ModelSpec(num_layers=1, d_model=16, num_heads=2, mlp_dim=32, vocab_size=32)
MESHES = {'one device': (1, MeshSpec(data=1)), 'eight': (8, MeshSpec(data=2, fsdp=2, tensor=2))}
# Tokens that no good batch holds: a hundredfold loss and gradient, no finite loss, no finite gradient.
SPIKE, POISON, STEEP = 31, 30, 29


class Batches:
  """An endless stream of random rows; `bad` gives numbers of batches a token of poison.  Resumes as the real one."""

  fingerprint = 'random'

  def __init__(self, mesh, bad, token=POISON):
    self.blocks, self.shards, self.bad, self.token = batch_blocks(mesh), batch_shards(mesh), bad, token
    self.state, self.seen = 0, []

  def __next__(self):
    number, self.state = self.state, self.state + 1
    self.seen.append(number)
    rows = np.random.default_rng(number).integers(0, STEEP, (8, 17)).astype(np.int32)
    if number in self.bad:
      rows[3, 5] = self.token
    one = np.ones((8, 16), np.int32)
    batch = {'tokens': rows[:, :-1], 'targets': rows[:, 1:], 'segment_ids': one,
             'positions': np.arange(16, dtype=np.int32) * one, 'loss_mask': one.astype(np.float32)}
    size = 8 // self.shards
    return {k: np.concatenate([v[b * size:(b + 1) * size] for b in self.blocks]) for k, v in batch.items()}

  def restore(self, state):
    self.state = state

  def close(self):
    pass


@jax.custom_vjp
def steep(x):
  """x, with a gradient that is not finite."""
  return x


steep.defvjp(lambda x: (x, None), lambda _, g: (jnp.where(g == 0, g, jnp.nan),))


def poisoned(loss_fn):
  """Gives a batch with one of the three tokens what it stands for.  One program for all tests compiles once."""

  def loss(params, frozen, batch, key):
    total, rest = loss_fn(params, frozen, batch, key)
    holds = lambda token: jnp.any(batch['tokens'] == token)
    total = jnp.where(holds(STEEP), steep(total), total)
    return total * jnp.where(holds(POISON), jnp.nan, 1.0) * jnp.where(holds(SPIKE), 100.0, 1.0), rest

  return loss


def train(workdir, devices=1, mesh_spec=MESHES['one device'][1], bad=(), token=POISON, steps=8, guard=None, states=None,
          evaluators=None, **options):
  """Runs the loop in this process; returns (status, stream).  states: dict that gets every state by its step."""
  mesh = make_mesh(mesh_spec, jax.devices()[:devices])
  guard = {'spike_threshold': 20.0, 'window': 8, 'checksum_every': 0, **(guard or {})}
  options = {'compute_dtype': 'float32', 'batch_size': 8, 'log_every': 2, **options}
  spec = PretrainSpec(model=MODEL, mesh=mesh_spec, train=TrainSpec(steps=steps, **options),
                      optimizer=OptimizerSpec(lr=0.01, schedule='constant'), guard=GuardSpec(**guard),
                      checkpoint=CheckpointSpec(keep=20), logs=LogsSpec(writers=()))
  batches = Batches(mesh, bad, token)
  job = harness.Job(spec=spec, mesh=mesh, batches=batches, evaluators=evaluators or {}, sample=None,
                    loss_fn=poisoned(objectives.next_token(objectives.make_model(MODEL, spec.train, 'cpu'))),
                    goodput=Goodput(workdir),
                    describe=lambda number: [{'source': 'random', 'row': number, 'text': ['…']}])
  with jax.set_mesh(mesh), pytest.MonkeyPatch.context() as patch:
    if states is not None:
      compile_ = harness.Run.compile_step

      def recorded(loop, batch):
        step = compile_(loop, batch)

        def run(state, batch):
          after = step(state, batch)
          states[int(after[0].step)] = jax.tree.map(np.asarray, after[0])
          return after

        return run

      patch.setattr(harness.Run, 'compile_step', recorded)
    return harness.train(job, workdir), batches


def lines(workdir, name):
  return [json.loads(line) for line in (workdir / name).read_text().splitlines()]


def events(workdir, kind):
  return [row for row in lines(workdir, 'events.jsonl') if row['kind'] == kind]


def losses(workdir):
  return {row['step']: row['train/loss'] for row in lines(workdir, 'metrics.jsonl') if 'train/loss' in row}


def same(a, b):
  return all(x.tobytes() == y.tobytes() for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.mark.parametrize('mesh', ['one device', pytest.param('eight', marks=pytest.mark.slow)])
def test_skip_leaves_everything_as_it_was(tmp_path, mesh, capsys):
  states = {}
  status, _ = train(tmp_path, *MESHES[mesh], bad={3}, guard={'policy': 'skip'}, states=states)
  assert status == 0 and list(states) == [*range(1, 9)]
  before, after = states[3], states[4]  # Batch number 3 is the fourth step's.
  assert same(before.params, after.params) and same(before.opt_state.rule, after.opt_state.rule)
  assert after.step == before.step + 1 and after.opt_state.watch.bad == 1
  assert not same(states[2].params, before.params) and not same(after.params, states[5].params)
  (event,) = events(tmp_path, 'bad_step')
  assert event['step'] == 4 and event['details']['batch'] == 3 and event['details']['loss'] == 'NaN'
  assert json.loads((tmp_path / 'bad_steps/4.json').read_text())['rows'][0]['row'] == 3
  assert 'step 4 is skipped: the loss is not finite' in capsys.readouterr().out
  assert all(isinstance(loss, float) for loss in losses(tmp_path).values())  # Of the steps that counted.
  assert 'the loss is not finite; skipped' in (tmp_path / 'report.html').read_text()


def test_a_gradient_alone_that_is_not_finite_is_found(tmp_path):
  assert train(tmp_path, bad={2}, token=STEEP, steps=4)[0] == 1
  (event,) = events(tmp_path, 'bad_step')
  assert event['step'] == 3 and event['details']['reason'] == 'the gradient is not finite'
  assert event['details']['loss'] != 'NaN' and event['details']['grad_norm'] == 'NaN'


def test_abort_stops_before_it_saves_and_too_many_bad_steps_stop_a_skipping_run(tmp_path, capsys):
  # The log line of the bad step is not due; the checkpoint at its side is not written.
  assert train(tmp_path / 'a', bad={3}, log_every=5, checkpoint_every=2)[0] == 1
  assert 'stopped: the loss is not finite at step 4; the last checkpoint is step 2' in capsys.readouterr().out
  assert sorted(p.name for p in (tmp_path / 'a/checkpoints').glob('[0-9]*')) == ['2']
  assert events(tmp_path / 'a', 'stopped')
  status, _ = train(tmp_path / 'b', bad={2, 4, 5, 6}, steps=12, guard={'policy': 'skip', 'max_bad_steps': 2})
  assert status == 1
  assert 'not finite at step 7, the 3th bad step in a row' in capsys.readouterr().out


@pytest.mark.parametrize('mesh', ['one device', pytest.param('eight', marks=pytest.mark.slow)])
def test_rollback_leaves_batches_out_and_goes_on(tmp_path, mesh):
  guard = {'policy': 'rollback', 'rollback_skip_batches': 5}
  status, stream = train(tmp_path, *MESHES[mesh], bad={5}, steps=10, log_every=1, checkpoint_every=4, guard=guard)
  assert status == 0
  (back,) = events(tmp_path, 'rollback')
  # Bad is step 6, of batch 5; the checkpoint of step 4 had drawn 0 to 3; 4 to 8 are left out.
  assert back['step'] == 6 and back['details']['to'] == 4
  assert back['details']['skipped_batches'] == 5 and back['details']['lost_steps'] == 2
  at = stream.seen.index(9)
  assert stream.seen[at:] == [9, 10, 11, 12, 13, 14] and max(stream.seen[:at]) == 6
  found = losses(tmp_path)
  assert list(found) == [*range(1, 11)] and all(isinstance(loss, float) for loss in found.values())
  if mesh != 'one device':
    return

  # A run that was given those batches from the start is the same, to the bit.
  class Jumping(Batches):
    def __next__(self):
      if self.state == 4:
        self.state = 9
      return super().__next__()

  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(globals(), 'Batches', Jumping)
    train(tmp_path / 'straight', *MESHES[mesh], steps=10, log_every=1)
  assert losses(tmp_path / 'straight') == found
  assert json.loads((tmp_path / 'bad_steps/6.json').read_text())['batch'] == 5


@pytest.mark.slow
def test_rollbacks_have_a_limit(tmp_path, capsys):
  guard = {'policy': 'rollback', 'rollback_skip_batches': 0, 'max_bad_steps': 2}
  status, stream = train(tmp_path, bad=range(3, 50), checkpoint_every=2, guard=guard)
  assert status == 1
  assert 'after 2 rollbacks to step 2' in capsys.readouterr().out
  backs = events(tmp_path, 'rollback')
  # Batch 3, the second after the checkpoint, is bad, and then every first one.
  assert [b['details']['skipped_batches'] for b in backs] == [2, 3] and stream.seen[-1] >= 5


@pytest.mark.slow
def test_a_spike_is_found_and_a_resumed_run_finds_the_same(tmp_path):
  options = {'bad': {5, 12}, 'token': SPIKE, 'guard': {'policy': 'skip'}, 'log_every': 4}
  states, resumed = {}, {}
  train(tmp_path / 'whole', steps=16, states=states, **options)
  (event,) = events(tmp_path / 'whole', 'bad_step')  # At step 6 the window was not full yet.
  assert event['step'] == 13 and 'the loss jumped to' in event['details']['reason']
  assert "the gradient's norm jumped to" in event['details']['reason']
  assert same(states[12].params, states[13].params)
  train(tmp_path / 'parts', steps=10, **options)
  train(tmp_path / 'parts', steps=16, states=resumed, **options)
  assert list(resumed) == [*range(11, 17)]
  assert [e['step'] for e in events(tmp_path / 'parts', 'bad_step')] == [13]
  assert same(states[16], resumed[16])


def test_a_device_that_differs_stops_the_run_before_it_saves(tmp_path, capsys):
  add = timer.StepTimer.add
  with pytest.MonkeyPatch.context() as patch:
    def corrupt(window, step, position, metrics):
      add(window, step, position, metrics)
      if step == 5:
        loop = loops[0]
        params = loop.state.params
        name = 'final_norm'
        x = params[name]['scale']
        parts = [np.array(s.data) for s in x.addressable_shards]
        parts[5].view(np.uint32)[3] ^= 1 << 7
        placed = [jax.device_put(p, s.device) for p, s in zip(parts, x.addressable_shards, strict=True)]
        params = {**params, name: {'scale': jax.make_array_from_single_device_arrays(x.shape, x.sharding, placed)}}
        loop.state = loop.state.replace(params=params)

    loops, init = [], harness.Run.__init__
    patch.setattr(harness.Run, '__init__', lambda loop, *args: (loops.append(loop), init(loop, *args))[1])
    patch.setattr(timer.StepTimer, 'add', corrupt)
    status, _ = train(tmp_path, *MESHES['eight'], log_every=10, checkpoint_every=4,
                      guard={'checksum_every': 50})
  assert status == 1
  assert 'stopped: the parameters on device 5 (cpu, process 0) differ' in capsys.readouterr().out.replace('CPU', 'cpu')
  assert events(tmp_path, 'corruption')[0]['details']['devices'] == [5]
  assert sorted(p.name for p in (tmp_path / 'checkpoints').glob('[0-9]*')) == ['4']


def test_early_stopping(tmp_path, capsys):
  curve = iter([3.0, 2.0, 2.5, 2.0, 9.0, 9.0])
  evaluators = {'validation': lambda params, frozen: {'loss': next(curve)}}
  status, _ = train(tmp_path, steps=12, evaluators=evaluators, eval_every=1, patience=3)
  assert status == 0
  assert 'stopped at step 5: eval/validation/loss has not improved in 3 evaluations' in capsys.readouterr().out
  (event,) = events(tmp_path, 'early_stop')
  assert event['step'] == 5 and event['details']['best_step'] == 2
  assert sorted(p.name for p in (tmp_path / 'checkpoints').glob('[0-9]*')) == ['5']
  status, stream = train(tmp_path, steps=12, evaluators=evaluators, eval_every=1, patience=3)
  assert status == 0 and not stream.seen  # Again: it is done.
  assert 'is done at step 5 of 12' in capsys.readouterr().out


def test_patience_needs_something_to_watch():
  problems = list(PretrainSpec(train=TrainSpec(patience=2, stop_metric='eval/test/loss')).validate())
  assert any('set train.eval_every' in p for p in problems)
  assert any('write eval/validation/loss' in p for p in problems)
  assert not list(PretrainSpec(train=TrainSpec(patience=2, eval_every=5)).validate())


@pytest.mark.slow
def test_a_count_of_patience_survives_a_restart(tmp_path):
  evaluators = {'validation': lambda params, frozen: {'loss': 1.0}}
  train(tmp_path, steps=2, evaluators=evaluators, eval_every=1, patience=3)
  train(tmp_path, steps=12, evaluators=evaluators, eval_every=1, patience=3)
  assert [e['step'] for e in events(tmp_path, 'early_stop')] == [4]


def test_time_of_a_killed_and_a_rolled_back_run_sums_to_the_wall_time(tmp_path):
  clock = types.SimpleNamespace(now=1000.0)
  goodput = lambda age=0.0: Goodput(tmp_path, clock=lambda: clock.now, now=lambda: clock.now, age=age)

  def spend(book, bucket, seconds):
    with book.charge(bucket):
      clock.now += seconds

  clock.now += 2.0
  first = goodput(age=2.0)  # Imports since 1000.
  spend(first, 'init', 3.0)
  first.write(0)
  for step in range(1, 8):
    spend(first, 'step', 8.0)
    spend(first, 'data_wait', 2.0)
    if step % 2 == 0:
      spend(first, 'checkpoint', 1.0)
      first.write(step)  # Checkpoints at 2, 4 and 6.
  clock.now += 4.0  # Step 7, the 4 s, and 80 more without a process: no line tells of them apart.
  clock.now += 80.0
  second = goodput()
  assert second.go_back(4) == pytest.approx(20.0)  # Steps 5 and 6; of step 7 nothing was written.
  second.write(4)
  for _ in range(3):
    spend(second, 'step', 10.0)
  second.write(7)
  assert second.go_back(4) == pytest.approx(30.0)  # A rollback.
  second.write(4)
  spend(second, 'step', 10.0)
  clock.now += 0.5
  second.write(5, done=True)
  clock.now += 1000.0  # A finished run is not waiting to be started again.
  third = goodput()
  third.go_back(5)
  spend(third, 'step', 10.0)
  totals = third.totals()
  assert totals == {**dict.fromkeys(BUCKETS, 0.0), 'init': 5.0, 'step': 52.0, 'data_wait': 8.0, 'checkpoint': 3.0,
                    'lost': 50.0, 'restart': 94.0, 'other': 0.5}
  assert sum(totals.values()) == pytest.approx(clock.now - 1000.0 - 1000.0)


def test_a_line_cut_off_by_a_kill_is_no_harm(tmp_path):
  book = Goodput(tmp_path)
  book.write(3)
  book.close()
  with open(tmp_path / 'time.jsonl', 'a') as f:
    f.write('{"time": 12')
  again = Goodput(tmp_path)
  again.write(4)
  again.close()
  assert [row['step'] for row in lines(tmp_path, 'time.jsonl')] == [3, 4]


def test_a_real_run_accounts_for_its_wall_time(tmp_path):
  begin = time.time()
  train(tmp_path, bad={5}, checkpoint_every=4, guard={'policy': 'rollback', 'rollback_skip_batches': 1})
  whole = time.time() - begin
  seconds = lines(tmp_path, 'time.jsonl')[-1]['seconds']
  assert sum(seconds.values()) == pytest.approx(whole, rel=0.01, abs=0.05)
  assert seconds['lost'] > 0 and seconds['step'] > 0 and seconds['restart'] == 0
