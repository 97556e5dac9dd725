"""Measure the cost of checkpoints: how long a save blocks training, and the host memory of saves and restores.

  llmjax prepare --config=configs/data/python_docs.py
  python tools/bench_checkpoint.py --gigabytes=1 --output=checkpoints.json

Four parts in separate processes; medians over `--rounds`:

save     `Checkpoints.save` of a state of `--gigabytes` (float32 parameters and two moments; stacked layers, two large
         matrices), five times: seconds that the caller is blocked, compared with copying every array to host memory in
         the same process, and seconds and CPU-seconds until the save is complete.
peak     increase of the peak resident memory during a save, relative to the size of the state.  A save copies the
         state, because the next step may overwrite it, so the minimum is 1.0.
restore  increase of the peak resident memory during a restore, relative to the size of the state.  On a CPU the
         restored arrays are in host memory themselves, so the minimum is 1.0.
run      the recipe `--config` for one checkpoint interval with a save at the end, and for as many steps without a save:
         the fraction of wall time that goodput charges to checkpoints, and the CPU-seconds of both.
"""

import argparse
import json
import os
import pathlib
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
SAVES = 5
AFTER = 20  # Steps after the checkpoint, during which it is written.


def make_shapes(gigabytes):
  """Return {name: shape} of float32 parameters that have this size in GB together with two moments."""
  width = 768
  ends = {'embed': (32000, width), 'output': (width, 32000)}
  layer = {'query': (width, width), 'gate': (width, 2048), 'up': (width, 2048), 'down': (2048, width)}
  count = lambda shapes: sum(a * b for a, b in shapes.values())
  layers = round((gigabytes * 1e9 / 12 - count(ends)) / count(layer))
  if layers < 1:
    raise SystemExit(f'--gigabytes={gigabytes} is less than the {12 * count(ends | layer) / 1e9:.1f} of one layer')
  return ends | {name: (layers, *shape) for name, shape in layer.items()}


def abstract_train_state(gigabytes):
  import jax
  import jax.numpy as jnp

  from llmjax.train.state import TrainState
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  leaf = lambda shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype, sharding=device)
  params = {name: leaf(shape) for name, shape in make_shapes(gigabytes).items()}
  return TrainState(step=leaf((), jnp.int32), params=params, opt_state={'mu': params, 'nu': params},
                    key=leaf((2,), jnp.uint32))


def make_state(gigabytes):
  import jax
  import numpy as np
  rng = np.random.default_rng(0)

  def fill(x):
    values = rng.standard_normal(x.shape, np.float32) if x.dtype == np.float32 else np.ones(x.shape, x.dtype)
    return jax.device_put(values, x.sharding, may_alias=False)

  return jax.block_until_ready(jax.tree.map(fill, abstract_train_state(gigabytes)))


def peak(args):
  """Save twice while the next step overwrites the state; return the measurements."""
  from llmjax.parallel.host import keep_freed_memory, share_arena
  share_arena()  # As in training.
  import jax

  from llmjax.checkpoint.checkpoints import Checkpoints
  state = make_state(args.gigabytes)
  step_fn = jax.jit(lambda state: jax.tree.map(lambda x: x + jax.numpy.ones((), x.dtype), state), donate_argnums=0)
  state = jax.block_until_ready(step_fn(state))
  keep_freed_memory()
  checkpoints, rows = Checkpoints(args.folder), []
  for step in (1, 2):
    pathlib.Path('/proc/self/clear_refs').write_text('5')  # Resets the peak.
    before, _ = memory()
    begin = time.perf_counter()
    checkpoints.save(step, state, {'batches': step}, {})
    state = step_fn(state)
    checkpoints.wait()
    after, highest = memory()
    rows.append({'peak': highest - before, 'left': after - before, 'seconds': time.perf_counter() - begin})
  checkpoints.close()
  size = sum(x.nbytes for x in jax.tree.leaves(state))
  return {'bytes': size, 'peak_over_state': [row['peak'] / size for row in rows],
          'left_over_state': [row['left'] / size for row in rows], 'seconds': [row['seconds'] for row in rows]}


def save(args):
  """Save SAVES times; return the measurements."""
  import jax
  import numpy as np

  from llmjax.checkpoint.checkpoints import Checkpoints
  state = make_state(args.gigabytes)
  checkpoints, rows = Checkpoints(args.folder), []
  for step in range(1, SAVES + 1):
    begin = time.perf_counter()
    copies = [np.array(x, copy=True) for x in jax.tree.leaves(state)]
    copied = time.perf_counter() - begin
    del copies
    begin, cpu = time.perf_counter(), time.process_time()
    checkpoints.save(step, state, {'batches': step}, {})
    held = time.perf_counter() - begin
    checkpoints.wait()
    rows.append({'held_seconds': held, 'copy_seconds': copied, 'complete_seconds': time.perf_counter() - begin,
                 'cpu_seconds': time.process_time() - cpu})
  checkpoints.close()
  # The first save compiles the check for values that are not finite.
  return {'bytes': sum(x.nbytes for x in jax.tree.leaves(state)), 'first_held_seconds': rows[0]['held_seconds'],
          **{name: statistics.median(row[name] for row in rows[1:]) for name in rows[0]}}


def memory():
  """Return (resident bytes, peak resident bytes since the last reset)."""
  lines = dict(line.split(':') for line in pathlib.Path('/proc/self/status').read_text().splitlines())
  return tuple(int(lines[name].split()[0]) * 1024 for name in ('VmRSS', 'VmHWM'))


def restore(args):
  """Restore once; return the measurements."""
  from llmjax.parallel.host import share_arena
  share_arena()  # As in training.
  import jax

  from llmjax.checkpoint.checkpoints import Checkpoints
  abstract = abstract_train_state(args.gigabytes)
  jax.block_until_ready(jax.numpy.ones(8) + 1)
  checkpoints = Checkpoints(args.folder)
  begin = time.perf_counter()
  step = checkpoints.latest()
  verified = time.perf_counter() - begin
  pathlib.Path('/proc/self/clear_refs').write_text('5')  # Resets the peak.
  before, _ = memory()
  begin = time.perf_counter()
  state, _ = checkpoints.restore(step, abstract)
  jax.block_until_ready(state)
  _, highest = memory()
  size = sum(x.nbytes for x in jax.tree.leaves(state))
  return {'verify_seconds': verified, 'restore_seconds': time.perf_counter() - begin,
          'peak_over_state': (highest - before) / size}


def run_recipe(args, name, every):
  """Train for one interval; return the measurements.  every: steps between checkpoints; 0: none."""
  workdir = pathlib.Path(args.folder) / name
  command = [sys.executable, '-m', 'llmjax', 'pretrain', f'--config={args.config}', f'--workdir={workdir}',
             f'--config.train.steps={args.interval + AFTER}', f'--config.train.checkpoint_every={every}',
             '--config.train.log_every=20',
             '--config.train.eval_every=0', '--config.train.sample_every=0', '--config.evaluate.splits=',
             '--config.logs.writers=', *args.overrides]
  before = resource.getrusage(resource.RUSAGE_CHILDREN)
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
  after = resource.getrusage(resource.RUSAGE_CHILDREN)
  if done.returncode:
    raise SystemExit(done.stderr or done.stdout)
  lines = map(json.loads, (workdir / 'time.jsonl').read_text().splitlines())
  seconds = next(line['seconds'] for line in lines if line['step'] == args.interval + AFTER)  # Before the final save.
  return {'cpu_seconds': sum(getattr(after, n) - getattr(before, n) for n in ('ru_utime', 'ru_stime')),
          'train_seconds': seconds['step'] + seconds['data_wait'], 'held_seconds': seconds['checkpoint']}


def child(args, part, *rest):
  done = subprocess.run([sys.executable, __file__, f'--part={part}', f'--gigabytes={args.gigabytes}', *rest],
                        cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
  return json.loads(done.stdout.splitlines()[-1])


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--gigabytes', type=float, default=1.0)
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument('--config', default='configs/pretrain/quickstart.py')
  parser.add_argument('--interval', type=int, default=400, help="steps between the recipe's checkpoints")
  parser.add_argument('--output', default='')
  parser.add_argument('--part', choices=('save', 'peak', 'restore'), help=argparse.SUPPRESS)
  parser.add_argument('--folder', help=argparse.SUPPRESS)
  args, args.overrides = parser.parse_known_args()
  os.environ['PYTHONPATH'] = str(ROOT)
  sys.path.insert(0, str(ROOT))
  if args.part:
    print(json.dumps({'save': save, 'peak': peak, 'restore': restore}[args.part](args)))
    return
  with tempfile.TemporaryDirectory() as folder:
    args.folder = folder
    found = {'save': child(args, 'save', f'--folder={folder}')}
    with tempfile.TemporaryDirectory() as other:
      found['peak'] = child(args, 'peak', f'--folder={other}')
    rows = [child(args, 'restore', f'--folder={folder}') for _ in range(args.rounds)]
    found['restore'] = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    found['restore']['highest_peak_over_state'] = max(row['peak_over_state'] for row in rows)
  with tempfile.TemporaryDirectory() as folder:
    args.folder = folder
    run_recipe(args, 'first', 0)  # Fills the compilation cache.
    pairs = [(run_recipe(args, f'with{i}', args.interval), run_recipe(args, f'without{i}', 0))
             for i in range(args.rounds)]
  found['run'] = {
      'interval': args.interval,
      'held_share': statistics.median(a['held_seconds'] / a['train_seconds'] for a, _ in pairs),
      'cpu_share': statistics.median(a['cpu_seconds'] / b['cpu_seconds'] - 1 for a, b in pairs),
      'pairs': pairs}
  found['machine'] = {'cpus': os.cpu_count(), 'load': os.getloadavg(), 'python': platform.python_version()}
  text = json.dumps(found, indent=1)
  print(text)
  if args.output:
    pathlib.Path(args.output).write_text(text + '\n')


if __name__ == '__main__':
  main()
