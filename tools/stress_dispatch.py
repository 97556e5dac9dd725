"""Reproduce the deadlock of emulated CPU devices when too many programs are in flight, and check that llmjax avoids it.

  python tools/stress_dispatch.py cause  [--devices=8] [--programs=3000] [--repeat=3] [--seconds=60]
  python tools/stress_dispatch.py train  [--devices=8] [--steps=10000] [--repeat=20] [--seconds=1200]
  python tools/stress_dispatch.py speed  [--devices=1,8] [--steps=1200] [--repeat=5]
  python tools/stress_dispatch.py late   [--seconds=60]

cause  tiny programs with collectives, without llmjax; the host waits after every 2nd, 10th, 31st or 100th, or never
train  `llmjax pretrain` with tiny steps and a single log line, including evaluation
speed  the training loop with at most 2, 3 and 24 steps in flight, in alternation: tokens/s and CPU-seconds per run,
       with tiny steps and a tenth as many small ones
late   two processes, one of whose data readers sleeps for `--seconds` at step 5: prints the output of the run

Each run of `cause` and `train` is a separate process; one that takes longer than `--seconds` counts as hung.
"""

import argparse
import collections
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
WAITS = (2, 10, 31, 100, 0)
LIMITS = (2, 3, 24)  # More than 31 may hang.

CAUSE = '''
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
wait, programs = map(int, sys.argv[1:])
mesh = jax.make_mesh((len(jax.devices()),), ('data',))

def step(x):
  for _ in range(4):
    x = jnp.tanh(x + jax.lax.psum(x, 'data') / mesh.size)
  return x, jax.lax.psum(jnp.sum(x), 'data')

step = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=P('data'), out_specs=(P('data'), P())), donate_argnums=0)
x = jax.device_put(np.ones((mesh.size, 64), np.float32), NamedSharding(mesh, P('data')))
for i in range(programs):
  x, total = step(x)
  if wait and i % wait == wait - 1:
    total.block_until_ready()
x.block_until_ready()
'''

RECIPE = """def get_config():
  return {'data': {'sources': {'text': 1.0}, 'seq_len': 16}, 'logs': {'writers': ()},
          'model': {'num_layers': 1, 'd_model': 16, 'num_heads': 2, 'mlp_dim': 32},
          'mesh': {'data': 2, 'fsdp': 2, 'tensor': -1}, 'optimizer': {'lr': 0.01, 'schedule': 'constant'},
          'train': {'batch_size': 8, 'compute_dtype': 'float32', 'compilation_cache': 'none'}}
"""


def run_process(argv, folder, devices, seconds):
  """Run a process; return ('done', 'hung' or 'ended with status N', wall seconds, CPU seconds)."""
  # By default, XLA ends a hung process after 40 s.
  flags = (f'--xla_force_host_platform_device_count={devices} --xla_cpu_collective_timeout_seconds=86400 '
           '--xla_cpu_collective_call_terminate_timeout_seconds=86400')
  environment = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': flags, 'PYTHONPATH': str(ROOT)}
  begin, before = time.perf_counter(), os.times()
  with open(folder / 'output', 'wb') as output:
    try:
      status = subprocess.run([sys.executable, *argv], cwd=folder, env=environment, stdout=output, stderr=output,
                              timeout=seconds, check=False).returncode
      end = 'done' if status == 0 else f'ended with status {status}'
    except subprocess.TimeoutExpired:
      end = 'hung'
  after = os.times()
  cpu = after.children_user + after.children_system - before.children_user - before.children_system
  return end, time.perf_counter() - begin, cpu


def repeat(name, argv, folder, options):
  """Run a command `options.repeat` times and print how the runs ended; return whether all are done."""
  ends, seconds, cpu = collections.Counter(), [], []
  for number in range(options.repeat):
    end, *spent = run_process(argv(number), folder, int(options.devices), options.seconds)
    ends[end] += 1
    if end == 'done':
      seconds.append(spent[0])
      cpu.append(spent[1])
    elif not end.startswith('hung'):
      print((folder / 'output').read_text(errors='replace')[-2000:])
  spent = f'; {statistics.median(seconds):.1f} s, {statistics.median(cpu):.1f} CPU-seconds per run' if seconds else ''
  print(f'{name}: ' + ', '.join(f'{n} of {options.repeat} {end}' for end, n in ends.items()) + spent, flush=True)
  return set(ends) == {'done'}


def show_cause(options):
  with tempfile.TemporaryDirectory() as folder:
    for wait in WAITS:
      name = f'{options.devices} devices, {options.programs} programs, ' + (
          f'waiting after every {wait}' if wait else 'never waiting')
      repeat(name, lambda _, wait=wait: ['-c', CAUSE, str(wait), str(options.programs)], pathlib.Path(folder), options)
  return 0


def stress_training(options):
  sys.path.insert(0, str(ROOT))
  from tests.helpers import prepare_words
  with tempfile.TemporaryDirectory() as folder:
    folder = prepare_words(pathlib.Path(folder))
    (folder / 'recipe.py').write_text(RECIPE)
    train = ['-m', 'llmjax', 'pretrain', '--config=recipe.py', f'--config.train.steps={options.steps}',
             f'--config.train.log_every={options.steps}', '--config.train.eval_every=0']
    done = repeat(f'{options.devices} devices, {options.steps} steps, one log line',
                  lambda number: [*train, f'--workdir=run{number}'], folder, options)
  return 0 if done else 1


LATE = RECIPE + """
import os, time
from llmjax.data import stream
draw = stream.BatchStream.__next__

def delayed(self):
  if os.environ['LLMJAX_PROCESS_ID'] == '1' and self.state == 5:
    time.sleep({seconds})
  return draw(self)

stream.BatchStream.__next__ = delayed
"""


def delay_reader(options):
  sys.path.insert(0, str(ROOT))
  from tests.helpers import prepare_words
  with tempfile.TemporaryDirectory() as folder:
    folder = prepare_words(pathlib.Path(folder))
    (folder / 'recipe.py').write_text(LATE.replace('{seconds}', str(options.seconds)))
    run = ['launch', 'local', '--processes=2', '--devices-per-process=1', '--', 'pretrain', '--config=recipe.py',
           '--config.mesh.tensor=1', '--config.mesh.data=1', '--config.train.steps=8', '--config.train.log_every=1',
           '--workdir=run']
    return subprocess.run([sys.executable, '-m', 'llmjax', *run], cwd=folder, check=False,
                          env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT)}).returncode


def measure_speed(options):
  """Measure the cost of the limit, in a separate process for each number of devices."""
  for devices in options.devices.split(','):
    flags = f'--xla_force_host_platform_device_count={devices}'
    subprocess.run([sys.executable, __file__, 'speed-here', f'--devices={devices}', f'--steps={options.steps}',
                    f'--repeat={options.repeat}'],
                   env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': flags, 'PYTHONPATH': str(ROOT)}, check=True)
  return 0


def measure_speed_here(options):
  import contextlib
  import io

  from llmjax import config
  from llmjax.loops import pretrain
  from llmjax.parallel import in_flight
  from llmjax.recipes import load_recipe
  from llmjax.run.spec import PretrainOptions, PretrainSpec
  from tests.helpers import prepare_words
  found = collections.defaultdict(list)
  with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
    folder = prepare_words(pathlib.Path(folder))
    (folder / 'recipe.py').write_text(RECIPE)
    devices = int(options.devices)
    for size, model in (('tiny', {}), ('small', {'num_layers': 2, 'd_model': 128, 'mlp_dim': 512})):
      recipe, steps = load_recipe('recipe.py'), options.steps // 10 if model else options.steps
      recipe['model'] |= model
      recipe['mesh'] = {'data': 1, 'fsdp': devices, 'tensor': 1}
      recipe['train'] |= {'steps': steps, 'log_every': steps // 4, 'eval_every': 0}
      recipe['evaluate'] = {'splits': ()}
      if model:
        recipe['data'] |= {'seq_len': 64}
      spec = config.build(PretrainSpec, recipe)
      for number in range(options.repeat + 1):  # The first round warms up.
        for limit in LIMITS if number % 2 else LIMITS[::-1]:
          in_flight.LIMIT = limit
          workdir, begin = folder / f'{size}-{number}-{limit}', time.process_time()
          with contextlib.redirect_stdout(io.StringIO()):
            status = pretrain.run(spec, PretrainOptions(workdir=str(workdir)))
          assert status == 0
          rows = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
          rate = statistics.median(row['train/tokens_per_second'] for row in rows[1:] if 'train/loss' in row)
          if number:
            found[size, limit].append((rate, time.process_time() - begin))
  for size in ('tiny', 'small'):
    for limit in LIMITS:
      rates, cpu = zip(*found[size, limit], strict=True)
      print(f'{devices} device{"s" * (devices > 1)}, {size} steps, {limit} in flight: '
            f'median {statistics.median(rates):,.0f} tokens/s ({min(rates):,.0f} to {max(rates):,.0f}), '
            f'{statistics.median(cpu):.2f} CPU-seconds per run', flush=True)
  return 0


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('part', choices=('cause', 'train', 'speed', 'speed-here', 'late'))
  parser.add_argument('--devices')
  parser.add_argument('--programs', type=int, default=3000)
  parser.add_argument('--steps', type=int)
  parser.add_argument('--repeat', type=int)
  parser.add_argument('--seconds', type=float)
  options = parser.parse_args()
  defaults = {'cause': ('8', 0, 3, 60.0), 'train': ('8', 10_000, 20, 1200.0), 'late': ('1', 8, 1, 60.0)}.get(
      options.part, ('1,8', 1200, 5, 0.0))
  for name, value in zip(('devices', 'steps', 'repeat', 'seconds'), defaults, strict=True):
    if getattr(options, name) is None:
      setattr(options, name, value)
  parts = {'cause': show_cause, 'train': stress_training, 'speed': measure_speed, 'speed-here': measure_speed_here,
           'late': delay_reader}
  return parts[options.part](options)


if __name__ == '__main__':
  sys.exit(main())
