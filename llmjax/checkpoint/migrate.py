"""Rewrite runs of older versions: renamed config fields, and manifests that were named `seal.json`.

Arrays are not touched, so a migrated run continues with the same bits. Safe to interrupt and to repeat: a checkpoint
counts as old until its last `seal.json` is removed.
"""

import json

from etils import epath

from llmjax import renamed
from llmjax.checkpoint import manifest
from llmjax.checkpoint.load import checkpoints_folder
from llmjax.config import ConfigError

SPEC = 'spec/metadata'  # Where Orbax's JSON handler writes the config of a checkpoint.


def migrate(workdir, known, dry_run=False):
  """Migrate a run's config.json and checkpoints; returns one line per change.

  known: {group: names of its fields}. Raises ConfigError, before anything is written, with every field that has no
  counterpart in this version and every checkpoint that is damaged.
  """
  workdir, folder = epath.Path(workdir), checkpoints_folder(workdir)
  files = [workdir / 'config.json', *(folder / str(step) / SPEC for step in manifest.find_steps(folder))]
  lines, problems, configs = [], [], {}
  for file in files:
    try:
      settings, changes = renamed.migrate(json.loads(file.read_bytes()))
    except (OSError, ValueError, AttributeError) as e:
      problems.append(f'{file} is no config that can be read: {str(e).splitlines()[0][:200]}')
      continue
    problems += [f'{file}: {group}.{name} has no counterpart in this version, so the run cannot be migrated'
                 for group, fields in settings.items() if isinstance(fields, dict) and group in known
                 for name in fields if name not in known[group]]
    lines += [f'{file}: {old} is now {new}' for old, new in changes.items()]
    configs[file] = json.dumps(settings, indent=2) if changes else None
  checkpoints = {file.parents[1]: text for file, text in configs.items() if file.name == 'metadata'}
  for path, text in checkpoints.items():
    if manifest.is_legacy(path):
      lines.append(f'{path}: seal.json is now manifest.json')
    if text or manifest.is_legacy(path):
      problems += _damage(path)
  if problems:
    raise ConfigError(list(dict.fromkeys(problems)))
  if not dry_run:
    for path, text in checkpoints.items():
      if text or manifest.is_legacy(path):
        _rewrite(path, text)
    if text := configs[files[0]]:
      _replace(files[0], f'{text}\n')
  return lines


def _parts(path):
  """Return {manifest file of one process: its fields}, with the old file names until the migration is complete."""
  pattern = manifest.LEGACY if manifest.is_legacy(path) else manifest.MANIFEST
  return {file: manifest.read_fields(file) for file in sorted(path.iterdir()) if pattern.fullmatch(file.name)}


def _damage(path):
  """List the files of a checkpoint that differ from its manifest; the config may have been rewritten already."""
  try:
    parts = _parts(path)
  except manifest.ManifestError as e:
    return [f'{path}: {e}; remove the checkpoint, or run llmjax checkpoint prune with the version that wrote it']
  listed = {name: tuple(entry) for fields in parts.values() for name, entry in fields['files'].items()}
  return [f'{path}: {name} is damaged or missing; move the checkpoint away' for name, entry in listed.items()
          if name != SPEC and (not (path / name).exists() or manifest.hash_file(path / name) != entry)]


def _rewrite(path, text):
  """Replace a checkpoint's config, if there is a new text, and write its manifests under their new name."""
  if not manifest.is_legacy(path):
    for file in reversed(list(_parts(path))):  # Mark it as old, so that an interruption is repaired by the next call.
      file.rename(file.with_name(file.name.replace('manifest', 'seal')))
  parts = _parts(path)
  if text:
    _replace(path / SPEC, text)
  for fields in parts.values():
    if SPEC in fields['files']:
      fields['files'][SPEC] = manifest.hash_file(path / SPEC)
    manifest.write_fields(path / manifest.file_name(fields['process']), fields)
  for file in parts:  # In order, `seal.json` last: until then the checkpoint counts as old.
    file.unlink()


def _replace(file, text):
  temporary = file.with_name(f'{file.name}.tmp')
  temporary.write_text(text)
  temporary.replace(file)
