"""Collectives of programs with known collectives, and of texts from other platforms."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from llmjax.plan.collectives import (
    find_collectives,
    group_axes,
    largest_replicated,
    parse_groups,
    summarize,
)
from llmjax.plan.hlo import Array, parse_type

SIDE = 8  # Of the local block, float32 [8, 8, 8].
BLOCK = 4 * SIDE**3


def make(shape=(2, 2, 2), names=('a', 'b', 'c'), order=range(8)):
  devices = np.array(jax.devices()[:8])[list(order)].reshape(shape)
  return jax.sharding.Mesh(devices, names, axis_types=(AxisType.Auto,) * len(names))


def text_of(body, mesh, spec=None):
  spec = P(*mesh.axis_names) if spec is None else spec
  mapped = jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
  shape = [SIDE * n for n in mesh.devices.shape]
  return jax.jit(mapped).lower(jax.ShapeDtypeStruct(shape, jnp.float32)).compile().as_text()


def ring(n):
  return [(i, (i + 1) % n) for i in range(n)]


@pytest.mark.parametrize(('axes', 'order'), [
    (('a',), range(8)), (('b',), range(8)), (('c',), range(8)), (('a', 'b'), range(8)),
    (('a', 'c'), range(8)), (('b', 'c'), [3, 1, 4, 0, 5, 7, 2, 6]), (('a', 'b', 'c'), range(8)),
])
def test_every_kind_over_every_axis(axes, order):
  mesh = make(order=order)
  n = math.prod(mesh.shape[a] for a in axes)

  def body(x):
    return (jax.lax.psum(x, axes), jax.lax.all_gather(x, axes, axis=1, tiled=True),
            jax.lax.psum_scatter(x, axes, scatter_dimension=0, tiled=True),
            jax.lax.all_to_all(x, axes, 0, 1, tiled=True), jax.lax.ppermute(x, axes, ring(n)))

  found = {c.kind: c for c in find_collectives(text_of(body, mesh), mesh)}
  assert sorted(found) == ['all-gather', 'all-reduce', 'all-to-all', 'collective-permute', 'reduce-scatter']
  assert {c.axes for c in found.values()} == {axes}
  assert {c.trips for c in found.values()} == {1}
  for kind, size, sent, op in [
      ('all-reduce', BLOCK, 2 * (n - 1) * BLOCK // n, 'psum'),
      ('all-gather', n * BLOCK, (n - 1) * BLOCK, 'all_gather'),
      ('reduce-scatter', BLOCK, (n - 1) * BLOCK // n, 'reduce_scatter'),
      ('all-to-all', BLOCK, (n - 1) * BLOCK // n, 'all_to_all'),
      ('collective-permute', BLOCK, BLOCK, 'ppermute')]:
    assert (found[kind].bytes, found[kind].sent_bytes) == (size, sent), kind
    assert found[kind].op_name.endswith(op)
    assert found[kind].group_size == (2 if kind == 'collective-permute' else n)
  assert found['all-gather'].result == (Array('f32', (SIDE, n * SIDE, SIDE)),)
  assert found['reduce-scatter'].result == (Array('f32', (SIDE // n, SIDE, SIDE)),)


def test_trip_counts_of_nested_loops():
  mesh = make()

  def body(x):
    def outer(x, _):
      x = jax.lax.psum(x, 'b') * 0.1

      def inner(x, _):
        return jnp.sin(jax.lax.ppermute(x, 'c', ring(2))), None

      return jax.lax.scan(inner, x, None, length=3)[0], None

    x, _ = jax.lax.scan(outer, x, None, length=5)
    # 3, 5, ..., 15 and 9, 8, ..., 1.
    up = jax.lax.while_loop(lambda s: s[0] < 17,
                            lambda s: (s[0] + 2, jnp.cos(jax.lax.psum(s[1], 'a'))), (3, x))
    down = jax.lax.while_loop(lambda s: 0 < s[0], lambda s: (s[0] - 1, jnp.cos(jax.lax.psum(s[1], ('a', 'c')))),
                              (9, x))
    # The trip count depends on the values.
    free = jax.lax.while_loop(lambda x: x[0, 0, 0] < 9, lambda x: 1 + jax.lax.psum(x, ('b', 'c')), x)
    return up[1] + down[1] + free

  text = text_of(body, mesh)
  expected = {('b',): (5,), ('c',): (5, 3), ('a',): (7,), ('a', 'c'): (9,), ('b', 'c'): (None,)}
  # From XLA's annotation, and derived from the conditions, as for TPU programs, which have no annotation.
  silent = re.sub(r'"known_[a-z_]+":\{[^}]*\},?', '', text)
  assert 'known_trip_count' in text
  assert 'known_trip_count' not in silent
  for version in (text, silent):
    found = find_collectives(version, mesh)
    assert {c.axes: c.loops for c in found} == expected
    rows = {row.axes: row for row in summarize(found)}
    assert (rows['c',].runs, rows['c',].bytes, rows['c',].unknown) == (15, 15 * BLOCK, 0)
    assert (rows['b', 'c'].runs, rows['b', 'c'].bytes, rows['b', 'c'].unknown) == (1, BLOCK, 1)
    assert next(c for c in found if c.axes == ('b', 'c')).trips is None


def test_condition_runs_once_more_than_the_body():
  """The limit and the initial counter enter the loop through its state."""
  text = HEADER + ADD + '''%body (s: (s32[], s32[], f32[4,8])) -> (s32[], s32[], f32[4,8]) {
  %s = (s32[], s32[], f32[4,8]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %limit = s32[] get-tuple-element(%s), index=1
  %x = f32[4,8]{1,0} get-tuple-element(%s), index=2
  %two = s32[] constant(2)
  %next = s32[] add(%two, %i)
  %r = f32[4,8]{1,0} all-reduce(%x), channel_id=1, replica_groups=[4,2]<=[8],
      use_global_device_ids=true, to_apply=%add
  ROOT %out = (s32[], s32[], f32[4,8]) tuple(%next, %limit, %r)
}

%condition (s: (s32[], s32[], f32[4,8])) -> pred[] {
  %s = (s32[], s32[], f32[4,8]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %limit = s32[] get-tuple-element(%s), index=1
  %x = f32[4,8]{1,0} get-tuple-element(%s), index=2
  %r = f32[4,8]{1,0} all-gather(%x), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0},
      use_global_device_ids=true
  ROOT %go = pred[] compare(%limit, %i), direction=GE
}

''' + entry('%p = f32[4,8]{1,0} parameter(0)', '%one = s32[] constant(-1)', '%ten = s32[] constant(10)',
             '%state = (s32[], s32[], f32[4,8]) tuple(%one, %ten, %p)',
             '%loop = (s32[], s32[], f32[4,8]) while(%state), condition=%condition, body=%body',
             'ROOT %x = f32[4,8]{1,0} get-tuple-element(%loop), index=2')
  found = find_collectives(text, make())  # -1, 1, ..., 9.
  assert [(c.kind, c.axes, c.trips) for c in found] == [('all-reduce', ('c',), 6), ('all-gather', ('b', 'c'), 7)]
  unknown = find_collectives(text.replace('direction=GE', 'direction=EQ'), make())
  assert [c.trips for c in unknown] == [None, None]


def test_a_partitioned_program():
  """x[B_a, D_b] w[D_b, F_c] is a sum over b; x[B_a, D] w[D_b, F] gathers w over b."""
  mesh = make()
  shaped = lambda shape, *spec: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P(*spec)))
  product = jax.jit(jnp.dot, out_shardings=NamedSharding(mesh, P('a', 'c')))
  text = product.lower(shaped((16, 32), 'a', 'b'), shaped((32, 64), 'b', 'c')).compile().as_text()
  (found,) = find_collectives(text, mesh)
  assert (found.kind, found.axes, found.result) == ('all-reduce', ('b',), (Array('f32', (8, 32)),))
  gather = jax.jit(lambda x, w: jnp.tanh(x @ jax.lax.with_sharding_constraint(w, NamedSharding(mesh, P()))),
                   out_shardings=NamedSharding(mesh, P('a')))
  text = gather.lower(shaped((16, 32), 'a'), shaped((32, 64), 'b')).compile().as_text()
  (found,) = find_collectives(text, mesh)
  assert (found.kind, found.axes, found.bytes) == ('all-gather', ('b',), 4 * 32 * 64)


@pytest.mark.parametrize(('text', 'groups'), [
    ('{}', []),
    ('{{0,1},{2,3}}', [[0, 1], [2, 3]]),
    ('{{0, 2}, {1, 3}}', [[0, 2], [1, 3]]),
    ('[4,2]<=[8]', [[0, 1], [2, 3], [4, 5], [6, 7]]),
    ('[2,4]<=[4,2]T(1,0)', [[0, 2, 4, 6], [1, 3, 5, 7]]),
    ('[4,2]<=[2,2,2]T(0,2,1)', [[0, 2], [1, 3], [4, 6], [5, 7]]),
    ("mesh['a'=2,'b'=2,'c'=2] {'b'}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
    ("mesh['a'=2,'b'=2,'c'=2] {'a','c'}", [[0, 1, 4, 5], [2, 3, 6, 7]]),
    ("mesh[x=8] {x:(2)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
    ("mesh['x'=8] {'x':(1)2,'x':(4)2}", [[0, 1, 4, 5], [2, 3, 6, 7]]),
    ("mesh['a'=2,'b'=2], device_ids=(3,1,0,2) {'b'}", [[1, 3], [0, 2]]),
    ("mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}", [[0, 1], [2, 3], [4, 5], [6, 7]]),
])
def test_forms_of_replica_groups(text, groups):
  assert sorted(map(sorted, parse_groups(text))) == sorted(map(sorted, groups))


def test_unsupported_form_is_an_error():
  for text in ('all', '[4,2]', 'mesh[8] of x'):
    with pytest.raises(ValueError, match='unsupported form'):
      parse_groups(text)


def test_sub_axis_counts_as_its_axis():
  mesh = make((8,), ('x',))
  assert group_axes([[0, 4], [1, 5], [2, 6], [3, 7]], mesh) == ('x',)
  assert group_axes([[i] for i in range(8)], mesh) == ()


HEADER = 'HloModule jit_f, is_scheduled=true, num_partitions=8\n\n'
ADD = '''%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

'''


def entry(*lines):
  return 'ENTRY %main (p: f32[4,8]) -> f32[4,8] {\n' + '\n'.join(f'  {line}' for line in lines) + '\n}\n'


def test_asynchronous_pairs_count_once():
  """As XLA's GPU and TPU compilers write them: dedicated start instructions, and wrapped computations."""
  wrapped = '''%wrapped (q: f32[4,8]) -> f32[4,8] {
  %q = f32[4,8]{1,0} parameter(0)
  ROOT %exchange = f32[4,8]{1,0} all-to-all(%q), channel_id=5, replica_groups=[2,4]<=[8], dimensions={0}
}

'''
  text = HEADER + ADD + wrapped + entry(
      '%p = f32[4,8]{1,0:T(8,128)S(1)} parameter(0)',
      '%gs = (f32[4,8]{1,0}, f32[8,8]{1,0}) all-gather-start(%p), channel_id=1, replica_groups=[4,2]<=[8], '
      'dimensions={0}, use_global_device_ids=true, metadata={op_name="jit(f)/gather \\"it\\", {now"}',
      '%gd = f32[8,8]{1,0} all-gather-done(%gs)',
      '%rs = (f32[4,8]{1,0}, /*index=1*/bf16[2]{0}) all-reduce-start(%p, %b), channel_id=2, replica_groups={}, '
      'use_global_device_ids=true, to_apply=%add',
      '%b = bf16[2]{0} constant({1, 2})',
      '%rd = (f32[4,8]{1,0}, bf16[2]{0}) all-reduce-done(%rs)',
      '%ps = (f32[4,8]{1,0}, f32[4,8]{1,0}, u32[], u32[]) collective-permute-start(%p), channel_id=3, '
      'source_target_pairs={{0,4},{4,0},{1,5},{5,1}}',
      '%pd = f32[4,8]{1,0} collective-permute-done(%ps)',
      '%ss = ((f32[4,8]{1,0}), f32[1,8]{1,0}, u32[]) reduce-scatter-start(%p), channel_id=4,',
      '    replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}, use_global_device_ids=true, to_apply=%add',
      '%sd = f32[1,8]{1,0} reduce-scatter-done(%ss)',
      '%as = ((f32[4,8]{1,0}), f32[4,8]{1,0}, s32[]) async-start(%p), calls=%wrapped',
      'ROOT %ad = f32[4,8]{1,0} async-done(%as)')
  found = find_collectives(text, make())
  assert [(c.kind, c.axes, c.bytes) for c in found] == [
      ('all-gather', ('c',), 256), ('all-reduce', ('a', 'b', 'c'), 132), ('collective-permute', ('a',), 128),
      ('reduce-scatter', ('a', 'b'), 128), ('all-to-all', ('b', 'c'), 128)]
  assert [str(a) for a in found[1].result] == ['f32[4,8]', 'bf16[2]']
  assert found[3].result == (Array('f32', (1, 8)),)
  assert found[0].op_name == 'jit(f)/gather \\"it\\", {now'


def test_groups_of_replicas_and_of_partitions():
  """Without use_global_device_ids, groups name replicas, each with all its partitions."""
  def read(attributes, op='all-reduce', header=HEADER):
    text = header + ADD + entry('%p = f32[4,8]{1,0} parameter(0)', f'ROOT %r = f32[4,8] {op}(%p), {attributes}')
    return find_collectives(text, make())[0].axes

  assert read('channel_id=1, replica_groups={{0}}, to_apply=%add') == ('a', 'b', 'c')
  assert read('channel_id=1, replica_groups={{0,1},{2,3},{4,5},{6,7}}', 'all-to-all') == ('c',)
  replicas = HEADER.replace('num_partitions=8', 'replica_count=8')
  assert read('replica_groups={{0,4},{1,5},{2,6},{3,7}}, to_apply=%add', header=replicas) == ('a',)
  assert read('replica_groups={}, to_apply=%add', header=replicas) == ('a', 'b', 'c')
  mixed = HEADER.replace('num_partitions=8', 'replica_count=2, num_partitions=4')
  assert read('replica_groups={{0,1}}, to_apply=%add', header=mixed) == ('a',)
  assert read('channel_id=1, replica_groups={{0,1},{2,3}}', 'all-to-all', header=mixed) == ('c',)


def test_branches_and_fusions():
  text = HEADER + ADD + '''%yes (q: f32[4,8]) -> f32[4,8] {
  %q = f32[4,8]{1,0} parameter(0)
  ROOT %r = f32[4,8]{1,0} all-reduce(%q), channel_id=1, replica_groups=[4,2]<=[8],
      use_global_device_ids=true, to_apply=%add
}

%no (q: f32[4,8]) -> f32[4,8] {
  ROOT %q = f32[4,8]{1,0} parameter(0)
}

%all-reduce-scatter.1 (q: f32[4,8]) -> f32[2,8] {
  %q = f32[4,8]{1,0} parameter(0)
  %r = f32[4,8]{1,0} all-reduce(%q), channel_id=2, replica_groups=[4,2]<=[8],
      use_global_device_ids=true, to_apply=%add
  %zero = s32[] constant(0)
  ROOT %s = f32[2,8]{1,0} dynamic-slice(%r, %zero, %zero), dynamic_slice_sizes={2,8}
}

%begin (q: f32[4,8]) -> f32[8,8] {
  %q = f32[4,8]{1,0} parameter(0)
  %g = f32[8,8]{1,0} all-gather(%q), channel_id=3, replica_groups=[4,2]<=[8], dimensions={0},
      use_global_device_ids=true, backend_config={"async_collective_fusion_config":{"step":"1"}}
  ROOT %c = f32[8,8]{1,0} custom-call(%g), custom_call_target="AsyncCollectiveStart"
}

%end (q: f32[4,8]) -> f32[8,8] {
  %q = f32[4,8]{1,0} parameter(0)
  %g = f32[8,8]{1,0} all-gather(%q), channel_id=3, replica_groups=[4,2]<=[8], dimensions={0},
      use_global_device_ids=true, backend_config={"async_collective_fusion_config":{"step":"1"}}
  ROOT %c = f32[8,8]{1,0} custom-call(%g), custom_call_target="AsyncCollectiveDone"
}

''' + entry(
      '%p = f32[4,8]{1,0} parameter(0)', '%t = pred[] constant(true)',
      '%if = f32[4,8]{1,0} conditional(%t, %p, %p), true_computation=%yes, false_computation=%no',
      '%scatter = f32[2,8]{1,0} fusion(%if), kind=kCustom, calls=%all-reduce-scatter.1',
      '%f1 = f32[8,8]{1,0} fusion(%p), kind=kCustom, calls=%begin',
      '%f2 = f32[8,8]{1,0} fusion(%p), kind=kCustom, calls=%end',
      'ROOT %copy = f32[4,8]{1,0} copy(%if)')
  found = find_collectives(text, make())
  assert [(c.kind, c.axes, c.bytes, c.conditional) for c in found] == [
      ('all-reduce', ('c',), 128, True), ('reduce-scatter', ('c',), 128, False), ('all-gather', ('c',), 256, False)]
  assert found[1].result == (Array('f32', (2, 8)),)


def test_wrong_mesh_is_an_error():
  mesh = make()
  text = text_of(lambda x: jax.lax.psum(x, 'a'), mesh)
  with pytest.raises(ValueError, match='8 devices.* mesh has 4'):
    find_collectives(text, jax.sharding.Mesh(np.array(jax.devices()[:4]), ('a',)))
  with pytest.raises(ValueError, match='no ENTRY'):
    find_collectives('not a program', mesh)


def test_types():
  assert parse_type('f32[]{:T(128)}') == Array('f32', ())
  assert parse_type('(bf16[2,<=3]{1,0}, (pred[], token[]))') == [
      Array('bf16', (2, 3)), [Array('pred', ()), Array('token', ())]]
  sizes = {'s4[3]': 2, 'bf16[5]': 10, 'f8e4m3fn[7]': 7, 'c64[2]': 16, 'pred[3]': 3, 'token[]': 0, 'u32[]': 4}
  assert {t: parse_type(t).bytes for t in sizes} == sizes


def test_replicated_arrays():
  mesh = make()
  shaped = lambda shape, *spec: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P(*spec)))
  arguments = {'whole': shaped((64, 64)), 'part': shaped((64, 64), 'a'), 'small': shaped((4,))}
  f = jax.jit(lambda t: {'sum': t['whole'] + t['part'] + t['small'][0], 'kept': t['whole'] * 2},
              out_shardings={'sum': NamedSharding(mesh, P('b')), 'kept': NamedSharding(mesh, P())})
  compiled = f.lower(arguments).compile()
  found = largest_replicated(compiled, 1000)
  assert [(r.where, r.name.split('/')[-1], r.shape, r.dtype, r.bytes) for r in found] == [
      ('input', 'whole', (64, 64), 'float32', 16384), ('output', 'kept', (64, 64), 'float32', 16384)]
  assert [r.name.split('/')[-1] for r in largest_replicated(compiled)] == ['whole', 'kept', 'small']
  one = jax.jit(lambda x: x + 1).lower(jnp.ones((64, 64))).compile()
  assert largest_replicated(one) == []
