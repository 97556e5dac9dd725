"""`llmjax checkpoint ls | verify | sign | migrate | show | diff | prune`: inspect and maintain a run's checkpoints."""

import dataclasses
import datetime
import json
import math
import time

import numpy as np

from llmjax import config
from llmjax.checkpoint import manifest, migrate, retention, spec
from llmjax.checkpoint.arrays import Arrays, read_json
from llmjax.checkpoint.checkpoints import remove_checkpoint
from llmjax.checkpoint.load import checkpoints_folder, find_step, read_config, require_verified
from llmjax.checkpoint.spec import CheckpointSpec
from llmjax.commands.spec import PreviewSpec
from llmjax.config import ConfigError
from llmjax.run.progress import format_bytes

BLOCK = 1 << 22  # Values converted to float64 at a time, to bound memory.
TEMPORARY_SECONDS = 3600  # A younger temporary folder may belong to a save in progress.


def run(recipe, options):
  """Run the action that belongs to the options; returns the exit status."""
  del recipe  # The command takes none.
  folder = checkpoints_folder(options.workdir)
  if not folder.exists():
    raise ConfigError([f'--workdir={options.workdir} has no checkpoints; give the --workdir that '
                       '`llmjax pretrain` had'])
  return ACTIONS[type(options)](folder, options)


def list_checkpoints(folder, options):
  """Print a row for each checkpoint."""
  checkpoints = {step: _read(folder, step, contents=not options.quick) for step in manifest.find_steps(folder)}
  rules = _retention(options.workdir)
  name = _metric_name(rules, [m.metrics for m, _ in checkpoints.values() if m])
  best = retention.best_steps(dataclasses.replace(rules, best_metric=name), _metrics(checkpoints))
  rows = [('step', 'size', 'files', 'saved', name or 'metric', 'state')]
  for step, (listed, damage) in checkpoints.items():
    state = f'damaged: {damage[0]}' if damage else 'not verified' if options.quick else 'verified'
    if listed is None:
      rows.append((str(step), '', '', '', '', state))
      continue
    metric = f'{listed.metrics[name]:.4f}' if name in listed.metrics else ''
    if metric and listed.metrics_step != step:
      metric += f' (at {listed.metrics_step})'
    rows.append((str(step), format_bytes(listed.size), str(len(listed.files)),
                 datetime.datetime.fromtimestamp(listed.time).isoformat(' ', 'seconds'), metric,
                 state + ', best' * (step in best)))
  print(_table(rows))
  for path in manifest.find_temporaries(folder):
    print(f'{path.name}: an interrupted save, or one in progress')
  return 0


def verify(folder, options):
  """Hash every file and print those that are damaged; returns 1 if there are any."""
  status = 0
  for step in _steps(folder, options):
    begin = time.perf_counter()
    listed, damage = _read(folder, step)
    for line in damage:
      print(f'{folder / str(step)}: {line}')
    if damage:
      status = 1
    else:
      print(f'{folder / str(step)}: verified, {len(listed.files)} files, {format_bytes(listed.size)}, '
            f'{time.perf_counter() - begin:.1f}s')
  return status


def sign(folder, options):
  """Write checksum manifests for checkpoints that have none, which the user vouches for."""
  for step in _steps(folder, options):
    path = folder / str(step)
    if manifest.is_legacy(path):
      raise ConfigError([f'{path} has a manifest with an old name: llmjax checkpoint migrate '
                         f'--workdir={options.workdir}'])
    if (path / 'manifest.json').exists():
      raise ConfigError([f'{path} has a manifest; a new one would hide damage. Remove its manifest.json first if you '
                         'are sure'])
    if not all((path / item).exists() for item in ('params', 'optimizer', 'stream', 'spec')):
      raise ConfigError([f'{path} is incomplete'])
    manifest.write_manifest(path, step)
    print(f'{path}: signed')
  return 0


def migrate_run(folder, options):
  """Rewrite a run of an older version so that this version can use it."""
  del folder
  known = {group.name: {field.name for field in dataclasses.fields(group.type)}  # PreviewSpec has all groups.
           for group in dataclasses.fields(PreviewSpec)}
  lines = migrate.migrate(options.workdir, known, options.dry_run)
  print(*lines or ['nothing to change'], sep='\n')
  return 0


def show(folder, options):
  """Print the config, the position in the data, and a table of arrays."""
  steps = options.steps or (find_step(options.workdir),)
  for step in steps:
    find_step(options.workdir, step)
    path = folder / str(step)
    listed, arrays = manifest.read_manifest(path), Arrays(path)
    stream, settings = read_json(path, 'stream'), read_json(path, 'spec')
    print(f'{path}: step {step}, {format_bytes(listed.size)}')
    print(f'stream: {stream["batches"]} batches drawn, data {stream["fingerprint"]}')
    for name, value in listed.metrics.items():
      print(f'{name}: {value:.6g} (at step {listed.metrics_step})')
    for group, fields in settings.items():
      print(f'{group}: {json.dumps(fields)}')
    print(_table(_array_rows(arrays, options.optimizer)))
  return 0


def diff(folder, options):
  """Print the differences between the arrays of two checkpoints, largest first."""
  other = checkpoints_folder(options.other) if options.other else folder
  first, second = folder / str(options.steps[0]), other / str(options.steps[-1])
  for path in (first, second):
    if not path.exists():
      raise ConfigError([f'there is no checkpoint {path}; there are '
                         f'{", ".join(map(str, manifest.find_steps(path.parent))) or "none"}'])
    require_verified(path)
  a, b = Arrays(first), Arrays(second)
  rows, same = [], 0
  for name in sorted(a.shapes.keys() | b.shapes.keys()):
    if name not in a.shapes or name not in b.shapes:
      rows.append((math.inf, name, f'only in {first if name in a.shapes else second}', ''))
    elif a.shapes[name].shape != b.shapes[name].shape or a.shapes[name].dtype != b.shapes[name].dtype:
      rows.append((math.inf, name, f'{_shape(a.shapes[name])} and {_shape(b.shapes[name])}', ''))
    else:
      equal, absolute, relative = compare(a.read(name), b.read(name))
      same += equal
      if not equal:
        rows.append((math.inf if math.isnan(absolute) else absolute, name, f'{absolute:.3e}',
                     f'{relative:.3e}'))
  if not rows:
    print(f'{first} and {second} are equal to the bit: {same} arrays')
    return 0
  rows.sort(key=lambda row: (-row[0], row[1]))
  print(_table([('array', 'largest difference', 'relative'), *(row[1:] for row in rows)]))
  print(f'{len(rows)} arrays differ; {same} are equal to the bit. Relative: to the largest value of the array')
  return 0


def compare(a, b):
  """Return (equal to the bit, largest absolute difference, that over the largest magnitude in a and b).

  a, b: arrays of the same shape and dtype. The differences are NaN if a value is not finite in one of them.
  """
  a, b = np.ascontiguousarray(a).reshape(-1), np.ascontiguousarray(b).reshape(-1)
  if np.array_equal(a.view(np.uint8), b.view(np.uint8)):
    return True, 0.0, 0.0
  absolute = scale = 0.0
  for i in range(0, len(a), BLOCK):
    x, y = a[i:i + BLOCK].astype(np.float64), b[i:i + BLOCK].astype(np.float64)
    with np.errstate(invalid='ignore'):
      absolute = np.maximum(absolute, np.abs(x - y).max())
    scale = np.maximum(scale, max(np.abs(x).max(), np.abs(y).max()))
  return False, float(absolute), float(absolute / scale) if scale else 0.0


def prune(folder, options):
  """Remove the checkpoints that no retention rule keeps, damaged ones, and the remains of old interrupted saves."""
  rules = _retention(options.workdir)
  if options.keep:
    rules = dataclasses.replace(rules, keep=options.keep)
  checkpoints = {step: _read(folder, step) for step in manifest.find_steps(folder)}
  metrics = _metrics(checkpoints)
  kept, newest = retention.kept_steps(rules, metrics), max(metrics, default=-1)
  verb = 'would remove' if options.dry_run else 'removed'
  freed = 0
  for step, (listed, damage) in checkpoints.items():
    if step in kept:
      continue
    if step > newest:
      print(f'left: {step}, which is newer than every undamaged one: {damage[0]}')
      continue
    if not options.dry_run:
      remove_checkpoint(folder / str(step))
    freed += listed.size if listed else 0
    print(f'{verb}: {step}' + (f', damaged: {damage[0]}' if damage else ''))
  for path in manifest.find_temporaries(folder):
    if time.time() - path.stat().mtime > TEMPORARY_SECONDS:
      if not options.dry_run:
        path.rmtree()
      print(f'{verb}: {path.name}')
  print(f'kept: {", ".join(map(str, sorted(kept))) or "none"}; {format_bytes(freed)} '
        f'{"would be" if options.dry_run else "are"} freed')
  return 0


ACTIONS = {spec.ListOptions: list_checkpoints, spec.VerifyOptions: verify, spec.SignOptions: sign,
           spec.MigrateOptions: migrate_run, spec.ShowOptions: show, spec.DiffOptions: diff, spec.PruneOptions: prune}


def _read(folder, step, contents=True):
  """Return (Manifest or None, lines of damage) of a checkpoint."""
  damage = manifest.find_damage(folder / str(step), contents)
  try:
    return manifest.read_manifest(folder / str(step)), damage
  except (manifest.ManifestError, OSError):
    return None, damage


def _metrics(checkpoints):
  """Return {step: metrics} of the undamaged checkpoints."""
  return {step: listed.metrics for step, (listed, damage) in checkpoints.items() if not damage}


def _retention(workdir):
  return config.build(CheckpointSpec, read_config(workdir).get('checkpoint', {}))


def _steps(folder, options):
  """Return the requested steps, or all. Raises ConfigError for a missing one."""
  steps = manifest.find_steps(folder)
  if missing := [step for step in options.steps if step not in steps]:
    raise ConfigError([f'there is no checkpoint {folder / str(step)}; there are '
                       f'{", ".join(map(str, steps)) or "none"}' for step in missing])
  return options.steps or steps


def _metric_name(rules, metrics):
  """Return the metric to list: the one that ranks checkpoints, else a loss."""
  names = sorted({name for m in metrics for name in m})
  losses = [n for n in names if n.endswith('/loss')]
  return rules.best_metric or next(iter(losses + names), '')


def _array_rows(arrays, optimizer):
  """Return the table rows of `show`. Norms are over the finite values."""
  rows, total = [('array', 'shape', 'dtype', 'values', 'norm', 'non-finite')], 0
  for name, shape in arrays.shapes.items():
    if not optimizer and not name.startswith('params/'):
      continue
    values, squares, nonfinite = arrays.read(name).reshape(-1), 0.0, 0
    for i in range(0, len(values), BLOCK):
      block = values[i:i + BLOCK].astype(np.float64)
      finite = np.isfinite(block)
      nonfinite += int(np.sum(~finite))
      squares += float(np.sum(np.square(block[finite])))
    total += len(values)
    rows.append((name, str(list(shape.shape)), str(shape.dtype), f'{len(values):,}', f'{math.sqrt(squares):.6g}',
                 str(nonfinite)))
  return [*rows, ('total', '', '', f'{total:,}', '', '')]


def _shape(x):
  return f'{x.dtype}{list(x.shape)}'


def _table(rows):
  """Format rows of text as aligned columns."""
  widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
  return '\n'.join('  '.join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
                   for row in rows)
