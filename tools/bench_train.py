"""Measure training speed and memory of llmjax on CPU, compared with PyTorch and transformers.

  python tools/bench_train.py --steps=8 --peer-python=PATH/bin/python --output=bench.json
  python tools/bench_train.py --steps=8 --adapters=lora,dora,lora+nf4     # compared with the full step
  python tools/bench_train.py --steps=8 --pairs=sigmoid,simpo              # preference losses on 8 pairs

One optimizer step of a 58 M parameter Llama (8 layers, d_model 512, 8 heads of 64, SwiGLU 1408, vocabulary 32000,
untied) on 8 sequences of 512 tokens in float32: forward, backward, clipping by global norm, AdamW.  Every contestant is
a separate process that runs one step per request; they alternate on all cores of the machine, one at a time.  Each
round also measures XLA's 2048^3 matrix product, whose rate is the peak that a step is compared with.  Figures are
medians over rounds; the first step, which compiles, is excluded and reported as the start.

FLOPs of a step = tokens * (6 * matmul parameters + 6 * layers * T * heads * head_dim): 2 per multiply-add, times 3 for
forward and backward.  The embedding table is not a matmul parameter.  Causal attention needs half of the T * T matrix,
so 4 * T * heads * head_dim per token and layer is halved.  Additional work (blocks above the diagonal, recomputation)
counts as time and not as FLOPs.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SPEC = {'num_layers': 8, 'd_model': 512, 'num_heads': 8, 'num_kv_heads': 8, 'head_dim': 64, 'mlp_dim': 1408,
        'vocab_size': 32000}
LR, B1, B2, EPSILON, WEIGHT_DECAY, CLIP_NORM = 3e-4, 0.9, 0.95, 1e-8, 0.1, 1.0


def matmul_parameters(spec):
  """Count the parameters in matrix products: all but the embedding table and the norms."""
  heads = 2 * (spec['num_heads'] + spec['num_kv_heads']) * spec['head_dim']
  layer = spec['d_model'] * (heads + 3 * spec['mlp_dim'])
  return spec['num_layers'] * layer + spec['d_model'] * spec['vocab_size']


def step_flops(spec, batch, length):
  """Return the FLOPs of a step on [batch, length] tokens, by the formula in the module docstring."""
  attention = 6 * spec['num_layers'] * length * spec['num_heads'] * spec['head_dim']
  return batch * length * (6 * matmul_parameters(spec) + attention)


# Contestants.  They run in different environments, so that imports are inside the functions.


def random_tokens(args, count, times=1):
  import numpy as np
  return np.random.default_rng(0).integers(0, SPEC['vocab_size'], (times * args.batch, count))


def build_llmjax(args):
  """Return (step() -> loss, matmul() -> GFLOP/s)."""
  sys.path.insert(0, ROOT)
  import jax
  step = build_step(args)
  square = jax.random.normal(jax.random.key(0), (2048, 2048))
  product = jax.jit(lambda a: a @ a)
  product(square).block_until_ready()

  def matmul():
    start = time.perf_counter()
    product(square).block_until_ready()
    return 2 * 2048**3 / (time.perf_counter() - start) / 1e9

  return step, matmul


def build_step(args):
  """Return step() -> loss: the train step of `llmjax pretrain`."""
  import jax
  import numpy as np
  import optax

  from llmjax.adapt.spec import AdapterSpec
  from llmjax.model.spec import ModelSpec
  from llmjax.parallel.host import keep_freed_memory, share_arena
  from llmjax.parallel.mesh import make_mesh, place_batch
  from llmjax.parallel.spec import MeshSpec
  from llmjax.post import objective
  from llmjax.post.spec import PreferenceSpec
  from llmjax.train import objectives
  from llmjax.train.optimizers import make_optimizer
  from llmjax.train.spec import OptimizerSpec, TrainSpec
  from llmjax.train.state import init_state
  from llmjax.train.step import lower_step, make_train_step
  from llmjax.train.trainable import adapters, quantize_base, whole_model
  model = ModelSpec(**SPEC)
  together = 2 if args.pair_loss else 1  # A pair is two sequences; microbatches keep their size.
  accumulation = args.gradient_accumulation_steps * together
  train = TrainSpec(batch_size=args.batch, gradient_accumulation_steps=accumulation, remat=args.remat,
                    compute_dtype='float32')
  optimizer = OptimizerSpec(lr=LR, b1=B1, b2=B2, epsilon=EPSILON, weight_decay=WEIGHT_DECAY, clip_norm=CLIP_NORM,
                            schedule='constant')
  share_arena()
  keep_freed_memory()
  mesh = make_mesh(MeshSpec())
  tx, schedule = make_optimizer(optimizer, train.steps)
  tokens = random_tokens(args, args.length + 1, together)
  batch = make_batch(tokens[:, :-1], tokens[:, 1:])
  if args.pair_loss:  # Reference log-probabilities; the first half of a sequence is the prompt.
    batch['ref_logprobs'] = np.full(len(tokens), -10.0 * args.length, np.float32)
    batch['loss_mask'][:, :args.length // 2] = 0
  with jax.set_mesh(mesh):
    batch = place_batch(mesh, batch)
    platform = mesh.devices.flat[0].platform
    loss_fn = objectives.next_token(objectives.make_model(model, train, platform))
    if args.pair_loss:
      loss_fn = objective.make_pair_loss(PreferenceSpec(loss=args.pair_loss),
                                         objectives.make_model(model, train, platform))
    trainable, frozen = whole_model(model), None
    if args.adapter:
      kind, _, quantized = args.adapter.partition('+')
      adapter = AdapterSpec(kind=kind, rank=args.rank, dropout=args.dropout, quantize=quantized)
      base = init_state(trainable, optax.identity(), 0, mesh).params
      trainable, frozen = adapters(model, adapter), {'base': quantize_base(model, adapter, base, mesh)}
      del base
    state = init_state(trainable, tx, 0, mesh, frozen=frozen)
    del frozen
    step = make_train_step(trainable.wrap(loss_fn), tx, schedule, accumulation, together=together)
    train_step = lower_step(step, state, batch).compile()
  holder = [state]
  del state  # The step donates the state, so no other reference may exist.

  def step():
    new_state, metrics = train_step(holder.pop(), batch)
    holder.append(jax.block_until_ready(new_state))
    return float(metrics['loss'])

  return step


def make_batch(tokens, targets):
  """Return a batch of full sequences, one segment each."""
  import numpy as np
  rows, length = tokens.shape
  return {'tokens': tokens.astype(np.int32), 'targets': targets.astype(np.int32),
          'loss_mask': np.ones((rows, length), np.float32),
          'segment_ids': np.ones((rows, length), np.int32),
          'positions': np.tile(np.arange(length, dtype=np.int32), (rows, 1))}


def build_transformers(args):
  """Return the same step in PyTorch: LlamaForCausalLM and the fused AdamW."""
  import torch
  from transformers import LlamaConfig, LlamaForCausalLM
  config = LlamaConfig(
      vocab_size=SPEC['vocab_size'], hidden_size=SPEC['d_model'], intermediate_size=SPEC['mlp_dim'],
      num_hidden_layers=SPEC['num_layers'], num_attention_heads=SPEC['num_heads'],
      num_key_value_heads=SPEC['num_kv_heads'], head_dim=SPEC['head_dim'], max_position_embeddings=args.length,
      tie_word_embeddings=False, use_cache=False)
  config._attn_implementation = args.peer_attention
  torch.manual_seed(0)
  model = LlamaForCausalLM(config).train()
  if args.remat == 'full':
    model.gradient_checkpointing_enable()
  optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(B1, B2), eps=EPSILON,
                                weight_decay=WEIGHT_DECAY, fused=True)
  tokens = torch.tensor(random_tokens(args, args.length))

  def step():
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()

  return step, None


BUILDERS = {'llmjax': build_llmjax, 'transformers': build_transformers}


def serve(args):
  """Serve requests: for each line of standard input, step or matmul, write the measurements as one line of JSON."""
  step, matmul = BUILDERS[args.serve](args)
  for line in sys.stdin:
    command = line.strip()
    before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    answer = {}
    if command == 'step':
      answer['loss'] = step()
    elif command == 'matmul':
      answer['gflops'] = matmul()
    after = resource.getrusage(resource.RUSAGE_SELF)
    # Linux counts ru_maxrss in KiB, macOS in bytes.
    unit = 1 if platform.system() == 'Darwin' else 1024
    answer.update(seconds=time.perf_counter() - start, user=after.ru_utime - before.ru_utime,
                  system=after.ru_stime - before.ru_stime, peak_bytes=after.ru_maxrss * unit)
    print(json.dumps(answer), file=sys.__stdout__, flush=True)


class Contestant:
  """A process that runs steps on request."""

  def __init__(self, name, python, kind, args, **options):
    self.name, self.steps, self.started = name, [], time.perf_counter()
    flags = {'batch': args.batch, 'length': args.length, 'peer-attention': args.peer_attention, **options}
    command = [python, os.path.abspath(__file__), f'--serve={kind}', *(f'--{k}={v}' for k, v in flags.items())]
    self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    self.first = self.ask('step')
    self.start_seconds = time.perf_counter() - self.started

  def ask(self, command):
    self.process.stdin.write(command + '\n')
    self.process.stdin.flush()
    line = self.process.stdout.readline()
    if not line:
      raise RuntimeError(f'{self.name} ended with code {self.process.wait()}; its error is above.')
    return json.loads(line)

  def result(self, tokens, flops, peak_gflops):
    median = {k: statistics.median(s[k] for s in self.steps) for k in ('seconds', 'user', 'system')}
    return {'name': self.name, **median, 'all_seconds': [round(s['seconds'], 4) for s in self.steps],
            'tokens_per_second': tokens / median['seconds'],
            'peak_fraction': flops / median['seconds'] / peak_gflops / 1e9,
            'peak_gb': max(s['peak_bytes'] for s in self.steps) / 1e9,
            'start_seconds': self.start_seconds, 'losses': [s['loss'] for s in (self.first, *self.steps)]}

  def close(self):
    self.process.stdin.close()
    self.process.wait()


def compare(args):
  """Run the contestants in alternation; return all measurements."""
  contestants, matmul = [], []
  try:
    for remat in args.remat.split(','):
      contestants.append(Contestant(f'llmjax, remat {remat}', sys.executable, 'llmjax', args, remat=remat,
                                    gradient_accumulation_steps=args.gradient_accumulation_steps))
    for adapter in filter(None, args.adapters.split(',')):
      contestants.append(Contestant(f'llmjax, {adapter}', sys.executable, 'llmjax', args, adapter=adapter,
                                    remat=args.remat.split(',')[0], rank=args.rank, dropout=args.dropout,
                                    gradient_accumulation_steps=args.gradient_accumulation_steps))
    for loss in filter(None, args.pairs.split(',')):
      contestants.append(Contestant(f'llmjax, {loss}', sys.executable, 'llmjax', args, remat=args.remat.split(',')[0],
                                    gradient_accumulation_steps=args.gradient_accumulation_steps,
                                    **{'pair-loss': loss}))
    if args.peer_python:
      contestants.append(Contestant('transformers', args.peer_python, 'transformers', args))
    for _ in range(args.steps):
      matmul += [contestants[0].ask('matmul')['gflops'] for _ in range(5)]
      for contestant in contestants:
        contestant.steps.append(contestant.ask('step'))
  finally:
    for contestant in contestants:
      contestant.close()
  tokens, flops = args.batch * args.length, step_flops(SPEC, args.batch, args.length)
  return {'spec': SPEC, 'batch': args.batch, 'length': args.length, 'accumulation': args.gradient_accumulation_steps,
          'cores': len(os.sched_getaffinity(0)), 'step_flops': flops, 'matmul_gflops': max(matmul),
          'matmul_gflops_median': statistics.median(matmul),
          'results': [c.result(tokens, flops, max(matmul)) for c in contestants]}


def table(report):
  """Format the results as text."""
  peak, full = report['matmul_gflops'], report['results'][0]
  full = full['user'] + full['system']
  lines = [f'{report["batch"]} x {report["length"]} tokens, {report["step_flops"] / 1e12:.3f} TFLOP per step, '
           f'{report["cores"]} cores, best 2048^3 product {peak:.0f} GFLOP/s',
           f'{"":24}{"median s":>9}{"tokens/s":>10}{"of peak":>9}{"user s":>8}{"sys s":>7}{"peak GB":>9}{"start s":>9}'
           f'{"CPU s":>8}{"of first":>9}']
  for r in report['results']:
    lines.append(f'{r["name"]:24}{r["seconds"]:9.2f}{r["tokens_per_second"]:10.0f}{r["peak_fraction"]:9.1%}'
                 f'{r["user"]:8.1f}{r["system"]:7.2f}{r["peak_gb"]:9.2f}{r["start_seconds"]:9.1f}'
                 f'{r["user"] + r["system"]:8.1f}{(r["user"] + r["system"]) / full:9.2f}')
  return '\n'.join(lines)


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--steps', type=int, default=8, help='number of rounds, with one step of each contestant')
  parser.add_argument('--batch', type=int, default=8)
  parser.add_argument('--length', type=int, default=512)
  parser.add_argument('--gradient_accumulation_steps', type=int, default=4, help='microbatches of the llmjax step')
  parser.add_argument('--remat', default='none', help='remat policies to measure, e.g. none,full')
  parser.add_argument('--adapters', default='', help='also measure adapters, e.g. lora,dora,lora+nf4')
  parser.add_argument('--pairs', default='', help='also measure preference losses, e.g. sigmoid,simpo')
  parser.add_argument('--pair-loss', default='', help=argparse.SUPPRESS)
  parser.add_argument('--rank', type=int, default=16, help='rank of the adapters')
  parser.add_argument('--dropout', type=float, default=0.0, help='dropout rate of the adapters')
  parser.add_argument('--adapter', default='', help=argparse.SUPPRESS)
  parser.add_argument('--peer-python', help='Python interpreter with torch and transformers; default: no comparison')
  parser.add_argument('--peer-attention', default='sdpa', choices=['sdpa', 'eager'])
  parser.add_argument('--output', help='JSON file for the results')
  parser.add_argument('--serve', choices=sorted(BUILDERS), help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.serve:
    serve(args)
    return
  report = compare(args)
  print(table(report))
  if args.output:
    with open(args.output, 'w') as file:
      json.dump(report, file, indent=1)


if __name__ == '__main__':
  main()
