"""Analytical model of a training step: memory, time and communication from the config alone.  Imports no JAX.

tests/plan/test_analytical.py and experiments/tpu_calibration compare it with compiled programs.
"""

import dataclasses
import itertools
import math

from llmjax.model import counts
from llmjax.parallel.spec import AXES

# Constants fitted to programs that libtpu 0.0.42.1 (jax 0.10.2) compiled of the dense recipes in
# experiments/tpu_calibration; v5e and v6e have their own.  PEAK_FRACTION: fraction of peak FLOP/s that wide matrix
# products reach.  WIDTH_LOSS: relative loss per ratio of the matrix unit's width to d_model.  STREAM_PASSES: how often
# a layer reads or writes its residual stream [tokens, D] outside of matrix products.
PEAK_FRACTION, DEFAULT_PEAK_FRACTION, WIDTH_LOSS = {'v5e': 0.93, 'v6e': 0.67}, 0.845, 1.6
STREAM_PASSES, DEFAULT_STREAM_PASSES = {'v6e': 64}, 150
# Keys per block of attention; blocks that a causal mask crosses are computed in full.
ATTENTION_BLOCK = 1024
# Fraction of an overlapped collective that the core waits for even when there is enough computation to hide it.
EXPOSED_FRACTION = 0.05


def product_efficiency(topology, d_model):
  """Return the fraction of peak FLOP/s that the matrix products of a layer reach."""
  best = PEAK_FRACTION.get(topology.chip.name, DEFAULT_PEAK_FRACTION)
  return best * max(1 - WIDTH_LOSS * topology.array / d_model, 0.3)


def plan(spec, topology):
  """Return the plan (see `plan.program.make_plan`) of a spec whose mesh fills the chips, without compiling."""
  result = outline(spec, topology)
  memory = estimate_memory(spec, topology)
  parts, rows = estimate_seconds(spec, topology)
  result.update(
      source='the analytical model', hbm_bytes={**memory, 'limit': topology.device_hbm}, collectives=rows, cycles=None,
      parts=parts, step_seconds=sum(parts.values()), network_seconds=sum(r['seconds'] for r in rows),
      largest_state=[], saved_activations=[], fits=memory['total'] <= topology.device_hbm)
  result['largest_buffers'] = [] if result['fits'] else largest_buffers(spec, topology)
  return add_throughput(result, spec, topology)


def attention_fraction(spec):
  """Return the fraction of all query-key pairs that the attention masks allow, on average over the layers."""
  model, length = spec.model, spec.data.seq_len
  fractions = {'global': 0.5 if model.causal else 1.0,
               'local': counts.keys_per_query(model, length, model.window) / length}
  if not 0 < model.window < length:
    return fractions['global']
  pattern = model.attention_pattern or ('local',)
  return sum(fractions[pattern[i % len(pattern)]] for i in range(model.num_layers)) / model.num_layers


def outline(spec, topology):
  """Return the entries of a plan that follow from the config."""
  sizes = {axis: spec.mesh.size(axis) for axis in AXES if spec.mesh.size(axis) > 1}
  return {'topology': topology.name, 'slices': topology.slices, 'chips': topology.chips, 'devices': topology.devices,
          'links': topology.links(), 'peak_flops': topology.chip.peak_flops, 'mesh': sizes,
          'model': spec.model.preset or 'custom', 'parameters': counts.count_params(spec.model)['total'],
          'batch_size': spec.train.batch_size, 'seq_len': spec.data.seq_len, 'remat': spec.train.remat,
          'gradient_accumulation_steps': spec.train.gradient_accumulation_steps}


def add_throughput(plan, spec, topology):
  """Add throughput, MFU and the whole run's budget to a plan that has `step_seconds`; return the plan."""
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
  """Return the number of shards of (the layers' parameters, embedding and head)."""
  size = spec.mesh.size
  layers = size('fsdp') * size('stage') * size('tensor') * size('expert')
  shared = size('data') if spec.mesh.zero == 3 else 1
  return layers * shared, size('fsdp') * size('expert') * size('stage') * size('tensor') * shared


def local_tokens(spec):
  """Return the tokens per device of one microbatch of gradient accumulation."""
  shards = spec.mesh.size('data', 'fsdp', 'stage', 'expert', 'context')
  return spec.train.batch_size * spec.data.seq_len / shards / spec.train.gradient_accumulation_steps


def pipeline_ticks(spec):
  """Return (microbatches, passes of a stage through its layers, including the bubble); (1, 1) without a pipeline."""
  if (stages := spec.mesh.size('stage')) == 1:
    return 1, 1
  sequences = max(int(spec.train.batch_size / spec.mesh.size('data', 'fsdp', 'expert')), 1)
  microbatches = spec.pipeline.count(stages, sequences)
  return microbatches, microbatches + (stages - 1) / spec.pipeline.groups


def mlp_width(spec):
  """Return the values per token of a hidden array of the MLP; with expert parallelism each device allocates all."""
  m = spec.model
  return m.mlp_dim * (m.experts_per_token * spec.mesh.size('expert') + m.shared_experts if m.num_experts else 1)


def saved_values(spec):
  """Return {name: values per token} that a layer saves for the backward pass; see the table in model/stack.py."""
  m = spec.model
  d, q, kv = m.d_model, m.num_heads * m.resolved_head_dim, m.resolved_kv_heads * m.resolved_head_dim
  f = mlp_width(spec)
  heads = {'queries': q, 'keys and values': 2 * kv}
  wide = {'gate and up of the MLP': 2 * f} if m.mlp == 'gated' else {'up of the MLP': f}
  return {'full': {'input of each layer': d}, 'offload': {},
          'minimal': {'inputs of attention and MLP': 2 * d, 'output of attention': q, **heads, **wide},
          'out': {'input of attention': d, 'output of attention': q, **heads, **wide},
          'mlp': {'inputs of attention and MLP': 2 * d, 'output of attention': q, **heads},
          'dots': {'inputs and outputs of products': 3 * d, **heads, **wide},
          'none': {'norms, residuals and outputs': 10 * d, 'output of attention': q, **heads,
                   'gate, up, activations and products of the MLP': 7 * f}}[spec.train.remat]


def largest_buffers(spec, topology):
  """Return the largest buffers of one device: [{'name', 'type', 'bytes', 'count'}], the largest first.

  For programs that the compiler rejects without listing their allocations.
  """
  m, train = spec.model, spec.train
  tokens, tensor = int(local_tokens(spec)), spec.mesh.size('tensor')
  memory = estimate_memory(spec, topology)
  layers = m.num_layers // spec.mesh.size('stage')
  rows = [(f'saved by remat {train.remat}: {name}', f'{train.compute_dtype}[{tokens},{n // tensor}]',
           tokens * (n // tensor) * _bytes(train.compute_dtype), layers) for name, n in saved_values(spec).items()]
  rows += [('parameters', train.param_dtype, memory['parameters'], 1),
           ('optimizer', spec.optimizer.moment_dtype, memory['optimizer'], 1),
           ('gradients', '', memory['gradients'], 1),
           ('temporaries of one layer, embedding and head', '', memory['temporaries'], 1)]
  buffers = [dict(name=name, type=type_, bytes=int(size), count=count) for name, type_, size, count in rows if size]
  return sorted(buffers, key=lambda b: -b['bytes'] * b['count'])


def _mlp_products(model):
  """Return the parameters of a layer's MLP that are active for a token."""
  experts = model.experts_per_token + model.shared_experts if model.num_experts else 1
  return (3 if model.mlp == 'gated' else 2) * model.d_model * model.mlp_dim * experts


def estimate_memory(spec, topology):
  """Return bytes per device: parameters, optimizer, gradients, activations, temporaries, total."""
  m, train, size = spec.model, spec.train, spec.mesh.size
  count = counts.count_params(m)
  layers, ends = param_shards(spec)
  local = count['blocks'] / layers + (count['embed'] + count['head']) / ends
  width, compute = _bytes(train.param_dtype), _bytes(train.compute_dtype)
  moments = {'adamw': 2, 'muon': 1, 'lion': 1, 'adafactor': 0, 'sgd': 1}[spec.optimizer.name]
  moment_shards = size('data') if spec.mesh.zero == 1 else 1
  optimizer = moments * local * _bytes(spec.optimizer.moment_dtype) / moment_shards
  # Accumulated gradients have the parameters' dtype; those of a single batch stay in compute dtype.
  gradients = local * (width if train.gradient_accumulation_steps > 1 else compute)
  tokens, tensor = local_tokens(spec), size('tensor')
  stages = size('stage')
  microbatches, ticks = pipeline_ticks(spec)
  saved = sum(saved_values(spec).values()) * compute * tokens * m.num_layers / tensor
  if stages > 1 and spec.pipeline.schedule == '1f1b':
    saved *= min(1, stages / microbatches)
  elif stages > 1:
    # The ticks of the bubble save activations as well, and each tick saves a copy of its layers' shard of the weights.
    saved = saved * ticks / microbatches + ticks * count['blocks'] / layers * compute
  f = mlp_width(spec)
  layer = count['blocks'] / m.num_layers / (tensor * size('expert'))
  # Working set of a layer: its unsharded weights twice and as much for their gradients (half of both for MoE, where
  # each grouped product gathers its own), and the arrays between its products.
  working = (2 if m.num_experts else 4) * layer * compute + tokens / tensor * (4 * f + 14 * m.d_model) * compute
  head = m.vocab_size * m.d_model / tensor * (2 * compute + 4)
  temporaries = working + 2 * head
  code = 64 << 20
  batch = 5 * 4 * spec.train.batch_size * spec.data.seq_len / size('data', 'fsdp', 'stage', 'expert', 'context')
  arguments = local * width + optimizer + batch
  parts = {'parameters': local * width, 'optimizer': optimizer, 'gradients': gradients, 'activations': saved,
           'temporaries': temporaries, 'batch': batch, 'arguments': arguments, 'code': code,
           'temp': gradients + saved + temporaries}
  return {**{k: int(v) for k, v in parts.items()}, 'total': int(arguments + parts['temp'] + code)}


def estimate_seconds(spec, topology):
  """Return ({'matmul', 'kernel', 'other', 'bubble', 'exposed'}: seconds of a step, rows of its collectives)."""
  m, train = spec.model, spec.train
  devices = topology.devices
  tokens = train.batch_size * spec.data.seq_len / devices  # Of a step, per device.
  attention = counts.train_flops_per_token(m, spec.data.seq_len) - 6 * counts.matmul_params(m)
  layers_params = counts.matmul_params(m) - m.vocab_size * m.d_model
  output = m.d_model * m.num_heads * m.resolved_head_dim
  recomputed = {'mlp': 2 * m.num_layers * _mlp_products(m) / 3 / layers_params, 'full': 1.0,
           'out': m.num_layers * output / layers_params}.get(train.remat, 0.0)
  products = (6 + 2 * recomputed) * layers_params + 6 * m.vocab_size * m.d_model
  # Both backward kernels recompute the attention weights: 9 products, of which the model FLOPs count 6.
  kernel = attention * (9 + 2 * (train.remat == 'full')) / 6
  kernel *= 1 + ATTENTION_BLOCK / max(spec.data.seq_len, ATTENTION_BLOCK)
  kernel /= min(m.resolved_head_dim / topology.array, 1)
  peak = topology.device_peak
  passes = STREAM_PASSES.get(topology.chip.name, DEFAULT_STREAM_PASSES)
  stream = tokens * m.num_layers * m.d_model * 2 * passes
  parts = {'matmul': tokens * products / peak / product_efficiency(topology, m.d_model),
           'kernel': tokens * kernel / peak,
           'other': stream / (topology.chip.hbm_rate / topology.chip.devices)}
  microbatches, ticks = pipeline_ticks(spec)
  parts['bubble'] = (ticks / microbatches - 1) * sum(parts.values())
  rows = estimate_collectives(spec, topology)
  waiting = sum(r['seconds'] for r in rows if not r['asynchronous'])
  hidden = sum(r['seconds'] for r in rows if r['asynchronous'])
  parts['exposed'] = waiting + max(hidden - parts['matmul'], EXPOSED_FRACTION * hidden)
  return parts, rows


def estimate_collectives(spec, topology):
  """Return the collectives of a step as rows; their seconds ignore overlap with computation."""
  m, size = spec.model, spec.mesh.size
  count, compute = counts.count_params(m), _bytes(spec.train.compute_dtype)
  microsteps = spec.train.gradient_accumulation_steps
  tokens = local_tokens(spec)
  inside = lambda axis: getattr(spec.mesh, axis)
  rows = []

  def add(kind, axes, bytes_, sent, runs, asynchronous=False):
    n = math.prod(inside(a) for a in axes)
    across = math.prod(getattr(spec.mesh, f'dcn_{a}', 1) for a in axes)
    near, far = sent * (n - 1) / n, sent / n * (across - 1) / across
    seconds = near / send_rate(topology, n) if n > 1 else 0.0
    if across > 1:
      seconds += far / (topology.chip.dcn_rate / topology.chip.devices)
    if seconds:
      rows.append(dict(kind=kind, axes=list(axes), asynchronous=asynchronous, network='dcn' if across > 1 else 'ici',
                       places=1, runs=int(runs), bytes=int(bytes_ * runs), sent_bytes=int((near + far) * runs),
                       seconds=seconds * runs))

  # Pipeline stages gather their weights and reduce their gradients in every tick.
  microbatches, ticks = pipeline_ticks(spec)
  weights = count['total'] * compute / size('tensor') / size('stage') / size('expert')
  if size('fsdp') > 1:
    # On slices with rings libtpu makes gathers and reductions synchronous, elsewhere asynchronous.  Over a whole torus
    # it implements them as all-reduces, which send twice as much.
    rings = [topology.chip.tpu and topology.is_ring(dim) for dim in range(len(topology.shape))]
    torus = inside('fsdp') == topology.devices // topology.slices and all(rings)
    sent = (2 if torus else 1) * weights
    add('all-gather', ('fsdp',), weights, sent, 2 * microsteps * ticks, not any(rings))
    add('reduce-scatter', ('fsdp',), weights, sent, microsteps * ticks, not any(rings))
  if size('data') > 1:
    part = weights / size('fsdp')
    if spec.mesh.zero == 3:
      add('all-gather', ('data',), part, part, 2 * microsteps * ticks)
      add('reduce-scatter', ('data',), part, part, microsteps * ticks)
    else:
      add('all-reduce', ('data',), part, 2 * part, microsteps * ticks)
  stream = tokens * m.d_model * compute
  if size('tensor') > 1:
    add('all-gather', ('tensor',), stream, stream, 6 * m.num_layers * microsteps)
    add('reduce-scatter', ('tensor',), stream, stream, 4 * m.num_layers * microsteps)
  if (ring := size('context')) > 1:
    keys = 2 * tokens * m.resolved_kv_heads * m.resolved_head_dim * compute
    add('collective-permute', ('context',), keys, keys, 4 * (ring - 1) * m.num_layers * microsteps)
  if size('expert') > 1:
    add('all-to-all', ('expert',), stream * m.experts_per_token, stream * m.experts_per_token / 4,
        4 * m.num_layers * microsteps)
  if (stages := size('stage')) > 1:
    sent = stream * stages / microbatches
    add('collective-permute', ('stage',), sent, sent, 2 * microsteps * ticks * spec.pipeline.groups, True)
  return rows


def send_rate(topology, devices):
  """Return the bytes/s that each of `devices` devices of a slice can send in a ring or line through all of them.

  The devices are assumed to span the smallest sufficient set of whole dimensions of the slice; on part of a dimension
  they form a line.  Devices of one chip share its links.
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


def suggest_changes(spec, topology, scale=1.0, count=3):
  """Return up to `count` config changes with which the run fits, the fastest first: [{'change', 'total', ...}].

  Changes that keep the global batch size come first.  scale: ratio of the compiler's memory to the estimate for the
  unchanged spec.
  """
  fitting = []
  for change in _changes(spec, topology):
    try:
      candidate = change_spec(spec, change)
    except ValueError:
      continue
    if any(True for _ in candidate.resolved_problems()):
      continue
    result = plan(candidate, topology)
    total = result['hbm_bytes']['total'] * scale
    if total <= topology.device_hbm:
      fitting.append({'change': change, 'total': int(total),
                    'tokens_per_second_per_chip': result['tokens_per_second_per_chip']})
  # Drop pairs of changes of which one is enough.
  minimal = [row for row in fitting
             if not any(other['change'].items() < row['change'].items() for other in fitting)]
  best = {}
  for row in sorted(minimal, key=lambda r: -r['tokens_per_second_per_chip']):
    best.setdefault(tuple(row['change']), row)  # The fastest per set of fields.
  # Another global batch size changes the training itself: suggest it last.
  ranked = sorted(best.values(), key=lambda r: ('train.batch_size' in r['change'], -r['tokens_per_second_per_chip'],
                                                len(r['change'])))
  return ranked[:count]


def _changes(spec, topology):
  """Yield memory-saving changes {'train.remat': 'full', ...} of one or two fields."""
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
  """Return the spec with the given dotted fields replaced."""
  for name, value in change.items():
    group, field = name.split('.')
    spec = dataclasses.replace(spec, **{group: dataclasses.replace(getattr(spec, group), **{field: value})})
  return spec


def mesh_shapes(devices, axes=AXES):
  """Yield every {axis: size} whose product is the number of devices."""
  if len(axes) == 1:
    yield {axes[0]: devices}
    return
  for n in range(1, devices + 1):
    if devices % n == 0:
      yield from ({axes[0]: n, **rest} for rest in mesh_shapes(devices // n, axes[1:]))
