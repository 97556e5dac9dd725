"""`llmjax adapter show | merge | export | import`: inspect and convert adapters."""

import json
import os
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np

from llmjax import config
from llmjax.adapt.lora import count
from llmjax.adapt.matrices import path_text
from llmjax.adapt.spec import AdapterExportOptions, AdapterImportOptions, AdapterMergeOptions, AdapterShowOptions
from llmjax.checkpoint import bases
from llmjax.checkpoint.arrays import read_json
from llmjax.checkpoint.checkpoints import Checkpoints
from llmjax.checkpoint.load import checkpoints_folder, find_step, is_adapter, load_adapters, load_params, read_config
from llmjax.checkpoint.recorded import absolute_paths
from llmjax.config import ConfigError
from llmjax.interop import peft
from llmjax.model.model import Model
from llmjax.model.spec import ModelSpec
from llmjax.run.initial import initial_checkpoint
from llmjax.train.state import TrainState

# Files of a run that are copied along with its weights.
COPIED = ('tokenizer.model', 'chat_template.json')


def run(spec, options):
  """Run the action that belongs to the options; returns the exit status."""
  del spec  # The command takes none.
  return ACTIONS[type(options)](options)


def show(options):
  """Print an adapter's settings, its base, and a row for each array."""
  checkpoint, adapters, specs, _ = _load(options)
  base = read_json(checkpoint, 'stream')['base']
  print(f'{checkpoint}\nbase: {base["path"]}, SHA-256 of its parameters {base["sha256"]}')
  for name, adapter in adapters.items():
    spec = specs[name]
    arrays, size = count(adapter)
    print(f'{name}: {spec.kind}, rank {spec.rank}, alpha {spec.alpha:g} (scale {spec.scale:g}), dropout '
          f'{spec.dropout:g}, base {spec.quantize or "not quantized"}; {size:,} values in {arrays} arrays')
    flat = jax.tree_util.tree_flatten_with_path(adapter)[0]
    width = max(len(path_text(path)) for path, _ in flat)
    for path, leaf in flat:
      shape = 'x'.join(map(str, leaf.shape))
      print(f'  {path_text(path):<{width}}  {shape:>18}  norm {float(jnp.linalg.norm(leaf)):.6g}')
  return 0


def merge(options):
  """Write a run whose parameters are the base with the adapter merged in."""
  output = _new_folder(options.output)
  _require_adapter(options)
  params, _, settings, step = load_params(options.workdir, options.step)
  settings = {k: v for k, v in settings.items() if k != 'adapter'}
  settings['train'] = {**settings['train'], 'init_from': ''}
  _write_run(output, params, settings, step, {'batches': 0, 'fingerprint': 'merged'}, options.workdir)
  print(f'{output}: step {step} of {options.workdir}, merged into its base')
  return 0


def export_peft(options):
  """Write the adapter in the format of peft."""
  output = _new_folder(options.output)
  _, adapters, specs, settings = _load(options)
  for name, adapter in adapters.items():
    peft.export(output, jax.device_get(adapter), specs[name], options.base_name or settings['train']['init_from'])
  print(f'{output}: {peft.CONFIG} and {peft.WEIGHTS}')
  return 0


def import_peft(options):
  """Write a run that holds an adapter from peft, with a run of ours as its base."""
  output = _new_folder(options.workdir)
  checkpoint = initial_checkpoint(options.init_from)
  run_folder = checkpoint.parent.parent
  settings = read_config(run_folder)
  model = config.build(ModelSpec, settings['model'])
  shapes = Model(model).abstract_params()
  adapter, spec = peft.load(options.peft, shapes)
  settings['adapter'] = config.to_dict(spec)
  settings['train'] = {**settings['train'], 'init_from': str(checkpoint), 'param_dtype': 'float32'}
  stream = {'batches': 0, 'fingerprint': 'imported', 'base': bases.identify(checkpoint)}
  params = jax.tree.map(jnp.asarray, {spec.name: adapter})
  _write_run(output, params, settings, 0, stream, run_folder)
  arrays, size = count(adapter)
  print(f'{output}: {spec.kind}, rank {spec.rank}, {size:,} values in {arrays} arrays, on {checkpoint}')
  return 0


def _load(options):
  """Load (checkpoint, adapters, specs, config) of a run."""
  checkpoint = _require_adapter(options)
  settings = read_config(options.workdir)
  model = config.build(ModelSpec, settings['model'])
  single = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  shapes = Model(model).abstract_params(settings['train']['param_dtype'])
  abstract = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=single), shapes)
  _, adapters, specs = load_adapters(checkpoint, abstract, with_base=False)
  return checkpoint, adapters, specs, settings


def _require_adapter(options):
  """Return the selected checkpoint. Raises ConfigError if it holds no adapter."""
  checkpoint = checkpoints_folder(options.workdir) / str(find_step(options.workdir, options.step))
  if not is_adapter(checkpoint):
    raise ConfigError([f'--workdir={options.workdir} holds a full model and no adapter; give a run with adapter.kind'])
  return checkpoint


def _new_folder(folder):
  """Return the path of a folder to write. Raises ConfigError if it exists and is not empty."""
  path = pathlib.Path(folder)
  if path.exists() and (not path.is_dir() or any(path.iterdir())):
    raise ConfigError([f'{folder} exists already; name a new folder'])
  return path


def _write_run(folder, params, settings, step, stream, source):
  """Write a run with one checkpoint that has no optimizer state."""
  folder.mkdir(parents=True, exist_ok=True)
  (folder / 'config.json').write_text(json.dumps(absolute_paths(settings), indent=2) + '\n')
  for name in COPIED:
    if os.path.exists(os.path.join(source, name)):
      shutil.copyfile(os.path.join(source, name), folder / name)
  state = TrainState(step=jnp.asarray(step, jnp.int32), params=params, opt_state=(),
                     key=np.asarray(jax.random.key_data(jax.random.key(0))))
  checkpoints = Checkpoints(folder)
  checkpoints.save(step, state, stream, settings)
  checkpoints.close()


ACTIONS = {AdapterShowOptions: show, AdapterMergeOptions: merge, AdapterExportOptions: export_peft,
           AdapterImportOptions: import_peft}
