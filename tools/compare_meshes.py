"""Compare every mesh with one device: numerics, collectives, bytes and FLOPs, on 8 emulated CPU devices.

  python tools/compare_meshes.py --output=experiments/meshes

Numerics: the tiny models and packed batches of tests/parallel/test_meshes.py are trained for ten steps on every mesh
and on one device.  The difference of gradients (second step) or parameters (after the tenth) is the largest over all
arrays, each relative to the array's largest value.

Program: a larger step (PROGRAM below) is compiled and not run.  Reported are its collectives, weighted by loop trip
counts, the bytes per device, and the FLOPs of its matrix products times the number of devices, relative to the
one-device program.  Pipeline stages also compute in the bubble, on padding: for pipelines, the ratio that the bubble
explains is reported as well, including the second forward pass of 1f1b.

  python tools/compare_meshes.py --sweep --output=experiments/meshes

Runs two steps on every mesh of one, two or three axes of size 2, for every pipeline schedule and kind of context
attention, with dense, dropless and capacity-limited MLPs.  Cases run in separate processes, so that aborts of XLA and
hangs are recorded.  Results are appended to sweep_float32.jsonl; cases in this file are not run again.
"""

import argparse
import collections
import dataclasses
import functools
import itertools
import json
import os
import pathlib
import re
import select
import subprocess
import sys

os.environ.setdefault('XLA_FLAGS', '--xla_force_host_platform_device_count=8')
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
ROOT = pathlib.Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / 'tests' / 'parallel')]

import jax
import numpy as np
import test_meshes

from llmjax.commands.mesh import abstract_pretraining, compile_step, local_bytes
from llmjax.commands.spec import LayoutSpec
from llmjax.config import to_dict
from llmjax.model.model import Model
from llmjax.model.spec import ModelSpec
from llmjax.parallel.mesh import make_mesh
from llmjax.parallel.pipeline import bubble
from llmjax.parallel.spec import AXES, MeshSpec, PipelineSpec
from llmjax.plan.collectives import find_collectives, summarize
from llmjax.plan.flops import count_products
from llmjax.run.spec import PretrainSpec

PROGRAM = {
    'dense': ModelSpec(num_layers=8, d_model=256, num_heads=8, mlp_dim=704, vocab_size=4096),
    'moe': ModelSpec(num_layers=8, d_model=256, num_heads=8, mlp_dim=352, vocab_size=4096, num_experts=4,
                     experts_per_token=2, shared_experts=1),
}
ROWS, LENGTH = 32, 256


def largest_difference(arrays, expected):
  """Return the largest difference of any array, relative to the array's largest value."""
  differences = jax.tree.map(lambda a, b: float(np.abs(a - b).max() / np.abs(b).max()), arrays, expected)
  return max(jax.tree.leaves(differences))


def numbers(kind, sizes, pipe):
  """Return the differences between a mesh and one device."""
  grads, params, losses = test_meshes.run(test_meshes.MODELS[kind], MeshSpec(**sizes), pipe)
  expected_grads, expected_params, expected_losses = test_meshes.alone(kind)
  return {'loss': float(np.abs(np.divide(losses[:2], expected_losses[:2]) - 1).max()),
          'gradient': largest_difference(grads, expected_grads),
          'parameters': largest_difference(params, expected_params)}


def program(model, sizes, pipe):
  """Return FLOPs, bytes and collectives of the compiled step of a mesh.  sizes: None for one device."""
  mesh_spec = MeshSpec(**(sizes or {}))
  mesh = make_mesh(mesh_spec, None if sizes else jax.devices()[:1])
  spec = dataclasses.replace(LayoutSpec(), model=model, mesh=mesh_spec, pipeline=pipe)
  spec = dataclasses.replace(
      spec, train=dataclasses.replace(spec.train, batch_size=ROWS, compute_dtype='float32'),
      data=dataclasses.replace(spec.data, seq_len=LENGTH))
  _, state, _ = abstract_pretraining(spec, mesh)
  compiled = compile_step(spec, mesh)
  text = compiled.as_text()
  return {'flops': count_products(text) * mesh.size,
          'state_bytes': sum(local_bytes(leaf) for leaf in jax.tree.leaves(state)),
          'temporary_bytes': compiled.memory_analysis().temp_size_in_bytes,
          'collectives': [dataclasses.asdict(row) for row in summarize(find_collectives(text, mesh))]}


def compare(kind, name, one_device):
  """Return the row of a mesh."""
  sizes = dict(test_meshes.MESHES[name])
  pipe = PipelineSpec(**sizes.pop('pipeline', {}))
  found = {**numbers(kind, sizes, pipe), **program(PROGRAM[kind], sizes, pipe)}
  found['flops_ratio'] = found['flops'] / one_device['flops']
  stages = sizes.get('stage', 1) * sizes.get('dcn_stage', 1)
  if stages > 1:
    idle, ticks = bubble(pipe.schedule, stages, pipe.count(stages, 0), pipe.rounds)
    # Embedding and head are outside the pipeline and have no bubble.
    layers = one_device['layers'] + (one_device['layers_forward'] if pipe.schedule == '1f1b' else 0)
    found['bubble_ratio'] = 1 + (layers * ticks / (ticks - idle) - one_device['layers']) / one_device['flops']
  return found


def alone(kind):
  """Return `program` of one device, with the FLOPs of its layers and of their forward pass."""
  model, found = PROGRAM[kind], program(PROGRAM[kind], None, PipelineSpec())
  twice = dataclasses.replace(model, num_layers=2 * model.num_layers)
  found['layers'] = program(twice, None, PipelineSpec())['flops'] - found['flops']
  found['layers_forward'] = forward_flops(twice) - forward_flops(model)
  return found


def forward_flops(model):
  """Return the FLOPs of the forward pass of a batch, without logits."""
  def forward(params, tokens):
    return Model(model).apply(params, {'tokens': tokens, 'positions': tokens, 'segment_ids': tokens})[0]

  params = Model(model).abstract_params()
  tokens = jax.ShapeDtypeStruct((ROWS, LENGTH), 'int32')
  return count_products(jax.jit(forward).lower(params, tokens).compile().as_text())


def describe(rows):
  """Format the collectives, such as `all-gather fsdp 49 x 12.3`, in the order of the bytes sent."""
  short = lambda r: f"{r['kind']} {'+'.join(r['axes'])} {r['runs']} x {r['bytes'] / 2**20:.1f}"
  return '; '.join(short(r) for r in rows)


def table(kind, results, one_device):
  """Format the Markdown table of a model."""
  lines = [f'## {kind}', '',
           f"One device: {one_device['flops'] / 1e9:.1f} GFLOP a step, {one_device['state_bytes'] / 2**20:.1f} MiB of "
           f"state, {one_device['temporary_bytes'] / 2**20:.0f} MiB of temporaries.", '',
           '| mesh | loss | gradient | parameters | FLOPs | bubble | state MiB | temporary MiB | '
           'collectives per step: kind, axes, runs x total MiB |',
           '| --- ' * 9 + '|']
  for name, r in results.items():
    explained = f"{r['bubble_ratio']:.3f}" if 'bubble_ratio' in r else ''
    lines.append(
        f"| {name} | {r['loss']:.1e} | {r['gradient']:.1e} | {r['parameters']:.1e} | {r['flops_ratio']:.3f} | "
        f"{explained} | {r['state_bytes'] / 2**20:.1f} | {r['temporary_bytes'] / 2**20:.0f} | "
        f"{describe(r['collectives'])} |")
  return '\n'.join(lines)


SWEPT = {
    'dense': test_meshes.MODELS['dense'],
    'dropless': test_meshes.MODELS['moe'],
    'capacity': dataclasses.replace(test_meshes.MODELS['moe'], capacity_factor=0.75),
}
# As in tests/conftest.py: compilation dominates the time.
SWEEP_FLAGS = ('--xla_backend_optimization_level=0 --xla_cpu_collective_call_terminate_timeout_seconds=600 '
               '--xla_cpu_collective_timeout_seconds=600')
CASE_SECONDS, PROCESS_CASES = 400, 12
TOLERANCE = {'float32': 1e-5, 'bfloat16': 0.1}  # float32: as in tests/parallel/test_meshes.py.


def sweep_cases():
  """Return {name: case} of the sweep; a case is (kind, axes, schedule or '', context attention or '')."""
  meshes = [axes for count in (1, 2, 3) for axes in itertools.combinations(AXES, count)]
  cases = [(kind, axes, schedule, context) for kind in SWEPT for axes in meshes
           for schedule in (('gpipe', 'interleaved', '1f1b') if 'stage' in axes else ('',))
           for context in (('ring', 'gather') if 'context' in axes else ('',))]
  return {' '.join(filter(None, (kind, *axes, schedule, context))): (kind, axes, schedule, context)
          for kind, axes, schedule, context in cases}


@functools.cache
def swept_alone(kind):
  """Return gradients, parameters and losses of one device."""
  return test_meshes.run(SWEPT[kind], None, steps=2)


def run_case(kind, axes, schedule, context, compute_dtype):
  """Return the result of a case: the config errors, or the largest differences from one device."""
  mesh = MeshSpec(**{'data': 1, **dict.fromkeys(axes, 2)})
  pipe = PipelineSpec(schedule=schedule, microbatches=4) if schedule else PipelineSpec()
  spec = PretrainSpec()
  spec = dataclasses.replace(
      spec, model=SWEPT[kind], pipeline=pipe, data=dataclasses.replace(spec.data, seq_len=test_meshes.T),
      train=dataclasses.replace(spec.train, batch_size=test_meshes.B))
  if refused := list(spec.mesh_problems(mesh)):
    return {'refused': refused}
  grads, params, losses = test_meshes.run(SWEPT[kind], mesh, pipe, steps=2, compute_dtype=compute_dtype,
                                          **({'context_attention': context} if context else {}))
  expected = swept_alone(kind)
  return {'loss': float(np.abs(np.divide(losses, expected[2]) - 1).max()),
          'gradient': largest_difference(grads, expected[0]), 'parameters': largest_difference(params, expected[1])}


def run_cases(names, compute_dtype):
  """Print one line of JSON before and one after each case.  Runs in a separate process."""
  cases = sweep_cases()
  for name in names:
    print(json.dumps({'begins': name}), flush=True)
    try:
      found = run_case(*cases[name], compute_dtype)
    except Exception as e:
      found = {'failed': f'{type(e).__name__}: {str(e).splitlines()[0]}'}
    print(json.dumps({'name': name, **found}), flush=True)


def sweep(path, only, compute_dtype):
  """Run the cases that are not in the file yet, and append their results."""
  done = {json.loads(line)['name'] for line in path.read_text().splitlines()} if path.exists() else set()
  waiting = collections.defaultdict(list)  # {(kind, devices): names}
  for name, (kind, axes, *_) in sweep_cases().items():
    if name not in done and only in name:
      waiting[kind, 2 ** len(axes)].append(name)
  for (_, devices), names in waiting.items():
    while names:
      with path.open('a') as file:
        for result in run_process(names[:PROCESS_CASES], devices, compute_dtype):
          names.remove(result['name'])
          print(result, flush=True)
          file.write(json.dumps(result) + '\n')
          file.flush()


def run_process(names, devices, compute_dtype):
  """Run cases in one process and yield their results, including the case that aborts or hangs."""
  command = [sys.executable, __file__, '--sweep', f'--dtype={compute_dtype}', f'--cases={",".join(names)}']
  flags = f'--xla_force_host_platform_device_count={devices} {SWEEP_FLAGS}'
  if jax.__version_info__ < (0, 11):
    flags += ' --xla_cpu_use_fusion_emitters=false'
  # Messages of an abort in XLA go to the same pipe.
  process = subprocess.Popen(command, env={**os.environ, 'XLA_FLAGS': flags}, stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT, bufsize=0)
  running, text, pending = '', [], b''
  while True:
    ready, _, _ = select.select([process.stdout], [], [], CASE_SECONDS)
    piece = os.read(process.stdout.fileno(), 1 << 16) if ready else b''
    if not piece:
      break
    *lines, pending = (pending + piece).split(b'\n')
    for line in lines:
      if not line.startswith(b'{"'):
        text.append(line.decode(errors='replace'))
      elif 'begins' in (message := json.loads(line)):
        running, text = message['begins'], []
      else:
        running = ''
        yield message
  if ready:
    status = process.wait()
  else:
    process.kill()
    process.wait()
    status = f'no result in {CASE_SECONDS} s'
  if running:
    message = next((line for line in text if 'Check failed' in line or ' F0' in line or line.startswith('F')), '')
    yield {'name': running, 'aborted': f'{status}: {re.sub("^.*Check failed", "Check failed", message)[:200]}'}
  elif status:
    raise SystemExit('\n'.join(text))


def verdict(result, tolerance):
  """Classify a result of the sweep: agrees, refused, differs, failed or aborted."""
  word = next((word for word in ('refused', 'failed', 'aborted') if word in result), '')
  return word or ('agrees' if max(result['loss'], result['gradient'], result['parameters']) <= tolerance else 'differs')


def sweep_table(results, tolerance):
  """Format a sweep as Markdown: a table with the counts of each mesh, and lists of failed and refused cases."""
  counts, largest, listed = collections.defaultdict(collections.Counter), collections.Counter(), []
  refused = collections.Counter()
  cases, names = sweep_cases(), set()
  for result in results:
    names.add(result['name'])
    kind, axes, *_ = cases[result['name']]
    word = verdict(result, tolerance)
    counts[axes][word] += 1
    if word in ('agrees', 'differs'):
      largest[axes] = max(largest[axes], result['gradient'])
    if word == 'refused':
      refused.update(re.sub(r'=\d+', '=N', line) for line in result['refused'])
    elif word != 'agrees':
      listed.append(f'- {result["name"]}: {word}: {result.get(word) or result}')
  words = ('agrees', 'refused', 'differs', 'failed', 'aborted')
  lines = [f'| mesh, each axis 2 | {" | ".join(words)} | largest difference of gradients |', '| --- ' * 7 + '|']
  for axes, found in sorted(counts.items(), key=lambda item: (len(item[0]), [AXES.index(a) for a in item[0]])):
    lines.append(f'| {" ".join(axes)} | {" | ".join(str(found[word] or "") for word in words)} | {largest[axes]:.1e} |')
  total = sum(counts.values(), collections.Counter())
  lines.append(f'| all | {" | ".join(str(total[word]) for word in words)} | {max(largest.values(), default=0):.1e} |')
  listed += [f'- refused {count} times: {line}' for line, count in refused.items()]
  waiting = [name for name in cases if name not in names]
  return '\n'.join([*lines, '', *listed, *[f'Not run yet: {", ".join(waiting)}'] * bool(waiting), ''])


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--output', default='', help='folder for table.md and table.json')
  parser.add_argument('--only', default='', help='only meshes whose name contains this text')
  parser.add_argument('--sweep', action='store_true', help='run all meshes of up to three axes of size 2')
  parser.add_argument('--dtype', default='float32', help='--sweep: compute dtype on the meshes (one device: float32)')
  parser.add_argument('--cases', default='', help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.cases:
    return run_cases(args.cases.split(','), args.dtype)
  if args.sweep:
    path = pathlib.Path(args.output) / f'sweep_{args.dtype}.jsonl'
    sweep(path, args.only, args.dtype)
    text = sweep_table(map(json.loads, path.read_text().splitlines()), TOLERANCE[args.dtype])
    path.with_suffix('.md').write_text(text)
    return print(text)
  parts, everything = [], {'jax': jax.__version__, 'program': {k: to_dict(m) for k, m in PROGRAM.items()}}
  for kind in list(PROGRAM):
    one_device, results = alone(kind), {}
    for name in test_meshes.MESHES:
      if args.only in name:
        results[name] = compare(kind, name, one_device)
        r = results[name]
        print(f"{kind} {name}: gradient {r['gradient']:.1e}, FLOPs {r['flops_ratio']:.3f} "
              f"{r.get('bubble_ratio', 0):.3f}, {describe(r['collectives'])}", flush=True)
    parts.append(table(kind, results, one_device))
    everything[kind] = {'one device': one_device, **results}
  text = '\n\n'.join(parts)
  print(text)
  if args.output:
    folder = pathlib.Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'table.md').write_text(text + '\n')  # Included in the README.
    (folder / 'table.json').write_text(json.dumps(everything, indent=1) + '\n')


if __name__ == '__main__':
  main()
