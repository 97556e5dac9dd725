"""`llmjax prepare`: text to a corpus, a tokenizer and a token store."""

import errno
import itertools
import os
import pathlib
import shlex
import sys
import time

from llmjax.data import corpus, prepared
from llmjax.run.progress import Stages
from llmjax.run.sources import run_groups

_CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def run(spec, options):
  """Prepares spec.folder, unless it is prepared already, and prints what came out."""
  show = Stages()
  start = time.monotonic()
  try:
    manifest, was_finished = corpus.prepare(spec, force=options.force, progress=show)
  except (OSError, RuntimeError) as e:  # The writers of libraries give the system's reason in words.
    reason = next((os.strerror(n) for n in _CANNOT_WRITE if os.strerror(n) in str(e)), None)
    if reason is None:
      raise
    print(f'llmjax prepare: {spec.folder} cannot be written: {reason}; the same command goes on when that is '
          'mended, or choose another --config.output', file=sys.stderr)
    return 1
  show.finish()
  if was_finished:
    print(f'{spec.folder} is prepared already; --force prepares it again')
  else:
    print(f'prepared in {time.monotonic() - start:.1f} s')
  print(describe(manifest, spec.folder))
  return 0


def describe(manifest, folder) -> str:
  """Returns the table of a prepared folder, what was left out, and the next command."""
  kind = prepared.kind(manifest)
  counted = 'completions' if kind == 'pairs' else 'documents'
  lines = [f'{"split":<11}{counted:>11}{"bytes":>15}{"tokens":>14}{"bytes/token":>13}'
           + f'{"trained":>13}' * (kind in ('chat', 'pairs', 'steps'))]
  for split in prepared.SPLITS:
    if split in manifest['splits']:
      row = manifest['splits'][split]
      lines.append(f'{split:<11}{row["documents"]:>11,}{row["bytes"]:>15,}{row["tokens"]:>14,}'
                   f'{row["bytes"] / max(row["tokens"], 1):>13.2f}'
                   + f'{row.get("trained", 0):>13,}' * (kind in ('chat', 'pairs', 'steps')))
  found, asked = manifest['tokenizer']['vocab_size'], manifest['tokenizer'].get('asked_vocab_size', 0)
  lines.append(f'tokenizer: {found:,} ids' + (
      f', not {asked:,}: the text supports no more' if found < asked else ''))
  quarantine, duplicates = manifest['quarantine'], manifest['duplicates']
  if quarantine['records']:
    reasons = ', '.join(f'{count} {reason}' for reason, count in quarantine['reasons'].items())
    lines.append(f'left out: {quarantine["records"]:,} bad records ({reasons}), listed in '
                 f'{prepared.quarantine_path(folder)}')
  if quarantine['byte_order_marks_removed']:
    lines.append(f'byte-order marks removed: {quarantine["byte_order_marks_removed"]:,}')
  if any(duplicates.values()):
    lines.append(f'copies left out: {duplicates["repeated"]:,}, and from train '
                 f'{duplicates["train_copies_of_held_out"]:,} of held-out documents')
  lines += prepared.notes(manifest)
  if manifest['ignored_files']:
    ignored = ', '.join(f'{count} {suffix or "without suffix"}'
                        for suffix, count in manifest['ignored_files'].items())
    lines.append(f'files not read: {ignored}')
  return '\n'.join([*lines, f'folder: {folder}', *(f'next: {line}' for line in next_steps(manifest, folder))])


# The command that learns from records of a kind, and the recipe for it.
RECIPES = {'text': [('pretrain', 'pretrain/quickstart')], 'chat': [('finetune', 'finetune/chat')],
           'pairs': [('finetune', 'preference/dpo'), ('reward', 'reward/pairs')], 'prompts': [('rl', 'rl/grpo')],
           'steps': [('reward', 'reward/steps')]}


def next_steps(manifest, folder):
  """Returns the commands that learn from a prepared folder, each a line to paste.

  All but text need a run with the same tokenizer to begin from: without one the lines say how to get there.
  """
  kind, name, run = prepared.kind(manifest), pathlib.Path(folder).name, _run_of(manifest)
  if kind == 'text' or run:
    return [_train_command(command, recipe, manifest, folder, run if kind != 'text' else None)
            for command, recipe in RECIPES[kind]]
  preview = shlex.join(['llmjax', 'preview', '--config=configs/finetune/chat.py', f'--config.data.sources={folder}'])
  if kind == 'chat':
    return [preview]
  settings = manifest['request'].get('settings', {})
  again = shlex.join(['llmjax', 'prepare', '--config=configs/data/chat.py', f'--config.path={settings.get("path", "")}',
                      f'--config.records={kind}', f'--config.output={folder}', '--force'])
  base = next(iter(_runs()), None)
  return [f'{again} --config.tokenizer.path={shlex.quote(str(base / prepared.TOKENIZER))}' if base else
          f'no run has the tokenizer of {name}; when there is one to learn from it: {again} '
          '--config.tokenizer.path=RUN/tokenizer.model']


def _train_command(command, recipe, manifest, folder, run):
  """Returns a training command on a folder alone.  run: to begin from, or None."""
  quickstart = pathlib.Path(folder) == pathlib.Path('data/python_docs')
  name = 'quickstart' if quickstart else pathlib.Path(folder).name
  workdir = pathlib.Path('runs') / (f'{name}_{command}' if len(RECIPES[prepared.kind(manifest)]) > 1 else name)
  free = (workdir.with_name(f'{workdir.name}_{n}') for n in itertools.count(2))
  workdir = next(free) if workdir.exists() else workdir
  flags = [f'--config=configs/{recipe}.py', f'--workdir={workdir}']
  flags += [f'--config.train.init_from={run}'] * bool(run)
  flags += [f'--config.data.sources={folder}'] * (not quickstart)
  if 'validation' not in manifest['splits']:
    flags.append('--config.evaluate.splits=')
  length = run and run_groups(run, ('data',)).get('data', {}).get('seq_len')
  if command == 'rl' and isinstance(length, int) and length < 128:  # Its completions are half of a sequence at most.
    flags.append(f'--config.rl.max_new_tokens={length // 2}')
  return shlex.join(['llmjax', command, *flags])


def _run_of(manifest):
  """Returns the folder of a run with the manifest's tokenizer, that of --config.tokenizer.path first, or None."""
  asked = manifest['request'].get('settings', {}).get('tokenizer', {}).get('path', '')
  tried = [pathlib.Path(asked).parent] * bool(asked) + _runs()
  return next((run for run in tried if _can_begin(run) and prepared.file_sha256(run / prepared.TOKENIZER)
               == manifest['tokenizer']['sha256']), None)


def _runs():
  """Returns the runs in `runs` that others can begin from, newest first."""
  found = [path.parent for path in pathlib.Path('runs').glob('*/config.json') if _can_begin(path.parent)]
  return sorted(found, key=lambda run: (run / 'config.json').stat().st_mtime, reverse=True)


def _can_begin(run):
  """Says whether a folder is a run with a checkpoint and a tokenizer, and no reward model."""
  return ((run / prepared.TOKENIZER).is_file() and any(run.glob('checkpoints/[0-9]*'))
          and 'reward' not in run_groups(run, ('model', 'reward')) and bool(run_groups(run, ('model',))))
