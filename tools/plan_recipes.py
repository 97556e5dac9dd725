#!/usr/bin/env python3
"""Compile the recipes of configs/pretrain for their intended chips: experiments/tpu_recipes.

  pip install 'jax[tpu]' && python tools/plan_recipes.py [--jobs=2] [--only=llama2_7b] [--small]

Each is one `llmjax plan`; no TPU is needed.  Writes table.json and README.md.  Programs compiled before with the same
versions come from the cache, so that a second run takes seconds.  The exit status is 1 if a program does not compile or
does not fit.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import pathlib
import sys

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
os.environ['PYTHONPATH'] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))

from llmjax.plan.jobs import Job, run_jobs
from llmjax.plan.text import gib


@dataclasses.dataclass(frozen=True)
class Program:
  """A recipe and its chips.  shows: the parallelism.  changes: config overrides.  small: compiled in every CI run."""

  recipe: str
  topology: str
  shows: str
  slices: int = 1
  changes: dict = dataclasses.field(default_factory=dict)
  small: bool = False

  @property
  def name(self):
    return f'{self.recipe.replace(".py", "").replace(":", "-")}-{self.topology.replace(":", "-")}' + (
        f'-x{self.slices}' if self.slices > 1 else '')

  @property
  def flags(self):
    changes = [f'--config.{name}={value}' for name, value in self.changes.items()]
    return [f'--topology={self.topology}', *([f'--slices={self.slices}'] if self.slices > 1 else []), *changes]


VOCABULARY = {'model.vocab_size': 32000}  # For recipes whose vocabulary depends on the corpus.
PROGRAMS = (
    Program('gpt2_124m.py', 'v5e:2x4', 'data', changes=VOCABULARY, small=True),
    Program('llm_1b.py', 'v5e:2x4', 'FSDP', changes=VOCABULARY, small=True),
    Program('llm_1b.py:v5p', 'v5p:2x2x1', 'FSDP', changes=VOCABULARY, small=True),
    Program('llama2_7b.py:v5e', 'v5e:4x4', 'FSDP'),
    Program('llama2_7b.py:v5e', 'v5e:16x16', 'FSDP over two axes',
            changes={'mesh.data': 4, 'mesh.zero': 3, 'train.batch_size': 1024}),
    Program('llama3_8b.py', 'v6e:16x16', 'FSDP over two axes'),
    Program('llama2_70b.py:v6e', 'v6e:16x16', 'FSDP over two axes'),
    Program('llama2_7b.py', 'v5p:4x4x4', 'FSDP over two axes'),
    Program('llama2_70b.py', 'v5p:4x4x4', 'FSDP over two axes'),
    Program('llama2_70b.py:tensor', 'v5p:4x4x4', 'FSDP and tensor'),
    Program('llama2_70b.py:pipeline', 'v5p:4x4x4', 'FSDP and pipeline'),
    Program('mixtral_8x7b.py', 'v5p:4x4x4', 'FSDP over two axes'),
    Program('mixtral_8x7b.py:expert', 'v5p:4x4x4', 'FSDP and expert'),
    Program('llama3_8b.py:long', 'v5p:4x4x4', 'context and tensor'),
    Program('llama2_7b.py', 'v5p:4x4x4', 'two slices', 2, {'train.batch_size': 512}),
    Program('llama2_7b.py', 'v5p:4x4x4', 'four slices', 4, {'train.batch_size': 1024}),
    Program('llama2_70b.py:v6e', 'v6e:16x16', 'two slices', 2, {'train.batch_size': 1024}),
    Program('llama2_70b.py', 'v5p:4x4x8', 'FSDP over two axes', changes={'train.batch_size': 256}),
    Program('llama3_70b.py', 'v5p:4x4x8', 'FSDP over two axes'),
    Program('llama3_70b.py', 'v5p:8x8x8', 'FSDP over two axes', changes={'train.batch_size': 512}),
    Program('llama3_405b.py', 'v5p:8x8x8', 'FSDP and tensor'),
    Program('llama3_405b.py:pod', 'v5p:16x16x24', 'data, FSDP and tensor'),
)


def source_state():
  """Return a digest of the code that determines the program of a step, to mark rows that may be out of date."""
  folders = [ROOT / 'llmjax' / name for name in ('adapt', 'model', 'ops', 'parallel', 'train')]
  files = sorted(file for folder in folders for file in folder.glob('*.py'))
  return hashlib.sha256(b'\0'.join(f.read_bytes() for f in files)).hexdigest()[:12]


def entry_of(program, job):
  """Return the entry of a program in table.json."""
  entry = {'name': program.name, 'recipe': program.recipe, 'topology': program.topology, 'slices': program.slices,
           'changes': program.changes, 'shows': program.shows, 'state': source_state()}
  if job.plan is None:
    return {**entry, 'failed': job.error}
  keys = ('source', 'chips', 'mesh', 'fits', 'hbm_bytes', 'step_seconds', 'parts', 'tokens_per_second_per_chip', 'mfu',
          'batch_size', 'seq_len', 'gradient_accumulation_steps', 'remat', 'parameters', 'unknown_loops', 'versions',
          'compile_seconds')
  return {**entry, **{key: job.plan[key] for key in keys if key in job.plan}}


def row(entry):
  """Return the cells of a row of the table."""
  flags = ' '.join(f'{name}={value}' for name, value in entry['changes'].items() if name != 'model.vocab_size')
  chips = entry['topology'] + (f' x {entry["slices"]}' if entry['slices'] > 1 else '')
  earlier = ' (of an earlier version of the code)' if entry.get('state') != source_state() else ''
  first = [f'`{entry["recipe"]}`' + (f' {flags}' if flags else '') + earlier, chips]
  if 'failed' in entry:
    return [*first, '', '', '', f'failed: {entry["failed"]}', *[''] * 5]
  memory = entry['hbm_bytes']
  mesh = ' '.join(f'{axis}={n}' for axis, n in entry['mesh'].items()) or 'one'
  first += [str(entry['chips']), mesh, f'{entry["batch_size"]} x {entry["seq_len"]}'
            + (f' / {entry["gradient_accumulation_steps"]}' if entry['gradient_accumulation_steps'] > 1 else ''),
            f'{gib(memory["total"])} of {gib(memory["limit"])}' + ('' if entry['fits'] else ', DOES NOT FIT')]
  if entry['source'] != 'compiled':
    return [*first, *[''] * 5]
  return [*first, f'{entry["step_seconds"]:.3f}', f'{entry["parts"]["exposed"]:.3f}',
          f'{entry["tokens_per_second_per_chip"]:,.0f}', f'{entry["mfu"]:.1%}', f'{entry["compile_seconds"]:.0f}']


def report(entries):
  versions = next((e['versions'] for e in entries if 'versions' in e), {})
  line = lambda cells: '| ' + ' | '.join(cells) + ' |'
  header = ['recipe', 'slices', 'chips', 'mesh', 'sequences x tokens / accumulation steps', 'GiB per device',
            'step s', 'exposed communication s', 'tokens/s/chip', 'MFU', 'compile s']
  table = '\n'.join(map(line, [header, ['---'] * len(header), *map(row, entries)]))
  return f'''# Recipes compiled for their intended chips

Written by `python tools/plan_recipes.py`, with {', '.join(f'{k} {v}' for k, v in versions.items())}. Each row is one
`llmjax plan --config=configs/pretrain/RECIPE --topology=CHIPS [--slices=N]`, with the overrides listed after the
recipe. No TPU was used: these are predictions from compiled programs; `experiments/tpu_calibration` has their accuracy.
`gpt2_124m` and `llm_1b` have a vocabulary of 32,000. The tests compile the first three if libtpu is installed. Context
parallelism computes attention in plain XLA, without a kernel, which is slow and takes twenty minutes to compile. GiB
per device are arguments and temporaries, as reported by the compiler.

{table}
'''


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--output', type=pathlib.Path, default=ROOT / 'experiments/tpu_recipes')
  parser.add_argument('--jobs', type=int, default=2,
                      help='number of concurrent compilations; each takes about two cores and 4 GB')
  parser.add_argument('--only', default='', help='comma-separated prefixes of names; the others keep their entries')
  parser.add_argument('--small', action='store_true', help='only the programs that every CI run compiles')
  options = parser.parse_args()
  prefixes = tuple(options.only.split(','))
  chosen = [p for p in PROGRAMS if p.name.startswith(prefixes) and (p.small or not options.small)]
  if not chosen:
    parser.error(f'--only={options.only}: known are {", ".join(p.name for p in PROGRAMS)}')
  file = options.output / 'table.json'
  entries = {e['name']: e for e in json.loads(file.read_text())} if file.exists() else {}
  jobs = [Job(p.name, [f'--config={ROOT}/configs/pretrain/{p.recipe}', *p.flags]) for p in chosen]
  try:
    run_jobs(jobs, options.jobs, lambda text: print(text, flush=True))
  finally:  # Keep finished programs after Ctrl-C.
    entries.update({p.name: entry_of(p, job) for p, job in zip(chosen, jobs, strict=True) if job.plan or job.error})
    ordered = [entries[p.name] for p in PROGRAMS if p.name in entries]
    options.output.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(ordered, indent=1) + '\n')
    (options.output / 'README.md').write_text(report(ordered))
  print(report(ordered))
  sys.exit(0 if all(job.plan and job.plan['fits'] for job in jobs) else 1)


if __name__ == '__main__':
  main()
