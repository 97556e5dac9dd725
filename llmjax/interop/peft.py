"""Adapters in the format of peft: adapter_config.json and adapter_model.safetensors, names as in Llama.

peft keeps a matrix as [out, in], one file entry for each layer; here it is [layers, *in, *out].  Rotary
positions turn the same pairs of features in both (the two halves of a head), so no rows are permuted.
"""

import json
import math
import pathlib

import numpy as np

from llmjax.adapt.matrices import matrices, matrix_axes, place
from llmjax.adapt.spec import AdapterSpec
from llmjax.config import ConfigError
from llmjax.interop import safetensors

PREFIX = 'base_model.model.'
# Our path <-> the module of a Llama; {} is the layer.  Experts have no common name there.
MODULES = {
    'blocks/attention/query': 'model.layers.{}.self_attn.q_proj',
    'blocks/attention/key': 'model.layers.{}.self_attn.k_proj',
    'blocks/attention/value': 'model.layers.{}.self_attn.v_proj',
    'blocks/attention/out': 'model.layers.{}.self_attn.o_proj',
    'blocks/mlp/gate': 'model.layers.{}.mlp.gate_proj',
    'blocks/mlp/up': 'model.layers.{}.mlp.up_proj',
    'blocks/mlp/down': 'model.layers.{}.mlp.down_proj',
    'head/kernel': 'lm_head',
    'embed/table': 'model.embed_tokens',
}
# Our factor <-> peft's entry, and for embeddings, which it keeps another way round.
FACTORS = {'a': 'lora_A.weight', 'b': 'lora_B.weight', 'magnitude': 'lora_magnitude_vector'}
EMBEDDED = {'a': 'lora_embedding_A', 'b': 'lora_embedding_B', 'magnitude': 'lora_magnitude_vector'}
CONFIG, WEIGHTS = 'adapter_config.json', 'adapter_model.safetensors'


def export(folder, adapter, spec, base_name=''):
  """Writes an adapter as peft keeps it.  adapter: nested dict of arrays.  spec: its AdapterSpec.

  Raises ConfigError for what has no name there, such as experts.
  """
  arrays, wrong, modules = {}, [], set()
  for path, factors in _weights(adapter):
    in_dims, out_dims = matrix_axes(path)
    stacked = path.startswith('blocks/')
    if path not in MODULES or factors['a'].ndim != stacked + in_dims + 1:
      wrong.append(f'{path} has no name in the peft format; merge the adapter instead: llmjax adapter merge')
      continue
    modules.add(MODULES[path].rsplit('.', 1)[-1])
    names = EMBEDDED if path == 'embed/table' else FACTORS
    for kind, array in factors.items():
      for layer in range(len(array)) if stacked else [None]:
        name = f'{PREFIX}{MODULES[path].format(layer)}.{names[kind]}'
        arrays[name] = _flatten(kind, np.asarray(array if layer is None else array[layer]), in_dims)
  if wrong:
    raise ConfigError(wrong)
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  safetensors.write(folder / WEIGHTS, arrays)
  alpha = int(spec.alpha) if float(spec.alpha).is_integer() else spec.alpha
  config = {'peft_type': 'LORA', 'task_type': 'CAUSAL_LM', 'base_model_name_or_path': base_name, 'r': spec.rank,
            'lora_alpha': alpha, 'lora_dropout': spec.dropout, 'use_rslora': spec.kind == 'rslora',
            'use_dora': spec.kind == 'dora', 'target_modules': sorted(modules), 'bias': 'none',
            'fan_in_fan_out': False, 'inference_mode': True, 'init_lora_weights': True, 'modules_to_save': None}
  (folder / CONFIG).write_text(json.dumps(config, indent=2) + '\n')


def load(folder, params, name='default'):
  """Returns (adapter, AdapterSpec) of a folder as peft writes it, for a model of these parameters (or shapes).

  Raises ConfigError, with all that is wrong, for what llmjax has not: fields of the config beyond FIELDS that are set,
  and entries whose name or shape is not this model's.
  """
  folder = pathlib.Path(folder)
  config = _read_config(folder / CONFIG)
  arrays, shapes = safetensors.read(folder / WEIGHTS), matrices(params)
  adapter, targets, wrong, used = {}, [], [], set()
  for path, module in MODULES.items():
    if path not in shapes:
      continue
    factors = _gather(path, module, shapes[path].shape, arrays, config, used, wrong)
    if factors:
      targets.append(path)
      for kind, array in factors.items():
        place(adapter, f'{path}/{kind}', array)
  if unknown := sorted(set(arrays) - used):
    wrong.append(f'{folder / WEIGHTS} has {len(unknown)} arrays that this model has no place for, such as '
                 f'{unknown[0]} {list(arrays[unknown[0]].shape)}')
  if wrong:
    raise ConfigError(wrong)
  kind = 'dora' if config.get('use_dora') else 'rslora' if config.get('use_rslora') else 'lora'
  return adapter, AdapterSpec(kind=kind, rank=config['r'], alpha=float(config['lora_alpha']),
                              dropout=float(config.get('lora_dropout') or 0), targets=tuple(targets), name=name)


def _weights(adapter, prefix=''):
  """Yields (path, factors) of an adapter."""
  for key, value in adapter.items():
    if 'a' in value and not isinstance(value['a'], dict):
      yield prefix + key, value
    else:
      yield from _weights(value, f'{prefix}{key}/')


def _flatten(kind, array, in_dims):
  """Returns a factor of one matrix as peft has it: A [r, in], B [out, r], a magnitude [out]."""
  if kind == 'magnitude':
    return np.ascontiguousarray(array.reshape(-1))
  rank_first = kind == 'b'
  flat = array.reshape(array.shape[0], -1) if rank_first else array.reshape(-1, array.shape[-1])
  return np.ascontiguousarray(flat.T)


def _gather(path, module, shape, arrays, config, used, wrong):
  """Returns the factors of one of our weights, stacked over layers; {} where the file has none."""
  in_dims, out_dims = matrix_axes(path)
  stacked = path.startswith('blocks/')
  inner = shape[stacked:len(shape) - out_dims]
  outer, rank = shape[len(shape) - out_dims:], config['r']
  ours = {'a': (*inner, rank), 'b': (rank, *outer), 'magnitude': outer}
  names, factors = EMBEDDED if path == 'embed/table' else FACTORS, {}
  if len(shape) != stacked + in_dims + out_dims:
    return {}  # Experts.
  kinds = ('a', 'b', 'magnitude') if config.get('use_dora') else ('a', 'b')
  for kind in kinds:
    entries = [_entry(arrays, f'{PREFIX}{module.format(i)}.{names[kind]}') for i in range(shape[0] if stacked else 1)]
    found = [e for e in entries if e]
    if not found and not factors:
      return {}
    if len(found) < len(entries):
      wrong.append(f'{module.format("*")}: {len(entries) - len(found)} of {len(entries)} layers have no {names[kind]}; '
                   'all layers are adapted here, or none')
      used.update(found)
      continue
    used.update(found)
    expected = _flatten(kind, np.empty(ours[kind], np.int8), in_dims).shape
    loaded = [np.asarray(arrays[name], np.float32) for name in found]
    if any(array.shape != expected for array in loaded):
      wrong.append(f'{found[0]} is {list(loaded[0].shape)}, and this model wants {list(expected)}')
      continue
    turn = lambda array, kind=kind: (array if kind == 'magnitude' else array.T).reshape(ours[kind])
    factors[kind] = np.stack([turn(a) for a in loaded]) if stacked else turn(loaded[0])
  return factors


def _entry(arrays, name):
  """Returns the file's name for an entry, or None: some versions of peft have `.weight` behind a magnitude."""
  return next((n for n in (name, f'{name}.weight') if n in arrays), None)


# Fields of a LoraConfig, and the values that mean here what they mean there; None: any, for it does not change what the
# arrays stand for.  Methods that begin by changing the base (PiSSA, OLoRA, CorDA, LoftQ) leave arrays for that base.
FIELDS = {
    'peft_type': ('LORA',), 'task_type': ('CAUSAL_LM', None), 'bias': ('none',),
    'init_lora_weights': (True, False, 'gaussian'), 'use_rslora': (True, False), 'use_dora': (True, False),
    **dict.fromkeys(('r', 'lora_alpha', 'lora_dropout')),  # Checked by themselves.
    **dict.fromkeys(('auto_mapping', 'base_model_name_or_path', 'revision', 'inference_mode', 'peft_version',
                     'target_modules', 'exclude_modules', 'layers_pattern', 'runtime_config',
                     'megatron_core', 'qalora_group_size')),  # The last two without effect unless another field is set.
}


def _read_config(file):
  """Returns adapter_config.json; raises ConfigError, with all that is wrong, when llmjax has not what it asks for."""
  try:
    config = json.loads(file.read_bytes())
  except OSError as e:
    raise ConfigError([f'{file} cannot be read: {e.strerror or e}; give a folder that peft has written']) from e
  except (ValueError, RecursionError) as e:
    raise ConfigError([f'{file} is not JSON: {e}']) from e
  if not isinstance(config, dict) or not {'r', 'lora_alpha'} <= set(config):
    raise ConfigError([f'{file} is no config of a LoRA: it has no r and lora_alpha'])
  wrong = []
  if type(config['r']) is not int or config['r'] < 1:
    wrong.append(f'r={config["r"]!r} must be a whole number of at least 1')
  for name, most in (('lora_alpha', math.inf), ('lora_dropout', 1)):
    value = config.get(name) or 0
    if type(value) not in (int, float) or not 0 <= value < most:
      wrong.append(f'{name}={value!r} must be a number of at least 0' + f' and below {most}' * (most == 1))
  for name, value in config.items():
    if name in FIELDS:
      known = FIELDS[name] is None or any(value is v or type(value) is str and value == v for v in FIELDS[name])
    else:
      known = value in (None, False, '') or value in ([], {})  # Switched off, also what later versions add.
    if not known:
      wrong.append(f'{name}={value!r} has no counterpart here')
  if config.get('use_rslora') and config.get('use_dora'):
    wrong.append('use_rslora and use_dora together have no counterpart here')
  if wrong:
    raise ConfigError([f'{file}: {line}' for line in wrong])
  return config
