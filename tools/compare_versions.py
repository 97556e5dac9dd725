#!/usr/bin/env python3
"""Train the same small recipes with two versions of llmjax and compare losses and final parameters.

  python tools/compare_versions.py OLD NEW [--only=dense,grpo] [--output=FOLDER]

OLD and NEW are source folders, for example git worktrees of two commits. Every command runs through the version's own
command line (`PYTHONPATH=OLD python -m llmjax ...`) on CPU, in float32, with the same seed. Each version prepares its
own data sets from the same files, because prepared formats may differ. Options that were renamed are written with the
name that the version knows (RENAMED).

Prints a Markdown table with one row per recipe: whether every logged loss, gradient norm and evaluation loss is equal
to the bit, and the largest difference of losses and of parameters, relative to the largest magnitude of the
compared series or array. Exits with 1 if anything differs. Where OLD and NEW name parameters differently, the
differences are listed below the table.
"""

import argparse
import contextlib
import json
import logging
import os
import pathlib
import random
import re
import subprocess
import sys
import tempfile
import time

import numpy as np
import orbax.checkpoint as ocp

# Names in this file -> names in versions before the rename. Looked up in the version's specs.
RENAMED = {
    'data.overflow': 'data.long',
    'rl.prompts_per_iteration': 'rl.prompts',
    'rl.num_generations': 'rl.group',
    'records.preference': 'records.pairs',
    'rewards.math': 'rewards.maths',
}
# Prints what the specs of the version in the working directory know: `group.field` and `field.choice`.
LIST_FIELDS = """
import dataclasses, importlib, pathlib
def visit(spec, name):
  for field in dataclasses.fields(spec):
    print(f'{name}.{field.name}', *(f'{field.name}.{choice}' for choice in field.metadata.get('choices') or ()))
    if dataclasses.is_dataclass(field.default_factory):
      visit(field.default_factory, field.name)
for file in sorted(pathlib.Path('llmjax').glob('**/spec.py')):
  module = importlib.import_module('.'.join(file.with_suffix('').parts))
  for spec in vars(module).values():
    if isinstance(spec, type) and dataclasses.is_dataclass(spec):
      visit(spec, spec.__name__)
"""
LOGGED = re.compile(r'train/(loss|grad_norm)|eval/.*loss')
MODEL = dict(num_layers=2, d_model=32, num_heads=2, num_kv_heads=1, mlp_dim=64, tie_embeddings=True)
TRAIN = dict(seed=17, compute_dtype='float32', log_every=1, eval_every=0, checkpoint_every=1000)
FINETUNE = dict(TRAIN, steps=6, batch_size=16, init_from='runs/sums')
ADAMW = dict(lr=1e-3, warmup_steps=2, weight_decay=0.1)
TEXT, SUMS = {'data/text': 1.0}, {'data/chat': 1.0}
# Name -> (command, groups of the config). In order: later recipes start from the run `sums`.
RECIPES = {
    'dense': ('pretrain', dict(  # configs/pretrain/quickstart.py, smaller.
        model=MODEL, data=dict(sources=TEXT, seq_len=64), train=dict(TRAIN, steps=8, batch_size=4, eval_every=4),
        optimizer=dict(name='muon', lr=6e-3, warmup_steps=2, schedule='linear', final_lr_fraction=0.02))),
    'moe': ('pretrain', dict(
        model=dict(MODEL, num_experts=4, experts_per_token=2, shared_experts=1), data=dict(sources=TEXT, seq_len=64),
        train=dict(TRAIN, steps=6, batch_size=4, eval_every=3), optimizer=ADAMW)),
    'pipeline': ('pretrain', dict(  # On eight emulated devices.
        model=MODEL, data=dict(sources=TEXT, seq_len=64), mesh=dict(stage=2, data=2, fsdp=2),
        train=dict(TRAIN, steps=4, batch_size=16), optimizer=ADAMW, pipeline=dict(microbatches=2))),
    'sums': ('pretrain', dict(
        model=MODEL, data=dict(sources=SUMS, seq_len=16, packing='pad'), train=dict(TRAIN, steps=60, batch_size=64),
        optimizer=dict(lr=1e-2, warmup_steps=10, weight_decay=0.0))),
    'lora': ('finetune', dict(
        data=dict(sources=SUMS, seq_len=16, packing='best_fit', overflow='drop'), train=FINETUNE, optimizer=ADAMW,
        adapter=dict(kind='lora', rank=4))),
    'dpo': ('finetune', dict(
        data=dict(sources={'data/pairs': 1.0}, seq_len=16), train=FINETUNE, optimizer=ADAMW,
        preference=dict(loss='sigmoid', beta=0.1))),
    'grpo': ('rl', dict(
        data=dict(sources={'data/prompts': 1.0}, seq_len=16), train=dict(FINETUNE, batch_size=32), optimizer=ADAMW,
        rl=dict(prompts_per_iteration=8, num_generations=8, max_new_tokens=4, rewards={'math': 1.0}),
        policy=dict(name='grpo', kl_coef=0.04))),
    'distill': ('pretrain', dict(
        model=dict(MODEL, num_layers=1), data=dict(sources=SUMS, seq_len=16, packing='pad'),
        train=dict(TRAIN, steps=6, batch_size=16), optimizer=ADAMW, distill=dict(teacher='runs/sums'))),
}


def write_files(folder):
  """Write the text, conversations, preferences and prompts that both versions prepare."""
  rng = random.Random(0)
  (folder / 'text').mkdir(parents=True)
  for i in range(40):
    (folder / f'text/{i}.txt').write_text(' '.join(rng.choices('a cat sees the big old house'.split(), k=90)))
  sums = [(a, b) for a in range(10) for b in range(10 - a)]
  rows = {
      'chat': [{'messages': [{'role': 'user', 'content': f'{a}+{b}='}, {'role': 'assistant', 'content': str(c)}]}
               for a, b in sums for c in (a + b, rng.randrange(10))],
      'pairs': [{'prompt': f'{a}+{b}=', 'chosen': str(a + b), 'rejected': str((a + b + 1) % 10)} for a, b in sums],
      'prompts': [{'prompt': f'{a}+{b}=', 'answer': str(a + b)} for a, b in sums]}
  for name, records in rows.items():
    (folder / f'{name}.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in records))


class Version:
  """A source folder of llmjax, and the folder in which its commands run."""

  def __init__(self, source, work):
    self.source, self.work = pathlib.Path(source).resolve(), work
    self.work.mkdir()
    listed = subprocess.run([sys.executable, '-c', LIST_FIELDS], cwd=self.source, text=True, capture_output=True,
                            check=True, env={**os.environ, 'PYTHONPATH': str(self.source)})
    known = set(listed.stdout.split())
    self._names = {new: (new if new in known else old).split('.')[1] for new, old in RENAMED.items()}

  def name(self, group, name):
    """Return this version's name of a field or value."""
    return self._names.get(f'{group}.{name}', name)

  def config(self, groups):
    """Return groups of a config with the names of this version."""
    translated = {group: {self.name(group, k): v for k, v in fields.items()} for group, fields in groups.items()}
    rewards = translated.get('rl', {}).get('rewards')
    if rewards:
      translated['rl']['rewards'] = {self.name('rewards', k): v for k, v in rewards.items()}
    return translated

  def call(self, *argv, devices=1):
    """Run a command; exit with its output if it fails."""
    environment = {**os.environ, 'PYTHONPATH': str(self.source), 'JAX_PLATFORMS': 'cpu', 'JAX_ENABLE_X64': '0',
                   'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices} '
                                '--xla_cpu_collective_call_terminate_timeout_seconds=600 '
                                '--xla_cpu_collective_timeout_seconds=600',
                   'JAX_COMPILATION_CACHE_DIR': str(self.work / 'xla')}
    done = subprocess.run([sys.executable, '-m', 'llmjax', *argv], cwd=self.work, env=environment, text=True,
                          capture_output=True, check=False)
    if done.returncode:
      sys.exit(f'{self.source}: llmjax {" ".join(argv)} failed ({done.returncode}):\n{done.stdout[-2000:]}'
               f'{done.stderr[-4000:]}')

  def prepare(self, files):
    """Prepare the data sets data/text, chat, pairs and prompts; all but the text share a tokenizer."""
    shared = {'path': 'data/chat/tokenizer.model'}
    for name, records, tokenizer in (('text', 'text', {'vocab_size': 300}), ('chat', 'chat', {'vocab_size': 300}),
                                     ('pairs', 'preference', shared), ('prompts', 'prompts', shared)):
      text = name == 'text'
      (self.work / f'prepare_{name}.json').write_text(json.dumps({
          'source': 'text_dir', 'path': str(files / (name if text else f'{name}.jsonl')), 'output': f'data/{name}',
          'records': self.name('records', records), 'template': 'llmjax' if text else 'plain', 'tokenizer': tokenizer,
          'validation_fraction': 0.2, 'test_fraction': 0}))
      self.call('prepare', f'--config=prepare_{name}.json')

  def train(self, name):
    """Run one recipe; return ({logged name: [(step, value)]}, {parameter path: array})."""
    command, groups = RECIPES[name]
    file, run = self.work / f'{name}.json', self.work / 'runs' / name
    file.write_text(json.dumps(self.config({**groups, 'logs': {'writers': ()}})))
    self.call(command, f'--config={file.name}', f'--workdir=runs/{name}', devices=8 if 'mesh' in groups else 1)
    series = {}
    for line in (run / 'metrics.jsonl').read_text().splitlines():
      row = json.loads(line)
      for key in filter(LOGGED.fullmatch, row):
        series.setdefault(key, []).append((row['step'], row[key]))
    steps = [int(p.name) for p in (run / 'checkpoints').iterdir() if p.name.isdigit()]
    return series, restore_params(run / 'checkpoints' / str(max(steps)))


def restore_params(checkpoint):
  """Return {path: array} of a checkpoint's parameters, restored by Orbax on the host."""
  import jax
  logging.getLogger('absl').setLevel(logging.ERROR)  # Orbax warns about missing metadata.
  orbax, item = ocp.PyTreeCheckpointer(), checkpoint.resolve() / 'params'
  tree = orbax.metadata(item).item_metadata.tree
  plain = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
  restored = orbax.restore(item, args=ocp.args.PyTreeRestore(restore_args=plain))
  return {jax.tree_util.keystr(path, simple=True, separator='/'): np.asarray(x)
          for path, x in jax.tree_util.tree_flatten_with_path(restored)[0]}


def difference(a, b):
  """Return (equal to the bit, largest absolute difference, that over the largest magnitude)."""
  a, b = np.asarray(a), np.asarray(b)
  if a.shape != b.shape or a.dtype != b.dtype:
    return False, float('inf'), float('inf')
  if a.tobytes() == b.tobytes():
    return True, 0.0, 0.0
  a, b = a.astype(np.float64), b.astype(np.float64)
  absolute = float(np.abs(a - b).max())
  return False, absolute, absolute / max(float(np.abs(a).max()), float(np.abs(b).max()))


def compare(old, new):
  """Return (equal, largest absolute and largest relative difference, names in one of them alone)."""
  results = [difference(old[name], new[name]) for name in old if name in new]
  equal, absolute, relative = zip(*results, strict=True) if results else ((False,), (0.0,), (0.0,))
  alone = sorted(old.keys() ^ new.keys())
  return all(equal) and not alone, max(absolute), max(relative), alone


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('old', help='source folder of the first version')
  parser.add_argument('new', help='source folder of the second version')
  parser.add_argument('--only', default='', help='recipes to run, separated by commas; sums is added if needed')
  parser.add_argument('--output', help='new folder for the runs of both versions; default: a temporary one')
  args = parser.parse_args()
  only = set(filter(None, args.only.split(','))) or set(RECIPES)
  if unknown := only - RECIPES.keys():
    parser.error(f'--only: no recipe {", ".join(sorted(unknown))}; there are {", ".join(RECIPES)}')
  if only - {'dense', 'moe', 'pipeline'}:
    only.add('sums')
  os.environ['JAX_PLATFORMS'] = 'cpu'
  begin, equal_all, notes = time.time(), True, []
  with tempfile.TemporaryDirectory() if not args.output else contextlib.nullcontext(args.output) as folder:
    folder = pathlib.Path(folder).resolve()
    write_files(folder / 'files')
    versions = [Version(args.old, folder / 'old'), Version(args.new, folder / 'new')]
    for version in versions:
      version.prepare(folder / 'files')
    print('| recipe | steps | losses, gradient norms | largest relative difference | parameters | '
          'largest difference | relative |\n| --- | --- | --- | --- | --- | --- | --- |')
    for name in filter(only.__contains__, RECIPES):
      (old_series, old_params), (new_series, new_params) = [version.train(name) for version in versions]
      as_arrays = lambda series: {k: np.asarray(v, np.float64) for k, v in series.items()}
      same, _, relative, alone = compare(as_arrays(old_series), as_arrays(new_series))
      same_params, absolute, relative_params, alone_params = compare(old_params, new_params)
      steps = int(max(step for step, _ in new_series['train/loss']))
      values = sum(len(v) for k, v in new_series.items() if k in old_series)
      shared = len(old_params.keys() & new_params.keys())
      print(f'| {name} | {steps} | {values} {"equal" if same else "DIFFER"} | {relative:.1e} | {shared} arrays '
            f'{"equal" if same_params else "DIFFER"} | {absolute:.1e} | {relative_params:.1e} |', flush=True)
      equal_all &= same and same_params
      notes += [f'{name}: only one version has {n}' for n in (*alone, *alone_params)]
  print('\n' + ''.join(f'- {note}\n' for note in notes) + f'{time.time() - begin:.0f} s')
  sys.exit(not equal_all)


if __name__ == '__main__':
  main()
