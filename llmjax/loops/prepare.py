"""`llmjax prepare`: text to a corpus, a tokenizer and a token store."""

import dataclasses
import errno
import os
import pathlib
import shlex
import sys
import time

from llmjax import config
from llmjax.data import corpus, prepared
from llmjax.loops.progress import Stages

_CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def run(spec, options):
  """Prepares spec.folder, unless it is prepared already, and prints what came out."""
  if options.text_dir:
    spec = dataclasses.replace(spec, source='text_dir', path=options.text_dir, name='')
    if problems := list(config.find_problems(spec)):
      raise config.ConfigError(problems)
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
  lines = [f'{"split":<11}{"documents":>11}{"bytes":>15}{"tokens":>14}{"bytes/token":>13}'
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
  if manifest['ignored_files']:
    ignored = ', '.join(f'{count} {suffix or "without suffix"}'
                        for suffix, count in manifest['ignored_files'].items())
    lines.append(f'files not read: {ignored}')
  name, source = pathlib.Path(folder), shlex.quote(str(folder))
  command = 'llmjax pretrain --config=configs/pretrain/quickstart.py'
  if name != pathlib.Path('data/python_docs'):
    command += f' --workdir=runs/{name.name} --config.data.sources={source}'
  else:
    command += ' --workdir=runs/quickstart'
  if kind != 'text':
    command = f'llmjax preview --config=configs/finetune/chat.py --config.data.sources={source}'
  return '\n'.join([*lines, f'folder: {folder}', f'next: {command}'])
