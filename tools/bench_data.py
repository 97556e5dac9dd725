"""Measure the speed of the data pipeline: `python tools/bench_data.py [--folder=DIR] [--output=FILE.json]`.

Without --folder, first prepares the Python documentation in a temporary folder.  Rates are per second of CPU time of
this process (user and system, all threads), because wall time depends on other load.  Each figure is the best of
several repetitions.
"""

import argparse
import json
import os
import pathlib
import platform
import sys
import tempfile
import time

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from llmjax.data import packing, prepared, stream, token_store
from llmjax.data.spec import DataSpec, PrepareSpec, TokenizerSpec
from llmjax.text import tokenizer as tokenizers

TARGETS = {'encode_raw': 4.0, 'encode': 4.0, 'stream': 8.0, 'fill': 0.999, 'overhead': 0.10}


def best_rate(count, work, repeats):
  """Return (millions per CPU-second, millions per second), the best of the repetitions."""
  rates = []
  for _ in range(repeats):
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    rates.append((count / (time.process_time() - cpu) / 1e6,
                  count / (time.perf_counter() - wall) / 1e6))
  return max(rates)


def bench_encode(folder, repeats, megabytes=3):
  """Encode documents with SentencePiece and with our Tokenizer, in alternation."""
  import sentencepiece

  texts, size = [], 0
  for _, text in stream.read_documents(folder, 'train'):
    texts.append(text)
    size += len(text.encode())
    if size > megabytes << 20:
      break
  tokenizer = tokenizers.Tokenizer(prepared.tokenizer_path(folder))
  bare = sentencepiece.SentencePieceProcessor(model_file=str(prepared.tokenizer_path(folder)))
  count = sum(len(tokenizer.encode(text)) for text in texts)
  raw, ours = (0.0, 0.0), (0.0, 0.0)
  for _ in range(repeats):  # Alternating, so that other load affects both.
    raw = max(raw, best_rate(count, lambda: [bare.encode_as_numpy(t) for t in texts], 1))
    ours = max(ours, best_rate(count, lambda: [tokenizer.encode(t) for t in texts], 1))
  return {'encode_raw': raw, 'encode': ours, 'overhead': max(0.0, raw[0] / ours[0] - 1),
          'bytes_per_token': size / count}


def bench_rows(folder, seq_len, batch_size, repeats, batches=400):
  """Read random sequences through PackedSequences alone, and batches through Grain."""
  store = token_store.TokenStore(prepared.tokens_path(folder, 'train'))
  rows = packing.PackedSequences(store, seq_len)
  numbers = np.random.default_rng(0).integers(len(rows), size=(batches, batch_size)).tolist()
  rows.batch(numbers[0])  # Maps the files.
  count = batches * batch_size * seq_len
  alone = best_rate(count, lambda: [rows.batch(n) for n in numbers], repeats)
  spec = DataSpec(sources={folder: 1.0}, seq_len=seq_len)
  with stream.open_stream(spec, batch_size=batch_size, seed=0) as batches_:
    next(batches_)
    through = best_rate(count, lambda: [next(batches_) for _ in range(batches)], repeats)
  return {'rows': alone, 'stream': through, 'fill': rows.num_targets / (len(rows) * seq_len),
          'documents': len(store), 'tokens': store.num_tokens}


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--folder', default='', help='a prepared folder')
  parser.add_argument('--seq_len', type=int, default=1024)
  parser.add_argument('--batch_size', type=int, default=8)
  parser.add_argument('--repeats', type=int, default=7)
  parser.add_argument('--output', default='', help='JSON file for the results')
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as scratch:
    folder = args.folder
    if not folder:
      from llmjax.data import corpus

      folder = str(pathlib.Path(scratch) / 'python_docs')
      tokenizer = TokenizerSpec(vocab_size=8192, sample_lines=10_000)
      corpus.prepare(PrepareSpec(output=folder, tokenizer=tokenizer))
    result = {**bench_encode(folder, args.repeats),
              **bench_rows(folder, args.seq_len, args.batch_size, args.repeats)}
  rows = [('SentencePiece encode_as_numpy', result['encode_raw'], TARGETS['encode_raw']),
          ('Tokenizer.encode', result['encode'], TARGETS['encode']),
          (f'PackedSequences, T {args.seq_len}, B {args.batch_size}', result['rows'], None),
          (f'stream, T {args.seq_len}, B {args.batch_size}, 0 workers', result['stream'],
           TARGETS['stream'])]
  print(f'{"":<40}{"Mtok/CPU-s":>11}{"Mtok/s":>9}{"target":>8}')
  for name, (cpu, wall), target in rows:
    verdict = '' if target is None else f'{target:>8.1f}  {"yes" if cpu >= target else "NO"}'
    print(f'{name:<40}{cpu:>11.2f}{wall:>9.2f}{verdict}')
  for name, value, target, met in (
      ('overhead of Tokenizer', result['overhead'], '<= 10 %',
       result['overhead'] <= TARGETS['overhead']),
      ('packing fill', result['fill'], '>= 99.9 %', result['fill'] >= TARGETS['fill'])):
    print(f'{name:<40}{value:>11.2%}{target:>17}  {"yes" if met else "NO"}')
  print(f'{result["documents"]:,} documents, {result["tokens"]:,} tokens, '
        f'{result["bytes_per_token"]:.2f} bytes per token')
  if args.output:
    result |= {'machine': platform.processor() or platform.machine(), 'cpus': os.cpu_count(),
               'python': platform.python_version(), 'load': os.getloadavg()[0],
               'seq_len': args.seq_len, 'batch_size': args.batch_size}
    pathlib.Path(args.output).write_text(json.dumps(result, indent=2) + '\n')


if __name__ == '__main__':
  main()
