"""Every mesh beside one device: numerics, collectives, bytes and FLOPs, on 8 emulated CPU devices.

  python tools/compare_meshes.py --output=experiments/meshes

Numbers first: the tiny models and packed batches of tests/parallel/test_meshes.py are trained for ten steps on every
mesh and on one device.  A difference of gradients (of the second step) or parameters (after the tenth) is the largest
of any array, each held against that array's own largest value.

Then the program of a larger step (PROGRAM below), compiled and not run: its collectives with every turn of every loop
counted, the bytes that one device holds, and the FLOPs of its matrix products times the number of devices, over those
of the one-device program.  A pipeline computes in its bubble too, on nothing: for it the ratio that its bubble
explains stands beside, counting that 1f1b runs each stage's forward pass again in the backward pass.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import sys

os.environ.setdefault('XLA_FLAGS', '--xla_force_host_platform_device_count=8')
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
ROOT = pathlib.Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / 'tests' / 'parallel')]

import jax
import numpy as np
import test_meshes

from llmjax.config import to_dict
from llmjax.loops.mesh import abstract_pretraining, compile_step, local_bytes
from llmjax.loops.spec import LayoutSpec
from llmjax.model import decoder
from llmjax.model.spec import ModelSpec
from llmjax.parallel.mesh import make_mesh
from llmjax.parallel.pipeline import bubble
from llmjax.parallel.spec import MeshSpec, PipelineSpec
from llmjax.plan.collectives import find_collectives, summarize
from llmjax.plan.flops import count_products

PROGRAM = {
    'dense': ModelSpec(num_layers=8, d_model=256, num_heads=8, mlp_dim=704, vocab_size=4096),
    'moe': ModelSpec(num_layers=8, d_model=256, num_heads=8, mlp_dim=352, vocab_size=4096, num_experts=4,
                     experts_per_token=2, shared_experts=1),
}
ROWS, LENGTH = 32, 256


def largest_difference(found, expected):
  """Returns the largest difference of any array, relative to the array's own largest value."""
  differences = jax.tree.map(lambda a, b: float(np.abs(a - b).max() / np.abs(b).max()), found, expected)
  return max(jax.tree.leaves(differences))


def numbers(kind, sizes, pipe):
  """Returns the differences of a mesh from one device."""
  grads, params, losses = test_meshes.run(test_meshes.MODELS[kind], MeshSpec(**sizes), pipe)
  expected_grads, expected_params, expected_losses = test_meshes.alone(kind)
  return {'loss': float(np.abs(np.divide(losses[:2], expected_losses[:2]) - 1).max()),
          'gradient': largest_difference(grads, expected_grads),
          'parameters': largest_difference(params, expected_params)}


def program(model, sizes, pipe):
  """Returns what the compiled step of a mesh is made of.  sizes None: of one device."""
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
  """Returns the row of a mesh."""
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
  """Returns what one device's step is made of; of its FLOPs the layers' part, and that of their forward pass."""
  model, found = PROGRAM[kind], program(PROGRAM[kind], None, PipelineSpec())
  twice = dataclasses.replace(model, num_layers=2 * model.num_layers)
  found['layers'] = program(twice, None, PipelineSpec())['flops'] - found['flops']
  found['layers_forward'] = forward_flops(twice) - forward_flops(model)
  return found


def forward_flops(model):
  """Returns the FLOPs of the hidden states of a batch."""
  def forward(params, tokens):
    return decoder.hidden_states(model, params, tokens, decoder.make_context(model, tokens, tokens))[0]

  params = jax.eval_shape(lambda: decoder.init_params(model, jax.random.key(0)))
  tokens = jax.ShapeDtypeStruct((ROWS, LENGTH), 'int32')
  return count_products(jax.jit(forward).lower(params, tokens).compile().as_text())


def describe(rows):
  """Returns the collectives in short: `all-gather fsdp 49 x, 12.3 MiB`, those that send most first."""
  short = lambda r: f"{r['kind']} {'+'.join(r['axes'])} {r['runs']} x {r['bytes'] / 2**20:.1f}"
  return '; '.join(short(r) for r in rows)


def table(kind, results, one_device):
  """Returns the Markdown table of a model."""
  lines = [f'## {kind}', '',
           f"One device: {one_device['flops'] / 1e9:.1f} GFLOP a step, {one_device['state_bytes'] / 2**20:.1f} MiB of "
           f"state, {one_device['temporary_bytes'] / 2**20:.0f} MiB of temporaries.", '',
           '| mesh | loss | gradient | parameters | FLOPs | bubble | state MiB | temporary MiB | '
           'collectives of a step: kind, axes, runs x total MiB |',
           '| --- ' * 9 + '|']
  for name, r in results.items():
    explained = f"{r['bubble_ratio']:.3f}" if 'bubble_ratio' in r else ''
    lines.append(
        f"| {name} | {r['loss']:.1e} | {r['gradient']:.1e} | {r['parameters']:.1e} | {r['flops_ratio']:.3f} | "
        f"{explained} | {r['state_bytes'] / 2**20:.1f} | {r['temporary_bytes'] / 2**20:.0f} | "
        f"{describe(r['collectives'])} |")
  return '\n'.join(lines)


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--output', default='', help='folder to write table.md and table.json to')
  parser.add_argument('--only', default='', help='meshes whose name holds this')
  args = parser.parse_args()
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
    (folder / 'table.md').write_text(text + '\n')  # The README's tables.
    (folder / 'table.json').write_text(json.dumps(everything, indent=1) + '\n')


if __name__ == '__main__':
  main()
