"""`llmjax plan` with the TPU compiler, and `--search`."""

import dataclasses
import gzip
import importlib.util
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from llmjax import config
from llmjax.commands.plan import settle
from llmjax.commands.spec import PlanSpec
from llmjax.plan import jobs as plan_jobs
from llmjax.plan import search as plan_search
from llmjax.plan.spec import PlanOptions
from llmjax.plan.topology import parse_topology
from llmjax.run.spec import PretrainSpec

ROOT = pathlib.Path(__file__).parents[2]
TINY = dict(num_layers=3, d_model=128, num_heads=2, num_kv_heads=2, mlp_dim=256, vocab_size=512, head_dim=64)
needs_libtpu = pytest.mark.skipif(importlib.util.find_spec('libtpu') is None,
                                  reason="libtpu is missing: pip install 'jax[tpu]'")


def tiny_spec(**train):
  return config.build(PlanSpec, {'model': TINY, 'data': {'sources': {'nowhere': 1.0}, 'seq_len': 256},
                                 'train': {'batch_size': 16, **train}})


@pytest.fixture
def options(tmp_path):
  return PlanOptions(topology='v5e:2x2', output=str(tmp_path / 'found'), jobs=2, search=True)


@needs_libtpu
def test_pretraining_step_compiled_for_four_chips(tmp_path):
  """The plan against known values; the second plan comes from the cache."""
  recipe = tmp_path / 'recipe.py'
  recipe.write_text("def get_config():\n  return {'data': {'sources': {'nowhere': 1.0}, 'seq_len': 256}}\n")
  environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'XDG_CACHE_HOME': str(tmp_path / 'cache')}
  environment.pop('JAX_COMPILATION_CACHE_DIR', None)
  environment.pop('XLA_FLAGS', None)
  command = [sys.executable, '-m', 'llmjax', 'plan', f'--config={recipe}', '--topology=v5e:2x2',
             f'--output={tmp_path}', f'--hlo={tmp_path / "step.hlo"}', '--config.train.batch_size=8',
             '--config.mesh.data=1', '--config.mesh.fsdp=4', '--config.train.remat=minimal',
             *(f'--config.model.{k}={v}' for k, v in TINY.items())]
  outputs = [subprocess.run(command, env=environment, text=True, capture_output=True, check=True).stdout
             for _ in range(2)]
  assert outputs[0] == outputs[1]  # Including the compilation time, so the second plan did not compile.
  assert len(list((tmp_path / 'cache/llmjax/plans').iterdir())) == 1
  plan = json.loads((tmp_path / 'plan.json').read_text())
  assert plan['source'] == 'compiled'
  assert plan['fits'] is True
  assert plan['unknown_loops'] == []
  assert plan['devices'] == plan['chips'] == 4
  memory, params = plan['hbm_bytes'], plan['parameters']
  # All but the norms is sharded over four chips.
  assert params * 4 / 4 <= memory['parameters'] < 1.05 * params
  assert memory['optimizer'] == pytest.approx(2 * memory['parameters'], rel=0.01)
  assert memory['arguments'] <= memory['total'] <= memory['limit']
  text = (tmp_path / 'step.hlo').read_text()
  assert 'is_scheduled=true' in text
  assert len(plan['loops']) == 2
  assert {loop['trips'] for loop in plan['loops']} == {3}
  assert {loop['backward'] for loop in plan['loops']} == {True, False}
  kernels = {k['name']: k for k in plan['kernels']}
  attention = 2 * (2 * 2 * 2 * 256 * 256 * 64) / 2  # Two products of 2 B N T T H, causal: 2 rows, 2 heads of 64.
  forward = next(k for name, k in kernels.items() if 'fwd' in name)
  keys, queries = (next(k for name, k in kernels.items() if part in name) for part in ('_dkv', '_dq'))
  assert forward['flops'] == attention
  assert keys['flops'] == attention * 4 / 2
  assert queries['flops'] == attention * 3 / 2
  assert forward['runs'] == keys['runs'] == queries['runs'] == 3
  # Heads of 64 fill half of the matrix unit, and the only block, 256 x 256, is computed in full.
  assert forward['seconds'] == pytest.approx(attention / 197e12 * 2 * 2)
  assert plan['step_seconds'] == pytest.approx(sum(plan['parts'].values()))
  assert sum(plan['cycles'][k] for k in ('matmul', 'other')) == plan['cycles']['total'] > 0
  # Parameters are gathered for both the forward and the backward pass.
  gathered = sum(r['bytes'] for r in plan['collectives'] if r['kind'] == 'all-gather' and r['axes'] == ['fsdp'])
  assert gathered > 2 * 0.9 * (params - 2 * 512 * 128) * 2
  assert {r['network'] for r in plan['collectives']} == {'ici'}
  html = (tmp_path / 'plan.html').read_text()
  assert html.count('<svg viewBox') == 2
  assert re.search(r'<rect [^>]*fill="var\(--c2\)"', html)  # A kernel.


@needs_libtpu
def test_chips_with_fast_memory_materialize_more_results():
  """The number of optimization barriers depends on the chip: a v5p has fast memory relative to its FLOP/s."""
  code = """if True:
      import json, sys
      from llmjax import config
      from llmjax.commands.plan import lower, settle
      from llmjax.commands.spec import PlanSpec
      from llmjax.plan.topology import parse_topology
      for name in ('v5p:2x2x1', 'v5e:2x2', 'v6e:2x2'):
        topology = parse_topology(name)
        spec = config.build(PlanSpec, {'model': json.loads(sys.argv[1]), 'train': {'batch_size': 16},
                                       'data': {'sources': {'nowhere': 1.0}, 'seq_len': 256}})
        print(lower(settle(spec, topology), topology)[0].as_text().count('optimization_barrier'))
      """
  done = subprocess.run([sys.executable, '-c', code, json.dumps(TINY)], text=True, capture_output=True, check=True,
                        env={**os.environ, 'PYTHONPATH': str(ROOT)})
  v5p, v5e, v6e = map(int, done.stdout.split())
  assert v5p > v5e > v6e > 0


def test_out_of_memory_plan_has_the_memory_of_the_compiler():
  from llmjax.commands import plan as command
  from llmjax.plan.memory import parse_out_of_memory
  spec, topology = tiny_spec(), parse_topology('v5e:2x2')
  details = parse_out_of_memory('Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm.')
  plan = command.plan_out_of_memory(settle(spec, topology), topology, details)
  assert plan['fits'] is False
  assert plan['hbm_bytes']['total'] == int(20.5 * 2**30)


def test_candidates_fill_the_chips_and_are_valid():
  topology = parse_topology('v5e:2x2')
  spec = dataclasses.replace(tiny_spec(), model=dataclasses.replace(tiny_spec().model, num_layers=4))
  found = plan_search.find_candidates(spec, topology)
  # Two heads allow tensor=2; every other axis of 4, every pair of 2 x 2, and data with sharded parameters (zero 3).
  pairs = {f'{a}=2 {b}=2' for a, b in itertools.combinations(('data', 'fsdp', 'stage', 'context', 'tensor'), 2)}
  pairs |= {f'{pair} zero=3' for pair in pairs if pair.startswith('data')}
  assert {c.mesh for c in found} == {'data=4', 'data=4 zero=3', 'fsdp=4', 'stage=4', 'context=4', *pairs}
  experts = dataclasses.replace(spec, model=dataclasses.replace(spec.model, num_experts=4, experts_per_token=2))
  assert {'expert=4', 'fsdp=2 expert=2'} <= {c.mesh for c in plan_search.find_candidates(experts, topology)}
  assert {c.spec.train.batch_size for c in found} == {16}
  assert {c.spec.train.remat for c in found} == set(plan_search.REMATS)
  assert all(a.tokens_per_second > 0.98 * b.tokens_per_second for a, b in itertools.pairwise(found))
  near_best = [c for c in found if c.tokens_per_second > 0.995 * found[0].tokens_per_second]
  assert len(near_best[0].sizes) == min(len(c.sizes) for c in near_best)  # The simplest of nearly equal meshes.
  assert all(not list(c.spec.resolved_problems()) for c in found)
  batch_sizes = {c.spec.train.batch_size for c in plan_search.find_candidates(tiny_spec(), topology, (1, 4))}
  assert batch_sizes == {4, 16}
  chosen = plan_search.choose(found, 10)
  assert len(chosen) == 10
  assert len({c.mesh for c in chosen}) >= 4


class Process:
  """A compilation that ends immediately."""

  def __init__(self):
    self.ended = False

  def poll(self):
    return 0

  def terminate(self):
    self.ended = True

  def wait(self):
    return 0


def fake_start(speeds, interrupt_after=None):
  """Return a `start` whose programs have these speeds, one after the other; None for one that does not fit."""
  count = 0

  def start(job, output):
    nonlocal count
    if count == interrupt_after:
      raise KeyboardInterrupt
    speed, count = speeds[count], count + 1
    plan = {'fits': speed is not None, 'tokens_per_second_per_chip': speed or 1e9, 'mfu': 0.5,
            'hbm_bytes': {'total': 1 << 30}}
    (output / 'plan.json').write_text(json.dumps(plan))
    return Process()

  return start


@pytest.mark.parametrize(('speeds', 'interrupt', 'status', 'best'), [
    ((100.0, None, 300.0, 200.0), None, 0, 2), ((100.0, 50.0, 300.0, 200.0), 2, 130, 0), ((None,) * 4, None, 1, None)])
def test_search_ranks_the_fitting_programs_and_survives_an_interrupt(
    monkeypatch, capsys, options, speeds, interrupt, status, best):
  options = dataclasses.replace(options, max_compiles=4, jobs=1)
  monkeypatch.setattr(plan_jobs, '_start', fake_start(speeds, interrupt))
  topology = parse_topology('v5e:2x2')
  chosen = plan_search.choose(plan_search.find_candidates(tiny_spec(), topology), 4)
  assert plan_search.run(tiny_spec(), topology, options) == status
  out = capsys.readouterr().out
  file = pathlib.Path(options.output) / 'best.json'
  assert file.exists() == (best is not None)
  if best is None:
    assert 'none of the compiled programs fits' in out
    return
  spec = config.build(PlanSpec, json.loads(file.read_text()))
  assert spec == chosen[best].spec
  PretrainSpec(**{f: getattr(spec, f) for f in json.loads(file.read_text())})  # Accepted by `pretrain`.
  assert re.search(r'\[1/4\] .*: 100 tokens/s/chip; about .* left', out)
  if interrupt is None:
    assert 'does not fit (1.00 GiB)' in out


def test_cached_programs_are_compressed_json(tmp_path):
  from llmjax.plan.compiler import write_cache
  write_cache(tmp_path / 'a/b.json.gz', {'text': 'HloModule'})
  assert json.loads(gzip.decompress((tmp_path / 'a/b.json.gz').read_bytes())) == {'text': 'HloModule'}
  assert [p.name for p in (tmp_path / 'a').iterdir()] == ['b.json.gz']
