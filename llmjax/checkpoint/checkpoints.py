"""A run's checkpoints: `<workdir>/checkpoints/<step>/` with four Orbax items and a seal.

  params     the parameters alone, so that evaluation and generation read no optimizer state
  optimizer  step, optimizer state and PRNG key
  stream     the data stream's state, one number, and the fingerprint of its data
  spec       the resolved config of the run
  seal.json  size and SHA-256 of every file: see seal.py; a checkpoint without damage is called good

A save writes `<step>.partial` and renames it when it is sealed.
"""

import collections
import dataclasses
import errno
import itertools
import json
import logging
import math
import os
import pathlib
import re
import shutil
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from llmjax import config
from llmjax.adapt import lora
from llmjax.adapt.quantize import quantize_tree
from llmjax.adapt.spec import AdapterSpec
from llmjax.checkpoint import bases, pickle_guard, seal
from llmjax.checkpoint.arrays import Arrays, read_json
from llmjax.checkpoint.recorded import find_paths
from llmjax.checkpoint.spec import CheckpointSpec
from llmjax.config import ConfigError
from llmjax.model.model import Model
from llmjax.model.spec import ModelSpec
from llmjax.parallel import distributed
from llmjax.train.state import TrainState

# Seconds that the first process waits for the seals of the others before it removes older checkpoints.
SEAL_SECONDS = 60.0
REMOVALS = 10  # How often the remains of a failed save are looked for.
_SAVES = itertools.count()  # All processes count alike.
BARRIER_SECONDS = 0.2  # How often a process looks whether another one's part of the save has failed.
LEAVE_SECONDS = 10.0  # A process that fails alone waits so long for its part of a save.
PARTS = 10  # A save or a restore has at most this share of its arrays in flight, or the largest of them.


class SaveError(Exception):
  """A checkpoint could not be written.  The text is one line: path, reason, bytes free."""


@dataclasses.dataclass(frozen=True)
class Save:
  """What became of one save.  size: bytes.  seconds: what the caller waited.

  problem: why it failed, or ''.  note: what else went wrong, or ''.
  """

  step: int
  path: epath.Path
  size: int = 0
  seconds: float = 0.0
  problem: str = ''
  note: str = ''


class Checkpoints:
  """Saves and restores TrainStates.

  Saving is asynchronous: writing, sealing and the removal of what the spec no longer keeps happen while
  the run goes on.  `finished` says what became of it, `close` waits for what is in flight.
  """

  def __init__(self, workdir, spec=None):
    self.folder = checkpoints_folder(workdir)
    self.spec = spec or CheckpointSpec()
    self.passed_over = []
    self._orbax = None  # Made for the first save.
    _quieten_failed_saves()
    self._barrier = None  # Of the processes that write the save in flight, where there are several.
    self._thread, self._outcome, self._cleared = None, None, False
    self._finished = collections.deque()

  def _make_writer(self, state):
    """Returns the writer of states like this one, which has a tenth of it in flight: what it encodes is a copy."""
    arrays = lambda: ocp.StandardCheckpointHandler(save_concurrent_gb=_in_flight_gb(jax.tree.leaves(state)))
    handlers = ocp.CompositeCheckpointHandler(params=arrays(), optimizer=arrays(), stream=ocp.JsonCheckpointHandler(),
                                              spec=ocp.JsonCheckpointHandler())
    # Asynchronous creation would leave Orbax's threads waiting for minutes when a folder cannot be made.
    return ocp.AsyncCheckpointer(handlers, async_options=ocp.options.AsyncOptions(
        create_directories_asynchronously=False,
        barrier_sync_fn=lambda *, key, timeout_ms: self._barrier.wait(key, timeout_ms)))

  def latest(self):
    """Returns the newest good step, None where there is no checkpoint; `passed_over` says which newer ones are damaged.

    Raises ConfigError where a run must neither resume nor start anew, which would replace what is there: where no
    checkpoint is good, or whether the newest one is cannot be found out.
    """
    self._join()
    step, self.passed_over = newest_good(self.folder, strict=True)
    return step

  def set_aside(self):
    """Renames the folder of checkpoints, so that the run starts anew; returns its new path.  One process calls it."""
    for number in itertools.count(1):
      path = self.folder.with_name(f'{self.folder.name}.{number}')
      if not os.path.lexists(path):
        return self.folder.rename(path)

  def save(self, step, state, stream, spec, metrics=None, metrics_step=None):
    """Starts to save; the state may be donated to the next step at once.

    stream: {'batches': drawn so far, 'fingerprint': of the data}.  spec: the config as nested dicts.
    metrics: of the latest evaluation, which was at metrics_step.  A checkpoint of this step is replaced,
    and once this one is good, those of later steps are removed: the run has left them.  Never raises
    because of what is saved or where: a failure, such as values that are not finite, is told by `finished`.
    """
    begin = time.perf_counter()
    self._join()
    if jax.process_count() > 1:
      if self._barrier:
        self._barrier.close()
      self._barrier = distributed.Barrier(f'saves/{next(_SAVES)}')
    rest = {'step': state.step, 'opt_state': state.opt_state, 'key': state.key}
    try:
      if names := find_nonfinite({'params': state.params, 'optimizer': rest}):
        raise SaveError(f'{names[0]} is not finite' + f', nor are {len(names) - 1} more' * (len(names) > 1))
      self._prepare()
      self._orbax = self._orbax or self._make_writer(state)
      self._orbax.save(self._partial(step), force=True, args=ocp.args.Composite(
          params=ocp.args.StandardSave(state.params), optimizer=ocp.args.StandardSave(rest),
          stream=ocp.args.JsonSave(stream), spec=ocp.args.JsonSave(spec)))
      task, arguments = self._seal, (step, metrics, metrics_step, time.perf_counter() - begin)
    except Exception as e:  # Of any library below: a save that fails must not end the run by itself.
      task, arguments = self._fail, (step, e)
    self._thread = threading.Thread(target=task, args=arguments, name='seal')
    self._thread.start()
    if task == self._fail and jax.process_count() == 1:
      self._join()  # So that the loop hears of it before its next step.

  def finished(self, wait=False):
    """Returns the Saves that have ended since the last call.  wait: for the one in flight as well.

    Several processes learn of a failure at the next save, or when they wait, all of them at once: one that
    stopped by itself would leave the others in a collective.
    """
    if wait or (jax.process_count() == 1 and self._thread is not None and not self._thread.is_alive()):
      self._join()
    saves = []
    while self._finished:
      saves.append(self._finished.popleft())
    return saves

  def restore(self, step, abstract):
    """Returns (state, stream) as saved.  abstract: the TrainState of shapes, dtypes and shardings.

    Raises ConfigError when the checkpoint holds other arrays.
    """
    self._join()
    rest = {'step': abstract.step, 'opt_state': abstract.opt_state, 'key': abstract.key}
    _require_fit(self.folder / str(step), {'params': abstract.params, 'optimizer': rest})
    handlers = ocp.CompositeCheckpointHandler(
        params=_make_reader(abstract.params), optimizer=_make_reader(rest), stream=ocp.JsonCheckpointHandler())
    with ocp.Checkpointer(handlers) as orbax:
      items = orbax.restore(self.folder / str(step), args=ocp.args.Composite(
          params=ocp.args.StandardRestore(abstract.params),
          optimizer=ocp.args.StandardRestore(rest), stream=ocp.args.JsonRestore()))
    return TrainState(params=items.params, **items.optimizer), items.stream

  def wait(self):
    """Returns when every save is sealed; raises SaveError when one failed that `finished` has not told of."""
    for save in self.finished(wait=True):
      if save.problem:
        raise SaveError(save.problem)

  def close(self):
    try:
      self.wait()
    finally:
      if self._orbax:
        self._orbax.close()

  def leave(self):
    """Lets the save in flight end if it can without the other processes, which may not come; tells nothing."""
    if self._thread is not None:
      self._thread.join(LEAVE_SECONDS)

  def _join(self):
    """Waits for the save in flight and notes what became of it; all processes agree on that."""
    if self._thread is None:
      return
    self._thread.join()
    self._thread, save = None, self._outcome
    problem = next((p for p in _gather(save.problem) if p), '')
    self._finished.append(save if save.problem == problem else dataclasses.replace(save, problem=problem))

  def _partial(self, step):
    return self.folder / f'{step}.partial'

  def _prepare(self):
    """Makes the folder and removes what interrupted saves left; OSError, on all processes, when it cannot."""
    code = 0
    if jax.process_index() == 0:
      try:
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in () if self._cleared else seal.find_temporaries(self.folder):
          path.rmtree()
        self._cleared = True
      except OSError as e:
        code = e.errno or errno.EIO
    if code := _gather(code)[0]:
      raise OSError(code, os.strerror(code))

  def _seal(self, step, metrics, metrics_step, seconds):
    """Waits for Orbax to commit, seals, and applies the retention.  Runs in a thread of its own."""
    path, partial, first = self.folder / str(step), self._partial(step), jax.process_index() == 0
    try:
      self._wait_for_orbax()
      seal.write_seal(partial, step, metrics, metrics_step, jax.process_index(), jax.process_count())
      size = self._wait_for_seals(partial).size if first else 0
      if first:
        if path.exists():
          remove_checkpoint(path)
        partial.rename(path)
    except Exception as e:  # As in save.
      self._fail(step, e)
      return
    note = ''
    try:
      if first:
        self._retain(step)
    except OSError as e:
      note = f'older checkpoints in {self.folder} are not removed: {_reason(e)}'
    self._outcome = Save(step, path, size, seconds, note=note)

  def _wait_for_orbax(self):
    """Returns when Orbax has committed; raises why it, or another process's, does not."""
    if self._barrier is None:
      self._orbax.wait_until_finished()
      return
    errors = []

    def wait(orbax=self._orbax):
      try:
        orbax.wait_until_finished()
      except Exception as e:
        errors.append(e)

    thread = threading.Thread(target=wait, name='wait for orbax', daemon=True)
    thread.start()
    while thread.is_alive():
      thread.join(BARRIER_SECONDS)
      try:
        self._barrier.check()
      except distributed.AbsentError:
        # It may go on writing until its timeout, and would keep the next save waiting.
        self._orbax = None
        raise
    if errors:
      raise errors[0]

  def _wait_for_seals(self, path):
    """Returns the Seal once all processes have sealed their share; raises SealError when they do not."""
    deadline = time.monotonic() + SEAL_SECONDS
    while True:
      try:
        return seal.read_seal(path)
      except seal.SealError:
        if time.monotonic() > deadline:
          raise
        if self._barrier:
          self._barrier.check()
        time.sleep(0.05)

  def _retain(self, saved):
    """Removes the steps after the saved one, and those good ones that the spec does not keep."""
    metrics = {}
    for step in seal.find_steps(self.folder):
      if step > saved:
        remove_checkpoint(self.folder / str(step))
        continue
      try:
        metrics[step] = seal.read_seal(self.folder / str(step)).metrics
      except seal.SealError:
        continue  # Not counted, and left for `llmjax checkpoint` to look at.
    for step in set(metrics) - self.spec.kept_steps(metrics):
      remove_checkpoint(self.folder / str(step))

  def _fail(self, step, error):
    """Notes why a save failed, and frees what it has written."""
    path = self.folder / str(step)
    if self._barrier and not isinstance(error, distributed.AbsentError):
      self._barrier.abort(_reason(error))
    problem = f'{path} is not saved: {_reason(error)}'
    if not isinstance(error, SaveError) and (free := free_bytes(self.folder)) is not None:
      problem += f'; {free:,} bytes are free there'
    if jax.process_index() == 0 and not isinstance(error, SaveError):
      self._cleared = False  # What cannot be removed now goes before the next save.
      for _ in range(REMOVALS):
        try:
          for left in seal.find_temporaries(self.folder):
            left.rmtree()
        except OSError:
          pass  # It is no good checkpoint either way.
        time.sleep(0.05)  # Orbax's other writers may still be at work there, and make it anew.
        if not seal.find_temporaries(self.folder):
          break
    self._outcome = Save(step, path, problem=problem)


def checkpoints_folder(workdir):
  """Returns the folder of a run's checkpoints, local or remote."""
  folder = epath.Path(workdir) / 'checkpoints'
  return folder if '://' in str(workdir) else folder.absolute()  # Orbax takes no relative paths.


def newest_good(folder, strict=False):
  """Returns (the newest good step or None, one line for each newer checkpoint that is passed over).

  All processes call it: each reads its share of the files, and they agree.  strict: raises ConfigError where a run
  that saves here would replace checkpoints that may be of use, see `Checkpoints.latest`.  Raises ConfigError for
  the checkpoints of a version without seals, which are not to be taken for damage, and where listing fails.
  """
  steps, passed = _gather_list(folder)
  unsealed, first = 0, ''
  for step in reversed(steps):
    path = folder / str(step)
    problems = seal.find_problems(path, process=jax.process_index(), processes=jax.process_count())
    problems = list(dict.fromkeys((line, damaged) for part in _gather(problems) for line, damaged in part))
    if not problems:
      return step, passed
    unknown = [line for line, damaged in problems if not damaged]
    if strict and unknown:
      raise ConfigError([f'{path} may be good and cannot be checked: {unknown[0]}. Make it readable, or move it away '
                         f'to resume from an older one; {_start_anew(folder)}'])
    more = f', and {len(problems) - 1} more' if len(problems) > 1 else ''
    damage = problems[0][0] + more
    passed.append(f'{path} is passed over: {damage}')
    unsealed, first = unsealed + (damage == 'seal.json is missing'), first or damage
  if steps and unsealed == len(steps):
    raise ConfigError([f'no checkpoint in {folder} has a seal: they are of an llmjax before seals, or damaged. Seal '
                       f'what you trust: llmjax checkpoint seal {steps[-1]} --workdir={folder.parent}; '
                       f'{_start_anew(folder)}'])
  if strict and steps:
    raise ConfigError([f'no checkpoint in {folder} can be loaded, of {len(steps)} ({steps[-1]}: {first}). Look at '
                       f'them: llmjax checkpoint verify --workdir={folder.parent}; {_start_anew(folder)}'])
  return None, passed


def _start_anew(folder):
  return (f'to start anew give another --workdir, or --config.checkpoint.fresh_start=true, which renames {folder.name} '
          'and removes nothing')


def _gather_list(folder):
  """Returns (steps, lines on saves that were cut off) as all processes see them; ConfigError when one cannot."""
  try:
    steps, error = seal.find_steps(folder), ''
    cut = [f'{p} is passed over: its save was cut off' for p in seal.find_temporaries(folder)
           if not p.name.endswith('.deleted')]
  except OSError as e:
    steps, cut, error = [], [], e.strerror or str(e)
  found = _gather([steps, cut, error])
  if error := next((e for _, _, e in found if e), ''):
    raise ConfigError([f'{folder} cannot be listed: {error}. It may hold checkpoints: make it readable, or give '
                       'another --workdir'])
  return found[0][:2]


def _require_fit(checkpoint, tree):
  """Raises ConfigError when a checkpoint holds other arrays than the tree of shapes."""
  saved, wanted = Arrays(checkpoint).shapes, _named_leaves(tree)
  lines = [f'{name} is not in it' for name in wanted if name not in saved]
  lines += [f'{name} has the shape {list(saved[name].shape)} and not {list(wanted[name].shape)}'
            for name in wanted if name in saved and saved[name].shape != wanted[name].shape]
  lines += [f'{name} has no place' for name in saved if name not in wanted]
  if lines:
    raise ConfigError([f'{checkpoint} holds other arrays than this model and optimizer have: {lines[0]}'
                       + f', and {len(lines) - 1} more' * (len(lines) > 1) + '. It is of another run, or of other '
                       'settings: give another --workdir'])


def _named_leaves(tree):
  """Returns {path as text: array}."""
  return {'/'.join(str(getattr(k, 'key', getattr(k, 'name', getattr(k, 'idx', k)))) for k in path): x
          for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]}


def find_nonfinite(tree):
  """Returns the names of the arrays that hold a NaN or an infinity; looked for on the devices."""
  leaves = {name: x for name, x in _named_leaves(tree).items() if jnp.issubdtype(x.dtype, jnp.inexact)}
  finite = np.asarray(_all_finite(list(leaves.values()))) if leaves else ()
  return [name for name, good in zip(leaves, finite, strict=True) if not good]


@jax.jit
def _all_finite(leaves):
  return jnp.stack([jnp.all(jnp.isfinite(x)) for x in leaves])


def remove_checkpoint(path):
  """Removes a checkpoint's folder; a kill meanwhile leaves no half of it under its name."""
  if '://' not in str(path):  # Where renaming is copying, the missing files make it no good one.
    path = path.replace(path.with_name(f'{path.name}.deleted'))
  path.rmtree()


def free_bytes(folder):
  """Returns the bytes that are free on the disk of a folder, or None where that is unknown."""
  if '://' in str(folder):
    return None
  folder = pathlib.Path(folder)
  while not folder.exists() and folder != folder.parent:
    folder = folder.parent
  try:
    return shutil.disk_usage(folder).free
  except OSError:
    return None


def _reason(error):
  """Returns in a few words why something could not be written."""
  if isinstance(error, (SaveError, distributed.AbsentError)):
    return str(error)
  code = re.search(r"os_error_code='(\d+)'", str(error))  # TensorStore's.
  if code or (isinstance(error, OSError) and error.errno):
    return os.strerror(int(code[1]) if code else error.errno)
  return f'{type(error).__name__}: {(str(error).splitlines() or [""])[0][:200]}'


def _quieten_failed_saves():
  """Keeps Orbax from printing up to four tracebacks for a failed save, which `finished` tells in a line."""
  logging.getLogger('absl').addFilter(_not_an_error_of_orbax)  # Once: a second time changes nothing.
  logging.getLogger('asyncio').addFilter(_not_left_over)
  if not hasattr(sys.unraisablehook, 'quiet'):
    told = sys.unraisablehook

    def hook(unraisable):
      # What was still being written reports to the event loop of the save that has failed meanwhile.
      if str(unraisable.exc_value) != 'Event loop is closed':
        told(unraisable)

    hook.quiet = True
    sys.unraisablehook = hook


def _not_an_error_of_orbax(record):
  return record.levelno < logging.ERROR or 'orbax' not in record.pathname


def _not_left_over(record):
  """Is not what the writes that were under way when one failed say at the end of the process."""
  text = str(record.msg)
  return not ('orbax' in text and ('exception was never retrieved' in text or 'destroyed but it is pending' in text))


def _gather(value):
  """Returns every process's value, in order; a value is anything of JSON."""
  return distributed.gather(value, 'looked at the checkpoints')


def read_config(workdir):
  """Returns the resolved config of a run's folder as nested dicts; ConfigError when it is not one."""
  if refused := pickle_guard.refusal(workdir):
    raise ConfigError([f'--workdir={refused}'])
  file = epath.Path(workdir) / 'config.json'
  if not file.exists():
    raise ConfigError([f"--workdir={workdir} is not a run's folder (no config.json); give the "
                       '--workdir that `llmjax pretrain` had'])
  try:
    found = json.loads(file.read_bytes().decode())
  except (ValueError, RecursionError) as e:
    raise ConfigError([f'{file} is damaged ({_first_line(e)}); it is in every checkpoint too: '
                       f'llmjax checkpoint show --workdir={workdir}']) from e
  except OSError as e:
    raise ConfigError([f'{file} cannot be read: {e.strerror or e}']) from e
  wrong = [] if isinstance(found, dict) else ['no JSON object']
  wrong = wrong or [f'no group {name!r}' for name in ('model', 'train')
                    if not isinstance(found.get(name), dict)]
  if wrong:
    raise ConfigError([f"{file} is not a run's config: it has {wrong[0]}; give the --workdir that "
                       '`llmjax pretrain` had'])
  return find_paths(found, workdir)


def _first_line(error):
  return (str(error).splitlines() or [type(error).__name__])[0][:200]


def find_step(workdir, step=0):
  """Returns the step to load: the one asked for, or the newest good one; ConfigError when there is none.

  A newer checkpoint that is passed over gets a line on standard error.
  """
  folder = checkpoints_folder(workdir)
  steps = seal.find_steps(folder)
  if not steps:
    raise ConfigError([f'--workdir={workdir} has no checkpoint yet; let `llmjax pretrain` reach its '
                       'first one'])
  if step and step not in steps:
    raise ConfigError([f'--step={step} is not a checkpoint of {workdir}; it has '
                       f'{", ".join(map(str, steps))}'])
  if step:
    require_good(folder / str(step))
    return step
  newest, passed = newest_good(folder)
  if newest is None:
    raise ConfigError([f'--workdir={workdir} has no good checkpoint', *passed])
  for line in passed:
    print(line, file=sys.stderr)
  return newest


def require_good(checkpoint):
  """Raises ConfigError when a checkpoint is damaged or has no seal."""
  damage = seal.find_damage(checkpoint)
  if damage:
    raise ConfigError([f'{checkpoint} is not loaded: {line}' for line in damage])


def load_params(workdir, step=0, shardings=None):
  """Returns (params, ModelSpec, config, step) of a run.

  step: 0 for the newest checkpoint.  shardings: function of the ModelSpec that returns the tree of
  shardings to load into; None loads onto the first device.  Adapters are merged into their base; ConfigError
  when that is not the one that they were trained on.
  """
  settings = read_config(workdir)
  step = find_step(workdir, step)
  model = config.build(ModelSpec, settings['model'])
  dtype = settings['train']['param_dtype']
  shapes = Model(model).abstract_params(dtype)
  if shardings is None:
    single = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    tree = jax.tree.map(lambda _: single, shapes)
  else:
    tree = shardings(model)
  abstract = jax.tree.map(lambda s, n: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=n), shapes, tree)
  checkpoint = checkpoints_folder(workdir) / str(step)
  if not is_adapter(checkpoint):
    return restore_params(checkpoint, abstract), model, settings, step
  base, adapters, specs = load_adapters(checkpoint, abstract)
  return jax.jit(lambda b, a: lora.merge(b, a, specs), out_shardings=tree)(base, adapters), model, settings, step


def is_adapter(checkpoint):
  """Returns whether a checkpoint holds adapters alone, without their base."""
  return bool(read_json(checkpoint, 'spec').get('adapter', {}).get('kind'))


def load_adapters(checkpoint, abstract, with_base=True):
  """Returns (base or None, {name: adapter}, {name: AdapterSpec}) of an adapter checkpoint.

  abstract: the base's parameters, as ShapeDtypeStructs with shardings.  The base is quantised where it was.
  Adapters are made on the first device.
  """
  settings = read_json(checkpoint, 'spec')
  spec = config.build(AdapterSpec, settings['adapter'])
  single = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  shapes = jax.eval_shape(
      lambda b: {spec.name: lora.init_adapter(spec, b, jax.random.key(0), settings['train']['param_dtype'])}, abstract)
  adapters = restore_params(checkpoint, jax.tree.map(
      lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=single), shapes))
  if len(jax.tree.leaves(abstract)[0].sharding.device_set) > 1:
    adapters = jax.device_get(adapters)  # To lie wherever the base does.
  if not with_base:
    return None, adapters, {spec.name: spec}
  run = epath.Path(checkpoint).parent.parent
  source = find_paths(settings, run)['train'].get('init_from', '')
  folder = bases.find_base(read_json(checkpoint, 'stream')['base'], source, run)
  require_good(folder)
  base = restore_params(folder, abstract)
  return (quantize_tree(base, spec.quantize) if spec.quantize else base), adapters, {spec.name: spec}


def restore_params(checkpoint, abstract):
  """Returns the parameters of one checkpoint's folder, shaped and placed as `abstract` says."""
  if refused := pickle_guard.refusal(checkpoint):
    raise ConfigError([refused])
  path = pathlib.Path(checkpoint).absolute() if '://' not in str(checkpoint) else checkpoint
  with ocp.Checkpointer(_make_reader(abstract)) as orbax:
    return orbax.restore(epath.Path(path) / 'params', args=ocp.args.StandardRestore(abstract))


def _make_reader(abstract):
  """Returns Orbax's handler that reads this tree: a tenth of it at a time, so that the host never holds it twice.

  abstract: ShapeDtypeStructs with shardings.
  """
  return ocp.StandardCheckpointHandler(restore_concurrent_gb=_in_flight_gb(jax.tree.leaves(abstract)))


def _in_flight_gb(arrays):
  """Returns how many GB of these arrays are read or written at a time: a part of all, and the largest at least."""
  arrays = [x for x in arrays if hasattr(x, 'sharding')]  # And not NumPy's, which are small.
  here = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize * len(x.sharding.addressable_devices)
             for x in arrays)
  # What was written by one device is read in one piece, and may have been float32.
  largest = max((math.prod(x.shape) * max(x.dtype.itemsize, 4) for x in arrays), default=0)
  return (max(here / PARTS, largest) + 1) / 1e9
