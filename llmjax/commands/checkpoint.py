"""`llmjax checkpoint ls | verify | seal | show | diff | prune`: a run's checkpoints, looked after."""

import dataclasses
import datetime
import json
import math
import time

import numpy as np

from llmjax import config
from llmjax.checkpoint import seal, spec
from llmjax.checkpoint.arrays import Arrays, read_json
from llmjax.checkpoint.checkpoints import checkpoints_folder, find_step, read_config, remove_checkpoint, require_good
from llmjax.checkpoint.spec import CheckpointSpec
from llmjax.config import ConfigError
from llmjax.run.progress import format_bytes

# Values at a time: float64 copies of a whole array could be larger than it.
BLOCK = 1 << 22
# What is younger may belong to a save that goes on.
TEMPORARY_SECONDS = 3600


def run(recipe, options):
  """Does what the options are of; returns the exit status."""
  del recipe  # The command takes none.
  folder = checkpoints_folder(options.workdir)
  if not folder.exists():
    raise ConfigError([f'--workdir={options.workdir} has no checkpoints; give the --workdir that '
                       '`llmjax pretrain` had'])
  return ACTIONS[type(options)](folder, options)


def list_checkpoints(folder, options):
  """Prints a row for each checkpoint."""
  steps = seal.find_steps(folder)
  found = {step: _read(folder, step, contents=not options.quick) for step in steps}
  retention = _retention(options.workdir)
  name = _metric_name(retention, [s.metrics for s, _ in found.values() if s])
  best = dataclasses.replace(retention, best_metric=name).best_steps(_metrics(found))
  rows = [('step', 'size', 'files', 'sealed', name or 'metric', 'state')]
  for step, (sealed, damage) in found.items():
    state = f'damaged: {damage[0]}' if damage else 'sealed' if options.quick else 'good'
    if sealed is None:
      rows.append((str(step), '', '', '', '', state))
      continue
    metric = f'{sealed.metrics[name]:.4f}' if name in sealed.metrics else ''
    if metric and sealed.metrics_step != step:
      metric += f' (at {sealed.metrics_step})'
    rows.append((str(step), format_bytes(sealed.size), str(len(sealed.files)),
                 datetime.datetime.fromtimestamp(sealed.time).isoformat(' ', 'seconds'), metric,
                 state + ', best' * (step in best)))
  print(_table(rows))
  for path in seal.find_temporaries(folder):
    print(f'{path.name}: left by a save that was cut off, or still being written')
  return 0


def verify(folder, options):
  """Reads every file; prints each that is damaged; returns 1 when there is one."""
  worst = 0
  for step in _steps(folder, options):
    begin = time.perf_counter()
    sealed, damage = _read(folder, step)
    for line in damage:
      print(f'{folder / str(step)}: {line}')
    if damage:
      worst = 1
    else:
      print(f'{folder / str(step)}: good, {len(sealed.files)} files, {format_bytes(sealed.size)}, '
            f'{time.perf_counter() - begin:.1f}s')
  return worst


def seal_checkpoints(folder, options):
  """Seals checkpoints of a version without seals, which the user vouches for."""
  for step in _steps(folder, options):
    path = folder / str(step)
    if (path / 'seal.json').exists():
      raise ConfigError([f'{path} has a seal; to seal it anew would hide damage. Remove its seal.json first if '
                         'you know better'])
    if not all((path / item).exists() for item in ('params', 'optimizer', 'stream', 'spec')):
      raise ConfigError([f'{path} is not a whole checkpoint'])
    seal.write_seal(path, step)
    print(f'{path}: sealed')
  return 0


def show(folder, options):
  """Prints the config, the stream's position and a table of arrays."""
  steps = options.steps or (find_step(options.workdir),)
  for step in steps:
    find_step(options.workdir, step)
    path = folder / str(step)
    sealed, arrays = seal.read_seal(path), Arrays(path)
    stream, settings = read_json(path, 'stream'), read_json(path, 'spec')
    print(f'{path}: step {step}, {format_bytes(sealed.size)}')
    print(f'stream: {stream["batches"]} batches drawn, data {stream["fingerprint"]}')
    for name, value in sealed.metrics.items():
      print(f'{name}: {value:.6g} (at step {sealed.metrics_step})')
    for group, fields in settings.items():
      print(f'{group}: {json.dumps(fields)}')
    print(_table(_array_rows(arrays, options.optimizer)))
  return 0


def diff(folder, options):
  """Prints how far the arrays of two checkpoints are apart, the farthest first."""
  other = checkpoints_folder(options.other) if options.other else folder
  first, second = folder / str(options.steps[0]), other / str(options.steps[-1])
  for path in (first, second):
    if not path.exists():
      raise ConfigError([f'there is no checkpoint {path}; there are '
                         f'{", ".join(map(str, seal.find_steps(path.parent))) or "none"}'])
    require_good(path)
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
  """Returns (equal to the bit, largest difference, that over the largest magnitude in a and b).

  a, b: arrays of one shape and dtype.  The differences are NaN where one of two values is not finite.
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
  """Removes what the retention does not keep, damaged checkpoints, and what old interrupted saves left."""
  retention = _retention(options.workdir)
  if options.keep:
    retention = dataclasses.replace(retention, keep=options.keep)
  found = {step: _read(folder, step) for step in seal.find_steps(folder)}
  metrics = _metrics(found)
  kept, newest = retention.kept_steps(metrics), max(metrics, default=-1)
  word = 'would remove' if options.dry_run else 'removed'
  freed = 0
  for step, (sealed, damage) in found.items():
    if step in kept:
      continue
    if step > newest:
      print(f'left: {step}, which is newer than every good one: {damage[0]}')
      continue
    if not options.dry_run:
      remove_checkpoint(folder / str(step))
    freed += sealed.size if sealed else 0
    print(f'{word}: {step}' + (f', damaged: {damage[0]}' if damage else ''))
  for path in seal.find_temporaries(folder):
    if time.time() - path.stat().mtime > TEMPORARY_SECONDS:
      if not options.dry_run:
        path.rmtree()
      print(f'{word}: {path.name}')
  print(f'kept: {", ".join(map(str, sorted(kept))) or "none"}; {format_bytes(freed)} '
        f'{"would be" if options.dry_run else "are"} freed')
  return 0


ACTIONS = {spec.ListOptions: list_checkpoints, spec.VerifyOptions: verify, spec.SealOptions: seal_checkpoints,
           spec.ShowOptions: show, spec.DiffOptions: diff, spec.PruneOptions: prune}


def _read(folder, step, contents=True):
  """Returns (Seal or None, lines of damage) of a checkpoint."""
  damage = seal.find_damage(folder / str(step), contents)
  try:
    return seal.read_seal(folder / str(step)), damage
  except (seal.SealError, OSError):
    return None, damage


def _metrics(found):
  """Returns step -> metrics of the checkpoints without damage."""
  return {step: sealed.metrics for step, (sealed, damage) in found.items() if not damage}


def _retention(workdir):
  return config.build(CheckpointSpec, read_config(workdir).get('checkpoint', {}))


def _steps(folder, options):
  """Returns the steps asked for, or all; ConfigError for one that there is not."""
  steps = seal.find_steps(folder)
  if missing := [step for step in options.steps if step not in steps]:
    raise ConfigError([f'there is no checkpoint {folder / str(step)}; there are '
                       f'{", ".join(map(str, steps)) or "none"}' for step in missing])
  return options.steps or steps


def _metric_name(retention, metrics):
  """Returns the metric to list: the one that decides which is best, else a loss."""
  names = sorted({name for m in metrics for name in m})
  losses = [n for n in names if n.endswith('/loss')]
  return retention.best_metric or next(iter(losses + names), '')


def _array_rows(arrays, optimizer):
  """Returns the rows of `show`; norms are of all values that are finite."""
  rows, total = [('array', 'shape', 'dtype', 'values', 'norm', 'not finite')], 0
  for name, shape in arrays.shapes.items():
    if not optimizer and not name.startswith('params/'):
      continue
    values, squares, wrong = arrays.read(name).reshape(-1), 0.0, 0
    for i in range(0, len(values), BLOCK):
      block = values[i:i + BLOCK].astype(np.float64)
      finite = np.isfinite(block)
      wrong += int(np.sum(~finite))
      squares += float(np.sum(np.square(block[finite])))
    total += len(values)
    rows.append((name, str(list(shape.shape)), str(shape.dtype), f'{len(values):,}', f'{math.sqrt(squares):.6g}',
                 str(wrong)))
  return [*rows, ('in all', '', '', f'{total:,}', '', '')]


def _shape(x):
  return f'{x.dtype}{list(x.shape)}'


def _table(rows):
  """Returns rows of text as aligned columns."""
  widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
  return '\n'.join('  '.join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
                   for row in rows)
