"""`llmjax prepare`: build a corpus, a tokenizer and a token store from text."""

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
  """Prepare spec.folder, unless it is prepared already, and print a summary."""
  show = Stages()
  start = time.monotonic()
  try:
    manifest, was_finished = corpus.prepare(spec, force=options.force, progress=show)
  except (OSError, RuntimeError) as e:  # Libraries report a full disk by its message alone.
    reason = next((os.strerror(n) for n in _CANNOT_WRITE if os.strerror(n) in str(e)), None)
    if reason is None:
      raise
    print(f'llmjax prepare: {spec.folder} cannot be written: {reason}; the same command resumes once that is '
          'fixed, or choose another --config.output', file=sys.stderr)
    return 1
  show.finish()
  if was_finished:
    print(f'{spec.folder} is prepared already; --force prepares it again')
  else:
    print(f'prepared in {time.monotonic() - start:.1f} s')
  print(describe(manifest, spec.folder))
  return 0


def describe(manifest, folder) -> str:
  """Return the table of a prepared folder, the rejected records, and the next command."""
  kind = prepared.kind(manifest)
  noun = 'completions' if kind == 'preference' else 'documents'
  has_trained = kind in ('chat', 'preference', 'stepwise')
  lines = [f'{"split":<11}{noun:>11}{"bytes":>15}{"tokens":>14}{"bytes/token":>13}' + f'{"trained":>13}' * has_trained]
  for split in prepared.SPLITS:
    if split in manifest['splits']:
      row = manifest['splits'][split]
      lines.append(f'{split:<11}{row["documents"]:>11,}{row["bytes"]:>15,}{row["tokens"]:>14,}'
                   f'{row["bytes"] / max(row["tokens"], 1):>13.2f}' + f'{row.get("trained", 0):>13,}' * has_trained)
  size, requested = manifest['tokenizer']['vocab_size'], manifest['tokenizer'].get('asked_vocab_size', 0)
  lines.append(f'tokenizer: {size:,} ids' + (
      f', not {requested:,}: the text supports no more' if size < requested else ''))
  quarantine, duplicates = manifest['quarantine'], manifest['duplicates']
  if quarantine['records']:
    reasons = ', '.join(f'{count} {reason}' for reason, count in quarantine['reasons'].items())
    lines.append(f'rejected: {quarantine["records"]:,} bad records ({reasons}), listed in '
                 f'{prepared.quarantine_path(folder)}')
  if quarantine['byte_order_marks_removed']:
    lines.append(f'byte-order marks removed: {quarantine["byte_order_marks_removed"]:,}')
  if any(duplicates.values()):
    lines.append(f'duplicates removed: {duplicates["repeated"]:,}, and from train '
                 f'{duplicates["train_copies_of_held_out"]:,} of held-out documents')
  lines += prepared.notes(manifest)
  if manifest['ignored_files']:
    ignored = ', '.join(f'{count} {suffix or "without suffix"}'
                        for suffix, count in manifest['ignored_files'].items())
    lines.append(f'files not read: {ignored}')
  return '\n'.join([*lines, f'folder: {folder}', *(f'next: {line}' for line in next_steps(manifest, folder))])


# The commands that train on each kind of record, with a recipe for each.
RECIPES = {'text': [('pretrain', 'pretrain/quickstart')], 'chat': [('finetune', 'finetune/chat')],
           'preference': [('finetune', 'preference/dpo'), ('reward', 'reward/preference')],
           'prompts': [('rl', 'rl/grpo')],
           'stepwise': [('reward', 'reward/stepwise')]}


def next_steps(manifest, folder):
  """Return the commands that train on a prepared folder, each a line to paste.

  All kinds but text start from a run with the same tokenizer: without one the lines say how to prepare for one.
  """
  kind, name, run = prepared.kind(manifest), pathlib.Path(folder).name, _run_of(manifest)
  if kind == 'text' or run:
    return [_train_command(command, recipe, manifest, folder, run if kind != 'text' else None)
            for command, recipe in RECIPES[kind]]
  preview = shlex.join(['llmjax', 'preview', '--config=configs/finetune/chat.py', f'--config.data.sources={folder}'])
  if kind == 'chat':
    return [preview]
  settings = manifest['request'].get('settings', {})
  source = [f'--config.{field}={settings[field]}' for field in ('source', 'name', 'path')
            if settings.get(field) and (field, settings[field]) != ('source', 'text_dir')]
  again = shlex.join(['llmjax', 'prepare', '--config=configs/data/chat.py', *source, f'--config.records={kind}',
                      f'--config.output={folder}', '--force'])
  base = next(iter(_runs()), None)
  return [f'{again} --config.tokenizer.path={shlex.quote(str(base / prepared.TOKENIZER))}' if base else
          f'no run has the tokenizer of {name}; once there is one: {again} '
          '--config.tokenizer.path=RUN/tokenizer.model']


def _train_command(command, recipe, manifest, folder, run):
  """Return the command that trains on one folder.  run: the run to start from, or None."""
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
  if command == 'rl' and isinstance(length, int) and length < 128:  # Completions of at most half a sequence.
    flags.append(f'--config.rl.max_new_tokens={length // 2}')
  return shlex.join(['llmjax', command, *flags])


def _run_of(manifest):
  """Return the folder of a run with the manifest's tokenizer, that of --config.tokenizer.path first, or None."""
  path = manifest['request'].get('settings', {}).get('tokenizer', {}).get('path', '')
  candidates = [pathlib.Path(path).parent] * bool(path) + _runs()
  return next((run for run in candidates if _can_start_from(run) and prepared.file_sha256(run / prepared.TOKENIZER)
               == manifest['tokenizer']['sha256']), None)


def _runs():
  """Return the runs in `runs` that others can start from, newest first."""
  runs = [path.parent for path in pathlib.Path('runs').glob('*/config.json') if _can_start_from(path.parent)]
  return sorted(runs, key=lambda run: (run / 'config.json').stat().st_mtime, reverse=True)


def _can_start_from(run):
  """Return whether a folder is a run with a checkpoint and a tokenizer, and not of a reward model."""
  return ((run / prepared.TOKENIZER).is_file() and any(run.glob('checkpoints/[0-9]*'))
          and 'reward' not in run_groups(run, ('model', 'reward')) and bool(run_groups(run, ('model',))))
