"""Compares the runs of `llmjax chaos` and reports on them.  Imports no JAX, except in `hash_state`."""

import hashlib
import json
import os
import pathlib
import re
import statistics
import struct
import subprocess
import sys

from llmjax.cluster.spec import FAULTS
from llmjax.config import ConfigError
from llmjax.evaluate.metrics import read_lines
from llmjax.plan.text import table

# Metrics that depend on the clock or on other load of the machine.
TIMED = re.compile(r'seconds|second$|mfu|memory|time')


def logged_values(workdir):
  """Return {(step, metric): value} of a run's log, except for metrics that depend on time."""
  return {(row['step'], key): value for row in read_lines(workdir / 'metrics.jsonl') for key, value in row.items()
          if key != 'step' and not TIMED.search(key)}


def differing_bits(a, b):
  """Return the number of bits in which two logged numbers differ as float64; 64 if only one is a number."""
  if isinstance(a, (int, float)) and isinstance(b, (int, float)):
    x, y = (int.from_bytes(struct.pack('>d', v), 'big') for v in (a, b))
    return (x ^ y).bit_count()
  return 0 if a == b else 64


def hash_state(checkpoint):
  """Return the SHA-256 of a checkpoint's arrays, with their names, dtypes and shapes, and of its data position."""
  from llmjax.checkpoint.arrays import Arrays, read_json
  checkpoint = pathlib.Path(checkpoint).absolute()  # Orbax requires it.
  arrays, digest = Arrays(checkpoint), hashlib.sha256()
  for name in sorted(arrays.shapes):
    array = arrays.read(name)
    digest.update(f'{name} {array.dtype} {array.shape}\n'.encode())
    digest.update(array.tobytes())
  digest.update(json.dumps(read_json(checkpoint, 'stream'), sort_keys=True).encode())
  return digest.hexdigest()


def hash_state_in_subprocess(checkpoint):
  """Return `hash_state` of a checkpoint, computed in a subprocess on the CPU."""
  code = f'from llmjax.cluster.chaos_report import hash_state; print(hash_state({str(checkpoint)!r}))'
  environment = {k: v for k, v in os.environ.items() if not k.startswith('LLMJAX_')}
  done = subprocess.run([sys.executable, '-c', code], env={**environment, 'JAX_PLATFORMS': 'cpu'}, text=True,
                        capture_output=True, check=False)
  if done.returncode:
    raise ConfigError([f'{checkpoint} cannot be read: {(done.stderr.splitlines() or [""])[-1]}'])
  return done.stdout.split()[-1]


def summarize(faults):
  """Return rows {event, count, steps_lost, bits_differing, median_seconds} per kind of fault, and a last one of all."""
  rows = []
  for kind, name in [*FAULTS.items(), (None, 'all')]:
    if chosen := [f for f in faults if kind in (None, f.kind)]:
      seconds = [f.seconds for f in chosen if f.seconds is not None]
      rows.append({'event': name, 'count': len(chosen), 'steps_lost': sum(f.lost for f in chosen),
                   'bits_differing': sum(f.bits for f in chosen),
                   'median_seconds': round(statistics.median(seconds), 1) if seconds else None})
  return rows


def render_table(faults):
  """Return `summarize` as a table for the terminal."""
  header = ('fault', 'count', 'steps lost', 'bits differing', 'median time to recover')
  return table([header, *((r['event'], r['count'], r['steps_lost'], r['bits_differing'],
                           '' if r['median_seconds'] is None else f'{r["median_seconds"]:.1f} s')
                          for r in summarize(faults))], right=(1, 2, 3, 4))
