"""Communication of each parallelism strategy in a step, counted in the compiled program."""

import dataclasses
import math

import jax
import pytest

from llmjax.commands.mesh import compile_step
from llmjax.commands.spec import LayoutSpec
from llmjax.model.spec import ModelSpec
from llmjax.parallel.mesh import make_mesh
from llmjax.parallel.spec import MeshSpec, PipelineSpec
from llmjax.plan.collectives import find_collectives, largest_replicated

L, B, T, D, N, F, V = 2, 16, 128, 64, 8, 192, 512
DENSE = ModelSpec(num_layers=L, d_model=D, num_heads=N, mlp_dim=F, vocab_size=V)
MOE = dataclasses.replace(DENSE, num_experts=4, experts_per_token=2)
SIZES = {D * D, D * F, V * D}  # Elements of the weights: attention, MLP, embedding and head.
TINY = 4 * B * T  # Bytes: loss, norms of gradients, a norm's scale; and ids of tokens, which the ring's order moves.


def collectives(model, pipe=None, **sizes):
  """Return {(kind, axes): [(shape, runs), ...]} of collectives above TINY, and the arrays that are replicated."""
  spec = LayoutSpec()
  spec = dataclasses.replace(
      spec, model=model, mesh=MeshSpec(**{'data': 1, **sizes}), pipeline=pipe or PipelineSpec(),
      train=dataclasses.replace(spec.train, batch_size=B, compute_dtype='float32'),
      data=dataclasses.replace(spec.data, seq_len=T))
  mesh = make_mesh(spec.mesh)
  compiled = compile_step(spec, mesh)
  found = {}
  for c in find_collectives(compiled.as_text(), mesh):
    if c.bytes > TINY:
      found.setdefault((c.kind, '+'.join(c.axes)), []).extend((a.shape, c.trips) for a in c.result)
  return found, largest_replicated(compiled, 4 * D * F)


def sizes(entries):
  return {math.prod(shape) for shape, _ in entries}


def runs(entries):
  return sum(n for _, n in entries)


def test_data():
  found, _ = collectives(DENSE, data=8)
  assert set(found) == {('all-reduce', 'data')}
  matrices = [e for e in found['all-reduce', 'data'] if len(e[0]) > 1]
  assert sizes(matrices) == SIZES
  # Every matrix's gradient once: seven in a layer, embedding and head.
  assert runs(matrices) == 7 * L + 2


@pytest.mark.parametrize('model', [DENSE, MOE], ids=['dense', 'moe'])
def test_fsdp(model):
  found, whole = collectives(model, fsdp=8)
  # Gradients of experts are scattered as they are summed; of the others, XLA's CPU backend sums all.
  scattered = found.pop(('reduce-scatter', 'fsdp'), [])
  assert runs(scattered) == (3 * L if model.num_experts else 0)
  assert set(found) == {('all-gather', 'fsdp'), ('all-reduce', 'fsdp')}
  gathered = found['all-gather', 'fsdp']
  # Weights alone, each matrix of a layer once forward and once backward; no activations.
  assert sizes(gathered) == {D * D, V * D, 4 * D * F if model.num_experts else D * F}
  assert runs(gathered) == 2 * 7 * L + 2
  assert not whole


def test_zero1_gathers_each_updated_parameter_once():
  found, _ = collectives(DENSE, data=8, zero=1)
  assert set(found) == {('all-gather', 'data'), ('all-reduce', 'data')}
  assert runs(found['all-gather', 'data']) == 9


def test_tensor():
  found, _ = collectives(DENSE, tensor=8)
  # Of activations, [B, T, D]: gathered before each product that needs the whole length, and summed after.
  kinds = {('all-gather', 'tensor'), ('all-reduce', 'tensor'), ('reduce-scatter', 'tensor')}
  assert set(found) <= kinds
  gathered = found['all-gather', 'tensor']
  assert {shape for shape, _ in gathered} == {(B, T, D)}
  assert runs(gathered) == 4 * L + 2  # Two a layer in each direction, embedding and head.


@pytest.mark.slow
def test_context():
  found, _ = collectives(DENSE, context=8)
  assert set(found) == {('collective-permute', 'context'), ('all-reduce', 'context')}
  # The ring carries keys and values and their gradients, no more than a device's own part at a time.
  assert max(a[0] * a[1] for a, _ in found['collective-permute', 'context']) <= B * T // 8 * N
  assert sizes(e for e in found['all-reduce', 'context'] if len(e[0]) > 1) == SIZES


@pytest.mark.slow
def test_expert():
  found, _ = collectives(MOE, expert=4, fsdp=2)
  over = lambda axes: {kind for kind, a in found if a == axes}
  # Tokens go to the experts and come back; weights of the experts stay where they are.
  assert over('expert') == {'all-gather', 'reduce-scatter'}
  assert {shape for shape, _ in found['all-gather', 'expert']} == {(B // 2, T, D)}
  assert over('fsdp') == {'all-gather', 'reduce-scatter'}
  assert over('fsdp+expert') == {'all-gather', 'all-reduce'}
  assert set(found) == {(kind, axes) for axes in ('expert', 'fsdp', 'fsdp+expert') for kind in over(axes)}


@pytest.mark.slow
def test_experts_with_a_capacity_exchange_slots_and_share_them_along_context():
  found, _ = collectives(dataclasses.replace(MOE, capacity_factor=1.0), expert=2, context=4)
  slots = T * 2 // 4  # Of an expert for a sequence; a quarter of them on each device.
  exchanged = found['all-to-all', 'expert']
  assert sum(math.prod(shape) * n for shape, n in exchanged) == 4 * L * B * 4 // 2 * slots // 4 * D
  assert runs(found['reduce-scatter', 'context']) == 2 * L  # Of the result, and of the input's gradient.


def test_two_slices_send_gradients_alone_between_them():
  found, _ = collectives(DENSE, data=1, fsdp=4, dcn_data=2)
  assert {kind for kind, axes in found if 'data' in axes} == {'all-reduce'}


@pytest.mark.parametrize('schedule', ['gpipe', '1f1b'])
def test_stage(schedule):
  found, _ = collectives(DENSE, PipelineSpec(schedule=schedule, microbatches=4), stage=2, data=4)
  between = {kind for kind, axes in found if axes == 'stage'}
  assert 'collective-permute' in between
  assert between <= {'collective-permute', 'all-gather', 'all-reduce', 'reduce-scatter'}
  # No layer's weights leave their stage: what is gathered over it are embedding, head, and rows.
  for (kind, axes), entries in found.items():
    if 'stage' in axes and kind in ('all-gather', 'all-reduce'):
      assert not {D * D, D * F} & sizes(entries), (kind, axes)


def test_an_array_that_is_whole_everywhere_is_seen():
  """The check itself: plain data parallelism keeps everything whole."""
  _, whole = collectives(DENSE, data=8)
  assert {(V, D), (L, D, F)} <= {r.shape for r in whole}
  assert jax.device_count() == 8
