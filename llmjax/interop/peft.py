"""Adapters in the format of Hugging Face peft: adapter_config.json and adapter_model.safetensors, with Llama's names.

peft stores a matrix as [out, in], one array per layer; here it is [layers, *in, *out]. Both rotate the same pairs of
features (the two halves of a head) in rotary embeddings, so nothing is permuted.
"""

import json
import math
import pathlib

import numpy as np

from llmjax.adapt.matrices import matrices, matrix_axes, set_leaf
from llmjax.adapt.spec import AdapterSpec
from llmjax.config import ConfigError
from llmjax.interop import safetensors

PREFIX = 'base_model.model.'
# Our path <-> the module of a Llama; {} is the layer. Experts have no common name there.
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
# Our factor <-> peft's name, and its name for embeddings.
FACTORS = {'a': 'lora_A.weight', 'b': 'lora_B.weight', 'magnitude': 'lora_magnitude_vector'}
EMBEDDED = {'a': 'lora_embedding_A', 'b': 'lora_embedding_B', 'magnitude': 'lora_magnitude_vector'}
CONFIG, WEIGHTS = 'adapter_config.json', 'adapter_model.safetensors'


def export(folder, adapter, spec, base_name=''):
  """Write an adapter as peft does. adapter: nested dict of arrays. spec: its AdapterSpec.

  Raises ConfigError for matrices that have no name there, such as experts.
  """
  arrays, problems, modules = {}, [], set()
  for path, factors in _adapted(adapter):
    in_dims, _ = matrix_axes(path)
    stacked = path.startswith('blocks/')
    if path not in MODULES or factors['a'].ndim != stacked + in_dims + 1:
      problems.append(f'{path} has no name in the peft format; merge the adapter instead: llmjax adapter merge')
      continue
    modules.add(MODULES[path].rsplit('.', 1)[-1])
    names = EMBEDDED if path == 'embed/table' else FACTORS
    for kind, array in factors.items():
      for layer in range(len(array)) if stacked else [None]:
        name = f'{PREFIX}{MODULES[path].format(layer)}.{names[kind]}'
        arrays[name] = _to_peft(kind, np.asarray(array if layer is None else array[layer]))
  if problems:
    raise ConfigError(problems)
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
  """Load an adapter from a folder that peft wrote; returns (adapter, AdapterSpec).

  params: the base's parameters, or their shapes. Raises ConfigError with all problems: config fields that have no
  counterpart here, and arrays with other names or shapes than this model's.
  """
  folder = pathlib.Path(folder)
  config = _read_config(folder / CONFIG)
  arrays, shapes = safetensors.read(folder / WEIGHTS), matrices(params)
  adapter, targets, problems, used = {}, [], [], set()
  for path, module in MODULES.items():
    if path not in shapes:
      continue
    factors = _load_factors(path, module, shapes[path].shape, arrays, config, used, problems)
    if factors:
      targets.append(path)
      for kind, array in factors.items():
        set_leaf(adapter, f'{path}/{kind}', array)
  if unknown := sorted(set(arrays) - used):
    problems.append(f'{folder / WEIGHTS} has {len(unknown)} arrays that this model does not have, such as '
                    f'{unknown[0]} {list(arrays[unknown[0]].shape)}')
  if problems:
    raise ConfigError(problems)
  kind = 'dora' if config.get('use_dora') else 'rslora' if config.get('use_rslora') else 'lora'
  return adapter, AdapterSpec(kind=kind, rank=config['r'], alpha=float(config['lora_alpha']),
                              dropout=float(config.get('lora_dropout') or 0), targets=tuple(targets), name=name)


def _adapted(adapter, prefix=''):
  """Yield (path, factors) of an adapter."""
  for key, value in adapter.items():
    if 'a' in value and not isinstance(value['a'], dict):
      yield prefix + key, value
    else:
      yield from _adapted(value, f'{prefix}{key}/')


def _to_peft(kind, array):
  """Return a factor of one matrix in peft's shape: A [r, in], B [out, r], magnitude [out]."""
  if kind == 'magnitude':
    return array.reshape(-1)
  return (array.reshape(array.shape[0], -1) if kind == 'b' else array.reshape(-1, array.shape[-1])).T


def _load_factors(path, module, shape, arrays, config, used, problems):
  """Return the factors of one of our weights, stacked over layers; {} if the file has none.

  Adds the names that belong to it to `used`, and what is wrong to `problems`.
  """
  in_dims, out_dims = matrix_axes(path)
  stacked = path.startswith('blocks/')
  if len(shape) != stacked + in_dims + out_dims:
    return {}  # Experts.
  inner, outer, rank = shape[stacked:len(shape) - out_dims], shape[len(shape) - out_dims:], config['r']
  our_shapes = {'a': (*inner, rank), 'b': (rank, *outer), 'magnitude': outer}
  suffixes, factors = EMBEDDED if path == 'embed/table' else FACTORS, {}
  for kind in ('a', 'b', 'magnitude') if config.get('use_dora') else ('a', 'b'):
    layers = range(shape[0] if stacked else 1)
    names = [_find_name(arrays, f'{PREFIX}{module.format(i)}.{suffixes[kind]}') for i in layers]
    present = [name for name in names if name]
    if not present and not factors:
      return {}
    used.update(present)
    if len(present) < len(names):
      problems.append(f'{module.format("*")}: {len(names) - len(present)} of {len(names)} layers have no '
                      f'{suffixes[kind]}; either all layers or none must be adapted')
      continue
    loaded = [np.asarray(arrays[name], np.float32) for name in present]
    expected = _to_peft(kind, np.empty(our_shapes[kind], np.int8)).shape
    if any(array.shape != expected for array in loaded):
      problems.append(f'{present[0]} is {list(loaded[0].shape)}, and this model needs {list(expected)}')
      continue
    ours = [(array if kind == 'magnitude' else array.T).reshape(our_shapes[kind]) for array in loaded]
    factors[kind] = np.stack(ours) if stacked else ours[0]
  return factors


def _find_name(arrays, name):
  """Return the name of an array in the file, or None: some versions of peft add `.weight` to magnitudes."""
  return next((n for n in (name, f'{name}.weight') if n in arrays), None)


# Fields of a LoraConfig and the values that are supported; None: any, because the field does not change the meaning of
# the arrays. Initializations that change the base (PiSSA, OLoRA, CorDA, LoftQ) give arrays for that changed base.
FIELDS = {
    'peft_type': ('LORA',), 'task_type': ('CAUSAL_LM', None), 'bias': ('none',),
    'init_lora_weights': (True, False, 'gaussian'), 'use_rslora': (True, False), 'use_dora': (True, False),
    **dict.fromkeys(('r', 'lora_alpha', 'lora_dropout')),  # Checked separately.
    **dict.fromkeys(('auto_mapping', 'base_model_name_or_path', 'revision', 'inference_mode', 'peft_version',
                     'target_modules', 'exclude_modules', 'layers_pattern', 'runtime_config',
                     'megatron_core', 'qalora_group_size')),  # The last two have no effect unless another field is set.
}


def _read_config(file):
  """Read adapter_config.json. Raises ConfigError with every setting that is invalid or not supported."""
  try:
    config = json.loads(file.read_bytes())
  except OSError as e:
    raise ConfigError([f'{file} cannot be read: {e.strerror or e}; give a folder that peft has written']) from e
  except (ValueError, RecursionError) as e:
    raise ConfigError([f'{file} is not JSON: {e}']) from e
  if not isinstance(config, dict) or not {'r', 'lora_alpha'} <= set(config):
    raise ConfigError([f'{file} is not the config of a LoRA: it has no r and lora_alpha'])
  problems = []
  if type(config['r']) is not int or config['r'] < 1:
    problems.append(f'r={config["r"]!r} must be a whole number of at least 1')
  for name, limit in (('lora_alpha', math.inf), ('lora_dropout', 1)):
    value = config.get(name) or 0
    if type(value) not in (int, float) or not 0 <= value < limit:
      problems.append(f'{name}={value!r} must be a number of at least 0' + f' and below {limit}' * (limit == 1))
  for name, value in config.items():
    if name in FIELDS:
      supported = FIELDS[name] is None or any(value is v or type(value) is str and value == v for v in FIELDS[name])
    else:
      supported = value in (None, False, '') or value in ([], {})  # Off; also fields of later versions.
    if not supported:
      problems.append(f'{name}={value!r} has no counterpart here')
  if config.get('use_rslora') and config.get('use_dora'):
    problems.append('use_rslora and use_dora together have no counterpart here')
  if problems:
    raise ConfigError([f'{file}: {line}' for line in problems])
  return config
