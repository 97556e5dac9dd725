"""The plan in closed forms: memory, time and bytes of a step from the config alone.  No JAX here.

What a compiled program has and these forms approximate is held against compiled programs in
tests/plan/test_closed.py and experiments/tpu_calibration.
"""

import dataclasses
import itertools
import math

from llmjax.model import counts
from llmjax.parallel.spec import AXES

# Fitted to programs of libtpu 0.0.42.1 (jax 0.10.2) of the dense recipes in experiments/tpu_calibration, v5e's and
# v6e's to theirs: the part of the peak that wide matrix products reach, by generation, what of it is lost for each
# width of the matrix unit over the model's, and how often a layer's residual stream [tokens, D] goes through memory
# outside of products.
PRODUCTS, OTHER_PRODUCTS, LOST_WIDTHS = {'v5e': 0.93, 'v6e': 0.67}, 0.845, 1.6
STREAM_PASSES, OTHER_STREAM_PASSES = {'v6e': 64}, 150
# Keys of a block of attention; blocks that a causal mask cuts are computed whole.
KEYS_OF_BLOCK = 1024
# Of collectives beside which there is enough to do, the part that the core still waits for.
HIDDEN_REST = 0.05


def product_efficiency(topology, d_model):
  """Returns the part of the peak that a layer's products reach."""
  best = PRODUCTS.get(topology.chip.name, OTHER_PRODUCTS)
  return best * max(1 - LOST_WIDTHS * topology.array / d_model, 0.3)


def plan(spec, topology):
  """Returns the plan of a spec whose mesh fills the chips: the dict of `loops.plan`, without what needs a program."""
  result = outline(spec, topology)
  memory = estimate_memory(spec, topology)
  parts, rows = estimate_seconds(spec, topology)
  result.update(
      source='closed forms', hbm_bytes={**memory, 'limit': topology.device_hbm}, collectives=rows, cycles=None,
      parts=parts, step_seconds=sum(parts.values()), network_seconds=sum(r['seconds'] for r in rows),
      largest=[], kept=[], fits=memory['total'] <= topology.device_hbm)
  result['arrays'] = [] if result['fits'] else largest(spec, topology)
  return rate(result, spec, topology)


def causal_part(spec):
  """Returns what part of all pairs of queries and keys a causal mask, or a window, lets through."""
  length, window = spec.data.seq_len, spec.model.window
  if window and window < length:
    return (window * (window + 1) / 2 + (length - window) * window) / length**2
  return 0.5


def outline(spec, topology):
  """Returns the entries that are known without a program."""
  sizes = {axis: spec.mesh.size(axis) for axis in AXES if spec.mesh.size(axis) > 1}
  return {'topology': topology.name, 'slices': topology.slices, 'chips': topology.chips, 'devices': topology.devices,
          'links': topology.links(), 'peak_flops': topology.chip.peak_flops, 'mesh': sizes,
          'model': spec.model.preset or 'custom', 'parameters': counts.count_params(spec.model)['total'],
          'batch_size': spec.train.batch_size, 'seq_len': spec.data.seq_len, 'remat': spec.train.remat,
          'gradient_accumulation_steps': spec.train.gradient_accumulation_steps}


def rate(plan, spec, topology):
  """Adds what follows from the seconds of a step; returns the plan."""
  tokens = spec.train.batch_size * spec.data.seq_len
  flops = counts.train_flops_per_token(spec.model, spec.data.seq_len)
  seconds = plan['step_seconds']
  per_chip = tokens / seconds / topology.chips
  plan.update(tokens_per_step=tokens, tokens_per_second_per_chip=per_chip,
              mfu=per_chip * flops / topology.chip.peak_flops,
              budget={'tokens': tokens * spec.train.steps, 'steps': spec.train.steps,
                      'seconds': seconds * spec.train.steps})
  return plan


def _bytes(dtype):
  return {'float32': 4, 'bfloat16': 2}[dtype]


def param_shards(spec):
  """Returns into how many parts (layers' parameters, embedding and head) are divided."""
  size = spec.mesh.size
  layers = size('fsdp') * size('stage') * size('tensor') * size('expert')
  shared = size('data') if spec.mesh.zero == 3 else 1
  return layers * shared, size('fsdp') * size('expert') * size('stage') * size('tensor') * shared


def local_tokens(spec):
  """Returns the tokens of one microbatch of gradient accumulation on one device."""
  shards = spec.mesh.size('data', 'fsdp', 'stage', 'expert', 'context')
  return spec.train.batch_size * spec.data.seq_len / shards / spec.train.gradient_accumulation_steps


def pipeline_turns(spec):
  """Returns (microbatches, how often each stage works on all of its layers, the bubble included); (1, 1) without."""
  if (stages := spec.mesh.size('stage')) == 1:
    return 1, 1
  rows = max(int(spec.train.batch_size / spec.mesh.size('data', 'fsdp', 'expert')), 1)
  microbatches = spec.pipeline.count(stages, rows)
  return microbatches, microbatches + (stages - 1) / spec.pipeline.groups


def mlp_width(spec):
  """Returns the values of a token in a wide array of the MLP: along `expert` each device has room for all of them."""
  m = spec.model
  return m.mlp_dim * (m.experts_per_token * spec.mesh.size('expert') + m.shared_experts if m.num_experts else 1)


def kept_values(spec):
  """Returns {what: values of a token} that each layer keeps for the backward pass (model/stack.py has the table)."""
  m = spec.model
  d, q, kv = m.d_model, m.num_heads * m.resolved_head_dim, m.resolved_kv_heads * m.resolved_head_dim
  f = mlp_width(spec)
  heads = {'queries': q, 'keys and values': 2 * kv}
  wide = {'gate and up of the MLP': 2 * f}
  return {'full': {'input of each layer': d}, 'offload': {},
          'minimal': {'inputs of attention and MLP': 2 * d, 'output of attention': q, **heads, **wide},
          'out': {'input of attention': d, 'output of attention': q, **heads, **wide},
          'mlp': {'inputs of attention and MLP': 2 * d, 'output of attention': q, **heads},
          'dots': {'inputs and outputs of products': 3 * d, **heads, **wide},
          'none': {'norms, residuals and outputs': 10 * d, 'output of attention': q, **heads,
                   'gate, up, activations and products of the MLP': 7 * f}}[spec.train.remat]


def largest(spec, topology):
  """Returns what takes most memory on one device, the largest first: [{'what', 'type', 'bytes', 'count'}].

  For programs that the compiler refuses without a word on their arrays.
  """
  m, train = spec.model, spec.train
  tokens, tensor = int(local_tokens(spec)), spec.mesh.size('tensor')
  memory = estimate_memory(spec, topology)
  layers = m.num_layers // spec.mesh.size('stage')
  rows = [(f'kept by remat {train.remat}: {what}', f'{train.compute_dtype}[{tokens},{n // tensor}]',
           tokens * (n // tensor) * _bytes(train.compute_dtype), layers) for what, n in kept_values(spec).items()]
  rows += [('parameters', train.param_dtype, memory['parameters'], 1),
           ('optimizer', spec.optimizer.moment_dtype, memory['optimizer'], 1),
           ('gradients', '', memory['gradients'], 1),
           ('one layer at work, embedding and head', '', memory['temporaries'], 1)]
  found = [dict(what=what, type=type_, bytes=int(size), count=count) for what, type_, size, count in rows if size]
  return sorted(found, key=lambda row: -row['bytes'] * row['count'])


def _mlp_products(model):
  """Returns the parameters of a layer's MLP that a token multiplies."""
  experts = model.experts_per_token + model.shared_experts if model.num_experts else 1
  return 3 * model.d_model * model.mlp_dim * experts


def estimate_memory(spec, topology):
  """Returns bytes of one device: parameters, optimizer, gradients, activations, temporaries, total."""
  m, train, size = spec.model, spec.train, spec.mesh.size
  count = counts.count_params(m)
  layers, ends = param_shards(spec)
  local = count['blocks'] / layers + (count['embed'] + count['head']) / ends
  width, compute = _bytes(train.param_dtype), _bytes(train.compute_dtype)
  moments = {'adamw': 2, 'muon': 1, 'lion': 1, 'adafactor': 0, 'sgd': 1}[spec.optimizer.name]
  moment_shards = size('data') if spec.mesh.zero == 1 else 1
  optimizer = moments * local * _bytes(spec.optimizer.moment_dtype) / moment_shards
  # Summed over microbatches gradients are of the parameters' dtype; those of one batch stay as they come.
  gradients = local * (width if train.gradient_accumulation_steps > 1 else compute)
  tokens, tensor = local_tokens(spec), size('tensor')
  stages = size('stage')
  microbatches, turns = pipeline_turns(spec)
  kept = sum(kept_values(spec).values()) * compute * tokens * m.num_layers / tensor
  if stages > 1 and spec.pipeline.schedule == '1f1b':
    kept *= min(1, stages / microbatches)
  elif stages > 1:
    # The bubble's are kept as well, and of each tick its layers' own part of the weights.
    kept = kept * turns / microbatches + turns * count['blocks'] / layers * compute
  f = mlp_width(spec)
  layer = count['blocks'] / m.num_layers / (tensor * size('expert'))
  # A layer at work: its whole weights twice, as many of their gradients (half of both where each grouped product
  # gathers its own), and what passes between its products.
  working = (2 if m.num_experts else 4) * layer * compute + tokens / tensor * (4 * f + 14 * m.d_model) * compute
  head = m.vocab_size * m.d_model / tensor * (2 * compute + 4)
  temporaries = working + 2 * head
  code = 64 << 20
  batch = 5 * 4 * spec.train.batch_size * spec.data.seq_len / size('data', 'fsdp', 'stage', 'expert', 'context')
  arguments = local * width + optimizer + batch
  parts = {'parameters': local * width, 'optimizer': optimizer, 'gradients': gradients, 'activations': kept,
           'temporaries': temporaries, 'batch': batch, 'arguments': arguments, 'code': code,
           'temp': gradients + kept + temporaries}
  return {**{k: int(v) for k, v in parts.items()}, 'total': int(arguments + parts['temp'] + code)}


def estimate_seconds(spec, topology):
  """Returns ({'matmul', 'kernel', 'other', 'exposed'}: seconds of a step, rows of collectives)."""
  m, train = spec.model, spec.train
  devices = topology.devices
  tokens = train.batch_size * spec.data.seq_len / devices  # Of a step, on one device.
  attention = counts.train_flops_per_token(m, spec.data.seq_len) - 6 * counts.matmul_params(m)
  layers_params = counts.matmul_params(m) - m.vocab_size * m.d_model
  out = m.d_model * m.num_heads * m.resolved_head_dim
  again = {'mlp': 2 * m.num_layers * _mlp_products(m) / 3 / layers_params, 'full': 1.0,
           'out': m.num_layers * out / layers_params}.get(train.remat, 0.0)
  products = (6 + 2 * again) * layers_params + 6 * m.vocab_size * m.d_model
  # Two backward kernels each compute the attention weights again: 9 products of which the model's own count has 6.
  kernel = attention * (9 + 2 * (train.remat == 'full')) / 6
  kernel *= (1 + KEYS_OF_BLOCK / max(spec.data.seq_len, KEYS_OF_BLOCK)) / min(m.resolved_head_dim / topology.array, 1)
  peak = topology.device_peak
  passes = STREAM_PASSES.get(topology.chip.name, OTHER_STREAM_PASSES)
  stream = tokens * m.num_layers * m.d_model * 2 * passes
  parts = {'matmul': tokens * products / peak / product_efficiency(topology, m.d_model),
           'kernel': tokens * kernel / peak,
           'other': stream / (topology.chip.hbm_rate / topology.chip.devices)}
  microbatches, turns = pipeline_turns(spec)
  parts['bubble'] = (turns / microbatches - 1) * sum(parts.values())
  rows = communicate(spec, topology)
  waiting = sum(r['seconds'] for r in rows if not r['asynchronous'])
  hidden = sum(r['seconds'] for r in rows if r['asynchronous'])
  parts['exposed'] = waiting + max(hidden - parts['matmul'], HIDDEN_REST * hidden)
  return parts, rows


def communicate(spec, topology):
  """Returns the collectives of a step as rows; seconds are theirs alone, and `asynchronous` ones hide."""
  m, size = spec.model, spec.mesh.size
  count, compute = counts.count_params(m), _bytes(spec.train.compute_dtype)
  times = spec.train.gradient_accumulation_steps
  tokens = local_tokens(spec)
  inside = lambda axis: getattr(spec.mesh, axis)
  rows = []

  def add(kind, axes, bytes_, sent, runs, hides=False):
    n = math.prod(inside(a) for a in axes)
    across = math.prod(getattr(spec.mesh, f'dcn_{a}', 1) for a in axes)
    near, far = sent * (n - 1) / n, sent / n * (across - 1) / across
    seconds = near / rate_of(topology, n) if n > 1 else 0.0
    if across > 1:
      seconds += far / (topology.chip.dcn_rate / topology.chip.devices)
    if seconds:
      rows.append(dict(kind=kind, axes=list(axes), asynchronous=hides, network='dcn' if across > 1 else 'ici',
                       places=1, runs=int(runs), bytes=int(bytes_ * runs), sent_bytes=int((near + far) * runs),
                       seconds=seconds * runs))

  # Stages gather their weights, and sum their gradients, anew for each tick.
  microbatches, turns = pipeline_turns(spec)
  weights = count['total'] * compute / size('tensor') / size('stage') / size('expert')
  weights_axes = ('fsdp',)
  if size('fsdp') > 1:
    # On slices with rings libtpu lets the core wait for gathers and reductions; elsewhere it starts them early.  Over
    # a whole torus it writes them as all-reduces, which send twice as much.
    rings = [topology.chip.tpu and topology.is_ring(dim) for dim in range(len(topology.shape))]
    torus = inside('fsdp') == topology.devices // topology.slices and all(rings)
    sent = (2 if torus else 1) * weights
    add('all-gather', weights_axes, weights, sent, 2 * times * turns, not any(rings))
    add('reduce-scatter', weights_axes, weights, sent, times * turns, not any(rings))
  if size('data') > 1:
    part = weights / size('fsdp')
    if spec.mesh.zero == 3:
      add('all-gather', ('data',), part, part, 2 * times * turns)
      add('reduce-scatter', ('data',), part, part, times * turns)
    else:
      add('all-reduce', ('data',), part, 2 * part, times * turns)
  stream = tokens * m.d_model * compute
  if size('tensor') > 1:
    add('all-gather', ('tensor',), stream, stream, 6 * m.num_layers * times)
    add('reduce-scatter', ('tensor',), stream, stream, 4 * m.num_layers * times)
  if (ring := size('context')) > 1:
    keys = 2 * tokens * m.resolved_kv_heads * m.resolved_head_dim * compute
    add('collective-permute', ('context',), keys, keys, 4 * (ring - 1) * m.num_layers * times)
  if size('expert') > 1:
    add('all-to-all', ('expert',), stream * m.experts_per_token, stream * m.experts_per_token / 4,
        4 * m.num_layers * times)
  if (stages := size('stage')) > 1:
    row = stream * stages / microbatches
    add('collective-permute', ('stage',), row, row, 2 * times * turns * spec.pipeline.groups, True)
  return rows


def rate_of(topology, devices):
  """Returns the bytes/s at which each of so many devices of a slice sends round a ring or line through them.

  The devices take as many whole dimensions of the slice as they need, the fewest; on a part of a dimension they
  form a line.  Devices of one chip share its links.
  """
  chip = topology.chip
  chips = max(devices // chip.devices, 1)
  best = None
  for used in itertools.product((False, True), repeat=len(topology.shape)):
    dims = [i for i, u in enumerate(used) if u and topology.shape[i] > 1]
    reach = math.prod(topology.shape[i] for i in dims)
    if dims and reach >= chips and (best is None or reach < best[0]):
      both_ways = lambda i: not chip.tpu or (topology.is_ring(i) and topology.shape[i] > 2)
      whole = reach == chips
      best = reach, sum(chip.link_rate * (2 if whole and both_ways(i) else 1) for i in dims)
  if best is None:  # Within one chip.
    return chip.links * chip.link_rate
  return best[1] * min(devices / chips, chip.devices) / chip.devices


def changes_that_fit(spec, topology, scale=1.0, most=3):
  """Returns changes of the config that fit by closed forms, the fastest first: [{'change', 'total', ...}].

  Those that keep the global batch go before those that do not.
  scale: what the compiler found over what the closed forms say of the spec as it is.
  """
  found = []
  for change in _changes(spec, topology):
    try:
      other = change_spec(spec, change)
    except ValueError:
      continue
    if any(True for _ in other.settled_problems()):
      continue
    result = plan(other, topology)
    total = result['hbm_bytes']['total'] * scale
    if total <= topology.device_hbm:
      found.append({'change': change, 'total': int(total),
                    'tokens_per_second_per_chip': result['tokens_per_second_per_chip']})
  # What one change does, a second one beside it need not help.
  needed = [row for row in found
            if not any(other['change'].items() < row['change'].items() for other in found)]
  best = {}
  for row in sorted(needed, key=lambda r: -r['tokens_per_second_per_chip']):
    best.setdefault(tuple(row['change']), row)  # The fastest of each kind.
  # Another global batch is another training run: only where nothing else is left.
  ranked = sorted(best.values(), key=lambda r: ('train.batch_size' in r['change'], -r['tokens_per_second_per_chip'],
                                                len(r['change'])))
  return ranked[:most]


def _changes(spec, topology):
  """Yields changes {'train.remat': 'full', ...} that save memory, one or two at a time."""
  train, mesh = spec.train, spec.mesh
  remats = [{'train.remat': r} for r in ('dots', 'minimal', 'out', 'mlp', 'full') if r != train.remat]
  accumulations = [{'train.gradient_accumulation_steps': train.gradient_accumulation_steps * n} for n in (2, 4, 8, 16)]
  batches = [{'train.batch_size': train.batch_size // n} for n in (2, 4, 8) if train.batch_size % n == 0]
  moments = [{'optimizer.moment_dtype': 'bfloat16'}] if spec.optimizer.moment_dtype == 'float32' else []
  meshes = []
  if mesh.data > 1:
    meshes.append({'mesh.data': 1, 'mesh.fsdp': mesh.fsdp * mesh.data})
  for n in (2, 4, 8):
    if mesh.fsdp % n == 0 and mesh.fsdp > 1:
      meshes.append({'mesh.fsdp': mesh.fsdp // n, 'mesh.tensor': mesh.tensor * n})
  single = [remats, accumulations, moments, meshes, batches]
  for group in single:
    yield from group
  for first, second in itertools.combinations(single, 2):
    for a, b in itertools.product(first, second):
      yield {**a, **b}


def change_spec(spec, change):
  """Returns the spec with dotted fields changed."""
  for name, value in change.items():
    group, field = name.split('.')
    spec = dataclasses.replace(spec, **{group: dataclasses.replace(getattr(spec, group), **{field: value})})
  return spec


def mesh_shapes(devices, axes=AXES):
  """Yields every {axis: size} of these axes whose sizes multiply to a number of devices."""
  if len(axes) == 1:
    yield {axes[0]: devices}
    return
  for n in range(1, devices + 1):
    if devices % n == 0:
      yield from ({axes[0]: n, **rest} for rest in mesh_shapes(devices // n, axes[1:]))
