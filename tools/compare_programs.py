#!/usr/bin/env python3
"""Compile five programs for TPUs and compare them with MaxText's: experiments/tpu_programs/table.md and table.json.

  pip install 'jax[tpu]' && python tools/compare_programs.py [--jobs=2] [--only=llama2_7b-v5p]

Each is `llmjax plan` of a recipe in configs/pretrain; no TPU is needed.  Both sides are measured in the same way:
cycles weighted by loop trip counts over the clock, plus Pallas FLOPs over the peak; MFU counts model FLOPs.  If an
independent reader, `hlo_cost.py`, is in --reader, its readings of the same programs are added.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
os.environ['PYTHONPATH'] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))

from calibrate_plan import predict

from llmjax import config, recipes
from llmjax.commands.spec import PlanSpec
from llmjax.model import counts
from llmjax.plan.jobs import Job, run_jobs
from llmjax.plan.topology import parse_topology

# Name, recipe, topology, entry of MaxText's readings, target MFU, and maximum GiB per chip.
PROGRAMS = (
    ('llama2_7b-v5p', 'llama2_7b.py', 'v5p:4x4x4', 'llama2-7b_v5p-128', 0.66, 48.84),
    ('llama2_70b-v5p', 'llama2_70b.py', 'v5p:4x4x4', 'llama2-70b_v5p-128', 0.69, 95.0),
    ('llama2_70b-v5p-stage4', 'llama2_70b.py:pipeline', 'v5p:4x4x4', 'llama2-70b_v5p-128_pp4', 0.56, 95.0),
    ('mixtral_8x7b-v5p', 'mixtral_8x7b.py', 'v5p:4x4x4', 'mixtral-8x7b_v5p-128', 0.60, 95.0),
    ('llama2_7b-v5e', 'llama2_7b.py:v5e', 'v5e:4x4', 'llama2-7b_v5e-16', 0.52, 16.0),
)
MAXTEXT = ROOT / 'experiments/tpu_calibration/maxtext_0.2.5.json'


def model_flops(recipe, tokens):
  """Return the model FLOPs of a number of tokens in sequences of the recipe's length."""
  spec = config.build(PlanSpec, recipes.load_recipe(str(ROOT / f'configs/pretrain/{recipe}')))
  return tokens * counts.train_flops_per_token(spec.model, spec.data.seq_len)


def summarize_plan(plan):
  """Return the measurements of our program; bytes and seconds are per device, wire is bytes sent per step."""
  parts, memory = plan['parts'], plan['hbm_bytes']
  kernel = sum((k['flops'] or 0) * k['runs'] for k in plan['kernels']) / parse_topology(plan['topology']).device_peak
  static = parts['matmul'] + parts['other'] + kernel
  return {'static_seconds': static, 'mfu': plan['mfu'] * plan['step_seconds'] / static, 'cycles': plan['cycles'],
          'kernel_seconds': kernel, 'waiting_seconds': parts['exposed'],
          'predicted_mfu': plan['mfu'], 'tokens_per_second_per_chip': plan['tokens_per_second_per_chip'],
          'arguments': memory['arguments'], 'temp': memory['temp'], 'total': memory['total'],
          'wire': sum(r['sent_bytes'] for r in plan['collectives']), 'unknown_loops': plan['unknown_loops'],
          'unpriced_kernels': sorted({k['name'] for k in plan['kernels'] if k['flops'] is None}),
          'mesh': plan['mesh'], 'remat': plan['remat'], 'batch_size': plan['batch_size'], 'seq_len': plan['seq_len'],
          'compile_seconds': plan['compile_seconds']}


def summarize_reading(reading, flops, topology):
  """Return the same of an `hlo_cost.py` reading {'cycles', 'pallas', 'wire'}.  flops: model FLOPs per device."""
  static = reading['cycles'] / topology.chip.clock + reading['pallas'] / topology.device_peak
  return {'static_seconds': static, 'mfu': flops / static / topology.device_peak, 'wire': reading['wire']}


def read_independently(reader, text, topology):
  """Return the reading of a program's text by `hlo_cost.py`, or None if the reader is not available."""
  if not (reader / 'hlo_cost.py').exists():
    return None
  command = [sys.executable, str(reader / 'hlo_cost.py'), str(text), f'--clock-ghz={topology.chip.clock / 1e9}',
             f'--peak-tflops={topology.device_peak / 1e12}']
  done = subprocess.run(command, text=True, capture_output=True, check=False)
  if done.returncode:
    print(f'{text.name}: hlo_cost.py failed: {done.stderr.strip().splitlines()[-1:]}', file=sys.stderr)
    return None
  reading = json.JSONDecoder().raw_decode(done.stdout)[0]
  return {'cycles': reading['estimated_cycles_total'], 'pallas': reading['pallas_flops_per_device_from_shapes'],
          'wire': sum(c['wire'] for c in reading['collectives'].values())}


def compare(program, job, text, reader):
  """Return the entry of a program in table.json."""
  name, recipe, topology_name, key, target_mfu, target_gib = program
  topology, theirs = parse_topology(topology_name), json.loads(MAXTEXT.read_text())[key]
  tokens = int(theirs['config']['global_batch_size_to_train_on']) * int(theirs['config']['max_target_length'])
  flops = model_flops(recipe, tokens) / topology.devices
  memory, predicted = theirs['hbm_gib'], predict(theirs, topology, None)
  reading = {'cycles': theirs['estimated_cycles_total'], 'pallas': theirs['pallas_flops_per_device'],
             'wire': theirs['collective_wire_bytes']}
  maxtext = {**summarize_reading(reading, flops, topology),
             'arguments': int(memory['argument'] * 2**30), 'temp': int(memory['temp'] * 2**30),
             'total': int(memory['arg_plus_temp_plus_out_minus_alias'] * 2**30), 'mesh': theirs['mesh'],
             'remat': theirs['config']['remat_policy'], 'waiting_seconds': predicted['waiting'],
             'tokens_per_second_per_chip': predicted['tokens'] / (predicted['static'] + predicted['waiting'])}
  entry = {'name': name, 'recipe': recipe, 'topology': topology_name, 'target_mfu': target_mfu,
           'target_gib': target_gib, 'maxtext': maxtext}
  if job.plan is None or job.plan['source'] != 'compiled':
    return {**entry, 'failed': job.outcome()}
  plan = job.plan
  if plan['batch_size'] * plan['seq_len'] != tokens:
    raise ValueError(f'{name}: {plan["batch_size"]} x {plan["seq_len"]} tokens, but MaxText has {tokens}')
  independent = read_independently(reader, text, topology)
  return {**entry, 'versions': plan['versions'], 'llmjax': summarize_plan(plan),
          'hlo_cost': independent and summarize_reading(independent, flops, topology)}


def markdown(entries):
  """Return the table in Markdown."""
  gib, gb = lambda n: f'{n / 2**30:.1f}', lambda n: f'{n / 1e9:.1f}'
  lines = ['| program | static MFU | MaxText | target | static step s | MaxText | HBM GiB arguments / temp | MaxText '
           '| limit | sent GB | MaxText | independent reader: MFU, sent GB | targets met | waiting s | MaxText '
           '| tokens/s/chip | MaxText |', '| ' + '--- | ' * 17]
  for e in entries:
    m = e['maxtext']
    if 'failed' in e:
      lines.append(f'| {e["name"]} | {e["failed"]} | {m["mfu"]:.1%} | {e["target_mfu"]:.0%} |' + ' |' * 13)
      continue
    o, h = e['llmjax'], e['hlo_cost']
    met = [o['mfu'] >= e['target_mfu'], o['total'] <= e['target_gib'] * 2**30, o['wire'] <= m['wire']]
    missed = [name for name, ok in zip(('MFU', 'HBM', 'sent'), met, strict=True) if not ok]
    lines.append(' '.join(f'| {cell}' for cell in (
        e['name'], f'**{o["mfu"]:.1%}**', f'{m["mfu"]:.1%}', f'{e["target_mfu"]:.0%}', f'{o["static_seconds"]:.3f}',
        f'{m["static_seconds"]:.3f}', f'{gib(o["arguments"])} / {gib(o["temp"])}',
        f'{gib(m["arguments"])} / {gib(m["temp"])}', f'{e["target_gib"]:g} in total', gb(o['wire']), gb(m['wire']),
        f'{h["mfu"]:.1%}, {gb(h["wire"])}' if h else '', 'yes' if not missed else f'not {", ".join(missed)}',
        f'{o["waiting_seconds"]:.3f}', f'{m["waiting_seconds"]:.3f}', f'{o["tokens_per_second_per_chip"]:,.0f}',
        f'{m["tokens_per_second_per_chip"]:,.0f}')) + ' |')
  return '\n'.join(lines)


def report(entries):
  versions = next((e['versions'] for e in entries if 'versions' in e), {})
  return f'''# Five programs compared with MaxText 0.2.5's

Written by `python tools/compare_programs.py`, with {', '.join(f'{k} {v}' for k, v in versions.items())}; MaxText's were
compiled by jax 0.11.1 with libtpu 0.0.46. No TPU was used: these are readings of compiled programs. A static step
excludes exposed communication; the last four columns include it, from bytes and link bandwidth as in
`experiments/tpu_calibration`, and for our programs also the blocks that a causal mask crosses. Recipes of
`configs/pretrain`:
{', '.join(f'`{e["recipe"]}` for {e["topology"]}' for e in entries)}.

{markdown(entries)}
'''


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--output', type=pathlib.Path, default=ROOT / 'experiments/tpu_programs')
  parser.add_argument('--jobs', type=int, default=2,
                      help='number of concurrent compilations; each takes about two cores and 4 GB')
  parser.add_argument('--only', default='', help='comma-separated names of programs; the others keep their entries')
  parser.add_argument('--reader', type=pathlib.Path, default=ROOT.parent / 'shared/tpu',
                      help='folder of the independent reader hlo_cost.py')
  options = parser.parse_args()
  wanted = options.only.split(',') if options.only else [p[0] for p in PROGRAMS]
  if unknown := set(wanted) - {p[0] for p in PROGRAMS}:
    parser.error(f'--only={",".join(unknown)}: known are {", ".join(p[0] for p in PROGRAMS)}')
  table = options.output / 'table.json'
  by_name = {e['name']: e for e in json.loads(table.read_text())} if table.exists() else {}
  with tempfile.TemporaryDirectory() as folder:
    texts = {name: pathlib.Path(folder) / f'{name}.hlo' for name, *_ in PROGRAMS}
    jobs = {name: Job(name, [f'--config={ROOT}/configs/pretrain/{recipe}', f'--topology={topology}',
                             f'--hlo={texts[name]}'])
            for name, recipe, topology, *_ in PROGRAMS if name in wanted}
    run_jobs(list(jobs.values()), options.jobs, lambda line: print(line, flush=True))
    for program in PROGRAMS:
      if program[0] in jobs:
        by_name[program[0]] = compare(program, jobs[program[0]], texts[program[0]], options.reader)
  entries = [by_name[p[0]] for p in PROGRAMS if p[0] in by_name]
  options.output.mkdir(parents=True, exist_ok=True)
  table.write_text(json.dumps(entries, indent=1) + '\n')
  (options.output / 'table.md').write_text(report(entries))
  print(report(entries))


if __name__ == '__main__':
  main()
