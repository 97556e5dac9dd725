"""Check that a training config fits its mesh.  Does not import JAX."""

from llmjax.ops.limits import LIMITS, NO_BIAS
from llmjax.parallel.spec import ROW_AXES, indivisible


def mesh_problems(spec, mesh):
  """Yield the settings of a PretrainSpec that a MeshSpec does not support, and the sizes that it does not divide."""
  yield from _unsupported(spec, mesh)
  for name, number, axes, factor, factor_name in _sharded_sizes(spec, mesh):
    yield from indivisible(name, number, axes, mesh.size, factor, factor_name)


def _unsupported(spec, mesh):
  model, kernel, size = spec.model, spec.train.attention, mesh.size
  if size('expert') > 1 and not model.num_experts:
    yield (f'mesh.expert={size("expert")} requires a mixture of experts; set model.num_experts, or write mesh.expert=1 '
           f'and mesh.fsdp={size("fsdp") * size("expert")}')
  if kernel in LIMITS:
    limit = LIMITS[kernel](spec.data.seq_len, model.resolved_head_dim, model.attention_soft_cap,
                           spec.train.compute_dtype)
    if model.position_embedding == 'relative':
      limit = NO_BIAS
    if size('context') > 1:
      limit = f'does not support sequences sharded by mesh.context={size("context")}'
    if limit:
      yield f'train.attention={kernel} {limit}; write train.attention=auto'
  if model.position_embedding == 'relative':
    if size('stage') > 1:
      yield (f'mesh.stage={size("stage")} does not support relative position biases; write mesh.stage=1, or '
             'model.position_embedding=rotary')
    if size('context') > 1 and spec.train.context_attention == 'ring':
      yield f'train.context_attention=ring {NO_BIAS}; write train.context_attention=gather'


def _sharded_sizes(spec, mesh):
  """Yield (field, number, mesh axes, further factor, its name): axes times factor must divide the number."""
  model, train, pipeline, size = spec.model, spec.train, spec.pipeline, mesh.size
  yield 'model.num_heads', model.num_heads, ('tensor',), 1, ''
  yield 'model.num_kv_heads', model.resolved_kv_heads, ('tensor',), 1, ''
  yield 'model.mlp_dim', model.mlp_dim, ('tensor',), 1, ''
  yield 'model.d_model', model.d_model, ROW_AXES if mesh.zero else ROW_AXES[1:], 1, ''
  yield 'data.seq_len', spec.data.seq_len, ('context', 'tensor'), 1, ''
  if model.vocab_size:
    yield 'model.vocab_size', model.vocab_size, ('tensor',), 1, ''
  if model.num_experts:
    yield 'model.num_experts', model.num_experts, ('expert',), 1, ''
  if size('context') > 1:
    # Each device has a chunk from both ends of a sequence, so that causal attention is balanced.
    yield 'data.seq_len', spec.data.seq_len, ('context',), 2, '2 (two chunks per device)'
  microbatches = train.gradient_accumulation_steps
  if size('stage') > 1:
    yield 'model.num_layers', model.num_layers, ('stage',), pipeline.groups, f'pipeline.rounds={pipeline.groups}'
    if pipeline.microbatches:
      yield 'pipeline.microbatches', pipeline.microbatches, ('stage',), 1, ''
      microbatches *= max(pipeline.microbatches // size('stage'), 1)
    if pipeline.schedule == '1f1b':
      # The output layer and the loss are computed on all stages, each for an equal part of every sequence.
      yield 'data.seq_len', spec.data.seq_len, ('stage', 'context'), 1, ''
  if train.batch_size % train.gradient_accumulation_steps == 0:  # TrainSpec reports it otherwise.
    yield 'train.batch_size', train.batch_size, ROW_AXES, microbatches, f'{microbatches} microbatches'
