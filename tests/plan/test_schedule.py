"""The replay of a schedule against a handwritten program whose time is known."""

import numpy as np
import pytest

from llmjax.plan.memory import parse_out_of_memory, short_name, stacked_arrays
from llmjax.plan.schedule import Program
from llmjax.plan.topology import HOP_SECONDS, Place, parse_topology

# A loop of 8 iterations: a product of 1,000,000 cycles overlapping an asynchronous gather, a synchronous all-reduce, a
# kernel.
TEXT = r"""HloModule jit_step, is_scheduled=true, num_partitions=4

%fused_product (p0: bf16[256,256], p1: bf16[256,256]) -> bf16[256,256] {
  %p0 = bf16[256,256]{1,0} parameter(0)
  %p1 = bf16[256,256]{1,0} parameter(1)
  ROOT %dot.1 = bf16[256,256]{1,0} dot(%p0, %p1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%body (state: (s32[], bf16[256,256], bf16[8,256,256])) -> (s32[], bf16[256,256], bf16[8,256,256]) {
  %state = (s32[], bf16[256,256]{1,0}, bf16[8,256,256]{2,1,0}) parameter(0)
  %turn = s32[] get-tuple-element(%state), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%turn, %one)
  %x = bf16[256,256]{1,0} get-tuple-element(%state), index=1
  %kept = bf16[8,256,256]{2,1,0} get-tuple-element(%state), index=2
  %gather = (bf16[GATHER]{0}, bf16[GATHERED]{0}) all-gather-start(%x), channel_id=1, replica_groups=[1,4]<=[4], dimensions={0}, use_global_device_ids=true
  %product = bf16[256,256]{1,0} fusion(%x, %x), kind=kOutput, calls=%fused_product, metadata={op_name="jit(step)/jvp()/while/body/Block/mlp/dot_general"}, backend_config={"window_config":{"estimated_cycles":"1000000"}}
  %gathered = bf16[GATHERED]{0} all-gather-done(%gather)
  %total = f32[1048576]{0} all-reduce(%x), channel_id=2, replica_groups=[1,4]<=[4], use_global_device_ids=true, to_apply=%add
  %queries = bf16[2,4,512,128]{3,2,1,0} broadcast(%x)
  %keys = bf16[2,4,512,128]{3,2,1,0} broadcast(%x), backend_config={"window_config":{"estimated_cycles":"2000"}}
  %splash_mha_fwd.1 = (bf16[2,4,512,128]{3,2,1,0}) custom-call(%queries, %keys, %keys), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\"block_q\": 512}"
}}, metadata={op_name="jit(step)/jvp()/while/body/splash"}
  %written = bf16[8,256,256]{2,1,0} dynamic-update-slice(%kept, %product, %turn), metadata={op_name="jit(step)/jvp()/while/body/dynamic_update_slice"}
  ROOT %out = (s32[], bf16[256,256]{1,0}, bf16[8,256,256]{2,1,0}) tuple(%next, %product, %written)
}

%condition (state.1: (s32[], bf16[256,256], bf16[8,256,256])) -> pred[] {
  %state.1 = (s32[], bf16[256,256]{1,0}, bf16[8,256,256]{2,1,0}) parameter(0)
  %turn.1 = s32[] get-tuple-element(%state.1), index=0
  %eight = s32[] constant(8)
  ROOT %less = pred[] compare(%turn.1, %eight), direction=LT
}

ENTRY %main (a: bf16[256,256], b: bf16[8,256,256]) -> (s32[], bf16[256,256], bf16[8,256,256]) {
  %a = bf16[256,256]{1,0} parameter(0)
  %b = bf16[8,256,256]{2,1,0} parameter(1)
  %zero = s32[] constant(0)
  %begin = (s32[], bf16[256,256]{1,0}, bf16[8,256,256]{2,1,0}) tuple(%zero, %a, %b)
  ROOT %loop = (s32[], bf16[256,256]{1,0}, bf16[8,256,256]{2,1,0}) while(%begin), condition=%condition, body=%body, metadata={op_name="jit(step)/jvp()/while"}
}
"""  # noqa: E501


class Device:
  def __init__(self, number):
    self.id = number


class Mesh:
  axis_names = ('data', 'fsdp')

  def __init__(self):
    self.devices = np.array([Device(i) for i in range(4)], object).reshape(1, 4)
    self.shape, self.size = {'data': 1, 'fsdp': 4}, 4


def replay(gathered, name='v5p:4x4x4', blocks=''):
  topology = parse_topology(name)
  text = TEXT.replace('\\"block_q\\": 512', blocks or '\\"block_q\\": 512')
  text = text.replace('GATHERED', str(gathered)).replace('GATHER', str(gathered // 4))
  places = [Place(0, (i, 0, 0)[:len(topology.shape)], 0) for i in range(4)]
  return topology, Program(text, Mesh(), topology, places)


@pytest.mark.parametrize('gathered', [4 << 20, 400 << 20])
def test_time_is_cycles_kernels_and_exposed_communication(gathered):
  topology, program = replay(gathered)
  product, other = 1_000_000 / 1.75e9, 2000 / 1.75e9
  kernel = 2 * 2 * 2 * 4 * 512 * 512 * 128 / 2 / 459e12  # Two products of B N T T H, half of them under the mask.
  gather = 2 * gathered * 3 / 4 / 200e9 + 2 * HOP_SECONDS
  total = 2 * (4 << 20) * 3 / 4 / 200e9 + 4 * HOP_SECONDS
  waiting = max(gather - product, 0) + total
  assert (gather > product) == (gathered == 400 << 20)
  assert program.unknown_loops == []
  assert program.totals.cycles == {'matmul': 8_000_000, 'other': 16_000}
  assert program.totals.kernel_flops == pytest.approx(8 * kernel * 459e12)
  assert program.totals.waiting == pytest.approx(8 * waiting)
  assert program.totals.seconds == pytest.approx(8 * (product + other + kernel + waiting))
  assert program.totals.network == pytest.approx(8 * (gather + total))
  (body,) = program.bodies
  assert (body.trips, body.runs) == (8, 1)
  assert {e.lane for e in body.events} == {'core', 'network'}
  end = max(e.begin + e.seconds for e in body.events)
  assert end == pytest.approx(body.totals.seconds)
  assert sorted((t.collective.kind, t.asynchronous, t.runs, t.collective.axes) for t in program.transfers) == [
      ('all-gather', True, 8, ('fsdp',)), ('all-reduce', False, 8, ('fsdp',))]


@pytest.mark.parametrize(('name', 'blocks', 'overhead'), [
    ('v5p:4x4x4', '', 1),  # Heads of 128 fill a unit of 128 x 128.
    ('v6e:4x4', '', 2),  # One of 256 x 256 to a half.
    # Four rows of blocks of 128 x 256 compute 1, 1, 2, 2 of 2 columns: 6 of 8, where the mask needs a half.
    ('v5p:4x4x4', r'\"block_q\": 128, \"block_kv\": 256, \"block_kv_compute\": 64', 1.5),
    ('v6e:4x4', r'\"block_q\": 128, \"block_kv\": 256', 3),
    ('v5p:4x4x4', r'\"block_q_dkv\": 128, \"block_kv_dkv\": 256', 1)])  # Of another kernel.
def test_kernel_time_counts_the_utilization_of_the_matrix_unit(name, blocks, overhead):
  topology, program = replay(4 << 20, name, blocks)
  flops = 2 * 2 * 2 * 4 * 512 * 512 * 128 / 2
  (kernel,) = program.kernels
  assert kernel.flops == flops
  assert kernel.seconds == pytest.approx(overhead * flops / topology.device_peak)
  assert program.totals.kernel == pytest.approx(8 * kernel.seconds)


def test_saved_activations_are_named_after_their_operation():
  _, program = replay(4 << 20)
  activations, gradients = stacked_arrays(program.module)
  (tensor,) = activations
  assert (tensor.name, tensor.type, tensor.bytes) == ('Block/mlp/dot_general', 'bf16[8,256,256]', 8 * 256 * 256 * 2)
  assert gradients == []
  assert short_name('jit(train_step)/transpose(jvp())/while/body/closed_call/Block/mlp/dot_general') == (
      'backward Block/mlp/dot_general')


def test_parse_both_forms_of_the_out_of_memory_message():
  one = parse_out_of_memory('RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO '
                            'temporaries (32.93G) exceeds available HBM (15.75G).')
  assert (one['used'], one['limit'], one['temporaries_only']) == (int(32.93 * 2**30), int(15.75 * 2**30), True)
  other = parse_out_of_memory('Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded by 4.75G.')
  assert (other['used'], other['temporaries_only']) == (int(20.5 * 2**30), False)
  assert parse_out_of_memory('INVALID_ARGUMENT: something else') is None
