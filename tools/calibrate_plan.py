#!/usr/bin/env python3
"""Holds `llmjax plan`'s way of predicting against published runs on real TPUs, and its closed forms against programs.

  python tools/calibrate_plan.py --output=experiments/tpu_calibration [--compile]

--compile makes our own programs with libtpu (minutes each) and keeps their plan.json in the output folder; without it
those that are there are read.  Writes README.md there.  Nothing is fitted to the published numbers.
"""

import argparse
import json
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from llmjax import config
from llmjax.loops.spec import PlanSpec
from llmjax.plan import closed
from llmjax.plan.topology import HOP_SECONDS, parse_topology

# Tokens/s/chip that MaxText's README and its published recipes state for these runs, and the entry of
# maxtext_0.2.5.json that is the same recipe: MaxText 0.2.5 compiled by jax 0.11.1 with libtpu 0.0.46.
PUBLISHED = (
    ('Llama 2 70B, v5p 4x4x4', 'llama2-70b_v5p-128', 'v5p:4x4x4', 692),
    ('Mixtral 8x7B, v5p 4x4x4', 'mixtral-8x7b_v5p-128', 'v5p:4x4x4', 2909),
    ('Llama 3.1 8B, v6e 16x16', 'llama3.1-8b_v6e-256', 'v6e:16x16', 7207),
)

# Our recipe of the same model, batch and chips: name, published row or '', topology, recipe, changes.
OURS = (
    ('llama2_7b-v5p', '', 'v5p:4x4x4', 'llama2_7b', {'train.batch_size': 256}),
    ('llama2_70b-v5p', 'llama2-70b_v5p-128', 'v5p:4x4x4', 'llama2_70b', {'train.batch_size': 128}),
    ('mixtral_8x7b-v5p', 'mixtral-8x7b_v5p-128', 'v5p:4x4x4', 'mixtral_8x7b', {'train.batch_size': 256}),
    ('llama2_7b-v5e', '', 'v5e:4x4', 'llama2_7b',
     {'train.batch_size': 64, 'data.seq_len': 2048, 'train.remat': 'full'}),
    ('llama3_8b-v6e', 'llama3.1-8b_v6e-256', 'v6e:16x16', 'llama3_8b', {}),
)


def predict(entry, topology):
  """Returns {'static', 'waiting', 'tokens'} of a reading of another project's program.

  static: cycles and Pallas FLOPs.  waiting: seconds of its synchronous collectives over the whole slice, which that
  reading gives by wire bytes; asynchronous ones are taken as hidden.
  """
  chip = topology.chip
  static = entry['estimated_cycles_total'] / chip.clock + entry['pallas_flops_per_device'] / topology.device_peak
  rate = closed.rate_of(topology, topology.devices)
  waiting = 0.0
  for found in entry['collectives'].values():
    part = sum(n for group, n in found['groups'].items() if 'async' not in group) / found['weighted']
    waiting += part * (found['wire'] / rate + found['weighted'] * sum(topology.shape) / 2 * HOP_SECONDS)
  tokens = int(entry['config']['global_batch_size_to_train_on']) * int(entry['config']['max_target_length'])
  return {'static': static, 'waiting': waiting, 'tokens': tokens / topology.chips}


def spec_of(recipe, changes):
  return config.build(PlanSpec, config.load_recipe(str(ROOT / f'configs/pretrain/{recipe}.py')),
                      [(name, str(value)) for name, value in changes.items()])


def compile_ours(folder, name, topology, recipe, changes):
  """Compiles one of our programs and keeps its plan as <folder>/<name>.json, without the longest lists."""
  made = folder / 'made'
  subprocess.run(
      [sys.executable, '-m', 'llmjax', 'plan', f'--config={ROOT}/configs/pretrain/{recipe}.py',
       f'--topology={topology}', f'--output={made}', *(f'--config.{k}={v}' for k, v in changes.items())],
      cwd=ROOT, check=False)
  keep(made / 'plan.json', folder / f'{name}.json')


def keep(source, target):
  plan = json.loads(source.read_text())
  for name in ('loops', 'config', 'arrays', 'kept', 'largest', 'kernels', 'cost'):
    plan.pop(name, None)
  target.write_text(json.dumps(plan, indent=1) + '\n')


def error(found, true):
  return f'{found / true - 1:+.1%}'


def table(header, rows):
  line = lambda cells: '| ' + ' | '.join(map(str, cells)) + ' |'
  return '\n'.join([line(header), line(['---'] * len(header)), *map(line, rows)])


def published_rows(folder):
  entries = json.loads((folder / 'maxtext_0.2.5.json').read_text())
  for title, key, name, tokens in PUBLISHED:
    found = predict(entries[key], parse_topology(name))
    alone, whole = found['tokens'] / found['static'], found['tokens'] / (found['static'] + found['waiting'])
    yield (title, f'{found["static"]:.3f}', f'{found["waiting"]:.3f}', f'{alone:,.0f}', f'{whole:,.0f}',
           f'{tokens:,}', error(alone, tokens), error(whole, tokens))


def our_rows(folder):
  """Yields rows of our programs: what they would do, beside what MaxText's did of the same model and chips."""
  true = {key: tokens for _, key, _, tokens in PUBLISHED}
  for name, key, topology, _, _ in OURS:
    if (file := folder / f'{name}.json').exists():
      plan = json.loads(file.read_text())
      if plan['source'] != 'compiled':
        yield name, topology, 'does not fit', '', '', '', '', ''
        continue
      yield (name, topology, plan['remat'], f'{plan["hbm_bytes"]["total"] / 2**30:.1f}',
             f'{plan["cycles"]["total"] / 1e9:.3f}', f'{plan["parts"]["exposed"]:.3f}',
             f'{plan["tokens_per_second_per_chip"]:,.0f}', f'{true[key]:,}' if key else '')


def closed_rows(folder):
  for name, _, topology, recipe, changes in OURS:
    if (file := folder / f'{name}.json').exists():
      plan = json.loads(file.read_text())
      if plan['source'] != 'compiled':
        continue
      from llmjax.loops.plan import settle
      slices = parse_topology(topology)
      fast = closed.plan(settle(spec_of(recipe, changes), slices), slices)
      a, b = fast['hbm_bytes']['total'], plan['hbm_bytes']['total']
      yield (name, f'{a / 2**30:.1f}', f'{b / 2**30:.1f}', error(a, b), f'{fast["step_seconds"]:.3f}',
             f'{plan["step_seconds"]:.3f}', error(fast['step_seconds'], plan['step_seconds']))


def report(folder):
  files = [json.loads((folder / f'{name}.json').read_text()) for name, *_ in OURS
           if (folder / f'{name}.json').exists()]
  versions = next((p['versions'] for p in files if 'versions' in p), {})
  return f'''# Predictions of `llmjax plan` against real runs

`python tools/calibrate_plan.py --output=experiments/tpu_calibration --compile`; our programs with
{', '.join(f'{k} {v}' for k, v in versions.items())}. No TPU was used.

## Published runs

Cycles, Pallas FLOPs and collectives of MaxText 0.2.5 (jax 0.11.1, libtpu 0.0.46; `maxtext_0.2.5.json` here), priced
with our table of chips and links: step = cycles / clock + Pallas FLOPs / peak, and with communication + the bytes of
synchronous collectives over the links. Nothing is fitted; published tokens/s/chip are MaxText's, of its own versions
and flags at the time.

{table(('run', 'static s', 'waiting s', 'tokens/s/chip static', 'with waiting', 'published', 'error static', 'error'),
       published_rows(folder))}

A prediction leaves out what no program tells: kernels below their peak, hosts, stragglers, links that are shared.

## Our own programs

The recipes of `configs/pretrain` at the same batch and chips. Their rematerialization is not MaxText's, so the
published figure is beside them, not their truth.

{table(('program', 'topology', 'remat', 'GiB a device', 'cycles 1e9', 'waiting s', 'tokens/s/chip',
        'MaxText published'), our_rows(folder))}

Where their cycles go, by the instructions that `plan.json` lists as `top`:

- FSDP over the whole torus of v5p and part of it on v6e: every gather of weights and every reduction of gradients is an
  all-reduce, the gathers of zeros with the own part written in; that doubles the bytes and costs the writing of the
  zeros. With `mesh.data=4 mesh.fsdp=16` the 7B of the first row makes 6,217 tokens/s/chip instead of 6,009.
- Mixtral: the three weight gradients of the experts are dense products over all 8 experts, 3.05 s each of a step of
  15.0 s; the grouped products of the other passes are Pallas kernels.
- Splash attention's backward kernel writes the gradient of the queries once for each block of keys and adds these up
  afterwards: 0.45 s of 5.30 s at 8192 tokens on v6e, 0.08 s of 2.73 s at 4096 on v5p.

![plan.html of the first row](plan.png)

## Closed forms (`--fast`) against our compiled programs

Their three constants were fitted to the first, second and fourth row; Llama 3 8B on v6e was not looked at. They do not
know the dense weight gradients of Mixtral's experts.

{table(('program', 'GiB fast', 'GiB compiled', 'error', 'step s fast', 'step s compiled', 'error'),
       closed_rows(folder))}
'''


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--output', type=pathlib.Path, default=ROOT / 'experiments/tpu_calibration')
  parser.add_argument('--compile', action='store_true')
  options = parser.parse_args()
  if options.compile:
    for name, _, topology, recipe, changes in OURS:
      compile_ours(options.output, name, topology, recipe, changes)
  (options.output / 'README.md').write_text(report(options.output))
  print((options.output / 'README.md').read_text())


if __name__ == '__main__':
  main()
