"""Measure the decoding speed of llmjax on CPU, compared with PyTorch and transformers' `generate`.

  python tools/bench_decode.py --peer-python=PATH/bin/python --output=decode.json
  python tools/bench_decode.py --rollout --batches=8,32     # the sampler of `llmjax rl` compared with `llmjax generate`

A 58.47 M parameter Llama (8 layers, d_model 512, 8 heads of 64, gated MLP 1408, vocabulary 32000, untied) in float32
greedily generates 128 tokens after a 512-token prompt, with a KV cache, for batches of 1 and 8.  All contestants have
the same weights and prompts.  Each is a separate process that serves one request at a time; they alternate, so that
other load affects all of them and only one works at a time.  The first request, which compiles, is excluded.

Prefill is the time to the first new token, decode is the rest of the same call.  CPU seconds are those of the process,
over all threads.  Figures are medians over rounds; a ratio is the median of the ratios of the rounds.  `same tokens` is
the fraction of new tokens that are equal: float32 sums in another order decide near ties differently, after which the
sequences diverge.  A rollout samples 8 completions per prompt at temperature 1 with log-probabilities; it is one call,
so it has no prefill time, and its tokens are not compared.
"""

import argparse
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
SIZES = dict(num_layers=8, d_model=512, num_heads=8, mlp_dim=1408, vocab_size=32000)
MEASURES = {  # {column of the table: function of a request's record}
    'tokens_per_second': lambda r: r['tokens'] / r['wall'],
    'tokens_per_cpu_second': lambda r: r['tokens'] / r['cpu'],
    'prefill_seconds': lambda r: r['prefill_wall'],
    'prefill_cpu_seconds': lambda r: r['prefill_cpu'],
    'decode_tokens_per_second': lambda r: r['decoded'] / (r['wall'] - r['prefill_wall']),
    'decode_tokens_per_cpu_second': lambda r: r['decoded'] / (r['cpu'] - r['prefill_cpu']),
}
WHOLE = ('tokens_per_second', 'tokens_per_cpu_second')  # The columns of a rollout.


def make_prompts(batch, length):
  import numpy as np
  return np.random.default_rng(0).integers(0, SIZES['vocab_size'], (batch, length))


def times(started, first, ended, tokens):
  """Return the record of a request.  started, first, ended: (wall, CPU) seconds.  tokens: [B, n]."""
  return {'wall': ended[0] - started[0], 'cpu': ended[1] - started[1],
          'prefill_wall': first[0] - started[0], 'prefill_cpu': first[1] - started[1],
          'tokens': tokens.size, 'decoded': tokens.size - len(tokens), 'made': tokens.tolist()}


def clock():
  return time.perf_counter(), time.process_time()


def make_generator(args):
  """Return (versions, Generator), and write the weights to args.weights."""
  sys.path.insert(0, str(ROOT))
  import jax
  import numpy as np

  from llmjax.generate.decode import Generator
  from llmjax.model.model import Model
  from llmjax.model.spec import ModelSpec

  spec = ModelSpec(**SIZES)
  params = jax.jit(Model(spec).init)(jax.random.key(0))
  kernel = params['head']['kernel']  # Initially zero: all tokens would be equally likely.
  params['head']['kernel'] = 0.05 * jax.random.normal(jax.random.key(1), kernel.shape)
  flat = jax.tree_util.tree_flatten_with_path(params)[0]
  np.savez(args.weights, **{'/'.join(str(k.key) for k in path): leaf for path, leaf in flat})
  return {'jax': jax.__version__, 'parameters': int(sum(leaf.size for _, leaf in flat))}, Generator(spec, params)


def build_llmjax(args):
  """Return (versions, function of the batch size to a record)."""
  versions, generator = make_generator(args)
  import numpy as np

  from llmjax.generate.decode import CHUNK

  def request(batch):
    prompts = list(make_prompts(batch, args.prompt))
    started, first, pieces = clock(), None, []
    for tokens, _, _ in generator.stream(prompts, args.new, chunk=CHUNK):
      first = first or clock()
      pieces.append(tokens)
    return times(started, first, clock(), np.concatenate(pieces, axis=1))

  return versions, request


def build_rollout(args):
  """As build_llmjax, with the sampler of `llmjax rl`."""
  versions, generator = make_generator(args)
  import jax
  import numpy as np

  from llmjax.post import rollout
  from llmjax.post.spec import RlSpec

  spec = RlSpec(max_new_tokens=args.new, temperature=1.0)

  def request(batch):
    group = min(batch, 8)
    prompts = list(make_prompts(batch // group, args.prompt))
    started = clock()
    made, _ = rollout.sample(generator, prompts, group, spec, jax.random.key(0), ())
    return times(started, started, clock(), np.stack(made))

  return versions, request


def build_transformers(args):
  """Return (versions, function of the batch size to a record), with the weights of llmjax."""
  import numpy as np
  import torch
  import transformers

  transformers.logging.set_verbosity_error()
  model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
      vocab_size=SIZES['vocab_size'], hidden_size=SIZES['d_model'],
      intermediate_size=SIZES['mlp_dim'], num_hidden_layers=SIZES['num_layers'],
      num_attention_heads=SIZES['num_heads'], num_key_value_heads=SIZES['num_heads'],
      max_position_embeddings=4096, rms_norm_eps=1e-5, rope_theta=10000.0,
      tie_word_embeddings=False)).eval()
  ours, theirs = np.load(args.weights), {}
  # PyTorch linear layers store [out, in].
  flip = lambda w, rows: torch.from_numpy(np.ascontiguousarray(w.reshape(rows, -1).T))
  for i in range(SIZES['num_layers']):
    mine = lambda name, i=i: ours[f'blocks/{name}'][i]
    at, d = f'model.layers.{i}.', SIZES['d_model']
    for name, part in (('q_proj', 'query'), ('k_proj', 'key'), ('v_proj', 'value')):
      theirs[f'{at}self_attn.{name}.weight'] = flip(mine(f'attention/{part}'), d)
    out = mine('attention/out')
    theirs[f'{at}self_attn.o_proj.weight'] = flip(out, out.shape[0] * out.shape[1])
    for part in ('gate', 'up', 'down'):
      w = mine(f'mlp/{part}')
      theirs[f'{at}mlp.{part}_proj.weight'] = flip(w, w.shape[0])
    for name, part in (('input_layernorm', 'attention_norm'),
                       ('post_attention_layernorm', 'mlp_norm')):
      theirs[f'{at}{name}.weight'] = torch.from_numpy(mine(f'{part}/scale'))
  theirs['model.embed_tokens.weight'] = torch.from_numpy(ours['embed/table'])
  theirs['model.norm.weight'] = torch.from_numpy(ours['final_norm/scale'])
  theirs['lm_head.weight'] = flip(ours['head/kernel'], SIZES['d_model'])
  model.load_state_dict(theirs)

  class FirstToken:
    """A streamer that records the time of the first new token, which follows the prompt."""

    def __init__(self):
      self.puts, self.first = 0, None

    def put(self, _):
      self.puts += 1
      if self.puts == 2:
        self.first = clock()

    def end(self):
      pass

  def request(batch):
    prompts, streamer = torch.from_numpy(make_prompts(batch, args.prompt)), FirstToken()
    started = clock()
    with torch.inference_mode():
      made = model.generate(
          prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=args.new,
          min_new_tokens=args.new, do_sample=False, use_cache=True, pad_token_id=0,
          eos_token_id=None, streamer=streamer)
    return times(started, streamer.first, clock(), made[:, args.prompt:].numpy())

  count = sum(p.numel() for p in model.parameters())
  return {'torch': torch.__version__, 'transformers': transformers.__version__,
          'threads': torch.get_num_threads(), 'attention': model.config._attn_implementation,
          'parameters': count}, request


BUILDERS = {'llmjax': build_llmjax, 'rollout': build_rollout, 'transformers': build_transformers}


def work(args):
  """Serve requests: for each line of standard input, a batch size, write a record as one line of JSON."""
  answers = os.fdopen(os.dup(1), 'w')
  os.dup2(2, 1)  # Output of libraries goes to standard error.
  versions, request = BUILDERS[args.worker](args)
  print(json.dumps(versions), file=answers, flush=True)
  for line in sys.stdin:
    print(json.dumps(request(int(line))), file=answers, flush=True)


class Contestant:
  """A worker process."""

  def __init__(self, name, python, args, weights):
    self.name = name
    self._process = subprocess.Popen(
        [python, __file__, f'--worker={name}', f'--weights={weights}', f'--prompt={args.prompt}',
         f'--new={args.new}'], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    self.versions = self._read()

  def request(self, batch):
    print(batch, file=self._process.stdin, flush=True)
    return self._read()

  def close(self):
    self._process.stdin.close()
    self._process.wait()

  def _read(self):
    line = self._process.stdout.readline()
    if not line:
      sys.exit(f'{self.name} ended with status {self._process.wait()}; its messages are above')
    return json.loads(line)


def compare(contestants, batch, rounds):
  """Return {'medians', 'rounds', 'ratios', 'same_tokens'} of one batch size."""
  records = {c.name: [] for c in contestants}
  for c in contestants:
    c.request(batch)
  for i in range(rounds):
    # The order alternates.
    for c in contestants if i % 2 == 0 else contestants[::-1]:
      records[c.name].append(c.request(batch))
      print(f'batch {batch}, round {i + 1}, {c.name}: {records[c.name][-1]["wall"]:.2f} s',
            file=sys.stderr)
  values = {name: {m: [f(r) for r in rows] for m, f in MEASURES.items() if name != 'rollout' or m in WHOLE}
            for name, rows in records.items()}
  result = {'medians': {name: {m: statistics.median(v) for m, v in measured.items()}
                        for name, measured in values.items()}, 'rounds': values}
  if len(contestants) == 2:
    ours, theirs = (values[c.name] for c in contestants)
    # Above 1: llmjax is faster.
    ratio = lambda m, a, b: b / a if m.startswith('prefill') else a / b
    result['ratios'] = {
        m: statistics.median(ratio(m, a, b) for a, b in zip(ours[m], theirs[m], strict=True))
        for m in MEASURES if m in theirs}
    a, b = (sum(records[c.name][0]['made'], []) for c in contestants)
    if contestants[1].name != 'rollout':
      result['same_tokens'] = sum(x == y for x, y in zip(a, b, strict=True)) / len(a)
  return result


def table(results):
  """Format the medians as a Markdown table."""
  lines = ['| batch | | tokens/s | tokens/CPU s | prefill s | prefill CPU s | decode tokens/s '
           '| decode tokens/CPU s |', '|' + ' --- |' * 8]
  for batch, result in results.items():
    rows = dict(result['medians'])
    if 'ratios' in result:
      rows['ratio'] = result['ratios']
    for name, row in rows.items():
      cells = [f'{v:.2f}' if name == 'ratio' or m.startswith('prefill') else f'{v:.1f}'
               for m, v in row.items()] + [''] * (len(MEASURES) - len(row))
      lines.append(f'| {batch} | {name} | ' + ' | '.join(cells) + ' |')
  return '\n'.join(lines)


def main():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--peer-python', help='Python interpreter with torch and transformers; default: no comparison')
  parser.add_argument('--rollout', action='store_true', help='also measure the sampler of `llmjax rl`')
  parser.add_argument('--batches', default='1,8', help='batch sizes')
  parser.add_argument('--prompt', type=int, default=512, help='prompt length in tokens')
  parser.add_argument('--new', type=int, default=128, help='number of new tokens')
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--output', help='JSON file for the results')
  parser.add_argument('--worker', choices=BUILDERS, help=argparse.SUPPRESS)
  parser.add_argument('--weights', help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.worker:
    work(args)
    return
  with tempfile.TemporaryDirectory() as folder:
    weights = f'{folder}/weights.npz'
    contestants = [Contestant('llmjax', sys.executable, args, weights)]
    if args.rollout:
      contestants.append(Contestant('rollout', sys.executable, args, weights))
    if args.peer_python:
      contestants.append(Contestant('transformers', args.peer_python, args, weights))
    results = {batch: compare(contestants, batch, args.rounds)
               for batch in map(int, args.batches.split(','))}
    for c in contestants:
      c.close()
  cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
  print(f'{args.prompt}-token prompt, {args.new} new tokens, float32, greedy, {cores} cores, '
        f'{args.rounds} rounds\n')
  print(table(results))
  for batch, result in results.items():
    if 'same_tokens' in result:
      print(f'\nbatch {batch}: same tokens {100 * result["same_tokens"]:.1f} %', end='')
  print()
  if args.output:
    record = {'prompt': args.prompt, 'new': args.new, 'cores': cores,
              'machine': platform.platform(),
              'load_at_end': os.getloadavg(), 'versions': {c.name: c.versions for c in contestants},
              'batches': results}
    pathlib.Path(args.output).write_text(json.dumps(record, indent=2) + '\n')


if __name__ == '__main__':
  main()
